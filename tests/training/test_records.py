"""What a step says of itself: records, metrics, counts, failures.

Oracles: sums over the records for the step's own metrics, scripted texts, statuses counted by hand.
"""

import json
import sys
import types

import jax
import numpy as np
import pytest
import runs
from test_methods import completion, one_device, right, row_with, script, spoiled

from copsd_jax import main, summary
from copsd_jax.methods import authors, table
from copsd_jax.runtime import continuation, workdir
from copsd_jax.teaching import contexts
from copsd_jax.training import guards, loaded_run, rollout_records, run_facts, run_plan

optax_promotes = runs.optax_promotes
one_device = one_device


def stepped(r, state, rows):
    """(work, all metrics of its step but the times); the records have their tokens."""
    work = table.METHODS[r.plan.config.method].make_batch(r, state, rows, 0)
    _, aux = r.step(state, r.frozen, work.batch, work.student_prefix, work.teacher_kv)
    aux = jax.device_get(aux)
    values = {**rollout_records.drop_empty_means(r.options.policy, aux.metrics), **work.metrics}
    return work, values | rollout_records.add_rollout_token_values(r, work, aux)


def over(records, name, mask):
    """All values of the tokens in a mask."""
    return [
        value
        for record in records
        if name in record
        for value, kept in zip(record[name], record[mask], strict=True)
        if kept
    ]


def moved(state, by):
    """The state with every weight of the adapter changed, so that it is not the initial policy."""
    return state._replace(trained=jax.tree.map(lambda x: x + by, state.trained))


# ---- tokens of the policy loss -----------------------------------------------------------------


@pytest.mark.slow
def test_records_of_grpo_hold_what_its_loss_knows_of_each_token(monkeypatch):
    settings = {"policy__kl": 0.1, "policy__old": "sampler", "policy__clip_high": 0.3}
    with runs.loaded("grpo", train__batch=1, rollout__per_prompt=4, **settings) as (r, state):
        row = row_with(r, 1)
        script(monkeypatch, [right(row), "\\boxed{1}", "\\boxed{2}", right(row)])
        work, values = stepped(r, moved(state, 0.02), [row])
    for record in work.records:
        n = len(record["completion_ids"])
        assert record["loss_mask"] == [0] * n
        assert record["policy_mask"] == [1] * n
        for name in ("entropy_policy", "kl_initial", "ratio_clipped", "policy_ratio"):
            assert len(record[name]) == n, name
    for name, metric in (
        ("entropy_policy", "policy_entropy"), ("kl_initial", "kl_initial"),
        ("ratio_clipped", "ratio_clipped"), ("policy_loss", "policy_loss"),
        ("policy_ratio", "policy_ratio"),
    ):  # fmt: skip
        mean = np.mean(over(work.records, name, "policy_mask"))
        np.testing.assert_allclose(mean, values[metric], atol=2e-5, rtol=1e-4)
    # The scripted sampler said -1 of every token.
    expected = np.exp(np.add(work.records[0]["logp_policy"], 1.0))
    np.testing.assert_allclose(work.records[0]["policy_ratio"], expected, rtol=1e-3, atol=1e-6)
    assert values["kl_initial"] > 0
    low = [r < 0.8 for r in work.records[1]["policy_ratio"]]  # a negative advantage
    assert work.records[1]["ratio_clipped"] == low
    assert any(low)


@pytest.mark.slow
def test_records_of_sft_say_which_tokens_it_trains():
    with runs.loaded("sft") as (r, state):
        rows = runs.batch_at(r.plan.rows, ["en"], (), 8, 0, 0)
        work, values = stepped(r, state, rows)
    for record in work.records:
        assert record["policy_mask"] == [1] * len(record["completion_ids"])
        assert len(record["entropy_policy"]) == len(record["completion_ids"])
        assert not record.keys() & {"advantage", "ratio_clipped", "kl_initial", "policy_ratio"}
    # A cross entropy has no ratio and no initial policy.
    assert not values.keys() & {"ratio_clipped", "kl_initial"}
    assert {"policy_loss", "policy_entropy"} <= values.keys()


