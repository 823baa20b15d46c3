"""Attention of whole rows of tokens, for training, scoring and prefill (not for decoding).

visibility.py defines which keys a token sees. A single softmax covers all keys that a token sees.
`portable` is plain array code that does not copy the prefix for each row. Queries are divided into
ranges, and each range is multiplied only with the keys up to the end of the range. Dividing the
queries saves up to 7/16 of the products. For the backward pass, the output and the log-sum-exp of
each query are kept, but not the attention weights (FlashAttention-2, arXiv 2307.08691, section
3.1). `splash` is jax's kernel for TPU (row_attention_splash.py). `cudnn` is NVIDIA's kernel, called
through jax.nn.dot_product_attention.

Shapes: B rows, L tokens per row, Q queries per block, S keys, K key heads, M queries per key head,
P keys in the prefix; H is the head size.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from copsd_jax.attention import visibility
from copsd_jax.runtime import sharding

IMPLEMENTATIONS = ("portable", "splash", "cudnn")
CPU_QUERY_BLOCK = 64  # number of queries per block on CPU; with 32 or 128, SmolLM2 is 10% slower
MAX_RANGES = 8  # maximum number of query ranges; more ranges would save little
# If L² · K · M · H is below SMALL_WORK, small blocks save less time than their compilation takes.
SMALL_WORK = 2**24
SMALL_WORK_BLOCK = 512  # minimum number of queries per block if L² · K · M · H < SMALL_WORK
# Maximum number of query ranges if a block has more than CPU_QUERY_BLOCK queries. The number is
# small, because each range takes 10 to 30 s to compile for TPU.
MAX_RANGES_LARGE_BLOCKS = 2

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attend(inputs: visibility.RowInputs, implementation: str, block: int) -> jax.Array:
    """Computes softmax(q k^T) v over the keys that each token sees.

    The output can be differentiated in reverse mode with respect to q, k, v and the prefix. On a
    mesh (`jax.set_mesh`), the kernels split rows over the batch axes if these axes divide the
    number of rows. Key heads are split over `tensor` if `tensor` divides the number of key heads.
    For `portable`, the compiler splits the work.

    Args:
      inputs: queries, keys, values and their visibility.
      implementation: one of IMPLEMENTATIONS.
      block: number of queries per block of `portable`; rows with little work get larger blocks.

    Returns:
      The attention output, [B, L, K, M, H] in the dtype of v.

    Raises:
      ValueError: the implementation is unknown.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"model.attention is {implementation!r}: the choices are {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "portable":
        shape = inputs.q_BLKMH.shape[1:]
        work = math.prod(shape) * shape[0]
        return _attend_portable(
            block if work >= SMALL_WORK else max(block, SMALL_WORK_BLOCK), inputs
        )
    if implementation == "splash":
        # This import is lazy, because Pallas is slow to import and a CPU run does not need Pallas.
        from copsd_jax.attention import row_attention_splash

        return attend_on_mesh(row_attention_splash.attend, inputs)
    return attend_on_mesh(attend_cudnn, inputs)


def attend_on_mesh(
    kernel: Callable[[visibility.RowInputs], jax.Array], inputs: visibility.RowInputs
) -> jax.Array:
    """Calls a kernel on each device with that device's rows and heads; returns [B, L, K, M, H]."""
    context: Any = jax.sharding.get_abstract_mesh()
    if context.empty or context.size == 1:
        return kernel(inputs)
    batch, heads = inputs.q_BLKMH.shape[0], inputs.k_BLKH.shape[2]
    row = sharding.BATCH_AXES if batch % sharding.batch_shards(context) == 0 else None
    head = "tensor" if heads % context.shape["tensor"] == 0 else None
    place: Any = PartitionSpec(row, None, head)
    others: Any = (PartitionSpec(row), PartitionSpec(None, head))
    specs = visibility.RowInputs(place, place, place, *others)
    return jax.shard_map(kernel, in_specs=(specs,), out_specs=place, check_vma=False)(inputs)


# --- portable ---------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_portable(block: int, inputs: visibility.RowInputs) -> jax.Array:
    return _attend_forward(block, inputs)[0]


