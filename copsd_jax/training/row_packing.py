"""Which completions share a row, a device and a micro-batch; a function of lengths alone.

A bin is what one shard has of one micro-batch: rows of the student's side and rows of the
teacher's. All bins have equally many rows of one length, so that one program runs them. A
completion has its tokens on both sides in one bin, so no hidden state travels. It goes into the
first bin that has room for it on both sides, into the first row there. Where a prompt that it
shares stands in the bin already, it goes behind that one if there is room, and needs no other:

    prompts     A of 3 tokens, with completions of 4, 2 and 2; B of 2, with 3 and 1; rows of 11
    row 0       A A A | 4 4 4 4 | 2 2 | 2 2
    row 1       B B | 3 3 3 | 1             without sharing: 7 + 3, 5 + 5, 3 of 11

Prompts whose completions have most tokens come first, and of a prompt the longest completion: first
fit decreasing, where none is shared. The least size that works is searched, beginning with the
mean; at each also with completions put into the emptiest bin instead of the first. Sizes are 1/16
apart, and rows' number and length follow from the size, so that steps with other lengths need few
programs.
"""

import collections
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ROW_MULTIPLE = 16  # rows are multiples of it
SHORT_ROW = 256  # tokens: rows below it are lengthened, to four samples or to this
SIZES_TRIED = 12  # sizes of a side, from the least one on


class Prompts(NamedTuple):
    """One side's prompts: their lengths, and equal numbers for those that may stand once."""

    prompts_B: Sequence[int]
    families_B: Sequence[int]


class RowShape(NamedTuple):
    """One side's rows of a bin: how many, and their tokens."""

    count: int
    length: int

    @property
    def tokens(self) -> int:
        return self.count * self.length


class Position(NamedTuple):
    """A completion on one side: its row of the bin, where in it the prompt begins, and where the
    completion itself does."""

    row: int
    prompt: int
    own: int


class RowPlan(NamedTuple):
    """Where everything stands.

    Attributes:
      bin_B: micro-batch x shards + shard of each completion.
      sizes: of the sides.
      places: of each side, of each completion.
    """

    micros: int
    shards: int
    bin_B: list[int]
    sizes: tuple[RowShape, ...]
    places: tuple[list[Position], ...]


