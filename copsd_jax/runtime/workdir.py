"""The work directory W of a run: its files, and checks that the files belong to the run.

A run writes these files:

    W/config.json            every setting
    W/run.json               for each start: settings that changed, versions, commit, devices, seed,
                             fingerprints of model and data
    W/metrics.jsonl          one line per training step, and one per evaluation
    W/tensorboard/           the same metrics for TensorBoard
    W/events.jsonl           one line for each time that a guard acted: step, action, text
    W/rollouts/step_NNNNNN.jsonl  one line per completion
    W/eval/step_NNNNNN.json  the result of an evaluation; before the evaluation is complete, its
                             completions are in step_NNNNNN.partial.jsonl
    W/checkpoints/           checkpoints; damaged checkpoints are moved to W/damaged/
    W/lock, W/lease.json     the process that writes to W; see `run_lock`
    W/tries.json             the launchers' count of starts without progress; see `tries`
    W/profile/               a trace of the steps of train.profile
    W/engine/                with sampler.engine=server, the newest weights for the server
"""

import datetime
import importlib.metadata
import json
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import evaluation_files, processes, storage

# The forms of the files that a continued run reads; see `storage.check_form`.
_START = {
    "time?": str, "model?": str, "versions?": dict, "settings?": dict, "defaults?": dict,
    "model_fingerprint?": str,
    "identity?": dict.fromkeys(
        ("tokenizer?", "prompt?", "jax?", "languages?", "functions?", "served?"), dict
    ),
}  # fmt: skip
_EVENT = {"step": int, "action": str, "text": str}

_PACKAGES = "jax jaxlib flax optax orbax-checkpoint transformers grain ml-collections numpy".split()


def convert_to_json(value: Any) -> Any:
    """Converts a value to the types that JSON keeps: tuples become lists, also inside dicts."""
    if isinstance(value, Mapping):
        return {name: convert_to_json(item) for name, item in value.items()}
    return [convert_to_json(item) for item in value] if isinstance(value, tuple | list) else value


def check_writable(directory: pathlib.Path, flag: str, value: pathlib.Path | None = None) -> None:
    """Checks that a directory can be created or written to, by creating a temporary directory.

    Args:
      directory: the directory.
      flag: the flag or setting, for the message.
      value: the value of the flag; None if the value is the directory itself.

    Raises:
      ValueError: the directory is a URL.
      OSError: the directory cannot be written to; the message names the flag.
    """
    value = value or directory
    storage.check_local(flag, value)
    parent = directory
    try:
        while not parent.exists():
            parent = parent.parent
        if parent.is_dir():
            tempfile.TemporaryDirectory(dir=parent).cleanup()
            return
    except OSError as error:
        problem = f"{parent} cannot be written ({error.strerror or error})"
        raise PermissionError(f"{flag}={value}: {problem}") from error
    raise NotADirectoryError(f"{flag}={value}: {parent} is a file")


def has_files(directory: pathlib.Path) -> bool:
    """Returns whether a directory has files besides those that a start writes before run.json."""
    ours = ("lock", "lease.json", "tries.json", "engine")
    return directory.exists() and any(
        path.is_file()
        and path.relative_to(directory).parts[0] not in ours
        and not path.name.endswith(storage.PART)
        for path in directory.rglob("*")
    )


def create(directory: pathlib.Path, settings: dict[str, object], facts: dict) -> None:
    """Creates the directory with config.json and run.json; each call adds one entry to run.json.

    The leading process creates the directory, and the other processes wait.

    Args:
      directory: the work directory, on a disk that all processes share.
      settings: every setting by its name.
      facts: devices and fingerprints; this function adds versions, commit and time.

    Raises:
      OSError: the directory cannot be created, or another process does not see the directory.
    """
    processes.run_on_leader(lambda: _write_workdir(directory, settings, facts))
    if not (directory / "run.json").is_file():
        raise OSError(
            f"--workdir={directory} is not the directory of the leading process: all processes "
            "need the same directory, on a shared disk"
        )


