"""Row attention by jax's splash kernel for TPU, with segments, parents and a shared prefix.

The form of the mask is chosen when a program is traced:

- If there are no parents and no prefix, the kernel computes the causal mask and the mask of
  segments. The kernel visits all blocks on and below the diagonal.
- If there are parents or a prefix, the mask is an array, because the kernel's segment ids cannot
  express parents or a prefix. The mask array is built for one row at a time. A mask array takes
  4 · L · (L + P) bytes, and twice as many bytes in the backward pass. Blocks without a visible key
  are skipped. The kernel's own gradient would keep the masks of all rows. Therefore, the backward
  pass here builds the masks again and repeats the forward kernel, so a (query, key) pair takes
  9 products instead of 7.

The kernel is jax.experimental.pallas.ops.tpu.splash_attention (FlashAttention-2 with a list of
blocks to visit). Tokens of segment 0 pad the rows to whole blocks; padding tokens see each other.

Shapes: the letters of row_attention.py; N = K · M query heads; W is the padded length of a row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib

from copsd_jax.attention import visibility

LANES = 128  # every block size is a multiple of 128
MAX_BLOCK = 512  # with 512, float32 logits and their gradient take 2 of the 16 MiB of VMEM
# Each step of the kernel's grid has an extra cost, equal to that of about 256 x 256 (query, key)
# pairs. Small blocks waste fewer pairs at the end of a row, but need more grid steps.
GRID_STEP_PAIRS = 256 * 256


def choose_block(length: int) -> int:
    """Chooses the number of queries in a block, which is also the number of keys in a block.

    For example, L = 352 gives one block of 384, L = 640 gives two blocks of 384, and L = 2048 gives
    four blocks of 512.

    Args:
      length: length of a row, L.
    """

    def cost(block: int) -> int:
        n = -(-length // block)
        return n * (n + 1) // 2 * (block * block + GRID_STEP_PAIRS)

    return min(range(LANES, MAX_BLOCK + 1, LANES), key=cost)


def attend(inputs: visibility.RowInputs, interpret: bool = False) -> jax.Array:
    """Computes `row_attention.attend` on one device; returns [B, L, K, M, H].

    Args:
      inputs: the same as for `row_attention.attend`.
      interpret: whether to run the kernel without a TPU.
    """
    q_BLKMH, k_BLKH, v_BLKH, rows, prefix = inputs
    B, L, K, M, H = q_BLKMH.shape
    block = choose_block(L)
    wide = functools.partial(visibility.pad_rows, multiple=block)  # [B, L, ...] -> [B, W, ...]
    q_BLNH = q_BLKMH.reshape(B, L, K * M, H)
    q, k, v = (wide(x).swapaxes(1, 2) for x in (q_BLNH, k_BLKH, v_BLKH))
    wider = jax.tree.map(wide, rows)
    if rows.parents_BL is None and prefix is None:
        kernel = _causal_kernel(K * M, q.shape[2], block, interpret)
        out = jax.vmap(lambda q, k, v, s: kernel(q, k, v, kernel_lib.SegmentIds(s, s)))(
            q, k, v, wider.segments_BL
        )
    else:
        out = _attend_masked((block, interpret), q, k, v, wider, prefix)
        out = checkpoint_name(out, visibility.CHECKPOINT_NAME)
    return out.swapaxes(1, 2)[:, :L].reshape(B, L, K, M, H)


def _block_sizes(block: int) -> kernel_lib.BlockSizes:
    return kernel_lib.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip


def _causal_kernel(heads: int, length: int, block: int, interpret: bool) -> Any:
    mask = mask_lib.MultiHeadMask([mask_lib.CausalMask((length, length))] * heads)
    return kernel_lib.make_splash_mha_single_device(
        mask, block_sizes=_block_sizes(block), residual_checkpoint_name=visibility.CHECKPOINT_NAME,
        interpret=interpret,
    )  # fmt: skip


# --- with a mask array ------------------------------------------------------------------------


def _attend_row(static, prefix, q_NWH, k_KWH, v_KWH, row: visibility.Visibility) -> Any:
    """Attends from the queries of one row [N, W, H] to the prefix and the row, with a mask."""
    block, interpret = static
    row = jax.tree.map(lambda x: x[None], row)
    index_W = jnp.arange(row.segments_BL.shape[1], dtype=jnp.int32)
    mask_WS = visibility.mark_visible_keys(row, index_W, row.segments_BL)[0]
    if prefix is not None:
        pad = -prefix.k_PKH.shape[0] % block
        shared = [jnp.pad(x.swapaxes(0, 1), ((0, 0), (0, pad), (0, 0))) for x in prefix]
        k_KWH, v_KWH = (
            jnp.concatenate(pair, axis=1) for pair in zip(shared, (k_KWH, v_KWH), strict=True)
        )
        there = np.arange(prefix.k_PKH.shape[0] + pad) < prefix.k_PKH.shape[0]
        there = jnp.broadcast_to(jnp.asarray(there)[None], (mask_WS.shape[0], there.size))
        mask_WS = jnp.concatenate([there, mask_WS], axis=1)
    kernel: Any = kernel_lib.make_splash_mha_single_device(
        mask_WS[None], block_sizes=_block_sizes(block), interpret=interpret
    )
    # jax 0.10 converts the flag `is_dynamic_mask` to an array, and later tests the flag in Python.
    # A traced array cannot be tested, so the flag is set back to True here.
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    return kernel(q_NWH, k_KWH, v_KWH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_masked(
    static, q_BNWH, k_BKWH, v_BKWH, rows: visibility.Visibility, prefix
) -> jax.Array:
    """Attends row by row, so that only one mask exists at a time."""
    each = (q_BNWH, k_BKWH, v_BKWH, rows)
    return jax.lax.map(lambda row: _attend_row(static, prefix, *row), each)


def _masked_forward(static, *inputs: Any):
    return _attend_masked(static, *inputs), inputs


def _masked_backward(static, kept, g_BNWH):
    *qkv, rows, prefix = kept

    def one(total, row):
        *qkv, seen, g = row
        attend = lambda q, k, v, p: _attend_row(static, p, q, k, v, seen)  # noqa: E731
        back = jax.vjp(attend, *qkv, prefix)[1]
        *grads, prefix_grad = back(g)
        more = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, prefix_grad)
        return more, tuple(grads)

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), prefix)
    total, grads = jax.lax.scan(one, zero, (*qkv, rows, g_BNWH))
    prefix_grad = jax.tree.map(lambda a, x: a.astype(x.dtype), total, prefix)
    return *grads, None, prefix_grad


_attend_masked.defvjp(_masked_forward, _masked_backward)
