"""A run is its work directory: what lies where in it, and which run it belongs to.

W/config.json            every setting
W/run.json               versions, commit, devices, seed, fingerprints of model and data
W/metrics.jsonl          one line a step, and W/tensorboard/ with the same
W/events.jsonl           what guards did, where one did something: step, action, text
W/rollouts/step_NNNNNN.jsonl
W/eval/step_NNNNNN.json, and while it is being made step_NNNNNN.partial.jsonl
W/checkpoints/           Orbax
W/engine/                weights for the server of sampler.engine=server, the newest alone
"""

import datetime
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable

from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import processes

# Settings that cannot change the numbers: a run may be continued with other values of them.
CHANGEABLE = (
    *("description", "mesh.", "train.save_every", "train.keep", "train.log_rollouts", "eval.every"),
    # The same tokens in other rows.
    *("rollout.slots", "eval.slots", "author.slots"),
    *("train.pack", "train.row_tokens", "train.micro_tokens"),
    # Products of other shapes, the same texts but for their rounding.
    *("sampler.steps", "sampler.pack", "sampler.attention", "sampler.gather", "sampler.warmup"),
    *("model.attention", "model.remat"),
    # How long and how often a server is asked, not what. A different failure or reply of the server
    # does not make this a different run.
    *("sampler.url", "sampler.folder"),
    *(
        f"{section}.{name}"
        for section in ("author", "sampler")
        for name in ("timeout", "retries", "backoff", "concurrency", "key_env")
    ),
)
_PACKAGES = "jax jaxlib flax optax orbax-checkpoint transformers grain ml-collections numpy".split()


def _listed(value: object) -> object:
    return [_listed(item) for item in value] if isinstance(value, tuple | list) else value


def check_writable(directory: pathlib.Path, flag: str) -> None:
    """Checks that a directory can be created or written, with a temporary one beside it.

    Raises:
      OSError: it cannot; the message names the flag.
    """
    parent = directory
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(f"{flag}={directory}: {parent} is a file")
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        problem = f"{parent} cannot be written ({error.strerror or error})"
        raise PermissionError(f"{flag}={directory}: {problem}") from error


def check_directory(directory: pathlib.Path, settings: dict[str, object]) -> bool:
    """Returns whether the directory holds this very run already; writes nothing.

    Raises:
      ValueError: it belongs to a run with other settings, which are named, or to no run.
      OSError: it cannot be written.
    """
    check_writable(directory, "--workdir")
    if not directory.exists() or not any(directory.iterdir()):
        return False
    if not (directory / "config.json").is_file():
        raise ValueError(f"--workdir={directory} holds files but no config.json: not a run of ours")
    # A setting that is newer than the run had its default.
    defaults = config_lib.flat(config_lib.default())
    old = {name: _listed(value) for name, value in defaults.items()} | read_settings(directory)
    differences = [
        f"{name} was {old.get(name)!r}, now {_listed(settings.get(name))!r}"
        for name in sorted(old.keys() | settings.keys())
        if old.get(name) != _listed(settings.get(name)) and not name.startswith(CHANGEABLE)
    ]
    if differences:
        raise ValueError(
            f"--workdir={directory} belongs to another config ({'; '.join(differences)}): "
            "choose another directory, or the same settings"
        )
    return True


def check_fingerprints(directory: pathlib.Path, facts: dict) -> None:
    """Checks that a run continues with the data and the model that it began with.

    Raises:
      ValueError: the contents differ; the message names them.
    """
    path = directory / "run.json"
    if not path.is_file():  # stopped before it was written: nothing was trained yet
        return
    old = read_json(path)["starts"][0]
    # A fingerprint that is newer than the run cannot be held against it.
    now = {name: fact for name, fact in facts.items() if name.endswith("fingerprint")}
    if changed := [name for name, fact in now.items() if old.get(name, fact) != fact]:
        raise ValueError(
            f"--workdir={directory} was begun with other contents than there are now "
            f"({', '.join(changed)}): choose another directory, or restore the files"
        )


def create(directory: pathlib.Path, settings: dict[str, object], facts: dict) -> None:
    """Creates the directory with config.json and run.json, which gets one more start each time.

    The leading process creates it, and the others wait.

    Args:
      directory: on a disk that all processes share.
      settings: every setting by its name.
      facts: devices and fingerprints; versions, commit and time are added here.

    Raises:
      OSError: it cannot be created, or another process does not see it.
    """
    processes.run_on_leader(lambda: _create(directory, settings, facts))
    if not (directory / "run.json").is_file():
        raise OSError(
            f"--workdir={directory} is not the leading process's: it has to be one directory for "
            "all processes, on a disk that they share"
        )


def _create(directory: pathlib.Path, settings: dict[str, object], facts: dict) -> None:
    for name in ("rollouts", "eval", "checkpoints"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", {k: _listed(v) for k, v in settings.items()})
    path = directory / "run.json"
    starts = read_json(path)["starts"] if path.is_file() else []
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
        **facts,
    }
    write_json(path, {"starts": [*starts, start]})


def read_settings(directory: pathlib.Path) -> dict[str, object]:
    """Reads the settings of an existing run, by their full names.

    Raises:
      FileNotFoundError: the directory holds no run.
      ValueError: config.json is not a file of settings.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"--workdir={directory} holds no config.json: not a run of ours")
    try:
        settings = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings: it is not a file of ours")
    return config_lib.without_retired(settings, f"--workdir={directory}")


def read_json(path: pathlib.Path) -> dict:
    """Reads a file of `write_json`."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes a JSON file on the leading process alone."""
    _write(path, lambda: [json.dumps(value, ensure_ascii=False, indent=1) + "\n"])


def write_jsonl(path: pathlib.Path, rows: list[dict]) -> None:
    """Writes one row a line, on the leading process alone."""
    _write(path, lambda: (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(path: pathlib.Path, make_lines: Callable[[], Iterable[str]]) -> None:
    """Renames a complete file into place, so that a reader never meets half of it."""
    if processes.is_leader():
        temporary = path.with_suffix(path.suffix + ".part")
        with temporary.open("w", encoding="utf-8") as stream:
            stream.writelines(make_lines())
        temporary.replace(path)


def read_events(directory: pathlib.Path, steps: int) -> list[dict]:
    """Reads the events of W/events.jsonl up to and including a step; none without the file."""
    path = directory / "events.jsonl"
    if not path.is_file():
        return []
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [event for event in events if event["step"] <= steps]


def step_file(directory: pathlib.Path, kind: str, step: int) -> pathlib.Path:
    """Returns W/rollouts/step_000007.jsonl or W/eval/step_000007.json, by kind."""
    suffix = {"rollouts": "jsonl", "eval": "json"}[kind]
    return directory / kind / f"step_{step:06d}.{suffix}"


def _commit() -> str:
    """Returns the commit of the code, or '' if it is not a git checkout."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or no checkout
        return ""


def partial_file(file: pathlib.Path) -> pathlib.Path:
    """Returns the file that keeps the completions of an evaluation until `file` is written."""
    return file.with_suffix(".partial.jsonl")