def list_versions() -> dict[str, str]:
    """Returns the versions of the packages that compute the numbers of a run."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _write_workdir(directory: pathlib.Path, settings: dict[str, object], facts: dict) -> None:
    with storage.explain(directory):
        for name in ("rollouts", "eval", "checkpoints"):
            (directory / name).mkdir(parents=True, exist_ok=True)
    path = directory / "run.json"
    starts = read_starts(path) if path.is_file() else []
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": list_versions(),
        "commit": read_commit(),
        **facts,
    }
    if not starts:  # a continued run keeps the defaults with which it began
        start["defaults"] = convert_to_json(config_lib.flat(config_lib.default()))
    if convert_to_json(settings) != _find_settings(starts):
        start["settings"] = convert_to_json(settings)
    # run.json is written first. If the process is killed before it writes config.json, run.json
    # has both the facts and the settings.
    write_json(path, {"starts": [*starts, start]})
    write_json(directory / "config.json", convert_to_json(settings))


def _find_settings(starts: list[dict]) -> dict[str, object] | None:
    """Returns the newest settings that the starts recorded; None if they recorded none."""
    return next((start["settings"] for start in reversed(starts) if "settings" in start), None)


def read_settings(directory: pathlib.Path) -> dict[str, object]:
    """Reads the settings of an existing run; returns each value by the setting's full name.

    If config.json is missing or damaged, lacks settings, or has a value of a wrong type or range,
    the settings are taken from run.json, and a message is printed.

    Raises:
      FileNotFoundError: the directory has no config.json, and run.json has no settings.
      ValueError: config.json is damaged or has no model.path, and run.json has no settings; or the
        directory is a URL.
    """
    storage.check_local("--workdir", directory)
    path = directory / "config.json"
    try:
        if not path.is_file():
            raise FileNotFoundError(f"--workdir={directory} has no config.json")
        settings = storage.read_object(path)
        wanted = (_restore_settings(directory) or {"model.path": ""}).keys()
        if missing := sorted(wanted - settings.keys()):
            raise ValueError(f"{path} has no {missing[0]!r}")
        _check_workdir_settings(settings, path)
    except (FileNotFoundError, ValueError) as error:
        settings = _restore_settings(directory)
        if settings is None:
            advice = "restore this file from a copy" if path.is_file() else "no run began there"
            raise type(error)(f"{error}: {advice}") from error
        print(f"{error}: the settings of the last start are taken from run.json", flush=True)
    return config_lib.drop_retired_settings(settings, f"--workdir={directory}")


def _check_workdir_settings(settings: Mapping[str, object], place: str | pathlib.Path) -> None:
    try:
        config_lib.check_saved(settings)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _restore_settings(directory: pathlib.Path) -> dict[str, object] | None:
    """Returns the settings in run.json; None if it is missing, is damaged, or has no settings."""
    path = directory / "run.json"
    try:
        return _find_settings(read_starts(path)) if path.is_file() else None
    except ValueError:
        return None


def read_starts(path: pathlib.Path) -> list[dict]:
    """Reads run.json; returns its entries, one for each start of the run.

    Raises:
      ValueError: the file is damaged; the message names the file and the wrong value.
      StorageError: the file cannot be read.
    """
    content = storage.read_object(path)
    storage.check_form(content, {"starts": [_START]}, f"{path}")
    if not content["starts"]:
        raise ValueError(f"{path} has no start of a run")
    for number, start in enumerate(content["starts"]):
        for name in ("settings", "defaults"):
            _check_workdir_settings(start.get(name, {}), f"{path}: starts[{number}].{name}")
    return content["starts"]


def read_all_settings(directory: pathlib.Path) -> dict[str, object]:
    """Reads a run's settings as `read_settings` does; absent settings get their defaults."""
    return convert_to_json(config_lib.flat(config_lib.default())) | read_settings(directory)


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes a JSON file on the leading process alone."""
    _write_workdir_file(path, lambda: [json.dumps(value, ensure_ascii=False, indent=1) + "\n"])


def write_jsonl(path: pathlib.Path, rows: list[dict]) -> None:
    """Writes a JSON Lines file with one row per line, on the leading process alone."""
    _write_workdir_file(path, lambda: (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_workdir_file(path: pathlib.Path, make_lines: Callable[[], Iterable[str]]) -> None:
    if processes.is_leader():
        storage.write_whole(path, make_lines())


def read_workdir_events(directory: pathlib.Path) -> list[dict]:
    """Reads the events in W/events.jsonl; returns [] if the file is missing.

    Raises:
      ValueError: a line is not an event; the message names the line.
      StorageError: the file cannot be read.
    """
    path = directory / "events.jsonl"
    if not path.is_file():
        return []
    events, lines = storage.read_lines(path, _EVENT)
    if lines[-1]:  # the file is always written whole
        raise ValueError(f"{path} line {len(lines)} is incomplete")
    storage.check_stored_step_order(path, events, strict=False)
    return events


def check_files(directory: pathlib.Path) -> None:
    """Checks that a continued run can read its events and its evaluations.

    Raises:
      ValueError: a file is damaged; the message names the file and the line.
      StorageError: a file cannot be read.
    """
    try:
        read_workdir_events(directory)
    except ValueError as error:
        advice = "remove this file, to rebuild it from metrics.jsonl"
        raise ValueError(f"{error}: {advice}") from error
    evaluation_files.check_partials(directory / "eval")
    for path in sorted((directory / "eval").glob("step_*.json")):
        try:
            evaluation_files.read_evaluation(path)
        except ValueError as error:
            raise ValueError(f"{error}: {_advise_on_damaged_result(directory, path)}") from error


def _advise_on_damaged_result(directory: pathlib.Path, path: pathlib.Path) -> str:
    """Returns advice about a damaged result of an evaluation, for a message."""
    names = [folder.name for folder in (directory / "checkpoints").glob("*")]
    saved, step = [int(name) for name in names if name.isdecimal()], read_step(path)
    if step in saved:
        command = f"python -m copsd_jax.evaluate --workdir={directory} --steps={step}"
        return f"to evaluate again: {command}"
    if 0 < step < max(saved, default=0):
        return f"remove this file; without checkpoint {step}, the step cannot be evaluated again"
    return "remove this file, to evaluate again"


def remove_later(directory: pathlib.Path, first: int, steps: int) -> None:
    """Removes outdated records and evaluations of the steps after `first`.

    These steps are trained again, perhaps with another schedule of the learning rate. An evaluation
    that names its policy is kept if its step is at most `steps`, because the run reuses an
    evaluation only for the same policy.

    Args:
      directory: the work directory.
      first: the step from which the run continues.
      steps: the last step of the run.

    Raises:
      StorageError: a file cannot be read or removed.
    """
    for path in (directory / "rollouts").glob("step_*.jsonl"):
        if read_step(path) > first:
            storage.remove(path)
    for path in sorted((directory / "eval").glob("step_*.json*")):
        step, whole = read_step(path), path.suffix == ".json"
        if step > steps or (
            step > first and whole and "policy" not in evaluation_files.read_evaluation(path)
        ):
            storage.remove(path)
            print(f"{path} may belong to another schedule, so it is removed", flush=True)


def read_step(path: pathlib.Path) -> int:
    """Returns the step in the name of a step's file; 0 if the name has none."""
    found = re.match(r"step_(\d+)\.", path.name)
    return int(found[1]) if found else 0


