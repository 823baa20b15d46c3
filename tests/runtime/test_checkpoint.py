"""Oracle: the arrays before saving, bit for bit; a directory listing for what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from copsd_jax.runtime import checkpoint, sharding
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


def test_round_trip_is_bit_equal_and_the_newest_are_kept(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c", keep=2, writer=True) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step))
        assert checkpoints.steps() == [2, 3]
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        assert_same(checkpoints.load(2, make_state(0)), make_state(2))
        with pytest.raises(ValueError, match=r"no checkpoint of step 1.*\[2, 3\]"):
            checkpoints.load(1, make_state(0))


def test_loads_onto_another_mesh(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c", writer=True) as checkpoints:
        checkpoints.save(5, make_state(5))
        devices = sharding.make_mesh(2, 2, 2)
        like = sharding.shard_by_name(make_state(0), devices)
        loaded = checkpoints.load(5, like)
    assert loaded.trained["q"]["a"].sharding == like.trained["q"]["a"].sharding
    assert_same(jax.device_get(loaded), jax.device_get(make_state(5)))


def test_another_tree_is_refused_with_the_difference(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c", writer=True) as checkpoints:
        checkpoints.save(1, make_state(1))
        with pytest.raises(ValueError, match=r"\['q'\]\['a'\].*\(2, 4, 8\).*\(2, 6, 8\)"):
            checkpoints.load(1, make_state(1, width=6))


def test_an_unfinished_save_is_ignored(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c", writer=True) as checkpoints:
        checkpoints.save(1, make_state(1))
    (tmp_path / "c" / "2.orbax-checkpoint-tmp-0").mkdir()
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == [1]
