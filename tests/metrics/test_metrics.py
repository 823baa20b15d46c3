"""Oracles: enumeration of subsets and sign patterns, numbers by hand, published tables."""

import contextlib
import io
import itertools
import json
import math
import re
import struct
import time

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest

from copsd_jax.metrics import metric_files, scoring, terminal
from copsd_jax.training import guards

FEW = hypothesis.settings(max_examples=40, derandomize=True, deadline=None, database=None)


# ---- means and statistics --------------------------------------------------------------------


@pytest.mark.parametrize(
    "correct, n, low, high",
    # Wilson's interval without continuity correction: 81 of 263 and 0 of 20, 1 of 29 are the
    # examples of Newcombe (1998), Statistics in Medicine 17, table I; 15 of 148 too.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_interval_of_zeros_and_ones_is_wilsons(correct, n, low, high):
    assert scoring.compute_score_interval([1.0] * correct + [0.0] * (n - correct)) == pytest.approx(
        (correct / n, low, high), abs=6e-5
    )


def test_interval_is_clustered_by_problem():
    """Twelve like samples of a problem say no more than one; unlike samples do."""
    problems = [1.0] * 30 + [0.0] * 70
    _, low, high = scoring.compute_score_interval(problems)
    _, low_mixed, high_mixed = scoring.compute_score_interval([0.3] * 50 + [0.4] * 25 + [0.2] * 25)
    assert high - low == pytest.approx(0.178, abs=0.003)
    # The standard error by hand: sqrt(0.005 / 100); Wilson shrinks towards 1/2 a little.
    assert high_mixed - low_mixed == pytest.approx(2 * 1.96 * math.sqrt(0.005 / 100), rel=0.01)


def test_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        rates = rng.beta(0.6, 1.4, size=60)  # mean 0.3; problems differ
        _, low, high = scoring.compute_score_interval(rng.binomial(8, rates) / 8)
        hits += low <= 0.3 <= high
    assert 0.92 <= hits / 500 <= 0.98


@pytest.mark.parametrize("bad", [[], [0.5, 1.1], [-0.1], [math.nan], [[0.5]]])
def test_interval_refuses_what_is_no_share(bad):
    with pytest.raises(ValueError):
        scoring.compute_score_interval(bad)


@pytest.mark.parametrize("up, down", [(0, 0), (1, 0), (5, 0), (3, 7), (6, 6), (9, 2)])
def test_sign_test_by_enumeration(up, down):
    n = up + down
    extreme = [abs(sum(signs)) >= abs(up - down) for signs in itertools.product((1, -1), repeat=n)]
    assert scoring.sign_test(up, down) == pytest.approx(sum(extreme) / 2**n)


def test_sign_test_of_many():
    assert scoring.sign_test(1500, 1500) == 1.0
    assert scoring.sign_test(3000, 0) == 0.0  # 2^-2999 is below the smallest float
    assert scoring.sign_test(60, 40) == pytest.approx(0.0569, abs=5e-5)


def test_paired_by_hand():
    # 12 wrong turn right, 3 right turn wrong, of 40.
    before = [0] * 12 + [1] * 3 + [1] * 10 + [0] * 15
    after = [1] * 12 + [0] * 3 + [1] * 10 + [0] * 15
    result = scoring.compare_paired_scores(before, after)
    assert result.difference == pytest.approx(9 / 40)
    assert result.p == pytest.approx(0.03515625)  # binomial(15): 2 * 576 / 32768
    error = math.sqrt((15 / 40 - (9 / 40) ** 2) / 40)
    assert result.low == pytest.approx(9 / 40 - 1.96 * error, abs=0.02)
    assert result.high == pytest.approx(9 / 40 + 1.96 * error, abs=0.02)
    assert scoring.compare_paired_scores(before, after) == result  # the seed is fixed
    back = scoring.compare_paired_scores(after, before)
    assert back.difference == -result.difference
    assert back.p == result.p


def test_bootstrap_interval_by_enumeration():
    """Three problems have 27 resamples: the quantiles follow from all of them."""
    before, after = [0.0, 0.0, 0.5], [1.0, 0.25, 0.25]
    change = [1.0, 0.25, -0.25]
    means = [np.mean(draw) for draw in itertools.product(change, repeat=3)]
    result = scoring.compare_paired_scores(before, after)
    low, high = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    assert (result.low, result.high) == (pytest.approx(low), pytest.approx(high))


def test_paired_refuses_unequal_sets():
    with pytest.raises(ValueError, match="3 scores before and 2 after"):
        scoring.compare_paired_scores([0, 1, 0], [0, 1])


# ---- scores ----------------------------------------------------------------------------------


def test_pass_at_k_by_enumeration():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert scoring.pass_at_k(n, c, k) == pytest.approx(np.mean([any(d) for d in draws]))


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match="pass@k"):
        scoring.pass_at_k(n, c, k)


