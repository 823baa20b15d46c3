"""Runs that start from other weights. Oracle: the weights that were saved, merged by hand."""

import json
import re
import shutil

import conftest
import damage
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import safetensors.numpy

from copsd_jax import export, main, train
from copsd_jax.config import settings as config_lib
from copsd_jax.methods import distill
from copsd_jax.runtime import checkpoint, nonfinite, workdir
from copsd_jax.training import loaded_run, run_facts, run_plan, train_step
from copsd_jax.weights import initial_weights

optax_promotes = runs.optax_promotes

SETTINGS = {"eval__path": "", "lora__rank": 4, "lora__alpha": 6.0, "rollout__max_tokens": 6}


def make_run(directory, step=3, **settings):
    """A work directory with a checkpoint of weights that no training made; returns the weights."""
    with runs.loaded("opsd", **SETTINGS | settings) as (r, state):
        draw = np.random.default_rng(step)
        trained = jax.tree.map(
            lambda x: x + 0.05 * draw.standard_normal(x.shape, np.float32), state.trained
        )
        facts = run_facts.collect_facts(r.plan)
        workdir.create(directory, config_lib.flat(r.plan.config), facts)
        with checkpoint.Checkpoints(directory / "checkpoints", writer=True) as checkpoints:
            checkpoints.save(step, state._replace(trained=trained, step=jnp.int32(step)))
    return jax.device_get(trained)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A run with an adapter, and the trained adapter."""
    directory = tmp_path_factory.mktemp("lora") / "w"
    return directory, make_run(directory)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run of all weights, and these weights."""
    directory = tmp_path_factory.mktemp("full") / "w"
    return directory, make_run(directory, train__trainable="full", lora__rank=64, lora__alpha=128.0)


def begun(source, **settings):
    return runs.loaded("opsd", **SETTINGS | {"model__init_from": source} | settings)


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert jax.tree.structure(left) == jax.tree.structure(right)


@pytest.mark.slow
def test_from_a_run_with_an_adapter(adapted):
    directory, adapter = adapted
    with runs.loaded("opsd", **SETTINGS) as (_, plain), begun(directory) as (r, state):
        assert_same(jax.device_get(state.trained), adapter)
        assert_same(jax.device_get(state.optimizer), jax.device_get(plain.optimizer))
        assert int(state.step) == 0
        student, teacher = loaded_run.derive_run_policies(r, state)
        assert_same(jax.device_get(teacher.adapter), adapter)
        assert student.params is teacher.params
        # The copy is the initial policy's: no step moves it.
        moved = jax.tree.map(lambda x: x + 1, state.trained)
        kept = train_step._update_teacher_average(state.ema, moved, r.options)
        assert_same(jax.device_get(kept), adapter)
    with begun(directory, teacher__weights="live") as (r, state):
        assert_same(jax.device_get(state.ema), adapter)


@pytest.mark.slow
@pytest.mark.parametrize("weights", conftest.mostly_slow(["fixed", "trust_region"]))
def test_the_fixed_teacher_is_the_initial_policy(adapted, weights):
    """With equal prompts, student and teacher agree until the student has moved."""
    settings = {"context__kind": "none", "teacher__weights": weights}
    with begun(adapted[0], **settings) as (r, state):
        rows = runs.batch_at(r.plan.rows, ["en"], (), 8, 0, 0)
        work = distill.make_batch(r, state, rows, 0)
        first = jax.tree.map(jnp.copy, state)
        _, aux = r.step(first, r.frozen, work.batch, work.student_prefix, work.teacher_kv)
        assert abs(float(aux.metrics["loss"])) < 1e-6
        without = jax.tree.map(jnp.copy, state)._replace(
            ema=jax.tree.map(jnp.zeros_like, state.ema)
        )
        _, aux = r.step(without, r.frozen, work.batch, work.student_prefix, work.teacher_kv)
        assert float(aux.metrics["loss"]) > 1e-3


@pytest.mark.slow
def test_policy_kl_refers_to_the_initial_policy(adapted):
    settings = {"policy__weight": 0.5, "policy__kl": 0.3, "rollout__per_prompt": 2}
    with begun(adapted[0], reward__kind="runs:by_text", **settings) as (r, state):
        rows = runs.batch_at(r.plan.rows, ["en"], (), 8, 0, 0)
        work = distill.make_batch(r, state, rows, 0)
        _, aux = r.step(state, r.frozen, work.batch, work.student_prefix, work.teacher_kv)
        assert abs(float(aux.metrics["kl_initial"])) < 1e-7


