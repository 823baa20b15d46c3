"""The count of starts without progress: against a history that is told step by step."""

import json
import subprocess
import sys

import conftest
import pytest

from copsd_jax.runtime import tries, workdir


def tell(folder, checkpoint=None, steps=None, complete=None, completions=None):
    """Writes the files of a run that has come this far."""
    for name in ("checkpoints", "eval"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if checkpoint is not None:
        (folder / "checkpoints" / str(checkpoint)).mkdir()
    if steps is not None:
        (folder / "metrics.jsonl").write_text('{"step": 1}\n' * steps)
    if complete is not None:
        (folder / "eval" / f"step_{complete:06d}.json").write_text("{\n}\n")
    if completions is not None:
        (folder / "eval" / "step_000009.partial.jsonl").write_text("{}\n" * completions)


# What happened before each start, and the starts without progress that each start must count.
HISTORIES = {
    "nothing": [({}, 1), ({}, 2), ({}, 3), ({}, 4)],
    "checkpoints": [({"checkpoint": 9}, 1), ({"checkpoint": 10}, 1), ({}, 2),
                    ({"checkpoint": 11}, 1)],
    "steps": [({"steps": 3}, 1), ({"steps": 4}, 1), ({"steps": 2}, 2), ({"steps": 4}, 3),
              ({"steps": 5}, 1)],
    "evaluation": [({"completions": 3}, 1), ({"completions": 5}, 1), ({"completions": 5}, 2)],
    "second evaluation": [({"completions": 5}, 1), ({"complete": 9, "completions": 0}, 1),
                          ({"completions": 1}, 1), ({"completions": 1}, 2)],
}  # fmt: skip


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_starts_without_progress_are_counted(tmp_path, history):
    for attempt, (happened, wanted) in enumerate(history):
        tell(tmp_path, **happened)
        for _ in range(3):  # every process of the run counts the same start
            assert tries.count_try(tmp_path, attempt)[0] == wanted
    assert tries.count_try(tmp_path, 0)[0] == 1  # the user's own start counts anew
    assert sorted(path.name for path in tmp_path.glob("tries*")) == ["tries.json"]


def test_a_lost_checkpoint_is_progress_when_it_is_made_again(tmp_path):
    tell(tmp_path, checkpoint=8)
    assert tries.count_try(tmp_path, 0)[0] == 1
    (tmp_path / "checkpoints" / "8").rename(tmp_path / "damaged")
    tell(tmp_path, checkpoint=4)
    assert tries.count_try(tmp_path, 1)[0] == 2
    tell(tmp_path, checkpoint=6)
    assert tries.count_try(tmp_path, 2)[0] == 1


def start(folder, attempt, *program, limit=2):
    return subprocess.run(
        [sys.executable, "-m", "copsd_jax.runtime.tries", f"--workdir={folder}",
         f"--attempt={attempt}", f"--limit={limit}", *program],
        cwd=conftest.ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_the_program_takes_the_place_of_the_count_until_the_limit(tmp_path):
    """Its output, its exit code and its process id are those of the command."""
    code = "import sys, os; print(sys.argv[1:]); os.kill(os.getppid(), 0); sys.exit(143)"
    program = ("--", "-c", code, "a b", "--", "--workdir=x")
    for attempt in (0, 1):
        done = start(tmp_path, attempt, *program)
        assert (done.returncode, done.stderr) == (143, "")
        assert done.stdout == "['a b', '--', '--workdir=x']\n"
    done = start(tmp_path, 2, *program)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"error: --workdir={tmp_path}: 2 starts in a row made no progress"
    )
    assert done.stderr.count("\n") == 1
    assert start(tmp_path, 2).returncode == 2  # also without a program
    assert start(tmp_path, 0).returncode == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"attempt": 0, "tries": 1, "best": [1, 2]}',
        '{"attempt": "0", "tries": 1, "best": [1, 2, [3, 4]]}',
        '{"attempt": 0, "tries": 1, "best": [1, 2, [3, Infinity]]}',
    ],
)
def test_a_damaged_count_is_named(tmp_path, text):
    (tmp_path / "tries.json").write_text(text)
    done = start(tmp_path, 1)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/tries.json is damaged: remove this file")
    assert done.stderr.count("\n") == 1
    assert start(tmp_path, 0).returncode == 0
    assert json.loads((tmp_path / "tries.json").read_text())["tries"] == 1


def test_a_folder_with_only_the_count_is_a_new_one(tmp_path):
    tries.count_try(tmp_path, 0)
    assert not workdir.has_files(tmp_path)
