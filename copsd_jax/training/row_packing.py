"""Packs completions into rows, devices and micro-batches; reads lengths, but no token ids.

A bin is the part of a micro-batch that one shard runs: rows of the student's side and rows of the
teacher's side. On each side, all bins have the same number and length of rows, so that one program
runs all bins. Both sides of a completion are in the same bin, so no hidden state travels between
devices.

A completion goes into the first bin that has room for it on both sides and, within the bin, into
the first row with room. If a row of the bin already has a copy of the completion's prompt and still
has room, the completion goes into that row, and the prompt is not copied again. An example with
rows of 11 tokens:

    prompts     A has 3 tokens, and completions of 4, 2 and 2 tokens;
                B has 2 tokens, and completions of 3 tokens and 1 token
    row 0       A A A | 4 4 4 4 | 2 2 | 2 2
    row 1       B B | 3 3 3 | 1

Without shared prompts, the example needs three rows, with 7 + 3, 5 + 5 and 5 tokens.

Prompts are sorted by the number of their tokens, including the tokens of their completions. The
prompt with the most tokens is placed first. Among the completions of a prompt, the longest is
placed first. Without shared prompts, the method is first fit decreasing.

The search tries bin sizes from the mean load upwards, and takes the first size that works. For each
size, the search also tries to put each completion into the emptiest bin instead of the first bin
with room. Successive bin sizes differ by about 1/16, and each size determines the number and length
of a bin's rows. Because only a few sizes occur, steps with new lengths rarely need an additional
program.
"""

import collections
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ROW_MULTIPLE = 16  # every row length is a multiple of ROW_MULTIPLE
SHORT_ROW = 256  # shorter rows grow to SHORT_ROW tokens or to four samples, whichever is less
SIZES_TRIED = 12  # number of row shapes to try for each side; the smallest is tried first


class Prompts(NamedTuple):
    """The prompts of all completions on one side.

    Attributes:
      prompts_B: length of each completion's prompt, in tokens.
      families_B: a number for each completion. Completions with equal family numbers may share one
        copy of their prompt.
    """

    prompts_B: Sequence[int]
    families_B: Sequence[int]


class RowShape(NamedTuple):
    """Shape of a bin's rows on one side: number of rows, and tokens per row."""

    count: int
    length: int

    @property
    def tokens(self) -> int:
        """The total number of tokens in all rows."""
        return self.count * self.length


class Position(NamedTuple):
    """Position of a completion on one side.

    Attributes:
      row: index of the row in the bin.
      prompt: index in the row at which the prompt begins.
      own: index in the row at which the completion itself begins.
    """

    row: int
    prompt: int
    own: int


class RowPlan(NamedTuple):
    """Assignment of completions to bins, rows and positions.

    Attributes:
      micros: number of micro-batches.
      shards: number of shards into which the rows of a micro-batch are split.
      bin_B: index of each completion's bin, equal to micro-batch * shards + shard.
      sizes: number and length of a bin's rows, for each side.
      places: positions of all completions, for each side.
    """

    micros: int
    shards: int
    bin_B: list[int]
    sizes: tuple[RowShape, ...]
    places: tuple[list[Position], ...]


