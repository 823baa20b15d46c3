"""Oracle: the files, read back by other means."""

import errno
import json
import pathlib

import pytest

from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import storage, workdir

SETTINGS = config_lib.flat(config_lib.default()) | {"train.steps": 3, "data.lang": ("en", "sw")}


def made(path):
    workdir.create(path, SETTINGS, {"seed": 0})
    return path


def test_each_start_adds_its_facts(tmp_path):
    for _ in range(2):
        path = made(tmp_path / "w")
    starts = json.loads((path / "run.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[0]["versions"]["jax"] == __import__("jax").__version__
    # The defaults with which the run began, from the source of a setting.
    assert starts[0]["defaults"]["train.save_every"] == 25
    assert "defaults" not in starts[1]


def test_a_directory_that_cannot_be_written(tmp_path):
    """/proc takes no directory, not even from root."""
    with pytest.raises(PermissionError, match=r"--workdir=/proc/w: /proc cannot be written"):
        workdir.check_writable(pathlib.Path("/proc/w"), "--workdir")
    with pytest.raises(PermissionError, match=r"--workdir=w: /proc cannot be written"):
        workdir.check_writable(pathlib.Path("/proc/w"), "--workdir", pathlib.Path("w"))
    workdir.check_writable(tmp_path / "a" / "b", "--out")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_reached(tmp_path, monkeypatch):
    """Root may reach every folder, so the system's refusal is replaced."""
    exists = pathlib.Path.exists

    def refuse(path, **options):
        if path.parent.name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return exists(path, **options)

    monkeypatch.setattr(pathlib.Path, "exists", refuse)
    said = rf"^--out={tmp_path}/locked/a: {tmp_path}/locked/a cannot be written \(Permission den"
    with pytest.raises(PermissionError, match=said):
        workdir.check_writable(tmp_path / "locked" / "a", "--out")


def test_json_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    workdir.write_json(path, {"a": "ü"})
    with pytest.raises(TypeError):
        workdir.write_json(path, {"a": object()})
    assert storage.read_object(path) == {"a": "ü"}
    workdir.write_jsonl(tmp_path / "x.jsonl", [{"a": 1}, {"b": "\u2028"}])
    lines = (tmp_path / "x.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines if line] == [{"a": 1}, {"b": "\u2028"}]


def test_files_of_later_steps_are_removed(tmp_path, capsys):
    """After a continuation from step 3 of a run that now has 5 steps."""
    for name in ("rollouts", "eval"):
        (tmp_path / name).mkdir()
    for step in range(1, 8):
        (tmp_path / f"rollouts/step_{step:06d}.jsonl").write_text("")
        (tmp_path / f"eval/step_{step:06d}.partial.jsonl").write_text("")
        result = {"step": step, "scores": {}, "problems": []} | (
            {"policy": [1, 2]} if step % 2 else {}
        )
        workdir.write_json(tmp_path / f"eval/step_{step:06d}.json", result)
    workdir.remove_later(tmp_path, 3, 5)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*")}
    assert left == {
        *(f"rollouts/step_00000{step}.jsonl" for step in (1, 2, 3)),
        *(f"eval/step_00000{step}.partial.jsonl" for step in (1, 2, 3, 4, 5)),
        *(f"eval/step_00000{step}.json" for step in (1, 2, 3, 5)),
    }
    said = capsys.readouterr().out
    assert (
        f"{tmp_path}/eval/step_000004.json may belong to another schedule, so it is removed" in said
    )
