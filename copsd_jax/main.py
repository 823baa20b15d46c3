"""python -m copsd_jax.main --config=configs/opsd.py[:preset] [--workdir=W] [--config.a.b=value ...]

Trains as the experiment card says, evaluates before and after, and leaves everything in the work
directory (default: runs/<config>[-<preset>]). The same command again continues the run.

    --dry_run=v5e:4x8 [--dry_run_json=FILE] [--search]

compiles every program of the run for devices that nobody has to own (also v5e-32, 2*v5e:16x16 for
two slices, cuda:h200:1x8) and says whether it fits, what takes the memory, and how long a step
would take. It reads no weights, tokenizer or problems. --search compiles once more, with the
largest micro-batch and numbers of slots that fit. Exit code: 0 fits, 1 does not, 2 a setting is
wrong.
"""

import os
import pathlib
import sys
from typing import NamedTuple

from absl import flags
from ml_collections import config_flags

from copsd_jax.config import setting_rules
from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import hardware, malloc


class Dry(NamedTuple):
    """A dry run, as asked for."""

    target: hardware.Target
    json: str  # where the report goes besides; "" for nowhere
    search: bool


class Command(NamedTuple):
    """A command line."""

    config: config_lib.Config
    workdir: pathlib.Path
    dry: Dry | None


def parse(argv: list[str]) -> tuple[config_lib.Config, pathlib.Path]:
    """(config, work directory) of a command line; the config is validated as far as it goes alone.

    Raises:
      as `command`.
    """
    return command(argv)[:2]


def command(argv: list[str]) -> Command:
    """What a command line asks for; the config is validated as far as it goes alone.

    Raises:
      ValueError: for an unknown flag, setting or preset, or a value of another type.
      OSError: for a config file that cannot be read.
    """
    known = config_lib.flat(config_lib.default())
    for argument in argv[1:]:
        name = argument.lstrip("-").split("=")[0]
        if name.startswith("config.") and name.removeprefix("config.") not in known:
            raise ValueError(config_lib.unknown_setting(name.removeprefix("config."), known))
        if name == "config" and "=" in argument:
            file = argument.split("=", 1)[1].partition(":")[0]
            if not pathlib.Path(file).is_file():
                raise FileNotFoundError(f"--config={file!r}: there is no such file")
    # Flags of their own for each call, so that calls in one process do not meet.
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config", None, "experiment card", flag_values=values, sys_argv=argv[1:]
    )
    workdir = flags.DEFINE_string("workdir", "", "where the run lives", flag_values=values)
    target = flags.DEFINE_string("dry_run", "", "devices to compile for", flag_values=values)
    report = flags.DEFINE_string("dry_run_json", "", "its report as JSON", flag_values=values)
    search = flags.DEFINE_boolean("search", False, "compile the largest", flag_values=values)
    try:
        rest = values(argv)
    except flags.Error as error:
        # An error inside a config file arrives with its traceback as text; its last line says it.
        last = str(error).strip().splitlines()[-1]
        raise ValueError(last.removeprefix("ValueError: ")) from error
    if len(rest) > 1:
        raise ValueError(f"unexpected argument {rest[1]!r}: settings are --config.name=value")
    if config.value is None:
        raise ValueError("--config is missing: for example --config=configs/opsd.py")
    config_lib.split_lists(config.value)
    if values["dry_run"].present and not target.value:
        raise ValueError(f"--dry_run is '': the choices are {hardware.CHOICES}")
    if not target.value and (report.value or search.value):
        raise ValueError("--dry_run_json and --search go with --dry_run, for example =v5e:4x8")
    if report.value and not pathlib.Path(report.value).absolute().parent.is_dir():
        raise FileNotFoundError(f"--dry_run_json={report.value!r}: its folder does not exist")
    dry = Dry(hardware.parse(target.value), report.value, search.value) if target.value else None
    setting_rules.settings(config.value, data=dry is None)
    name, _, preset = config_flags.get_config_filename(values["config"]).partition(":")
    stem = pathlib.Path(name).stem + (f"-{preset}" if preset else "")
    place = pathlib.Path(workdir.value or pathlib.Path("runs") / stem)
    return Command(config.value, place, dry)


def main(argv: list[str]) -> int:
    """Exit code: 0 only if the run ended as asked."""
    if any(argument in ("-h", "--help", "-help") for argument in argv[1:]):
        print(f"{__doc__}\nSettings, with their defaults:\n{config_lib.help_text()}")
        return 0
    try:
        config, workdir, dry = command(argv)
        # It would say on every start that there is no torch, which nothing here needs.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        # Imported late: a wrong setting is refused before JAX is loaded.
        if dry is not None:
            os.environ |= hardware.ENVIRONMENT
            from copsd_jax.dryrun import report

            return report.main(config, dry.target, dry.json, dry.search)
        malloc.keep()
        from copsd_jax import train
        from copsd_jax.runtime import processes

        processes.start(config)
        plan, continued = train.prepare(config, workdir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        train.train(plan, workdir, continued)
    except KeyboardInterrupt:
        print(f"\nstopped: the same command continues {workdir}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
