"""Oracles: the law's quantiles, schedules step by step, the floor summed token by token."""

import importlib
import json
import math
import statistics
import sys
import types

import conftest
import pytest

BENCHMARKS = conftest.ROOT / "benchmarks"


@pytest.fixture(scope="module")
def decode():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("decode")
    sys.path.remove(str(BENCHMARKS))


def test_limits_follow_the_clipped_law(decode):
    limits = decode.draw_limits(20_000, median=40, maximum=300, seed=3)
    assert (min(limits), max(limits)) == (1, 300)
    normal = statistics.NormalDist()
    for share in (0.1, 0.5, 0.9):
        want = 40 * math.exp(1.2 * normal.inv_cdf(share))
        assert sorted(limits)[int(share * 20_000)] == pytest.approx(want, rel=0.05)
    clipped = 1 - normal.cdf(math.log(299.5 / 40) / 1.2)
    assert limits.count(300) / 20_000 == pytest.approx(clipped, rel=0.1)
    assert decode.draw_limits(20_000, 40, 300, 3) == limits
    assert decode.draw_limits(20_000, 40, 300, 4) != limits
    assert decode.draw_limits(50, 0.01, 300, 0) == [1] * 50


def test_batches_are_full_consecutive_and_shared_out(decode):
    assert decode.cut(6, 2, 1) == [[[0, 1], [2, 3], [4, 5]]]
    assert decode.cut(6, 2, 2) == [[[0, 1], [2, 3]], [[4, 5]]]
    for count, slots, pieces in ((256, 8, 4), (24, 3, 5)):
        parts = decode.cut(count, slots, pieces)
        assert len(parts) == pieces
        batches = [batch for part in parts for batch in part]
        assert [i for batch in batches for i in batch] == list(range(count))
        assert {len(batch) for batch in batches} == {slots}
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for count, slots, pieces in ((7, 2, 1), (6, 2, 4), (6, 2, 0), (6, 0, 1)):
        with pytest.raises(ValueError, match=r"--(slots|pieces)="):
            decode.cut(count, slots, pieces)


def stepwise(limits, slots):
    """Draws of refilled slots, one step at a time."""
    queue, live, steps = list(limits), [], 0
    while True:
        while queue and len(live) < slots:
            live.append(queue.pop(0))
        if not live:
            return steps
        steps += 1
        live = [left - 1 for left in live if left > 1]


def test_steps_of_a_queue_and_of_batches(decode):
    assert decode.refilled_steps([5, 2, 3], 2) == 5
    assert decode.batch_steps([5, 2, 3, 3], [[0, 1], [2, 3]]) == 5 + 3
    limits = decode.draw_limits(96, 10, 60, 0)
    for slots in (1, 3, 8):
        assert decode.refilled_steps(limits, slots) == stepwise(limits, slots)
        batches = decode.cut(96, slots, 1)[0]
        want = sum(stepwise([limits[i] for i in batch], slots) for batch in batches)
        assert decode.batch_steps(limits, batches) == want


def test_floor_bytes_summed_token_by_token(decode):
    prompts, limits = [3, 10, 1], [3, 1, 6]
    entries = steps = 0
    for prompt, limit in zip(prompts, limits, strict=True):
        for drawn in range(1, limit):  # tokens there before this step, which adds one's entry
            entries, steps = entries + prompt + drawn, steps + 1
    got = decode.decode_floor.needed_bytes(prompts, limits, slots=2, weights=1000, entry=7)
    assert got == steps / 2 * 1000 + entries * 7


