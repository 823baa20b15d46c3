"""Oracle: the arrays before saving, bit for bit; a directory listing for what is kept."""

import errno
import os
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from copsd_jax.runtime import checkpoint, sharding, storage
from copsd_jax.training import train_step


def make_state(seed: int, width: int = 4) -> train_step.State:
    key = jax.random.key(seed)
    trained = {
        "q": {
            "a": jax.random.normal(key, (2, width, 8), jnp.float32),
            "b": jnp.full((2, 8, 16), seed, jnp.float32),
        }
    }
    return train_step.init_train_state(trained, optax.adamw(0.1), "ema")


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert jax.tree.structure(left) == jax.tree.structure(right)


def save(directory, *steps, **options):
    with checkpoint.Checkpoints(directory, writer=True, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step))


def test_round_trip_is_bit_equal_and_the_newest_are_kept(tmp_path):
    save(tmp_path / "c", 1, 2, 3, keep=2)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "3"]
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        assert_same(checkpoints.load(2, make_state(0)), make_state(2))
        with pytest.raises(ValueError, match=r"no checkpoint of step 1.*\[2, 3\]"):
            checkpoints.load(1, make_state(0))


def test_a_state_may_be_donated_right_after_the_save(tmp_path):
    """While the files are written, the train step writes its results into the same buffers."""
    update = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {"w": jnp.arange(1 << 22, dtype=jnp.float32)}
    want = np.arange(1 << 22, dtype=np.float32)
    with checkpoint.Checkpoints(tmp_path, writer=True) as checkpoints:
        begun = time.monotonic()
        checkpoints.save(1, state)
        blocked = time.monotonic() - begun
        for _ in range(20):
            state = update(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        assert blocked < time.monotonic() - begun
        loaded = checkpoints.load(1, state)
    np.testing.assert_array_equal(loaded["w"], want)
    np.testing.assert_array_equal(state["w"], want + 20)


def test_loads_onto_another_mesh(tmp_path):
    save(tmp_path, 5)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        devices = sharding.make_mesh(2, 2, 2)
        like = sharding.shard_by_name(make_state(0), devices)
        loaded = checkpoints.load(5, like)
    assert loaded.trained["q"]["a"].sharding == like.trained["q"]["a"].sharding
    assert_same(jax.device_get(loaded), jax.device_get(make_state(5)))


def test_another_tree_is_refused_with_the_difference(tmp_path):
    save(tmp_path, 1)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for load in (lambda like: checkpoints.load(1, like), checkpoints.load_newest):
            with pytest.raises(ValueError, match=r"\['q'\]\['a'\].*\(2, 4, 8\).*\(2, 6, 8\)"):
                load(make_state(1, width=6))
    assert (tmp_path / "1").is_dir()  # another tree is not damage


def test_leftovers_are_ignored_and_removed_by_the_writer_alone(tmp_path):
    save(tmp_path, 1)
    leftovers = ("2.part", "3.part.orbax-checkpoint-tmp", "4.old.part", "5.orbax-checkpoint-tmp-0")
    for name in leftovers:
        shutil.copytree(tmp_path / "1", tmp_path / name)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
    assert len(list(tmp_path.iterdir())) == 5
    with checkpoint.Checkpoints(tmp_path, writer=True):
        assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_a_kill_at_any_operation_leaves_a_whole_checkpoint(tmp_path):
    """The names are changed in an order in which no moment is without a whole checkpoint."""
    seen = []

    def watch(event: str, args: tuple) -> None:
        if event in ("os.rename", "os.rmdir", "os.remove") and str(tmp_path) in str(args[0]):
            names = {p.name for p in tmp_path.iterdir()}
            seen.append({name for name in names if name.isdigit()})

    with checkpoint.Checkpoints(tmp_path, keep=1, writer=True) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.wait()
        sys.addaudithook(watch)
        checkpoints.save(2, make_state(2))
    assert {"1"} in seen
    assert {"1", "2"} in seen
    assert set() not in seen
    assert seen.index({"1", "2"}) > seen.index({"1"})


def test_minutes_decide_when_a_save_is_due(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    with checkpoint.Checkpoints(tmp_path, writer=True, minutes=2) as checkpoints:
        now[0] += 119
        assert not checkpoints.is_due()
        now[0] += 1
        assert checkpoints.is_due()
        checkpoints.save(1, make_state(1))
        assert not checkpoints.is_due()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        now[0] += 1e9
        assert not checkpoints.is_due()


# ------------------------------------------------------------------------------- disks that fail


def test_no_room_is_one_sentence_at_once(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1234)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    with checkpoint.Checkpoints(tmp_path, writer=True) as checkpoints:
        with pytest.raises(storage.StorageError) as caught:
            checkpoints.save(1, make_state(1))
        needed = sum(x.nbytes for x in jax.tree.leaves(make_state(1)))
        assert str(caught.value) == (
            f"{tmp_path}/1 cannot be written (it needs {needed:,} bytes, but the disk has only "
            "1,234 left)"
        )
    assert not list(tmp_path.iterdir())


def test_a_failure_in_the_background_is_raised_and_leaves_nothing(tmp_path, monkeypatch):
    """The manifest cannot be written; the failure appears at the next save, wait or exit."""

    def fails(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "x"))

    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint.manifest, "write_manifest", fails)
    said = rf"{tmp_path}/2 cannot be written \(No space left on device\)"
    with checkpoint.Checkpoints(tmp_path, writer=True) as checkpoints:
        for ask in (checkpoints.wait, lambda: checkpoints.save(3, make_state(3))):
            checkpoints.save(2, make_state(2))
            with pytest.raises(storage.StorageError, match=said):
                ask()
            assert [p.name for p in tmp_path.iterdir()] == ["1"]
    with (
        pytest.raises(storage.StorageError, match=said),
        checkpoint.Checkpoints(tmp_path, writer=True) as checkpoints,
    ):
        checkpoints.save(2, make_state(2))
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_a_removed_folder_is_one_sentence(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c", writer=True) as checkpoints:
        shutil.rmtree(tmp_path / "c")
        with pytest.raises(storage.StorageError, match=r"c/1 cannot be written \(No such file"):
            checkpoints.save(1, make_state(1))
    assert not (tmp_path / "c").exists()


def save_and_wait(checkpoints, state):
    checkpoints.save(1, state)
    checkpoints.wait()


@pytest.fixture
def disk(tmp_path):
    """A small file system in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_and_a_read_only_one(disk, monkeypatch, caplog):
    """First before the save, then in the background; with room the same save works."""
    state = {"w": jax.random.normal(jax.random.key(0), (1 << 19,))}  # 2 MiB
    with checkpoint.Checkpoints(disk / "c", writer=True) as checkpoints:
        (disk / "filler").write_bytes(bytes(3 << 20))
        for known in (True, False):
            if not known:
                monkeypatch.setattr(storage, "check_room", lambda folder, needed: None)
            begun = time.monotonic()
            said = r"/c/1 cannot be written \("
            with pytest.raises(storage.StorageError, match=said) as caught:
                save_and_wait(checkpoints, state)
            assert time.monotonic() - begun < 3
            assert "\n" not in str(caught.value)
            assert not list((disk / "c").iterdir())
            assert not caplog.records  # Orbax says nothing besides the sentence
        monkeypatch.undo()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(storage.StorageError, match=r"written \(Read-only file system\)"):
            checkpoints.save(1, state)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        (disk / "filler").unlink()
        checkpoints.save(1, state)
        checkpoints.wait()
        np.testing.assert_array_equal(checkpoints.load(1, state)["w"], state["w"])


def test_a_file_that_may_not_be_read_is_not_damage(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)

    def refuse(path, sync=False):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.manifest, "_measure_file", refuse)
    with (
        checkpoint.Checkpoints(tmp_path) as checkpoints,
        pytest.raises(storage.StorageError, match=r"2 cannot be read \(Permission denied\)"),
    ):
        checkpoints.load_newest(make_state(0))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, os.strerror(errno.EIO)),
        OSError(errno.ESTALE, os.strerror(errno.ESTALE), "d/0"),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
        ValueError('NOT_FOUND: Error reading "d/0": [OS error 5: EIO Input/output error]'),
    ],
)
def test_an_error_of_the_disk_is_not_damage(tmp_path, monkeypatch, error, old):
    """With a manifest and without: the checkpoint stays where it is."""

    def fails(path, like):
        raise error

    said = rf"^{tmp_path}/c/1 cannot be read \([A-Z][^:]+\)$"
    save(tmp_path / "c", 1)
    if old:
        monkeypatch.setattr(checkpoint, "_find_damage", lambda folder: "")
        (tmp_path / "c/1/manifest.json").unlink()
    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", fails)
    with (
        checkpoint.Checkpoints(tmp_path / "c", writer=True) as checkpoints,
        pytest.raises(storage.StorageError, match=said),
    ):
        checkpoints.load_newest(make_state(0))
    assert checkpoints.steps() == [1]


def test_an_old_checkpoint_has_no_manifest_and_is_loaded(tmp_path):
    """As the Checkpointer of earlier versions wrote it."""
    from orbax.checkpoint import v1 as ocp

    folder = tmp_path / "c"

    def write(step: int, state) -> None:
        with ocp.training.Checkpointer(str(folder)) as old:
            metadata = {"shapes": checkpoint._shapes(state)}
            old.save_checkpointables(step, {"state": state}, custom_metadata=metadata)

    write(1, make_state(1))
    write(2, make_state(2))
    with checkpoint.Checkpoints(folder, keep=2, writer=True) as checkpoints:
        assert_same(checkpoints.load_newest(make_state(0)), make_state(2))
        checkpoints.save(3, make_state(3))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
        # A part of an old one that Orbax cannot read is damage too.
        shutil.rmtree(folder / "3")
        (folder / "2/state/manifest.ocdbt").write_bytes(b"")
        state = make_state(0)
        assert checkpoints.load_newest(state) is state
    assert (tmp_path / "damaged/checkpoint_2").is_dir()
