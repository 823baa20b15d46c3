"""The two sequence layouts of a rollout, and all of the trainer's index arithmetic.

A sample is a student prompt, a teacher prompt and one completion. On each side, the completion
follows the prompt of that side, without a gap. The completion's tokens therefore have different
positions on the two sides. `gather_BC` gives, for each completion token, the index of the position
that predicts the token. After the gather with `gather_BC`, the arrays of both sides have the same
shape, [B, C].

    student prompt a b        teacher prompt u v w x      completion 7 8 9

    student row    a b 7 8 9 .     teacher row    u v w x 7 8 9 .
    index          0 1 2 3 4 5     index          0 1 2 3 4 5 6 7
    segment        1 1 1 1 1 0     segment        1 1 1 1 1 1 1 0
    gather           1 2 3         gather               3 4 5
    predicts         7 8 9         predicts             7 8 9

A gather index is an index into all rows of one side, flattened to one axis. Masks are computed from
lengths, never from token values. The mask includes the end token of a completion even if this token
has the same id as padding. If prompts share a prefix, such as the worked examples, the rows do not
contain this prefix, and positions begin at P, the length of the prefix.

`pack_rows` puts several samples into each row and cuts the batch into micro-batches, according to a
`row_packing.RowPlan`. If completions in one row share a prompt, the row contains the prompt only
once. The segment of a prompt is the parent of the segments of its completions:

    prompt a b, completions 7 8 9 and 6;  prompt u, completion 5 4

    row       a b 7 8 9 6 u 5 4 . . .
    position  0 1 2 3 4 2 0 1 2
    segment   1 1 2 2 2 3 4 5 5 0 0 0
    parent    - - 1 1 1 1 - 4 4 - - -
    gather    1 2 3 1 6 7              of the tokens 7 8 9 6 5 4, packed without gaps
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from copsd_jax.runtime import sharding
from copsd_jax.training import row_packing

Array = Any  # an np.ndarray from `build_batch`, or a jax.Array inside a step


class Side(NamedTuple):
    """The layout of one side: its rows, and the gather index of each completion token.

    All arrays are int32. In an unpacked batch, the rows have the shape [B, L], and `gather_BC` has
    the shape [B, C]. In a packed batch of U micro-batches, the rows have the shape [U, rows, L],
    and `gather_BC` has the shape [U, shards, T]. The rows of a micro-batch are divided into
    `shards` equal parts. The gather indices of each part point only into the rows of that part.

    Attributes:
      tokens_BL: token ids, 0 in padding.
      positions_BL: position of each token in its text, counted from the start of the shared prefix.
      segments_BL: segment of each token, numbered from 1 in each row; 0 is padding.
      gather_BC: for each completion token, the position that predicts the token. The position is an
        index into the rows flattened to one axis.
      parents_BL: for each completion token, the segment of its prompt; -1 for all other tokens.
        `parents_BL` is None if prompts are not shared.
    """

    tokens_BL: Array
    positions_BL: Array
    segments_BL: Array
    gather_BC: Array
    parents_BL: Array = None


class Batch(NamedTuple):
    """The two layouts of B completions, and the per-token inputs of the losses.

    Attributes:
      student: the student's layout.
      teacher: the teacher's layout; None for losses without a teacher.
      completion_BC: int32 token ids.
      mask_BC: bool, True at tokens and False at padding; computed from lengths.
      loss_BC: bool, True at tokens with distillation loss, a subset of `mask_BC`.
      policy_BC: bool, True at tokens with policy loss, a subset of `mask_BC`; None if the run has
        no policy loss.
      advantage_BC: float32, the advantage in the policy loss; None if `policy_BC` is None.
      logp_rollout_BC: float32, each token's log-probability in nats, as the sampler computed it at
        the sampling temperature; None if nothing was sampled.
      source_UST: int32 [U, shards, T] in a packed batch, else None. For each packed position,
        `source_UST` gives the index of the token in the flattened [B, C] arrays, or B * C if the
        position has no token. Packing leaves the arrays of shape [B, C] unchanged.
    """

    student: Side
    teacher: Side | None
    completion_BC: Array
    mask_BC: Array
    loss_BC: Array
    policy_BC: Array = None
    advantage_BC: Array = None
    logp_rollout_BC: Array = None
    source_UST: Array = None


def pad_row_length(length: int) -> int:
    """Returns the padded length for `length` tokens.

    Padded lengths are multiples of 32 up to 256, of 64 up to 512, of 128 up to 2,048, and of 512
    beyond. Because only a few padded lengths occur, few programs are compiled. For 128 tokens or
    more, padding adds at most a quarter to the length.
    """
    step = 32 if length <= 256 else 64 if length <= 512 else 128 if length <= 2048 else 512
    return max(step, -(-length // step) * step)


def _lay_out_side(prompts, completions, prefix: int, C: int) -> Side:
    """Builds the layout of one side, one sample per row."""
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    B, L = len(prompts), pad_row_length(max(lengths))
    tokens_BL, segments_BL = np.zeros((2, B, L), np.int32)
    gather_BC = np.zeros((B, C), np.int32)
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not prompt:
            raise ValueError(f"sample {b} has an empty prompt, so nothing predicts the first token")
        tokens_BL[b, : lengths[b]] = [*prompt, *completion]
        segments_BL[b, : lengths[b]] = 1
        # Completion token t, at index len(prompt) + t, is predicted at index len(prompt) + t - 1.
        gather_BC[b, : len(completion)] = b * L + len(prompt) - 1 + np.arange(len(completion))
        # Padding has weight 0, so the gather index of padding may point at any position of the row.
        gather_BC[b, len(completion) :] = b * L
    positions_BL = np.broadcast_to(prefix + np.arange(L, dtype=np.int32), (B, L)).copy()
    return Side(tokens_BL, positions_BL, segments_BL, gather_BC)


def pad_rows(values: Sequence[Any], C: int, dtype: Any) -> np.ndarray:
    """Returns an array [B, C] whose rows are the given lists, padded with 0."""
    out_BC = np.zeros((len(values), C), dtype)
    for b, row in enumerate(values):
        out_BC[b, : len(row)] = row
    return out_BC


def build_batch(
    student_prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[int]] | None,
    completions: Sequence[Sequence[int]],
    *,
    student_prefix: int = 0,
    teacher_prefix: int = 0,
) -> Batch:
    """Builds both layouts of B samples, one sample per row, as NumPy arrays.

    Every completion token carries distillation loss unless the caller replaces `loss_BC`. Without
    teacher prompts, the batch has only the student's layout, and no token carries distillation
    loss.

    Args:
      student_prompts: token ids of B student prompts, without the shared prefix.
      teacher_prompts: token ids of B teacher prompts, without their shared prefix; None for losses
        without a teacher.
      completions: token ids of B completions.
      student_prefix: number of tokens in the prefix that all student prompts share.
      teacher_prefix: number of tokens in the prefix that all teacher prompts share.

    Raises:
      ValueError: the lists differ in length, or a prompt is empty.
    """
    taught = student_prompts if teacher_prompts is None else teacher_prompts
    if not len(student_prompts) == len(taught) == len(completions):
        raise ValueError(
            f"{len(student_prompts)} student prompts, {len(taught)} teacher prompts, "
            f"{len(completions)} completions: the numbers must be equal"
        )
    C = pad_row_length(max((len(c) for c in completions), default=1))
    mask_BC = pad_rows([[True] * len(completion) for completion in completions], C, bool)
    return Batch(
        student=_lay_out_side(student_prompts, completions, student_prefix, C),
        teacher=_lay_out_side(teacher_prompts, completions, teacher_prefix, C)
        if teacher_prompts
        else None,
        completion_BC=pad_rows(completions, C, np.int32),
        mask_BC=mask_BC,
        loss_BC=mask_BC if teacher_prompts else np.zeros_like(mask_BC),
    )


def measure_fill(batch: Batch) -> dict[str, float]:
    """Measures the share of row positions that hold a token instead of padding.

    Returns:
      The metric `fill_student` and, if there is a teacher, `fill_teacher`; the values are between 0
      and 1. For a packed batch, the metric `micro_batches` is the number of micro-batches.
    """
    out = {}
    for name, side in (("fill_student", batch.student), ("fill_teacher", batch.teacher)):
        if side is not None:
            out[name] = float(np.count_nonzero(side.segments_BL) / side.segments_BL.size)
    if batch.source_UST is not None:
        out["micro_batches"] = float(len(batch.source_UST))
    return out


def batch_shardings(batch: Batch, where: Mesh) -> Batch:
    """Returns the sharding of each array of a batch, as a Batch.

    The rows are split over the mesh's batch axes. In a packed batch, the gather indices of a bin
    are on the devices that hold the bin's rows. The [B, C] arrays of a packed batch are replicated
    to every device.
    """
    whole = NamedSharding(where, PartitionSpec())
    if batch.source_UST is None:
        rows = NamedSharding(where, PartitionSpec(sharding.BATCH_AXES))
        return jax.tree.map(lambda _: rows, batch)
    rows = NamedSharding(where, PartitionSpec(None, sharding.BATCH_AXES))
    student, teacher = jax.tree.map(lambda _: rows, (batch.student, batch.teacher))
    rest = jax.tree.map(lambda _: whole, batch)
    return rest._replace(student=student, teacher=teacher, source_UST=rows)


def place_batch(batch: Batch, where: Mesh) -> Batch:
    """Places a batch on the mesh; every process must call `place_batch` with the whole batch."""
    return jax.tree.map(sharding.shard_array, batch, batch_shardings(batch, where))


# --- several samples in a row -----------------------------------------------------------------


def measure_prompts(batch: Batch, shared: bool) -> tuple[list[int], list[row_packing.Prompts]]:
    """Measures the lengths of completions and prompts, for `row_packing.plan_rows`.

    Args:
      batch: a batch from `build_batch`.
      shared: whether prompts with equal tokens form one family. If `shared` is False, each prompt
        is a family of its own.

    Returns:
      The lengths of the completions in tokens, and a list with one `Prompts` for each side.
    """
    own_B = batch.mask_BC.sum(axis=1).tolist()
    found = []
    for side in filter(None, (batch.student, batch.teacher)):
        prompts_B = ((side.segments_BL > 0).sum(axis=1) - own_B).tolist()
        known: dict[bytes, int] = {}
        families_B = list(range(len(own_B)))
        if shared:
            ids = (side.tokens_BL[b, :length].tobytes() for b, length in enumerate(prompts_B))
            families_B = [known.setdefault(prompt, b) for b, prompt in enumerate(ids)]
        found.append(row_packing.Prompts(prompts_B, families_B))
    return own_B, found


def pack_rows(batch: Batch, plan: row_packing.RowPlan, shared: bool) -> Batch:
    """Packs the samples of a batch into rows and micro-batches, according to a plan.

    Args:
      batch: a batch from `build_batch`.
      plan: the plan that was made from the batch's lengths.
      shared: whether each prompt is a segment of its own, which several completions can share.

    Returns:
      The packed batch, with the shapes that `Side` and `Batch` state for packed batches.
    """
    B, C = batch.mask_BC.shape
    own_B, prompts = measure_prompts(batch, shared)
    source_US = np.full((plan.micros * plan.shards, plan.sizes[0].tokens), B * C, np.int32)
    used, start_B = np.zeros(len(source_US), int), np.zeros(B, int)
    for b, own in enumerate(own_B):
        where = plan.bin_B[b]
        start_B[b] = used[where]
        source_US[where, used[where] : used[where] + own] = b * C + np.arange(own)
        used[where] += own
    pairs = zip(filter(None, (batch.student, batch.teacher)), prompts, strict=True)
    sides = [
        _pack_side_rows(side, own_B, one.prompts_B, start_B, plan, k, shared)
        for k, (side, one) in enumerate(pairs)
    ]
    return batch._replace(
        student=sides[0],
        teacher=sides[1] if len(sides) > 1 else None,
        source_UST=source_US.reshape(plan.micros, plan.shards, -1),
    )


def _pack_side_rows(
    side: Side, own_B: list[int], prompts_B: Sequence[int], start_B, plan: row_packing.RowPlan,
    k: int, shared: bool,
) -> Side:  # fmt: skip
    """Returns the packed layout of side k, with the shapes that `Side` states for packed batches.

    `start_B` gives the index of each completion's first token among the completion tokens of the
    bin.
    """
    size, places = plan.sizes[k], plan.places[k]
    shape = (plan.micros * plan.shards, size.count, size.length)
    tokens, positions, segments = np.zeros((3, *shape), np.int32)
    out = (tokens, positions, segments, np.full(shape, -1, np.int32))
    # A gather index without a completion token may point at any position of its own part. Unused
    # gather indices point at the first position of their part.
    parts = np.arange(len(tokens), dtype=np.int32) % plan.shards * size.tokens
    gather = np.repeat(parts[:, None], plan.sizes[0].tokens, axis=1)
    last = np.zeros(shape[:2], int)  # number of segments in each row so far
    known: dict[tuple[int, int, int], int] = {}  # (bin, row, prompt start) -> segment of the prompt
    for b, (own, prompt) in enumerate(zip(own_B, prompts_B, strict=True)):
        where, (row, begin, at) = plan.bin_B[b], places[b]
        if (where, row, begin) not in known:
            last[where, row] += 1
            known[where, row, begin] = last[where, row]
            _copy_sample_to_row(out, (where, row, begin), side, b, 0, prompt, last[where, row], -1)
        segment, parent = known[where, row, begin], -1
        if shared:
            last[where, row] += 1
            segment, parent = last[where, row], segment
        _copy_sample_to_row(out, (where, row, at), side, b, prompt, own, segment, parent)
        predicts = at - 1 + np.arange(own)
        # The last token of the prompt predicts the first completion token. A shared prompt is not
        # always directly before the completion. For an empty completion, the slice `[:1]` is empty,
        # so nothing is assigned.
        predicts[:1] = begin + prompt - 1
        gather[where, start_B[b] : start_B[b] + own] = parts[where] + row * size.length + predicts
    tokens, positions, segments, parents = (x.reshape(plan.micros, -1, size.length) for x in out)
    gather = gather.reshape(plan.micros, plan.shards, -1)
    return Side(tokens, positions, segments, gather, parents if shared else None)


def _copy_sample_to_row(
    out: tuple, at: tuple, side: Side, b: int, first: int, n: int, segment, parent
) -> None:
    """Copies n tokens of sample b, starting at `first`, to the bin, row and index given by `at`.

    `out` holds the arrays of tokens, positions, segments and parents.
    """
    where, row, index = at
    here, part = (where, row, slice(index, index + n)), slice(first, first + n)
    values = (side.tokens_BL[b, part], side.positions_BL[b, part], segment, parent)
    for array, value in zip(out, values, strict=True):
        array[here] = value