@pytest.mark.parametrize("refill", [True, False])
def test_one_queue_or_one_call_for_each_batch(decode, monkeypatch, refill):
    """A batch has a cache for its own longest text, the queue one for the longest of all."""
    limits, calls, seen = [5, 2, 300, 3, 4, 4, 4, 4], [], set()

    def generate(decoder, params, prompts, sampling, *, keys, settings, limits):
        calls.append((limits, settings.length))
        seen.update(map(tuple, keys.tolist()))
        texts = [types.SimpleNamespace(ids=[0] * limit) for limit in limits]
        return texts, types.SimpleNamespace(prompt_tokens=10, occupancy=0.5)

    monkeypatch.setattr(decode.loop, "generate", generate)
    monkeypatch.setattr(decode, "_warm", lambda *_: None)
    args = decode.parse(["--slots=2", "--samples=4", "--pieces=2"])
    work = decode.Work([(1, 2, 3)] * 8, limits, decode.cut(8, 2, 2))
    runner = decode.engine_runner(args, decode.Model(*[None] * 5), work, refill)
    assert calls == []
    parts = [runner.piece(number) for number in (0, 1)]
    if refill:
        assert calls == [([5, 2, 300, 3], 384), ([4, 4, 4, 4], 384)]
    else:
        assert calls == [([5, 2], 128), ([300, 3], 384), ([4, 4], 128), ([4, 4], 128)]
    assert len(seen) == 8
    assert [part.prompt_tokens for part in parts] == [10 if refill else 20] * 2


def lines(decode, capsys, *argv):
    code = decode.main(["--shape=tiny", "--prompts=3", "--slots=4", "--max=9", "--median=4", *argv])
    out = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return code, {line["system"]: line for line in out}


@pytest.mark.slow
def test_a_line_for_each_system(decode, capsys):
    code, found = lines(
        decode, capsys, "--systems=ours,fixed,tunix", "--bandwidth=10", "--pieces=2",
        "--context=40", "--steps=2", "--prompt_tokens=12", "--cache=int8",
    )  # fmt: skip
    assert (code, set(found)) == (0, {"step", "step_stacked", "ours", "fixed", "tunix"})
    assert "tunix_env.sh" in found["tunix"]["skipped"]
    limits = decode.draw_limits(12, 4, 9, 0)
    for name in ("ours", "fixed"):
        line = found[name]
        assert line["tokens"] == sum(limits)
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"])
        assert len(line["seconds_of_pieces"]) == 2
        assert sum(line["seconds_of_pieces"]) == pytest.approx(line["seconds"], abs=2e-3)
        assert line["compile_seconds"] > 0
        assert (line["cache"], line["texts"]) == ("int8", 12)
        assert set(line["versions"]) == {"jax", "jaxlib", "flax"}
        assert 0 < line["floor_fraction"] < 1
    fixed = sum(max(limits[i : i + 4]) for i in (0, 4, 8))
    assert found["fixed"]["steps"] == fixed
    assert found["fixed"]["occupancy"] == pytest.approx(sum(limits) / (4 * fixed))
    assert (found["ours"]["calls"], found["fixed"]["calls"]) == (2, 3)
    drained = stepwise(limits[:8], 4) + stepwise(limits[8:], 4)
    assert found["ours"]["steps"] == drained < fixed
    assert found["ours"]["drain"] == pytest.approx(drained / stepwise(limits, 4) - 1)
    # Contexts of 20 to 60 in all slots, later by some chunks of 2 steps.
    assert 39.75 + 2 + 1.5 <= found["step"]["mean_context"] <= 39.75 + 10 + 1.5
    assert found["step"]["floor_fraction"] > 0


STUB = """
import json, sys
work = json.load(open(sys.argv[1]))
print("noise")
print(json.dumps({"work": sorted(work)}), flush=True)
for line in sys.stdin:
    if int(line) == 1:
        sys.exit("no second piece")
    print(json.dumps({"seconds": 2.0, "prompt_tokens": 5}), flush=True)
"""


def test_a_process_of_its_own(decode, tmp_path):
    """Asked piece by piece, and its last words kept."""
    (tmp_path / "stub.py").write_text(STUB, encoding="utf-8")
    (tmp_path / "work.json").write_text('{"prompts": []}', encoding="utf-8")
    runner = decode.process_runner([sys.executable, str(tmp_path / "stub.py")], tmp_path)
    assert runner.known["work"] == ["prompts"]
    assert runner.piece(0) == decode.Measured(2.0, 5)
    with pytest.raises(RuntimeError, match="no second piece"):
        runner.piece(1)
    runner.close()
