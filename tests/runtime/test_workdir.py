"""Oracle: the files, read back by other means."""

import json
import pathlib

import pytest

from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import workdir

SETTINGS = config_lib.flat(config_lib.default()) | {"train.steps": 3, "data.lang": ("en", "sw")}


def made(path):
    workdir.create(path, SETTINGS, {"seed": 0})
    return path


def test_the_same_settings_continue_and_free_ones_may_change(tmp_path):
    assert not workdir.check_directory(tmp_path / "w", SETTINGS)
    assert not (tmp_path / "w").exists()  # checking writes nothing
    path = made(tmp_path / "w")
    assert workdir.check_directory(path, SETTINGS)
    assert workdir.check_directory(path, {**SETTINGS, "mesh.data": 8})
    made(path)
    starts = json.loads((path / "run.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[0]["versions"]["jax"] == __import__("jax").__version__


def test_another_config_is_refused_with_the_difference(tmp_path):
    path = made(tmp_path / "w")
    with pytest.raises(ValueError, match=r"train\.steps was 3, now 4; x\.new was None, now 1"):
        workdir.check_directory(path, {**SETTINGS, "train.steps": 4, "x.new": 1})


def test_directories_that_are_not_ours_or_cannot_be_written(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no run began there"):
        workdir.check_directory(tmp_path / "other", SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        workdir.check_directory(tmp_path / "file" / "w", SETTINGS)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        workdir.read_settings(tmp_path / "absent")


def test_a_directory_that_cannot_be_written(tmp_path):
    """/proc takes no directory, not even from root."""
    with pytest.raises(PermissionError, match=r"--workdir=/proc/w: /proc cannot be written"):
        workdir.check_directory(pathlib.Path("/proc/w"), SETTINGS)
    workdir.check_writable(tmp_path / "a" / "b", "--out")
    assert not list(tmp_path.iterdir())


def test_damaged_and_older_settings(tmp_path):
    path = made(tmp_path / "w")
    (path / "config.json").write_text('{"a":')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        workdir.check_directory(path, SETTINGS)
    (path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object: restore"):
        workdir.check_directory(path, SETTINGS)
    every = config_lib.flat(config_lib.default())
    older = {k: v for k, v in every.items() if k != "loss.beta"}
    workdir.create(tmp_path / "old", older, {})
    assert workdir.check_directory(tmp_path / "old", every)  # what it lacks had its default
    with pytest.raises(ValueError, match=r"loss\.beta was 0\.5, now 0\.1"):
        workdir.check_directory(tmp_path / "old", {**every, "loss.beta": 0.1})


def test_a_run_with_a_retired_setting_goes_on_if_it_had_no_effect(tmp_path):
    every = config_lib.flat(config_lib.default())
    workdir.create(tmp_path, every | {"loss.skip_below": 0.0}, {})
    assert workdir.check_directory(tmp_path, every)
    assert "loss.skip_below" not in workdir.read_settings(tmp_path)
    workdir.create(tmp_path, every | {"loss.skip_below": 0.5}, {})
    for read in (workdir.check_directory, lambda path, _: workdir.read_settings(path)):
        with pytest.raises(ValueError, match=r"has loss\.skip_below=0\.5: .*_below=0\.0 can be"):
            read(tmp_path, every)


def test_json_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    workdir.write_json(path, {"a": "ü"})
    with pytest.raises(TypeError):
        workdir.write_json(path, {"a": object()})
    assert workdir.read_json(path) == {"a": "ü"}
    workdir.write_jsonl(tmp_path / "x.jsonl", [{"a": 1}, {"b": "\u2028"}])
    lines = (tmp_path / "x.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines if line] == [{"a": 1}, {"b": "\u2028"}]
