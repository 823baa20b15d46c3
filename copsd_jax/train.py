"""The loop, flat and in order of execution."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from copsd_jax import evaluate
from copsd_jax.config import settings as config_lib
from copsd_jax.methods import table
from copsd_jax.metrics import metric_files, terminal
from copsd_jax.problems import batches, languages, problem_row
from copsd_jax.runtime import checkpoint, processes, sharding, workdir
from copsd_jax.training import (
    backends,
    builders,
    guards,
    layout,
    loaded_run,
    memory,
    rollouts,
    run_plan,
    train_step,
)


def prepare(config: config_lib.Config, directory: pathlib.Path) -> tuple[run_plan.Plan, bool]:
    """The checked plan, and whether the directory holds the run already. Writes nothing.

    Raises:
      ValueError, OSError: in one sentence.
    """
    known = workdir.check_directory(directory, config_lib.flat(config))
    plan = run_plan.make_plan(config)
    builders.check_row_budget(plan)
    if known:
        workdir.check_fingerprints(directory, _facts(plan))
    return plan, known


def train(plan: run_plan.Plan, directory: pathlib.Path, continued: bool) -> None:
    """Evaluates, trains, evaluates again; continues a run from its newest checkpoint."""
    config, started = plan.config, time.monotonic()
    method = table.METHODS[config.method]
    print(summary(plan, directory, continued), flush=True)
    processes.wait_for_all("checked")  # nothing is written before all have looked
    workdir.create(directory, config_lib.flat(config), _facts(plan))
    with (
        loaded_run.set_mesh_and_precision(plan),
        loaded_run.exit_on_failure(directory),
        checkpoint.Checkpoints(
            directory / "checkpoints", config.train.keep, writer=True
        ) as checkpoints,
    ):
        r, state = loaded_run.load_run(plan, config.train.steps, directory / "engine")
        if _warms_up(plan):
            print("compiling the sampler's programs", flush=True)
            for line in loaded_run.compile_sampler(r, state):
                print(line, flush=True)
        with r.grader:
            # The evaluation of step 0 comes before a checkpoint is loaded: it is the initial
            # policy's, also when a run that was stopped before it is continued.
            before = _evaluation(r, state, 0, directory)
            saved = processes.run_on_leader(checkpoints.steps)
            if saved:
                state = checkpoints.load(saved[-1], state)
            first = int(state.step)
            with _writer(directory, first) as writer:
                state, stopped = _steps(r, method, state, first, writer, checkpoints, directory)
            after = _evaluation(r, state, int(state.step), directory)
    seconds = time.monotonic() - started
    print(_ending(plan, before, after, directory, seconds, stopped), flush=True)


@contextlib.contextmanager
def _writer(directory: pathlib.Path, first: int) -> Iterator[Callable[[int, Mapping], None]]:
    """What takes (step, metrics); the leading process's writes them down."""
    if not processes.is_leader():
        yield lambda step, values: None
        return
    with metric_files.Writer(directory, resume=first + 1) as writer:
        yield writer.write


