"""The divergence's kernels on a device: which one, in what blocks, over which rows."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from copsd_jax.losses import divergences, token_blocks
from copsd_jax.losses.pallas import block_sizes as blocks_lib

CALLS = 4  # blocks of tokens in a call that has the head's gradient


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Where and how the kernels run.

    Attributes:
      chip: `device_kind` of the mesh's devices, which block sizes depend on; "" for the smallest.
      blocks: sizes instead of the chip's.
      interpret: on any platform, step by step (tests).
    """

    chip: str = ""
    blocks: blocks_lib.Blocks | None = None
    interpret: bool = False


PLAIN = Kernel()


def _sweep_tpu(*args: Any, **keywords: Any) -> tuple:
    from copsd_jax.losses.pallas import (
        divergence_tpu,  # imported where a TPU, or a test, asks for it
    )

    return divergence_tpu.sweep(*args, **keywords)


def _sweep_gpu(*args: Any, **keywords: Any) -> tuple:
    from copsd_jax.losses.pallas import divergence_gpu

    return divergence_gpu.sweep(*args, **keywords)


def _blocks_tpu(chip: str, head_VD: jax.Array, tied: bool, train_head: bool) -> blocks_lib.Blocks:
    entries, width = head_VD.shape
    return blocks_lib.tpu(
        chip, width, entries, head_VD.dtype, tied=tied, train_head=train_head
    )  # fmt: skip


def _blocks_gpu(chip: str, head_VD: jax.Array, tied: bool, train_head: bool) -> blocks_lib.Blocks:
    entries, width = head_VD.shape
    return blocks_lib.gpu(
        chip, width, entries, head_VD.dtype, tied=tied, train_head=train_head
    )  # fmt: skip


class Sweep(NamedTuple):
    """A kernel: sweep(settings, hidden_s, hidden_t, head_s, head_t, tokens, weight, old, rollout,
    *, train_head, vocab_axis, vocab_size, blocks, interpret) -> (stats, grad_hidden, grad_head or
    None) of a device's rows; the rule of its block sizes; the multiple that widths are padded to.
    """

    sweep: Callable[..., tuple]
    blocks: Callable[[str, jax.Array, bool, bool], blocks_lib.Blocks]
    lanes: int


SWEEPS: dict[str, Sweep] = {
    "pallas_tpu": Sweep(_sweep_tpu, _blocks_tpu, blocks_lib.LANES),
    "pallas_gpu": Sweep(_sweep_gpu, _blocks_gpu, 1),
}


def device(
    name: str,
    kernel: Kernel,
    settings: divergences.Divergence,
    hidden: tuple[jax.Array, jax.Array],
    rows: tuple,
    live_T: jax.Array,
    heads: tuple[jax.Array, ...],
    *,
    gradient: bool,
    train_head: bool,
    vocab_axis: str | None,
    vocab_size: int,
) -> tuple[tuple, jax.Array | None]:
    """A device's live rows in calls of a kernel, which has no form without the gradient.

    A call is one block of the kernel's own, so that few rows are run for nothing; with the head's
    gradient CALLS of them, since each call's [V, D] is added to the others' in memory.

    Args:
      name: a name of SWEEPS.
      hidden: of student and teacher, [T, D] each.
      rows: tokens, weights, old and sampler's log-probabilities; see `divergence_loss.Rows`.
      live_T: bool; what other rows hold is never used.
      heads: in the states' dtype; one where both sides share it.
      gradient: False gives None for both gradients.
      vocab_axis, vocab_size: the mesh axis that splits the heads, entries of the whole vocabulary.

    Returns:
      (TokenStats, gradient to the student's states), and the head's gradient.
    """
    chosen, width = SWEEPS[name], hidden[0].shape[1]
    heads = tuple(_widen(head, chosen.lanes) for head in heads)
    tied, sizes = len(heads) == 1, kernel.blocks
    if sizes is None:
        sizes = chosen.blocks(kernel.chip, heads[0], tied, train_head)

    def block(inputs: tuple) -> tuple:
        hidden, rows = inputs
        args: Any = (*(_widen(x, chosen.lanes) for x in hidden), heads[0], heads[-1], *rows)
        stats, grad_hidden_TD, grad_head_VD = chosen.sweep(
            settings, *args, train_head=train_head, vocab_axis=vocab_axis, vocab_size=vocab_size,
            blocks=sizes, interpret=kernel.interpret,
        )  # fmt: skip
        return (stats, grad_hidden_TD[:, :width] if gradient else None), grad_head_VD

    most = sizes.tokens * (CALLS if train_head else 1)
    out, grad_head_VD = token_blocks.walk(block, (hidden, rows), live_T, most)
    return out, None if grad_head_VD is None else grad_head_VD[:, :width]


def _widen(x: jax.Array, lanes: int) -> jax.Array:
    """Zeros beside the last axis, to a multiple: they change no product."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % lanes))) if x.shape[1] % lanes else x