def _split_ranges(inputs: visibility.RowInputs, block: int, others: tuple = ()) -> list[tuple]:
    """Returns (keys, part) for each range of queries; `keys` are all keys that the range may see.

    `part` holds (queries, *others, visibility, index) for the range. The shapes of `others` are
    [B, L, ...].
    """
    length = inputs.q_BLKMH.shape[1]
    index_1L = jnp.arange(length, dtype=jnp.int32)[None]
    k, v, segments = inputs.k_BLKH, inputs.v_BLKH, inputs.rows.segments_BL
    whole = (inputs.q_BLKMH, *others, inputs.rows, index_1L)
    ranges = []
    for start, stop in split_queries(length, block):
        keys = _VisibleKeys(k[:, :stop].swapaxes(1, 2), v[:, :stop].swapaxes(1, 2),
                            segments[:, :stop], inputs.prefix)  # fmt: skip
        ranges.append((keys, jax.tree.map(lambda x: x[:, start:stop], whole)))  # noqa: B023
    return ranges


def _attend_forward(block: int, inputs: visibility.RowInputs) -> tuple[jax.Array, tuple]:
    """Returns the output, and the residuals for the backward pass."""
    ranges = [
        _scan_query_blocks(functools.partial(_attend_block_forward, keys), (), part, block)[1]
        for keys, part in _split_ranges(inputs, block)
    ]
    out_BLKMH, lse_BLKM = (
        checkpoint_name(jnp.concatenate(parts, 1), visibility.CHECKPOINT_NAME)
        for parts in zip(*ranges, strict=True)
    )
    return out_BLKMH, (inputs, out_BLKMH, lse_BLKM)


def _attend_backward(block: int, kept: tuple, g_BLKMH: jax.Array) -> tuple[visibility.RowInputs]:
    inputs, out_BLKMH, lse_BLKM = kept
    length, dtype, f32 = inputs.q_BLKMH.shape[1], inputs.k_BLKH.dtype, jnp.float32
    delta_BLKM = jnp.sum(g_BLKMH.astype(f32) * out_BLKMH.astype(f32), axis=-1)
    grads = [
        _scan_query_blocks(
            functools.partial(_attend_block_backward, keys), _zero_gradients(keys), part, block
        )
        for keys, part in _split_ranges(inputs, block, (g_BLKMH, lse_BLKM, delta_BLKM))
    ]
    key_grads, query_grads = zip(*grads, strict=True)

    def add(parts):
        return functools.reduce(jnp.add, parts)

    def add_ranges(parts):  # arrays [B, K, H, S] with different S -> their sum [B, L, K, H]
        pad = lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, length - x.shape[3]),))  # noqa: E731
        return add(map(pad, parts)).transpose(0, 3, 1, 2).astype(dtype)

    k_parts, v_parts, *shared = zip(*key_grads, strict=True)
    prefix_grad = None
    if shared:  # [K, H, P] -> [P, K, H]
        prefix_grad = visibility.Prefix(
            *(add(parts).transpose(2, 0, 1).astype(dtype) for parts in shared)
        )
    q_grad = jnp.concatenate(query_grads, 1)
    grads: Any = (q_grad, add_ranges(k_parts), add_ranges(v_parts), None, prefix_grad)
    return (visibility.RowInputs(*grads),)


_attend_portable.defvjp(_attend_forward, _attend_backward)


