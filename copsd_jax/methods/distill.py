"""On-policy self-distillation: OPSD, COPSD and their relatives.

    y ~ p(. | x),   loss = mean_t w_t D(q(. | x, c, y_<t) || p(. | x, y_<t))

The student p samples y for the problem x with its current weights; the teacher q, the same network
with weights chosen by `teacher.weights`, reads the context c too and scores y. D and its clip are
`losses.Divergence`. Sources: OPSD arXiv 2601.18734 v3, COPSD arXiv 2605.09548.

Departures: prompts and completions stay token ids from sampler to loss, prompt and completion
stand without a gap at explicit positions, masks come from lengths, and the teacher of
`reason_first` writes with its own weights (the originals used the merged student).
"""

import collections
from typing import NamedTuple

import numpy as np

from copsd_jax import contexts, data, layout, losses, prompts, run, train_step
from copsd_jax.sampler import host


class Work(NamedTuple):
    """What a step trains on, and what is known of it before the step."""

    batch: layout.Batch
    student_prefix: np.ndarray | None  # int32 [P]
    teacher_kv: object  # model.KV or None
    records: list[dict]  # one a completion
    metrics: dict[str, float]


def make_batch(r: run.Run, state: train_step.State, rows: list[data.Row], step: int) -> Work:
    """Samples, grades, builds the teacher's prompts, packs. Rows are the step's problems."""
    plan, c = r.plan, r.plan.config
    student, teacher = run.policies(r, state)
    rows, samples = _repeat(rows, c.rollout.per_prompt)
    asked = [prompts.student(plan.tokenizer, plan.student, row) for row in rows]
    completions = run.sample(
        r, student, asked, run.sampling(r, "rollout", c.rollout.max_tokens),
        host.stream_keys(c.seed, "rollout", step, [row.id for row in rows], samples),
        c.rollout.slots,
    )  # fmt: skip
    replies = _analyses(r, teacher, rows, step)
    told = [
        contexts.teach(plan.tokenizer, plan.teacher, plan.context, row, reply)
        for row, reply in zip(rows, replies, strict=True)
    ]
    kept, overlong = _trainable(r, asked, told)
    prefix_s, prefix_t = asked[0].prefix_ids, told[0].prefix_ids
    batch = layout.pack(
        [prompt.ids for prompt in asked],
        [told[i].ids if kept[i] else asked[i].ids for i in range(len(told))],
        [completion.ids for completion in completions],
        student_prefix=len(prefix_s),
        teacher_prefix=len(prefix_t),
    )
    batch = batch._replace(mask_BC=batch.mask_BC & np.asarray(kept)[:, None])
    records = _records(r, rows, samples, asked, told, completions, replies)
    teacher_kv = r.teacher_kv
    if teacher_kv is None and prefix_t:
        teacher_kv = run.encode_prefix(r, teacher, prefix_t)
    return Work(
        batch,
        np.asarray(prefix_s, np.int32) if prefix_s else None,
        teacher_kv,
        records,
        {**_metrics(records), "overlong_teacher_prompts": float(overlong)},
    )


def _repeat(rows: list[data.Row], per_prompt: int) -> tuple[list[data.Row], list[int]]:
    """Each row G times, with its sample numbers; a row that occurs twice goes on counting."""
    seen: collections.Counter[str] = collections.Counter()
    repeated, samples = [], []
    for row in rows:
        for _ in range(per_prompt):
            repeated.append(row)
            samples.append(seen[row.id])
            seen[row.id] += 1
    return repeated, samples


def _analyses(r: run.Run, teacher: train_step.Policy, rows: list[data.Row], step: int) -> list[str]:
    """What the teacher writes before it teaches (reason_first), once a row; else empty texts."""
    plan, c = r.plan, r.plan.config
    if not contexts.asks(plan.context):
        return [""] * len(rows)
    first = {row.id: row for row in rows}
    asked = [
        contexts.ask(plan.tokenizer, plan.teacher, plan.context, row) for row in first.values()
    ]
    written = run.sample(
        r, teacher, asked, run.sampling(r, "rollout", c.context.max_tokens),
        host.stream_keys(c.seed, "reason", step, list(first), [0] * len(first)),
        c.rollout.slots,
    )  # fmt: skip
    texts = {
        i: run.opened(prompt, run.text(r, done.ids))
        for i, prompt, done in zip(first, asked, written, strict=True)
    }
    return [texts[row.id] for row in rows]


