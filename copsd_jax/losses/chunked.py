"""Blocks of tokens against the vocabulary in plain array code: statistics and gradient at once.

`sweep_block` is the divergence of a block, `score_block` the log-probabilities of its tokens.
Matmuls run in the hidden states' dtype; all else is float32, or float64 for float64 states. Inside
`jax.shard_map` a head may be one part of a vocabulary that a mesh axis splits (`split_vocabulary`).
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from copsd_jax.losses import (
    distributions,
    divergences,
    precision,
    split_vocabulary,
    token_blocks,
    token_values,
)

STRIP = 8  # rows that a CPU works on at a time, so that their temporaries stay in its cache
FLOOR = -1e30  # logits of padding: no mass, and finite
Result = TypeVar("Result")


# --- divergence -------------------------------------------------------------------------------


def sweep_block(
    settings: divergences.Divergence,
    hidden: tuple[jax.Array, jax.Array],
    heads: tuple[jax.Array, ...],
    inputs: token_values.TokenInputs,
    shard: split_vocabulary.VocabularyShard,
    *,
    gradient: bool,
    train_head: bool,
) -> tuple[token_values.TokenStats, jax.Array | None, jax.Array | None]:
    """Sweeps a block: matmuls for both logits, for the states' gradient, and for the head's.

    Args:
      settings: of the divergence.
      hidden: of student and teacher, [T, D] each.
      heads: [V, D], the student's and the teacher's or one for both, in the states' dtypes.
      inputs: [T]; `weight_T` scales each row's value in the sum whose gradient is taken.
      shard: this device's part of the vocabulary.
      gradient: False for the statistics alone, which take two matmuls.
      train_head: whether the head's gradient is taken, the fourth matmul.

    Returns:
      The statistics, ∂(Σ weight · value) / ∂hidden_s [T, D], and the same to the student's head
      [V, D]; None for a gradient that was not asked for.
    """
    logits_s_TV = _logits(hidden[0], heads[0], shard)
    logits_t_TV = _logits(hidden[1], heads[-1], shard)
    if shard.axis:
        stats, dz_TV = split_vocabulary.score_block(
            logits_s_TV, logits_t_TV, inputs, settings, shard.axis
        )
    else:
        stats, dz_TV = _in_strips(
            lambda z_s, z_t, tokens_T, *others: token_values.score_block(
                z_s, z_t, tokens_T, settings, *others
            ),
            logits_s_TV, logits_t_TV, inputs.tokens_T, inputs.logp_old_T, inputs.logp_rollout_T,
        )  # fmt: skip
    if not gradient:
        return stats, None, None
    # dz is rounded before the weight, which may be small: bf16 keeps its relative precision anyway.
    dz_TV = dz_TV.astype(hidden[0].dtype)
    grad_head_VD = None
    if train_head:
        grad_head_VD = precision.dot(dz_TV, precision.scale(hidden[0], inputs.weight_T), 0, 0)
    grad_hidden_TD = precision.dot(dz_TV, heads[0], 1, 0)
    if shard.axis:
        grad_hidden_TD = jax.lax.psum(grad_hidden_TD, shard.axis)
    grad_hidden_TD = (grad_hidden_TD * inputs.weight_T[:, None]).astype(hidden[0].dtype)
    return stats, grad_hidden_TD, grad_head_VD


def sweep_live(
    chunk: int,
    settings: divergences.Divergence,
    hidden: tuple[jax.Array, jax.Array],
    heads: tuple[jax.Array, ...],
    inputs: token_values.TokenInputs,
    shard: split_vocabulary.VocabularyShard,
    live_T: jax.Array,
    *,
    gradient: bool,
    train_head: bool,
) -> tuple[tuple[token_values.TokenStats, jax.Array | None], jax.Array | None]:
    """Sweeps a device's live rows in blocks of at most `chunk` rows.

    Arguments, results and their shapes are those of `pallas.dispatch.sweep_live`.
    """

    def sweep(rows: tuple) -> tuple:
        hidden, inputs = rows
        stats, grad_hidden_TD, grad_head_VD = sweep_block(
            settings, hidden, heads, inputs, shard, gradient=gradient, train_head=train_head
        )
        return (stats, grad_hidden_TD), grad_head_VD

    return token_blocks.walk(sweep, (hidden, inputs), live_T, chunk, STRIP)


def _logits(
    hidden_TD: jax.Array, head_VD: jax.Array, shard: split_vocabulary.VocabularyShard
) -> jax.Array:
    """Returns logits of this device's part, with FLOOR at entries that are padding."""
    logits_TV = precision.dot(hidden_TD, head_VD, 1, 1)
    count = head_VD.shape[0]
    if shard.axis is None or shard.entries is None:
        return logits_TV
    if shard.entries == count * jax.lax.axis_size(shard.axis):
        return logits_TV
    first = split_vocabulary.first_entry(shard.axis, count)
    entry_1V = first + jnp.arange(count, dtype=jnp.int32)[None]
    return jnp.where(entry_1V < shard.entries, logits_TV, FLOOR)


