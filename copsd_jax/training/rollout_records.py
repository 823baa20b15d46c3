"""Records of the completions of a step, and the metrics that follow from them."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from copsd_jax.metrics import token_stats
from copsd_jax.sampler import loop
from copsd_jax.teaching import solution_steps, token_spans
from copsd_jax.training import layout, loaded_run, train_step
from copsd_jax.training.rollouts import Rollouts, StepInputs


def build_records(r: loaded_run.LoadedRun, done: Rollouts) -> list[dict]:
    """One dictionary a completion, as written to W/rollouts; methods add theirs."""
    out = []
    for i, row in enumerate(done.rows):
        completion, verdict = done.completions[i], done.verdicts[i]
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
                "logp_sampler": round_values(completion.logps),
                "logp_sampler_truncated": round_values(completion.logps_truncated),
                "gold": row.answer,
                "answer": verdict.answer if verdict else None,
                "correct": verdict.correct if verdict else None,
                "reward": verdict.reward if verdict else None,
                "feedback": verdict.feedback if verdict else None,
                "grade_status": verdict.status if verdict else "no_gold",
                "steps": _step_spans(done.decoded[i], done.starts[i]),
            }
        )
    return out


def _step_spans(decoded: token_spans.Decoded, start: int) -> list[list[int]]:
    """The tokens [first, end) of each step of the answer."""
    known = solution_steps.split_steps(decoded.text[start:])
    return [
        list(token_spans.find_token_range(decoded, start + s.start, start + s.end)) for s in known
    ]


def round_values(values: Any) -> list[float]:
    """Six decimals, as records hold them."""
    return [round(float(value), 6) for value in values]


def mean(values: Sequence[float]) -> float:
    """0 for none."""
    return float(np.mean(values)) if len(values) else 0.0


def measure_rollouts(made: list[dict], sampler: loop.Stats) -> dict[str, float]:
    """Means over the step's completions, and how many were graded with which status; the sampler's
    speed, and the share of its slots that drew tokens while prompts were waiting."""
    graded = [record for record in made if record["correct"] is not None]
    # "raised:KeyError" is a "raised": the records know the exception.
    statuses = [record["grade_status"].partition(":")[0] for record in graded]
    # A function of the user's gives a reward, and finds no answer that could have a form.
    formed = [
        record["answer"] is not None
        for record, status in zip(graded, statuses, strict=True)
        if status not in ("computed", "raised")
    ]
    return {
        "completion_tokens": mean([len(record["completion_ids"]) for record in made]),
        "truncated": mean([record["finish"] == "length" for record in made]),
        "graded": float(len(graded)),
        # Without a gold answer nothing is said, rather than 0.
        **({"correct": mean([record["correct"] for record in graded])} if graded else {}),
        **({"reward": mean([record["reward"] for record in graded])} if graded else {}),
        **({"format": mean(formed)} if formed else {}),
        **count_statuses("grade", statuses, []),
        # Without a queue there is nothing to say of occupancy.
        **({} if math.isnan(sampler.occupancy) else {"slot_occupancy": sampler.occupancy}),
        "seconds/sampler": sampler.seconds,
    }


def count_statuses(name: str, statuses: Sequence[str], known: Sequence[str]) -> dict[str, float]:
    """`name_status`: how many completions have each status; known ones also where none has."""
    found = collections.Counter(statuses)
    return {f"{name}_{status}": float(found[status]) for status in dict.fromkeys([*known, *found])}


def add_token_values(
    r: loaded_run.LoadedRun, work: StepInputs, aux: train_step.Aux
) -> dict[str, float]:
    """Adds the step's per-token values to the records; returns metrics of tokens.

    `loss_mask` are the tokens of the divergence, `policy_mask` those of the policy loss or of the
    cross entropy. The gap is |log-probability of the drawn token in the sampler - in the trainer|,
    both at the sampling temperature over the whole vocabulary. It is taken of every token whose
    log-probability the step computed: with a divergence of all, with or without loss; otherwise of
    completions with policy loss. `logp_absent` is the share of completions without the sampler's.
    """
    gaps, mask_BC = [], work.batch.mask_BC
    for b, record in enumerate(work.records):
        n = int(mask_BC[b].sum())
        record["loss_mask"] = [0] * n
        logp_sampling = None
        if aux.tokens is not None:
            logp_sampling = aux.tokens.logp_sampling_T[b, :n]
            _add_divergence(r, record, work.batch, aux.tokens, b, n)
        if aux.policy is not None:
            record["policy_mask"] = [int(x) for x in work.batch.policy_BC[b, :n]]
            if any(record["policy_mask"]):
                logp_sampling = aux.policy.logp_T[b, :n]
                _add_policy(r, record, work.batch, aux.policy, b, n)
        if logp_sampling is not None and record.get("logp_sampler"):
            gaps.append(np.abs(logp_sampling - record["logp_sampler"][:n]))
    gap = np.concatenate(gaps) if gaps else np.zeros(0)
    values = token_stats.summary(work.records, r.token_classes)
    values |= _mean_ratios(work.records)
    if gap.size:
        values |= {"logp_gap_mean": float(gap.mean()), "logp_gap_max": float(gap.max())}
    absent = [record.get("logp_sampler") == [] for record in work.records]
    if any(absent):
        values["logp_absent"] = mean(absent)
    return values


def _add_divergence(
    r: loaded_run.LoadedRun, record: dict, batch: layout.Batch, tokens, b: int, n: int
) -> None:
    """The student's side of every completion, and the teacher's of those that it was told about;
    `ratio` is the capped weight of the sampler's tokens, where loss.rollout_clip is on."""
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


def _add_policy(
    r: loaded_run.LoadedRun, record: dict, batch: layout.Batch, policy, b: int, n: int
) -> None:
    """Values of the policy loss at its temperature; of a cross entropy those that it has.

    `policy_ratio` is p(y) trainer / p(y) sampler before any clip, where the loss makes use of it.
    """
    settings = r.options.policy
    record["policy_loss"] = round_values(policy.value_T[b, :n])
    record["logp_policy"] = round_values(policy.logp_T[b, :n])
    record["entropy_policy"] = round_values(policy.entropy_T[b, :n])
    if settings is None or settings.kind == "nll":
        return
    record["advantage"] = float(batch.advantage_BC[b, 0])
    record["ratio_clipped"] = [int(x) for x in policy.clipped_T[b, :n]]
    if settings.kl:
        record["kl_initial"] = round_values(policy.kl_T[b, :n])
    if settings.old == "sampler" or settings.rollout_clip:
        log = np.clip(policy.logp_T[b, :n] - batch.logp_rollout_BC[b, :n], -20, 20)
        record["policy_ratio"] = round_values(np.exp(log))


def _mean_ratios(made: list[dict]) -> dict[str, float]:
    """Means of the ratios over the tokens with the loss that they belong to."""
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
) -> dict[str, float]:  # fmt: skip
    """The step's metrics without those that are the mean of nothing, for which a step has 0: where
    no token carries their loss, or the loss has no ratio or no divergence from the initial policy.
    """
    numbers = {name: float(value) for name, value in values.items()}
    empty = {name for name in OF_LOSS if numbers.get("loss_tokens") == 0}
    empty |= {name for name in OF_POLICY if numbers.get("policy_tokens") == 0}
    if policy is not None:
        empty |= set() if policy.kl and policy.kind != "nll" else {"kl_initial"}
        empty |= {"ratio_clipped"} if policy.kind == "nll" else set()
    return {name: number for name, number in numbers.items() if name not in empty}