def _steps(r, method, state, first, write, checkpoints, directory) -> tuple[train_step.State, str]:
    """Steps `first` … train.steps - 1, or until a guard stops the run; the reason if one did."""
    plan, c = r.plan, r.plan.config
    timer = terminal.Timer()
    order = batches.iterate_batches(
        plan.rows, _codes(plan), c.data.weights, c.train.batch, c.seed, step=first
    )
    written = processes.run_on_leader(lambda: metric_files.lines(directory, first))
    guard = guards.replay_metrics(plan.guards, written)
    said = processes.run_on_leader(lambda: workdir.read_events(directory, first))
    stream = processes.progress_stream()
    with terminal.Progress("step", c.train.steps, first, stream) as progress:
        for step in range(first, first if guard["stopped"] else c.train.steps):
            with timer("rollout"):
                work = method.make_batch(r, state, next(order), step)
            with timer("packing"):
                rows = builders.pack_batch(plan, work.batch)
            with timer("step"):
                batch = layout.place_batch(rows, plan.mesh)
                factor = np.float32(guard["factor"])
                state, aux = r.step(
                    state, r.frozen, batch, work.student_prefix, work.teacher_kv, factor
                )
                aux = jax.device_get(aux)  # waits for the step
            values = {
                **measured(r.options.policy, aux.metrics),
                **layout.measure_fill(rows),
                **work.metrics,
                **rollouts.add_token_values(r, work, aux),
                "learning_rate": float(r.rate(step)) * float(factor),
                **timer.take(),
            }
            write(step + 1, values)
            guard, events = guards.apply_rules(plan.guards, guard, step + 1, values)
            if events:
                said += [dataclasses.asdict(event) for event in events]
                workdir.write_jsonl(directory / "events.jsonl", said)
            if c.train.log_rollouts:
                workdir.write_jsonl(
                    workdir.step_file(directory, "rollouts", step + 1), work.records
                )
            last = step + 1 == c.train.steps or bool(guard["stopped"])
            if (step + 1) % c.train.save_every == 0 or last:
                checkpoints.save(step + 1, state)
            progress.update(
                step + 1,
                int(values["completion_tokens"] * len(work.records)),
                loss=values["loss"],
                **{name: values[name] for name in ("correct",) if name in values},
            )
            for line in [*failures(step + 1, work.records), *(f"guard: {e.text}" for e in events)]:
                progress.close()
                print(line, flush=True)
            if step == first or last or (step + 1) % max(1, c.train.steps // 3) == 0:
                progress.close()
                print(_sample(step + 1, work.records), flush=True)
            if c.eval.every and (step + 1) % c.eval.every == 0 and not last:
                progress.close()
                _evaluation(r, state, step + 1, directory)
            if guard["stopped"]:
                break
    return state, guard["stopped"]


OF_LOSS = ("divergence", "logp_student", "logp_teacher", "entropy_teacher", "clipped_mass")
OF_POLICY = ("policy_loss", "policy_entropy", "ratio_clipped", "kl_initial")


def measured(
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


def failures(step: int, records: list[dict]) -> list[str]:
    """One line on the replies of a step that a writer owes, with the reason of the first."""
    raised = [r for r in records if str(r.get("grade_status", "")).startswith("raised")]
    lines = [
        f"warning: step {step}: the function of reward.kind failed for {len(raised)} of "
        f"{len(records)} completions, the first with {raised[0]['grade_status'].split(':')[1]}"
    ] if raised else []  # fmt: skip
    failed = [record for record in records if record.get("reply_detail")]
    if not failed:
        return lines
    first = failed[0]
    return [
        *lines,
        f"warning: step {step}: {len(failed)} of {len(records)} completions have no reply, the "
        f"first for {first['reply_status']}: {first['reply_detail']}",
    ]


def _warms_up(plan: run_plan.Plan) -> bool:
    if plan.server is not None:
        return False
    auto = sharding.platform(plan.mesh) != "cpu"  # where compiling is slow next to a step
    return {"auto": auto, "always": True, "never": False}[plan.config.sampler.warmup]


def _codes(plan: run_plan.Plan) -> list[str]:
    """Languages in the order of data.lang, as the rows spell them."""
    return [languages.resolve_code(code, plan.student.languages) for code in plan.config.data.lang]


def _evaluation(r: loaded_run.LoadedRun, state, step: int, directory: pathlib.Path) -> dict | None:
    """The scores of a step, from its file if it is there already; None without problems."""
    if not r.plan.eval_rows:
        return None
    path = workdir.step_file(directory, "eval", step)
    known = processes.run_on_leader(lambda: workdir.read_json(path) if path.is_file() else None)
    if known is not None:
        return known
    total = len(r.plan.eval_rows) * r.plan.config.eval.samples
    progress, update = evaluate.show_progress(f"evaluation at step {step}:", total)
    with progress:
        result = evaluate.evaluate(
            r,
            loaded_run.derive_policies(r, state)[0],
            r.plan.eval_rows,
            update,
            workdir.partial_file(path),
        )
    workdir.write_json(path, {"step": step, **result})
    processes.run_on_leader(lambda: workdir.partial_file(path).unlink(missing_ok=True))
    return {"step": step, **result}


def summary(plan: run_plan.Plan, directory: pathlib.Path, continued: bool) -> str:
    """What will run, before it does."""
    c, shape = plan.config, plan.model_config
    size = memory.count_parameters(plan)
    completions = config_lib.completions_per_step(c)
    lines = [
        c.description or c.method,
        f"  model       {c.model.path} ({shape.family}, {size['base']:,} parameters, "
        f"{np.dtype(plan.dtype).name}), {c.model.init}",
        f"  trained     {size['trained']:,} parameters ({c.train.trainable}"
        + (f" rank {c.lora.rank})" if c.train.trainable == "lora" else ")"),
        f"  loss        {_loss(c)} ({backends.choose_loss(c, sharding.platform(plan.mesh))})",
        f"  attention   {_attention(plan)}; remat {c.model.remat}",
        f"  problems    {c.data.path}: {_per_language(plan.rows)}; "
        f"dropped: {_counts(plan.dropped)}",
        f"  evaluation  {c.eval.path or 'none'}: {_per_language(plan.eval_rows)}; "
        f"dropped: {_counts(plan.eval_dropped)}",
        f"  a step      {c.train.batch} problems x {c.rollout.per_prompt} completions of at most "
        f"{c.rollout.max_tokens} tokens = at most {completions * c.rollout.max_tokens:,} tokens; "
        f"{c.train.steps} steps",
        f"  prompts     at most {plan.longest['student']} tokens (student), "
        f"{plan.longest['teacher']} (teacher)",
        f"  devices     {plan.mesh.size} x {sharding.platform(plan.mesh)}, "
        f"mesh {dict(plan.mesh.shape)}",
        *([f"  whole       {uneven}"] if (uneven := memory.describe_undivided(plan)) else []),
        "  memory      "
        + ", ".join(
            f"{name} {size / 2**30:.2f} GiB" for name, size in memory.summarize_memory(plan).items()
        )
        + " (on each device, without the temporaries of programs)",
        f"  directory   {directory}" + (" (continued)" if continued else ""),
    ]
    if plan.server is not None:
        s = plan.server
        lines.append(
            f"  sampler     {s.api.model} at {s.api.url} ({s.dialect}, {s.logprobs} logprobs)"
        )
    if c.parity.template_mismatch:
        lines.append(
            "  parity.template_mismatch is set: student and teacher start in different states of "
            "the chat template, as published"
        )
    unchecked = sorted(
        {
            row.lang
            for row in plan.rows
            if c.prompt.template == "chat"
            and not plan.student.languages[row.lang].checked_by_speaker
        }
    )
    if unchecked:
        lines.append(f"  wording not checked by a speaker: {', '.join(unchecked)}")
    return "\n".join(lines)


def _attention(plan: run_plan.Plan) -> str:
    """The forms that run, of rows and of decoding."""
    platform = sharding.platform(plan.mesh)
    name = backends.choose_row_attention(plan.config, platform, plan.dtype, plan.model_config)
    if name == "splash":
        name += ", with a mask of its own where rows have parents or worked examples"
    if plan.server is not None:
        return f"{name} (training, scoring)"
    decode = backends.choose_decode_attention(plan.config, platform)
    return f"{name} (training, scoring, prefill), {decode} (decoding)"


def _loss(c) -> str:
    """The method's slots in one line."""
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


def _per_language(rows: list[problem_row.Row]) -> str:
    counts = collections.Counter(row.lang for row in rows)
    return ", ".join(f"{lang} {count:,}" for lang, count in counts.items()) or "none"


def _counts(counter: collections.Counter) -> str:
    return ", ".join(f"{count} ({reason})" for reason, count in counter.items()) or "none"


def _facts(plan: run_plan.Plan) -> dict:
    """What of this start goes into run.json."""
    return {
        "devices": [str(device) for device in plan.mesh.devices.flat],
        "seed": plan.config.seed,
        "model": str(plan.weights_path),
        "model_fingerprint": run_plan.fingerprint_weights(plan),
        "data_fingerprint": problem_row.compute_fingerprint(plan.rows),
        "eval_fingerprint": problem_row.compute_fingerprint(plan.eval_rows),
        "exemplars_fingerprint": problem_row.compute_fingerprint(plan.student.exemplars),
        "author_fingerprint": _replies_fingerprint(plan.records),
        "dropped": dict(plan.dropped),
        "eval_dropped": dict(plan.eval_dropped),
    }


def _replies_fingerprint(records: dict[tuple[str, int], str]) -> str:
    """SHA-256 of the replies of author.path, in any order; "" for none."""
    text = json.dumps([[*key, reply] for key, reply in sorted(records.items())])
    return hashlib.sha256(text.encode()).hexdigest() if records else ""


def _sample(step: int, records: list[dict]) -> str:
    """One completion of a step, for people."""
    record = records[0]
    mark = {True: "right", False: "wrong", None: "not graded"}[record["correct"]]
    lines = [f"--- sample of step {step} ({record['lang']}, {mark}, gold {record['gold']})"]
    shown = f"{record['problem']}\n-> {record['completion'].strip()}"
    lines += [f"    {line}" for line in shown.split("\n")]
    return "\n".join(lines)


COUNTED = ("taught", "filtered", "overlong_teacher_prompts", "leaked", "replies_cut")
COUNTED_PREFIXES = ("reply_", "located_", "shortened_", "grade_")
# What grading should come to: `correct` and `reward` say it.
NOT_COUNTED = ("grade_plain", "grade_symbolic", "grade_computed")


def _totals(directory: pathlib.Path, steps: int) -> str:
    """How many completions of the run had each status, as a table; "" where none is counted."""
    totals: collections.Counter[str] = collections.Counter()
    for line in metric_files.lines(directory, steps):
        for name, value in json.loads(line).items():
            counted = name in COUNTED or name.startswith(COUNTED_PREFIXES)
            if counted and name not in NOT_COUNTED:
                totals[name] += int(value)
    rows = [[name.replace("_", " "), f"{count:,}"] for name, count in totals.items() if count]
    return terminal.table(["completions", "n"], rows) if rows else ""


def _ending(
    plan, before, after, directory: pathlib.Path, seconds: float, stopped: str
) -> str:  # fmt: skip
    """The table of scores, counts of statuses, where everything is, and why a run was stopped."""
    lines = []
    if before and after:
        lines += ["", evaluate.format_comparison(before, after)]
        lines += [
            "",
            "before and after: share of correct answers; points: difference with the interval of a",
            "paired bootstrap over problems; p: exact sign test; cut: ended by the token limit",
        ]
    totals = _totals(directory, plan.config.train.steps)
    if totals:
        lines += ["", totals]
    lines += ["", f"{terminal.duration(seconds)} min; everything is in {directory}"]
    if stopped:
        lines.append(f"stopped by a guard: {stopped}")
    return "\n".join(lines)
