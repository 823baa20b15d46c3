"""Writes that fail: what stays on the disk, and what is said. Oracle: the bytes before."""

import errno
import os
import pathlib
import pickle

import pytest

from copsd_jax.metrics import metric_files
from copsd_jax.runtime import failures, run_lock, storage, workdir


def test_a_failed_write_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    workdir.write_json(path, {"a": 1})
    before = path.read_bytes()

    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os if name == "fsync" else pathlib.Path, name, fails)
            with pytest.raises(storage.StorageError) as caught:
                workdir.write_json(path, {"a": 2})
        assert str(caught.value) == f"{path} cannot be written (No space left on device)"
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(storage.StorageError, match=r"absent/x cannot be written \(No such file"):
        workdir.write_jsonl(tmp_path / "absent/x", [])


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "eval").touch()
    with pytest.raises(storage.StorageError) as caught:
        workdir.create(tmp_path, {}, {})
    wanted = f"{tmp_path} cannot be written (File exists: {tmp_path / 'eval'})"
    assert str(caught.value) == wanted


def test_a_line_for_which_there_is_no_room_leaves_no_part(tmp_path, monkeypatch):
    """The disk takes three bytes of the record."""
    with storage.Appender(tmp_path / "x") as file:
        file.append(b"first\n")
        write = os.write
        monkeypatch.setattr(os, "write", lambda to, data: write(to, data[:3]))
        with pytest.raises(storage.StorageError, match=r"x cannot be written \(No space left"):
            file.append(b"second\n")
        monkeypatch.undo()
        file.append(b"third\n")
    assert (tmp_path / "x").read_bytes() == b"first\nthird\n"


def test_metrics_of_a_removed_directory(tmp_path):
    with pytest.raises(storage.StorageError, match=r"metrics\.jsonl cannot be read \(No such"):
        metric_files.read_metric_lines(tmp_path, 1)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(storage.StorageError, match=r"metrics\.jsonl cannot be .*Is a directory"):
        metric_files.Writer(tmp_path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (storage.StorageError("W/x cannot be written (No space left)"), "written (No space left)"),
        (OSError(errno.EROFS, "Read-only file system", "y"), "y: Read-only file system"),
        (failures.UnusableFile("W/x is damaged"), "W/x is damaged"),
    ],
)
def test_a_failed_disk_ends_the_run_with_one_sentence(tmp_path, error, said):
    with pytest.raises(SystemExit) as caught, failures.exit_on_failure(tmp_path):
        raise error
    text = str(caught.value)  # a text as the code: Python prints it and exits with 1
    assert text.startswith("error: ")
    assert text.endswith(f"; the same command continues {tmp_path}")
    assert said in text
    assert "\n" not in text


def test_other_errors_keep_their_traceback(tmp_path):
    with pytest.raises(ConnectionError), failures.exit_on_failure(tmp_path):
        raise ConnectionError("reset")


def test_errors_reach_the_other_processes():
    """As `run_on_leader` sends them."""
    for error in (storage.StorageError("a sentence"), run_lock.LockedError("a sentence")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == "a sentence"
