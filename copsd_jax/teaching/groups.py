"""Choices from the group of a completion, and from the other problems of the data.

A group is the rollout.per_prompt completions of one occurrence of a problem.
"""

from collections.abc import Sequence

import numpy as np

from copsd_jax.problems import problem_row


def choose_siblings(
    success_B: Sequence[bool],
    groups_B: Sequence[int],
    lengths_B: Sequence[int],
    choice: str,
    seed: Sequence[int],
) -> list[int | None]:
    """Chooses a successful sibling for each completion: another one of its group.

    Args:
      success_B: whether each completion is successful.
      groups_B: the group of each completion.
      lengths_B: tokens of each completion.
      choice: first in the order of samples, shortest (the first of equals), or sampled at random.
      seed: whole numbers from which `sampled` draws.

    Returns:
      The index of the sibling, or None, for each completion.
    """
    rng = np.random.default_rng(list(seed))
    out: list[int | None] = []
    for i, group in enumerate(groups_B):
        others = [j for j, g in enumerate(groups_B) if g == group and j != i and success_B[j]]
        draw = rng.random()  # one draw per completion, so that no group changes another's draw
        if choice == "shortest":
            others.sort(key=lambda j: lengths_B[j])
        k = int(draw * len(others)) if choice == "sampled" else 0
        out.append(others[k] if others else None)
    return out


def choose_other_problems(
    pool: Sequence[problem_row.Row], rows: Sequence[problem_row.Row], seed: Sequence[int]
) -> list[problem_row.Row | None]:
    """Chooses another problem for each row, in its language and with another answer.

    It is the control of a context: how much a solution helps that belongs to another problem. All
    rows of one problem get the same other problem.

    Args:
      pool: the problems to choose from.
      rows: the rows.
      seed: whole numbers from which the choice is drawn.

    Returns:
      The other problem, or None if there is none, for each row.
    """
    found: dict[str, problem_row.Row | None] = {}
    rng = np.random.default_rng(list(seed))
    for row in rows:
        if row.id in found:
            continue
        start = int(rng.integers(len(pool)))
        turned = (pool[(start + k) % len(pool)] for k in range(len(pool)))
        others = (o for o in turned if o.lang == row.lang and o.answer != row.answer)
        found[row.id] = next(others, None)
    return [found[row.id] for row in rows]
