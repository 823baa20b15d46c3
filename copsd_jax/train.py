"""The training loop, written in the order of execution."""

import collections
import contextlib
import dataclasses
import functools
import math
import pathlib
import shutil
import time

import jax
import numpy as np
import optax

from copsd_jax import evaluation, self_test, summary
from copsd_jax.config import settings as config_lib
from copsd_jax.methods import failed_steps, table
from copsd_jax.metrics import callback, metric_files, terminal
from copsd_jax.problems import batches, languages
from copsd_jax.runtime import (
    bad_steps,
    checkpoint,
    compile_cache,
    continuation,
    failures,
    nonfinite,
    processes,
    profiling,
    run_lock,
    signals,
    workdir,
)
from copsd_jax.servers import author_server, sampler_server
from copsd_jax.teaching import prompts
from copsd_jax.training import (
    builders,
    guards,
    layout,
    loaded_run,
    rollout_records,
    run_facts,
    run_plan,
)
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
    processes.run_on_leader(lambda: run_lock.check(directory))
    date = config.prompt.date
    found = continuation.compare_settings(directory, config_lib.flat(config))
    config_lib.assign(config, found.taken)
    _choose_at_train_start(config, directory)
    plan = run_plan.make_plan(config)
    builders.check_row_budget(plan)
    longest = plan.longest.get("author_server")
    processes.run_on_leader(lambda: author_server.check_author_server(config, longest))
    config.model.commit = config.model.commit or hub.find_commit(plan.weights_path)
    config.model.dtype = np.dtype(plan.dtype).name
    lines, done = found.notes, continuation.count_steps(directory)
    if found.known:
        lines += continuation.compare_facts(directory, run_facts.collect_facts(plan), found.changed)
        processes.run_on_leader(lambda: workdir.check_files(directory))
        last = processes.run_on_leader(lambda: metric_files.check_file(directory))
        if last and not done:
            written = f"{directory / 'metrics.jsonl'} goes up to step {last}"
            lines.append(f"{written}, but there is no checkpoint, so step 0 is used")
    if "train.steps" in found.changed:
        updates = processes.run_on_leader(lambda: metric_files.count_updates(directory, done))
        before = found.changed["train.steps"][0]
        lines.append(summary.summarize_new_schedule(config, before, done, updates))
    if date and not (config.prompt.template == "chat" and prompts.shows_date(plan.tokenizer)):
        lines.append(f"prompt.date is {date!r}: it has no effect, because no prompt shows a date")
    if lines:
        print(*lines, sep="\n", flush=True)
    return plan, found.known


def _choose_at_train_start(config: config_lib.Config, directory: pathlib.Path) -> None:
    """Replaces in `config` the settings whose values are chosen at a run's first start."""
    model = config.model
    config.prompt.date = config.prompt.date or continuation.choose_date(directory)
    former = pathlib.Path(continuation.read_fact_of_first_start(directory, "model", ""))
    model.commit = model.commit or hub.find_commit(former)
    # All processes open the checkpoints, because Orbax synchronises processes when it opens them.
    newest = initial_weights.resolve_initial_weights(model.init_from)
    model.init_from = processes.run_on_leader(lambda: newest)


