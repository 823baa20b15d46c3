"""Drawing a token from logits: first temperature, then top-k, top-p and min-p, in this order.

Dividing the logits by the temperature gives the tempered distribution. The tempered distribution
covers all ids of the model, as in the trainer. After tempering, the ids that the tokenizer lacks
are excluded. Then three truncations follow. Each truncation renormalises the probabilities of the
tokens that the truncation keeps.
  `top_k` keeps exactly k tokens. Among equal logits, lower ids come first.
  `top_p` keeps the most probable tokens until their mass, renormalised after top_k, reaches p. The
    token that crosses p is kept, and so is every token with exactly the same probability.
  `min_p` keeps tokens that are at least min_p times as probable as the most probable token.
    Renormalising does not change the ratio of two probabilities. Therefore, the threshold of min_p
    does not depend on the tokens that top_k and top_p have removed.
The most probable token survives each truncation. Temperature 0 means greedy sampling. For greedy
rows, the tempered distribution has temperature 1. The truncated distribution of a greedy row puts
all mass on the token with the largest logit. If several tokens have the largest logit, the token
with the lowest id gets all mass.

Each row has its own settings, which are passed as arrays (`RowSettings`). The static argument
`Features` determines the operations of a compiled program, so a setting that no row uses costs
nothing. The result of a row does not depend on the settings of other rows. The features can change
a result only through the rounding of sums. If some rows have a top_k and others have none, both
kinds of draw run for all rows. Each row then takes the result of its own kind of draw.

The vocabulary is never sorted. Random numbers are drawn for blocks and candidates, not for every
token of the vocabulary. The vocabulary is divided into blocks of 128 tokens. The k best tokens are
in the k blocks with the highest maxima. A token is drawn in two stages with the Gumbel argmax:
first a block by its mass, then a token of that block. The probability of the block, times the
probability of the token within the block, is the probability of the token.

Shapes: J rows, V vocabulary, K candidates, N blocks, X any set of candidates.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Number of tokens per block. 128 is the number of lanes of a TPU, and about the square root of a
# vocabulary size.
BLOCK = 128
FINE = 8  # tokens per finer block; the best blocks are divided into finer blocks
LEAST_CAP = 16  # minimum of `cap`; a smaller top_k costs the same and uses the same program
_TINY = 0x00800000  # bits of the smallest normal float32
_ONE = 0x3F800000  # bits of 1.0


class RowSettings(NamedTuple):
    """Settings of each row of logits; at temperature 0, the other settings have no effect."""

    temperature_J: jax.Array  # float32; 0 means greedy sampling
    top_k_J: jax.Array  # int32; 0 turns top-k off
    top_p_J: jax.Array  # float32; 1 turns top-p off
    min_p_J: jax.Array  # float32; 0 turns min-p off


ROW_DTYPES = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)  # of RowSettings


@dataclasses.dataclass(frozen=True)
class Features:
    """The operations that a compiled program contains; see `find_features`.

    The fields after `noise` concern only rows with a temperature above 0.
    """

    greedy: bool  # whether some row may have temperature 0
    noise: bool  # whether some row may have a temperature above 0
    tempered: bool  # whether some row may have a temperature other than 1
    cap: int  # a power of two, at least as large as every top_k; 0 if no row has a top_k
    full: bool  # whether some row may have top_k 0
    top_p: bool  # whether some row may have top_p below 1
    min_p: bool  # whether some row may have min_p above 0


def find_features(settings: Sequence[tuple[float, int, float, float]]) -> Features:
    """Returns the smallest set of features that serves all rows.

    Args:
      settings: (temperature, top_k, top_p, min_p) of each row.

    Raises:
      ValueError: the settings are empty.
    """
    if not settings:
        raise ValueError("settings are empty: give the settings of at least one row")
    noisy = [s for s in settings if s[0] > 0]
    largest = max((s[1] for s in noisy), default=0)
    return Features(
        greedy=len(noisy) < len(settings),
        noise=bool(noisy),
        tempered=any(s[0] != 1 for s in noisy),
        cap=max(LEAST_CAP, 1 << (largest - 1).bit_length()) if largest else 0,
        full=any(s[1] == 0 for s in noisy),
        top_p=any(s[2] < 1 for s in noisy),
        min_p=any(s[3] > 0 for s in noisy),
    )


def check_settings(
    temperature: float, top_k: int, top_p: float, min_p: float, vocab_size: int
) -> None:
    """Checks that the settings of one row are in range.

    Raises:
      ValueError: a setting is out of range; the message states the range.
    """
    rules: Sequence[tuple[str, float, bool, str]] = (
        ("temperature", temperature, 0 <= temperature < float("inf"), "at least 0 (0 is greedy)"),
        ("top_k", top_k, 0 <= top_k <= vocab_size, f"0 (off) to {vocab_size}, the vocabulary"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (1 is off)"),
        ("min_p", min_p, 0 <= min_p < 1, "at least 0 (off) and below 1"),
    )
    for name, value, holds, rule in rules:
        if not holds:
            raise ValueError(f"{name} is {value!r}: it must be {rule}")


class _Drawn(NamedTuple):
    token_J: jax.Array  # int32
    value_J: jax.Array  # tempered logit of the drawn token
    mass_J: jax.Array  # sum of exp(logit - highest logit of the row) over all tokens that are kept


def sample(
    logits_JV: jax.Array, key_J2: jax.Array, rows: RowSettings, features: Features,
    valid_V: jax.Array | None, *, shards: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Draws one token per row from the row's truncated distribution.

    Args:
      logits_JV: logits of any floating dtype.
      key_J2: uint32, the data of one threefry key per row. The token of a row depends only on the
        key, the logits and the settings of the row. At temperature 0, the key has no effect.
      rows: settings of the J rows.
      features: static; the result of `find_features` for all rows.
      valid_V: bool, the ids that may be drawn; None allows all ids.
      shards: static; the number of devices over which V is split. `shards` does not change the
        result. The number of blocks is padded to a multiple of `shards`, because otherwise the
        compiler would gather all logits on each device.

    Returns:
      Three arrays [J]: the drawn token (int32), its log-probability under the tempered distribution
      (float32), and its log-probability under the truncated distribution (float32).
    """
    whole_JV = _tempered(logits_JV, rows, features)
    x_JNb = _cut_into_draw_blocks(_masked(whole_JV, valid_V), shards)
    high_JN = jnp.max(x_JNb, axis=-1)
    peak_J1 = jnp.max(high_JN, axis=-1, keepdims=True)
    mass_JN = jnp.sum(jnp.exp(x_JNb - peak_J1[:, :, None]), axis=-1)
    # Logarithm of the sum of exp(logit - peak) over all ids. `peak` is the largest logit among the
    # ids that may be drawn.
    if valid_V is None:
        log_total_J = jnp.log(jnp.sum(mass_JN, axis=-1))
    else:
        log_total_J = jax.nn.logsumexp(whole_JV, axis=-1) - peak_J1[:, 0]
    drawn = _draw(x_JNb, high_JN, mass_JN, key_J2, rows, features)
    value_J = drawn.value_J - peak_J1[:, 0]
    return drawn.token_J, value_J - log_total_J, value_J - jnp.log(drawn.mass_J)


