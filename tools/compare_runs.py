"""Runs every card's tiny preset for a few steps, or compares two sets of such runs bit for bit.

    python tools/compare_runs.py run TREE OUT [--steps=5] [--cards=opsd,copsd]
    python tools/compare_runs.py compare OUT_A OUT_B   (or two work directories)

`run` starts `python -m copsd_jax.main` in the checkout TREE, once for each card, and writes the
work directories below OUT.

`compare` reads two such folders and prints one line per card. It compares:
  - the metrics of every step, without times;
  - the record of every completion: prompt, token ids, values of each token;
  - the scores and answers of every evaluation;
  - the arrays of the last checkpoint.

The exit code is 1 if anything differs. Run both trees on the same machine, because other processors
round differently.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as ocp

CARDS = ("opsd", "copsd", "rosd", "critique", "sdpo", "grpo", "sft")
# Additional settings of single cards. They run code that the presets do not run.
VARIANTS = {
    "sdpo_full": ("sdpo", "--config.train.trainable=full"),
    "opsd_packed": ("opsd", "--config.train.pack=rows"),
    "grpo_shared": ("grpo", "--config.train.pack=shared"),
    "rosd_tail": ("rosd", "--config.loss.top_k=8", "--config.loss.tail=True"),
    "opsd_trust": ("opsd", "--config.teacher.weights=trust_region"),
}


def run(tree: pathlib.Path, out: pathlib.Path, steps: int, names: list[str]) -> int:
    """Runs the named cards and variants in a checkout; returns the number of runs that failed."""
    failed = 0
    for name in names:
        card, *settings = VARIANTS.get(name, (name,))
        command = [
            sys.executable, "-m", "copsd_jax.main", f"--config=configs/{card}.py:tiny",
            f"--workdir={out.resolve() / name}", f"--config.train.steps={steps}", *settings,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
        print(f"{name}: exit code {done.returncode}", flush=True)
        if done.returncode:
            failed += 1
            print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
    return failed


def _without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not name.startswith("seconds")}


def _json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of the newest checkpoint as {path in the tree: array}."""
    import jax

    folder = workdir.resolve() / "checkpoints"
    step = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    path = str(folder / str(step))
    # The devices that saved the arrays may not exist here.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        ocp.checkpointables_metadata(path).metadata["state"],
    )
    tree = ocp.load_checkpointables(path, {"state": shapes})["state"]
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _contents(workdir: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Yields (name, value) for everything in a work directory that must be equal."""
    for k, line in enumerate(_json_lines(workdir / "metrics.jsonl")):
        yield f"metrics.jsonl line {k + 1}", _without_times(line)
    for path in sorted((workdir / "rollouts").glob("*.jsonl")):
        for k, record in enumerate(_json_lines(path)):
            yield f"{path.name} line {k + 1}", record
    for path in sorted((workdir / "eval").glob("*.json")):
        yield path.name, json.loads(path.read_text(encoding="utf-8"))
    yield from _arrays(workdir).items()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        same_type = type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
        return same_type and a.tobytes() == b.tobytes()
    return json.dumps(a) == json.dumps(b)


def list_differences(left: pathlib.Path, right: pathlib.Path) -> tuple[int, list[str]]:
    """Compares two work directories; returns the number of compared values, and what differs."""
    ours, theirs = dict(_contents(left)), dict(_contents(right))
    names = sorted(ours.keys() | theirs.keys())
    same = lambda name: name in ours and name in theirs and _same(ours[name], theirs[name])  # noqa: E731
    return len(names), [name for name in names if not same(name)]


def _is_run(folder: pathlib.Path) -> bool:
    return (folder / "metrics.jsonl").is_file()


def compare(left: pathlib.Path, right: pathlib.Path) -> int:
    """Prints one line per card; returns the number of cards that differ.

    If both folders are work directories, they count as the runs of one card.
    """
    names = sorted({path.name for folder in (left, right) for path in folder.iterdir()})
    if _is_run(left) and _is_run(right):
        names = ["."]
    differing = 0
    for name in names:
        if not _is_run(left / name) or not _is_run(right / name):
            print(f"{name}: no work directory of a run in one of the folders")
            differing += 1
            continue
        count, wrong = list_differences(left / name, right / name)
        differing += bool(wrong)
        kinds = f"{count} metrics lines, records, evaluations and arrays"
        print(f"{name}: {kinds}: " + (f"DIFFER, first {wrong[0]}" if wrong else "bit-equal"))
    return differing


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("tree", type=pathlib.Path)
    runs.add_argument("out", type=pathlib.Path)
    runs.add_argument("--steps", type=int, default=5)
    runs.add_argument("--cards", default=",".join((*CARDS, *VARIANTS)))
    compared = commands.add_parser("compare")
    compared.add_argument("left", type=pathlib.Path)
    compared.add_argument("right", type=pathlib.Path)
    args = parser.parse_args(argv)
    if args.command == "run":
        return int(run(args.tree, args.out, args.steps, args.cards.split(",")) > 0)
    return int(compare(args.left, args.right) > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