@pytest.mark.slow
def test_a_mixture_has_both_masks_and_the_advantages(monkeypatch):
    settings = {"policy__weight": 0.5, "policy__route": "successes", "policy__scale": "none"}
    with runs.loaded("sdpo", train__batch=1, **settings) as (r, state):
        row = row_with(r, 1)
        script(monkeypatch, ["\\boxed{1}", right(row)])
        work, values = stepped(r, state, [row])
    wrong, good = work.records
    assert (set(wrong["loss_mask"]), set(wrong["policy_mask"])) == ({1}, {0})
    assert (set(good["loss_mask"]), set(good["policy_mask"])) == ({0}, {1})
    assert good["advantage"] == 0.5
    assert "advantage" not in wrong
    assert "ratio_clipped" in good
    assert not good.keys() & {"kl_initial", "policy_ratio"}  # neither is used
    assert "kl_initial" not in values


# ---- tokens of the divergence ------------------------------------------------------------------


@pytest.mark.slow
def test_the_weight_of_the_samplers_tokens_is_recorded(monkeypatch):
    settings = {"loss__rollout_clip": 0.5, "loss__clip_mode": "element", "loss__clip": 1e-4}
    with runs.loaded("opsd", train__batch=2, **settings) as (r, state):
        row = row_with(r, 1)
        script(monkeypatch, [right(row), "17 is it"])
        work, values = stepped(r, state, [row, row])
    for record in work.records:
        gap = np.subtract(record["logp_student"], record["logp_sampler"])
        np.testing.assert_allclose(record["ratio"], np.minimum(np.exp(gap), 0.5), atol=2e-6)
    for name in ("ratio", "clipped_mass"):
        mean = np.mean(over(work.records, name, "loss_mask"))
        np.testing.assert_allclose(mean, values[name], rtol=1e-4, atol=1e-6)
    assert values["clipped_mass"] > 0


@pytest.mark.slow
def test_divergences_by_class_and_position_are_parts_of_the_divergence(monkeypatch):
    """A completion whose right prefix carries no loss: each mean times its tokens adds up."""
    settings = {"rollout__per_prompt": 2, "train__batch": 1}
    with runs.loaded("rosd", **settings) as (r, state):
        row = row_with(r, 2)
        wrong, _ = spoiled(row)
        script(monkeypatch, [wrong, right(row)])
        # Far from the teacher: records hold six decimals.
        work, values = stepped(r, moved(state, 1.0), [row])
        classes = r.token_classes
    masks = [np.asarray(record["loss_mask"]) for record in work.records]
    assert 0 < masks[0].sum() < len(masks[0])
    names = ["number", "word", "mark", "end", "other"]
    total = 0.0
    for i, name in enumerate(names):
        count = sum(
            int(mask[classes[np.asarray(record["completion_ids"])] == i].sum())
            for mask, record in zip(masks, work.records, strict=True)
        )
        assert (f"divergence_{name}" in values) == (count > 0)
        total += count * values.get(f"divergence_{name}", 0.0)
    tokens = sum(mask.sum() for mask in masks)
    np.testing.assert_allclose(total / tokens, values["divergence"], atol=6e-7)
    total = sum(
        values.get(f"divergence_at_{name}", 0.0) * sum(mask[a:b].sum() for mask in masks)
        for name, a, b in (("0_7", 0, 8), ("8_31", 8, 32), ("32_127", 32, 128))
    )
    np.testing.assert_allclose(total / tokens, values["divergence"], atol=6e-7)
    advantages = np.concatenate(
        [np.subtract(x["logp_teacher"], x["logp_student"]) for x in work.records]
    )
    np.testing.assert_allclose(values["advantage"], advantages.mean(), rtol=1e-5)


