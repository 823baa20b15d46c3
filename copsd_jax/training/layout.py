"""Two sequence layouts of one rollout, and the only index arithmetic of the trainer.

A sample is a student prompt, a teacher prompt and one completion. Each side puts the completion
directly behind its own prompt, without a gap. The completion's tokens therefore have different
positions on the two sides. `gather_BC` gives, for each completion token, the index of the position
that predicts it. From the gather on, both sides have equal shapes [B, C].

    student prompt a b        teacher prompt u v w x      completion 7 8 9

    student row    a b 7 8 9 .     teacher row    u v w x 7 8 9 .
    index          0 1 2 3 4 5     index          0 1 2 3 4 5 6 7
    segment        1 1 1 1 1 0     segment        1 1 1 1 1 1 1 0
    gather           1 2 3         gather               3 4 5
    predicts         7 8 9         predicts             7 8 9

The gather index is flat into rows x length. Masks come from lengths, never from token values, so a
completion's end token counts even if it equals the padding token. With a shared prefix of P tokens
(worked examples), positions begin at P; the prefix itself is in no row.

`pack_rows` puts several samples into a row, as a `row_packing.RowPlan` says, and cuts the batch
into micro-batches. If completions in one row share a prompt, the row holds the prompt once, and its
segment is the parent of theirs:

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

Array = Any  # np.ndarray from `build_batch`, jax.Array inside a step


class Side(NamedTuple):
    """One layout: the rows of one side, and the gather index of its completion tokens.

    All arrays are int32. A batch that is not packed has [B, L] rows and a [B, C] index. A packed
    batch has [U, rows, L] rows and a [U, shards, T] index, for U micro-batches whose rows are
    `shards` equal parts. The index of a part points into the part's own rows.

    Attributes:
      tokens_BL: token ids, 0 in padding.
      positions_BL: position of each token in its text, the shared prefix included.
      segments_BL: segment of each token, numbered from 1 in each row; 0 is padding.
      gather_BC: index of the position that predicts each completion token, flat in rows x length.
      parents_BL: segment of the token's prompt, -1 for none; None if prompts are not shared.
    """

    tokens_BL: Array
    positions_BL: Array
    segments_BL: Array
    gather_BC: Array
    parents_BL: Array = None


class Batch(NamedTuple):
    """Both layouts of B completions, with the inputs of the losses for each token.

    Attributes:
      student: the student's layout.
      teacher: the teacher's layout; None for losses without a teacher.
      completion_BC: int32 token ids.
      mask_BC: bool, from lengths: True at tokens, False at padding.
      loss_BC: bool, tokens with distillation loss; within `mask_BC`.
      policy_BC: bool, tokens with policy loss, within `mask_BC`; None for losses without one.
      advantage_BC: float32, the advantage in the policy loss; None as above.
      logp_rollout_BC: float32, each token's log-probability in nats, as the sampler found it at the
        sampling temperature; None if nothing was sampled.
      source_UST: int32 [U, shards, T], of a packed batch: the flat index in B x C of the token at
        each place, and B x C at a place without one. None if not packed. The arrays above stay as
        they were sampled, [B, C].
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


