"""Files of bad steps, and what is said of numbers that are not finite.

Oracle: directory listings and sentences by hand.
"""

import json

import damage
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copsd_jax.runtime import bad_steps, checkpoint, nonfinite, sharding


def state_of(step: int):
    return {"step": jnp.int32(step), "trained": {"q": jnp.full((2, 3), step, jnp.float32)}}


def inputs_of(step: int):
    return {"batch": (np.full(3, step), None), "lr_factor": np.float32(0.5)}


def told(bad: int, finite: int = 1):
    loss = np.float32(np.nan if bad else 1.5)
    return {"bad": bad, "weights_finite": finite, "loss": loss, "grad_norm": np.float32(2)}


def record(bad, step: int, broken: int, finite: int = 1):
    bad.record(step, state_of(step), inputs_of(step), told(broken, finite))


def test_a_streak_stops_the_run_and_is_not_saved(tmp_path):
    bad = bad_steps.BadSteps(tmp_path, 3)
    for step, broken in ((1, 0), (2, 1), (3, 1), (4, 0), (5, 1), (6, 1)):
        record(bad, step, broken)
        bad.check(step, lambda: [1])
        assert bool(bad.describe(step)) == bool(bad.refuses_save(step, False)) == broken
    assert bad.describe(6) == [
        "step 6: the loss is nan and the gradient's norm 2 (bad step 2 in a row), so the weights "
        "stay as they were; to run the step again: python -m copsd_jax.replay "
        f"--workdir={tmp_path} --step=6"
    ]
    assert bad.refuses_save(6, False) == ["step 6 is not saved, because the last 2 steps were bad"]
    assert bad.refuses_save(6, True) == []
    record(bad, 7, 1)
    with pytest.raises(nonfinite.NonFinite) as error:
        bad.check(7, lambda: [1, 4])
    assert str(error.value) == (
        "step 7: the loss is nan and the gradient's norm 2 (bad step 3 in a row), and "
        f"guards.bad_steps is 3; the last good checkpoint is {tmp_path}/checkpoints/4; to run the "
        f"step again: python -m copsd_jax.replay --workdir={tmp_path} --step=7"
    )


