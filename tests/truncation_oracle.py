"""Whole distributions [J, V], of which `truncation.sample` draws one token per row."""

import jax
import jax.numpy as jnp

from copsd_jax.sampler import truncation


def log_probs(
    logits_JV: jax.Array,
    rows: truncation.RowSettings,
    features: truncation.Features,
    valid_V: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (tempered_JV, truncated_JV), float32; truncated is -inf where no token can occur.

    Args:
      logits_JV: of any floating dtype.
      rows: settings of the rows.
      features: static.
      valid_V: bool, the ids that may be drawn; None for all.
    """
    x_JV = truncation._tempered(logits_JV, rows, features)
    tempered_JV = jax.nn.log_softmax(x_JV, axis=-1)
    x_JV = truncation._masked(x_JV, valid_V)
    kept_JV = jnp.zeros(x_JV.shape, bool)
    if features.full:
        weight_JV = jnp.exp(x_JV - jnp.max(x_JV, axis=-1, keepdims=True))
        kept_JV = weight_JV >= truncation._find_truncation_floor(
            weight_JV, truncation._without_top_k(rows, features), features
        )
    if features.cap:
        x_JNb = truncation._cut_into_draw_blocks(x_JV)
        best = truncation._find_draw_candidates(x_JNb, jnp.max(x_JNb, axis=-1), rows, features)
        row_J1 = jnp.arange(x_JV.shape[0])[:, None]
        among_JV = jnp.zeros(x_JV.shape, bool).at[row_J1, best.id_JK].set(best.kept_JK)
        kept_JV = jnp.where(rows.top_k_J[:, None] > 0, among_JV, kept_JV)
    if features.greedy:
        best_J = jnp.argmax(x_JV, axis=-1)
        hit_JV = jnp.arange(x_JV.shape[-1])[None, :] == best_J[:, None]
        kept_JV = jnp.where(rows.temperature_J[:, None] == 0, hit_JV, kept_JV)
    return tempered_JV, jax.nn.log_softmax(jnp.where(kept_JV, x_JV, -jnp.inf), axis=-1)
