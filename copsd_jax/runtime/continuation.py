"""The identity of a run: what a continued run must have in common with its first start.

config.json has the settings of the newest start, and run.json has the facts of each start. A fact
is anything outside the settings that affects the run's numbers, such as the content of a file. A
start with a different fact is refused. Different versions of packages are only reported.
"""

import datetime
import hashlib
import importlib.util
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from copsd_jax.config import methods
from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import processes, workdir

# Settings that cannot change the numbers of a run. A run may be continued with other values of
# these settings.
CHANGEABLE = (
    *("description", "mesh.", "compile.", "log."),
    *("train.save_", "train.keep", "train.grace", "train.log_rollouts", "train.profile"),
    *("eval.every", "guards.bad_steps", "guards.logp_gap", "check.self_test"),
    # Settings that decide only how the same tokens are arranged in rows and blocks.
    *("rollout.slots", "eval.slots", "author.slots"),
    *("train.pack", "train.row_tokens", "train.micro_tokens", "loss.chunk"),
    # Settings that change only the shapes of matrix products, so that sampled texts change only
    # through rounding.
    *("sampler.steps", "sampler.pack", "sampler.attention", "sampler.gather", "sampler.warmup"),
    *("model.attention", "model.remat"),
    # Settings that change how a server is reached, but not the content of requests. A continued run
    # counts as the same run, even if the server fails or replies differently.
    *("sampler.url", "sampler.folder"),
    *(
        f"{section}.{name}"
        for section in ("author", "sampler")
        for name in ("timeout", "retries", "backoff", "concurrency", "key_env")
    ),
)
# Settings that the program may choose at the first start, each with the value that asks the program
# to choose. config.json has the chosen value, and a continued run keeps the chosen value. For
# example, a run that began in float32 stays in float32, even on a GPU.
CHOSEN_AT_START = {"prompt.date": "", "model.commit": "", "model.dtype": "auto"}
# The options of JAX that decide random numbers or precision.
JAX_OPTIONS = (
    *("jax_default_prng_impl", "jax_threefry_partitionable", "jax_random_seed_offset"),
    "jax_high_dynamic_range_gumbel",
    *("jax_enable_x64", "jax_default_dtype_bits", "jax_default_matmul_precision"),
)
DIGITS = 12  # number of digits of a fingerprint that messages show


class Continuation(NamedTuple):
    """The comparison of a start's settings with those of the run in the work directory.

    Attributes:
      known: whether the work directory already contains the run.
      taken: settings that this start takes over from the run.
      changed: other settings that differ from those of the newest start, as (old value, new value).
      notes: one line of text for each setting that is taken over because its default has changed.
    """

    known: bool
    taken: dict[str, Any]
    changed: dict[str, tuple[Any, Any]]
    notes: list[str]


def compare_settings(directory: pathlib.Path, settings: Mapping[str, object]) -> Continuation:
    """Compares a start's settings with those of the run in its work directory; writes nothing.

    A run keeps the defaults with which it began. If a setting has today's default, and the run
    began with another default, the setting takes the run's value. A value that a card states
    explicitly is treated in the same way if it equals today's default.

    Args:
      directory: the work directory.
      settings: every setting by its name.

    Raises:
      ValueError: the directory belongs to a run with other settings (the message names these
        settings), or contains files that do not belong to a run.
      OSError: the directory cannot be written to.
    """
    workdir.check_writable(directory, "--workdir")
    if not workdir.has_files(directory):
        return Continuation(False, {}, {}, [])
    if not any((directory / name).is_file() for name in ("config.json", "run.json")):
        raise ValueError(f"--workdir={directory} has files but no config.json: no run began there")
    today = workdir.convert_to_json(config_lib.flat(config_lib.default()))
    begun = today | config_lib.FORMER_DEFAULTS | read_fact_of_first_start(directory, "defaults", {})
    # If a setting was added to the program after the run began, the run used the default value.
    old, new = begun | workdir.read_settings(directory), workdir.convert_to_json(settings)
    taken, differing, notes = {}, {}, []
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if was == now:
            continue
        if was == begun.get(name) and now == today.get(name):
            notes.append(f"{name} stays {was!r}, the default when the run began (now {now!r})")
            taken[name] = was
        elif (name in CHOSEN_AT_START and now == CHOSEN_AT_START[name]) or _is_newest_checkpoint(
            name, was, now
        ):
            taken[name] = was
        else:
            differing[name] = (was, now)
    _refuse_changes(directory, differing, new | taken)
    return Continuation(True, taken, differing, notes)


def _is_newest_checkpoint(name: str, was: Any, now: Any) -> Any:
    """Returns whether `name` is model.init_from, and directory `now` has the checkpoint `was`."""
    return name == "model.init_from" and now and was.startswith(f"{now.rstrip('/')}/checkpoints/")


def choose_date(directory: pathlib.Path) -> str:
    """Returns the date of a run's first start, or today's date if the run has not started yet."""
    today = processes.run_on_leader(lambda: datetime.date.today().isoformat())
    return read_fact_of_first_start(directory, "time", today)[: len(today)]


def _refuse_changes(
    directory: pathlib.Path, differing: Mapping[str, tuple[Any, Any]], settings: Mapping[str, Any]
) -> None:
    """Refuses changes of settings that a run must keep, and a train.steps below a saved step."""
    refused = [
        f"{name} was {config_lib.show(was)}, now {config_lib.show(now)}"
        for name, (was, now) in differing.items()
        if not _may_change(name, settings)
    ]
    if refused:
        raise ValueError(
            f"--workdir={directory} belongs to another run ({'; '.join(refused)}): "
            "choose another directory, or use the same settings"
        )
    done = count_steps(directory)
    if "train.steps" in differing and settings["train.steps"] < done:
        raise ValueError(
            f"train.steps is {settings['train.steps']}: --workdir={directory} has a checkpoint of "
            f"step {done}, so it must be at least {done}"
        )