# ---- metrics over nothing ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_mean_over_no_tokens_is_left_out(monkeypatch):
    """A failure without a success: no context, no loss; and no policy loss on failures."""
    settings = {"policy__weight": 0.5, "policy__route": "successes", "context__feedback": "never"}
    with runs.loaded("sdpo", train__batch=1, **settings) as (r, state):
        row = row_with(r, 1)
        script(monkeypatch, ["\\boxed{1}", "\\boxed{1}"])
        _, values = stepped(r, state, [row])
    assert values["loss_tokens"] == values["policy_tokens"] == values["taught"] == 0
    gone = {"divergence", "logp_student", "logp_teacher", "entropy_teacher", "clipped_mass",
            "policy_loss", "policy_entropy", "ratio_clipped", "kl_initial"}  # fmt: skip
    assert not values.keys() & gone
    assert values["entropy_student"] > 0  # over all tokens
    assert values["logp_gap_max"] > 0  # of completions without loss too


@pytest.mark.slow
def test_what_a_guard_reads_of_a_step_without_loss(tmp_path, capsys):
    """With 0 for the divergence of no token, this rule would stop the run."""
    argv = runs.argv(
        "sdpo", tmp_path / "w", train__steps=1, eval__limit=2, train__batch=8,
        context__feedback="never",
    )  # fmt: skip
    argv.append("--config.guards.rules=entropy_teacher<1e-9:stop,overlap>2:stop,loss<1:warn")
    assert main.main(argv) == 0
    (line,) = runs.steps_of(tmp_path / "w")
    assert line["loss_tokens"] == 0  # random weights: nobody succeeds
    assert "stopped by a guard" not in capsys.readouterr().out
    events = (tmp_path / "w/events.jsonl").read_text().splitlines()
    assert [json.loads(event)["action"] for event in events] == ["warn"]


def test_a_guard_on_no_metric_is_refused_before_weights_are_read():
    with pytest.raises(ValueError, match=r"guards\.rules has 'divergance>2:stop'.*divergence"):
        run_plan.make_plan(runs.config("opsd", guards__rules="divergance>2:stop"))
    run_plan.make_plan(runs.config("opsd", guards__rules="overlap>0.9:stop,advantage_mark>3:warn"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "card, settings",
    [
        ("opsd", {}),
        ("rosd", {"author__kind": "student", "author__max_tokens": 8}),
        ("sdpo", {"policy__weight": 0.5, "policy__kl": 0.1, "policy__old": "sampler"}),
        ("grpo", {"policy__rollout_clip": 2.0}),
        ("sft", {}),
    ],
)  # fmt: skip
def test_guards_know_every_metric_that_a_run_writes(card, settings):
    with runs.loaded(card, **settings) as (r, state):
        rows = runs.batch_at(r.plan.rows, ["en"], (), r.plan.config.train.batch, 0, 0)
        _, values = stepped(r, state, rows)
    # A run writes this one never: it goes on only if the weights are finite.
    assert values.keys() <= {*guards.METRICS, "weights_finite"}


# ---- grades ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_grade_statuses_are_counted(monkeypatch, tmp_path):
    texts = ["RIGHT", "\\boxed{1}", "no answer", "still none"]
    with runs.loaded("grpo", train__batch=1, rollout__per_prompt=4) as (r, state):
        row = row_with(r, 1)
        script(monkeypatch, [text.replace("RIGHT", right(row)) for text in texts])
        work, values = stepped(r, state, [row])
    assert values["grade_no_answer"] == 2
    assert values["grade_plain"] == 2
    assert values["format"] == 0.5
    # The table at the end leaves out what grading should come to.
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **work.metrics}) + "\n")
    table = summary.summarize_totals(tmp_path, 1)
    assert "grade no answer" in table
    assert "grade plain" not in table


@pytest.mark.slow
def test_a_function_that_raises_is_counted_and_has_no_format(monkeypatch):
    def score(gold, text):
        if "boom" in text:
            raise KeyError("boom")
        return 1.0

    module = types.ModuleType("a_reward")
    vars(module)["score"] = score
    monkeypatch.setitem(sys.modules, "a_reward", module)
    settings = {"train__batch": 1, "rollout__per_prompt": 3, "reward__kind": "a_reward:score"}
    with runs.loaded("grpo", **settings) as (r, state):
        row = row_with(r, 1)
        script(monkeypatch, ["boom", "fine", "fine"])
        work, values = stepped(r, state, [row])
    assert (values["grade_raised"], values["grade_computed"]) == (1, 2)
    assert "format" not in values
    assert work.records[0]["grade_status"] == "raised:KeyError"
    assert [record["grade_detail"] for record in work.records] == ["KeyError: 'boom'", "", ""]


