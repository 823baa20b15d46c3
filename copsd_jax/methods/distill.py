"""On-policy self-distillation: OPSD, COPSD, ROSD, step-aligned critique, SDPO and related methods.

    y ~ p(. | x),   loss = mean_t w_t D(q(. | x, c, y_<t) || p(. | x, y_<t))

    x  the problem
    y  the completion, sampled from the student p with its current weights
    c  the privileged context (`context.*`); an author (`author.*`) writes some contexts
    q  the teacher: the same network with the weights that `teacher.weights` selects; q also reads c
    D  the divergence with its clip (`divergence_loss.Divergence`)
    w  the weights of tokens (`tokens.*`), 0 at a token without loss

The student generates y, and the teacher only scores y. With `policy.weight` above 0, the loss is
`policy.weight` times GRPO's loss (`methods/grpo.py`), plus (1 - `policy.weight`) times the
distillation loss.

Sources: OPSD arXiv 2601.18734 v3, COPSD 2605.09548, ROSD 2605.28014, critique 2606.11173, SDPO
2601.20802. Routing by success follows SRPO 2604.02288.

Departures from the sources:
  - Prompts and completions stay token ids from the sampler to the loss. Positions are explicit, so
    a completion follows its prompt without a gap. Masks are computed from lengths.
  - If the teacher is the author, contexts are written with the teacher's weights. In the published
    code, the student writes the contexts, with its adapter merged into the weights.
  - An error is located in the text of the sampled tokens; this text is not encoded again.
  - If a reply cannot be read, its completion carries no loss, and the reply is counted. In the
    published code, a completion with an unreadable reply gets SDPO's context
    (`parity.reflection_fallback`).
  - With `context.filter_groups`, a group with equal rewards is left out before contexts are
    written.
  - The tutor's instructions stand at the start of the user's turn. In the published prompts, the
    tutor's instructions are a system message.
"""

import numpy as np

from copsd_jax.losses import policy_loss
from copsd_jax.methods import authors, grpo
from copsd_jax.problems import problem_row
from copsd_jax.teaching import contexts, groups, prompts, replies, token_selection
from copsd_jax.training import layout, loaded_run, prompt_lengths, rollout_records, rollouts
from copsd_jax.training.rollouts import Rollouts, TrainStepInputs
from copsd_jax.training.train_step import State


def make_batch(
    r: loaded_run.LoadedRun, state: State, rows: list[problem_row.Row], step: int
) -> TrainStepInputs:
    """Samples and grades rollouts, lets the author write contexts, and lays out both sides.

    Args:
      r: the loaded run.
      state: the state with the weights of the student and of the teacher.
      rows: the problems of the step.
      step: the training step; it selects the random streams of sampling, siblings and authors.

    Returns:
      The inputs of the train step, with one record per completion. The metric `taught` counts the
      completions that have a token with loss. The metric `filtered` counts the completions that
      `_choose_distilled` left out. Other metrics count overlong teacher prompts, the statuses of
      replies, and the statuses of token selections.
    """
    c = r.plan.config
    done = rollouts.sample_rollouts(r, state, rows, step)
    wanted, views = _choose_distilled(c, done), _build_distilled_attempts(r, done, step)
    written = _collect_author_replies(r, state, done, views, wanted, step)
    told = [
        r.plan.teacher.build(view, reply) if keep else None
        for view, reply, keep in zip(views, written, wanted, strict=True)
    ]
    told, overlong = prompt_lengths.drop_overlong(c, r.plan.model_config, done.asked, told)
    masks, found = _select_distilled_tokens(r, done, views, written, told)
    batch = _build_distill_batch(done, told, masks)
    if c.policy.weight:
        batch = grpo.add_group_advantages(c, done, batch, c.policy.route == "successes")
    records = rollout_records.build_records(r, done)
    for i, record in enumerate(records):
        record |= _describe_distill_context(told[i], written[i], found[i], views[i], wanted[i])
        if told[i]:
            shown = contexts.join_privileged_text(r.plan.context, views[i], written[i])
            record["privileged_text"] = shown
    probe = r.plan.teacher.build_shortest(done.rows[0])
    prefixes = rollouts.encode_training_prefixes(r, state, done.asked[0], probe)
    metrics = {
        **rollout_records.measure_rollouts(records, done.sampler),
        "overlong_teacher_prompts": float(overlong),
        "taught": float(batch.loss_BC.any(axis=1).sum()),
        "filtered": float(wanted.count(False)),
        **_count_distill_statuses(r, records),
    }
    return TrainStepInputs(batch, *prefixes, records, metrics)


def _choose_distilled(c, done: Rollouts) -> list[bool]:
    """Decides for each completion, before contexts are written, whether to distill it."""
    wanted = np.array([not completion.dropped for completion in done.completions])
    if c.context.filter_groups:
        wanted &= policy_loss.mark_policy_loss_completions(done.rewards(), np.asarray(done.groups))
    if c.context.correct == "skip" or c.policy.route == "successes":
        wanted &= ~np.array([bool(verdict and verdict.correct) for verdict in done.verdicts])
    return wanted.tolist()