@pytest.mark.parametrize(
    "classes, correct, value",
    [
        ([0, 1, 1], [True, False, False], 0.0),
        ([0, 1, 1], [False, True, True], 1.0),
        ([0, 1], [True, False], 1.0),  # a tie goes to the first seen
        ([0, 1, 1, 0], [False, True, True, False], 0.0),
        ([-1, -1, -1, 0], [False, False, False, True], 1.0),  # no answer is no vote
        ([-1, -1], [False, False], 0.0),
    ],
)
def test_maj_at_n(classes, correct, value):
    assert scoring.maj_at_n(classes, correct) == value


def sample(answer, correct, status="plain", tokens=10, truncated=False):
    return scoring.Sample(answer, correct, status, tokens, truncated)


def by_string(answers):
    seen = list(dict.fromkeys(answer for answer in answers if answer is not None))
    return [-1 if answer is None else seen.index(answer) for answer in answers]


def test_score_by_hand():
    problems = [
        [sample("1", True), sample("2", False), sample("2", False), sample("1", True)],
        [sample(None, False, "no_answer", 30, True), sample("3", False, "timeout")] * 2,
    ]
    result = scoring.score(problems, by_string, ("timeout", "died"))
    assert list(result)[:3] == ["problems", "samples", "avg_at_n"]
    expected = {
        "problems": 2, "samples": 4, "avg_at_n": 0.25, "pass_at_2": (5 / 6) / 2, "pass_at_n": 0.5,
        "maj_at_n": 0.5, "format_rate": 0.75, "truncated": 0.25, "unresolved": 0.25,
        "mean_tokens": 15.0, "nonfinite": 0.0, "failed": 0.0,
    }  # fmt: skip
    _, low, high = scoring.compute_score_interval([0.5, 0.0])
    assert result == pytest.approx({**expected, "low": low, "high": high})


def test_score_refuses_unequal_groups():
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        scoring.score([[sample("1", True)], [sample("1", True)] * 2], by_string, ())
    with pytest.raises(ValueError):
        scoring.score([], by_string, ())


# ---- where numbers go ------------------------------------------------------------------------


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_writer_writes_through_at_once(tmp_path):
    writer = metric_files.Writer(tmp_path / "new")
    writer.write(0, {"loss": jnp.asarray(0.5, jnp.float32), "n": 3})
    assert lines(tmp_path / "new") == [{"step": 0, "loss": 0.5, "n": 3}]
    writer.write(1, {"loss": math.nan, "gap": -math.inf})
    assert lines(tmp_path / "new")[1] == {"step": 1, "loss": "nan", "gap": "-inf"}
    writer.close()


def test_a_continued_run_repeats_no_step(tmp_path):
    with metric_files.Writer(tmp_path) as writer:
        for step in range(6):
            writer.write(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the kill came here
    with metric_files.Writer(tmp_path, resume=3) as writer:
        assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
        for step in range(3, 8):
            writer.write(step, {"loss": 10 * step})
    assert [line["loss"] for line in lines(tmp_path)] == [0, 1, 2, 30, 40, 50, 60, 70]


def test_a_broken_line_is_refused_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step":\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not JSON"):
        metric_files.Writer(tmp_path, resume=2)
    assert path.read_text().count("\n") == 3


def points(path):
    """(step, tag, value) of all points in an event file; checks the records' checksums."""
    from tensorboardX import record_writer
    from tensorboardX.proto import event_pb2

    data, found = path.read_bytes(), []
    while data:  # length, its checksum, record, its checksum
        (size,) = struct.unpack("<Q", data[:8])
        for part, check in ((data[:8], data[8:12]), (data[12 : 12 + size], data[12 + size :])):
            assert struct.unpack("<I", check[:4])[0] == record_writer.masked_crc32c(part)
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    return found


def test_tensorboard_holds_the_scalars(tmp_path):
    with metric_files.Writer(tmp_path) as writer:
        writer.write(7, {"loss": 0.25})
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert points(path) == [(7, "loss/loss", 0.25)]


def test_every_metric_has_a_group_in_tensorboard():
    groups = {
        "loss": "loss grad_norm update_norm bad failed no_loss learning_rate divergence "
        "clipped_mass ratio policy_loss policy_entropy policy_ratio ratio_clipped kl_initial",
        "tokens": "tokens completion_tokens loss_tokens policy_tokens fill_student fill_teacher "
        "micro_batches",
        "rollout": "truncated graded correct reward format informative repetition logp_gap_mean "
        "logp_gap_max logp_student entropy_student slot_occupancy",
        "teacher": "overlap logp_teacher entropy_teacher advantage advantage_negative taught "
        "filtered overlong_teacher_prompts leaked replies_cut",
    }
    families = {"divergence": "teacher", "advantage": "teacher", "reply": "teacher",
                "located": "teacher", "shortened": "teacher", "grade": "rollout",
                "rollout": "rollout"}  # fmt: skip
    expected = {name: group for group, names in groups.items() for name in names.split()}
    for name in guards.METRICS:
        if "/" in name:
            assert metric_files.find_tag(name) == name
        else:
            group = expected.get(name) or families[name.split("_")[0]]
            assert metric_files.find_tag(name) == f"{group}/{name}"