def _trainable(
    r: run.Run, asked: list[prompts.Prompt], told: list[prompts.Prompt]
) -> tuple[list[bool], int]:
    """Which samples carry loss: those whose teacher prompt is not too long (reason_first).

    Raises:
      ValueError: with data.overlong=error, or if both sides start in different template states.
    """
    c = r.plan.config
    kept = []
    for student, teacher in zip(asked, told, strict=True):
        prompts.check_states(student, teacher, c.parity.template_mismatch)
        fits = teacher.length <= c.teacher.max_tokens
        if not fits and c.data.overlong == "error":
            raise ValueError(
                f"teacher.max_tokens is {c.teacher.max_tokens}: a teacher prompt with its analysis "
                f"has {teacher.length} tokens"
            )
        kept.append(fits)
    return kept, kept.count(False)


def _records(r, rows, samples, asked, told, completions, replies) -> list[dict]:
    """One dictionary a completion, as written to W/rollouts."""
    plan, texts = r.plan, [run.text(r, completion.ids) for completion in completions]
    graded = [i for i, row in enumerate(rows) if row.answer]
    verdicts = run.grade(
        r,
        [rows[i].answer for i in graded],
        [asked[i] for i in graded],
        [texts[i] for i in graded],
    )
    grades = dict(zip(graded, verdicts, strict=True))
    written = contexts.asks(plan.context)
    status = [contexts.analysis(reply)[1] if written else "none" for reply in replies]
    records = []
    for i, row in enumerate(rows):
        grade = grades.get(i)
        records.append(
            {
                "id": row.id,
                "lang": row.lang,
                "sample": samples[i],
                "problem": row.problem,
                "student_prompt": asked[i].text,
                "student_prompt_ids": [*asked[i].prefix_ids, *asked[i].ids],
                "teacher_prompt": told[i].text,
                "teacher_prompt_ids": [*told[i].prefix_ids, *told[i].ids],
                "analysis": replies[i],
                "analysis_status": status[i],
                "completion": texts[i],
                "completion_ids": list(completions[i].ids),
                "finish": completions[i].finish,
                "logp_sampler": _rounded(completions[i].logps),
                "logp_sampler_truncated": _rounded(completions[i].logps_truncated),
                "gold": row.answer,
                "answer": grade.answer if grade else None,
                "correct": grade.correct if grade else None,
                "grade_status": grade.status if grade else "no_gold",
            }
        )
    return records


def _rounded(values) -> list[float]:
    return [round(float(value), 6) for value in values]


def add_tokens(work: Work, tokens: losses.TokenStats) -> dict[str, float]:
    """Adds the step's per-token values to the records; returns how sampler and trainer agree.

    The gap is |log-probability of the drawn token in the sampler - in the trainer|, both at the
    sampling temperature over the whole vocabulary.
    """
    gaps = []
    for b, record in enumerate(work.records):
        n = int(work.batch.mask_BC[b].sum())
        record["divergence"] = _rounded(tokens.value_T[b, :n])
        record["logp_student"] = _rounded(tokens.logp_student_T[b, :n])
        record["logp_teacher"] = _rounded(tokens.logp_teacher_T[b, :n])
        gaps.append(np.abs(tokens.logp_sampling_T[b, :n] - record["logp_sampler"][:n]))
    gap = np.concatenate(gaps)
    return {
        "logp_gap_mean": float(gap.mean()) if gap.size else 0.0,
        "logp_gap_max": float(gap.max()) if gap.size else 0.0,
    }


def _metrics(records: list[dict]) -> dict[str, float]:
    """Means over the step's completions."""
    mean = lambda values: float(np.mean(values)) if len(values) else 0.0  # noqa: E731
    graded = [record for record in records if record["correct"] is not None]
    return {
        "completion_tokens": mean([len(record["completion_ids"]) for record in records]),
        "truncated": mean([record["finish"] == "length" for record in records]),
        "graded": float(len(graded)),
        # Without a gold answer nothing is said, rather than 0.
        **({"correct": mean([record["correct"] for record in graded])} if graded else {}),
        **({"format": mean([record["answer"] is not None for record in graded])} if graded else {}),
        # reason_first: an empty analysis leaves the plain reference as context.
        **{
            f"analysis_{status}": mean([record["analysis_status"] == status for record in records])
            for status in ("empty", "unclosed")
        },
    }
