"""The rollouts of a step: completions of the student, sampled and graded.

All methods that sample rollouts use this file. The completions of a problem form a group. If a
problem occurs twice in a step, each occurrence has a group of its own.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from copsd_jax.model import shared_prefix
from copsd_jax.problems import problem_row
from copsd_jax.rewards import reward_functions
from copsd_jax.sampler import loop, request
from copsd_jax.teaching import prompts, token_spans
from copsd_jax.training import layout, loaded_run, train_step


class Rollouts(NamedTuple):
    """The B completions of a step, in the order of the batch.

    Attributes:
      rows: the problem of each completion.
      samples: the index of each completion among the completions of its problem, counted from 0.
      groups: the index of each completion's group. If a completion is dropped ('nonfinite' or
        'failed') or has no reward, it forms a group of its own with a negative index, so that it
        affects no other completion.
      asked: the student's prompt for each completion.
      completions: the sampled ids, with log-probabilities and the reason why sampling ended.
      decoded: the text of each completion without the end token, and the characters of each token.
      starts: for each text, the index at which the answer begins, after the thinking.
      verdicts: the verdict on each completion; None if the row has no gold answer, or if the
        completion is dropped.
      sampler: statistics of the sampler, such as the occupancy of its slots.
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
        """Returns the text of completion i without the thinking."""
        return self.decoded[i].text[self.starts[i] :].strip()

    def rewards(self) -> np.ndarray:
        """Returns the rewards, float64 [B]; the reward of an ungraded completion is 0."""
        return np.array([verdict.reward if verdict else 0.0 for verdict in self.verdicts])


class TrainStepInputs(NamedTuple):
    """The inputs of a train step, and the records and metrics that are known before the step.

    Attributes:
      batch: the layouts of both sides, with masks and advantages.
      student_prefix: int32 [P], the exemplars of the student's prompts, or None.
      teacher_kv: keys and values of the teacher's exemplars, one entry per policy of
        `train_step.list_teacher_mixture`, or None.
      records: one dictionary per completion.
      metrics: values of metrics by name.
    """

    batch: layout.Batch
    student_prefix: np.ndarray | None
    teacher_kv: tuple | None
    records: list[dict]
    metrics: dict[str, float]


def sample_rollouts(
    r: loaded_run.LoadedRun, state: train_step.State, rows: Sequence[problem_row.Row], step: int
) -> Rollouts:
    """Samples `rollout.per_prompt` completions per row from the student, and grades them.

    Args:
      r: the loaded run, with an open grader.
      state: the state with the student's weights.
      rows: the problems of the step. Completions of a row without a gold answer are not graded.
      step: number of the step, which selects the random stream.
    """
    plan, c = r.plan, r.plan.config
    repeated = [row for row in rows for _ in range(c.rollout.per_prompt)]
    samples = _number_samples(repeated)
    asked = [prompts.build_student_prompt(plan.tokenizer, plan.student, row) for row in repeated]
    keys = request.derive_sampling_keys(
        c.seed, "rollout", step, [row.id for row in repeated], samples
    )
    student = loaded_run.derive_run_policies(r, state)[0]
    sampled, stats = loaded_run.sample(r, student, asked, "rollout", keys)
    completions = [_clear_unknown_rollout_logps(completion) for completion in sampled]
    stops, pieces = set(plan.vocabulary.stop_ids), plan.vocabulary.token_bytes
    decoded = [
        token_spans.decode_tokens([i for i in done.ids if i not in stops], pieces)
        for done in completions
    ]
    texts = [one.text for one in decoded]
    kept = [not completion.dropped for completion in completions]
    graded = [i for i, row in enumerate(repeated) if row.answer and kept[i]]
    verdicts = loaded_run.grade_completions(
        r, [repeated[i].answer for i in graded], [asked[i] for i in graded],
        [texts[i] for i in graded],
    )  # fmt: skip
    found = dict(zip(graded, verdicts, strict=True))
    unrewarded = {
        i for i, verdict in found.items() if reward_functions.lacks_reward(verdict.status)
    }
    groups = [
        i // c.rollout.per_prompt if one and i not in unrewarded else -1 - i
        for i, one in enumerate(kept)
    ]
    return Rollouts(
        repeated, samples, groups, asked, completions, decoded,
        starts=list(map(prompts.find_answer_start, asked, texts)),
        verdicts=[found.get(i) for i in range(len(kept))], sampler=stats,
    )  # fmt: skip


def _clear_unknown_rollout_logps(completion: loop.Completion) -> loop.Completion:
    """Replaces log-probabilities that are NaN with empty arrays.

    NaN means that a server returned no log-probabilities. JSON has no NaN, but it has empty arrays,
    so records contain [] instead of NaN. In a batch, an empty array becomes a row of zeros
    (`layout.pad_rows`). If a server returns no log-probabilities, `make_plan` refuses losses that
    need log-probabilities, so no loss reads this row of zeros. In a batch, a NaN would spread: NaN
    times a weight of 0 is NaN.
    """
    known = lambda values: values[:0] if np.isnan(values).any() else values  # noqa: E731
    logps, truncated = known(completion.logps), known(completion.logps_truncated)
    return dataclasses.replace(completion, logps=logps, logps_truncated=truncated)


def _number_samples(rows: Sequence[problem_row.Row]) -> list[int]:
    """Counts the earlier occurrences of each row, so that no random stream is used twice."""
    seen: collections.defaultdict[str, Iterator[int]] = collections.defaultdict(itertools.count)
    return [next(seen[row.id]) for row in rows]


def encode_training_prefixes(
    r: loaded_run.LoadedRun, state: train_step.State, asked: prompts.Prompt,
    told: prompts.Prompt | None,
) -> tuple[np.ndarray | None, tuple | None]:  # fmt: skip
    """Returns the shared prefixes (the exemplars) of the student's and the teacher's prompts.

    Args:
      r: the loaded run.
      state: the state with the weights of the teacher's policies.
      asked: a prompt of the student.
      told: a prompt of the teacher; None if there is no teacher.

    Returns:
      The student's prefix as ids, int32 [P], and the teacher's prefix as a tuple that contains the
      keys and values [layers, 1, P, K, H] of each teacher policy. For a side without exemplars, the
      prefix is None.
    """
    student = np.asarray(asked.prefix_ids, np.int32) if asked.prefix_ids else None
    if told is None or not told.prefix_ids:
        return student, None
    if r.teacher_kv is not None:
        return student, r.teacher_kv
    kvs = tuple(
        shared_prefix.encode_prefix_ids(r.decoder, policy, told.prefix_ids)
        for _, policy in loaded_run.list_run_teacher_mixture(r, state)
    )
    return student, kvs