def _draw(x_JNb, high_JN, mass_JN, key_J2, rows: RowSettings, features: Features) -> _Drawn:
    """Runs every kind of draw that at least one row needs, and selects each row's result."""
    blocks = high_JN.shape[1]
    ways: list[tuple[jax.Array, _Drawn]] = []
    if features.noise:
        # Each row uses the result of only one kind of draw, so all kinds can share the noise.
        width = max(blocks + BLOCK if features.full else 0, _candidates(blocks, features))
        noise_JX = _gumbel(key_J2, width)
        if features.full:
            drawn = _draw_from_vocabulary(x_JNb, high_JN, mass_JN, noise_JX, rows, features)
            ways.append((rows.top_k_J == 0, drawn))
        if features.cap:
            ways.append(
                (rows.top_k_J > 0, _draw_from_top_k(x_JNb, high_JN, noise_JX, rows, features))
            )
    if features.greedy:
        ways.append((rows.temperature_J == 0, _greedy(x_JNb, high_JN)))
    drawn = ways[0][1]
    for mine_J, other in ways[1:]:
        drawn = jax.tree.map(functools.partial(jnp.where, mine_J), other, drawn)
    return drawn


def _greedy(x_JNb, high_JN) -> _Drawn:
    block_J = jnp.argmax(high_JN, axis=-1)
    inner_J = jnp.argmax(_block(x_JNb, block_J), axis=-1)
    value_J = jnp.max(high_JN, axis=-1)
    return _Drawn(_token(block_J, inner_J), value_J, jnp.ones_like(value_J))