# ---- writers -----------------------------------------------------------------------------------


def endings(monkeypatch, *calls):
    """`script` with (text, finish) for the writer's call."""
    waiting = list(calls)

    def sample(r, policy, asked, section, keys):
        return runs.sampled([completion(r, *said) for said in waiting.pop(0)])

    monkeypatch.setattr(loaded_run, "sample", sample)


REPLY = "<explanation>Check the sum.</explanation>"
ROSD = {"author__kind": "student", "author__max_tokens": 9, "train__batch": 1}


def test_a_reply_that_ended_at_its_limit_is_marked(monkeypatch):
    for published, statuses in ((False, ["ok", "cut"]), (True, ["ok", "ok"])):
        with (
            runs.loaded("rosd", **ROSD, parity__reflection_tags=published) as (r, state),
            monkeypatch.context() as patch,
        ):
            row = row_with(r, 1)
            endings(patch, [(right(row),)] * 2, [(REPLY,), (REPLY + " And", "length")])
            work = table.METHODS["distill"].make_batch(r, state, [row], 0)
        assert [record["reply_status"] for record in work.records] == statuses
        assert [record["reply_cut"] for record in work.records] == [False, True]
        assert work.records[1]["reply"] == REPLY + " And"  # what was written is not lost
        assert [record["taught"] for record in work.records] == [True, published]
        assert work.metrics["replies_cut"] == 1


def test_an_analysis_is_taken_as_far_as_it_came_and_counted(monkeypatch):
    settings = {"context__kind": "reason_first", "author__kind": "teacher", "train__batch": 1}
    with runs.loaded("opsd", **settings, author__max_tokens=9) as (r, state):
        row = row_with(r, 1)
        endings(monkeypatch, [(right(row),)], [("First the sum is", "length")])
        work = table.METHODS["distill"].make_batch(r, state, [row], 0)
        # A server may have used up its tokens for thinking that it does not show.
        asked = authors.AuthorRequest(contexts.Attempt(row), 0, None)
        read = [
            authors._read_author_text(r, asked, authors.AuthorText(text, "cut"))
            for text in ("Half", "")
        ]
    assert (work.records[0]["reply_status"], work.records[0]["reply_cut"]) == ("ok", True)
    assert "First the sum is" in work.records[0]["teacher_prompt"]
    assert work.metrics["replies_cut"] == 1
    assert [(reply.status, reply.cut) for reply in read] == [("ok", True), ("cut", True)]


def test_a_dropped_leak_keeps_what_was_written(monkeypatch):
    with runs.loaded("rosd", **ROSD, context__leak="drop") as (r, state):
        row = row_with(r, 1)
        leaky = f"<explanation>It is {row.answer}.</explanation>"
        endings(monkeypatch, [(right(row),)] * 2, [(leaky,), (REPLY,)])
        work = table.METHODS["distill"].make_batch(r, state, [row], 0)
    first = work.records[0]
    assert (first["reply_status"], first["reply"], first["taught"]) == (
        "leak_dropped",
        leaky,
        False,
    )


def test_sections_that_the_writer_was_shown_cut_are_counted(monkeypatch):
    """Both attempts are too long for a writer that is shown 12 tokens."""
    with runs.loaded("rosd", **ROSD, context__section_tokens=12) as (r, state):
        row = row_with(r, 2)
        long = REPLY.replace("sum", "sum and all that stands before it, every one of the terms")
        asked = script(monkeypatch, [right(row)] * 2, [REPLY, long])
        work = table.METHODS["distill"].make_batch(r, state, [row], 0)
    assert right(row) not in asked[1][0]
    assert [record["writer_shortened"] for record in work.records] == [["attempt"]] * 2
    assert [record["shortened"] for record in work.records] == [[], ["reflection"]]
    counted = {k: v for k, v in work.metrics.items() if k.startswith("shortened_")}
    assert counted == {"shortened_attempt": 2, "shortened_reflection": 1}


