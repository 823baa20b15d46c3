"""The student's answers to a step's problems: sampled, graded, and recorded.

What all methods that sample share. A group is the completions of one occurrence of a problem.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from copsd_jax.model import policy as policy_lib
from copsd_jax.problems import problem_row
from copsd_jax.rewards import reward_functions
from copsd_jax.sampler import loop, request
from copsd_jax.teaching import prompts, token_spans
from copsd_jax.training import layout, loaded_run, train_step


class Rollouts(NamedTuple):
    """B completions of a step, in the order of the batch.

    Attributes:
      groups: of each completion the number of its group.
      decoded: the completions as text with the characters of each token, without the end token.
      starts: where in that text the answer begins, behind the thinking.
      verdicts: None where a row has no gold answer.
      sampler: how busy it kept the device.
    """

    rows: list[problem_row.Row]
    samples: list[int]
    groups: list[int]
    asked: list[prompts.Prompt]
    completions: list[loop.Completion]
    decoded: list[token_spans.Decoded]
    starts: list[int]
    verdicts: list[reward_functions.Verdict | None]
    sampler: loop.Stats

    def answer(self, i: int) -> str:
        """The text of completion i without its thinking."""
        return self.decoded[i].text[self.starts[i] :].strip()

    def rewards(self) -> np.ndarray:
        """float64 [B]; 0 where nothing is graded."""
        return np.array([verdict.reward if verdict else 0.0 for verdict in self.verdicts])


class StepInputs(NamedTuple):
    """What a step trains on, and what is known of it before the step."""

    batch: layout.Batch
    student_prefix: np.ndarray | None  # int32 [P]
    teacher_kv: tuple | None  # model.KV of each of train_step.teachers
    records: list[dict]  # one a completion
    metrics: dict[str, float]


def sample_rollouts(
    r: loaded_run.LoadedRun, policy: policy_lib.Policy, rows: Sequence[problem_row.Row], step: int
) -> Rollouts:  # fmt: skip
    """Samples rollout.per_prompt completions of each row under a policy, and grades them."""
    plan, c = r.plan, r.plan.config
    repeated, samples = _repeat(rows, c.rollout.per_prompt)
    asked = [prompts.build_student_prompt(plan.tokenizer, plan.student, row) for row in repeated]
    keys = request.derive_keys(c.seed, "rollout", step, [row.id for row in repeated], samples)
    sampled, stats = loaded_run.sample(r, policy, asked, "rollout", keys)
    completions = [_known(completion) for completion in sampled]
    stops, pieces = set(plan.vocabulary.stop_ids), plan.vocabulary.token_bytes
    decoded = [
        token_spans.decode_tokens([i for i in done.ids if i not in stops], pieces)
        for done in completions
    ]
    starts = [
        find_answer_start(prompt, text.text) for prompt, text in zip(asked, decoded, strict=True)
    ]
    graded = [i for i, row in enumerate(repeated) if row.answer]
    verdicts = loaded_run.grade_completions(
        r, [repeated[i].answer for i in graded], [asked[i] for i in graded],
        [decoded[i].text for i in graded],
    )  # fmt: skip
    found = dict(zip(graded, verdicts, strict=True))
    return Rollouts(
        rows=repeated,
        samples=samples,
        groups=[i // c.rollout.per_prompt for i in range(len(repeated))],
        asked=asked,
        completions=completions,
        decoded=decoded,
        starts=starts,
        verdicts=[found.get(i) for i in range(len(repeated))],
        sampler=stats,
    )


def _known(completion: loop.Completion) -> loop.Completion:
    """Log-probabilities that a server does not give, NaN, as empty arrays.

    A record then has [], which JSON has too, and a batch 0 (`layout.pad_rows`). Nothing reads
    that 0: losses that would are refused (`make_plan`). But a NaN times a weight of 0 is NaN.
    """
    known = lambda values: values[:0] if np.isnan(values).any() else values  # noqa: E731
    return dataclasses.replace(
        completion,
        logps=known(completion.logps),
        logps_truncated=known(completion.logps_truncated),
    )


def _repeat(
    rows: Sequence[problem_row.Row], per_prompt: int
) -> tuple[list[problem_row.Row], list[int]]:
    """Each row G times, with its sample numbers; a row that occurs twice goes on counting."""
    seen: collections.Counter[str] = collections.Counter()
    repeated, samples = [], []
    for row in rows:
        for _ in range(per_prompt):
            repeated.append(row)
            samples.append(seen[row.id])
            seen[row.id] += 1
    return repeated, samples


def find_answer_start(prompt: prompts.Prompt, text: str) -> int:
    """Where the answer begins: behind the last </think>; at the end of a text that thinks on."""
    closed = text.rfind("</think>")
    opened = text.rfind("<think>")
    if opened > closed or (closed < 0 and prompt.state == "open"):
        return len(text)
    return closed + len("</think>") if closed >= 0 else 0


def encode_prefixes(
    r: loaded_run.LoadedRun,
    state: train_step.State,
    asked: prompts.Prompt,
    told: prompts.Prompt | None,
) -> tuple[np.ndarray | None, tuple | None]:
    """The student's shared tokens, and the keys of the teacher's under each of its policies."""
    student = np.asarray(asked.prefix_ids, np.int32) if asked.prefix_ids else None
    if told is None or not told.prefix_ids:
        return student, None
    if r.teacher_kv is not None:
        return student, r.teacher_kv
    kvs = tuple(
        loaded_run.encode_prefix(r, policy, told.prefix_ids)
        for _, policy in loaded_run.teacher_mixture(r, state)
    )
    return student, kvs
