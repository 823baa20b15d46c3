"""Readable texts about a run: its plan, samples, failures, totals and end."""

import collections
import json
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from copsd_jax.config import settings as config_lib
from copsd_jax.dryrun import memory
from copsd_jax.methods import failed_steps
from copsd_jax.metrics import eval_tables, metric_files, terminal
from copsd_jax.model import transformer
from copsd_jax.problems import languages, problem_row, record_files
from copsd_jax.rewards import reward_functions
from copsd_jax.runtime import processes, sharding, streams
from copsd_jax.teaching import prompts
from copsd_jax.training import backends, builders, model_headers, run_plan
from copsd_jax.weights import tokenizer


def summarize_plan(plan: run_plan.Plan, directory: pathlib.Path, continued: bool) -> str:
    """Renders the plan of a run as text, to be printed before the run starts.

    Args:
      plan: the checked run.
      directory: the work directory.
      continued: whether the directory already contains the run.
    """
    c, shape, spell = plan.config, plan.model_config, config_lib.spell_count
    size, platform = _count_parameters(plan), sharding.platform(plan.mesh)
    completions = config_lib.completions_per_step(c)
    rank = f" rank {c.lora.rank}" if c.train.trainable == "lora" else ""
    parts = memory.summarize_memory(plan).items()
    held = ", ".join(f"{name} {count / 2**30:.2f} GiB" for name, count in parts)
    lines = [
        c.description or c.method,
        f"  model       {c.model.path} ({shape.family}, {size['base']:,} parameters, "
        f"{np.dtype(plan.dtype).name}), {c.model.init}",
        f"  trained     {size['trained']:,} parameters ({c.train.trainable}{rank})",
        f"  loss        {_summarize_loss(c)} ({backends.choose_loss(c, platform)})",
        f"  attention   {_summarize_attention(plan)}; remat {c.model.remat}",
        f"  problems    {c.data.path}: {_summarize_languages(plan.rows)}; "
        f"dropped: {_summarize_counts(plan.dropped)}{_summarize_golds(c.reward.kind, plan.rows)}",
        f"  evaluation  {c.eval.path or 'none'}: {_summarize_languages(plan.eval_rows)}; dropped: "
        f"{_summarize_counts(plan.eval_dropped)}{_summarize_golds(c.reward.kind, plan.eval_rows)}",
        *_summarize_data(plan),
        f"  a step      {spell(c.train.batch, 'problem')} x "
        f"{spell(c.rollout.per_prompt, 'completion')} of at most {c.rollout.max_tokens} tokens = "
        f"at most {completions * c.rollout.max_tokens:,} tokens; {_summarize_steps(c)}",
        f"  prompts     at most {plan.longest['student']} tokens (student), "
        f"{plan.longest['teacher']} (teacher)",
        f"  devices     {plan.mesh.size} x {platform}, mesh {dict(plan.mesh.shape)}",
        *([f"  whole       {uneven}"] if (uneven := memory.report_undivided_memory(plan)) else []),
        f"  memory      {held} (on each device, without the temporaries of programs)",
        f"  directory   {directory}" + (" (continued)" if continued else ""),
    ]
    if s := plan.server:
        engine = f"{s.api.model} at {s.api.url} ({s.dialect}, {s.logprobs} logprobs)"
        lines.append(f"  sampler     {engine}")
    if c.parity.template_mismatch:
        lines.append(
            "  parity.template_mismatch is set: student and teacher start in different states of "
            "the chat template, as published"
        )
    turn_end = prompts.find_turn_end(plan.tokenizer) if c.prompt.template == "chat" else None
    lines += [
        f"  note        {note}"
        for note in tokenizer.describe_contradictions(plan.tokenizer, turn_end)
    ]
    known, chat = plan.student.languages, c.prompt.template == "chat"
    unchecked = {row.lang for row in plan.rows if chat and not known[row.lang].checked_by_speaker}
    if unchecked:
        lines.append(f"  wording not checked by a speaker: {', '.join(sorted(unchecked))}")
    return "\n".join(lines)


def _count_parameters(plan: run_plan.Plan) -> dict[str, int]:
    """Returns the number of base parameters and the number of trained parameters.

    Returns:
      {"base": number, "trained": number}. With LoRA, only the adapter's parameters are trained.
    """
    count = lambda tree: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))  # noqa: E731
    base = transformer.abstract_params(plan.model_config, plan.dtype)
    trained = model_headers.trained_shapes(plan.config, plan.model_config)
    return {"base": count(base), "trained": count(trained)}


def _summarize_golds(kind: str, rows: list[problem_row.Row]) -> str:
    """Counts the rows without a gold answer, and the gold answers that the grader cannot read."""
    golds = {row.id: row.answer for row in rows if row.answer}
    said = ""
    if absent := len(rows) - len(golds):
        said += f"; rows without a gold answer, which are not graded: {absent:,}"
    if found := reward_functions.find_unreadable(kind, golds):
        said += f"; gold answers that the grader cannot read: {len(found):,}, "
        said += f"such as {reward_functions.quote_golds(golds, found)}"
    return said


