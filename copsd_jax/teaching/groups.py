"""Chooses siblings from the groups of completions, and chooses other problems from the data.

A group consists of the rollout.per_prompt completions that are sampled for one occurrence of a
problem.
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
    """Chooses a sibling for each completion: a different, successful completion of the same group.

    Args:
      success_B: [B], whether each completion is successful.
      groups_B: [B], the number of the group to which each completion belongs.
      lengths_B: [B], the number of tokens in each completion.
      choice: "first" (in the order of samples), "shortest" (the first one if several are equally
        short) or "sampled" (at random).
      seed: integers that seed the random choice.

    Returns:
      For each completion, the index of its sibling, or None if the completion has no sibling.
    """
    rng = np.random.default_rng(list(seed))
    out: list[int | None] = []
    for i, group in enumerate(groups_B):
        others = [j for j, g in enumerate(groups_B) if g == group and j != i and success_B[j]]
        draw = rng.random()  # always drawn, so that no group affects the draws of other groups
        if choice == "shortest":
            others.sort(key=lambda j: lengths_B[j])
        k = int(draw * len(others)) if choice == "sampled" else 0
        out.append(others[k] if others else None)
    return out


def choose_other_problems(
    pool: Sequence[problem_row.Row], rows: Sequence[problem_row.Row], seed: Sequence[int]
) -> list[problem_row.Row | None]:
    """Chooses another problem for each row, in the same language but with a different answer.

    The context `other_problem` is a control: it measures the effect of a solution that does not
    belong to the row. Rows with the same id all get the same problem.

    Args:
      pool: the problems to choose from.
      rows: the rows.
      seed: integers that seed the choice.

    Returns:
      For each row, the other problem, or None if no problem qualifies.
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
