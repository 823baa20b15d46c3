"""Prefill, insert, decode: pure functions on one pytree, for J slots that live and die apart.

A slot holds one text. Its entries in the cache, with a shared prefix of P tokens, a prompt of 3
tokens and two tokens drawn so far (a, b; b not yet through the model):

    token       [prefix 0 … P-1]   p0   p1   p2   a    b
    position     0 … P-1           P    P+1  P+2  P+3  P+4
    cache index  (not in it)       0    1    2    3    4      <- `index`: where b will be written

`prefill` runs prompts packed one behind the other in a row (segments keep them apart), so no
product is spent on padding between them; what several prompts begin with stands there once.
`insert` copies a prompt's entries into a slot, and may do so for several slots, so that the samples
of a prompt share its prefill. `decode` draws up to `steps` tokens for every live slot on the
device. The first token of a slot comes from the hidden state of the prompt's last token, all others
from the step that runs the token before; both are drawn together, so that the head is read once a
step whatever slots are new.

What a slot's cache holds at or behind `index` is left from prompts packed behind its own, or from
the slot's former text: never seen, since a token attends to the entries up to its own.

On a mesh each of the R parts of its batch axes has J / R slots, and a row of packed prompts of its
own: no entry of a cache ever travels.

Shapes: J slots, A cache length, R batch shards, T packed tokens, P prefix length, I texts that are
inserted into a shard's slots, E steps of a chunk.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from copsd_jax.attention import decode_attention
from copsd_jax.losses import token_blocks
from copsd_jax.model import policy as policy_lib
from copsd_jax.model import transformer
from copsd_jax.runtime import sharding
from copsd_jax.sampler import truncation

UNSTACK_FROM = 2**20  # bytes of a layer from which `unstack_layers` pays
INSERT_BLOCK = 64  # entries that are copied at a time; a cache has room for as many behind a prompt


class LayerWeights(NamedTuple):
    """What a decode step reads of one layer."""

    params: Any
    adapter: Any  # or None
    prefix: transformer.KV | None  # [1, P, K, H]


class Constants(NamedTuple):
    """What a program reads and never changes."""

    policy: policy_lib.Policy
    prefix: transformer.KV | None
    valid_V: jax.Array | None  # bool: ids that may be drawn; None for all
    stop_XV: jax.Array  # bool: sets of ids that end a text
    layers: tuple[LayerWeights, ...] | None = None  # of `unstack_layers`, for decoding


def unstack_layers(
    policy: policy_lib.Policy, prefix: transformer.KV | None, devices: Mesh
) -> tuple[LayerWeights, ...] | None:
    """Returns the stacked arrays as one `LayerWeights` each, in the same memory.

    Returns None where it does not pay.

    A decode step on a CPU is bound by reading the weights once, and XLA copies each slice of a
    stack first. Without that, and with the head as left factor, a step of 8 slots takes about 0.7
    of the time, and its program of 30 layers some 10 s more to compile. It is None elsewhere, on
    several devices, where layers are small, and for int8 kernels, which XLA would convert for all
    layers ahead of the loop over tokens.
    """
    stacks = (policy.params["layers"], policy.adapter, prefix)
    leaves = jax.tree.leaves(stacks)
    if devices.size > 1 or not all(isinstance(x, jax.Array) for x in leaves):
        return None
    if any(x.dtype == jnp.int8 for x in leaves):
        return None
    count = len(leaves[0])
    if sharding.platform(devices) != "cpu" or sum(x.nbytes for x in leaves) < UNSTACK_FROM * count:
        return None
    # NumPy's views of JAX's arrays, and JAX's of those, share memory on a CPU.
    place = NamedSharding(devices, PartitionSpec())
    whole = jax.tree.map(np.asarray, stacks)
    return tuple(
        LayerWeights(*jax.tree.map(lambda x: jax.device_put(x[i], place), whole))  # noqa: B023
        for i in range(count)
    )


class Request(NamedTuple):
    """What is asked of a text: arrays with one entry per slot, or per text to insert."""

    limit: jax.Array  # int32: tokens to draw at most
    key: jax.Array  # uint32 [..., 2]: threefry key data; token t is drawn with fold_in(key, t)
    stop: jax.Array  # int32: which of the sets of stop ids
    rows: truncation.RowSettings


class Slots(NamedTuple):
    """What there is of each slot besides its cache."""

    hidden_JD: jax.Array  # of the prompt's last token, read while `fresh`
    fresh_J: jax.Array  # bool: the first token is still to be drawn
    live_J: jax.Array  # bool
    token_J: jax.Array  # int32: the token drawn last, not yet in the cache
    index_J: jax.Array  # int32: its index in the cache
    drawn_J: jax.Array  # int32: tokens drawn so far
    request: Request


class DecodeState(NamedTuple):
    cache: decode_attention.Cache  # [layers, J, K, A, H]
    slots: Slots


class DrawnTokens(NamedTuple):
    """What one `decode` drew: a column for each step."""

    token_JE: jax.Array  # int32, -1 where nothing was drawn
    logp_JE: jax.Array  # float32, of the tempered distribution
    logp_truncated_JE: jax.Array  # float32, of the one drawn from
    live_J: jax.Array  # bool, after the chunk


class DecodeResult(NamedTuple):
    """What the host looks at after a chunk."""

    bits_JX: (
        jax.Array
    )  # int32: the chunk's arrays side by side, in one transfer; see `unpack_tokens`
    steps: jax.Array  # int32: tokens that a slot which lived on has drawn


def unpack_tokens(bits_JX: np.ndarray) -> DrawnTokens:
    """The NumPy arrays of a chunk: columns of tokens, both log-probabilities (as bits), live."""
    columns = (bits_JX.shape[1] - 1) // 3
    token, logp, truncated = (bits_JX[:, i * columns : (i + 1) * columns] for i in range(3))
    whole: Any = (token, logp.view(np.float32), truncated.view(np.float32), bits_JX[:, -1] > 0)
    return DrawnTokens(*whole)


def _pack_tokens(chunk: DrawnTokens) -> jax.Array:
    """One array, which on a mesh is one collective: several at once may wait for one another."""
    bits = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in chunk[1:3]]
    live_J1 = chunk.live_J[:, None].astype(jnp.int32)
    return jnp.concatenate([chunk.token_JE, *bits, live_J1], axis=1)


def init_state(decoder: transformer.Decoder, slots: int, length: int, dtype: Any) -> DecodeState:
    """A state without texts; `length` is A: the longest prompt and all it may draw."""
    c = decoder.config

    def zeros(dtype, *width):  # a buffer each: what is donated must not be shared
        return jnp.zeros((slots, *width), dtype)

    request = Request(
        zeros(jnp.int32), zeros(jnp.uint32, 2), zeros(jnp.int32),
        truncation.RowSettings(
            zeros(jnp.float32), zeros(jnp.int32), zeros(jnp.float32), zeros(jnp.float32)
        ),
    )  # fmt: skip
    return DecodeState(
        decode_attention.create_cache(
            c.n_layers, slots, decoder.key_heads, length, c.head_dim, dtype
        ),
        Slots(
            hidden_JD=zeros(decoder.dtype, c.d_model), fresh_J=zeros(bool), live_J=zeros(bool),
            token_J=zeros(jnp.int32), index_J=zeros(jnp.int32), drawn_J=zeros(jnp.int32),
            request=request,
        ),
    )  # fmt: skip


def partition_state(state: DecodeState, shape: Any) -> DecodeState:
    """The PartitionSpec of each array of a state on a mesh."""
    slot, head = decode_attention.find_mesh_axes(shape, *state.cache.k.shape[1:3])
    return DecodeState(
        jax.tree.map(lambda _: PartitionSpec(None, slot, head), state.cache),
        jax.tree.map(lambda _: PartitionSpec(slot), state.slots),
    )


class PackedPrompts(NamedTuple):
    """Prompts one behind the other in rows, int32 [R, T]."""

    tokens_RT: jax.Array  # anything where there is none
    index_RT: jax.Array  # of each token in its own prompt, from 0
    segments_RT: jax.Array  # 1, 2, …; 0 where there is no token
    parents_RT: jax.Array  # the segment that holds a prompt's beginning, -1 for none


def prefill(
    decoder: transformer.Decoder, weights: Constants, packed: PackedPrompts
) -> transformer.Output:
    """Runs packed prompts: hidden [R, T, D], keys and values [layers, R, K, T + 64, H].

    With the 64 entries more, every block that begins in the row ends in it.

    A prompt whose first 4 tokens stand in another's place, and one of its own:
      segments 1 1 1 1 2 2 3 3 3 0     parents -1 -1 -1 -1 1 1 -1 -1 -1 -1
      index    0 1 2 3 4 5 0 1 2 0
    """
    shared = 0 if weights.prefix is None else weights.prefix.k.shape[2]
    stream = transformer.Stream(
        packed.tokens_RT, packed.index_RT + shared, packed.segments_RT,
        weights.policy.adapter, weights.policy.scale,
        prefix=weights.prefix, parents_BL=packed.parents_RT,
    )  # fmt: skip
    output = decoder.apply({"params": weights.policy.params}, (stream,), return_kv=True)[0]
    room = ((0, 0), (0, 0), (0, 0), (0, INSERT_BLOCK), (0, 0))
    kv = transformer.KV(*(jnp.pad(x.swapaxes(2, 3), room) for x in output.kv))
    return transformer.Output(output.hidden_BLD, kv)


class Insertion(NamedTuple):
    """Texts to put into slots, arrays [R, I]; of each shard the first `count` are meant.

    A prompt is the `split` tokens from `start` of its shard's row, then those from `own`.
    """

    slot_RI: jax.Array  # int32: where to, among the shard's slots
    start_RI: jax.Array  # int32
    split_RI: jax.Array  # int32
    own_RI: jax.Array  # int32
    length_RI: jax.Array  # int32: tokens of the prompt
    request_RI: Request
    count_R: jax.Array  # int32


def insert(state: DecodeState, output: transformer.Output, entry: Insertion) -> DecodeState:
    """Puts prefilled prompts into slots; several entries may share a prompt.

    Args:
      output: of `prefill`.
    """
    kv = output.kv
    assert kv is not None  # prefill asks for it
    context = jax.sharding.get_abstract_mesh()
    if context.empty or context.size == 1:
        return _insert(state, output.hidden_BLD, kv, entry)
    where, split = partition_state(state, context), PartitionSpec(sharding.BATCH)
    head = where.cache.k[2]
    pair: Any = PartitionSpec(None, sharding.BATCH, head)
    return jax.shard_map(
        _insert,
        in_specs=(where, split, transformer.KV(pair, pair), jax.tree.map(lambda _: split, entry)),
        out_specs=where,
        check_vma=False,
    )(state, output.hidden_BLD, kv, entry)


def _insert(state: DecodeState, hidden_1TD, kv: transformer.KV, entry: Insertion) -> DecodeState:
    """`insert` of one shard: one row of prompts."""
    entry = jax.tree.map(lambda x: x[0], entry)
    layers, _, heads, _, size = kv.k.shape

    def one(i, state: DecodeState) -> DecodeState:
        slot, start, split, own, length, request, _ = jax.tree.map(
            lambda x: x[i] if x.ndim else x, tuple(entry)
        )

        def piece(cache: decode_attention.Cache, source, target, tokens) -> decode_attention.Cache:
            # In whole blocks: what they write beyond the piece is not live yet, or the next piece
            # writes it again. Slices, not a gather, for which XLA would lay the cache out anew; on
            # TPU it does so all the same for heads narrower than its lanes.
            def copy(b, cache: decode_attention.Cache) -> decode_attention.Cache:
                k, v = (
                    jax.lax.dynamic_slice(
                        x,
                        (0, 0, 0, source + b * INSERT_BLOCK, 0),
                        (layers, 1, heads, INSERT_BLOCK, size),
                    )
                    for x in kv
                )
                return jax.tree.map(
                    lambda whole, new: jax.lax.dynamic_update_slice(
                        whole, new,
                        (0, slot, 0, target + b * INSERT_BLOCK, *(0,) * (whole.ndim - 4)),
                    ),
                    cache, decode_attention.convert_entries(cache, k, v),
                )  # fmt: skip

            return jax.lax.fori_loop(0, -(-tokens // INSERT_BLOCK), copy, cache)

        cache = piece(state.cache, start, 0, split)
        cache = piece(cache, own, split, length - split)
        last = jnp.where(length > split, own + length - split, start + length) - 1
        old = state.slots
        slots = Slots(
            hidden_JD=old.hidden_JD.at[slot].set(hidden_1TD[0, last]),
            fresh_J=old.fresh_J.at[slot].set(True),
            live_J=old.live_J.at[slot].set(True),
            token_J=old.token_J,
            index_J=old.index_J.at[slot].set(length - 1),
            drawn_J=old.drawn_J.at[slot].set(0),
            request=jax.tree.map(lambda x, new: x.at[slot].set(new), old.request, request),
        )
        return DecodeState(cache, slots)

    return jax.lax.fori_loop(0, entry.count_R, one, state)


def decode(
    decoder: transformer.Decoder,
    form: truncation.Features,
    steps: int,
    weights: Constants,
    state: DecodeState,
    cancel_J: jax.Array,
    enough: jax.Array,
) -> tuple[DecodeState, DecodeResult]:
    """Draws up to `steps` tokens for all live slots.

    Args:
      form: of all requests in the slots.
      cancel_J: bool; slots to end before anything is drawn.
      enough: int32; the loop ends early when fewer slots than this live (at least 1).
    """
    cache, slots = state
    slots = slots._replace(live_J=slots.live_J & ~cancel_J)
    shape = (slots.live_J.shape[0], steps)
    chunk = DrawnTokens(
        jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape, jnp.float32), slots.live_J,
    )  # fmt: skip

    def going(carry):
        step, _, slots, _ = carry
        return (step < steps) & (jnp.sum(slots.live_J) >= jnp.maximum(enough, 1))

    head_VD = _head(weights)

    def advance(carry):
        step, cache, slots, chunk = carry
        cache, hidden_JD = _forward(decoder, weights, cache, slots)
        hidden_JD = jnp.where(slots.fresh_J[:, None], slots.hidden_JD, hidden_JD)
        logits_JV = _logits(hidden_JD, head_VD, head_first=weights.layers is not None)
        slots, chunk = _draw(form, weights, slots, chunk, logits_JV, step)
        return step + 1, cache, slots, chunk

    step, cache, slots, chunk = jax.lax.while_loop(
        going, advance, (jnp.int32(0), cache, slots, chunk)
    )
    bits_JX = _pack_tokens(chunk._replace(live_J=slots.live_J))
    return DecodeState(cache, slots), DecodeResult(bits_JX, step)


def _forward(decoder, weights: Constants, cache: decode_attention.Cache, slots: Slots):
    """Runs each slot's last token; dead and fresh slots run along, neither write nor attend."""
    shared = 0 if weights.prefix is None else weights.prefix.k.shape[2]
    runs_J = slots.live_J & ~slots.fresh_J
    params, adapter, prefix = weights.policy.params, weights.policy.adapter, weights.prefix
    if weights.layers is not None:
        decoder = decoder.clone(unstacked=True)
        own, adapters, prefixes = zip(*weights.layers, strict=True)
        adapter, prefix = adapter and adapters, prefix and prefixes
        params = {name: params[name] for name in params if name != "layers"}
        params |= {f"layer_{i}": one for i, one in enumerate(own)}
    stream = transformer.Stream(
        slots.token_J[:, None], (slots.index_J + shared)[:, None],
        runs_J[:, None].astype(jnp.int32), adapter, weights.policy.scale,
        prefix=prefix, cache=cache,
    )  # fmt: skip
    output = decoder.apply({"params": params}, (stream,))[0]
    return output.cache, output.hidden_BLD[:, 0]


