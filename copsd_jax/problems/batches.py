"""Batches: the rows of each step, taken from an endless order that the seed determines."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from copsd_jax.problems import problem_row


def build_row_order(
    rows: Sequence[problem_row.Row], langs: Sequence[str], weights: Sequence[float], seed: int
) -> Any:
    """Builds the endless order of rows as a `grain.MapDataset`: element i is the i-th row.

    The rows of a language are shuffled again in each epoch of that language. The order of a
    language's rows depends only on `seed` and on the language's code. If there are several
    languages, each language contributes rows in proportion to its weight.

    Args:
      rows: the rows of all languages.
      langs: the codes of the languages, in the order of `weights`.
      weights: the shares of the languages; at least one share must be above 0. An empty tuple means
        equal shares. A language with a share above 0 must have at least one row.
      seed: the seed of the run.
    """
    import grain  # imported lazily, so that the package can be imported without grain

    weights = tuple(weights) or (1.0,) * len(langs)
    parts, shares = [], []
    for lang, weight in zip(langs, weights, strict=True):
        if weight:
            mine = [row for row in rows if row.lang == lang]
            # The language's code is part of the seed. If all languages had the same seed, parallel
            # data would give the same problem in all languages at once.
            own = np.random.SeedSequence([seed, zlib.crc32(lang.encode())]).generate_state(1)
            parts.append(grain.MapDataset.source(mine).seed(int(own[0])).shuffle().repeat())
            shares.append(weight / sum(weights))
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, shares)


def iterate_batches(
    rows: Sequence[problem_row.Row],
    langs: Sequence[str],
    weights: Sequence[float],
    batch: int,
    seed: int,
    step: int = 0,
) -> Iterator[list[problem_row.Row]]:
    """Yields the rows of each step, endlessly; the first step is `step`.

    A row can occur twice in one step if an epoch ends in that step.
    """
    dataset = build_row_order(rows, langs, weights, seed)
    while True:
        yield [dataset[i] for i in range(step * batch, (step + 1) * batch)]
        step += 1
