"""A run of the GRPO card, or one process of it, in which a number becomes NaN in some steps.

Run as: spoiled_run.py KIND STEPS [the arguments of copsd_jax.main], with STEPS such as 3,4. KIND is
`input` (the advantage of one token, so that loss and gradient become NaN), `weight` (one number of
the adapter), or `logit` (one logit of the sampler's first slot, in every step).
"""

import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from copsd_jax import main, train
from copsd_jax.methods import grpo
from copsd_jax.sampler import engine


def by_text(gold: str, text: str) -> float:
    """As `runs.by_text`, without the strict switches of tests, which the optimizer cannot bear."""
    return zlib.crc32(text.encode()) % 8 / 7


def spoil(kind: str, steps: set[int], patch=setattr) -> None:
    """Changes the functions of a run; `patch` is setattr, or that of pytest's monkeypatch."""
    make_batch, run_step, draw = grpo.make_batch, train._run_training_step, engine._draw

    def spoiled_batch(r, state, rows, step):
        work = make_batch(r, state, rows, step)
        if step + 1 in steps:
            work.batch.advantage_BC[1, 0] = np.nan
        return work

    def spoiled_step(r, state, rows, step, *rest):
        if step + 1 in steps:
            lost = lambda x: jnp.where(jnp.arange(x.size).reshape(x.shape) == 7, jnp.nan, x)  # noqa: E731
            b = state.trained["q"]["b"]
            b = jax.jit(lost, out_shardings=b.sharding)(b)
            trained = state.trained | {"q": state.trained["q"] | {"b": b}}
            state = state._replace(trained=trained)
        return run_step(r, state, rows, step, *rest)

    def spoiled_draw(features, constants, slots, drawn, logits_JV, step):
        J, V = logits_JV.shape
        bad_JV = (jnp.arange(J) == 0)[:, None] & (jnp.arange(V) == 17)[None]
        return draw(features, constants, slots, drawn, jnp.where(bad_JV, jnp.nan, logits_JV), step)

    if kind == "input":
        patch(grpo, "make_batch", spoiled_batch)
    elif kind == "weight":
        patch(train, "_run_training_step", spoiled_step)
    else:
        patch(engine, "_draw", spoiled_draw)


if __name__ == "__main__":
    kind, steps, *rest = sys.argv[1:]
    spoil(kind, {int(step) for step in steps.split(",")})
    sys.exit(main.main(["main", *rest]))
