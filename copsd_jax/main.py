"""Trains according to an experiment card, and evaluates before and after training.

    python -m copsd_jax.main --config=configs/opsd.py[:preset] [--workdir=W] [--init_from=W2]
        [--config.A.B=X ...]

`--config=opsd` is the card configs/opsd.py that comes with the program, unless there is a file
`opsd`. The console command `copsd-jax` is the same program (`command.py`).

The run writes everything to the work directory (default: runs/<config>[-<preset>]). To continue a
stopped run, give the same command again. `--init_from` starts a new run from other weights: the
newest checkpoint of a work directory, a PEFT adapter, or a Hugging Face model.

    --dry_run=v5e:4x8 [--dry_run_json=FILE] [--search]

A dry run compiles every program of the run for devices that are not present. `--dry_run` accepts
devices such as v5e-32, 2*v5e:16x16 (two slices) and cuda:h200:1x8. A dry run reports whether the
run fits, what needs the memory, and how long a step would take. A dry run reads no weights,
tokenizer or problems. With --search, the run is compiled again with the largest micro-batch and the
most slots that fit.

If SIGTERM or Ctrl-C asks a run to stop, the run completes its step, saves, and ends. If the step
would take longer than train.grace seconds, the run saves the last completed step at once. A second
signal ends the run without a save.

Exit codes:

    0         the run ended, or the dry run fits
    1         an error during the run, or the dry run does not fit
    2         a setting is wrong, or the run was refused
    3         a non-finite value stopped the run
    4         the run ended, but skipped steps with too few usable completions, replies or rewards
    130, 143  Ctrl-C or SIGTERM stopped the run; the same command continues it
"""

import contextlib
import os
import pathlib
import sys
from typing import NamedTuple

from copsd_jax.runtime import startup

if __name__ == "__main__":
    startup.begin()  # first, because the imports below take time

from absl import flags
from ml_collections import config_flags

from copsd_jax.config import cards, help_pages, setting_rules
from copsd_jax.config import settings as config_lib
from copsd_jax.dryrun import targets
from copsd_jax.metrics import terminal
from copsd_jax.runtime import malloc, signals, storage, streams


class DryRunFlags(NamedTuple):
    """The request for a dry run.

    Attributes:
      target: the devices to compile for.
      report_path: the file for the JSON report; "" for no report.
      search: whether to compile the run again with the largest sizes that fit.
    """

    target: targets.Target
    report_path: str
    search: bool


class Command(NamedTuple):
    """A parsed command line; `dry_run` is None unless a dry run is requested."""

    config: config_lib.Config
    workdir: pathlib.Path
    dry_run: DryRunFlags | None


def main(argv: list[str]) -> int:
    """Runs a command line and returns its exit code."""
    try:
        if request := help_pages.find_request(argv):
            print(_format_help(request).rstrip())
            return 0
        config, workdir, dry_run = parse_command(argv)
        # JAX is imported only after this line, because JAX reads the environment that is set here.
        # Importing JAX late also means that wrong settings are refused sooner.
        if dry_run is not None:
            os.environ |= targets.ENVIRONMENT
            from copsd_jax.dryrun import report

            return report.report_dry_run(
                config, dry_run.target, dry_run.report_path, dry_run.search
            )
        malloc.keep_freed_memory()
        # Only a terminal shows this line, because a log of a refusal is one sentence.
        shown = sys.stderr.isatty() and not config.mesh.process
        activity = terminal.Activity("checking settings, files and devices")
        with activity if shown else contextlib.nullcontext():
            from copsd_jax import train
            from copsd_jax.runtime import checkpoint, failures, nonfinite, processes, run_lock

            processes.join_processes(config)
            plan, continued = train.prepare(config, workdir)
    except (ValueError, OSError) as error:
        print(f"error: {streams.spell_error(error)}", file=sys.stderr)
        return 2
    try:
        skipped = train.train(plan, workdir, continued)
    except signals.Stopped as stop:
        print(f"{stop}: the same command continues {workdir}", file=sys.stderr)
        return stop.exit_code
    except (
        run_lock.LockedError, checkpoint.UnusableCheckpoint, failures.RefusedRun,
        nonfinite.NonFinite,
    ) as error:  # fmt: skip
        return failures.report(error)
    return 4 if skipped else 0


def _format_help(request: help_pages.Request) -> str:
    if not request.topic and request.card:
        return help_pages.format_card(request.card)
    if not request.topic:
        return help_pages.format_overview()
    names = help_pages.select_settings(request.topic)
    tables = None
    if help_pages.needs_tables(names):
        from copsd_jax.training import table_rules  # imported late, because it imports JAX

        tables = table_rules.collect_choice_tables()
    return help_pages.format_settings(names, tables, request.card)


def parse_command(argv: list[str]) -> Command:
    """Parses a command line; checks all settings except those that `table_rules` checks later.

    Raises:
      ValueError: a flag, setting or preset is unknown, or a value is not allowed.
      OSError: a config file cannot be read.
    """
    card, rest = cards.split_arguments(argv)
    settings = cards.load_card(card)
    # Each call has its own flags, so that two calls in one process do not share values.
    values = flags.FlagValues()
    try:
        config = config_flags.DEFINE_config_dict(
            "config", settings, flag_values=values, sys_argv=rest
        )
        workdir = flags.DEFINE_string("workdir", "", "directory of the run", flag_values=values)
        start = flags.DEFINE_string("init_from", "", "weights to start from", flag_values=values)
        target = flags.DEFINE_string("dry_run", "", "devices to compile for", flag_values=values)
        report = flags.DEFINE_string("dry_run_json", "", "file for report", flag_values=values)
        search = flags.DEFINE_boolean("search", False, "largest sizes", flag_values=values)
        values([*argv[:1], *rest])
    except (RecursionError, MemoryError) as error:  # the type depends on Python's version
        raise ValueError("a value of the command line is nested too deeply") from error
    except (flags.Error, ValueError) as error:
        raise ValueError(" ".join(str(error).split()).removeprefix("flag ")) from error
    config_lib.split_lists(config.value)
    if start.value:
        config.value.model.init_from = start.value
    if values["dry_run"].present and not target.value:
        raise ValueError(f"--dry_run is '': the choices are {targets.CHOICES}")
    dry_run = _parse_dry_run(target.value, report.value, search.value)
    setting_rules.check_settings(config.value, data=dry_run is None)
    storage.check_local("--workdir", workdir.value)
    directory = workdir.value or _default_workdir(card)
    return Command(config.value, storage.parse_path(directory), dry_run)


def _parse_dry_run(target: str, report: str, search: bool) -> DryRunFlags | None:
    if not target and (report or search):
        raise ValueError("--dry_run_json and --search need --dry_run, such as --dry_run=v5e:4x8")
    report = os.path.expanduser(report)
    if report and not pathlib.Path(report).absolute().parent.is_dir():
        raise FileNotFoundError(f"--dry_run_json={report!r}: the file's folder does not exist")
    return DryRunFlags(targets.parse_target(target), report, search) if target else None


def _default_workdir(card: str) -> str:
    """Returns the default work directory of a card, runs/<config>[-<preset>]."""
    name, _, preset = card.partition(":")
    return str(pathlib.Path("runs") / (pathlib.Path(name).stem + (f"-{preset}" if preset else "")))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
