"""What the completions of one problem are to one another: success, sibling, difference.

A group is the rollout.per_prompt completions of one occurrence of a problem.
"""

from collections.abc import Sequence

import numpy as np

from copsd_jax.problems import problem_row

SIBLINGS = ("first", "shortest", "sampled")


def siblings(
    success_B: Sequence[bool],
    groups_B: Sequence[int],
    lengths_B: Sequence[int],
    choice: str,
    seed: Sequence[int],
) -> list[int | None]:
    """For each completion the index of a successful one of its group, never its own; or None.

    Args:
      lengths_B: tokens of each completion.
      choice: first in the order of samples, shortest (the first of equals), or sampled at random.
      seed: whole numbers from which `sampled` draws.

    Raises:
      ValueError: unknown choice.
    """
    if choice not in SIBLINGS:
        raise ValueError(f"context.sibling is {choice!r}: the choices are {', '.join(SIBLINGS)}")
    rng = np.random.default_rng(list(seed))
    out: list[int | None] = []
    for i, group in enumerate(groups_B):
        others = [
            j for j, g in enumerate(groups_B) if g == group and j != i and success_B[j]
        ]  # fmt: skip
        draw = rng.random()  # one draw a completion, whatever its group holds
        if not others:
            out.append(None)
        elif choice == "sampled":
            out.append(others[int(draw * len(others))])
        else:
            key = (lambda j: lengths_B[j]) if choice == "shortest" else (lambda j: 0)
            out.append(min(others, key=key))
    return out


def others(
    pool: Sequence[problem_row.Row], rows: Sequence[problem_row.Row], seed: Sequence[int]
) -> list[problem_row.Row | None]:
    """For each row another problem of the pool, in its language and with another answer; or None.

    The control of a context: what a solution is worth that belongs to another problem. Rows of one
    problem get one other.

    Args:
      seed: whole numbers that the draw depends on, with the row's id.
    """
    found: dict[str, problem_row.Row | None] = {}
    rng = np.random.default_rng(list(seed))
    for row in rows:
        if row.id in found:
            continue
        start = int(rng.integers(len(pool)))
        turned = (pool[(start + k) % len(pool)] for k in range(len(pool)))
        found[row.id] = next(
            (o for o in turned if o.lang == row.lang and o.answer != row.answer), None
        )
    return [found[row.id] for row in rows]