def test_a_critic_is_held_against_the_steps_that_it_was_shown(monkeypatch):
    """It repeats the first of two right steps, all that it saw, and finds the attempt right."""
    settings = ROSD | {"prompt__form": "plain"}
    with runs.loaded("critique", **settings) as (r, _):
        row = row_with(r, 2)
        first = row.solution.split(" and ")[0] + "."
        text = f"{first} {row.solution.split(' and ')[1]} \\boxed{{{row.answer}}}"
        limit = len(r.plan.tokenizer.encode(first, add_special_tokens=False))
    said = f"<case>right</case><step_1>{first}</step_1><answer>{row.answer}</answer>"
    found = []
    for tokens in (0, limit):
        with (
            runs.loaded("critique", **settings, context__section_tokens=tokens) as (r, state),
            monkeypatch.context() as patch,
        ):
            script(patch, [text], [said])
            work = table.METHODS["distill"].make_batch(r, state, [row], 0)
            found.append(work.records[0]["reply_status"])
    assert found == ["prefix_changed", "ok"]


# ---- the run's directory -----------------------------------------------------------------------


def test_replies_and_exemplars_belong_to_the_run(tmp_path):
    path = tmp_path / "replies.jsonl"
    shots = tmp_path / "shots.jsonl"

    def facts(reply, n):
        path.write_text(json.dumps({"id": "a", "reply": reply}) + "\n")
        row = {"problem": "p", "solution": f"{n} + 1 = {n + 1}.", "answer": str(n + 1)}
        shots.write_text(json.dumps(row) + "\n")
        plan = run_plan.make_plan(runs.config(
            "critique", author__kind="file", author__path=path, prompt__exemplars=1,
            prompt__exemplars_path=shots,
        ))  # fmt: skip
        return run_facts.collect_facts(plan)

    before = facts("one", 2)
    workdir.create(tmp_path / "w", {}, before)
    assert continuation.compare_facts(tmp_path / "w", facts("one", 2), ()) == []
    for reply, n, name in (("two", 2, "author"), ("one", 3, "exemplars")):
        with pytest.raises(ValueError, match=rf"\({name}_fingerprint was \w{{12}}, now \w{{12}}\)"):
            continuation.compare_facts(tmp_path / "w", facts(reply, n), ())
    # A run of before there were these fingerprints goes on.
    old = {k: v for k, v in before.items() if k != "author_fingerprint"}
    workdir.create(tmp_path / "old", {}, old)
    continuation.compare_facts(tmp_path / "old", facts("two", 2), ())


def test_how_a_server_is_asked_may_change():
    known = runs.config("opsd")
    for name in ("slots", "timeout", "retries", "backoff", "concurrency", "key_env"):
        assert f"author.{name}".startswith(continuation.CHANGEABLE), name
        assert name in known.author
    for name in ("author.kind", "author.model", "author.url", "author.max_tokens", "author.path"):
        assert not name.startswith(continuation.CHANGEABLE)


@pytest.mark.slow
def test_events_of_a_run_in_two_pieces_are_those_of_one(tmp_path, monkeypatch):
    """A rule acts at step 3; the run is killed in step 4, behind the checkpoint of step 2."""
    make = table.METHODS["distill"].make_batch
    settings = {"train__steps": 4, "train__save_every": 2, "eval__path": "", "train__batch": 8}
    argv = runs.argv("opsd", tmp_path / "w", **settings)
    argv.append("--config.guards.rules=tokens>60:warn,loss>-1e9@3:lr*0.5")

    def killed(r, state, rows, step):
        if step == 3:
            raise KeyboardInterrupt
        return make(r, state, rows, step)

    monkeypatch.setattr(table.METHODS["distill"], "make_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        main.main(argv)
    path = tmp_path / "w/events.jsonl"
    first = path.read_text()
    monkeypatch.setattr(table.METHODS["distill"], "make_batch", make)
    assert main.main(argv) == 0
    assert path.read_text() == first
    events = [json.loads(line) for line in first.splitlines()]
    assert [(e["step"], e["action"]) for e in events][-1] == (3, "lr")
    assert events[-1]["text"].startswith("step 3: loss is")