def _draw_from_top_k(x_JNb, high_JN, noise_JX, rows: RowSettings, features: Features) -> _Drawn:
    """Draws a token from each row's top k."""
    best = _find_draw_candidates(x_JNb, high_JN, rows, features)
    noise_JK = noise_JX[:, : best.value_JK.shape[1]]
    noisy_JK = jnp.where(best.kept_JK, best.value_JK, -jnp.inf) + noise_JK
    choice_J1 = jnp.argmax(noisy_JK, axis=-1, keepdims=True)
    return _Drawn(
        jnp.take_along_axis(best.id_JK, choice_J1, axis=1)[:, 0],
        jnp.take_along_axis(best.value_JK, choice_J1, axis=1)[:, 0],
        jnp.sum(jnp.where(best.kept_JK, best.weight_JK, 0.0), axis=-1),
    )


def _draw_from_vocabulary(
    x_JNb, high_JN, mass_JN, noise_JX, rows: RowSettings, features: Features
) -> _Drawn:
    """Draws from the whole vocabulary: first a block, then a token of the block."""
    blocks = high_JN.shape[1]
    peak_J1 = jnp.max(high_JN, axis=-1, keepdims=True)
    floor_J1 = None
    if features.top_p or features.min_p:
        weight_JNb = jnp.exp(x_JNb - peak_J1[:, :, None])
        weight_JV = weight_JNb.reshape(weight_JNb.shape[0], -1)
        floor_J1 = _find_truncation_floor(weight_JV, _without_top_k(rows, features), features)
        kept_JNb = weight_JNb >= floor_J1[:, :, None]
        mass_JN = jnp.sum(jnp.where(kept_JNb, weight_JNb, 0.0), axis=-1)
    noisy_JN = jnp.log(mass_JN) + noise_JX[:, BLOCK : BLOCK + blocks]
    block_J = jnp.argmax(noisy_JN, axis=-1)
    value_Jb = _block(x_JNb, block_J)
    if floor_J1 is None:
        noisy_Jb = value_Jb + noise_JX[:, :BLOCK]
    else:
        # The weights are computed a second time here, so rounding may lower a weight below the
        # threshold. The chosen block contains a kept token, so the block's best token is kept.
        edge_Jb = value_Jb == jnp.max(value_Jb, axis=-1, keepdims=True)
        kept_Jb = (jnp.exp(value_Jb - peak_J1) >= floor_J1) | edge_Jb
        noisy_Jb = jnp.where(kept_Jb, value_Jb, -jnp.inf) + noise_JX[:, :BLOCK]
    inner_J = jnp.argmax(noisy_Jb, axis=-1)
    value_J = jnp.take_along_axis(value_Jb, inner_J[:, None], axis=1)[:, 0]
    return _Drawn(_token(block_J, inner_J), value_J, jnp.sum(mass_JN, axis=-1))