def _logits(hidden_JD: jax.Array, head_VD: jax.Array, *, head_first: bool) -> jax.Array:
    """[J, V]; with the head as the left factor XLA on CPU reads it once, without packing it."""
    if not head_first:
        return transformer.compute_logits(hidden_JD, head_VD)
    head_VD = head_VD.astype(hidden_JD.dtype)
    return jnp.einsum("vd,jd->vj", head_VD, hidden_JD, preferred_element_type=jnp.float32).T


def _head(weights: Constants) -> jax.Array:
    """The head; a vocabulary that `tensor` does not divide is padded and split along it once a
    chunk, since a head that is split along the width would sum all logits over the devices in each
    step."""
    head_VD = transformer.get_head(weights.policy.params)
    context = jax.sharding.get_abstract_mesh()
    if context.empty or head_VD.shape[0] % context.shape["tensor"] == 0:
        return head_VD
    return token_blocks.gathered(head_VD, split_vocabulary=True)


def _draw(
    form: truncation.Features, weights: Constants, slots: Slots, chunk: DrawnTokens, logits_JV, step
):
    """One token for each live slot, noted in column `step`."""
    live_J, request = slots.live_J, slots.request
    context = jax.sharding.get_abstract_mesh()
    token_J, logp_J, logp_truncated_J = truncation.sample(
        logits_JV, _token_keys(form, slots), request.rows, form, weights.valid_V,
        shards=1 if context.empty else context.shape["tensor"],
    )  # fmt: skip
    one_J = live_J.astype(jnp.int32)
    drawn_J = slots.drawn_J + one_J
    ended_J = weights.stop_XV[request.stop, token_J] | (drawn_J >= request.limit)

    def note(into_JE, value_J):
        return into_JE.at[:, step].set(jnp.where(live_J, value_J, into_JE[:, step]))

    chunk = chunk._replace(
        token_JE=note(chunk.token_JE, token_J),
        logp_JE=note(chunk.logp_JE, logp_J),
        logp_truncated_JE=note(chunk.logp_truncated_JE, logp_truncated_J),
    )
    slots = slots._replace(
        fresh_J=jnp.zeros_like(slots.fresh_J),
        live_J=live_J & ~ended_J,
        token_J=jnp.where(live_J, token_J, slots.token_J),
        index_J=slots.index_J + one_J,
        drawn_J=drawn_J,
    )
    return slots, chunk


def _token_keys(form: truncation.Features, slots: Slots) -> jax.Array:
    """[J, 2] uint32: each slot's key with the index of the token to draw folded in."""
    if not form.noise:
        return slots.request.key
    keys_J = jax.random.wrap_key_data(slots.request.key, impl="threefry2x32")
    return jax.random.key_data(jax.vmap(jax.random.fold_in)(keys_J, slots.drawn_J))