def round_up_row_size(number: int, least: int = 1, parts: int = 16) -> int:
    """Rounds a number up in steps that grow with the number: 35 -> 36, 1,100 -> 1,152.

    The largest power of two that does not exceed the number is divided by `parts`. The step is the
    quotient, or `least` if the quotient is smaller.
    """
    step = max(least, (1 << max(0, number.bit_length() - 1)) // parts)
    return max(1, -(-number // step)) * step


def plan_rows(
    completions_B: Sequence[int], sides: Sequence[Prompts], *, shards: int, micros: int = 1,
    budget: int = 0, row: int = 0, one_per_row: bool = False,
) -> RowPlan:  # fmt: skip
    """Plans the bin, row and position of each completion.

    Args:
      completions_B: lengths of the completions, in tokens.
      sides: the student's prompts and, if there is a teacher, the teacher's prompts.
      shards: number of shards into which the rows of a micro-batch are split.
      micros: number of micro-batches; read only if there is no budget.
      budget: maximum number of tokens in a bin, summed over both sides; 0 means no budget. With a
        budget, the plan has as few micro-batches as possible.
      row: minimum length of rows in tokens; the rows are longer only if a sample is longer. If
        `row` is 0, the row length depends on the samples.
      one_per_row: whether each completion gets its own row. A dry run needs one row per completion,
        because all texts of a dry run are as long as the limits allow.

    Raises:
      ValueError: a sample needs more tokens than `budget`.
    """
    longest = [
        max(row, *(p + c for p, c in zip(side.prompts_B, completions_B, strict=True)))
        for side in sides
    ]
    if budget:
        check_budget(budget, longest)
    if one_per_row:
        return _plan_one_per_row(completions_B, sides, longest, shards, micros, budget)
    if budget:
        everyone = range(len(completions_B))
        whole = sum(_count_packing_load(completions_B, side, everyone) for side in sides)
        micros = max(1, -(-whole // (budget * shards)))
    while True:
        found = _search_row_plan(completions_B, sides, longest, micros, shards, row, budget)
        if found is not None:  # without a budget, one row for each completion always works
            return found
        micros += max(1, micros // 16)


def _plan_one_per_row(
    completions_B: Sequence[int], sides: Sequence[Prompts], longest: list[int], shards: int,
    micros: int, budget: int,
) -> RowPlan:  # fmt: skip
    """Plans one completion per row; all rows are as long as the longest sample.

    A budget is rounded up to a multiple of the longest sample's length, because the samples of a
    real run can be shorter, and shorter samples can fill the whole budget.
    """
    B, lengths = len(completions_B), [round_up_row_size(n, ROW_MULTIPLE) for n in longest]
    rows = -(-budget // sum(lengths)) if budget else -(-B // (micros * shards))
    rows = min(rows, -(-B // shards))
    places = tuple([Position(b % rows, 0, side.prompts_B[b]) for b in range(B)] for side in sides)
    sizes = tuple(RowShape(rows, length) for length in lengths)
    return RowPlan(-(-B // (rows * shards)), shards, [b // rows for b in range(B)], sizes, places)


def check_budget(budget: int, longest: Sequence[int]) -> None:
    """Checks that `train.micro_tokens` is large enough for the longest sample.

    Args:
      budget: the value of `train.micro_tokens`.
      longest: number of tokens in the longest sample of each side.

    Raises:
      ValueError: `train.micro_tokens` is too small; the message gives the smallest sufficient
        value.
    """
    lengths = [round_up_row_size(n, ROW_MULTIPLE) for n in longest]
    if sum(lengths) > budget:
        raise ValueError(
            f"train.micro_tokens is {budget}: the longest sample needs rows of "
            f"{' + '.join(map(str, lengths))} tokens (student + teacher), so train.micro_tokens "
            f"must be at least {sum(lengths)}"
        )


def _count_packing_load(completions_B: Sequence[int], side: Prompts, members: Sequence[int]) -> int:
    """Returns the number of tokens in completions and prompts, counting each prompt once."""
    prompts = {side.families_B[b]: side.prompts_B[b] for b in members}
    return sum(completions_B[b] for b in members) + sum(prompts.values())


def _list_row_shapes(mean: int, longest: int, row: int) -> list[RowShape]:
    """Returns the row shapes to try for a side, smallest first.

    The numbers of tokens in successive shapes differ by about 1/16. The first shape has room for
    the mean load of a bin.
    """
    if row:
        length = round_up_row_size(longest, ROW_MULTIPLE)
        counts = itertools.accumulate(
            range(SIZES_TRIED),
            lambda n, _: round_up_row_size(n + 1),
            initial=round_up_row_size(-(-mean // length)),
        )
        return [RowShape(count, length) for count in counts]
    # Rounding the minimum row length up to 2^k or 1.5 * 2^k tokens leaves only a few row lengths.
    # Packing also fills the space that this rounding adds to the rows, so nothing is wasted.
    shortest = round_up_row_size(longest, ROW_MULTIPLE, parts=2)
    shortest = max(shortest, min(4 * shortest, SHORT_ROW))
    out, tokens = [], round_up_row_size(max(mean, longest), ROW_MULTIPLE)
    for _ in range(SIZES_TRIED):
        count = max(1, tokens // shortest)
        out.append(RowShape(count, -(-tokens // (count * ROW_MULTIPLE)) * ROW_MULTIPLE))
        tokens = round_up_row_size(tokens + 1, ROW_MULTIPLE)
    return out


def _search_row_plan(
    completions_B: Sequence[int], sides: Sequence[Prompts], longest: list[int], micros: int,
    shards: int, row: int, budget: int,
) -> RowPlan | None:  # fmt: skip
    """Returns the feasible plan with the fewest tokens, or None if no plan fits the budget."""
    count, everyone = micros * shards, range(len(completions_B))
    loads = [_count_packing_load(completions_B, side, everyone) for side in sides]
    order = _order_for_packing(completions_B, sides, loads)
    # A shape with one row for each completion always works.
    rows = round_up_row_size(-(-len(completions_B) // count))
    choices = [
        [
            *_list_row_shapes(-(-load // count), most, row),
            RowShape(rows, round_up_row_size(most, ROW_MULTIPLE)),
        ]
        for load, most in zip(loads, longest, strict=True)
    ]
    total = lambda sizes: sum(size.tokens for size in sizes)  # noqa: E731
    tried = sorted(itertools.product(*choices), key=lambda sizes: (total(sizes), sizes))
    for sizes, spread in itertools.product(tried, (False, True) if count > 1 else (False,)):
        if budget and total(sizes) > budget:
            continue
        found = _fill_packing_bins(completions_B, sides, sizes, order, count, spread)
        if found is not None:
            return RowPlan(micros, shards, found[0], sizes, found[1])
    return None


def _order_for_packing(completions_B, sides: Sequence[Prompts], loads: Sequence[int]) -> list[int]:
    """Orders the completions for placement.

    The completions of a student prompt form a group. The group with the largest share of all tokens
    comes first. A group's share is the larger of its shares on the two sides. Within a group, the
    longest completion comes first.
    """
    families = collections.defaultdict(list)
    for b, family in enumerate(sides[0].families_B):
        families[family].append(b)

    def share(members: list[int]) -> float:
        pairs = zip(sides, loads, strict=True)
        return max(_count_packing_load(completions_B, side, members) / load for side, load in pairs)

    in_order = sorted(families.values(), key=lambda members: (-share(members), members))
    # Sorting is stable, so completions of equal length keep their order.
    return [b for members in in_order for b in sorted(members, key=lambda b: -completions_B[b])]


class _SideBins:
    """The rows of one side during the placement of completions."""

    def __init__(self, texts: Prompts, size: RowShape, bins: int):
        self.texts, self.size = texts, size
        self.room = np.full((bins, size.count), size.length)  # free tokens in each row
        self.most = self.room.max(axis=1)  # free tokens in the emptiest row of each bin
        self.used = np.zeros(bins)  # tokens placed in each bin
        self.known = collections.defaultdict(dict)  # family -> bin -> [(row, start of prompt)]

    def behind(self, b: int, own: int, where: int) -> tuple[int, int] | None:
        """Returns (row, start) of a prompt copy whose row has room for the completion, or None."""
        known = self.known[self.texts.families_B[b]].get(where, ())
        return next((place for place in known if self.room[where, place[0]] >= own), None)

    def holds(self, b: int, own: int) -> np.ndarray:
        """Returns bool [bins], True for bins with room for the completion.

        A bin also needs room for the prompt, unless the completion fits into a row that already has
        the prompt.
        """
        out = self.most >= self.texts.prompts_B[b] + own
        for where in self.known[self.texts.families_B[b]]:
            out[where] |= self.behind(b, own, where) is not None
        return out

    def put(self, b: int, own: int, where: int) -> Position:
        """Places a completion in a bin with enough room, and returns the position."""
        prompt = self.texts.prompts_B[b]
        found = self.behind(b, own, where)
        before = self.room[where].sum()
        if found is None:
            row = int(np.argmax(self.room[where] >= prompt + own))
            found = (row, self.size.length - int(self.room[where, row]))
            self.known[self.texts.families_B[b]].setdefault(where, []).append(found)
            self.room[where, row] -= prompt
        row, begin = found
        at = self.size.length - int(self.room[where, row])
        self.room[where, row] -= own
        self.most[where] = self.room[where].max()
        self.used[where] += before - self.room[where].sum()
        return Position(row, begin, at)


def _fill_packing_bins(completions_B, sides, sizes, order: list[int], bins: int, spread: bool):
    """Places completions in the given order; returns (bins, positions per side), or None.

    The result is None if a completion does not fit. Without `spread`, a completion goes into the
    first bin with room. With `spread`, a completion goes into a bin that already has its student
    prompt, or else into the emptiest bin.
    """
    filling = [_SideBins(side, size, bins) for side, size in zip(sides, sizes, strict=True)]
    bin_B = [0] * len(order)
    places: tuple[list, ...] = tuple([None] * len(order) for _ in sides)
    for b in order:
        own = completions_B[b]
        fits = np.logical_and.reduce([side.holds(b, own) for side in filling])
        if not fits.any():
            return None
        where = int(np.argmax(fits))
        if spread:
            used = np.max([side.used / side.size.tokens for side in filling], axis=0)
            # `used` is between 0 and 1. Subtracting 1 from the values of the bins that have the
            # student's prompt puts these bins first.
            used[list(filling[0].known[sides[0].families_B[b]])] -= 1
            where = int(np.argmin(np.where(fits, used, np.inf)))
        bin_B[b] = where
        for side, placed in zip(filling, places, strict=True):
            placed[b] = side.put(b, own, where)
    return bin_B, places
