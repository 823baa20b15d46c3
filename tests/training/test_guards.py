"""Oracles: decisions worked out by hand; a run in one piece beside the same run in two."""

import dataclasses
import json
import math

import pytest

from copsd_jax.metrics import metric_files, token_stats
from copsd_jax.training import guards


def run(texts, series):
    """(final state, [(step, action)]) of steps 1, 2, ... with these metrics."""
    rules = guards.parse_rules(texts)
    state, fired = guards.init_guard_state(rules), []
    for step, values in enumerate(series, 1):
        state, events = guards.apply_rules(rules, state, step, values)
        fired += [(event.step, event.action) for event in events]
    return state, fired


def of(name, *values):
    return [{name: value} for value in values]


# ---- the grammar -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, rule",
    [
        ("repetition>0.5:stop", ("repetition", True, 0.5, False, 1, "stop", 1.0)),
        ("entropy_student<0.1@3:lr*0.5", ("entropy_student", False, 0.1, False, 3, "lr", 0.5)),
        ("completion_tokens>2*first:warn", ("completion_tokens", True, 2.0, True, 1, "warn", 1.0)),
        ("seconds/rollout>1e3:warn", ("seconds/rollout", True, 1000.0, False, 1, "warn", 1.0)),
        ("advantage<-.5@10:lr*1e-1", ("advantage", False, -0.5, False, 10, "lr", 0.1)),
        ("format<0.5*first@2:stop", ("format", False, 0.5, True, 2, "stop", 1.0)),
    ],
)
def test_rules(text, rule):
    assert guards.parse_rules([text]) == (guards.Rule(*rule, text=text),)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("repetition>0.5", "the choices of ACTION are warn, stop, lr*FACTOR"),
        ("repetition>0.5:halt", "the choices of ACTION are warn, stop, lr*FACTOR"),
        ("repetition=0.5:stop", "a rule is METRIC>LIMIT"),
        ("repetition>half:stop", "LIMIT is a number or NUMBER*first"),
        ("repetition > 0.5:stop", "a rule is METRIC>LIMIT"),
        ("repetition>first*2:stop", "LIMIT is a number or NUMBER*first"),
        (">0.5:stop", "a rule is METRIC>LIMIT"),
        ("", "a rule is METRIC>LIMIT"),
        ("repetition>nan:stop", "a rule is METRIC>LIMIT"),
        ("repetition>1e999:stop", "LIMIT must be finite"),
        ("repetition>0.5@0:stop", "STEPS must be at least 1"),
        ("repetition>0.5@1.5:stop", "a rule is METRIC>LIMIT"),
        ("repetition>0.5:lr*1", "above 0 and below 1"),
        ("repetition>0.5:lr*0", "above 0 and below 1"),
        ("repetition>0.5:lr*-0.5", "above 0 and below 1"),
        ("tokens>0.5*first:stop", "at least 1 with >"),  # would fire at step 1
        ("tokens<2*first:stop", "at most 1 with <"),
        ("tokens<-1*first:stop", "at most 1 with <"),
    ],
)
def test_what_is_no_rule_is_refused(text, reason):
    with pytest.raises(ValueError) as error:
        guards.parse_rules([text])
    assert str(error.value).startswith(f"guards.rules has {text!r}: ")
    assert reason in str(error.value)


def test_a_rule_that_occurs_twice_is_refused():
    guards.parse_rules(["a>1:lr*0.5", "a>2:lr*0.5"])
    with pytest.raises(ValueError, match=r"'a>1:lr\*0\.5': it occurs twice"):
        guards.parse_rules(["a>1:lr*0.5", "b>1:stop", "a>1:lr*0.5"])


# ---- decisions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, values, fired",
    [
        ("x>0.5:stop", [0.4, 0.5, 0.51], [3]),  # the limit itself is not above
        ("x<0.5:stop", [0.6, 0.5, 0.49], [3]),
        ("x>1:warn", [2, 2, 0, 2, 2], [1, 4]),  # once an excursion
        ("x>1@3:warn", [2, 2, 0, 2, 2, 2, 2], [6]),
        ("x<0.1@2:stop", [0, 0.2, 0, 0, 0], [4]),
        ("x>1@2:lr*0.5", [2, 2, 2, 2, 2, 0, 2, 2], [2, 4, 8]),  # again after 2 more
        ("x>1:lr*0.5", [2, 2, 0, 2], [1, 2, 4]),
        ("x>2*first:warn", [10, 20, 20.5], [3]),
        ("x<0.5*first@2:warn", [10, 4, 6, 4, 4], [5]),
        ("x>1:stop", [math.nan], [1]),  # compares with nothing, and is no good sign
        ("x<1:stop", [0.5 + 1, math.nan], [2]),
        ("x>1:stop", [math.inf], [1]),
        ("x<1:stop", [math.inf], []),
        ("x>1:stop", ["0.5", "nan"], [2]),  # as in metrics.jsonl
        ("x>2*first:warn", [math.inf, 3, 6, 7], [4]),  # the first finite value
        ("x>2*first:warn", [math.nan, 3, 6, 7], [1, 4]),
    ],
)
def test_when_a_rule_fires(rule, values, fired):
    assert [step for step, _ in run([rule], of("x", *values))[1]] == fired