class _VisibleKeys(NamedTuple):
    """The keys and values that a range of queries may attend to."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    segments_BS: jax.Array
    prefix: visibility.Prefix | None


def split_queries(length: int, block: int) -> list[tuple[int, int]]:
    """Splits queries into a few ranges of whole blocks; returns (start, stop) of each range.

    For example, 11 queries in blocks of 4 give the ranges (0, 4), (4, 8) and (8, 11).

    Args:
      length: number of queries.
      block: number of queries in a block.
    """
    ranges = MAX_RANGES if block <= CPU_QUERY_BLOCK else MAX_RANGES_LARGE_BLOCKS
    width = block * -(-length // (block * ranges))
    return [(start, min(start + width, length)) for start in range(0, length, width)]


def _scan_query_blocks(step: Callable[..., Any], carry: Any, parts: Any, block: int) -> Any:
    """Runs `step(carry, part)` as a scan over blocks of queries, along axis 1 of `parts`."""
    length = max(x.shape[1] for x in jax.tree.leaves(parts))
    if length <= block:
        return step(carry, parts)
    n = -(-length // block)

    def split(x):  # [B, L, ...] -> [n, B, block, ...]
        x = visibility.pad_rows(x, block)
        return jnp.moveaxis(x.reshape(x.shape[0], n, block, *x.shape[2:]), 1, 0)

    def join(x):  # drops the results of the queries that pad the last block
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], n * block, *x.shape[3:])[:, :length]

    carry, out = jax.lax.scan(step, carry, jax.tree.map(split, parts))
    return carry, jax.tree.map(join, out)


def _compute_attention_logits(keys: _VisibleKeys, q_BKQMH, query: visibility.Visibility, index_1Q):
    """Computes logits for the row's keys, [B, K, Q, M, S], and for the prefix, [K, B, Q, M, P]."""
    own = _product("bkqmh,bksh->bkqms", q_BKQMH, keys.k_BKSH)
    visible = visibility.mark_visible_keys(query, index_1Q[0], keys.segments_BS)
    # The mask is added to the logits, and is not applied with a select. An addition takes one pass
    # over memory, no matter which operations XLA fuses with the addition.
    mask = jnp.where(visible, jnp.float32(0), jnp.float32(visibility.MASKED_LOGIT))
    own = own + mask[:, None, :, None]
    if keys.prefix is None:
        return own, None
    # The logits keep the axis order of the product, so that only arrays without a key axis have to
    # be transposed.
    return own, _product("kbqmh,pkh->kbqmp", q_BKQMH.swapaxes(0, 1), keys.prefix.k_PKH)


def _attend_block_forward(keys: _VisibleKeys, carry, part):
    # The barrier makes the mask wait for q. Without the barrier, the masks would depend only on
    # constants of the loops, so gradient computations would build the masks of all blocks before
    # the first layer.
    q, query, index = jax.lax.optimization_barrier(part)
    q, dtype = q.swapaxes(1, 2), keys.v_BKSH.dtype
    own, shared = _compute_attention_logits(keys, q, query, index)
    top_BKQM = own.max(axis=-1)
    if shared is not None:
        top_BKQM = jnp.maximum(top_BKQM, shared.max(axis=-1).swapaxes(0, 1))
    own = jnp.exp(own - top_BKQM[..., None])
    total_BKQM = own.sum(axis=-1)
    out = _product("bkqms,bksh->bkqmh", own.astype(dtype), keys.v_BKSH)
    if shared is not None:
        assert keys.prefix is not None
        shared = jnp.exp(shared - top_BKQM.swapaxes(0, 1)[..., None])
        total_BKQM = total_BKQM + shared.sum(axis=-1).swapaxes(0, 1)
        more = _product("kbqmp,pkh->kbqmh", shared.astype(dtype), keys.prefix.v_PKH)
        out = out + more.swapaxes(0, 1)
    out = (out / total_BKQM[..., None]).astype(dtype)
    return carry, (out.swapaxes(1, 2), (top_BKQM + jnp.log(total_BKQM)).swapaxes(1, 2))


def _zero_gradients(keys: _VisibleKeys) -> tuple[jax.Array, ...]:
    """Returns zero gradients of keys and values [B, K, H, S], and of the prefix [K, H, P]."""
    batch, heads, count, size = keys.k_BKSH.shape
    shapes = [(batch, heads, size, count)] * 2
    if keys.prefix is not None:
        shapes += [(heads, size, keys.prefix.k_PKH.shape[0])] * 2
    return tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)


