"""From logits to a token: temperature, then top-k, top-p, min-p, renormalised after each.

Ids that the tokenizer lacks are out before everything that truncates. The tempered distribution is
the model's own, over all ids, as the trainer sees it. The settings are Python numbers, so that one
which is off (top_k 0, top_p 1, min_p 0) leaves nothing in the compiled program.

What each one keeps:
  top_k: exactly k tokens; of equal logits the lower ids.
  top_p: the most probable tokens until their mass, renormalised after top_k, reaches p, the token
    that crosses p included, and all tokens exactly as probable as that one.
  min_p: tokens at least min_p times as probable as the most probable one. Renormalising changes no
    ratio, so this is one threshold whatever came before.
The most probable token survives each of them. Temperature 0 is greedy: the tempered distribution is
then the one at temperature 1, and the truncated one puts all mass on the argmax (lowest id first).

The vocabulary is never sorted and gets no random number per token. It is looked at in blocks of
128: the k best tokens lie in the k blocks with the highest maxima; and a token is drawn in two
stages, a block by its mass and then a token of that block, each by the Gumbel argmax. The product
of both probabilities is the token's own.

Shapes: J rows, V vocabulary, K = top_k, N blocks, X any set of candidates.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

BLOCK = 128  # tokens; the lanes of a TPU register, and near the square root of a vocabulary
_TINY = 0x00800000  # bits of the smallest normal float32
_ONE = 0x3F800000  # bits of 1.0


def log_probs(
    logits_JV: jax.Array,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    valid_V: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities (tempered_JV, truncated_JV), float32; truncated -inf where none can occur.

    The plain spelling of what `sample` draws from: it holds [J, V] arrays. `valid_V` is bool, ids
    that may be drawn; None for all.
    """
    x_JV = _tempered(logits_JV, temperature)
    tempered_JV = jax.nn.log_softmax(x_JV, axis=-1)
    x_JV = _masked(x_JV, valid_V)
    if temperature == 0:
        best_J = jnp.argmax(x_JV, axis=-1)
        hit_JV = jnp.arange(x_JV.shape[-1])[None, :] == best_J[:, None]
        return tempered_JV, jnp.where(hit_JV, 0.0, -jnp.inf).astype(jnp.float32)
    peak_J1 = jnp.max(x_JV, axis=-1, keepdims=True)
    if top_k:
        value_JK, id_JK = _top_k(x_JV, top_k)
        kept_JK = _kept(jnp.exp(value_JK - peak_J1), top_p, min_p)
        rows_J1 = jnp.arange(x_JV.shape[0])[:, None]
        kept_JV = jnp.zeros(x_JV.shape, bool).at[rows_J1, id_JK].set(kept_JK)
    else:
        kept_JV = _kept(jnp.exp(x_JV - peak_J1), top_p, min_p)
    return tempered_JV, jax.nn.log_softmax(jnp.where(kept_JV, x_JV, -jnp.inf), axis=-1)