def pad_length(length: int) -> int:
    """Returns the padded length for `length` tokens.

    The sizes are few, so that programs are few: multiples of 32 up to 256, 64 up to 512, 128 up to
    2,048, and 512 beyond. From 128 tokens on, padding adds at most a quarter.
    """
    step = 32 if length <= 256 else 64 if length <= 512 else 128 if length <= 2048 else 512
    return max(step, -(-length // step) * step)


def _side(prompts, completions, prefix: int, C: int) -> Side:
    """Builds the layout of one side, one sample per row."""
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    B, L = len(prompts), pad_length(max(lengths))
    tokens_BL, segments_BL = np.zeros((2, B, L), np.int32)
    gather_BC = np.zeros((B, C), np.int32)
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not prompt:
            raise ValueError(f"sample {b} has an empty prompt: its first token has no predictor")
        tokens_BL[b, : lengths[b]] = [*prompt, *completion]
        segments_BL[b, : lengths[b]] = 1
        # Completion token t stands at len(prompt) + t and is predicted one position before.
        gather_BC[b, : len(completion)] = b * L + len(prompt) - 1 + np.arange(len(completion))
        # Padding has weight 0, so any position of the row will do.
        gather_BC[b, len(completion) :] = b * L
    positions_BL = np.broadcast_to(prefix + np.arange(L, dtype=np.int32), (B, L)).copy()
    return Side(tokens_BL, positions_BL, segments_BL, gather_BC)


def pad_rows(values: Sequence[Any], C: int, dtype: Any) -> np.ndarray:
    """Pads lists of different lengths with 0 to the rows of an array [B, C]."""
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

    Every token carries distillation loss until `loss_BC` is replaced. Without teacher prompts there
    is one layout, and no token carries distillation loss.

    Args:
      student_prompts: token ids of B prompts, without the shared prefix.
      teacher_prompts: the teacher's, likewise; None for losses without a teacher.
      completions: token ids of B completions.
      student_prefix: tokens of the prefix that all student prompts share.
      teacher_prefix: tokens of the prefix that all teacher prompts share.

    Raises:
      ValueError: if the lists differ in length or a prompt is empty.
    """
    taught = student_prompts if teacher_prompts is None else teacher_prompts
    if not len(student_prompts) == len(taught) == len(completions):
        raise ValueError(
            f"{len(student_prompts)} student prompts, {len(taught)} teacher prompts, "
            f"{len(completions)} completions: the numbers must be equal"
        )
    C = pad_length(max((len(c) for c in completions), default=1))
    mask_BC = pad_rows([[True] * len(completion) for completion in completions], C, bool)
    return Batch(
        student=_side(student_prompts, completions, student_prefix, C),
        teacher=_side(teacher_prompts, completions, teacher_prefix, C) if teacher_prompts else None,
        completion_BC=pad_rows(completions, C, np.int32),
        mask_BC=mask_BC,
        loss_BC=mask_BC if teacher_prompts else np.zeros_like(mask_BC),
    )


def measure_fill(batch: Batch) -> dict[str, float]:
    """Measures the share of row tokens that are not padding.

    Returns:
      The metrics `fill_student` and `fill_teacher`, between 0 and 1, for the sides that exist. A
      packed batch also has `micro_batches`, the number of its micro-batches.
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

    The mesh's batch axes split the rows. In a packed batch, the index of a bin is on the devices
    that have its rows, and the arrays of completions are whole on every device.
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
    """Places a batch on the mesh, from arrays that every process has."""
    return jax.tree.map(sharding.shard_array, batch, batch_shardings(batch, where))


# --- several samples in a row -----------------------------------------------------------------


def measure_prompts(batch: Batch, shared: bool) -> tuple[list[int], list[row_packing.Prompts]]:
    """Measures completions and prompts, as `row_packing.plan_rows` takes them.

    Args:
      batch: a batch of `build_batch`.
      shared: whether prompts with equal tokens form one family. Otherwise each is its own.

    Returns:
      The lengths of the completions, in tokens, and the prompts of each side that exists, the
      student's first.
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
    """Packs the samples of a batch into rows and micro-batches, as planned.

    Args:
      batch: a batch of `build_batch`.
      plan: the plan for its lengths.
      shared: as in the call of `measure_prompts` from which the plan was made.

    Returns:
      The packed batch. Its layouts and `source_UST` have the shapes of `Side` and `Batch`.
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
        _rows(side, own_B, one.prompts_B, start_B, plan, k, shared)
        for k, (side, one) in enumerate(pairs)
    ]
    return batch._replace(
        student=sides[0],
        teacher=sides[1] if len(sides) > 1 else None,
        source_UST=source_US.reshape(plan.micros, plan.shards, -1),
    )


def _rows(
    side: Side, own_B: list[int], prompts_B: Sequence[int], start_B, plan: row_packing.RowPlan,
    k: int, shared: bool,
) -> Side:  # fmt: skip
    """Packs the rows of side k, [U, rows, L], with their gather index [U, shards, T].

    `start_B` is the place of a completion's first token among the completion tokens of its bin.
    """
    size, places = plan.sizes[k], plan.places[k]
    shape = (plan.micros * plan.shards, size.count, size.length)
    tokens, positions, segments = np.zeros((3, *shape), np.int32)
    out = (tokens, positions, segments, np.full(shape, -1, np.int32))
    # A place without a completion token may point at any position of its own part; the first one
    # of the part serves.
    parts = np.arange(len(tokens), dtype=np.int32) % plan.shards * size.tokens
    gather = np.repeat(parts[:, None], plan.sizes[0].tokens, axis=1)
    last = np.zeros(shape[:2], int)  # number of segments in each row so far
    known: dict[tuple[int, int, int], int] = {}  # (bin, row, begin) -> segment of that prompt
    for b, (own, prompt) in enumerate(zip(own_B, prompts_B, strict=True)):
        where, (row, begin, at) = plan.bin_B[b], places[b]
        if (where, row, begin) not in known:
            last[where, row] += 1
            known[where, row, begin] = last[where, row]
            _put(out, (where, row, begin), side, b, 0, prompt, last[where, row], -1)
        segment, parent = known[where, row, begin], -1
        if shared:
            last[where, row] += 1
            segment, parent = last[where, row], segment
        _put(out, (where, row, at), side, b, prompt, own, segment, parent)
        predicts = at - 1 + np.arange(own)
        # The last token of the prompt predicts the first completion token. A shared prompt need not
        # stand directly before it. The slice also covers an empty completion.
        predicts[:1] = begin + prompt - 1
        gather[where, start_B[b] : start_B[b] + own] = parts[where] + row * size.length + predicts
    tokens, positions, segments, parents = (x.reshape(plan.micros, -1, size.length) for x in out)
    gather = gather.reshape(plan.micros, plan.shards, -1)
    return Side(tokens, positions, segments, gather, parents if shared else None)


def _put(out: tuple, at: tuple, side: Side, b: int, first: int, n: int, segment, parent) -> None:
    """Copies n tokens of sample b, from `first` on, to (bin, row, index) `at`.

    `out` are the arrays of tokens, positions, segments and parents.
    """
    where, row, index = at
    here, part = (where, row, slice(index, index + n)), slice(first, first + n)
    values = (side.tokens_BL[b, part], side.positions_BL[b, part], segment, parent)
    for array, value in zip(out, values, strict=True):
        array[here] = value