def _attend_block_backward(keys: _VisibleKeys, carry, part):
    """Computes the gradient of a block's queries; adds the gradients of keys and values to `carry`.

    In products over queries, the larger factor (attention weights or gradients of logits) comes
    second, because XLA on CPU transposes the first factor in memory.
    """
    q, g, lse, delta, query, index = jax.lax.optimization_barrier(part)
    dtype = keys.v_BKSH.dtype
    q, g, lse, delta = (x.swapaxes(1, 2) for x in (q, g, lse, delta))
    own, shared = _compute_attention_logits(keys, q, query, index)
    weight = jnp.exp(own - lse[..., None])
    slope = _product("bkqmh,bksh->bkqms", g, keys.v_BKSH)
    grad_logit = (weight * (slope - delta[..., None])).astype(dtype)
    more = [
        _product("bkqmh,bkqms->bkhs", q, grad_logit),
        _product("bkqmh,bkqms->bkhs", g, weight.astype(dtype)),
    ]
    out = _product("bkqms,bksh->bkqmh", grad_logit, keys.k_BKSH)
    if shared is not None:
        assert keys.prefix is not None
        q, g, lse, delta = (x.swapaxes(0, 1) for x in (q, g, lse, delta))
        weight = jnp.exp(shared - lse[..., None])
        slope = _product("kbqmh,pkh->kbqmp", g, keys.prefix.v_PKH)
        grad_logit = (weight * (slope - delta[..., None])).astype(dtype)
        more += [
            _product("kbqmh,kbqmp->khp", q, grad_logit),
            _product("kbqmh,kbqmp->khp", g, weight.astype(dtype)),
        ]
        out = out + _product("kbqmp,pkh->kbqmh", grad_logit, keys.prefix.k_PKH).swapaxes(0, 1)
    carry = tuple(a + b for a, b in zip(carry, more, strict=True))
    return carry, out.astype(dtype).swapaxes(1, 2)


# --- cudnn ------------------------------------------------------------------------------------


def attend_cudnn(inputs: visibility.RowInputs, implementation: Any = "cudnn") -> jax.Array:
    """Attends through jax.nn.dot_product_attention, with a mask of shape [B, 1, L, P + L].

    The mask can express the visibility in every kind of row. Lengths are padded to even numbers,
    because cuDNN has no gradient for odd lengths if there is a mask.

    Args:
      inputs: the same as for `attend`.
      implementation: 'cudnn' or 'xla'; tests use 'xla' to compute the same output without a GPU.

    Returns:
      The attention output, [B, L, K, M, H].
    """
    B, L, K, M, H = inputs.q_BLKMH.shape
    even = functools.partial(visibility.pad_rows, multiple=2)
    q, k, v = map(even, (inputs.q_BLKMH.reshape(B, L, K * M, H), inputs.k_BLKH, inputs.v_BLKH))
    wider = jax.tree.map(even, inputs.rows)
    index = jnp.arange(L + L % 2, dtype=jnp.int32)
    visible = visibility.mark_visible_keys(wider, index, wider.segments_BL)
    if inputs.prefix is not None:
        P = inputs.prefix.k_PKH.shape[0]
        there = (jnp.arange(P + P % 2, dtype=jnp.int32) < P)[None, None]
        there = jnp.broadcast_to(there, (*visible.shape[:2], P + P % 2))
        visible = jnp.concatenate([there, visible], axis=2)
        shared = [even(x[None]) for x in inputs.prefix]
        k, v = (
            jnp.concatenate([jnp.broadcast_to(x, (B, *x.shape[1:])), own], axis=1)
            for x, own in zip(shared, (k, v), strict=True)
        )
    out = jax.nn.dot_product_attention(
        q, k, v, mask=visible[:, None], scale=1.0, is_causal=inputs.prefix is None,
        implementation=implementation,
    )  # fmt: skip
    return checkpoint_name(out, visibility.CHECKPOINT_NAME)[:, :L].reshape(B, L, K, M, H)


def explain_cudnn_refusal(size: int) -> str:
    """Returns the reason why jax would not call cuDNN for a head size; "" if jax would call it."""
    # jax checks the head size during tracing, so shapes without values are enough.
    row: Any = jax.ShapeDtypeStruct((1, 64, 1, size), jnp.bfloat16)
    ids: Any = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    q: Any = jax.ShapeDtypeStruct((1, 64, 1, 1, size), jnp.bfloat16)
    try:
        rows = visibility.RowInputs(q, row, row, visibility.Visibility(ids))
        jax.eval_shape(attend_cudnn, rows)
    except (RuntimeError, NotImplementedError) as error:
        return f"jax says {str(error).splitlines()[0]!r}"
    return ""