@pytest.mark.slow
def test_from_what_was_exported(adapted, tmp_path):
    """The adapter's folder: the adapter bit for bit. The merged model: base and adapter summed."""
    directory, adapter = adapted
    for form in ("peft", "hf"):
        flags = [f"--workdir={directory}", f"--out={tmp_path / form}", f"--format={form}"]
        assert export.main(["export", *flags]) == 0
    with begun(tmp_path / "peft") as (r, state):
        assert_same(jax.device_get(state.trained), adapter)
        assert_same(jax.device_get(state.ema), adapter)
        base = jax.device_get(r.frozen)
    merged = merge_by_hand(base, adapter)
    with begun(tmp_path / "hf") as (r, state):
        assert state.ema is None
        assert not np.any(state.trained["q"]["b"])  # a new adapter
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), r.frozen, merged)
    fresh = {"train__trainable": "full", "lora__rank": 64, "lora__alpha": 128.0}
    for source in (tmp_path / "hf", directory):  # a model, and an adapter that is merged
        with begun(source, **fresh) as (r, state):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.trained, merged
            )
            assert_same(jax.device_get(r.frozen), jax.device_get(state.trained))


def merge_by_hand(base, adapter):
    layers = dict(base["layers"])
    for name, leaf in adapter.items():
        delta = np.matmul(leaf["a"].astype(np.float64), leaf["b"]) * 6.0 / 4
        layers[name] = layers[name] | {"kernel": layers[name]["kernel"] + delta}
    return base | {"layers": layers}