def round_up(number: int, least: int = 1, parts: int = 16) -> int:
    """Up to a multiple of `least` and of the power of two below divided by `parts`:
    35 -> 36, 1,100 -> 1,152."""
    step = max(least, (1 << max(0, number.bit_length() - 1)) // parts)
    return max(1, -(-number // step)) * step


def plan_rows(
    completions_B: Sequence[int],
    sides: Sequence[Prompts],
    *,
    shards: int,
    micros: int = 1,
    budget: int = 0,
    row: int = 0,
) -> RowPlan:
    """Puts completions into bins and rows.

    Args:
      completions_B: their lengths.
      sides: the student's prompts, and the teacher's where there is one.
      shards: devices that split the rows of a micro-batch.
      micros: micro-batches.
      budget: tokens of a bin at most, all sides; as few micro-batches as that allows. 0 for
        `micros`.
      row: tokens of a row, if no sample is longer; 0 for what suits the lengths.

    Raises:
      ValueError: a sample takes more than `budget`.
    """
    longest = [_longest(completions_B, side) for side in sides]
    if not budget:
        found = _search(completions_B, sides, longest, micros, shards, row, 0)
        assert found is not None  # one row for each completion is a size that works
        return found
    check_budget(budget, [max(row, n) for n in longest])
    whole = sum(_load(completions_B, side, range(len(completions_B))) for side in sides)
    micros = max(1, -(-whole // (budget * shards)))
    while True:
        found = _search(completions_B, sides, longest, micros, shards, row, budget)
        if found is not None:
            return found
        micros += max(1, micros // 16)


def size_bins(lengths: Sequence[int], completions: int, *, shards: int, micros: int, budget: int):
    """(micro-batches, rows of a bin) where each row has one sample, as if all were the longest.

    A budget is rounded up to whole samples, since shorter ones would use it up.

    Args:
      lengths: of a row of each side.
    """
    rows = -(-budget // sum(lengths)) if budget else -(-completions // (micros * shards))
    rows = min(rows, -(-completions // shards))
    return -(-completions // (rows * shards)), rows


def plan_one_per_row(
    completions_B: Sequence[int],
    sides: Sequence[Prompts],
    *,
    shards: int,
    micros: int = 1,
    budget: int = 0,
    row: int = 0,
) -> RowPlan:
    """`plan_rows`, but one completion a row: for a dry run, whose texts are as long as they may be.

    Raises:
      ValueError: as `plan_rows`.
    """
    longest = [max(row, _longest(completions_B, side)) for side in sides]
    if budget:
        check_budget(budget, longest)
    lengths = [round_up(n, ROW_MULTIPLE) for n in longest]
    B = len(completions_B)
    micros, rows = size_bins(lengths, B, shards=shards, micros=micros, budget=budget)
    places = tuple([Position(b % rows, 0, side.prompts_B[b]) for b in range(B)] for side in sides)
    sizes = tuple(RowShape(rows, length) for length in lengths)
    return RowPlan(micros, shards, [b // rows for b in range(B)], sizes, places)


def check_budget(budget: int, longest: Sequence[int]) -> None:
    """Whether train.micro_tokens holds a sample with these tokens on each side.

    Raises:
      ValueError: with the least that would.
    """
    lengths = [round_up(n, ROW_MULTIPLE) for n in longest]
    if sum(lengths) > budget:
        raise ValueError(
            f"train.micro_tokens is {budget}: the longest sample takes rows of "
            f"{' + '.join(map(str, lengths))} tokens (student + teacher), so it must be at least "
            f"{sum(lengths)}"
        )


def _longest(completions_B: Sequence[int], side: Prompts) -> int:
    return max(p + c for p, c in zip(side.prompts_B, completions_B, strict=True))


def _load(completions_B: Sequence[int], side: Prompts, members: Sequence[int]) -> int:
    """Tokens of these completions with each of their prompts once."""
    prompts = {side.families_B[b]: side.prompts_B[b] for b in members}
    return sum(completions_B[b] for b in members) + sum(prompts.values())


def _sizes(mean: int, longest: int, row: int) -> list[RowShape]:
    """Sizes that a side may have, the smallest first: 1/16 apart, from the mean of all bins on."""
    if row:
        length = round_up(max(row, longest), ROW_MULTIPLE)
        counts = itertools.accumulate(
            range(SIZES_TRIED), lambda n, _: round_up(n + 1), initial=round_up(-(-mean // length))
        )
        return [RowShape(count, length) for count in counts]
    shortest = round_up(longest, ROW_MULTIPLE, parts=2)  # half octaves: rows' lengths waste nothing
    shortest = max(shortest, min(4 * shortest, SHORT_ROW))
    out, tokens = [], round_up(max(mean, longest), ROW_MULTIPLE)
    for _ in range(SIZES_TRIED):
        count = max(1, tokens // shortest)
        out.append(RowShape(count, -(-tokens // (count * ROW_MULTIPLE)) * ROW_MULTIPLE))
        tokens = round_up(tokens + 1, ROW_MULTIPLE)
    return out


def _search(
    completions_B: Sequence[int],
    sides: Sequence[Prompts],
    longest: Sequence[int],
    micros: int,
    shards: int,
    row: int,
    budget: int,
) -> RowPlan | None:
    """The plan with the fewest tokens that works; None if none is within the budget."""
    count, everyone = micros * shards, range(len(completions_B))
    loads = [_load(completions_B, side, everyone) for side in sides]
    order = _order(completions_B, sides, loads)
    # One row for each completion always works.
    rows = round_up(-(-len(completions_B) // count))
    choices = [
        [
            *_sizes(-(-load // count), most, row),
            RowShape(rows, round_up(max(row, most), ROW_MULTIPLE)),
        ]
        for load, most in zip(loads, longest, strict=True)
    ]
    total = lambda sizes: sum(size.tokens for size in sizes)  # noqa: E731
    tried = sorted(itertools.product(*choices), key=lambda sizes: (total(sizes), sizes))
    for sizes, spread in itertools.product(tried, (False, True) if count > 1 else (False,)):
        if budget and total(sizes) > budget:
            continue
        found = _fill(completions_B, sides, sizes, order, count, spread)
        if found is not None:
            return RowPlan(micros, shards, found[0], sizes, found[1])
    return None


def _order(completions_B, sides: Sequence[Prompts], loads: Sequence[int]) -> list[int]:
    """Completions as they are placed: the prompts of the student with most tokens first, by the
    side where that is more of all; of a prompt, the longest first."""
    families = collections.defaultdict(list)
    for b, family in enumerate(sides[0].families_B):
        families[family].append(b)
    share = {
        family: max(
            _load(completions_B, side, members) / load
            for side, load in zip(sides, loads, strict=True)
        )
        for family, members in families.items()
    }
    in_order = sorted(families, key=lambda family: (-share[family], families[family]))
    return [
        b
        for family in in_order
        for b in sorted(families[family], key=lambda b: (-completions_B[b], b))
    ]


class _Side:
    """The rows of one side while they fill."""

    def __init__(self, texts: Prompts, size: RowShape, bins: int):
        self.texts, self.size = texts, size
        self.room = np.full((bins, size.count), size.length)  # tokens left of each row
        self.most = self.room.max(axis=1)  # of the emptiest row of each bin
        self.used = np.zeros(bins)  # tokens
        self.known = collections.defaultdict(dict)  # family -> bin -> [(row, where its prompt is)]

    def behind(self, b: int, own: int, where: int) -> tuple[int, int] | None:
        """The row behind whose prompt the completion fits, and where that begins."""
        known = self.known[self.texts.families_B[b]].get(where, ())
        return next((place for place in known if self.room[where, place[0]] >= own), None)

    def holds(self, b: int, own: int) -> np.ndarray:
        """Bins with room for the completion and, where it needs it, its prompt."""
        out = self.most >= self.texts.prompts_B[b] + own
        for where in self.known[self.texts.families_B[b]]:
            out[where] |= self.behind(b, own, where) is not None
        return out

    def put(self, b: int, own: int, where: int) -> Position:
        """Places the completion in a bin that holds it."""
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


def _fill(completions_B, sides, sizes, order: list[int], bins: int, spread: bool):
    """(bin of each completion, places of each side), or None if they do not fit.

    Args:
      spread: instead of the first bin with room, one that has the student's prompt, or else the
        emptiest.
    """
    filling = [_Side(side, size, bins) for side, size in zip(sides, sizes, strict=True)]
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
            used[list(filling[0].known[sides[0].families_B[b]])] -= 1
            where = int(np.argmin(np.where(fits, used, np.inf)))
        bin_B[b] = where
        for side, placed in zip(filling, places, strict=True):
            placed[b] = side.put(b, own, where)
    return bin_B, places
