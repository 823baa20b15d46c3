"""Prefill, insert, decode: pure functions on one pytree, for J slots that live and die apart.

A slot holds one text. Its entries in the cache, with a shared prefix of P tokens, a prompt of 3
tokens and two tokens drawn so far (a, b; b not yet through the model):

    token       [prefix 0 … P-1]   p0   p1   p2   a    b
    position     0 … P-1           P    P+1  P+2  P+3  P+4
    cache index  (not in it)       0    1    2    3    4      <- `index`: where b will be written

`prefill` runs prompts packed one behind the other in a row (segments keep them apart), so no
product is spent on padding between them. `insert` copies one prompt's entries into a slot, and may
do so for several slots, so that the samples of a prompt share its prefill. `decode` draws up to
`steps` tokens for every live slot on the device. The first token of a slot comes from the hidden
state of the prompt's last token, all others from the step that runs the token before.

What a slot's cache holds at or behind `index` is left from prompts packed behind its own, or from
the slot's former text: never seen, since a token attends to the entries up to its own.

Shapes: J slots, A cache length, T packed tokens, P prefix length, E = steps + 1 columns of a chunk.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from copsd_jax import model
from copsd_jax.sampler import truncate


@dataclasses.dataclass(frozen=True)
class Settings:
    """Static part of a decode program; see `truncate` for the meaning of the last four."""

    steps: int  # tokens per slot and call, besides the first
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "adapter", "prefix", "valid_V", "stop_V"),
    meta_fields=("adapter_scale",),
)
@dataclasses.dataclass(frozen=True)
class Weights:
    """What a program reads and never changes."""

    params: Any
    adapter: Any
    prefix: model.KV | None
    valid_V: jax.Array | None  # bool: ids that may be drawn; None for all
    stop_V: jax.Array  # bool: ids that end a text
    adapter_scale: float = 1.0  # static


class Slots(NamedTuple):
    """What there is of each slot besides its cache."""

    hidden_JD: jax.Array  # of the prompt's last token, read while `fresh`
    fresh_J: jax.Array  # bool: the first token is still to be drawn
    live_J: jax.Array  # bool
    token_J: jax.Array  # int32: the token drawn last, not yet in the cache
    index_J: jax.Array  # int32: its index in the cache
    drawn_J: jax.Array  # int32: tokens drawn so far
    limit_J: jax.Array  # int32: tokens to draw at most
    key_J2: jax.Array  # uint32: threefry key data; token t is drawn with fold_in(key, t)


class State(NamedTuple):
    cache: model.KV  # [layers, J, A, K, H]
    slots: Slots


class Chunk(NamedTuple):
    """What one `decode` drew. A fresh slot begins in column 0, the others in column 1."""

    token_JE: jax.Array  # int32, -1 where nothing was drawn
    logp_JE: jax.Array  # float32, of the tempered distribution
    logp_truncated_JE: jax.Array  # float32, of the one drawn from
    live_J: jax.Array  # bool, after the chunk


def empty(decoder: model.Decoder, slots: int, length: int) -> State:
    """A state without texts; `length` is A: the longest prompt and all it may draw."""
    c = decoder.config
    shape = (c.n_layers, slots, length, c.n_kv_heads, c.head_dim)

    def zeros(dtype, *width):  # a buffer each: what is donated must not be shared
        return jnp.zeros((slots, *width), dtype)

    return State(
        model.KV(jnp.zeros(shape, decoder.dtype), jnp.zeros(shape, decoder.dtype)),
        Slots(
            hidden_JD=zeros(decoder.dtype, c.d_model), fresh_J=zeros(bool), live_J=zeros(bool),
            token_J=zeros(jnp.int32), index_J=zeros(jnp.int32), drawn_J=zeros(jnp.int32),
            limit_J=zeros(jnp.int32), key_J2=zeros(jnp.uint32, 2),
        ),
    )  # fmt: skip


def encode(decoder: model.Decoder, params: Any, tokens_1P, adapter, adapter_scale: float):
    """Keys and values [layers, 1, P, K, H] of the tokens all prompts begin with; differentiable."""
    positions = jnp.arange(tokens_1P.shape[1], dtype=jnp.int32)[None]
    ones = jnp.ones_like(tokens_1P)
    stream = model.Stream(tokens_1P, positions, ones, adapter, adapter_scale)
    return decoder.apply({"params": params}, (stream,), return_kv=True)[0].kv


_encode = jax.jit(encode, static_argnames=("decoder", "adapter_scale"))


def encode_prefix(
    decoder: model.Decoder, params: Any, prefix_ids, adapter=None, adapter_scale: float = 1.0
) -> model.KV | None:
    """Keys and values [layers, 1, P, K, H] of the tokens all prompts begin with; None for none.

    They hold for one set of weights and one adapter only.
    """
    if len(prefix_ids) == 0:
        return None
    tokens_1P = jnp.asarray([list(prefix_ids)], jnp.int32)
    return _encode(decoder, params, tokens_1P, adapter, adapter_scale)


@functools.partial(jax.jit, static_argnames=("decoder",))
def prefill(
    decoder: model.Decoder,
    weights: Weights,
    tokens_1T: jax.Array,
    index_1T: jax.Array,
    segments_1T: jax.Array,
) -> model.Output:
    """Runs prompts packed in one row: hidden [1, T, D], keys and values [layers, 1, T, K, H].

    Args:
      tokens_1T: the prompts one behind the other; anything where there is none.
      index_1T: of each token in its own prompt, from 0.
      segments_1T: 1, 2, … per prompt, 0 where there is none.
    """
    shared = 0 if weights.prefix is None else weights.prefix.k.shape[2]
    stream = model.Stream(
        tokens_1T, index_1T + shared, segments_1T, weights.adapter, weights.adapter_scale,
        prefix=weights.prefix,
    )  # fmt: skip
    return decoder.apply({"params": weights.params}, (stream,), return_kv=True)[0]


class Entry(NamedTuple):
    """Texts to put into slots, arrays of some fixed length I; the first `count` are meant."""

    slot_I: jax.Array  # int32: where to
    start_I: jax.Array  # int32: where the prompt begins in the packed row
    length_I: jax.Array  # int32: its tokens
    limit_I: jax.Array  # int32: tokens to draw at most
    key_I2: jax.Array  # uint32


@functools.partial(jax.jit, static_argnames=("window",), donate_argnames=("state",))
def insert(
    state: State, output: model.Output, entry: Entry, count: jax.Array, *, window: int
) -> State:
    """Puts prefilled prompts into slots; several entries may share a prompt.

    Args:
      output: of `prefill`.
      window: number of cache entries copied, at least the longest prompt's.
    """
    kv = output.kv
    assert kv is not None  # prefill asks for it

    def one(i, state: State) -> State:
        slot, start, length = entry.slot_I[i], entry.start_I[i], entry.length_I[i]
        # Clipped at the row's end: what lies behind the prompt does not matter.
        rows_W = jnp.minimum(start + jnp.arange(window), output.hidden_BLD.shape[1] - 1)

        def copy(cache, packed):
            piece = packed[:, :, rows_W].astype(cache.dtype)
            return jax.lax.dynamic_update_slice(cache, piece, (0, slot, 0, 0, 0))

        old = state.slots
        slots = Slots(
            hidden_JD=old.hidden_JD.at[slot].set(output.hidden_BLD[0, start + length - 1]),
            fresh_J=old.fresh_J.at[slot].set(True),
            live_J=old.live_J.at[slot].set(True),
            token_J=old.token_J,
            index_J=old.index_J.at[slot].set(length - 1),
            drawn_J=old.drawn_J.at[slot].set(0),
            limit_J=old.limit_J.at[slot].set(entry.limit_I[i]),
            key_J2=old.key_J2.at[slot].set(entry.key_I2[i]),
        )
        cache = model.KV(copy(state.cache.k, kv.k), copy(state.cache.v, kv.v))
        return State(cache, slots)

    return jax.lax.fori_loop(0, count, one, state)


@functools.partial(jax.jit, static_argnames=("decoder", "settings"), donate_argnames=("state",))
def decode(
    decoder: model.Decoder,
    settings: Settings,
    weights: Weights,
    state: State,
    cancel_J: jax.Array,
    enough: jax.Array,
) -> tuple[State, Chunk]:
    """Draws the first token of fresh slots, then up to `steps` tokens for all live ones.

    Args:
      cancel_J: bool; slots to end before anything is drawn.
      enough: int32; the loop ends early when fewer slots than this live (at least 1).
    """
    cache, slots = state
    slots = slots._replace(live_J=slots.live_J & ~cancel_J)
    columns = settings.steps + 1
    shape = (slots.live_J.shape[0], columns)
    chunk = Chunk(
        jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape, jnp.float32), slots.live_J,
    )  # fmt: skip
    slots, chunk = jax.lax.cond(
        jnp.any(slots.fresh_J & slots.live_J),
        lambda: _draw(settings, weights, slots, chunk, slots.hidden_JD, slots.fresh_J, 0),
        lambda: (slots, chunk),
    )
    slots = slots._replace(fresh_J=jnp.zeros_like(slots.fresh_J))

    def going(carry):
        step, _, slots, _ = carry
        return (step < columns) & (jnp.sum(slots.live_J) >= jnp.maximum(enough, 1))

    def advance(carry):
        step, cache, slots, chunk = carry
        cache, hidden_JD = _forward(decoder, weights, cache, slots)
        slots, chunk = _draw(settings, weights, slots, chunk, hidden_JD, slots.live_J, step)
        return step + 1, cache, slots, chunk

    _, cache, slots, chunk = jax.lax.while_loop(going, advance, (jnp.int32(1), cache, slots, chunk))
    return State(cache, slots), chunk._replace(live_J=slots.live_J)


def _forward(decoder, weights: Weights, cache: model.KV, slots: Slots):
    """Runs each slot's last token; dead slots run along and write nothing."""
    shared = 0 if weights.prefix is None else weights.prefix.k.shape[2]
    stream = model.Stream(
        slots.token_J[:, None], (slots.index_J + shared)[:, None],
        slots.live_J[:, None].astype(jnp.int32), weights.adapter, weights.adapter_scale,
        prefix=weights.prefix, cache=cache,
    )  # fmt: skip
    output = decoder.apply({"params": weights.params}, (stream,))[0]
    return output.kv, output.hidden_BLD[:, 0]