SCORES = {
    "sw/seen": {"samples": 4, "avg_at_n": 0.25, "pass_at_n": 0.5, "maj_at_n": 0.125, "low": 0.0,
                "format_rate": 1.0, "truncated": 0.0, "mean_tokens": 7.5},
}  # fmt: skip


def test_scores_of_an_evaluation_are_written_once_and_in_the_order_of_steps(tmp_path):
    with metric_files.Writer(tmp_path) as writer:
        writer.write_evaluation(0, SCORES)
        for step in (1, 2, 3):
            writer.write(step, {"loss": 0.5})
            if step == 2:
                writer.write_evaluation(2, SCORES)
    with metric_files.Writer(tmp_path, resume=3) as writer:  # continues after step 2
        assert writer.repairs == []
        writer.write_evaluation(0, SCORES)
        writer.write_evaluation(2, SCORES)
        writer.write(3, {"loss": 0.5})
        writer.write_evaluation(3, SCORES)
    found = [
        (line["step"], "loss" in line, "eval/sw/seen/avg@4" in line) for line in lines(tmp_path)
    ]
    assert found == [(0, False, True), (1, True, False), (2, True, False), (2, False, True),
                     (3, True, False), (3, False, True)]  # fmt: skip
    assert lines(tmp_path)[0] == {
        "step": 0, "eval/sw/seen/avg@4": 0.25, "eval/sw/seen/pass@4": 0.5,
        "eval/sw/seen/maj@4": 0.125, "eval/sw/seen/format_rate": 1.0,
        "eval/sw/seen/truncated": 0.0, "eval/sw/seen/mean_tokens": 7.5,
    }  # fmt: skip
    trained = [json.loads(line)["step"] for line in metric_files.read_metric_lines(tmp_path, 3)]
    assert trained == [1, 2, 3]
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert [p for p in points(path) if p[1].endswith("avg@4")] == [
        (step, "eval/sw/seen/avg@4", 0.25) for step in (0, 2, 3)
    ]


def test_the_evaluation_of_the_step_before_a_kill_is_written_by_the_next_start(tmp_path):
    with metric_files.Writer(tmp_path) as writer:
        writer.write(1, {"loss": 0.5})
    with metric_files.Writer(tmp_path, resume=2) as writer:
        writer.write_evaluation(1, SCORES)
    assert [line["step"] for line in lines(tmp_path)] == [1, 1]


def test_a_line_of_scores_is_inserted_or_replaced(tmp_path):
    """Of a run of an earlier version, and of an evaluation of more problems."""
    with metric_files.Writer(tmp_path) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": step / 3})
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    other = {"sw": SCORES["sw/seen"] | {"avg_at_n": 0.5}}
    with metric_files.Writer(tmp_path, resume=3) as writer:
        writer.write_evaluation(0, SCORES)
        writer.write_evaluation(1, SCORES)
        writer.write(3, {"loss": 1.0})
        writer.write_evaluation(1, other)
        writer.write(4, {"loss": math.nan})
        writer.write_evaluation(0, SCORES)  # the same scores
    found = [(x["step"], x.get("loss"), x.get("eval/sw/seen/avg@4"), x.get("eval/sw/avg@4"))
             for x in lines(tmp_path)]  # fmt: skip
    assert found == [
        (0, None, 0.25, None), (1, 1 / 3, None, None), (1, None, None, 0.5), (2, 2 / 3, None, None),
        (3, 1.0, None, None), (4, "nan", None, None),
    ]  # fmt: skip
    after = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [after[1], after[3]] == before
    (path,) = (tmp_path / "tensorboard").iterdir()
    tags = [(step, tag) for step, tag, _ in points(path) if tag in ("loss/loss", "eval/sw/avg@4")]
    assert tags == [
        (1, "loss/loss"), (1, "eval/sw/avg@4"), (2, "loss/loss"), (3, "loss/loss"),
        (4, "loss/loss"),
    ]  # fmt: skip


def test_a_second_line_of_a_step_is_refused(tmp_path):
    for line in ({"step": 1, "loss": 0.5}, {"step": 1, "eval/sw/avg@1": 0.5}):
        text = json.dumps(line) + "\n"
        (tmp_path / "metrics.jsonl").write_text(text * 2)
        with pytest.raises(ValueError, match=r"line 2 is the second line of step 1"):
            metric_files.check_file(tmp_path)