def sample(
    logits_JV: jax.Array,
    key_J2: jax.Array,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    valid_V: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One token per row from `log_probs`' truncated distribution.

    Args:
      logits_JV: any floating dtype.
      key_J2: uint32, the data of one threefry key per row. Row j's token depends on key j and
        logits j alone. Temperature 0 ignores it.

    Returns:
      token_J int32, its log-probability under the tempered distribution and under the truncated
      one, float32.
    """
    whole_JV = _tempered(logits_JV, temperature)
    x_JNb = _blocks(_masked(whole_JV, valid_V))
    high_JN = jnp.max(x_JNb, axis=-1)
    peak_J1 = jnp.max(high_JN, axis=-1, keepdims=True)
    mass_JN = jnp.sum(jnp.exp(x_JNb - peak_J1[:, :, None]), axis=-1)
    # ln of the mass of all ids, relative to the peak of those that may be drawn.
    if valid_V is None:
        log_total_J = jnp.log(jnp.sum(mass_JN, axis=-1))
    else:
        log_total_J = jax.nn.logsumexp(whole_JV, axis=-1) - peak_J1[:, 0]
    if temperature == 0:
        block_J = jnp.argmax(high_JN, axis=-1)
        inner_J = jnp.argmax(_block(x_JNb, block_J), axis=-1)
        token_J = (block_J * BLOCK + inner_J).astype(jnp.int32)
        return token_J, -log_total_J, jnp.zeros_like(log_total_J)
    draw = _among_best if top_k else _among_all
    token_J, value_J, kept_J = draw(x_JNb, high_JN, mass_JN, key_J2, top_k, top_p, min_p)
    value_J = value_J - peak_J1[:, 0]
    return token_J, value_J - log_total_J, value_J - jnp.log(kept_J)


def _among_best(x_JNb, high_JN, mass_JN, key_J2, top_k, top_p, min_p):
    """Draws among the top k; (token, its tempered logit, mass of all kept relative to the peak)."""
    del mass_JN
    value_JK, id_JK = _top_k_blocks(x_JNb, high_JN, top_k)
    weight_JK = jnp.exp(value_JK - value_JK[:, :1])
    kept_JK = _kept(weight_JK, top_p, min_p)
    noisy_JK = jnp.where(kept_JK, value_JK, -jnp.inf) + _gumbel(key_J2, value_JK.shape[1])
    choice_J1 = jnp.argmax(noisy_JK, axis=-1, keepdims=True)
    token_J = jnp.take_along_axis(id_JK, choice_J1, axis=1)[:, 0]
    value_J = jnp.take_along_axis(value_JK, choice_J1, axis=1)[:, 0]
    return token_J, value_J, jnp.sum(jnp.where(kept_JK, weight_JK, 0.0), axis=-1)


def _among_all(x_JNb, high_JN, mass_JN, key_J2, top_k, top_p, min_p):
    """As `_among_best` over the whole vocabulary: first a block, then a token in it."""
    del top_k
    peak_J1 = jnp.max(high_JN, axis=-1, keepdims=True)
    floor_J1 = None
    if top_p < 1 or min_p > 0:
        weight_JNb = jnp.exp(x_JNb - peak_J1[:, :, None])
        floor_J1 = _floor(weight_JNb.reshape(weight_JNb.shape[0], -1), top_p, min_p)
        kept_JNb = weight_JNb >= floor_J1[:, :, None]
        mass_JN = jnp.sum(jnp.where(kept_JNb, weight_JNb, 0.0), axis=-1)
    noise = _gumbel(key_J2, mass_JN.shape[1] + BLOCK)
    block_J = jnp.argmax(jnp.log(mass_JN) + noise[:, BLOCK:], axis=-1)
    value_Jb = _block(x_JNb, block_J)
    kept_Jb = jnp.ones(value_Jb.shape, bool)
    if floor_J1 is not None:
        kept_Jb = jnp.exp(value_Jb - peak_J1) >= floor_J1
    noisy_Jb = jnp.where(kept_Jb, value_Jb, -jnp.inf) + noise[:, :BLOCK]
    inner_J = jnp.argmax(noisy_Jb, axis=-1)
    value_J = jnp.take_along_axis(value_Jb, inner_J[:, None], axis=1)[:, 0]
    return (block_J * BLOCK + inner_J).astype(jnp.int32), value_J, jnp.sum(mass_JN, axis=-1)


def check(temperature: float, top_k: int, top_p: float, min_p: float, vocab_size: int) -> None:
    """Raises ValueError, in one sentence, for a setting outside its range."""
    rules: Sequence[tuple[str, float, bool, str]] = (
        ("temperature", temperature, 0 <= temperature < float("inf"), "at least 0 (0 is greedy)"),
        ("top_k", top_k, 0 <= top_k <= vocab_size, f"0 (off) to {vocab_size}, the vocabulary"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (1 is off)"),
        ("min_p", min_p, 0 <= min_p < 1, "at least 0 (off) and below 1"),
    )
    for name, value, holds, rule in rules:
        if not holds:
            raise ValueError(f"{name} is {value!r}: it must be {rule}")


def _tempered(logits_JV: jax.Array, temperature: float) -> jax.Array:
    """Logits over the temperature in float32."""
    x_JV = logits_JV.astype(jnp.float32)
    return x_JV if temperature in (0, 1) else x_JV / temperature


def _masked(x_JV: jax.Array, valid_V: jax.Array | None) -> jax.Array:
    """-inf at ids that may not be drawn."""
    return x_JV if valid_V is None else jnp.where(valid_V[None, :], x_JV, -jnp.inf)


def _blocks(x_JV: jax.Array) -> jax.Array:
    """[J, N, 128]; a vocabulary that 128 does not divide ends in -inf."""
    rows, size = x_JV.shape
    x_JV = jnp.pad(x_JV, ((0, 0), (0, -size % BLOCK)), constant_values=-jnp.inf)
    return x_JV.reshape(rows, -1, BLOCK)


def _block(x_JNb: jax.Array, block_J: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_JNb, block_J[:, None, None], axis=1)[:, 0]


def _top_k(x_JV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    x_JNb = _blocks(x_JV)
    return _top_k_blocks(x_JNb, jnp.max(x_JNb, axis=-1), k)


def _top_k_blocks(x_JNb: jax.Array, high_JN: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of each row in descending order, lower ids first, and their ids.

    k blocks whose maxima are the highest hold k values that no other block exceeds, so nothing
    outside of them can be among the k best. They are kept in order of id, for equal values.
    """
    rows, blocks, _ = x_JNb.shape
    if k >= blocks:
        value_JK, id_JK = jax.lax.top_k(x_JNb.reshape(rows, -1), k)
        return value_JK, id_JK
    block_JK = jnp.sort(jax.lax.top_k(high_JN, k)[1], axis=-1)
    near = jnp.take_along_axis(x_JNb, block_JK[:, :, None], axis=1).reshape(rows, -1)
    value_JK, at_JK = jax.lax.top_k(near, k)
    first_JK = jnp.take_along_axis(block_JK, at_JK // BLOCK, axis=1) * BLOCK
    return value_JK, first_JK + at_JK % BLOCK


def _kept(weight_JX: jax.Array, top_p: float, min_p: float) -> jax.Array:
    if top_p >= 1 and min_p <= 0:
        return jnp.ones(weight_JX.shape, bool)
    return weight_JX >= _floor(weight_JX, top_p, min_p)


def _floor(weight_JX: jax.Array, top_p: float, min_p: float) -> jax.Array:
    """The smallest weight that top-p and min-p keep; weights are relative to the largest, 1."""
    floor_J1 = jnp.full((weight_JX.shape[0], 1), min_p, jnp.float32)
    return jnp.maximum(floor_J1, _nucleus(weight_JX, top_p)) if top_p < 1 else floor_J1


def _nucleus(weight_JX: jax.Array, top_p: float) -> jax.Array:
    """A threshold [J, 1] that exactly the tokens of the top-p set reach.

    Bisection over the bits of float32, which order like the numbers they spell: `low` is always a
    threshold whose set has the mass, `high` one whose set has not. It ends when one token at most
    lies between them, or none could.
    """
    need_J1 = top_p * jnp.sum(weight_JX, axis=-1, keepdims=True)

    def measure(bits_J1):
        kept_JX = weight_JX >= jax.lax.bitcast_convert_type(bits_J1, jnp.float32)
        mass_J1 = jnp.sum(jnp.where(kept_JX, weight_JX, 0.0), axis=-1, keepdims=True)
        return mass_J1, jnp.sum(kept_JX, axis=-1, keepdims=True, dtype=jnp.int32)

    def unsettled(carry):
        low, high, at_low, at_high = carry
        return jnp.any((high - low > 1) & (at_low - at_high > 1))

    def halve(carry):
        low, high, at_low, at_high = carry
        middle = low + (high - low) // 2
        mass, count = measure(middle)
        enough = mass >= need_J1
        return (
            jnp.where(enough, middle, low),
            jnp.where(enough, high, middle),
            jnp.where(enough, count, at_low),
            jnp.where(enough, at_high, count),
        )

    low = jnp.full_like(need_J1, _TINY, jnp.int32)
    high = jnp.full_like(need_J1, _ONE + 1, jnp.int32)
    low, *_ = jax.lax.while_loop(
        unsettled, halve, (low, high, measure(low)[1], jnp.zeros_like(low))
    )
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _gumbel(key_J2: jax.Array, size: int) -> jax.Array:
    """Standard Gumbel noise [J, size] float32, row j from key j alone."""
    keys_J = jax.random.wrap_key_data(key_J2, impl="threefry2x32")
    return jax.vmap(lambda key: jax.random.gumbel(key, (size,), jnp.float32))(keys_J)