def _build_distilled_attempts(
    r: loaded_run.LoadedRun, done: Rollouts, step: int
) -> list[contexts.Attempt]:
    """Builds an `Attempt` per completion, with the parts that contexts may read."""
    c, reads = r.plan.config, contexts.list_inputs(r.plan.context)
    siblings, others = [None] * len(done.rows), [None] * len(done.rows)
    if "siblings" in reads:
        right = [
            bool(verdict and verdict.reward >= c.reward.threshold) for verdict in done.verdicts
        ]
        siblings = groups.choose_siblings(
            right, done.groups, [len(completion.ids) for completion in done.completions],
            c.context.sibling, (c.seed, step),
        )  # fmt: skip
    if "other" in reads:
        others = groups.choose_other_problems(r.plan.rows, done.rows, (c.seed, step))
    return [
        contexts.Attempt(
            row, done.answer(i), verdict.correct if verdict else None,
            feedback=verdict.feedback if verdict else "",
            sibling="" if (s := siblings[i]) is None else done.answer(s), other=others[i],
        )
        for i, (row, verdict) in enumerate(zip(done.rows, done.verdicts, strict=True))
    ]  # fmt: skip


def _collect_author_replies(
    r, state, done: Rollouts, views, wanted, step: int
) -> list[replies.Reply]:
    """Returns the author's reply for each completion, or `FILTERED` if no reply is wanted."""
    asked = [
        authors.AuthorRequest(views[i], done.samples[i], verdict.answer if verdict else None)
        for i, verdict in enumerate(done.verdicts)
        if wanted[i]
    ]
    made = iter(authors.write_replies(r, state, asked, step))
    return [next(made) if keep else replies.FILTERED for keep in wanted]


def _select_distilled_tokens(r, done: Rollouts, views, written, told) -> tuple[list, list[str]]:
    """Returns each completion's mask of tokens with loss, and the status of the token selection."""
    masks, found = [], []
    for i, completion in enumerate(done.completions):
        n = len(completion.ids)
        mask, status = np.zeros(n, bool), "untaught"
        if told[i] is not None:
            mask, status = token_selection.select_tokens(
                r.plan.selection, done.decoded[i], done.starts[i], n, views[i], written[i]
            )
        masks.append(mask)
        found.append(status)
    return masks, found


def _build_distill_batch(done: Rollouts, told: list[prompts.Prompt | None], masks) -> layout.Batch:
    """Builds the student's and the teacher's layout.

    A completion without a teacher prompt carries no loss. The student prompt takes the place of a
    missing teacher prompt, because every row of the layout needs a prompt.
    """
    batch = layout.build_batch(
        [prompt.ids for prompt in done.asked],
        [(t or s).ids for t, s in zip(told, done.asked, strict=True)],
        [completion.ids for completion in done.completions],
        student_prefix=len(done.asked[0].prefix_ids),
        teacher_prefix=next((len(prompt.prefix_ids) for prompt in told if prompt), 0),
    )
    C = batch.mask_BC.shape[1]
    logps_BC = layout.pad_rows([d.logps for d in done.completions], C, np.float32)
    return batch._replace(loss_BC=layout.pad_rows(masks, C, bool), logp_rollout_BC=logps_BC)


def _describe_distill_context(
    told, reply: replies.Reply, found: str, view: contexts.Attempt, wanted: bool
) -> dict:
    """Returns the fields of a record that describe the completion's context."""
    return {
        "taught": told is not None, "filtered": not wanted,
        "teacher_prompt": told.text if told else None,
        "teacher_prompt_ids": [*told.prefix_ids, *told.ids] if told else None,
        "shortened": list(told.shortened) if told else [],
        "reply": reply.raw, "reply_status": reply.status, "reply_detail": reply.detail,
        "reply_cut": reply.cut, "writer_shortened": list(reply.shortened), "leaked": reply.leaked,
        "located": found, "sibling": view.sibling or None,
    }  # fmt: skip


def _count_distill_statuses(r: loaded_run.LoadedRun, records: list[dict]) -> dict[str, float]:
    """Counts each status that is possible with the run's context and token selection.

    For each completion, a shortened section is counted once, even if it was cut in the prompts of
    both the author and the teacher.
    """
    out, count = {}, rollout_records.count_rollout_statuses
    if "reply" in contexts.list_inputs(r.plan.context):
        out |= count("reply", [record["reply_status"] for record in records], ["ok"])
        out["leaked"] = float(sum(record["leaked"] for record in records))
        out["replies_cut"] = float(sum(record["reply_cut"] for record in records))
    if r.plan.selection.select != "all":
        out |= count("located", [record["located"] for record in records], ["exact"])
    if r.plan.context.section_tokens:
        cut = [kind for x in records for kind in {*x["shortened"], *x["writer_shortened"]}]
        out |= count("shortened", sorted(cut), [])
    return out
