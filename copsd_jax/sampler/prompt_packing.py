"""Packing of prompts into rows for prefill.

Prompts are packed one behind the other. A beginning that several prompts share, such as the same
problem before different attempts, stands in the row once, and they all attend to it:

    prompts     a b c d X Y    a b c d Z    p q
    row         a b c d | X Y | Z | p q
    segment     1 1 1 1   2 2   3   4 4
    parent      - - - -   1 1   1   - -
    index       0 1 2 3   4 5   4   0 1
    split       4 of the first two prompts, 2 (all) of the third
"""

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SHARED = 16  # least number of common tokens that get a segment of their own
SMALLEST = 128  # tokens of the smallest bucket
WIDTH = 16  # buckets are multiples of it

Prompt = tuple[int, ...]


class Placement(NamedTuple):
    """Position of a prompt in a row: `split` tokens from `start`, then the rest from `own`."""

    start: int
    split: int
    own: int


def list_buckets(pack: int, longest: int) -> tuple[int, ...]:
    """Returns the widths of packed rows, in ascending order.

    They are the powers of two from 128 below `pack`, `pack` itself rounded up to a multiple of 16,
    and further powers of two up to one that holds `longest`.

    buckets(512, 90) -> 128, 256, 512; buckets(400, 700) -> 128, 256, 400, 512, 1024.
    """
    own = max(SMALLEST, -(-pack // WIDTH) * WIDTH)
    size, sizes = SMALLEST, {own}
    while size < max(own, longest):
        sizes.add(size)
        size *= 2
    if longest > own:
        sizes.add(size)
    return tuple(sorted(sizes))


def count_common(a: Prompt, b: Prompt) -> int:
    """Counts the tokens that both prompts begin with."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def group_by_beginning(prompts: Sequence[Prompt]) -> list[tuple[int, list[Prompt]]]:
    """Groups distinct prompts by their beginnings: (tokens in common or 0, prompts of the group).

    In lexical order, prompts with a common beginning are neighbours. Of all ways to cut that list
    into groups, it finds the one that saves most: m prompts with s tokens in common save (m - 1) s.
    """
    distinct = sorted(set(prompts))
    both = [count_common(a, b) for a, b in itertools.pairwise(distinct)]
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # tokens saved, start of the last group, shared
    for end in range(1, len(distinct) + 1):
        choices = [(best[end - 1][0], end - 1, 0)]
        shared = 0
        for start in range(end - 2, -1, -1):
            shared = min(shared, both[start]) if shared else both[start]
            if shared < SHARED:
                break
            choices.append((best[start][0] + (end - 1 - start) * shared, start, shared))
        best.append(max(choices, key=lambda choice: choice[0]))
    out, end = [], len(distinct)
    while end:
        _, start, shared = best[end]
        out.append((shared, distinct[start:end]))
        end = start
    return out[::-1]


def count_tokens(prompts: Sequence[Prompt]) -> int:
    """Counts the tokens that these prompts take in a row."""
    groups = group_by_beginning(prompts)
    return sum(sum(map(len, members)) - shared * (len(members) - 1) for shared, members in groups)


def pack_row(prompts: Sequence[Prompt], width: int) -> tuple[np.ndarray, dict[Prompt, Placement]]:
    """Packs prompts: int32 [4, width] of tokens, index, segments, parents; and their placements."""
    out = np.zeros((4, width), np.int32)
    out[3] = -1
    places: dict[Prompt, Placement] = {}
    at, segment = 0, 0

    def put(piece: Prompt, first: int, parent: int) -> None:
        nonlocal at, segment
        segment += 1
        part = slice(at, at + len(piece))
        out[0, part], out[1, part] = piece, range(first, first + len(piece))
        out[2, part], out[3, part] = segment, parent
        at += len(piece)

    for shared, members in group_by_beginning(prompts):
        start, parent = at, -1
        if shared:
            put(members[0][:shared], 0, -1)
            parent = segment
        for prompt in members:
            places[prompt] = Placement(start if shared else at, shared or len(prompt), at)
            if len(prompt) > shared:
                put(prompt[shared:], shared, parent)
    return out, places


def count_fitting(waiting: Sequence[Prompt], width: int) -> int:
    """Counts how many of these distinct prompts, from the first on, fit a row of `width` tokens."""
    # More prompts never take less room, and common beginnings only make them shorter.
    lengths = itertools.accumulate(map(len, waiting))
    sure = sum(1 for total in lengths if total <= width)
    rest = range(sure + 1, len(waiting) + 1)
    return sure + bisect.bisect_right(rest, width, key=lambda count: count_tokens(waiting[:count]))