def step_file(directory: pathlib.Path, kind: str, step: int) -> pathlib.Path:
    """Returns the path of a step's file, such as W/rollouts/step_000007.jsonl for `rollouts`."""
    suffix = {"rollouts": "jsonl", "eval": "json"}[kind]
    return directory / kind / f"step_{step:06d}.{suffix}"


def read_commit() -> str:
    """Returns the commit of the code, or '' if the code is not in a git checkout."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or no git checkout
        return ""


def partial_file(file: pathlib.Path) -> pathlib.Path:
    """Returns the file that keeps the completions of an evaluation until `file` is written."""
    return file.with_suffix(".partial.jsonl")


def load_run_config(directory: pathlib.Path) -> config_lib.Config:
    """Loads the config of a work directory, for use on this machine.

    The settings of the mesh and of the attention kernels are reset to their defaults, because
    results do not depend on these settings.

    Args:
      directory: the work directory of a run.

    Raises:
      FileNotFoundError: the directory does not contain a run.
      ValueError: the run has a setting that this version does not have.
    """
    config, saved = config_lib.default(), read_settings(directory)
    unknown = saved.keys() - config_lib.flat(config).keys()
    if unknown:
        raise ValueError(
            f"--workdir={directory} was written by another version of this program: it has the "
            f"unknown settings {sorted(unknown)}"
        )
    config_lib.assign(config, saved)
    # The mesh and the kernels of the saved run may not suit this machine.
    config.mesh.update(config_lib.default().mesh)
    config.model.attention = config.sampler.attention = "auto"
    return config
