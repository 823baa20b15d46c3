"""Restricts student and teacher to the k most probable entries, with or without a tail.

If `tail` is set, one more entry represents all ids outside the kept set N. The tail's probability
is r = 1 - Σ_N p. Each id u outside N gets the share p_u / r of the tail's gradient, so that
dz_u = (p_u / r) · dz_tail.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from copsd_jax.losses import distributions, divergences

TAIL_FLOOR = -math.expm1(-1e-7)  # smallest probability of a tail, as in published code


class TopK(NamedTuple):
    """Ids of the k most probable entries, the same for student and teacher; ids have no gradient.

    Attributes:
      ids_TK: int32 ids; K is 2k if top_k_of is union, otherwise k.
      first_TK: bool, False where an id occurs for the second time; None if no id can occur twice.
    """

    ids_TK: jax.Array
    first_TK: jax.Array | None


def choose(
    logits_s_TV: jax.Array, logits_t_TV: jax.Array, settings: divergences.Divergence
) -> TopK:
    """Chooses the kept entries by top_k and top_k_of; between equal logits, the lower id wins."""
    sides = {"teacher": (logits_t_TV,), "student": (logits_s_TV,)}
    chosen = sides.get(settings.top_k_of, (logits_s_TV, logits_t_TV))
    best = [jax.lax.top_k(jax.lax.stop_gradient(x), settings.top_k)[1] for x in chosen]
    if len(best) == 1:
        return TopK(best[0], None)
    again_TK = jnp.any(best[1][:, :, None] == best[0][:, None, :], axis=-1)
    first = jnp.concatenate([jnp.ones_like(again_TK), ~again_TK], axis=1)
    return TopK(jnp.concatenate(best, axis=1), first)


def restrict(
    logits_TV: jax.Array,
    whole: distributions.Distribution,
    best: TopK,
    settings: divergences.Divergence,
) -> tuple[distributions.Distribution, jax.Array | None]:
    """Restricts one side to the kept entries; then renormalises the entries or adds a tail column.

    The tail is the last column. The second occurrence of an id gets p = 0 and log = 0 on both
    sides, so that an id contributes only once.

    Args:
      logits_TV: logits of the side, divided by the loss temperature.
      whole: the softmax of logits_TV, [T, V].
      best: the kept entries.
      settings: settings of the divergence.

    Returns:
      The distribution, [T, K + 1] with a tail and [T, K] without a tail; and a bool array [T, 1]
      that is False where the tail is at its floor, or None if there is no tail.
    """
    ids_TK, first_TK = best

    def take(x_TV: jax.Array, fill: float) -> jax.Array:
        x_TK = jnp.take_along_axis(x_TV, ids_TK, axis=1)
        return x_TK if first_TK is None else jnp.where(first_TK, x_TK, fill)

    if settings.tail:
        # The tail's probability is summed directly. In float32, the published formula ln(1 - Σ_N p)
        # suffers from cancellation: if the tail is below 1e-6, the result is mostly rounding error.
        rest_TV = whole.p.at[jnp.arange(ids_TK.shape[0])[:, None], ids_TK].set(0)
        rest_T1 = jnp.sum(rest_TV, axis=1, keepdims=True)
        open_T1 = rest_T1 > TAIL_FLOOR
        rest_T1 = jnp.where(open_T1, rest_T1, TAIL_FLOOR)
        p = jnp.concatenate([take(whole.p, 0), rest_T1], axis=1)
        log = jnp.concatenate([take(whole.log, 0), jnp.log(rest_T1)], axis=1)
        return distributions.Distribution(p, log), open_T1
    inside = distributions.softmax(take(logits_TV, -jnp.inf))
    if first_TK is None:
        return inside, None
    return distributions.Distribution(inside.p, jnp.where(first_TK, inside.log, 0)), None


def scatter_gradient(
    dz_TK: jax.Array, student: distributions.Distribution, whole_p_TV: jax.Array, best: TopK
) -> jax.Array:
    """Scatters the gradients of the kept entries and of the tail to all logits; returns [T, V].

    Args:
      dz_TK: gradients of the entries, [T, K + 1] with a tail, and [T, K] without a tail.
      student: the student's restricted distribution, in the shape of dz_TK.
      whole_p_TV: the student's probabilities over the whole vocabulary.
      best: the kept entries.
    """
    ids_TK, first_TK = best
    count, vocabulary = ids_TK.shape[1], whole_p_TV.shape[1]
    dz_TV = jnp.zeros_like(whole_p_TV)
    if dz_TK.shape[1] > count:
        dz_TV = whole_p_TV * (dz_TK[:, -1:] / student.p[:, -1:])
    if first_TK is not None:
        # A repeated id is replaced by a unique id beyond the vocabulary, which the scatter drops.
        past_1K = vocabulary + jnp.arange(count, dtype=ids_TK.dtype)[None]
        ids_TK = jnp.where(first_TK, ids_TK, past_1K)
    row_T1 = jnp.arange(dz_TK.shape[0])[:, None]
    return dz_TV.at[row_T1, ids_TK].set(dz_TK[:, :count], unique_indices=True, mode="drop")