def _tempered(logits_JV: jax.Array, rows: RowSettings, features: Features) -> jax.Array:
    """Returns the logits divided by the temperature, in float32; greedy rows are not divided."""
    x_JV = logits_JV.astype(jnp.float32)
    if not features.tempered:
        return x_JV
    return x_JV / jnp.where(rows.temperature_J == 0, 1.0, rows.temperature_J)[:, None]


def _masked(x_JV: jax.Array, valid_V: jax.Array | None) -> jax.Array:
    """Sets to -inf the logits of all ids that may not be drawn."""
    return x_JV if valid_V is None else jnp.where(valid_V[None, :], x_JV, -jnp.inf)


def _cut_into_draw_blocks(x_JV: jax.Array, shards: int = 1) -> jax.Array:
    """Returns the logits in blocks [J, N, 128], padded with -inf; N is a multiple of `shards`."""
    rows, size = x_JV.shape
    x_JV = jnp.pad(x_JV, ((0, 0), (0, -size % (BLOCK * shards))), constant_values=-jnp.inf)
    return x_JV.reshape(rows, -1, BLOCK)


def _block(x_JNb: jax.Array, block_J: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_JNb, block_J[:, None, None], axis=1)[:, 0]


def _token(block_J: jax.Array, inner_J: jax.Array) -> jax.Array:
    return (block_J * BLOCK + inner_J).astype(jnp.int32)


class _Best(NamedTuple):
    """Candidates of each row, best first."""

    value_JK: jax.Array  # tempered logits
    id_JK: jax.Array  # int32 token ids
    weight_JK: jax.Array  # exp(logit - best logit); 0 beyond the row's top_k
    kept_JK: jax.Array  # bool: whether all truncations keep the token; False in rows without top_k


def _find_draw_candidates(x_JNb, high_JN, rows: RowSettings, features: Features) -> _Best:
    value_JK, id_JK = _find_drawable_top_k(x_JNb, high_JN, _candidates(high_JN.shape[1], features))
    within_JK = jnp.arange(value_JK.shape[1])[None, :] < rows.top_k_J[:, None]
    weight_JK = jnp.where(within_JK, jnp.exp(value_JK - value_JK[:, :1]), 0.0)
    kept_JK = within_JK
    if features.top_p:
        kept_JK &= weight_JK >= _crossing(weight_JK, rows.top_p_J[:, None])
    if features.min_p:
        kept_JK &= weight_JK >= rows.min_p_J[:, None]
    return _Best(value_JK, id_JK, weight_JK, kept_JK)


def _candidates(blocks: int, features: Features) -> int:
    """Returns K, the number of candidates: the smaller of `cap` and the padded vocabulary size."""
    return min(features.cap, blocks * BLOCK)