def _summarize_data(plan: run_plan.Plan) -> list[str]:
    """Returns one line for each property of the data that the user may not intend."""
    c, lines = plan.config, []
    counts = collections.Counter(row.lang for row in plan.rows)
    weights = tuple(c.data.weights) or (1.0,) * len(c.data.lang)
    for code, weight in zip(c.data.lang, weights, strict=True):
        lang = languages.resolve_code(code, plan.student.languages)
        taken = int(c.train.batch * weight / sum(weights))
        if counts[lang] < taken and c.train.steps:
            lines.append(
                f"  a step takes {config_lib.spell_count(taken, f'{lang} problem')}, but the data "
                f"have {counts[lang]}: some are repeated"
            )
    for name, number in (("data.limit", c.data.limit), ("eval.limit", c.eval.limit)):
        if number and c[name.partition(".")[0]].path:
            lines.append(f"  only the first {config_lib.spell_count(number, 'record')}: {name}")
    taught = {(row.lang, row.problem.strip()) for row in plan.rows}
    if shared := sum((row.lang, row.problem.strip()) in taught for row in plan.eval_rows):
        lines.append(
            f"  {shared:,} of {len(plan.eval_rows):,} evaluation problems are training problems too"
        )
    for setting, names in plan.unread.items():
        path = setting.replace("fields", "path")
        if names and not c[path.partition(".")[0]].path.startswith("bundled:"):
            shown = record_files.list_record_fields(names)
            lines.append(f"  fields of {path} that nothing reads: {shown} ({setting} can map them)")
    own = not c.data.path.startswith("bundled:")
    if own and c.eval.path == config_lib.default().eval.path:
        lines.append("  the evaluation uses bundled problems, because eval.path is the default")
    return lines


def _summarize_attention(plan: run_plan.Plan) -> str:
    """Names the implementations of row attention and of decode attention."""
    platform = sharding.platform(plan.mesh)
    name = backends.choose_row_attention(plan.config, platform, plan.dtype, plan.model_config)
    if name == "splash":
        name += ", with a special mask if rows have parents or worked examples"
    if plan.server is not None:
        return f"{name} (training, scoring)"
    decode = backends.choose_decode_attention(plan.config, platform)
    return f"{name} (training, scoring, prefill), {decode} (decoding)"


def _summarize_loss(c) -> str:
    """Describes the method's context, tokens, teacher and divergence in one line."""
    method = config_lib.traits(c)
    if not method.samples:
        return "cross entropy of the solutions"
    policy = (
        f"policy gradient, advantages by {c.policy.scale}, {c.policy.norm} mean, KL {c.policy.kl}"
    )
    if method.policy_gradient:
        return policy
    author = "" if c.author.kind == "none" else f" written by {c.author.kind}"
    entries = f", {c.loss.top_k_of}'s top {c.loss.top_k}" if c.loss.top_k else ""
    entries += " and tail" if c.loss.tail else ""
    return (
        f"context {c.context.kind}{author}; tokens {c.tokens.select}; teacher {c.teacher.weights}; "
        f"{c.loss.divergence}{entries}, clip {c.loss.clip_mode}"
        + (f"; {c.policy.weight:g} of {policy}" if c.policy.weight else "")
    )


def _summarize_languages(rows: list[problem_row.Row]) -> str:
    """Renders the number of rows per language, such as "sw 500, fr 20"; "none" if no rows exist."""
    counts = collections.Counter(row.lang for row in rows)
    return ", ".join(f"{lang} {count:,}" for lang, count in counts.items()) or "none"


def _summarize_steps(c: config_lib.Config) -> str:
    count = config_lib.spell_count(c.train.steps, "step")
    rises = c.train.warmup >= c.train.steps > 0
    return f"{count}, all within the warm-up ({c.train.warmup})" if rises else count


def _summarize_counts(counter: collections.Counter) -> str:
    """Renders each count with its reason; returns "none" if nothing was counted."""
    return ", ".join(f"{count} ({reason})" for reason, count in counter.items()) or "none"


def summarize_new_schedule(c: config_lib.Config, before: int, done: int, updates: int) -> str:
    """Describes in one line the learning rate of a run whose train.steps has changed.

    Args:
      c: the settings of the run, with the new number of steps.
      before: the former number of steps.
      done: the number of steps already done.
      updates: the number of these steps that changed the weights. The schedule counts only steps
        that change the weights.
    """
    old, new = (float(builders.build_optimizer(c, n)[1](updates)) for n in (before, c.train.steps))
    end = f" and falls to 0 after step {c.train.steps}"
    if updates < done:
        end = f" and falls to 0 after {c.train.steps} updates, of which {updates} are done"
    if c.train.schedule == "constant" or c.train.warmup >= c.train.steps:
        end = ""
    return (
        f"train.steps was {before}, now {c.train.steps}: the learning rate of step {done + 1} is "
        f"{new:.3g} instead of {old:.3g}{end} ({c.train.schedule} schedule)"
    )


