"""The training loop, written in the order of execution."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from copsd_jax import evaluate, summary
from copsd_jax.config import settings as config_lib
from copsd_jax.methods import table
from copsd_jax.metrics import metric_files, terminal
from copsd_jax.problems import batches, languages
from copsd_jax.runtime import checkpoint, continuation, processes, sharding, workdir
from copsd_jax.training import builders, guards, layout, loaded_run, rollout_records, run_plan
from copsd_jax.training.train_step import State
from copsd_jax.weights import hub, initial_weights


def prepare(config: config_lib.Config, directory: pathlib.Path) -> tuple[run_plan.Plan, bool]:
    """Checks a run and its directory; writes nothing.

    Args:
      config: the settings of the run.
      directory: the work directory, which is either new or from an earlier start of the same run.

    Returns:
      The checked plan, and whether the directory already contains the run.

    Raises:
      ValueError, OSError: the settings or files are wrong, the directory contains another run, or
        the directory cannot be written to. The error's message is one sentence.
    """
    found = continuation.compare_settings(directory, config_lib.flat(config))
    config_lib.assign(config, found.taken)
    _choose_at_start(config, directory)
    plan = run_plan.make_plan(config)
    builders.check_row_budget(plan)
    config.model.commit = config.model.commit or hub.find_commit(plan.weights_path)
    lines = found.notes
    if found.known:
        lines += continuation.compare_facts(directory, summary.collect_facts(plan), found.changed)
    if "train.steps" in found.changed:
        done = continuation.count_steps(directory)
        lines.append(summary.summarize_new_schedule(config, found.changed["train.steps"][0], done))
    if lines:
        print(*lines, sep="\n", flush=True)
    return plan, found.known


def _choose_at_start(config: config_lib.Config, directory: pathlib.Path) -> None:
    """Replaces the settings whose value is chosen at a run's first start, in place."""
    model = config.model
    config.prompt.date = config.prompt.date or continuation.choose_date(directory)
    former = pathlib.Path(continuation.read_first_fact(directory, "model", ""))
    model.commit = model.commit or hub.find_commit(former)
    # All processes open the checkpoints, because Orbax synchronises processes when it opens them.
    newest = initial_weights.name_checkpoint(model.init_from)
    model.init_from = processes.run_on_leader(lambda: newest)


def train(plan: run_plan.Plan, directory: pathlib.Path, continued: bool) -> None:
    """Executes a run from its newest checkpoint, if any; evaluates before and after training.

    Args:
      plan: the checked run, from `prepare`.
      directory: the work directory, to which the run writes everything.
      continued: whether the directory already contains the run.
    """
    config, started = plan.config, time.monotonic()
    print(summary.summarize_plan(plan, directory, continued), flush=True)
    processes.wait_for_all("checked")  # no process writes before all processes have checked the run
    workdir.create(directory, config_lib.flat(config), summary.collect_facts(plan))
    with (
        loaded_run.set_mesh_and_precision(plan),
        loaded_run.exit_on_failure(directory),
        checkpoint.Checkpoints(directory / "checkpoints", config.train.keep, writer=True) as saver,
    ):
        r, state = loaded_run.load_run(plan, config.train.steps, directory / "engine")
        if _warms_up(plan):
            print("compiling the sampler's programs", flush=True)
            for line in loaded_run.compile_sampler(r, state):
                print(line, flush=True)
        with r.grader:
            # The evaluation of step 0 needs the initial policy. If a continued run lacks the
            # evaluation of step 0, the run evaluates step 0 before it loads a checkpoint.
            before = _evaluation(r, state, 0, directory)
            saved = processes.run_on_leader(saver.steps)
            if saved:
                state = saver.load(saved[-1], state)
            first = int(state.step)
            with _writer(directory, first) as writer:
                state, stopped = _run_training_loop(r, state, first, writer, saver, directory)
            after = _evaluation(r, state, int(state.step), directory)
    seconds = time.monotonic() - started
    print(summary.summarize_ending(plan, before, after, directory, seconds, stopped), flush=True)


@contextlib.contextmanager
def _writer(directory: pathlib.Path, first: int) -> Iterator[Callable[[int, Mapping], None]]:
    """Yields a function that writes (step, metrics) to files; only the leading process writes."""
    if not processes.is_leader():
        yield lambda step, values: None
        return
    with metric_files.Writer(directory, resume=first + 1) as writer:
        yield writer.write


