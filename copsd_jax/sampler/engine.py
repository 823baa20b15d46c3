"""Prefill, insert and decode: three pure functions over the state of J decode slots.

The division into these three functions follows JetStream. A slot holds one text. Slots are filled,
decoded and freed independently of one another:

    prompts --prefill--> keys and values of all prompts, packed in rows
                                      |
                                   insert   one prompt into each free slot
                                      v
    DecodeState   slot 0: text   slot 1: text   slot 2: free   ...
                     |  ^
                   decode   up to E tokens for every live slot, in a loop on the device
                     v
    DecodeResult  the tokens drawn; a slot is free again when its text has ended

`prefill` runs prompts that are packed end to end in a row, so that no compute is spent on padding
between them. Segment numbers keep the prompts apart. If several prompts begin with the same tokens,
the model runs the shared tokens only once.

`insert` copies the cache entries of a prompt into a slot. `insert` may copy one prompt into several
slots, so all samples of a prompt share one prefill.

`decode` draws tokens for all live slots. The first token of a slot is drawn from the hidden state
of the prompt's last token. Each later token is drawn in the step that runs the previous token
through the model. A step draws first tokens and later tokens together, so each step reads the
output head only once.

The picture shows the cache of one slot, with a shared prefix of P tokens and a prompt of 3 tokens.
Two tokens have been drawn so far, `a` and `b`. The model has not run `b` yet.

    token       [prefix 0 ... P-1]   p0   p1   p2   a    b
    position     0 ... P-1           P    P+1  P+2  P+3  P+4
    cache index  (not in the slot)   0    1    2    3    4    <- `index_J`: b is written there next

Cache entries at `index_J` and at higher indices are stale. Stale entries come from the next prompt
of the packed row or from the slot's previous text. No token attends to stale entries, because a
token attends only to entries up to its own index.

On a mesh, each of the R batch shards has J / R slots and its own row of packed prompts. Cache
entries are never sent from one device to another.

Shapes: J slots, A entries per slot, R batch shards, T packed tokens, P prefix tokens, E steps of
one `decode` call, X sets of stop ids; I is the number of texts inserted into one shard's slots.
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

UNSTACK_FROM = 2**20  # bytes per layer; for smaller layers, `unstack_layers` saves no time
# Number of entries that `insert` copies at once. Each slot has at least as many spare entries.
INSERT_BLOCK = 64


class LayerWeights(NamedTuple):
    """The arrays that a decode step reads from one layer."""

    params: Any
    adapter: Any  # None if there is no adapter
    prefix: transformer.KV | None  # [1, P, K, H]


class Constants(NamedTuple):
    """Arrays that are read, but never changed, by the programs of one sampler call."""

    policy: policy_lib.Policy
    prefix: transformer.KV | None  # [layers, 1, P, K, H]
    valid_V: jax.Array | None  # bool: ids that may be drawn; None if all ids may be drawn
    stop_XV: jax.Array  # bool: each row marks the ids that end a text
    layers: tuple[LayerWeights, ...] | None = None  # result of `unstack_layers`, used by `decode`


def unstack_layers(
    policy: policy_lib.Policy, prefix: transformer.KV | None, devices: Mesh
) -> tuple[LayerWeights, ...] | None:
    """Returns each layer's views of the stacked arrays; None if views would save no time.

    On a CPU, a decode step takes as long as reading the weights once. If the layers are stacked,
    XLA copies each layer's slice before it reads the slice. A view of a single layer is read
    without a copy. Two changes together shorten a step of 8 slots by about 30%: the use of views,
    and a matrix product for the logits with the head as its left factor. With views, a program of
    30 layers takes about 10 s longer to compile.

    The result is None on platforms other than CPU, on several devices, and for small layers. The
    result is also None for int8 kernels, because XLA would convert the kernels of all layers before
    the loop over tokens.
    """
    stacks = (policy.params["layers"], policy.adapter, prefix)
    leaves = jax.tree.leaves(stacks)
    if devices.size > 1 or any(not isinstance(x, jax.Array) or x.dtype == jnp.int8 for x in leaves):
        return None
    count = len(leaves[0])
    if sharding.platform(devices) != "cpu" or sum(x.nbytes for x in leaves) < UNSTACK_FROM * count:
        return None
    # On a CPU, conversions between NumPy and JAX arrays share memory and copy nothing.
    replicated = NamedSharding(devices, PartitionSpec())
    views = jax.tree.map(np.asarray, stacks)
    return tuple(
        LayerWeights(*jax.tree.map(lambda x: jax.device_put(x[i], replicated), views))  # noqa: B023
        for i in range(count)
    )


class Request(NamedTuple):
    """Limits, keys and settings of texts; arrays have one entry per slot, or per text to insert."""

    limit: jax.Array  # int32: maximum number of tokens to draw
    key: jax.Array  # uint32 [..., 2]: threefry key data; token t is drawn with fold_in(key, t)
    stop: jax.Array  # int32: index of the row in `stop_XV` that marks the text's stop ids
    rows: truncation.RowSettings


class Slots(NamedTuple):
    """The state of each slot, except its cache entries."""

    hidden_JD: jax.Array  # hidden state of the prompt's last token; used while the slot is fresh
    fresh_J: jax.Array  # bool: whether the first token is still to be drawn
    live_J: jax.Array  # bool: whether the text is still unfinished
    token_J: jax.Array  # int32: the token drawn last, which is not yet in the cache
    index_J: jax.Array  # int32: the cache index where `token_J` will be written
    drawn_J: jax.Array  # int32: number of tokens drawn so far
    request: Request


class DecodeState(NamedTuple):
    """The state that `insert` and `decode` update."""

    cache: decode_attention.Cache  # [layers, J, K, A, H]
    slots: Slots


class DrawnTokens(NamedTuple):
    """The tokens of one `decode` call, as NumPy arrays with one column per step."""

    token_JE: np.ndarray  # int32: token ids; -1 where no token was drawn
    # float32: log-probability under the tempered distribution; not finite for the last token of a
    # slot whose logits contain NaN or +inf, or are all -inf
    logp_JE: np.ndarray
    logp_truncated_JE: np.ndarray  # float32: log-probability under the truncated distribution
    live_J: np.ndarray  # bool: whether the slot is live after the last step


class DecodeResult(NamedTuple):
    """The outputs of a `decode` call that are copied to the host."""

    packed_JX: jax.Array  # int32: the arrays of `DrawnTokens` side by side; see `_pack_tokens`
    steps: jax.Array  # int32: number of steps that were run


def unpack_tokens(packed_JX: np.ndarray) -> DrawnTokens:
    """Splits a packed int32 array into its parts; log-probabilities are stored as float32 bits."""
    columns = (packed_JX.shape[1] - 1) // 3
    token, logp, truncated = (packed_JX[:, i * columns : (i + 1) * columns] for i in range(3))
    live_J = packed_JX[:, -1] > 0
    return DrawnTokens(token, logp.view(np.float32), truncated.view(np.float32), live_J)


def _pack_tokens(drawn: tuple[jax.Array, ...], live_J: jax.Array) -> jax.Array:
    """Packs all results into one array, because separate collectives could block one another."""
    bits = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in drawn]
    return jnp.concatenate([*bits, live_J[:, None].astype(jnp.int32)], axis=1)


def init_slot_state(
    decoder: transformer.Decoder, slots: int, length: int, dtype: Any
) -> DecodeState:
    """Returns a state whose slots are all free.

    Args:
      decoder: the model, which determines the shapes.
      slots: J, the number of slots.
      length: A, the number of cache entries per slot. A slot must have enough entries for the
        longest prompt and the prompt's completion.
      dtype: dtype of keys and values, which may be int8.
    """
    c = decoder.config

    def zeros(dtype, *width):  # returns a new buffer, because donated buffers must not be shared
        return jnp.zeros((slots, *width), dtype)

    request = Request(
        zeros(jnp.int32), zeros(jnp.uint32, 2), zeros(jnp.int32),
        truncation.RowSettings(*map(zeros, truncation.ROW_DTYPES)),
    )  # fmt: skip
    return DecodeState(
        decode_attention.create_cache(
            c.n_layers, slots, decoder.key_heads, length, c.head_dim, dtype
        ),
        Slots(
            hidden_JD=zeros(decoder.dtype, c.d_model),
            fresh_J=zeros(bool),
            live_J=zeros(bool),
            token_J=zeros(jnp.int32),
            index_J=zeros(jnp.int32),
            drawn_J=zeros(jnp.int32),
            request=request,
        ),
    )


def partition_state(state: DecodeState, mesh: Any) -> DecodeState:
    """Returns the PartitionSpec of each array in a state; the mesh may be abstract."""
    slot, head = decode_attention.find_mesh_axes(mesh, *state.cache.k.shape[1:3])
    return DecodeState(
        jax.tree.map(lambda _: PartitionSpec(None, slot, head), state.cache),
        jax.tree.map(lambda _: PartitionSpec(slot), state.slots),
    )


# --- prefill ------------------------------------------------------------------------------------


class PackedPrompts(NamedTuple):
    """Prompts packed end to end in rows, int32 [R, T]; see `prompt_packing.pack_row`."""

    tokens_RT: jax.Array  # token ids; at padding, any id is allowed
    index_RT: jax.Array  # index of each token in its prompt, counted from 0
    segments_RT: jax.Array  # number of the token's segment (1, 2, ...); 0 at padding
    parents_RT: jax.Array  # number of the segment with the prompt's beginning; -1 if there is none


def prefill(
    decoder: transformer.Decoder, constants: Constants, packed: PackedPrompts
) -> transformer.Output:
    """Runs packed prompts through the model.

    In the row below, segment 1 is the beginning of a prompt, and segment 2 is the rest of the same
    prompt. Segment 3 is a whole prompt:

        segments 1 1 1 1 2 2 3 3 3 0     parents -1 -1 -1 -1 1 1 -1 -1 -1 -1
        index    0 1 2 3 4 5 0 1 2 0

    Returns:
      Hidden states [R, T, D], and keys and values [layers, R, K, T + INSERT_BLOCK, H]. The
      INSERT_BLOCK additional entries let `insert` read a whole block near the end of a row.
    """
    shared = 0 if constants.prefix is None else constants.prefix.k.shape[2]
    stream = transformer.Stream(
        packed.tokens_RT, packed.index_RT + shared, packed.segments_RT,
        constants.policy.adapter, constants.policy.scale,
        prefix=constants.prefix, parents_BL=packed.parents_RT,
    )  # fmt: skip
    output = decoder.apply({"params": constants.policy.params}, (stream,), return_kv=True)[0]
    room = ((0, 0), (0, 0), (0, 0), (0, INSERT_BLOCK), (0, 0))
    kv = transformer.KV(*(jnp.pad(x.swapaxes(2, 3), room) for x in output.kv))
    return transformer.Output(output.hidden_BLD, kv)


# --- insert -------------------------------------------------------------------------------------


class Insertion(NamedTuple):
    """Prompts to put into slots, as arrays [R, I]; each shard's first `count_R` entries are used.

    The first `split` tokens of a prompt begin at index `start` of the shard's row. The prompt's
    other tokens begin at index `own`; see `prompt_packing.Placement`.
    """

    slot_RI: jax.Array  # int32: index of the target slot in its shard
    start_RI: jax.Array  # int32
    split_RI: jax.Array  # int32
    own_RI: jax.Array  # int32
    length_RI: jax.Array  # int32: number of tokens of the prompt
    request_RI: Request
    count_R: jax.Array  # int32: number of prompts for each shard


def insert(state: DecodeState, output: transformer.Output, insertion: Insertion) -> DecodeState:
    """Copies prefilled prompts into slots and marks the slots as live.

    Several slots may get copies of the same prompt.

    Args:
      state: the state to update; the target slots must be free.
      output: the result of `prefill`.
      insertion: the slot and the placement of each prompt.
    """
    kv = output.kv
    assert kv is not None  # `prefill` always returns keys and values
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _insert_shard(state, output.hidden_BLD, kv, insertion)
    specs, batch = partition_state(state, mesh), PartitionSpec(sharding.BATCH_AXES)
    kv_spec = PartitionSpec(None, sharding.BATCH_AXES, specs.cache.k[2])
    in_specs = (specs, batch, kv_spec, batch)
    run = jax.shard_map(_insert_shard, in_specs=in_specs, out_specs=specs, check_vma=False)
    return run(state, output.hidden_BLD, kv, insertion)


def _insert_shard(
    state: DecodeState, hidden_1TD: jax.Array, kv: transformer.KV, insertion: Insertion
) -> DecodeState:
    """Inserts the prompts of one shard; all of them are in the same packed row."""
    insertion = jax.tree.map(lambda x: x[0], insertion)

    def insert_text(i, state: DecodeState) -> DecodeState:
        slot, start, split, own, length, request, _ = jax.tree.map(
            lambda x: x[i] if x.ndim else x, tuple(insertion)
        )
        cache = _copy_prompt_to_slot(state.cache, kv, slot, start, 0, split)
        cache = _copy_prompt_to_slot(cache, kv, slot, own, split, length - split)
        last = jnp.where(length > split, own + length - split, start + length) - 1
        yes, zero = jnp.array(True), jnp.int32(0)
        new = Slots(  # `token_J` keeps its old value, which is not used before a token is drawn
            hidden_JD=hidden_1TD[0, last], fresh_J=yes, live_J=yes,
            token_J=state.slots.token_J[slot], index_J=length - 1, drawn_J=zero, request=request,
        )  # fmt: skip
        return DecodeState(cache, jax.tree.map(lambda x, y: x.at[slot].set(y), state.slots, new))

    return jax.lax.fori_loop(0, insertion.count_R, insert_text, state)


def _copy_prompt_to_slot(
    cache: decode_attention.Cache, kv: transformer.KV, slot, source, target, tokens
) -> decode_attention.Cache:
    """Copies entries from index `source` of a row to index `target` of a slot.

    The number of entries is `tokens`. Only whole blocks are copied. The last block may contain
    surplus entries; each surplus entry is overwritten before a token attends to it. The copy uses
    slices, because a gather would make XLA change the cache's layout. On TPU, slices prevent this
    change only if the head size is at least the number of lanes.
    """
    layers, _, heads, _, size = kv.k.shape

    def copy_block(b, cache: decode_attention.Cache) -> decode_attention.Cache:
        out = (0, 0, 0, source + b * INSERT_BLOCK, 0)
        into = (0, slot, 0, target + b * INSERT_BLOCK, 0)  # the scales of int8 caches lack axis H
        k, v = (jax.lax.dynamic_slice(x, out, (layers, 1, heads, INSERT_BLOCK, size)) for x in kv)
        new = decode_attention.convert_entries(cache, k, v)
        put = jax.lax.dynamic_update_slice
        return jax.tree.map(lambda x, part: put(x, part, into[: x.ndim]), cache, new)

    return jax.lax.fori_loop(0, -(-tokens // INSERT_BLOCK), copy_block, cache)


# --- decode -------------------------------------------------------------------------------------


def decode(
    decoder: transformer.Decoder, features: truncation.Features, steps: int,
    constants: Constants, state: DecodeState, cancel_J: jax.Array, enough: jax.Array,
) -> tuple[DecodeState, DecodeResult]:  # fmt: skip
    """Draws up to `steps` tokens for each live slot.

    Args:
      decoder: the model; static.
      features: the truncation features that the requests in the slots need; static.
      steps: E, the maximum number of tokens per slot; static.
      constants: the weights, the prefix, the valid ids, and the sets of stop ids.
      state: the state of all slots; the sampler's loop donates the state's buffers.
      cancel_J: bool; marks the slots whose texts end before this call draws a token.
      enough: int32; the loop ends early once fewer than max(enough, 1) slots are live.

    Returns:
      The new state, and the tokens that were drawn.
    """
    cache, slots = state
    slots = slots._replace(live_J=slots.live_J & ~cancel_J)
    zeros_JE = jnp.zeros((slots.live_J.shape[0], steps), jnp.float32)
    drawn = (jnp.full_like(zeros_JE, -1, jnp.int32), zeros_JE, zeros_JE)

    def goes_on(carry):
        step, _, slots, _ = carry
        return (step < steps) & (jnp.sum(slots.live_J) >= jnp.maximum(enough, 1))

    head_VD = _gather_decode_head(constants)

    def advance(carry):
        step, cache, slots, drawn = carry
        cache, hidden_JD = _run_slots_last_tokens(decoder, constants, cache, slots)
        hidden_JD = jnp.where(slots.fresh_J[:, None], slots.hidden_JD, hidden_JD)
        logits_JV = _compute_slot_logits(
            hidden_JD, head_VD, head_first=constants.layers is not None
        )
        slots, drawn = _draw(features, constants, slots, drawn, logits_JV, step)
        return step + 1, cache, slots, drawn

    start = (jnp.int32(0), cache, slots, drawn)
    step, cache, slots, drawn = jax.lax.while_loop(goes_on, advance, start)
    return DecodeState(cache, slots), DecodeResult(_pack_tokens(drawn, slots.live_J), step)


def _run_slots_last_tokens(
    decoder: transformer.Decoder, constants: Constants, cache: decode_attention.Cache, slots: Slots
) -> tuple[decode_attention.Cache, jax.Array]:
    """Runs each slot's last token through the model; returns the cache and the hidden states.

    The model also processes the slots that are free or fresh, but these slots neither write to the
    cache nor attend to it.
    """
    shared = 0 if constants.prefix is None else constants.prefix.k.shape[2]
    runs_J = slots.live_J & ~slots.fresh_J
    policy, prefix = constants.policy, constants.prefix
    params, adapter = policy.params, policy.adapter
    if constants.layers is not None:
        decoder = decoder.clone(unstacked=True)
        own, adapters, prefixes = zip(*constants.layers, strict=True)
        adapter, prefix = adapter and adapters, prefix and prefixes
        params = {name: params[name] for name in params if name != "layers"}
        params |= {f"layer_{i}": layer for i, layer in enumerate(own)}
    stream = transformer.Stream(
        slots.token_J[:, None], (slots.index_J + shared)[:, None],
        runs_J[:, None].astype(jnp.int32), adapter, policy.scale, prefix=prefix, cache=cache,
    )  # fmt: skip
    output = decoder.apply({"params": params}, (stream,))[0]
    return output.cache, output.hidden_BLD[:, 0]


def _compute_slot_logits(
    hidden_JD: jax.Array, head_VD: jax.Array, *, head_first: bool
) -> jax.Array:
    """Returns logits [J, V]; with the head as the left factor, a CPU reads the head only once."""
    if not head_first:
        return transformer.compute_model_logits(hidden_JD, head_VD)
    head_VD = head_VD.astype(hidden_JD.dtype)
    return jnp.einsum("vd,jd->vj", head_VD, hidden_JD, preferred_element_type=jnp.float32).T


def _gather_decode_head(constants: Constants) -> jax.Array:
    """Returns the head, split along the vocabulary over the mesh's `tensor` axis.

    If the size of `tensor` does not divide the vocabulary size, the head is padded once per
    `decode` call. If the head were split along its width, every step would sum all logits over the
    devices.
    """
    head_VD = transformer.get_head(constants.policy.params)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or head_VD.shape[0] % mesh.shape["tensor"] == 0:
        return head_VD
    return token_blocks.gather_head(head_VD, split_vocabulary=True)


def _draw(
    features: truncation.Features, constants: Constants, slots: Slots,
    drawn: tuple[jax.Array, ...], logits_JV: jax.Array, step: jax.Array,
) -> tuple[Slots, tuple[jax.Array, ...]]:  # fmt: skip
    """Draws one token for each live slot and writes it to column `step` of the arrays [J, E]."""
    live_J, request = slots.live_J, slots.request
    mesh = jax.sharding.get_abstract_mesh()
    values = truncation.sample(
        logits_JV, _token_keys(features, slots), request.rows, features, constants.valid_V,
        shards=1 if mesh.empty else mesh.shape["tensor"],
    )  # fmt: skip
    token_J = values[0]
    one_J = live_J.astype(jnp.int32)
    drawn_J = slots.drawn_J + one_J
    ended_J = constants.stop_XV[request.stop, token_J] | (drawn_J >= request.limit)
    # NaN or +inf in a row of logits makes the sum of the row's probabilities NaN or infinite, and a
    # row without finite logits has the peak -inf. In exactly these rows, the log-probability is not
    # finite. Therefore, these rows are found without another pass over the logits.
    ended_J |= ~jnp.isfinite(values[1])
    drawn = tuple(
        into_JE.at[:, step].set(jnp.where(live_J, value_J, into_JE[:, step]))
        for into_JE, value_J in zip(drawn, values, strict=True)
    )
    slots = slots._replace(
        fresh_J=jnp.zeros_like(slots.fresh_J),
        live_J=live_J & ~ended_J,
        token_J=jnp.where(live_J, token_J, slots.token_J),
        index_J=slots.index_J + one_J,
        drawn_J=drawn_J,
    )
    return slots, drawn


def _token_keys(features: truncation.Features, slots: Slots) -> jax.Array:
    """Returns uint32 [J, 2]: each slot's key, after folding in the index of the token to draw."""
    if not features.noise:
        return slots.request.key
    keys_J = jax.random.wrap_key_data(slots.request.key, impl="threefry2x32")
    return jax.random.key_data(jax.vmap(jax.random.fold_in)(keys_J, slots.drawn_J))