def test_the_learning_rate_is_multiplied_each_time():
    state, fired = run(
        ["x>1@2:lr*0.5", "y<0:lr*0.1", "x>9:warn"],
        [{"x": 2, "y": 1}, {"x": 2, "y": -1}, {"x": 10, "y": 1}, {"x": 2, "y": 1}],
    )
    assert fired == [(2, "lr"), (2, "lr"), (3, "warn"), (4, "lr")]
    assert state["factor"] == 0.5 * 0.1 * 0.5
    assert state["stopped"] == ""


def test_what_the_events_say():
    rules = guards.parse_rules(["x>2*first@2:stop", "y<0.1:lr*0.5", "z>5:warn"])
    state = guards.init_guard_state(rules)
    for step, x in ((7, 10), (8, 21)):
        state, events = guards.apply_rules(rules, state, step, {"x": x, "y": 1.0, "z": 5})
        assert events == []
    state, events = guards.apply_rules(rules, state, 9, {"x": 22.22222, "y": 0.05, "z": math.nan})
    assert [event.text for event in events] == [
        "step 9: x is 22.22, above 20 (2 x its first value) for 2 steps: the run stops "
        "(guards.rules x>2*first@2:stop)",
        "step 9: y is 0.05, below 0.1 for 1 step: the learning rate is multiplied by 0.5 "
        "(guards.rules y<0.1:lr*0.5)",
        "step 9: z is nan, beyond 5 for 1 step: a warning (guards.rules z>5:warn)",
    ]
    assert state["stopped"] == events[0].text
    later, events = guards.apply_rules(rules, state, 10, {"x": 1, "y": 1.0, "z": 0})
    assert (events, later["stopped"]) == ([], state["stopped"])  # it stays stopped


def test_without_rules_nothing_happens():
    assert run([], of("x", 1, math.nan)) == (
        {"factor": 1.0, "stopped": "", "rules": []},
        [],
    )


# ---- metrics that are not there --------------------------------------------------------------


def test_a_name_that_is_no_metric_is_refused_before_the_run():
    for text, reason in [
        ("repetiton>0.5:stop", "there is no metric 'repetiton': did you mean repetition"),
        ("replly_ok<1:stop", "there is no metric 'replly_ok': did you mean reply_ok"),
        ("divergence_at_128>9:stop", "did you mean divergence_at_128_511"),
    ]:
        with pytest.raises(ValueError) as error:
            guards.check_metrics(guards.parse_rules(["loss>3:stop", text]))
        assert str(error.value).startswith(f"guards.rules has {text!r}: ")
        assert reason in str(error.value)
    with pytest.raises(ValueError, match=r"no metric 'qq': the metrics are loss, .*reply_STATUS"):
        guards.check_metrics(guards.parse_rules(["qq>1:stop"]))


CONDITIONAL = ("overlap", "divergence_at_128_511", "correct", "advantage_number", "entropy_teacher",
               "reply_quotes_error", "located_closest_step", "grade_raised", "shortened_attempt",
               "informative", "kl_initial", "ratio", "seconds/rollout")  # fmt: skip


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_metric_that_only_some_steps_have_is_no_error(name):
    """Neither before the run, nor in a step that lacks it, which may be the first."""
    rules = guards.check_metrics(guards.parse_rules([f"{name}>0.5@2:stop"]))
    state, steps = guards.init_guard_state(rules), [{"loss": 1}, {name: 2}, {"loss": 1}, {name: 2}]
    for step, values in enumerate(steps, 1):
        state, _ = guards.apply_rules(rules, state, step, values)
    # Two steps in a row that have it; a count that is not there is 0, and ends the row.
    assert bool(state["stopped"]) != name.startswith(("reply", "located", "grade", "shortened"))


def test_a_later_step_without_the_metric_does_not_count():
    series = [{"x": 0, "y": 0}, {"x": 2, "y": 0}, {"y": 0}, {"x": 2, "y": 0}]
    assert run(["x>1@2:stop"], series)[1] == [(4, "stop")]