def train(plan: run_plan.Plan, directory: pathlib.Path, continued: bool) -> int:
    """Executes a run from its newest checkpoint, if any; evaluates before and after training.

    Args:
      plan: the checked run, from `prepare`.
      directory: the work directory, to which the run writes everything.
      continued: whether the directory already contains the run.

    Returns:
      The number of failed steps in the whole run; these steps were skipped.

    Raises:
      signals.Stopped: a signal has asked the run to stop; the last completed step is saved.
      run_lock.LockedError: another process runs in the directory.
      checkpoint.UnusableCheckpoint: a checkpoint cannot be loaded, such as that of model.init_from.
      failures.RefusedRun: the self-test of a new run failed; only the lock was written.
      SystemExit: a file, server or device failed; the message is one sentence.
    """
    config, started = plan.config, time.monotonic()
    print(summary.summarize_plan(plan, directory, continued), flush=True)
    processes.wait_for_all("checked")  # no process writes before all processes have checked the run
    facts = run_facts.collect_facts(plan)  # before the run sets options of JAX
    with (
        loaded_run.set_mesh_and_precision(plan),
        failures.exit_on_failure(directory),
        run_lock.hold(directory),
        contextlib.ExitStack() as stack,
    ):
        compile_cache.open_compile_cache(config.compile.cache)
        stream = processes.progress_stream()
        with terminal.Activity("reading weights", stream):
            r, state = loaded_run.load_run(plan, config.train.steps, directory / "engine")
        if config.check.self_test and config.train.steps and not continued:
            print(_check_before_training(r, state, directory), flush=True)
        saver = stack.enter_context(_create_workdir(plan, directory, facts))
        if loaded_run.warms_up_sampler(plan):
            print("compiling the sampler's programs", flush=True)
            for line in loaded_run.compile_run_sampler(r, state):
                print(line, flush=True)
        with r.stop.listen(config.train.grace), r.grader:
            # The evaluation of step 0 needs the initial policy. If a continued run lacks the
            # evaluation of step 0, the run evaluates step 0 before it loads a checkpoint.
            before = _get_evaluation(r, state, 0, directory)
            state = saver.load_newest(state)
            nonfinite.check_finite(state, f"checkpoint {int(state.step)} of {directory}")
            first, steps = int(state.step), config.train.steps
            processes.run_on_leader(lambda: workdir.remove_later(directory, first, steps))
            with metric_files.open_metric_writer(directory, first) as writer:
                _write_scores(writer, 0, before)
                if first and config.eval.every and first % config.eval.every == 0:
                    # A kill may have interrupted this evaluation.
                    _write_scores(writer, first, _get_evaluation(r, state, first, directory))
                state, stopped = _run_training_loop(r, state, first, writer, saver, directory)
                after = _get_evaluation(r, state, int(state.step), directory)
                _write_scores(writer, int(state.step), after)
    seconds = time.monotonic() - started
    print(summary.summarize_ending(plan, before, after, directory, seconds, stopped), flush=True)
    return processes.run_on_leader(lambda: metric_files.count_failed_metric_steps(directory, steps))


def _check_before_training(r: loaded_run.LoadedRun, state: State, directory: pathlib.Path) -> str:
    """Returns the self-test's line; if the test fails, removes the files written for a server."""
    try:
        with terminal.Activity(
            "compiling the sampler, and testing it", processes.progress_stream()
        ):
            return self_test.check(r, state)
    except failures.RefusedRun:
        folder = directory / "engine"
        processes.run_on_leader(lambda: shutil.rmtree(folder, ignore_errors=True))
        raise


def _create_workdir(
    plan: run_plan.Plan, directory: pathlib.Path, facts: dict
) -> checkpoint.Checkpoints:
    """Creates the directory with config.json and run.json; returns the writer of checkpoints."""
    t = plan.config.train
    workdir.create(directory, config_lib.flat(plan.config), facts)
    return checkpoint.Checkpoints(
        directory / "checkpoints", t.keep, writer=True, minutes=t.save_minutes
    )


