"""The Pallas kernels on one device: choice of the kernel, its block sizes, and its rows."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from copsd_jax.losses import divergences, split_vocabulary, token_blocks, token_values
from copsd_jax.losses.pallas import block_sizes, row_statistics

CALLS = 4  # blocks of tokens in a call that has the head's gradient
DIVERGENCES = row_statistics.DIVERGENCES


@dataclasses.dataclass(frozen=True)
class KernelOptions:
    """Static options of the kernels.

    Attributes:
      chip: `device_kind` of the mesh's devices, which determines the block sizes; "" for those of
        the smallest chip.
      blocks: sizes that replace the chip's.
      interpret: whether the kernels run in interpret mode, on any platform (tests).
    """

    chip: str = ""
    blocks: block_sizes.Blocks | None = None
    interpret: bool = False


DEFAULT = KernelOptions()


class SweepFunction(Protocol):
    """A chip's sweep; `divergence_tpu.sweep` describes it."""

    def __call__(
        self,
        settings: divergences.Divergence,
        hidden: tuple[jax.Array, jax.Array],
        heads: tuple[jax.Array, ...],
        inputs: token_values.TokenInputs,
        shard: split_vocabulary.VocabularyShard,
        *,
        train_head: bool,
        blocks: block_sizes.Blocks | None,
        interpret: bool,
    ) -> tuple[token_values.TokenStats, jax.Array, jax.Array | None]:
        """Sweeps a device's rows; see `divergence_tpu.sweep`."""
        ...


def _sweep_tpu(*args, **keywords):
    # Imported lazily: only a TPU, or a test, needs Mosaic.
    from copsd_jax.losses.pallas import divergence_tpu

    return divergence_tpu.sweep(*args, **keywords)


def _sweep_gpu(*args, **keywords):
    # Imported lazily: only a GPU, or a test, needs Triton.
    from copsd_jax.losses.pallas import divergence_gpu

    return divergence_gpu.sweep(*args, **keywords)


class Kernel(NamedTuple):
    """The kernels of one kind of chip.

    Attributes:
      sweep: statistics and gradients of a device's rows.
      choose_blocks: `block_sizes.choose_tpu`, or the counterpart of the chip.
      lanes: the kernels take widths that are multiples of it.
    """

    sweep: SweepFunction
    choose_blocks: Callable[..., block_sizes.Blocks]
    lanes: int


KERNELS: dict[str, Kernel] = {
    "pallas_tpu": Kernel(_sweep_tpu, block_sizes.choose_tpu, block_sizes.LANES),
    "pallas_gpu": Kernel(_sweep_gpu, block_sizes.choose_gpu, 1),
}


def sweep_live(
    name: str,
    options: KernelOptions,
    settings: divergences.Divergence,
    hidden: tuple[jax.Array, jax.Array],
    heads: tuple[jax.Array, ...],
    inputs: token_values.TokenInputs,
    shard: split_vocabulary.VocabularyShard,
    live_T: jax.Array,
    *,
    gradient: bool,
    train_head: bool,
) -> tuple[tuple[token_values.TokenStats, jax.Array | None], jax.Array | None]:
    """Sweeps a device's live rows in calls of a kernel, which always takes the gradient.

    A call is one of the kernel's own blocks, so that few padding rows are computed. With the head's
    gradient it is CALLS blocks, since the [V, D] result of each call is added in memory.

    Args:
      name: a name of `KERNELS`.
      options: of the kernels.
      settings: of the divergence.
      hidden: of student and teacher, [T, D] each.
      heads: [V, D] in the states' dtype; one where both sides share it.
      inputs: [T].
      shard: this device's part of the vocabulary.
      live_T: bool; other rows may hold anything.
      gradient: False gives None for the gradient to the states.
      train_head: whether the head's gradient is wanted.

    Returns:
      (TokenStats, gradient to the student's states [T, D]), and the head's gradient [V, D] or None.
    """
    kernel, width = KERNELS[name], hidden[0].shape[1]
    heads = tuple(_pad_width(head, kernel.lanes) for head in heads)
    blocks = options.blocks
    if blocks is None:
        entries, padded = heads[0].shape
        blocks = kernel.choose_blocks(
            options.chip, padded, entries, heads[0].dtype, tied=len(heads) == 1,
            train_head=train_head,
        )  # fmt: skip

    def sweep(rows: tuple) -> tuple:
        (hidden_s_TD, hidden_t_TD), inputs = rows
        hidden = _pad_width(hidden_s_TD, kernel.lanes), _pad_width(hidden_t_TD, kernel.lanes)
        stats, grad_hidden_TD, grad_head_VD = kernel.sweep(
            settings, hidden, heads, inputs, shard, train_head=train_head, blocks=blocks,
            interpret=options.interpret,
        )  # fmt: skip
        return (stats, grad_hidden_TD[:, :width] if gradient else None), grad_head_VD

    most = blocks.tokens * (CALLS if train_head else 1)
    out, grad_head_VD = token_blocks.walk(sweep, (hidden, inputs), live_T, most)
    return out, None if grad_head_VD is None else grad_head_VD[:, :width]


def _pad_width(x: jax.Array, lanes: int) -> jax.Array:
    """Appends zeros along the last axis, up to a multiple of `lanes`: they change no product."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % lanes))) if x.shape[1] % lanes else x
