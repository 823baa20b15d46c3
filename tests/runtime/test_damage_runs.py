"""Whole runs whose files were damaged: kind of file x kind of damage, printed as a table.

Oracle: an unbroken run. Each cell damages one file of a run that was killed in its last step, gives
the same command again, and compares the numbers of all steps, the last checkpoint, the rollouts and
the last evaluation. If a start is refused, the cell first does what the sentence says.
"""

import json
import re
import shutil

import damage
import jax
import numpy as np
import pytest
import runs

from copsd_jax import evaluate, evaluation, main
from copsd_jax.methods import distill
from copsd_jax.runtime import checkpoint

optax_promotes = runs.optax_promotes

pytestmark = pytest.mark.slow

SETTINGS = {
    "train__steps": 4, "train__save_every": 1, "train__keep": 0, "eval__limit": 2,
    "eval__every": 2, "rollout__max_tokens": 4, "train__batch": 8,
    "guards__rules": "tokens>1:warn",
}  # fmt: skip
LAST = "checkpoints/3"
NEWEST = [
    *[(f"{LAST}/{name}", how) for name in damage.CHECKPOINT_FILES for how in damage.FILE],
    (LAST, "empty folder"),
]
TEXT = [
    ("config.json", ("truncated", "zeroed", "one bit flipped", "deleted", "garbage line")),
    ("run.json", ("truncated", "zeroed", "one bit flipped", "garbage line")),
    ("metrics.jsonl", ("one bit flipped", "garbage line", "torn line")),
    ("events.jsonl", ("truncated", "zeroed", "one bit flipped", "deleted", "torn line")),
    ("eval/step_000000.json", ("truncated", "zeroed", "one bit flipped", "deleted", "emptied")),
    ("eval/step_000002.json", ("truncated",)),
    ("eval/step_000003.partial.jsonl", ("garbage line",)),
]
CELLS = [*NEWEST, *((name, how) for name, hows in TEXT for how in hows)]


def contents(directory):
    """What must be equal: numbers, texts and evaluations."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    out = {
        "metrics": [
            {k: v for k, v in json.loads(line).items() if not k.startswith("seconds/")}
            for line in lines
        ]
    }
    for pattern in ("rollouts/*", "eval/*", "events.jsonl"):
        out |= {str(p.relative_to(directory)): p.read_bytes() for p in directory.glob(pattern)}
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "w"
    assert main.main(runs.argv("copsd", directory, **SETTINGS)) == 0
    return directory


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that ends in its fourth step."""
    directory, patch = tmp_path_factory.mktemp("killed") / "w", pytest.MonkeyPatch()
    make_batch = distill.make_batch

    def stop(r, state, rows, step):
        if step == 3:
            raise KeyboardInterrupt
        return make_batch(r, state, rows, step)

    patch.setattr(distill, "make_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        main.main(runs.argv("copsd", directory, **SETTINGS))
    patch.undo()
    (directory / "eval/step_000003.partial.jsonl").write_text('{"seed": 0}\n')
    return directory


@pytest.fixture(scope="module")
def like():
    with runs.loaded("copsd", **SETTINGS) as (_, state):
        yield state


@pytest.fixture(scope="module")
def table():
    rows: list[tuple[str, str, str]] = []
    yield rows
    print()
    for row in rows:
        print(" | ".join(row))
    print(f"{len(rows)} cells")


def arrays(directory, like):
    with checkpoint.Checkpoints(directory / "checkpoints") as checkpoints:
        state = checkpoints.load(4, like)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize(("name", "how"), CELLS)
def test_the_run_ends_as_the_unbroken_one(
    whole, killed, like, table, tmp_path, capsys, name, how
):  # fmt: skip
    directory = shutil.copytree(killed, tmp_path / "w")
    path, settings = damage.find(directory, name), (directory / "config.json").read_bytes()
    (damage.empty_folder if how == "empty folder" else damage.LINES[how])(path)
    argv = runs.argv("copsd", directory, **SETTINGS)
    capsys.readouterr()
    code = main.main(argv)
    out, err = capsys.readouterr()
    said = [line for line in out.splitlines() if str(directory) in line and "directory" not in line]
    if code == 2:
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert str(directory) in line
        said = [line]
        if "remove this file" in line:
            path.unlink()
        elif "remove this line" in line:
            lines = [x for x in path.read_bytes().split(b"\n") if x.isascii() and x]
            path.write_bytes(b"".join(x + b"\n" for x in lines))
        else:
            said_command = line.partition("python -m copsd_jax.")[2]
            assert evaluate.main(said_command.split()) == 0
        code = main.main(argv)
    assert code == 0
    (directory / "eval/step_000003.partial.jsonl").unlink(missing_ok=True)
    assert (directory / "config.json").read_bytes() == settings
    got, want = contents(directory), contents(whole)
    if name == "metrics.jsonl" and how == "one bit flipped":  # the flipped line cannot be restored
        got["metrics"] = [x for x in want["metrics"] if x["step"] == 2 and "loss" in x] + got[
            "metrics"
        ]
        got["metrics"].sort(key=lambda row: row["step"])
    assert got.keys() == want.keys()
    for key in want:
        assert got[key] == want[key], key
    for a, b in zip(arrays(directory, like), arrays(whole, like), strict=True):
        np.testing.assert_array_equal(a, b)
    assert said or (name, how) == ("eval/step_000000.json", "deleted")  # evaluated again
    first = re.sub(re.escape(str(directory)), "W", said[0]) if said else "evaluated again"
    table.append((name, how, first))


def test_an_interrupted_evaluation_is_completed(whole, tmp_path, monkeypatch):
    """The kill comes in the evaluation at step 2, whose checkpoint is saved."""
    argv, sample = runs.argv("copsd", tmp_path / "w", **SETTINGS), evaluation.evaluate
    calls = []

    def stop(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(evaluation, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        main.main(argv)
    assert not (tmp_path / "w/eval/step_000002.json").exists()
    monkeypatch.undo()
    assert main.main(argv) == 0
    assert contents(tmp_path / "w") == contents(whole)