def test_from_a_run_of_all_weights(full):
    directory, weights = full
    fresh = {"train__trainable": "full", "lora__rank": 64, "lora__alpha": 128.0}
    with begun(directory, **fresh) as (r, state):
        assert_same(jax.device_get(state.trained), weights)
        assert_same(jax.device_get(r.frozen), weights)  # the fixed teacher
    with begun(directory) as (r, state):
        assert_same(jax.device_get(r.frozen), weights)
        assert not np.any(state.trained["q"]["b"])
        assert state.ema is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora__rank": 8}, r"its adapter has lora\.rank=4, but the run has 8"),
        ({"lora__alpha": 5.0}, r"its adapter has lora\.alpha=6\.0, but the run has 5\.0"),
        ({"lora__targets": "q,k"}, r"lora\.targets=\['down', .*, but the run has \('q', 'k'"),
        ({"seed": 9}, r"were drawn with seed=0, but the run has 9"),
        ({"teacher__weights": "ema", "policy__weight": 0.5, "policy__kl": 0.1,
          "rollout__per_prompt": 2}, r"with policy\.kl, teacher\.weights must not be 'ema'"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_are_refused(adapted, settings, said):
    with pytest.raises(ValueError, match=said) as raised:
        run_plan.make_plan(
            runs.config("opsd", **SETTINGS | {"model__init_from": adapted[0]} | settings)
        )
    assert str(raised.value).startswith(f"model.init_from is '{adapted[0]}/checkpoints/3': ")


def test_folders_that_do_not_fit_are_refused(adapted, full, tmp_path):
    def refused(said, source, **settings):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            run_plan.make_plan(
                runs.config("opsd", **SETTINGS | {"model__init_from": source} | settings)
            )

    refused("there is no such folder", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    refused("it is neither a work directory with checkpoints, nor a PEFT", tmp_path / "empty")
    (tmp_path / "w" / "checkpoints").mkdir(parents=True)
    refused("the run has no checkpoint yet", tmp_path / "w")
    flags = [f"--workdir={adapted[0]}", f"--out={tmp_path / 'a'}", "--format=peft"]
    assert export.main(["export", *flags]) == 0
    fresh = {"train__trainable": "full", "lora__rank": 64, "lora__alpha": 128.0}
    refused("an adapter needs train.trainable=lora", tmp_path / "a", **fresh)
    flags = [f"--workdir={full[0]}", f"--out={tmp_path / 'm'}"]
    assert export.main(["export", *flags]) == 0
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    refused("its model has rms_eps=0.5, not 1e-06", tmp_path / "m")
    shutil.copytree(full[0], tmp_path / "d")
    shutil.copytree(tmp_path / "d/checkpoints/3", tmp_path / "d/checkpoints/4")
    largest = max((tmp_path / "d/checkpoints/4").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    refused(
        r"4 in .* is damaged .*; the run also has checkpoints of the steps \[3\]",
        tmp_path / "d",
        **fresh,
    )


@pytest.mark.slow
def test_the_newest_checkpoint_is_fixed_at_the_start(tmp_path, capsys):
    """The run that it started from goes on; the same command continues from the same weights."""
    other = tmp_path / "other"
    make_run(other)
    argv = [*runs.argv("opsd", tmp_path / "w", **SETTINGS, train__steps=0), f"--init_from={other}"]
    assert main.main(argv) == 0
    saved = workdir.read_settings(tmp_path / "w")
    assert saved["model.init_from"] == f"{other}/checkpoints/3"
    capsys.readouterr()
    with (
        checkpoint.Checkpoints(other / "checkpoints", writer=True) as checkpoints,
        runs.loaded("opsd", **SETTINGS) as (_, state),
    ):
        checkpoints.save(4, state)
    assert initial_weights.resolve_initial_weights(str(other)) == f"{other}/checkpoints/4"
    assert main.main(argv) == 0
    assert workdir.read_settings(tmp_path / "w")["model.init_from"] == f"{other}/checkpoints/3"
    capsys.readouterr()
    # The weights themselves are compared too.
    shutil.rmtree(other / "checkpoints" / "3")
    (other / "checkpoints" / "4").rename(other / "checkpoints" / "3")
    assert main.main(argv) == 2
    assert "init_fingerprint was" in capsys.readouterr().err
    assert main.main(argv[:-1]) == 2
    assert "model.init_from was" in capsys.readouterr().err


def spoil(path, name: str) -> None:
    """Puts a NaN into one array of a safetensors file."""
    arrays = safetensors.numpy.load_file(path)
    arrays[name].flat[0] = np.nan
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})


@pytest.mark.slow
def test_numbers_that_are_not_finite_name_the_setting_of_the_weights(adapted, full, tmp_path):
    for source, form in ((adapted[0], "peft"), (full[0], "hf")):
        flags = [f"--workdir={source}", f"--out={tmp_path / form}", f"--format={form}"]
        assert export.main(["export", *flags]) == 0
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    spoil(tmp_path / "peft/adapter_model.safetensors", name)
    spoil(tmp_path / "hf/model.safetensors", "model.norm.weight")
    shutil.copytree(adapted[0], tmp_path / "run")
    with (
        runs.loaded("opsd", **SETTINGS) as (_, state),
        checkpoint.Checkpoints(tmp_path / "run/checkpoints", writer=True) as checkpoints,
    ):
        trained = jax.tree.map(lambda x: x + jnp.nan, state.trained)
        checkpoints.save(4, state._replace(trained=trained))
    fresh = {"train__trainable": "full", "lora__rank": 64, "lora__alpha": 128.0}
    run = tmp_path / "run/checkpoints/4"
    for source, settings in (
        (tmp_path / "peft", {}), (tmp_path / "hf", {}), (run, {}), (run, fresh),
    ):  # fmt: skip
        said = re.escape(f"model.init_from is '{source}': not all numbers are finite in ")
        with pytest.raises(nonfinite.NonFinite, match=said), begun(source, **settings):
            raise AssertionError("the run has begun")


def refused(capsys, argv) -> str:
    """The only line on stderr of a command that is refused after its plan was made."""
    capsys.readouterr()
    assert main.main(argv) == 2
    out, err = capsys.readouterr()
    assert "  directory " in out
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.slow
@pytest.mark.parametrize("form", ["run", "peft"])
def test_weights_that_are_damaged_after_the_check(adapted, tmp_path, monkeypatch, capsys, form):
    source, prepare = tmp_path / "source", train.prepare
    if form == "run":
        shutil.copytree(adapted[0], source)
    else:
        flags = [f"--workdir={adapted[0]}", f"--out={source}", "--format=peft"]
        assert export.main(["export", *flags]) == 0

    def damaged(*args):
        done = prepare(*args)
        files = source.glob("checkpoints/3/state/d/*" if form == "run" else "*.safetensors")
        damage.truncate(sorted(files)[0])
        return done

    monkeypatch.setattr(train, "prepare", damaged)
    argv = [*runs.argv("opsd", tmp_path / "w", **SETTINGS, train__steps=0), f"--init_from={source}"]
    line = refused(capsys, argv)
    if form == "run":
        assert f"checkpoint 3 in {source}/checkpoints is damaged (file state/d/" in line
    else:
        assert f"model.init_from is '{source}': {source}/adapter_model.safetensors is trun" in line


@pytest.mark.slow
def test_a_checkpoint_of_another_shape(tmp_path, capsys):
    directory, settings = tmp_path / "w", SETTINGS | {"lora__rank": 8}
    make_run(tmp_path / "other", **settings)
    argv = runs.argv("opsd", directory, **SETTINGS, train__steps=0)
    assert main.main(argv) == 0
    shutil.copytree(tmp_path / "other/checkpoints", directory / "checkpoints", dirs_exist_ok=True)
    line = refused(capsys, [*argv[:-1], "--config.train.steps=3"])
    assert f"checkpoint 3 in {directory}/checkpoints has ." in line
    assert "but the run needs" in line
