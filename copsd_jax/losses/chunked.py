"""Computes statistics and gradients for a block of tokens, in plain array code.

`sweep_block` computes the divergence of a block. `score_log_prob_block` computes the
log-probabilities of the tokens in a block. Matmuls run in the dtype of the hidden states. All other
computations are in float32, or in float64 if the states are float64. Inside `jax.shard_map`, a mesh
axis may split the vocabulary. In this case, each device has only its own part of each head
(`split_vocabulary`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from copsd_jax.losses import distributions, precision, split_vocabulary, token_blocks, token_values

STRIP = 8  # number of rows per step on a CPU; so few that temporary arrays stay in the cache
FLOOR = -1e30  # logit of padding entries; finite, but so low that padding gets no probability
Result = TypeVar("Result")


# --- divergence -------------------------------------------------------------------------------


def sweep_block(sweep: split_vocabulary.Sweep, rows: tuple) -> tuple[tuple, jax.Array | None]:
    """Computes the statistics and the gradients of one block of tokens.

    Args:
      sweep: constants of the sweep; each head has the same dtype as the states that it
        multiplies.
      rows: (hidden, inputs); hidden contains the states of student and teacher, [T, D] each, and
        inputs is a `TokenInputs`.

    Returns:
      The pair (TokenStats, gradient of the student's states [T, D]), and the gradient of the
      student's head [V, D]. Both gradients are those of Σ weight · value. A gradient that is not
      requested is None.
    """
    hidden, inputs = rows
    settings, heads, axis = sweep.settings, sweep.heads, sweep.shard.axis
    logits_s_TV = _compute_shard_logits(hidden[0], heads[0], sweep.shard)
    logits_t_TV = _compute_shard_logits(hidden[1], heads[-1], sweep.shard)
    if axis:
        stats, dz_TV = split_vocabulary.score_shard_block(
            logits_s_TV, logits_t_TV, inputs, settings, axis
        )
    else:

        def score(z_s, z_t, tokens_T, *others):
            return token_values.score_divergence_block(z_s, z_t, tokens_T, settings, *others)

        tokens_T, _, *others = inputs
        stats, dz_TV = _score_in_strips(score, logits_s_TV, logits_t_TV, tokens_T, *others)
    if not sweep.gradient:
        return (stats, None), None
    # dz is rounded before it is multiplied by the weight. A small weight costs no precision,
    # because the relative precision of bfloat16 does not depend on the magnitude.
    dz_TV = dz_TV.astype(hidden[0].dtype)
    grad_head_VD = None
    if sweep.train_head:
        grad_head_VD = precision.dot(dz_TV, precision.scale(hidden[0], inputs.weight_T), 0, 0)
    grad_hidden_TD = precision.dot(dz_TV, heads[0], 1, 0)
    if axis:
        grad_hidden_TD = jax.lax.psum(grad_hidden_TD, axis)
    grad_hidden_TD = (grad_hidden_TD * inputs.weight_T[:, None]).astype(hidden[0].dtype)
    return (stats, grad_hidden_TD), grad_head_VD


def _compute_shard_logits(hidden_TD, head_VD, shard: split_vocabulary.VocabularyShard) -> jax.Array:
    """Returns the logits of this device's entries, [T, V]; padding entries get FLOOR."""
    logits_TV = precision.dot(hidden_TD, head_VD, 1, 1)
    count = head_VD.shape[0]
    if shard.axis is None or shard.entries is None:
        return logits_TV
    if shard.entries == count * jax.lax.axis_size(shard.axis):
        return logits_TV
    first = split_vocabulary.first_entry(shard.axis, count)
    entry_1V = first + jnp.arange(count, dtype=jnp.int32)[None]
    return jnp.where(entry_1V < shard.entries, logits_TV, FLOOR)


def _score_in_strips(score: Callable[..., Result], *rows: jax.Array | None) -> Result:
    """Returns score(*rows) for arrays [T, ...]; on a CPU, calls `score` on STRIP rows at a time."""
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
      temperature: number by which the logits are divided.
      chunk: maximum number of rows in a block.
      train_head: whether the head has a gradient.
    """

    temperature: float
    chunk: int
    train_head: bool


def score_log_prob_block(
    temperature: float, hidden_TD, head_VD, tokens_T, shard: split_vocabulary.VocabularyShard
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores a block of tokens: log-probability [T], entropy [T] and ∂logp_t / ∂logits [T, V].

    The head and the gradient are in the dtype of the hidden states.
    """
    logits_TV = _compute_shard_logits(hidden_TD, head_VD, shard)
    if shard.axis:
        scored = split_vocabulary.score(logits_TV, tokens_T, temperature, shard.axis)
    else:
        score = functools.partial(distributions.score, temperature=temperature)
        scored = _score_in_strips(score, logits_TV, tokens_T)
    logp_T, entropy_T, dz_TV = scored
    return logp_T, entropy_T, dz_TV.astype(hidden_TD.dtype)


def _score_live_log_probs(
    options: ScoreOptions, gradient: bool, hidden_TD, head_VD, tokens_T, live_T, cotangent_T=None
) -> tuple[tuple, jax.Array | None]:
    """Scores all live rows on all devices of the mesh.

    If `cotangent_T` is None, the function returns `((logp_T, entropy_T), None)`. If `gradient` is
    also set, the inner tuple is (logp_T, entropy_T, ∂logp_t / ∂hidden_t [T, D]). If `cotangent_T`
    contains the cotangents of logp_T, the function returns an empty tuple and the head's gradient
    [V, D].
    """
    entries = head_VD.shape[0]

    def device(inputs: tuple, heads: tuple, axis: str | None) -> tuple:
        *rows, live_T = inputs
        shard = split_vocabulary.VocabularyShard(axis, entries)

        def block(rows: tuple) -> tuple[tuple, jax.Array | None]:
            hidden_TD, tokens_T, *rest = rows
            *values, dz_TV = score_log_prob_block(
                options.temperature, hidden_TD, heads[0], tokens_T, shard
            )
            if rest:
                return (), precision.dot(dz_TV, precision.scale(hidden_TD, rest[0]), 0, 0)
            if not gradient:
                return tuple(values), None
            grad_TD = precision.dot(dz_TV, heads[0], 1, 0)
            grad_TD = jax.lax.psum(grad_TD, axis) if axis else grad_TD
            return (*values, grad_TD.astype(hidden_TD.dtype)), None

        return token_blocks.walk(block, tuple(rows), live_T, options.chunk, STRIP)

    heads = (head_VD.astype(hidden_TD.dtype),)
    if options.train_head:  # a frozen head has already been gathered
        heads = (token_blocks.split_head(heads[0], split_vocabulary=True),)
    rest = () if cotangent_T is None else (cotangent_T,)
    inputs = (hidden_TD, tokens_T, *rest, live_T)
    return token_blocks.spread(device, inputs, heads, split_vocabulary=True)


def _score_tokens_value(options: ScoreOptions, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    (logp_T, entropy_T), _ = _score_live_log_probs(options, False, *arrays)
    return logp_T, entropy_T


def _score_tokens_forward(options: ScoreOptions, *arrays: jax.Array) -> tuple[tuple, tuple]:
    (*values, grad_TD), _ = _score_live_log_probs(options, True, *arrays)
    return tuple(values), (grad_TD, arrays if options.train_head else None)


def _score_tokens_backward(options: ScoreOptions, residuals: tuple, cotangents: tuple) -> tuple:
    """Scales the states' gradient by the cotangents; a second sweep gives the head's gradient."""
    grad_TD, arguments = residuals
    grad_TD = precision.scale(grad_TD, cotangents[0])
    if arguments is None:
        return grad_TD, None, None, None
    _, grad_head_VD = _score_live_log_probs(options, True, *arguments, cotangent_T=cotangents[0])
    assert grad_head_VD is not None
    return grad_TD, grad_head_VD.astype(arguments[1].dtype), None, None


# Maps (options, hidden_TD, head_VD, tokens_T, live_T) to logp_T and entropy_T of the live rows.
score_tokens = jax.custom_vjp(_score_tokens_value, nondiff_argnums=(0,))
score_tokens.defvjp(_score_tokens_forward, _score_tokens_backward)