def test_the_buckets_of_the_metrics_names_are_those_that_are_made():
    made = token_stats.by_position([1.0] * 600, [1] * 600)
    assert {f"divergence_at_{bucket}" for bucket in made} <= set(guards.METRICS)


@pytest.mark.parametrize("first", [0.0, -3.0])
def test_a_relative_limit_is_of_the_first_value_above_0(first):
    """A divergence from the initial policy begins with 0."""
    assert run(["x>2*first:stop"], of("x", first, 0.1, 0.2, 0.21))[1] == [(4, "stop")]
    assert run(["x<0.5*first:stop"], of("x", first, 0.1, 0.06, 0.04))[1] == [(4, "stop")]


def test_a_relative_limit_of_what_is_below_0_is_refused():
    guards.check_metrics(
        guards.parse_rules(["advantage_negative>2*first:warn", "divergence>2*first:warn"])
    )
    for name in ("logp_student", "advantage", "advantage_number"):
        with pytest.raises(ValueError, match=f"{name} is usually below 0"):
            guards.check_metrics(guards.parse_rules([f"{name}>2*first:warn"]))


# ---- a continued run -------------------------------------------------------------------------

RULES = ("loss>3@2:warn", "loss>1.5*first@2:lr*0.7", "length<0.9*first@3:lr*0.3",
         "rare>0@2:warn", "loss>100:stop")  # fmt: skip


def series():
    """Loss and length that wander, with nan and a metric that comes and goes."""
    for step in range(1, 41):
        values = {"loss": 2 + 2 * math.sin(step / 3), "length": 50 + 10 * math.cos(step / 5)}
        if step == 17:
            values["loss"] = math.nan
        if step % 3 == 1:
            values["rare"] = step % 2
        yield step, values


def test_a_run_in_two_pieces_decides_as_one(tmp_path):
    rules = guards.parse_rules(RULES)
    state, decided = guards.init_guard_state(rules), []
    with metric_files.Writer(tmp_path) as writer:
        for step, values in series():
            writer.write(step, values)
            before = json.dumps(state)
            after, events = guards.apply_rules(rules, state, step, values)
            assert json.dumps(state) == before  # not changed
            decided.append((after, events))
            state = after
    fired = {event.action for _, events in decided for event in events}
    assert fired == {"warn", "lr", "stop"}  # the nan of step 17 stops
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for cut in range(41):
        again, _ = guards.replay_events(rules, lines[:cut])
        for (step, values), (after, events) in list(zip(series(), decided, strict=True))[cut:]:
            again, said = guards.apply_rules(rules, again, step, values)
            assert (again, said) == (after, events)


def test_the_state_is_json():
    rules = guards.parse_rules(RULES)
    state, _ = guards.apply_rules(
        rules, guards.init_guard_state(rules), 1, {"loss": 9.0, "length": 1, "rare": 0}
    )
    assert json.loads(json.dumps(state, allow_nan=False)) == state


@pytest.mark.parametrize("line", ['{"loss": 1', '{"loss": 1}', "[1]", ""])
def test_a_line_that_is_none_of_metrics_is_refused(line):
    rules = guards.parse_rules(["loss>3:warn"])
    with pytest.raises(ValueError, match=r"line 2 is not from metrics\.jsonl"):
        guards.replay_events(rules, ['{"step": 1, "loss": 1}', line])


def test_a_stopped_run_is_known_as_stopped():
    rules = guards.parse_rules(["loss>3:stop"])
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in ((1, 1), (2, 4))]
    assert guards.replay_events(rules, lines)[0]["stopped"].startswith("step 2: loss is 4, above 3")


def test_lost_events_are_rebuilt_from_the_metrics():
    """Any part of events.jsonl may be lost; what is left is not repeated."""
    rules = guards.parse_rules(["loss>2:warn", "tokens>5:lr*0.5"])
    lines = [json.dumps({"step": s, "loss": s % 4, "tokens": 4 + s}) for s in range(1, 9)]
    _, events = guards.replay_events(rules, lines)
    entries = [dataclasses.asdict(event) for event in events]
    assert [entry["step"] for entry in entries] == [2, 3, 3, 4, 5, 6, 7, 7, 8]
    by_step = sorted(entries, key=lambda entry: (entry["step"], entry["action"]))
    for kept in (entries, [], entries[:4], entries[::2]):
        got = guards.rebuild_events(kept, events)
        assert sorted(got, key=lambda entry: (entry["step"], entry["action"])) == by_step
        assert [entry["step"] for entry in got] == [entry["step"] for entry in entries]
