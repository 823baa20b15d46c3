"""Oracle: the pictures, and counting the tokens of every row again from where things stand."""

import collections
import itertools
from typing import Any

import numpy as np
import pytest
import runs
from conftest import mostly_slow

from copsd_jax.dryrun import programs
from copsd_jax.training import builders, layout, row_packing, run_plan

optax_promotes = runs.optax_promotes


def law(seed: int, B: int, group: int = 1):
    """Completions with a long tail, median 200, at most 2,048, behind prompts of 100 to 400."""
    rng = np.random.default_rng(seed)
    completions = np.clip(np.round(rng.lognormal(np.log(200), 0.9, B)), 1, 2048).astype(int)
    ask = np.repeat(rng.integers(100, 401, B // group), group)
    tell = ask + np.repeat(rng.integers(100, 401, B // group), group)
    families = np.repeat(np.arange(B // group), group).tolist()
    return completions.tolist(), [
        row_packing.Prompts(ask.tolist(), families), row_packing.Prompts(tell.tolist(), families)
    ]  # fmt: skip


def pieces(completions, side, plan, k):
    """{(bin, row): [(start, end)]} of all that stands on a side, prompts that are shared once."""
    found = collections.defaultdict(set)
    for b, (place, own) in enumerate(zip(plan.places[k], completions, strict=True)):
        row = found[plan.bin_B[b], place.row]
        row.add((place.prompt, place.prompt + side.prompts_B[b], side.families_B[b]))
        row.add((place.own, place.own + own, f"completion {b}"))
        assert place.own >= place.prompt + side.prompts_B[b]  # behind its prompt, which it sees
    return found


def counted(completions, sides, plan) -> int:
    """Tokens in rows; checks that nothing overlaps, leaves a row, or is in a row that is not."""
    total = 0
    for k, (side, size) in enumerate(zip(sides, plan.sizes, strict=True)):
        for (where, row), parts in pieces(completions, side, plan, k).items():
            assert 0 <= where < plan.micros * plan.shards
            assert 0 <= row < size.count
            parts = sorted(parts)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(parts))
            assert parts[-1][1] <= size.length
            total += sum(end - start for start, end, _ in parts)
    return total


def tokens(plan) -> int:
    return sum(size.tokens for size in plan.sizes)


@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize(
    "B, group", mostly_slow([(64, 1), (128, 1), (256, 1), (256, 8)], 1, several=True)
)
def test_rows_of_a_long_tail_are_nine_tenths_full(B, group, shards):
    for seed in range(20 if B == 64 else 3):
        completions, sides = law(seed, B, group)
        for how in ({}, {"budget": 16_384})[: 2 if seed < 3 else 1]:
            plan = row_packing.plan_rows(completions, sides, shards=shards, **how)
            live = counted(completions, sides, plan)
            assert live >= 0.9 * plan.micros * shards * tokens(plan)
            alone = sum(
                B * layout.pad_row_length(max(np.add(side.prompts_B, completions)))
                for side in sides
            )
            assert plan.micros * shards * tokens(plan) < 0.6 * alone


@pytest.mark.parametrize("budget", [8192, 16_384, 40_000])
def test_no_micro_batch_is_above_the_budget(budget):
    completions, sides = law(0, 64, 8)
    plan = row_packing.plan_rows(completions, sides, shards=2, budget=budget)
    assert tokens(plan) <= budget
    whole = counted(completions, sides, plan)
    assert plan.micros <= 1 + 1.3 * whole / (2 * budget)


def test_a_budget_below_a_sample_names_the_setting_and_what_would_do():
    completions, sides = law(0, 64)
    longest = [max(np.add(side.prompts_B, completions)) for side in sides]
    least = sum(row_packing.round_up_row_size(int(n), row_packing.ROW_MULTIPLE) for n in longest)
    with pytest.raises(ValueError, match=rf"train\.micro_tokens is {least - 1}: .* least {least}$"):
        row_packing.plan_rows(completions, sides, shards=2, budget=least - 1)
    assert tokens(row_packing.plan_rows(completions, sides, shards=2, budget=least)) <= least


def test_groups_save_their_prompts():
    """Of 8 completions the prompt stands about once: at most one more for each bin and row."""
    completions, sides = law(1, 128, 8)
    plan = row_packing.plan_rows(completions, sides, shards=2)
    for k in range(2):
        at = {(plan.bin_B[b], place.row, place.prompt) for b, place in enumerate(plan.places[k])}
        assert len(at) <= 16 + 32


@pytest.mark.parametrize("how", [{"micros": 3}, {"row": 4096}, {"micros": 2, "row": 512}])
def test_rows_and_micro_batches_as_asked(how):
    completions, sides = law(2, 64)
    plan = row_packing.plan_rows(completions, sides, shards=2, **how)
    counted(completions, sides, plan)
    assert plan.micros == how.get("micros", 1)
    assert plan == row_packing.plan_rows(completions, sides, shards=2, **how)
    for side, size in zip(sides, plan.sizes, strict=True):
        longest = int(max(np.add(side.prompts_B, completions)))
        assert size.length % row_packing.ROW_MULTIPLE == 0
        if "row" in how:
            assert size.length == row_packing.round_up_row_size(
                max(how["row"], longest), row_packing.ROW_MULTIPLE
            )


def test_a_row_of_a_few_completions_for_many_devices():
    plan = row_packing.plan_rows([5, 3], [row_packing.Prompts([2, 2], [0, 0])], shards=8)
    assert counted([5, 3], [row_packing.Prompts([2, 2], [0, 0])], plan) in (10, 12)
    assert plan.sizes == (row_packing.RowShape(1, 16),)


@pytest.mark.parametrize(
    "number, least, known",
    [(1, 1, 1), (31, 1, 31), (32, 1, 32), (33, 1, 34), (35, 1, 36), (1100, 1, 1152), (0, 32, 32),
     (33, 32, 64), (1023, 32, 1024), (1025, 32, 1088)],
)  # fmt: skip
def test_sizes_are_a_sixteenth_apart(number, least, known):
    assert row_packing.round_up_row_size(number, least) == known


# --- arrays -----------------------------------------------------------------------------------


def test_picture_in_numbers():
    """Tokens of the picture in `layout`: a b are 1 2, u is 3; a prefix of 10 tokens."""
    batch = layout.build_batch(
        [[1, 2], [1, 2], [3]], None, [[7, 8, 9], [6], [5, 4]], student_prefix=10
    )
    lengths, sides = layout.measure_prompts(batch, True)
    assert (lengths, sides) == ([3, 1, 2], [row_packing.Prompts([2, 2, 1], [0, 0, 2])])
    rows = layout.pack_rows(batch, row_packing.plan_rows(lengths, sides, shards=1), True)
    side = rows.student
    part = lambda x: x[0, 0, :12].tolist()  # noqa: E731
    assert part(side.tokens_BL) == [1, 2, 7, 8, 9, 6, 3, 5, 4, 0, 0, 0]
    assert part(side.positions_BL) == [10, 11, 12, 13, 14, 12, 10, 11, 12, 0, 0, 0]
    assert part(side.segments_BL) == [1, 1, 2, 2, 2, 3, 4, 5, 5, 0, 0, 0]
    assert part(side.parents_BL) == [-1, -1, 1, 1, 1, 1, -1, 4, 4, -1, -1, -1]
    assert side.gather_BC[0, 0, :6].tolist() == [1, 2, 3, 1, 6, 7]
    C = batch.mask_BC.shape[1]
    assert rows.source_UST[0, 0, :6].tolist() == [0, 1, 2, C, 2 * C, 2 * C + 1]
    assert (rows.source_UST[0, 0, 6:] == 3 * C).all()
    assert layout.measure_fill(rows) == {"fill_student": 9 / 16, "micro_batches": 1.0}
    assert layout.measure_fill(batch) == {"fill_student": 11 / 96}


@pytest.mark.parametrize("shared", [False, True])
def test_every_token_is_predicted_from_the_one_before_on_its_own_device(shared):
    rng = np.random.default_rng(0)
    draw = lambda low, high: rng.integers(1, 99, rng.integers(low, high)).tolist()  # noqa: E731
    ask, tell = ([p for p in (draw(2, 30) for _ in range(6)) for _ in range(4)] for _ in range(2))
    completions = [draw(1, 60) for _ in range(24)]
    batch = layout.build_batch(ask, tell, completions, student_prefix=7, teacher_prefix=9)
    lengths, sides = layout.measure_prompts(batch, shared)
    plan = row_packing.plan_rows(lengths, sides, shards=3, micros=2)
    rows = layout.pack_rows(batch, plan, shared)
    C, seen = batch.mask_BC.shape[1], set()
    taught: Any = rows.teacher
    for side, prompts, prefix in ((rows.student, ask, 7), (taught, tell, 9)):
        per_part = side.tokens_BL.shape[1] // 3
        for u, part in np.ndindex(2, 3):
            tokens, positions = side.tokens_BL[u].reshape(-1), side.positions_BL[u].reshape(-1)
            for source, at in zip(rows.source_UST[u, part], side.gather_BC[u, part], strict=True):
                assert at // side.tokens_BL.shape[2] // per_part == part
                if source == len(completions) * C:
                    continue
                b, t = divmod(int(source), C)
                seen.add((b, t))
                whole = [*prompts[b], *completions[b]]
                before = len(prompts[b]) + t - 1
                assert (tokens[at], positions[at]) == (whole[before], prefix + before)
    assert seen == {(b, t) for b, own in enumerate(completions) for t in range(len(own))}


def test_the_longest_sample_is_known_before_the_run():
    """What the plan asks for holds what a step with the longest prompt and completion takes."""
    settings = {"train__pack": "rows", "train__micro_tokens": 32, "rollout__max_tokens": 99}
    plan = run_plan.make_plan(runs.config("opsd", **settings))
    with pytest.raises(ValueError, match=r"micro_tokens is 32: .* at least (\d+)$") as found:
        builders.check_row_budget(plan)
    least = int(str(found.value).split()[-1])
    builders.check_row_budget(
        run_plan.make_plan(runs.config("opsd", **settings | {"train__micro_tokens": least}))
    )
    c = plan.config
    prefix = programs.EXEMPLAR_TOKENS * c.prompt.exemplars
    assert prefix == 0
    sizes = [plan.longest[side] + c.rollout.max_tokens for side in ("student", "teacher")]
    assert least == sum(row_packing.round_up_row_size(n, row_packing.ROW_MULTIPLE) for n in sizes)
