"""Next-token distributions over the whole vocabulary, computed from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Distribution(NamedTuple):
    """Probabilities and their logarithms, in two arrays of the same shape.

    The logarithm is kept, because it stays exact even where the probability underflows. The
    probability is also kept, because computing the exponential again would be expensive.
    """

    p: jax.Array
    log: jax.Array


def softmax(logits: jax.Array) -> Distribution:
    """Returns the softmax over the last axis, in the shape of the logits.

    Student and teacher use the same expression, so equal logits give bit-identical distributions.
    """
    # The maximum is subtracted from the logits first. If the logits are large, adding the maximum
    # to ln Σ would round away the last digits of ln Σ.
    below = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(below)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return Distribution(weights * (1 / total), below - jnp.log(total))


def pick(x_TV: jax.Array, tokens_T: jax.Array) -> jax.Array:
    """Returns x_TV[t, tokens_T[t]], shape [T]."""
    return jnp.take_along_axis(x_TV, tokens_T[:, None], axis=1)[:, 0]


def entropy(distribution: Distribution) -> jax.Array:
    """Returns the entropy -Σ p ln p in nats, in the shape of the input without its last axis."""
    return -jnp.sum(distribution.p * distribution.log, axis=-1)


def log_prob(logits_TV: jax.Array, tokens_T: jax.Array, temperature: float) -> jax.Array:
    """Returns ln softmax(logits / temperature)[token], shape [T]."""
    tempered_TV = logits_TV * (1 / temperature)
    below_TV = tempered_TV - jax.lax.stop_gradient(jnp.max(tempered_TV, axis=-1, keepdims=True))
    return pick(below_TV, tokens_T) - jnp.log(jnp.sum(jnp.exp(below_TV), axis=-1))


def score(
    logits_TV: jax.Array, tokens_T: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores given tokens; computes the gradient in closed form.

    Returns:
      The log-probability of each token [T], the entropy of each distribution [T], and the gradient
      of the log-probability with respect to the logits [T, V].
    """
    scale = 1 / temperature
    student = softmax(logits_TV * scale)
    logp_T, entropy_T = pick(student.log, tokens_T), entropy(student)
    return logp_T, entropy_T, subtract_one_hot(student, tokens_T) * -scale


def subtract_one_hot(student: Distribution, tokens_T: jax.Array) -> jax.Array:
    """Returns p - 1[y] = -∂ln p(y) / ∂(logits / τ), shape [T, V], where y is the token."""
    vocabulary_1V = jnp.arange(student.p.shape[1], dtype=tokens_T.dtype)[None]
    return jnp.where(vocabulary_1V == tokens_T[:, None], student.p - 1, student.p)
