"""python -m copsd_jax.main --config=configs/opsd.py[:preset] [--workdir=W] [--config.a.b=value ...]

Trains as the experiment card says, evaluates before and after, and leaves everything in the work
directory (default: runs/<config>[-<preset>]). The same command again continues the run.
"""

import os
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from copsd_jax import config as config_lib
from copsd_jax import validate


def parse(argv: list[str]) -> tuple[config_lib.Config, pathlib.Path]:
    """(config, work directory) of a command line; the config is validated as far as it goes alone.

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
    validate.settings(config.value)
    name, _, preset = config_flags.get_config_filename(values["config"]).partition(":")
    stem = pathlib.Path(name).stem + (f"-{preset}" if preset else "")
    return config.value, pathlib.Path(workdir.value or pathlib.Path("runs") / stem)


def main(argv: list[str]) -> int:
    """Exit code: 0 only if the run ended as asked."""
    if any(argument in ("-h", "--help", "-help") for argument in argv[1:]):
        print(f"{__doc__}\nSettings, with their defaults:\n{config_lib.help_text()}")
        return 0
    try:
        config, workdir = parse(argv)
        # It would say on every start that there is no torch, which nothing here needs.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        # Imported late: a wrong setting is refused before JAX is loaded.
        from copsd_jax import processes, train

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
