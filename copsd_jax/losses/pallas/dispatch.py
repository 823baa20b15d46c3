"""Runs the Pallas kernels on one device; chooses the kernel, the block sizes and the rows."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from copsd_jax.losses import split_vocabulary, token_blocks, token_values
from copsd_jax.losses.pallas import block_sizes, row_statistics

CALLS = 4  # number of token blocks per kernel call if the head is trained
DIVERGENCES = row_statistics.DIVERGENCES


@dataclasses.dataclass(frozen=True)
class KernelOptions:
    """Static options of the kernels.

    Attributes:
      chip: `device_kind` of the mesh's devices, which determines the block sizes; "" means the
        smallest chip.
      blocks: block sizes to use; None means the sizes that are chosen for the chip.
      interpret: whether the kernels run in interpret mode, which tests use on platforms without the
        chip.
    """

    chip: str = ""
    blocks: block_sizes.Blocks | None = None
    interpret: bool = False


DEFAULT = KernelOptions()


def _sweep_tpu(*args, **keywords):
    # This import is lazy, because only TPUs and tests need Mosaic.
    from copsd_jax.losses.pallas import divergence_tpu

    return divergence_tpu.sweep(*args, **keywords)


def _sweep_gpu(*args, **keywords):
    # This import is lazy, because only GPUs and tests need Triton.
    from copsd_jax.losses.pallas import divergence_gpu

    return divergence_gpu.sweep(*args, **keywords)


class Kernel(NamedTuple):
    """The kernels for one kind of chip.

    Attributes:
      sweep: computes statistics and gradients of a device's rows; see `divergence_tpu.sweep`.
      choose_blocks: chooses the block sizes; see `block_sizes.choose_tpu`.
      lanes: number that must divide the width.
    """

    sweep: Callable[..., tuple]
    choose_blocks: Callable[..., block_sizes.Blocks]
    lanes: int


KERNELS: dict[str, Kernel] = {
    "pallas_tpu": Kernel(_sweep_tpu, block_sizes.choose_tpu, block_sizes.LANES),
    "pallas_gpu": Kernel(_sweep_gpu, block_sizes.choose_gpu, 1),
}


def sweep_live(
    name: str, options: KernelOptions, sweep: split_vocabulary.Sweep, rows: tuple, live_T: jax.Array
) -> tuple[tuple[token_values.TokenStats, jax.Array | None], jax.Array | None]:
    """Sweeps a device's live rows by calling a kernel, which always computes the gradient.

    If the head is frozen, each kernel call gets one block of rows, so that few padding rows are
    computed. If the head is trained, each kernel call gets several blocks (`CALLS`), because every
    call adds a [V, D] gradient to a total in memory.

    Args:
      name: a key of `KERNELS`.
      options: options of the kernels.
      sweep: constants of the sweep; the heads are in the dtype of the states.
      rows: (hidden, inputs); hidden contains the states of student and teacher, [T, D] each, and
        inputs is a `TokenInputs`.
      live_T: bool; rows that are not live may contain anything.

    Returns:
      The pair (TokenStats, gradient of the student's states [T, D]), and the gradient of the
      student's head [V, D]. A gradient that is not requested is None.
    """
    kernel, width = KERNELS[name], rows[0][0].shape[1]
    heads = tuple(_pad_width(head, kernel.lanes) for head in sweep.heads)
    (entries, padded), train_head = heads[0].shape, sweep.train_head
    blocks = options.blocks or kernel.choose_blocks(
        options.chip, padded, entries, heads[0].dtype, tied=len(heads) == 1, train_head=train_head
    )

    def call(rows: tuple) -> tuple:
        hidden, inputs = rows
        rows = tuple(_pad_width(x, kernel.lanes) for x in hidden), inputs
        stats, grad_hidden_TD, grad_head_VD = kernel.sweep(
            sweep._replace(heads=heads), rows, blocks, options.interpret
        )
        return (stats, grad_hidden_TD[:, :width] if sweep.gradient else None), grad_head_VD

    most = blocks.tokens * (CALLS if train_head else 1)
    out, grad_head_VD = token_blocks.walk(call, rows, live_T, most)
    return out, None if grad_head_VD is None else grad_head_VD[:, :width]


def _pad_width(x: jax.Array, lanes: int) -> jax.Array:
    """Pads the last axis with zeros to a multiple of `lanes`; the zeros change no product."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % lanes))) if x.shape[1] % lanes else x