def test_tensorboard_of_a_continued_run_is_that_of_an_unbroken_one(tmp_path):
    """Steps behind the checkpoint are in metrics.jsonl; files of any earlier start are replaced."""
    values = {step: {"loss": step / 7, "long_name_" * step: 2.0**-step} for step in range(1, 41)}
    values[3]["gap"] = math.inf
    with metric_files.Writer(tmp_path / "whole", resume=1) as writer:
        for step in range(1, 41):
            writer.write(step, values[step])
    broken = tmp_path / "broken"
    for first, last in ((1, 20), (18, 30), (31, 40)):
        with metric_files.Writer(broken, resume=first) as writer:
            for step in range(first, last + 1):
                writer.write(step, values[step])
        for path in (broken / "tensorboard").iterdir():
            path.write_bytes(path.read_bytes()[:-5])  # torn
    (broken / "tensorboard/events.out.tfevents.1795888123.host").write_bytes(b"of another version")
    metric_files.Writer(broken, resume=41).close()
    (path,) = (broken / "tensorboard").iterdir()
    (other,) = (tmp_path / "whole/tensorboard").iterdir()
    assert points(path) == points(other)
    assert len(points(path)) == 81


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_an_activity_is_shown_while_nothing_else_is(stream):
    """One line per interval in a log; on a terminal, one line in place, which is removed."""
    shown = stream()
    with terminal.Activity("compiling", shown, silence=0.05) as activity:
        begun = time.monotonic()
        while shown.getvalue().count("compiling") < 3:
            assert time.monotonic() - begun < 20
            time.sleep(0.01)
        activity.stop()
        text = shown.getvalue()
        time.sleep(0.2)
        assert shown.getvalue() == text
    lines = text.replace("\r", "\n").splitlines()
    if stream is Terminal:
        assert "\n" not in text
        assert set(lines[-1]) == {" "}
        lines = lines[1:-1]
        assert text.endswith(" \r")
    assert all(re.fullmatch(r"compiling, \d+ s", line) for line in lines)
    quick = stream()
    with terminal.Activity("compiling", quick, silence=20.0):
        pass
    assert quick.getvalue() == ""


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_timer_sums_by_part_and_starts_anew():
    clock = Clock()
    timer = terminal.Timer(clock)
    for seconds in (1.0, 2.5):
        with timer("rollout"):
            clock.now += seconds
    with contextlib.suppress(KeyError), timer("loss"):
        clock.now += 1.0
        raise KeyError  # time is counted all the same
    assert timer.take() == {"seconds/rollout": 3.5, "seconds/loss": 1.0}
    assert timer.take() == {}


def test_progress_in_a_log():
    clock, stream = Clock(), io.StringIO()
    with terminal.Progress("step", 12, stream=stream, clock=clock) as progress:
        for step in range(1, 12):
            clock.now += 2.0
            progress.update(step, tokens=1000, loss=1 / step)
    out = stream.getvalue().splitlines()
    assert out[0] == "step 1/12  loss 1  500 tokens/s  0:22 left"
    assert [line.split()[1] for line in out] == ["1/12", "4/12", "7/12", "10/12", "11/12"]
    assert "\r" not in stream.getvalue()


def test_progress_shows_the_end_and_counts_from_a_resumed_step():
    clock, stream = Clock(), io.StringIO()
    progress = terminal.Progress("step", 12, start=10, stream=stream, clock=clock)
    for step in (11, 12):
        clock.now += 2.0
        progress.update(step)
    assert stream.getvalue() == "step 11/12  0:02 left\nstep 12/12\n"
    progress.close()
    assert stream.getvalue().count("\n") == 2


def test_progress_on_a_terminal_is_one_live_line():
    clock, stream = Clock(), io.StringIO()
    stream.isatty = lambda: True
    with terminal.Progress("prompt", 3, stream=stream, clock=clock) as progress:
        for done in (1, 2, 3):
            clock.now += 100.0
            progress.update(done)
    shown = stream.getvalue()
    assert shown.count("\n") == 1
    first, second, last = shown.strip("\r\n").split("\r")
    assert first == "prompt 1/3  3:20 left"
    assert second == "prompt 2/3  1:40 left"
    assert last == "prompt 3/3".ljust(len(second))  # blanks over what stood there


@pytest.mark.parametrize("seconds, text", [(7, "0:07"), (200, "3:20"), (3725.4, "1:02:05")])
def test_duration(seconds, text):
    assert terminal.duration(seconds) == text


def test_table_aligns_wide_characters():
    text = terminal.table(["lang", "n"], [["中文", 5], ["en", 1234]])
    assert text == "lang     n\n----  ----\n中文     5\nen    1234"
    with pytest.raises(ValueError, match="1 cells for 2 headers"):
        terminal.table(["a", "b"], [["x"]])