def _may_change(name: str, settings: Mapping[str, Any]) -> bool:
    if name == "train.micro_batch":
        # With this norm, each micro-batch is a group, unless loss.group sets the size of groups.
        grouped = settings["loss.norm"] == "micro_token_mean" and not settings["loss.group"]
        return not (grouped and methods.METHODS[settings["method"]].teacher)
    return name in ("train.steps", "eval.limit") or name.startswith(CHANGEABLE)


def count_steps(directory: pathlib.Path) -> int:
    """Returns the step of the newest checkpoint in a work directory, or 0 without a checkpoint."""
    names = [path.name for path in (directory / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


# ---- facts -----------------------------------------------------------------------------------


def _read_starts(directory: pathlib.Path) -> list[dict]:
    """Returns the facts of each start, or [] if run.json does not exist."""
    path = directory / "run.json"
    try:
        return workdir.read_starts(path) if path.is_file() else []
    except ValueError as error:
        advice = "remove this file, to continue without comparing data and weights"
        raise ValueError(f"{error}: {advice}") from error


def read_fact_of_first_start(directory: pathlib.Path, name: str, otherwise: Any) -> Any:
    """Returns a fact from the first start that recorded the fact; `otherwise` if no start did."""
    found = (start[name] for start in _read_starts(directory) if name in start)
    return next(found, otherwise)


def compare_facts(
    directory: pathlib.Path, facts: Mapping[str, Any], changed: Iterable[str]
) -> list[str]:
    """Checks that everything outside the settings is the same as when the run began.

    A fact that no start recorded is not compared.

    Args:
      directory: the work directory.
      facts: the facts of this start, as `workdir.create` records them.
      changed: the names of the settings that differ from those of the newest start.

    Returns:
      At most one line. The line names the packages and flags that differ from those of the newest
      start. If run.json is missing, the line says instead that the facts were not compared.

    Raises:
      ValueError: a fact is different; the message shows the old and the new value.
    """
    starts = _read_starts(directory)
    if not starts:
        if not count_steps(directory):  # nothing was trained
            return []
        missing = f"{directory / 'run.json'} is missing: the settings are compared with config.json"
        return [f"{missing}, but the data, the weights and the environment are not compared"]
    different = []
    for name in [name for name in facts if name.endswith("fingerprint")]:
        if name == "eval_fingerprint":
            # If eval.limit has changed, the problems of the evaluation may differ.
            was = facts[name] if "eval.limit" in changed else starts[-1].get(name, facts[name])
        else:
            was = read_fact_of_first_start(directory, name, facts[name])
        different += _describe_changes({name: was}, {name: facts[name]})
    for kind, now in facts.get("identity", {}).items():
        was = next((s["identity"][kind] for s in starts if kind in s.get("identity", {})), now)
        if kind == "jax":  # another version of JAX may have other options
            was = {name: value for name, value in was.items() if name in now}
            now = {name: value for name, value in now.items() if name in was}
        different += _describe_changes(was, now)
    if different:
        raise ValueError(
            f"--workdir={directory} was begun with other files or environment settings "
            f"({'; '.join(different)}): choose another directory, or restore the former state"
        )
    return _report_changed_versions(starts[-1], facts)


def _describe_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns one text such as "tokenizer.json was 0123456789ab, now absent" per difference."""

    def show(value: Any) -> str:
        is_hash = isinstance(value, str) and len(value) == 64
        return value[:DIGITS] if is_hash else "absent" if value is None else str(value) or "empty"

    return [
        f"{name} was {show(was.get(name))}, now {show(now.get(name))}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]


def _report_changed_versions(last: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    both = [
        {
            **start.get("versions", {}),
            "the code": start.get("commit"),
            "XLA_FLAGS": start.get("xla"),
        }
        for start in (last, facts)
    ]
    before, after = both
    differing = [
        f"{name} was {was or 'empty'}, now {after[name] or 'empty'}"
        for name, was in before.items()
        if None not in (was, after.get(name)) and was != after[name]
    ]
    return [f"different from the last start: {'; '.join(differing)}"] if differing else []


def collect_run_environment() -> dict[str, Any]:
    """Returns package versions, the code's commit and XLA's flags; changes are only reported."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {"versions": workdir.list_versions(), "commit": workdir.read_commit(), "xla": flags}


def read_jax_options() -> dict[str, Any]:
    """Returns the options of JAX that decide random numbers or precision, by name."""
    return {name: getattr(jax.config, name) for name in JAX_OPTIONS if hasattr(jax.config, name)}


def fingerprint_files(files: Mapping[str, pathlib.Path]) -> dict[str, str]:
    """Returns the SHA-256 of each file, by the file's label."""
    return {label: hashlib.sha256(path.read_bytes()).hexdigest() for label, path in files.items()}


def fingerprint_functions(settings: Mapping[str, str]) -> dict[str, str]:
    """Returns the SHA-256 of each user function's source file, by "setting=module:function".

    Only the file of the function's own module is read, not the modules that it imports.

    Args:
      settings: settings by name; a value without the form "module:function" is skipped.
    """
    found = {}
    for name, value in settings.items():
        spec = importlib.util.find_spec(value.partition(":")[0]) if ":" in value else None
        if spec is not None and spec.origin and pathlib.Path(spec.origin).is_file():
            found[f"{name}={value}"] = pathlib.Path(spec.origin)
    return fingerprint_files(found)