def _find_drawable_top_k(
    x_JNb: jax.Array, high_JN: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """Returns each row's k largest values [J, k] in descending order, and their ids [J, k].

    Among equal values, lower ids come first. The k blocks with the highest maxima contain the k
    largest values, because no value in another block exceeds any of the k maxima. The chosen blocks
    are kept in ascending order, so equal values stay in the order of their ids. Then the chosen
    blocks are divided into finer blocks, and the search is repeated on the finer blocks.
    """
    rows, blocks, width = x_JNb.shape
    block_JK = None
    if k < blocks:
        block_JK = jnp.sort(_top_k(high_JN, k)[1], axis=-1)
        x_JNb = jnp.take_along_axis(x_JNb, block_JK[:, :, None], axis=1)
    if width > FINE:
        fine_JNb = x_JNb.reshape(rows, -1, FINE)
        value_JK, at_JK = _find_drawable_top_k(fine_JNb, jnp.max(fine_JNb, axis=-1), k)
    else:
        value_JK, at_JK = _top_k(x_JNb.reshape(rows, -1), k)
    if block_JK is None:
        return value_JK, at_JK
    first_JK = jnp.take_along_axis(block_JK, at_JK // width, axis=1) * width
    return value_JK, first_JK + at_JK % width


def _top_k(value_JX: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest values and their indices; 0 and -0 are equal, unlike in lax.top_k."""
    value_JK, at_JK = jax.lax.top_k(jnp.where(value_JX == 0, 0.0, value_JX), k)
    return value_JK, at_JK


def _crossing(weight_JK: jax.Array, top_p_J1: jax.Array) -> jax.Array:
    """Returns the weight [J, 1] of the token that crosses top_p; weights must be descending."""
    mass_JK = jnp.cumsum(weight_JK, axis=-1)
    before_JK = jnp.pad(mass_JK[:, :-1], ((0, 0), (1, 0)))
    needed_JK = before_JK < top_p_J1 * mass_JK[:, -1:]
    edge_J1 = jnp.min(jnp.where(needed_JK, weight_JK, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(top_p_J1 < 1, edge_J1, 0.0)


def _without_top_k(rows: RowSettings, features: Features) -> RowSettings:
    """Turns top_p off in greedy rows and in rows with a top_k, to shorten the threshold search."""
    if not (features.cap or features.greedy):
        return rows
    elsewhere_J = (rows.top_k_J > 0) | (rows.temperature_J == 0)
    return rows._replace(top_p_J=jnp.where(elsewhere_J, 1.0, rows.top_p_J))


def _find_truncation_floor(
    weight_JX: jax.Array, rows: RowSettings, features: Features
) -> jax.Array:
    """Returns the least weight [J, 1] that top-p and min-p keep; the largest weight must be 1."""
    floor_J1 = jnp.zeros((weight_JX.shape[0], 1), jnp.float32)
    if features.min_p:
        floor_J1 = rows.min_p_J[:, None]
    if features.top_p:
        floor_J1 = jnp.maximum(floor_J1, _nucleus(weight_JX, rows.top_p_J[:, None]))
    return floor_J1


def _nucleus(weight_JX: jax.Array, top_p_J1: jax.Array) -> jax.Array:
    """Returns a threshold [J, 1]: top-p keeps tokens of at least this weight; 0 if top_p is off.

    The threshold is found by bisection over bit patterns: the bits of positive float32 numbers have
    the same order as the numbers. The tokens with weights of at least `low` always have enough mass
    for top-p. The tokens with weights of at least `high` never have enough mass. A row is settled
    if at most one token's weight lies between `low` and `high`. A row is also settled if no float32
    number lies between `low` and `high`. Further steps for other rows do not change which tokens a
    settled row keeps.
    """
    need_J1 = top_p_J1 * jnp.sum(weight_JX, axis=-1, keepdims=True)

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
        low, high = jnp.where(enough, middle, low), jnp.where(enough, high, middle)
        return low, high, jnp.where(enough, count, at_low), jnp.where(enough, at_high, count)

    on_J1 = top_p_J1 < 1
    low = jnp.full_like(need_J1, _TINY, jnp.int32)
    high = jnp.where(on_J1, _ONE + 1, _TINY + 1)  # a row without top_p is settled from the start
    start = low, high, measure(low)[1], jnp.zeros_like(low)
    low = jax.lax.while_loop(unsettled, halve, start)[0]
    return jnp.where(on_J1, jax.lax.bitcast_convert_type(low, jnp.float32), 0.0)


def _gumbel(key_J2: jax.Array, size: int) -> jax.Array:
    """Returns standard Gumbel noise, float32 [J, size]; row j depends only on key j.

    The noise at index i of a row does not depend on `size`, because JAX's default (partitionable)
    threefry computes the noise only from the key and the index.
    """
    keys_J = jax.random.wrap_key_data(key_J2, impl="threefry2x32")
    return jax.vmap(lambda key: jax.random.gumbel(key, (size,), jnp.float32))(keys_J)
