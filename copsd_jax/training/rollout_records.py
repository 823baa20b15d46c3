"""Builds the records of a step's completions, and computes metrics from these records."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from copsd_jax.metrics import token_stats
from copsd_jax.rewards import reward_functions
from copsd_jax.sampler import loop
from copsd_jax.teaching import solution_steps, token_spans
from copsd_jax.training import layout, loaded_run, train_step
from copsd_jax.training.rollouts import Rollouts, TrainStepInputs


def build_records(r: loaded_run.LoadedRun, done: Rollouts) -> list[dict]:
    """Builds the records of completions, which a run stores in the folder W/rollouts.

    A record is a dictionary. Each method adds its own fields to the records, and
    `add_rollout_token_values` adds per-token values.

    Args:
      r: the loaded run.
      done: the rollouts of the step, in the order of the records.
    """
    out = []
    for i, row in enumerate(done.rows):
        completion, verdict = done.completions[i], done.verdicts[i]
        ungraded = completion.finish if completion.dropped else "no_gold"
        known = verdict if done.groups[i] >= 0 else None  # None if the reward is unknown
        out.append(
            {
                "id": row.id,
                "lang": row.lang,
                "sample": done.samples[i],
                "problem": row.problem,
                "student_prompt": done.asked[i].text,
                "student_prompt_ids": [*done.asked[i].prefix_ids, *done.asked[i].ids],
                "completion": done.decoded[i].text,
                "completion_ids": list(completion.ids),
                "finish": completion.finish,
                "finish_detail": completion.detail,
                "logp_sampler": round_values(completion.logps),
                "logp_sampler_truncated": round_values(completion.logps_truncated),
                "gold": row.answer,
                "answer": verdict.answer if verdict else None,
                "correct": known.correct if known else None,
                "reward": known.reward if known else None,
                "feedback": verdict.feedback if verdict else None,
                "grade_status": verdict.status if verdict else ungraded,
                "grade_detail": verdict.detail if verdict else "",
                "steps": _record_step_spans(done.decoded[i], done.starts[i]),
            }
        )
    return out


def _record_step_spans(decoded: token_spans.Decoded, start: int) -> list[list[int]]:
    """Returns the token range [first, end) of each step of the answer."""
    return [
        list(token_spans.find_token_range(decoded, start + step.start, start + step.end))
        for step in solution_steps.split_steps(decoded.text[start:])
    ]


def round_values(values: Any) -> list[float]:
    """Rounds values to six decimals, the precision of records."""
    return [round(float(value), 6) for value in values]


def mean(values: Sequence[float]) -> float:
    """Returns the mean, or 0 if there are no values."""
    return float(np.mean(values)) if len(values) else 0.0


def measure_rollouts(made: list[dict], sampler: loop.Stats) -> dict[str, float]:
    """Computes the metrics of a step's rollouts.

    The metrics are means over the completions, counts of grading statuses, the sampler's seconds,
    and the share of slots that drew tokens while prompts waited.

    Args:
      made: the records of the step.
      sampler: the statistics of the sampler.

    Returns:
      The values of the metrics by name. `correct` and `reward` are absent if no completion is
      graded. `format` is absent if no grader looked for an answer, and `slot_occupancy` is absent
      if no prompt had to wait.
    """
    graded = [record for record in made if record["correct"] is not None]
    # The status "raised:KeyError" is counted as "raised"; records keep the exception's name.
    statuses = [record["grade_status"].partition(":")[0] for record in graded]
    every = [record["grade_status"].partition(":")[0] for record in made]
    unrewarded = filter(reward_functions.lacks_reward, every)
    # A user's reward function extracts no answer, so its verdicts say nothing about answer formats.
    formed = [
        record["answer"] is not None
        for record, status in zip(graded, statuses, strict=True)
        if status != "computed"
    ]
    return {
        "completion_tokens": mean([len(record["completion_ids"]) for record in made]),
        "truncated": mean([record["finish"] == "length" for record in made]),
        **count_rollout_statuses(
            "rollout", [x["finish"] for x in made if x["finish"] in loop.DROPPED], []
        ),
        "graded": float(len(graded)),
        # Without graded completions, `correct` and `reward` are absent, because 0 would look like a
        # result.
        **({"correct": mean([record["correct"] for record in graded])} if graded else {}),
        **({"reward": mean([record["reward"] for record in graded])} if graded else {}),
        **({"format": mean(formed)} if formed else {}),
        **count_rollout_statuses("grade", [*statuses, *unrewarded], []),
        # The slot occupancy is NaN if no prompt had to wait.
        **({} if math.isnan(sampler.occupancy) else {"slot_occupancy": sampler.occupancy}),
        "seconds/sampler": sampler.seconds,
    }


def count_rollout_statuses(
    name: str, statuses: Sequence[str], known: Sequence[str]
) -> dict[str, float]:
    """Returns the number of completions with each status, as metrics named `{name}_{status}`.

    Args:
      name: the prefix of the metrics.
      statuses: the status of each completion.
      known: statuses that are reported even if their count is 0.
    """
    found = collections.Counter(statuses)
    return {f"{name}_{status}": float(found[status]) for status in dict.fromkeys([*known, *found])}


def add_rollout_token_values(
    r: loaded_run.LoadedRun, work: TrainStepInputs, aux: train_step.Aux
) -> dict[str, float]:
    """Adds the step's per-token values to the records, and returns token metrics.

    In a record, `loss_mask` marks the tokens with divergence loss. `policy_mask` marks the tokens
    with policy loss or cross entropy.

    `logp_gap_mean` and `logp_gap_max` are the mean and the maximum of the tokens' gaps, in nats.
    The gap of a sampled token is |ln p in the sampler - ln p in the trainer|. The two probabilities
    in the gap are computed at the sampling temperature, over the whole vocabulary. If the run has a
    divergence, the gap metrics cover all tokens, with or without loss. If the run has no
    divergence, the gap metrics cover the completions that have policy loss. `logp_absent` is the
    share of completions for which the sampler returned no log-probabilities.

    Args:
      r: the loaded run.
      work: the inputs of the step; the values are added to `work.records`.
      aux: the results of the step, on the host.
    """
    gaps, mask_BC = [], work.batch.mask_BC
    for b, record in enumerate(work.records):
        n = int(mask_BC[b].sum())
        record["loss_mask"] = [0] * n
        logp_sampling = None
        if aux.tokens is not None:
            logp_sampling = aux.tokens.logp_sampling_T[b, :n]
            _record_rollout_divergence(r, record, work.batch, aux.tokens, b, n)
        if aux.policy is not None:
            record["policy_mask"] = [int(x) for x in work.batch.policy_BC[b, :n]]
            if any(record["policy_mask"]):
                logp_sampling = aux.policy.logp_T[b, :n]
                _record_rollout_policy(r, record, work.batch, aux.policy, b, n)
        if logp_sampling is not None and record.get("logp_sampler"):
            gaps.append(np.abs(logp_sampling - record["logp_sampler"][:n]))
    gap = np.concatenate(gaps) if gaps else np.zeros(0)
    values = token_stats.summary(work.records, r.token_classes)
    values |= _mean_ratios(work.records)
    if gap.size:
        values |= {"logp_gap_mean": float(gap.mean()), "logp_gap_max": float(gap.max())}
    absent = [x.get("logp_sampler") == [] and x["finish"] not in loop.DROPPED for x in work.records]
    if any(absent):
        values["logp_absent"] = mean(absent)
    return values


def _record_rollout_divergence(
    r, record: dict, batch: layout.Batch, tokens, b: int, n: int
) -> None:
    """Adds the student's values to a record, and the teacher's values if there is a teacher prompt.

    If loss.rollout_clip is above 0, the record gets `ratio`, the capped importance weight of each
    sampled token.
    """
    record["loss_mask"] = [int(x) for x in batch.loss_BC[b, :n]]
    record["logp_student"] = round_values(tokens.logp_student_T[b, :n])
    record["entropy_student"] = round_values(tokens.entropy_student_T[b, :n])
    if not record["taught"]:
        return
    record["divergence"] = round_values(tokens.value_T[b, :n])
    record["logp_teacher"] = round_values(tokens.logp_teacher_T[b, :n])
    record["entropy_teacher"] = round_values(tokens.entropy_teacher_T[b, :n])
    record["clipped_mass"] = round_values(tokens.clipped_mass_T[b, :n])
    if r.options.divergence and r.options.divergence.rollout_clip:
        record["ratio"] = round_values(tokens.ratio_T[b, :n])
    advantage = np.subtract(record["logp_teacher"], record["logp_student"]).tolist()
    record["advantage_by_step"] = token_stats.advantage_by_step(advantage, record["steps"])


def _record_rollout_policy(r, record: dict, batch: layout.Batch, policy, b: int, n: int) -> None:
    """Adds the values of the policy loss to a record; a cross entropy adds fewer values.

    If the loss compares trainer and sampler, the record gets `policy_ratio`: p(y) in the trainer
    divided by p(y) in the sampler, before any clip.
    """
    settings = r.options.policy
    record["policy_loss"] = round_values(policy.value_T[b, :n])
    record["logp_policy"] = round_values(policy.logp_T[b, :n])
    record["entropy_policy"] = round_values(policy.entropy_T[b, :n])
    if settings.kind == "nll":
        return
    record["advantage"] = float(batch.advantage_BC[b, 0])
    record["ratio_clipped"] = [int(x) for x in policy.clipped_T[b, :n]]
    if settings.kl:
        record["kl_initial"] = round_values(policy.kl_T[b, :n])
    if settings.old == "sampler" or settings.rollout_clip:
        # The ratio's logarithm is limited to [-20, 20], as in the loss (policy_loss.LOG_RATIO).
        log = np.clip(policy.logp_T[b, :n] - batch.logp_rollout_BC[b, :n], -20, 20)
        record["policy_ratio"] = round_values(np.exp(log))


def _mean_ratios(made: list[dict]) -> dict[str, float]:
    """Returns the mean of each ratio over the tokens that carry the corresponding loss."""
    out = {}
    for name, mask in (("ratio", "loss_mask"), ("policy_ratio", "policy_mask")):
        kept = [
            value
            for record in made
            for value, loss in zip(record.get(name, ()), record.get(mask, ()), strict=False)
            if loss
        ]
        out |= {name: mean(kept)} if kept else {}
    return out


OF_LOSS = ("divergence", "logp_student", "logp_teacher", "entropy_teacher", "clipped_mass")
OF_POLICY = ("policy_loss", "policy_entropy", "ratio_clipped", "kl_initial")


def drop_empty_means(
    policy: train_step.PolicyLoss | None, values: Mapping[str, Any]
) -> dict[str, float]:
    """Removes means over empty masks from a step's metrics; the step reports such means as 0.

    A mean is dropped if no token carries the loss to which the mean belongs. For a cross entropy,
    `ratio_clipped` is dropped. For a loss without the divergence from the initial policy,
    `kl_initial` is dropped.

    Args:
      policy: the settings of the policy loss; None if the run has no policy loss.
      values: the metrics of the step, as scalars.
    """
    numbers = {name: float(value) for name, value in values.items()}
    empty = {name for name in OF_LOSS if numbers.get("loss_tokens") == 0}
    empty |= {name for name in OF_POLICY if numbers.get("policy_tokens") == 0}
    if policy is not None:
        empty |= set() if policy.kl and policy.kind != "nll" else {"kl_initial"}
        empty |= {"ratio_clipped"} if policy.kind == "nll" else set()
    return {name: number for name, number in numbers.items() if name not in empty}
