"""Packing of prompts into rows for prefill.

Prompts are packed end to end. Several prompts may share a beginning, such as the same problem
before different attempts. A row contains a shared beginning only once, and all prompts that share
the beginning attend to it:

    prompts     a b c d X Y    a b c d Z    p q
    row         a b c d | X Y | Z | p q
    segment     1 1 1 1   2 2   3   4 4
    parent      - - - -   1 1   1   - -
    index       0 1 2 3   4 5   4   0 1
    split       4 for the first two prompts, 2 (all tokens) for the third
"""

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SHARED = 16  # a shared beginning of at least this many tokens gets its own segment
SMALLEST = 128  # number of tokens in the smallest bucket
WIDTH = 16  # the size of every bucket is a multiple of this number of tokens

Prompt = tuple[int, ...]


class Placement(NamedTuple):
    """Place of a prompt in a row.

    The prompt's first `split` tokens begin at index `start` of the row. The prompt's other tokens
    begin at index `own` of the row.
    """

    start: int
    split: int
    own: int


def list_buckets(pack: int, longest: int) -> tuple[int, ...]:
    """Returns the widths of packed rows, in ascending order.

    One width is `pack`, rounded up to a multiple of 16, but at least 128. The other widths are
    powers of two from 128 on. If `longest` does not exceed the rounded `pack`, all powers of two in
    the list are below the rounded `pack`. If `longest` exceeds the rounded `pack`, the largest
    width is the first power of two that is at least `longest`.

    Examples:
      list_buckets(512, 90) returns (128, 256, 512).
      list_buckets(400, 700) returns (128, 256, 400, 512, 1024).
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
    """Returns the number of tokens in the longest common beginning of two prompts."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def group_by_beginning(prompts: Sequence[Prompt]) -> list[tuple[int, list[Prompt]]]:
    """Groups distinct prompts by their shared beginnings.

    In lexicographic order, prompts with a shared beginning are neighbours. If m prompts in a group
    share s tokens, the group saves `(m - 1) * s` tokens. The sorted list is divided so that the
    groups together save as many tokens as possible.

    Returns:
      A list with one pair (number of shared tokens, prompts) per group; the number may be 0.
    """
    distinct = sorted(set(prompts))
    both = [count_common(a, b) for a, b in itertools.pairwise(distinct)]
    # Each entry of `best` holds the number of saved tokens, the start of the last group, and the
    # number of tokens that the last group shares.
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
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
    """Returns the number of tokens that the given prompts take up in a row."""
    groups = group_by_beginning(prompts)
    return sum(sum(map(len, members)) - shared * (len(members) - 1) for shared, members in groups)


def pack_row(prompts: Sequence[Prompt], width: int) -> tuple[np.ndarray, dict[Prompt, Placement]]:
    """Packs prompts into one row.

    Returns:
      An int32 array [4, width] with the rows `tokens`, `index`, `segments` and `parents` (as in
      `engine.PackedPrompts`), and the placement of each prompt.
    """
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
    """Returns the largest n such that the first n distinct prompts fit into `width` tokens."""
    # Adding a prompt to a row never lowers the number of tokens in the row, so bisection can find
    # the largest number of prompts that fits.
    # If the lengths of prompts add up to at most `width`, the prompts fit, because sharing can only
    # save tokens.
    lengths = itertools.accumulate(map(len, waiting))
    sure = sum(1 for total in lengths if total <= width)
    rest = range(sure + 1, len(waiting) + 1)
    return sure + bisect.bisect_right(rest, width, key=lambda count: count_tokens(waiting[:count]))
