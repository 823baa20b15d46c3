"""Two sequence layouts of one rollout, and the only index arithmetic of the trainer.

A sample is a student prompt, a teacher prompt and one completion. Both sides put the completion
right behind their own prompt, without a gap, so its tokens stand at other positions on each side;
`gather_BC` says for each completion token which position predicts it. From the gather on, both
sides have equal shapes `[B, C]`.

    student prompt a b        teacher prompt u v w x      completion 7 8 9

    student row    a b 7 8 9 .     teacher row    u v w x 7 8 9 .
    index          0 1 2 3 4 5     index          0 1 2 3 4 5 6 7
    segment        1 1 1 1 1 0     segment        1 1 1 1 1 1 1 0
    gather           1 2 3         gather               3 4 5
    predicts         7 8 9         predicts             7 8 9

The gather index is flat into rows x length. Masks come from lengths, never from token values, so a
completion's end token counts even where it equals the padding token. With a shared prefix of P
tokens (worked examples), positions begin at P; the prefix itself is in no row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any  # np.ndarray from `pack`, jax.Array inside a step


class Side(NamedTuple):
    """One layout. All int32: [B, L] tokens, positions and segments (0 is padding), [B, C] index."""

    tokens_BL: Array
    positions_BL: Array
    segments_BL: Array
    gather_BC: Array


class Batch(NamedTuple):
    """Both layouts of B completions, and what the losses need of their tokens.

    Attributes:
      teacher: None for losses without a teacher.
      completion_BC: int32, the tokens.
      mask_BC: bool, from lengths: where a token is.
      loss_BC: bool, tokens with distillation loss; within `mask_BC`.
      policy_BC: bool, tokens with policy loss, within `mask_BC`; None for losses without one.
      advantage_BC: float32, of the policy loss; None as above.
      logp_rollout_BC: float32, what the sampler found for each token at the sampling temperature,
        or None where nothing was sampled.
    """

    student: Side
    teacher: Side | None
    completion_BC: Array
    mask_BC: Array
    loss_BC: Array
    policy_BC: Array = None
    advantage_BC: Array = None
    logp_rollout_BC: Array = None


def bucket(length: int) -> int:
    """The padded length for `length` tokens: few distinct sizes, hence few compilations.

    Multiples of 32 up to 256, 64 up to 512, 128 up to 2,048, 512 beyond: from 128 tokens on,
    padding adds at most a quarter.
    """
    step = 32 if length <= 256 else 64 if length <= 512 else 128 if length <= 2048 else 512
    return max(step, -(-length // step) * step)


def _side(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], prefix: int, C: int
) -> Side:
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    B, L = len(prompts), bucket(max(lengths))
    tokens_BL = np.zeros((B, L), np.int32)
    segments_BL = np.zeros((B, L), np.int32)
    gather_BC = np.zeros((B, C), np.int32)
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not prompt:
            raise ValueError(f"sample {b} has an empty prompt: its first token has no predictor")
        tokens_BL[b, : lengths[b]] = [*prompt, *completion]
        segments_BL[b, : lengths[b]] = 1
        # Completion token t stands at len(prompt) + t and is predicted one position before.
        gather_BC[b, : len(completion)] = b * L + len(prompt) - 1 + np.arange(len(completion))
        gather_BC[b, len(completion) :] = b * L  # weight 0: any position of the row will do
    positions_BL = np.broadcast_to(prefix + np.arange(L, dtype=np.int32), (B, L)).copy()
    return Side(tokens_BL, positions_BL, segments_BL, gather_BC)


def per_token(values: Sequence[Any], C: int, dtype: Any) -> np.ndarray:
    """Lists of different lengths as rows of [B, C], 0 behind their ends."""
    out_BC = np.zeros((len(values), C), dtype)
    for b, row in enumerate(values):
        out_BC[b, : len(row)] = row
    return out_BC


def pack(
    student_prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[int]] | None,
    completions: Sequence[Sequence[int]],
    *,
    student_prefix: int = 0,
    teacher_prefix: int = 0,
) -> Batch:
    """Both layouts of B samples; prompts without their shared prefixes, whose lengths are given.

    Without teacher prompts there is one layout. Every token carries distillation loss, until
    `loss_BC` is replaced.

    Raises:
      ValueError: if the lists differ in length or a prompt is empty.
    """
    taught = student_prompts if teacher_prompts is None else teacher_prompts
    if not len(student_prompts) == len(taught) == len(completions):
        raise ValueError(
            f"{len(student_prompts)} student prompts, {len(taught)} teacher prompts, "
            f"{len(completions)} completions: the numbers must be equal"
        )
    B, C = len(completions), bucket(max((len(c) for c in completions), default=1))
    mask_BC = per_token([[True] * len(completion) for completion in completions], C, bool)
    return Batch(
        student=_side(student_prompts, completions, student_prefix, C),
        teacher=None
        if teacher_prompts is None
        else _side(teacher_prompts, completions, teacher_prefix, C),
        completion_BC=per_token(completions, C, np.int32),
        mask_BC=mask_BC,
        loss_BC=mask_BC if teacher_prompts is not None else np.zeros((B, C), bool),
    )