def _in_strips(score: Callable[..., Result], *rows: jax.Array | None) -> Result:
    """Returns score(*rows) for arrays [rows, ...]; a program for a CPU goes strip by strip."""
    if jax.tree.leaves(rows)[0].shape[0] <= STRIP:
        return score(*rows)

    def strips(*rows: jax.Array | None) -> Result:
        cut = jax.tree.map(lambda x: x.reshape(-1, STRIP, *x.shape[1:]), rows)
        out = jax.lax.map(lambda strip: score(*strip), cut)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

    return jax.lax.platform_dependent(*rows, cpu=strips, default=score)


# --- log-probabilities ------------------------------------------------------------------------


class ScoreOptions(NamedTuple):
    """Static options of `score_tokens`.

    Attributes:
      temperature: divides the logits.
      chunk: rows of a block, at most.
      train_head: whether the head has a gradient.
    """

    temperature: float
    chunk: int
    train_head: bool


def score_block(
    temperature: float,
    hidden_TD: jax.Array,
    head_VD: jax.Array,
    tokens_T: jax.Array,
    shard: split_vocabulary.VocabularyShard,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores the tokens of a block: log-probability [T], entropy [T] and ∂logp_t / ∂logits [T, V].

    The head and the third result are in the states' dtype.
    """
    logits_TV = _logits(hidden_TD, head_VD, shard)
    if shard.axis:
        *values, dz_TV = split_vocabulary.score(logits_TV, tokens_T, temperature, shard.axis)
    else:
        *values, dz_TV = _in_strips(
            lambda *rows: distributions.score(*rows, temperature=temperature), logits_TV, tokens_T
        )
    return values[0], values[1], dz_TV.astype(hidden_TD.dtype)


def _score_live(
    options: ScoreOptions,
    hidden_TD: jax.Array,
    head_VD: jax.Array,
    tokens_T: jax.Array,
    live_T: jax.Array,
    cotangent_T: jax.Array | None = None,
    *,
    gradient: bool,
) -> tuple[tuple, jax.Array | None]:
    """Scores all live rows over the whole mesh.

    Returns (logp_T, entropy_T, ∂logp_t / ∂hidden_t if `gradient`) and no head's gradient; with the
    cotangents of logp_T, nothing and the head's gradient.
    """
    entries = head_VD.shape[0]

    def device(inputs: tuple, heads: tuple, axis: str | None) -> tuple:
        *rows, live_T = inputs
        shard = split_vocabulary.VocabularyShard(axis, entries)

        def block(rows: tuple) -> tuple[tuple, jax.Array | None]:
            hidden_TD, tokens_T, *rest = rows
            *values, dz_TV = score_block(options.temperature, hidden_TD, heads[0], tokens_T, shard)
            if rest:
                return (), precision.dot(dz_TV, precision.scale(hidden_TD, rest[0]), 0, 0)
            if not gradient:
                return tuple(values), None
            grad_TD = precision.dot(dz_TV, heads[0], 1, 0)
            grad_TD = jax.lax.psum(grad_TD, axis) if axis else grad_TD
            return (*values, grad_TD.astype(hidden_TD.dtype)), None

        return token_blocks.walk(block, tuple(rows), live_T, options.chunk, STRIP)

    heads = (head_VD.astype(hidden_TD.dtype),)
    if options.train_head:  # a frozen head was gathered before
        heads = (token_blocks.split_head(heads[0], split_vocabulary=True),)
    rest = () if cotangent_T is None else (cotangent_T,)
    inputs = (hidden_TD, tokens_T, *rest, live_T)
    return token_blocks.spread(device, inputs, heads, split_vocabulary=True)


def _score_tokens_value(
    options: ScoreOptions,
    hidden_TD: jax.Array,
    head_VD: jax.Array,
    tokens_T: jax.Array,
    live_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    (logp_T, entropy_T), _ = _score_live(
        options, hidden_TD, head_VD, tokens_T, live_T, gradient=False
    )
    return logp_T, entropy_T


def _score_tokens_forward(
    options: ScoreOptions, hidden_TD, head_VD, tokens_T, live_T
) -> tuple[tuple, tuple]:
    (*values, grad_TD), _ = _score_live(
        options, hidden_TD, head_VD, tokens_T, live_T, gradient=True
    )
    arguments = (hidden_TD, head_VD, tokens_T, live_T) if options.train_head else None
    return tuple(values), (grad_TD, arguments)


def _score_tokens_backward(options: ScoreOptions, residuals: tuple, cotangents: tuple) -> tuple:
    """Scales the states' gradient; sweeps again for the head's, which needs the cotangents."""
    grad_TD, arguments = residuals
    grad_TD = precision.scale(grad_TD, cotangents[0])
    if arguments is None:
        return grad_TD, None, None, None
    hidden_TD, head_VD, tokens_T, live_T = arguments
    _, grad_head_VD = _score_live(
        options, hidden_TD, head_VD, tokens_T, live_T, cotangents[0], gradient=True
    )
    assert grad_head_VD is not None
    return grad_TD, grad_head_VD.astype(head_VD.dtype), None, None


# (options, hidden_TD, head_VD, tokens_T, live_T) -> logp_T and entropy_T of the live rows, [T].
score_tokens = jax.custom_vjp(_score_tokens_value, nondiff_argnums=(0,))
score_tokens.defvjp(_score_tokens_forward, _score_tokens_backward)