def _run_training_loop(r, state, first, writer, checkpoints, directory) -> tuple[State, str]:
    """Runs the steps from `first` to the last, or until a guard or a signal stops the run.

    Returns:
      The last state, and what stopped the run before its last step ("" if nothing did).

    Raises:
      signals.Stopped: a signal has asked the run to stop; the last completed step is saved.
      NonFinite: the weights are not finite, or guards.bad_steps steps in a row were bad.
      failures.EngineError: a server failed, or guards.bad_steps steps in a row failed.
    """
    plan, c = r.plan, r.plan.config
    written = processes.run_on_leader(lambda: metric_files.read_metric_lines(directory, first))
    timer, bad = terminal.Timer(), bad_steps.BadSteps(directory, c.guards.bad_steps, written)
    # The language codes in the order of data.lang, spelled in the same way as in the rows.
    codes = [languages.resolve_code(code, plan.student.languages) for code in c.data.lang]
    order = batches.iterate_batches(
        plan.rows, codes, c.data.weights, c.train.batch, c.seed, step=first
    )
    guard, said = _restore_guards(plan, directory, first, written)
    stream = processes.progress_stream()
    trace = profiling.StepTrace(c.train.profile, directory / "profile")
    asked, stopped = callback.import_callback(c.log.callback), _name_guard(guard)
    seconds = math.inf  # duration of the last step; unknown before the first step
    try:
        with terminal.Progress("step", c.train.steps, first, stream) as progress:
            # If a guard has already stopped the run, a continued run takes no further step.
            for step in range(first, first if guard["stopped"] else c.train.steps):
                begun, number = time.monotonic(), step + 1  # the first step has number 1
                expected = (begun + seconds, checkpoints.save_seconds)
                factor = np.float32(guard["factor"])
                with trace.record(number):
                    state, records, values = _run_training_step(
                        r, state, next(order), step, factor, timer, bad, expected
                    )
                writer.write(number, values)
                guard, events = guards.apply_rules(plan.guards, guard, number, values)
                said += [dataclasses.asdict(event) for event in events]
                _write_records(c, directory, number, records, said if events else [])
                bad.check(number, lambda: _list_saved(checkpoints))
                stopped = _name_guard(guard)
                if callback.ask_callback(asked, number, values):
                    stopped = stopped or f"log.callback={c.log.callback} after step {number}"
                last = number == c.train.steps or bool(stopped)
                lines = summary.summarize_failures(number, records) + bad.describe(number)
                lines += [f"guard: {event.text}" for event in events]
                _show(progress, lines)  # first, because the next line may end the run
                lines = sampler_server.check_sampler_server_gap(c, number, values)
                # A step's checkpoint is saved after its metrics and records. A continued run
                # therefore finds the metrics and records of all steps up to its checkpoint, and
                # writes those of later steps again.
                if number % c.train.save_every == 0 or last or checkpoints.is_due():
                    lines += _save(checkpoints, state, last, bad)
                seconds = time.monotonic() - begun
                shown = {name: values[name] for name in ("loss", "correct") if name in values}
                progress.update(number, int(values["completion_tokens"] * len(records)), **shown)
                if step == first and (counted := compile_cache.describe_compile_cache()):
                    lines.append(counted)
                if step == first or last or number % max(1, c.train.steps // 3) == 0:
                    lines.append(summary.summarize_sample(number, records))
                _show(progress, lines)
                if last:
                    break
                r.stop.obey()
                if c.eval.every and number % c.eval.every == 0:
                    progress.close()
                    _write_scores(writer, number, _get_evaluation(r, state, number, directory))
    except signals.Stopped:
        # If a step was left unfinished, `state` is still the state after the previous step.
        if int(state.step) > first:
            for refusal in _save(checkpoints, state, False, bad):
                print(refusal, flush=True)
        checkpoints.wait()  # if the save fails, the run does not count as saved
        raise
    checkpoints.wait()  # during this wait, a first signal does not end the process
    return state, stopped


def _write_records(
    config: config_lib.Config, directory: pathlib.Path, number: int, records: list[dict],
    said: list[dict],
) -> None:  # fmt: skip
    """Writes the records of a step's completions, and the events of the guards if there are any."""
    if said:
        workdir.write_jsonl(directory / "events.jsonl", said)
    if config.train.log_rollouts:
        file = workdir.step_file(directory, "rollouts", number)
        workdir.write_jsonl(file, nonfinite.spell_numbers(records))


def _name_guard(guard: guards.State) -> str:
    """Returns what has stopped the run, if a guard has; otherwise ""."""
    return f"a guard: {guard['stopped']}" if guard["stopped"] else ""


def _show(progress: terminal.Progress, lines: list[str]) -> None:
    if lines:
        progress.close()
        print(*lines, sep="\n", flush=True)


def _save(
    checkpoints: checkpoint.Checkpoints, state: State, last: bool, bad: bad_steps.BadSteps
) -> list[str]:
    """Saves a state, or returns a line that says why it is not saved; see `bad_steps`."""
    step = int(state.step)
    refusal = bad.refuses_save(step, last)
    if not refusal:
        nonfinite.check_finite(state, f"step {step}")
        checkpoints.save(step, state)  # does nothing if the step has been saved
    return refusal


def _list_saved(checkpoints: checkpoint.Checkpoints) -> list[int]:
    """Returns the steps of all checkpoints, after the save in the background has ended."""
    checkpoints.wait()
    return processes.run_on_leader(checkpoints.steps)


def _restore_guards(
    plan, directory: pathlib.Path, first: int, written: list[str]
) -> tuple[guards.State, list[dict]]:
    """Returns the guards' state after step `first`, and the events up to that step.

    The lines of metrics.jsonl, `written`, determine both, so no other file has to store the state.

    Raises:
      failures.UnusableFile: events.jsonl has an action that does not follow from the metrics.
    """
    guard, replayed = guards.replay_events(plan.guards, written)
    every = processes.run_on_leader(lambda: workdir.read_workdir_events(directory))
    read = [event for event in every if event["step"] <= first]
    said, file = guards.rebuild_events(read, replayed), directory / "events.jsonl"
    acted = collections.Counter((event["step"], event["action"]) for event in read)
    acted.subtract((event.step, event.action) for event in replayed)
    for event in read:
        if event["action"] != "warn" and acted[event["step"], event["action"]] > 0:
            raise failures.UnusableFile(
                f"{file} has an action that does not follow from metrics.jsonl ({event['text']}): "
                "restore the lines of metrics.jsonl from a copy or, to continue without this "
                "action, remove its line from events.jsonl"
            )
    if lost := len(said) - len(read):
        count = config_lib.spell_count(lost, "event")
        print(f"{file} lacked {count}, rebuilt from metrics.jsonl", flush=True)
    if said != every:  # events of later steps are written again, if they happen again
        workdir.write_jsonl(file, said)
    return guard, said


def _run_training_step(
    r, state, rows, step: int, factor: np.float32, timer, bad: bad_steps.BadSteps, expected: tuple
) -> tuple[State, list[dict], dict]:
    """Trains on a batch made from the rows; returns the next state, the records and the metrics.

    `expected` contains the time at which the step will probably end, and the duration of a save in
    seconds.
    """
    # The learning rate depends on the optimizer's count of updates. A step without an update does
    # not advance this count.
    updates = int(optax.tree_utils.tree_get_all_with_path(state.optimizer, "count")[-1][1])
    # Once the compiled step has begun, the old state is gone, so the step has to be completed.
    stream, first = processes.progress_stream(), math.isinf(expected[0])
    show = functools.partial(terminal.Activity, stream=stream) if first else contextlib.nullcontext
    with timer("rollout"), r.stop.leave_if_late(*expected), show("sampling the first step"):
        work = table.METHODS[r.plan.config.method].make_batch(r, state, rows, step)
    taught, failure = failed_steps.drop_failed_loss(r.plan.config, work.records, work.batch)
    with timer("packing"):
        packed = builders.pack_batch(r.plan, taught)
    with timer("step"), show("compiling the training step"):
        batch = layout.place_batch(packed, r.plan.mesh)
        state, aux = r.step(state, r.frozen, batch, work.student_prefix, work.teacher_kv, factor)
        aux = jax.device_get(aux)  # waits for the step to end, so that the timer covers all of it
    lost = failed_steps.loses_most_logits(work.records)
    aux.metrics["bad"] = np.maximum(aux.metrics["bad"], np.float32(lost))
    inputs = {"batch": packed, "student_prefix": work.student_prefix, "lr_factor": factor}
    bad.record(step + 1, state, inputs, aux.metrics, failure)
    aux.metrics["failed"] = np.float32(failure is not None)
    del aux.metrics["weights_finite"]  # a run continues only if this value is 1
    values = {
        **rollout_records.drop_empty_means(r.options.policy, aux.metrics),
        **layout.measure_fill(packed),
        **work.metrics,
        **rollout_records.add_rollout_token_values(r, work._replace(batch=taught), aux),
        "learning_rate": float(r.rate(updates)) * float(factor),
        **timer.take(),
    }
    # The inputs are not returned, so that the keys and values in the inputs are freed before the
    # next step. Guards may read the times in `values`, so all processes use the leader's times.
    return state, work.records, processes.run_on_leader(lambda: values)


def _write_scores(
    writer: metric_files.Writer | metric_files.NoWriter, step: int, result: dict | None
) -> None:
    """Writes the scores of an evaluation, if there is one, and prints them in one line."""
    if result is not None:
        writer.write_evaluation(step, result["scores"])
        print(summary.summarize_scores(step, result["scores"]), flush=True)


def _get_evaluation(
    r: loaded_run.LoadedRun, state, step: int, directory: pathlib.Path
) -> dict | None:
    """Returns the evaluation of a step, or None if there are no problems to evaluate.

    If the evaluation's file has all problems and belongs to the same policy, the result is read
    from the file.
    """
    if not r.plan.eval_rows:
        return None
    path = workdir.step_file(directory, "eval", step)
    known = processes.run_on_leader(lambda: evaluation.read_evaluation(path, r.plan.eval_rows))
    if known is not None and evaluation.fits_policy(r, state, known, path):
        return known
    # A stop may interrupt an evaluation at any time, because the file keeps the completions.
    with r.stop.leave_if_late(math.inf):
        return evaluation.evaluate_step(r, state, step, path, f"evaluation at step {step}:")


if __name__ == "__main__":
    raise SystemExit("error: copsd_jax.train is no command: use python -m copsd_jax.main")