def summarize_failures(step: int, records: list[dict]) -> list[str]:
    """Returns a warning for each kind of failure in a step; the warning gives the first reason.

    One line counts the completions that a server did not give. A second line counts the completions
    for which the user's reward function gave no reward. A third line counts the completions that
    have no reply, because the author failed.

    Args:
      step: the number of the step.
      records: the records of the step's completions.
    """
    lost = {
        "failed": [r["finish_detail"] for r in records if r.get("finish") == "failed"],
        "unrewarded": failed_steps.list_lost_rewards(records),
    }
    lines = [
        f"warning: step {step}: "
        + failed_steps.describe_lost_completions(loss, details, len(records))
        for loss, details in lost.items()
        if details
    ]
    failed = [r for r in records if r.get("reply_detail")]
    if failed:
        lines.append(
            f"warning: step {step}: {len(failed)} of {len(records)} completions have no reply; the "
            f"first has the status {failed[0]['reply_status']}: {failed[0]['reply_detail']}"
        )
    return [streams.escape_stream_text(line) for line in lines]


def summarize_sample(step: int, records: list[dict]) -> str:
    """Renders the first completion of a step, together with the problem and the grade."""
    record = records[0]
    mark = {True: "right", False: "wrong", None: "not graded"}[record["correct"]]
    lines = [f"--- sample of step {step} ({record['lang']}, {mark}, gold {record['gold']})"]
    shown = f"{record['problem']}\n-> {record['completion'].strip()}"
    lines += [f"    {line}" for line in shown.split("\n")]
    return streams.escape_stream_text("\n".join(lines))


def summarize_scores(step: int, scores: Mapping[str, Mapping[str, float]]) -> str:
    """Renders the share of correct answers of each group of problems, in one line."""
    parts = (f"{name} {found['avg_at_n']:.1%}" for name, found in scores.items())
    return streams.escape_stream_text(f"correct at step {step}: {', '.join(parts)}")


COUNTED = ("taught", "filtered", "overlong_teacher_prompts", "leaked", "replies_cut")
COUNTED_PREFIXES = ("reply_", "located_", "shortened_", "grade_", "rollout_")
# The normal outcomes of grading, which the metrics `correct` and `reward` already report.
NOT_COUNTED = ("grade_plain", "grade_symbolic", "grade_computed")


def summarize_totals(directory: pathlib.Path, steps: int) -> str:
    """Renders a table that shows how many completions of the run have each status.

    Args:
      directory: the work directory that contains the metrics.
      steps: the last step to count.

    Returns:
      The table, or "" if no status was counted.
    """
    totals: collections.defaultdict[str, float] = collections.defaultdict(float)
    for line in metric_files.read_metric_lines(directory, steps):
        for name, value in json.loads(line).items():
            counted = name in COUNTED or name.startswith(COUNTED_PREFIXES)
            if counted and name not in NOT_COUNTED:
                totals[name] += float(value)
    rows = [[name.replace("_", " "), f"{count:,.0f}"] for name, count in totals.items() if count]
    return terminal.table(["completions", "n"], rows) if rows else ""


def summarize_ending(
    plan, before, after, directory: pathlib.Path, seconds: float, stopped: str
) -> str:  # fmt: skip
    """Renders a run's last message: scores, status counts, directory, and a reason to stop.

    Args:
      plan: the checked run.
      before: the evaluation before training, or None.
      after: the evaluation after training, or None.
      directory: the work directory.
      seconds: wall time since the run was started or continued.
      stopped: what stopped the run before its last step, or "".
    """
    lines = []
    if before and after:
        lines += [
            "",
            eval_tables.format_eval_comparison(before, after),
            "",
            "before and after: share of correct answers; points: difference with the interval of a",
            "paired bootstrap over problems; p: exact sign test; cut: ended by the token limit",
        ]
    if totals := summarize_totals(directory, plan.config.train.steps):
        lines += ["", totals]
    lines += ["", f"{terminal.duration(seconds)} min; everything is in {directory}"]
    steps = plan.config.train.steps
    if skipped := processes.run_on_leader(
        lambda: metric_files.count_failed_metric_steps(directory, steps)
    ):
        lines.append(
            f"skipped {config_lib.spell_count(skipped, 'step')}, because too few completions, "
            "replies or rewards were usable (metric `failed`)"
        )
    if stopped:
        lines.append(f"stopped by {stopped}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit("error: copsd_jax.summary is no command: use python -m copsd_jax.main")
