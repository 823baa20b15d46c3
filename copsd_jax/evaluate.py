"""Evaluates checkpoints of a work directory, and prints one table of scores.

    python -m copsd_jax.evaluate --workdir=W [--checkpoint=0,12] [--path=FILE] [--out=D]

Scores, prompts, grader and stop conditions are those of the run; see `evaluation`.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from copsd_jax.runtime import startup

if __name__ == "__main__":
    startup.begin()  # first, because the imports below take time

from copsd_jax import evaluation
from copsd_jax.config import settings as config_lib
from copsd_jax.metrics import eval_tables
from copsd_jax.runtime import (
    checkpoint,
    compile_cache,
    evaluation_files,
    failures,
    nonfinite,
    processes,
    storage,
    streams,
    workdir,
)
from copsd_jax.training import loaded_run, run_plan


def parse_evaluate_flags(argv: list[str]) -> argparse.Namespace:
    """Parses the program's flags; argv[0] is the program's name."""
    parser = startup.CommandParser(
        prog=startup.spell_program(argv, "evaluate"),
        description="Evaluates checkpoints of a work directory with its own settings.",
    )
    add = parser.add_argument
    add("--workdir", required=True, type=storage.parse_path, help="a run's directory")
    add(
        "--steps",
        "--checkpoint",
        default="",
        dest="steps",
        help="checkpoints: 0,12 (0 is the initial policy); default: all",
    )
    add("--path", default="", help="problems to use instead of the run's eval.path")
    add("--fields", help="names of the fields in the file, such as problem=question,answer=final")
    add("--limit", type=int, help="read only the first n records; 0 for all")
    add("--lang", default="", help="languages, such as sw,fr, instead of the run's eval.lang")
    add("--samples", type=int, help="completions per problem (n)")
    add("--temperature", type=float, help="sampling temperature; 0 is greedy")
    add("--max_tokens", type=int, help="maximum number of tokens of a completion")
    add("--out", type=storage.parse_path, help="directory for results; default: W/eval")
    return parser.parse_args(argv[1:])


def _load_eval_config(args: argparse.Namespace) -> config_lib.Config:
    """Returns the run's config with the changes that the flags request."""
    config = workdir.load_run_config(args.workdir)
    changes = _list_changes(args)
    if changes and args.out is None:
        raise ValueError(
            f"--out is missing: with {', '.join(changes)} changed, results need another directory, "
            "because W/eval contains the run's own results"
        )
    config.eval.update(changes)
    return config


def _list_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings of the section eval that the flags change, by name."""
    asked = {"path": args.path or None, "lang": tuple(args.lang.split(",")) if args.lang else None,
             "samples": args.samples, "max_tokens": args.max_tokens, "fields": args.fields,
             "limit": args.limit, "temperature": args.temperature}  # fmt: skip
    return {name: value for name, value in asked.items() if value is not None}


def _name_flags(error: Exception, args: argparse.Namespace) -> str:
    """Returns an error's message, in which changed settings have the names of their flags."""
    message = streams.spell_error(error)
    for name in _list_changes(args):
        message = re.sub(rf"\beval\.{name}\b", f"--{name}", message)
    return message


def main(argv: list[str]) -> int:
    """Runs the program and returns its exit code.

    The exit code is 0 if every requested checkpoint was evaluated, 1 if a server or the disk
    failed, 2 after another error, 3 if the weights or most logits are not finite, and 130 or 143
    after Ctrl-C or SIGTERM. Without --steps, a damaged checkpoint is skipped. If all checkpoints
    are damaged, the exit code is 2.
    """
    args = parse_evaluate_flags(argv)
    try:
        plan, steps = _plan_evaluation(args), _choose_steps(args)
        processes.run_on_leader(lambda: _check_partials(args.out or args.workdir / "eval", steps))
    except (ValueError, OSError) as error:
        return failures.report(ValueError(_name_flags(error, args)))
    try:
        _evaluate_checkpoints(args, plan, steps)
    except (
        checkpoint.UnusableCheckpoint, failures.RefusedRun, nonfinite.NonFinite,
    ) as error:  # fmt: skip
        return failures.report(error)
    return 0


def _plan_evaluation(args: argparse.Namespace) -> run_plan.Plan:
    """Checks the run's settings and the output directory."""
    config = _load_eval_config(args)
    if args.out:
        workdir.check_writable(args.out, "--out")
    else:
        workdir.check_writable(args.workdir / "eval", "without --out, --workdir", args.workdir)
    plan = run_plan.make_plan(config, train=False)
    if not plan.eval_rows:
        raise ValueError("eval.path is '': set --path to a file of problems")
    if config.eval.limit and args.limit is None:
        count = config_lib.spell_count(config.eval.limit, "record")
        print(f"only the first {count}: eval.limit of the run (--limit=0 for all)", flush=True)
    return plan


def _check_partials(out: pathlib.Path, steps: Sequence[int]) -> None:
    """Checks that the files of stopped evaluations are intact, before any weights are loaded."""
    for step in steps:
        path = workdir.partial_file(out / workdir.step_file(out, "eval", step).name)
        if path.is_file():
            evaluation_files.read_partial(path)


def _choose_steps(args: argparse.Namespace) -> list[int]:
    """Returns the steps to evaluate: those of --steps, or step 0 and all checkpoints."""
    folder = args.workdir / "checkpoints"
    saved = checkpoint.Checkpoints(folder).steps()
    try:
        asked = [int(step) for step in args.steps.split(",") if args.steps]
    except ValueError as error:
        raise ValueError(f"--steps={args.steps}: write numbers such as 0,12") from error
    if not saved and not asked:
        raise ValueError(
            f"{folder} has no checkpoint; use --steps=0 to evaluate the initial policy"
        )
    if absent := [step for step in asked if step not in (0, *saved)]:
        raise ValueError(f"--steps: no checkpoint of {absent}; the checkpoints are {saved}")
    return list(dict.fromkeys(asked)) or [0, *saved]


def _evaluate_checkpoints(args: argparse.Namespace, plan: run_plan.Plan, steps: list[int]) -> None:
    """Evaluates checkpoints, writes their results and prints the tables."""
    folder, out = args.workdir / "checkpoints", args.out or args.workdir / "eval"
    with (
        loaded_run.set_mesh_and_precision(plan),
        failures.exit_on_failure(out),
        checkpoint.Checkpoints(folder) as checkpoints,
    ):
        # With --out, the engine's folder and the results are in the --out directory, because the
        # run's directory may be read-only.
        engine, results = (args.out or args.workdir) / "engine", {}
        compile_cache.open_compile_cache(plan.config.compile.cache)
        r, initial = loaded_run.load_run(plan, plan.config.train.steps, engine)
        with r.grader:
            for step in steps:
                try:
                    state = checkpoints.load(step, initial) if step else initial
                except checkpoint.DamagedCheckpoint as error:
                    if args.steps:
                        raise
                    print(f"{error}: it is skipped", flush=True)
                    continue
                nonfinite.check_finite(state, f"checkpoint {step} of {args.workdir}")
                file = out / workdir.step_file(out, "eval", step).name
                results[step] = evaluation.evaluate_step(r, state, step, file, f"step {step}:")
    print(eval_tables.format_overview(results))
    if 0 in results and len(results) > 1:
        last = max(results)
        table = eval_tables.format_eval_comparison(results[0], results[last])
        print(f"\nstep {last} against step 0\n{table}")
    print(f"\nresults are in {out}")
    if any(steps) and not any(results):
        raise checkpoint.UnusableCheckpoint(f"no checkpoint in {folder} is whole")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