@pytest.mark.parametrize("pattern", ["", "0", "0110", "1011", "0111"])
def test_a_continued_run_counts_the_bad_steps_before_it(tmp_path, pattern):
    """Oracle: one object that counts all steps, and is not replaced before the last two."""
    whole = bad_steps.BadSteps(tmp_path, 5)
    for step, broken in enumerate(pattern, 1):
        record(whole, step, int(broken))
    lines = [json.dumps({"step": k, "bad": float(x)}) for k, x in enumerate(pattern, 1)]
    folders = {path.name for path in (tmp_path / "bad").glob("state_*")}
    continued = bad_steps.BadSteps(tmp_path, 5, lines)
    for step in (len(pattern) + 1, len(pattern) + 2):
        said = []
        for bad in (whole, continued):
            record(bad, step, 1)
            try:
                bad.check(step, lambda: [1])
            except nonfinite.NonFinite as error:
                said.append(str(error))
            said.append((bad.streak, bad.describe(step), bad.refuses_save(step, False)))
        assert said[: len(said) // 2] == said[len(said) // 2 :]
        assert (len(said) == 4) == (pattern == "0111" and step == 6)
    # The state before the streak is kept, from which `replay` runs the steps again.
    assert folders <= {path.name for path in (tmp_path / "bad").glob("state_*")}


def test_without_a_limit_only_the_weights_stop_the_run(tmp_path):
    bad = bad_steps.BadSteps(tmp_path, 0)
    for step in range(1, 14):
        record(bad, step, 1)
        bad.check(step, list)
    assert len(list(tmp_path.glob("bad/step_*"))) == bad_steps.BATCHES
    assert "only the first 10 steps" in bad.describe(13)[0]
    record(bad, 14, 0, finite=0)
    with pytest.raises(nonfinite.NonFinite, match="not finite after step 14; there is no checkp"):
        bad.check(14, list)


def test_the_files_of_the_newest_three_streaks_are_kept(tmp_path):
    bad, folder = bad_steps.BadSteps(tmp_path, 0), tmp_path / "bad"
    pattern = [0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1]
    for step, broken in enumerate(pattern, 1):
        record(bad, step, broken)
    names = {path.name for path in folder.iterdir()}
    kept = ["step_000005.npz", "step_000008.npz", "step_000009.npz", "step_000011.npz"]
    assert names == {*kept, "state_000004", "state_000007", "state_000010"}
    for step, before in ((5, 4), (8, 7), (9, 7), (11, 10)):
        assert bad_steps.find_state(tmp_path, step).name == f"state_{before:06d}"
    # The state is that after the first bad step, whose weights are those before it.
    found = checkpoint.read_state(folder / "state_000007", state_of(0))
    jax.tree.map(np.testing.assert_array_equal, found, state_of(8))
    like = {"inputs": {"batch": (0, 0), "lr_factor": 0}, "results": {"loss": 0, "grad_norm": 0}}
    content = bad_steps.read_arrays(folder / "step_000009.npz", like)
    np.testing.assert_array_equal(content["inputs"]["batch"][0], [9, 9, 9])
    assert content["inputs"]["batch"][1] is None
    assert content["inputs"]["lr_factor"] == 0.5
    assert np.isnan(content["results"]["loss"])
    # A continued run repeats the last two streaks: their files are written again.
    again = bad_steps.BadSteps(tmp_path, 0)
    for step in (7, 8, 9):
        record(again, step, pattern[step - 1])
    names = {path.name for path in folder.iterdir()}
    assert names == {*kept[:3], "state_000004", "state_000007"}
    with pytest.raises(FileNotFoundError, match="no state of a step before 4"):
        bad_steps.find_state(tmp_path, 4)


def test_arrays_that_are_not_finite_are_named():
    tree = {
        "a": {"x": jnp.ones((2, 2)), "y": jnp.asarray([1.0, jnp.inf])},
        "b": [jnp.int32(3), jnp.asarray([jnp.nan], jnp.bfloat16)],
    }
    assert nonfinite.find_nonfinite(tree) == ["a/y", "b/1"]
    assert not bool(nonfinite.is_finite(tree))
    assert bool(nonfinite.is_finite(tree["a"]["x"]))
    with pytest.raises(nonfinite.NonFinite) as error:
        nonfinite.check_finite(tree, "model.path is 'm'")
    assert str(error.value) == "model.path is 'm': not all numbers are finite in a/y, b/1"
    nonfinite.check_finite(tree["a"]["x"], "x")
    with pytest.raises(nonfinite.NonFinite, match=r"in 0, 1, 2 and 2 more arrays$"):
        nonfinite.check_finite([jnp.asarray(jnp.nan)] * 5, "x")


def test_sharded_arrays_are_checked_whole():
    mesh = sharding.make_mesh(2, 2, 2)
    x = np.ones((8, 8), np.float32)
    x[5, 6] = np.nan
    with jax.set_mesh(mesh):
        placed = sharding.shard_by_name(
            {"q": {"a": x[None]}, "k": {"a": np.ones_like(x)[None]}}, mesh
        )
        assert nonfinite.find_nonfinite(placed) == ["q/a"]


def test_records_are_json():
    record = {"a": [1.0, float("nan")], "b": {"c": [float("-inf")]}, "d": None, "e": 3, "f": "x"}
    said = nonfinite.spell_numbers(record)
    assert said == {"a": [1.0, "nan"], "b": {"c": ["-inf"]}, "d": None, "e": 3, "f": "x"}
    json.dumps(said, allow_nan=False)


@pytest.mark.parametrize("keep", [0, 30, 200])
def test_a_damaged_file_of_inputs_is_named(tmp_path, keep):
    record(bad_steps.BadSteps(tmp_path, 0), 1, 1)
    path = bad_steps.step_file(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{path} is damaged: "):
        bad_steps.read_arrays(path, {"inputs": inputs_of(1)})


@pytest.mark.parametrize("name", damage.CHECKPOINT_FILES)
def test_a_damaged_state_is_named(tmp_path, name):
    record(bad_steps.BadSteps(tmp_path, 0), 1, 1)
    path = bad_steps.find_state(tmp_path, 1)
    damage.flip(damage.find(path, name))
    with pytest.raises(checkpoint.DamagedCheckpoint) as caught:
        checkpoint.read_state(path, state_of(0))
    assert str(caught.value).startswith(f"checkpoint {path.name} in {path.parent} is damaged (")


def test_a_state_of_another_shape_is_named(tmp_path):
    record(bad_steps.BadSteps(tmp_path, 0), 1, 1)
    like = state_of(0) | {"trained": {"q": jnp.zeros((2, 5))}}
    said = r"\['trained'\]\['q'\] = float32 \(2, 3\), but the run needs float32 \(2, 5\)$"
    with pytest.raises(checkpoint.UnusableCheckpoint, match=said):
        checkpoint.read_state(bad_steps.find_state(tmp_path, 1), like)