def _draw(settings: Settings, weights: Weights, slots: Slots, chunk: Chunk, hidden_JD, which_J, at):
    """One token for the slots of `which` that live, noted in column `at`."""
    which_J = which_J & slots.live_J
    logits_JV = model.logits(hidden_JD, model.head(weights.params))
    token_J, logp_J, logp_truncated_J = truncate.sample(
        logits_JV, _token_keys(settings, slots), settings.temperature, settings.top_k,
        settings.top_p, settings.min_p, weights.valid_V,
    )  # fmt: skip
    one_J = which_J.astype(jnp.int32)
    drawn_J = slots.drawn_J + one_J
    ended_J = weights.stop_V[token_J] | (drawn_J >= slots.limit_J)

    def note(into_JE, value_J):
        return into_JE.at[:, at].set(jnp.where(which_J, value_J, into_JE[:, at]))

    chunk = chunk._replace(
        token_JE=note(chunk.token_JE, token_J),
        logp_JE=note(chunk.logp_JE, logp_J),
        logp_truncated_JE=note(chunk.logp_truncated_JE, logp_truncated_J),
    )
    slots = slots._replace(
        live_J=slots.live_J & ~(which_J & ended_J),
        token_J=jnp.where(which_J, token_J, slots.token_J),
        index_J=slots.index_J + one_J,
        drawn_J=drawn_J,
    )
    return slots, chunk


def _token_keys(settings: Settings, slots: Slots) -> jax.Array:
    """[J, 2] uint32: each slot's key with the index of the token to draw folded in."""
    if settings.temperature == 0:
        return slots.key_J2
    keys_J = jax.random.wrap_key_data(slots.key_J2, impl="threefry2x32")
    return jax.random.key_data(jax.vmap(jax.random.fold_in)(keys_J, slots.drawn_J))