def _run_training_loop(r, state, first, write, checkpoints, directory) -> tuple[State, str]:
    """Runs the steps from `first` to the last, or until a guard stops the run.

    Returns:
      The last state, and the reason why a guard stopped the run ("" if no guard did).
    """
    plan, c = r.plan, r.plan.config
    timer = terminal.Timer()
    # The language codes in the order of data.lang, spelled in the same way as in the rows.
    codes = [languages.resolve_code(code, plan.student.languages) for code in c.data.lang]
    order = batches.iterate_batches(
        plan.rows, codes, c.data.weights, c.train.batch, c.seed, step=first
    )
    written = processes.run_on_leader(lambda: metric_files.read_metric_lines(directory, first))
    # The metrics of earlier steps determine the state of the guards, so no file has to store this
    # state.
    guard = guards.replay_metrics(plan.guards, written)
    said = processes.run_on_leader(lambda: workdir.read_events(directory, first))
    stream = processes.progress_stream()
    with terminal.Progress("step", c.train.steps, first, stream) as progress:
        # If a guard has already stopped the run, a continued run takes no further step.
        for step in range(first, first if guard["stopped"] else c.train.steps):
            number = step + 1  # in files and messages, the first step has number 1
            factor = np.float32(guard["factor"])
            state, records, values = _run_training_step(r, state, next(order), step, factor, timer)
            write(number, values)
            guard, events = guards.apply_rules(plan.guards, guard, number, values)
            if events:
                said += [dataclasses.asdict(event) for event in events]
                workdir.write_jsonl(directory / "events.jsonl", said)
            if c.train.log_rollouts:
                file = workdir.step_file(directory, "rollouts", number)
                workdir.write_jsonl(file, records)
            last = number == c.train.steps or bool(guard["stopped"])
            # A step's checkpoint is saved after its metrics and records. A continued run therefore
            # finds the metrics and records of all steps up to its checkpoint, and writes those of
            # later steps again.
            if number % c.train.save_every == 0 or last:
                checkpoints.save(number, state)
            shown = {name: values[name] for name in ("loss", "correct") if name in values}
            progress.update(number, int(values["completion_tokens"] * len(records)), **shown)
            lines = summary.summarize_failures(number, records)
            lines += [f"guard: {event.text}" for event in events]
            if step == first or last or number % max(1, c.train.steps // 3) == 0:
                lines.append(summary.summarize_sample(number, records))
            if lines:
                progress.close()
                print(*lines, sep="\n", flush=True)
            if c.eval.every and number % c.eval.every == 0 and not last:
                progress.close()
                _evaluation(r, state, number, directory)
            if guard["stopped"]:
                break
    return state, guard["stopped"]


def _run_training_step(
    r, state, rows, step: int, factor: np.float32, timer
) -> tuple[State, list[dict], dict]:
    """Trains on a batch made from the rows; returns the next state, the records and the metrics."""
    with timer("rollout"):
        work = table.METHODS[r.plan.config.method].make_batch(r, state, rows, step)
    with timer("packing"):
        packed = builders.pack_batch(r.plan, work.batch)
    with timer("step"):
        batch = layout.place_batch(packed, r.plan.mesh)
        state, aux = r.step(state, r.frozen, batch, work.student_prefix, work.teacher_kv, factor)
        aux = jax.device_get(aux)  # waits for the step to end, so that the timer covers all of it
    values = {
        **rollout_records.drop_empty_means(r.options.policy, aux.metrics),
        **layout.measure_fill(packed),
        **work.metrics,
        **rollout_records.add_token_values(r, work, aux),
        "learning_rate": float(r.rate(step)) * float(factor),
        **timer.take(),
    }
    # The inputs are not returned, so that the keys and values in the inputs are freed before the
    # next step.
    return state, work.records, values


def _warms_up(plan: run_plan.Plan) -> bool:
    """Returns whether to compile the sampler's programs before the first rollout."""
    if plan.server is not None:
        return False
    auto = sharding.platform(plan.mesh) != "cpu"  # on CPUs, compiling takes longer than a step
    return {"auto": auto, "always": True, "never": False}[plan.config.sampler.warmup]


def _evaluation(r: loaded_run.LoadedRun, state, step: int, directory: pathlib.Path) -> dict | None:
    """Returns the evaluation of a step, or None if there are no problems to evaluate.

    If the evaluation's file already has all problems, the result is read from the file.
    """
    if not r.plan.eval_rows:
        return None
    path = workdir.step_file(directory, "eval", step)
    known = processes.run_on_leader(lambda: evaluate.read_evaluation(path, r.plan.eval_rows))
    if known is not None:
        return known
    return evaluate.evaluate_step(r, state, step, path, f"evaluation at step {step}:")
