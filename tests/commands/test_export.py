"""Oracle: the adapter merged by hand; transformers' own model where torch is installed."""

import dataclasses
import json
import pathlib
import shutil
import types

import conftest
import damage
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft_reader
import pytest
import runs

from copsd_jax import evaluate, evaluation, export, main
from copsd_jax.config import settings as config_lib
from copsd_jax.model import transformer
from copsd_jax.runtime import checkpoint, workdir
from copsd_jax.training import loaded_run, train_step
from copsd_jax.weights import hf, hf_config, hub, initial_weights, tensor_files

optax_promotes = runs.optax_promotes

SETTINGS = {"train__steps": 2, "eval__path": "", "train__lr": 0.01}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("export") / "w"
    assert main.main(runs.argv("opsd", workdir, **SETTINGS)) == 0
    return workdir


def student_logits(workdir, ids_BL):
    """Of the newest checkpoint, with the adapter as it is."""
    with runs.loaded("opsd", **SETTINGS) as (r, like):
        with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
            state = checkpoints.load(2, like)
        policy = loaded_run.derive_run_policies(r, state)[0]
        assert policy.adapter is not None
        assert float(np.abs(policy.adapter["q"]["b"]).max()) > 1e-3
        positions = jnp.broadcast_to(jnp.arange(ids_BL.shape[1], dtype=jnp.int32), ids_BL.shape)
        stream = transformer.Stream(
            ids_BL, positions, jnp.ones_like(ids_BL), policy.adapter, r.plan.adapter_scale
        )
        hidden = jax.jit(
            lambda params: r.decoder.apply({"params": params}, (stream,))[0].hidden_BLD
        )(policy.params)
        return np.asarray(
            transformer.compute_model_logits(hidden, transformer.get_head(policy.params))
        )


IDS = np.random.default_rng(0).integers(0, 1400, (2, 17)).astype(np.int32)


@pytest.mark.slow
def test_the_exported_model_is_the_trained_one(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert export.main(["export", f"--workdir={trained}", f"--out={out}"]) == 0
    assert str(out) in capsys.readouterr().out.splitlines()[-1]
    config = hf_config.load_config(out)
    params = hf.load_params(out, config, jnp.float32)
    ids = jnp.asarray(IDS)
    positions = jnp.broadcast_to(jnp.arange(17, dtype=jnp.int32), ids.shape)
    decoder = transformer.Decoder(config, jnp.float32)
    stream = transformer.Stream(ids, positions, jnp.ones_like(ids))
    hidden = jax.jit(lambda params: decoder.apply({"params": params}, (stream,))[0].hidden_BLD)(
        params
    )
    found = np.asarray(transformer.compute_model_logits(hidden, transformer.get_head(params)))
    np.testing.assert_allclose(found, student_logits(trained, ids), atol=1e-4)
    # A second export to the same place is refused, and so is a checkpoint that is not there.
    assert export.main(["export", f"--workdir={trained}", f"--out={out}"]) == 2
    assert export.main(["e", f"--workdir={trained}", f"--out={tmp_path / 'b'}", "--step=7"]) == 2
    assert "the checkpoints are [1, 2]" in capsys.readouterr().err
    assert export.main(["e", f"--workdir={tmp_path}", f"--out={tmp_path / 'b'}"]) == 2


def test_the_exported_adapter_is_the_trained_one(trained, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["export", f"--workdir={trained}", f"--out={out}", "--format=peft"]
    assert export.main([*flags, "--step=1"]) == 0
    assert "step 1 of" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert (
        json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    )
    ours, theirs = (
        json.loads((folder / "tokenizer.json").read_text())
        for folder in (out, hub.resolve_model_path("tiny"))
    )
    assert ours["model"]["vocab"] == theirs["model"]["vocab"]
    assert ours["added_tokens"] == theirs["added_tokens"]
    with (
        runs.loaded("opsd", **SETTINGS) as (r, like),
        checkpoint.Checkpoints(trained / "checkpoints") as checkpoints,
    ):
        policy = loaded_run.derive_run_policies(r, checkpoints.load(1, like))[0]
        found, alpha = peft_reader.read(out)
        assert alpha / r.plan.config.lora.rank == r.plan.adapter_scale
    jax.tree.map(np.testing.assert_array_equal, found, policy.adapter)
    assert export.main(flags) == 2
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("kind", conftest.mostly_slow(["hf", "peft", "base"]))
def test_the_dtype_of_the_files(trained, tmp_path, kind):
    """Weights are rounded once, from float32: NumPy rounds the float32 export to the same bits."""
    flags = ["export", f"--workdir={trained}", f"--format={kind}"]
    file = {"peft": "adapter_model.safetensors"}.get(kind, "model.safetensors")
    found = {}
    for name in ("float32", "float16", "bfloat16"):
        out = tmp_path / name
        assert export.main([*flags, f"--out={out}", f"--dtype={name}"]) == 0
        found[name] = {k: x.read() for k, x in tensor_files.open_file(out / file).items()}
        if kind != "peft":
            assert json.loads((out / "config.json").read_text())["dtype"] == name
    assert export.main([*flags, f"--out={tmp_path / 'plain'}"]) == 0
    plain = {k: x.read() for k, x in tensor_files.open_file(tmp_path / "plain" / file).items()}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), plain,
                 found["float32"])  # fmt: skip
    for name, dtype in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        rounded = {k: x.astype(dtype) for k, x in plain.items()}
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), rounded,
                     found[name])  # fmt: skip


def test_a_value_that_a_dtype_cannot_hold_is_refused(trained, tmp_path, capsys, monkeypatch):
    derive = train_step.derive_policies

    def huge(*args):
        student, teacher = derive(*args)
        adapter = jax.tree.map(lambda x: x.at[0, 0, 0].set(-7e4), student.adapter)
        return dataclasses.replace(student, adapter=adapter), teacher

    monkeypatch.setattr(train_step, "derive_policies", huge)
    flags = ["export", f"--workdir={trained}", f"--out={tmp_path / 'o'}", "--format=peft"]
    assert export.main([*flags, "--dtype=float16"]) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: --dtype=float16: tensor base_model.model.model.layers.0.")
    assert found.endswith("has a value of magnitude 70000, but float16 holds at most 65504\n")
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="2"):
        export.main([*flags, "--dtype=int8"])
    choices = "(choose from float32, bfloat16, float16)"
    assert choices in capsys.readouterr().err.replace("'", "")


def test_the_adapter_names_the_model_whose_weights_it_changes():
    """With model.init_from, the base weights may be others than those of model.path."""
    snapshot = pathlib.Path("/c/models--a--b/snapshots") / ("0" * 40)
    model = runs.config("opsd", **SETTINGS).model
    drawn, model.init = model.copy_and_resolve_references(), "pretrained"
    model.path, full = "a/b", {"train.trainable": "full"}
    for start, chosen, expected in (
        (None, drawn, ("tiny", "", False)),
        (None, model, ("a/b", "0" * 40, True)),
        (initial_weights.Source("adapter", pathlib.Path("/x"), {}), model, ("a/b", "0" * 40, True)),
        (initial_weights.Source("model", pathlib.Path("/x"), {}), model, ("/x", "", False)),
        (
            initial_weights.Source("run", pathlib.Path("/w/checkpoints/2"), full),
            model,
            ("/w/checkpoints/2", "", False),
        ),
    ):  # fmt: skip
        plan = types.SimpleNamespace(
            config=types.SimpleNamespace(model=chosen), start=start, weights_path=snapshot
        )
        assert export._name_run_base(plan) == expected  # type: ignore


def test_the_exported_base_is_the_model_before_training(trained, tmp_path, capsys):
    """It needs no checkpoint; the oracle draws the same random weights again."""
    shutil.copytree(trained, tmp_path / "w", ignore=shutil.ignore_patterns("checkpoints"))
    flags = ["export", f"--workdir={tmp_path / 'w'}", f"--out={tmp_path / 'o'}", "--format=base"]
    assert export.main([*flags, "--step=1"]) == 2
    assert "--step=1: --format=base writes the model as it was before" in capsys.readouterr().err
    assert export.main(flags) == 0
    shape = hf_config.load_config(tmp_path / "o")
    key = jax.random.fold_in(jax.random.key(runs.config("opsd").seed), loaded_run.WEIGHTS_STREAM)
    expected = transformer.init_params(shape, key, jnp.float32)
    found = hf.load_params(tmp_path / "o", shape, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_no_whole_checkpoint_is_an_error_that_is_said_once(
    trained, tmp_path, capsys, monkeypatch
):  # fmt: skip
    workdir, out = shutil.copytree(trained, tmp_path / "w"), tmp_path / "o"
    for step in (1, 2):
        damage.flip(damage.find(workdir / f"checkpoints/{step}", "state/d/*"))
    assert export.main(["export", f"--workdir={workdir}", f"--out={out}"]) == 2
    said, err = capsys.readouterr()
    assert err == f"error: --workdir={workdir} has no whole checkpoint\n"
    skipped = [f"checkpoint {step} in {workdir}/checkpoints is damaged" for step in (2, 1)]
    assert [line.partition(" (")[0] for line in said.splitlines()] == skipped
    assert all(line.endswith(": it is skipped") for line in said.splitlines())
    assert not out.exists()

    # An evaluation of step 0 alone is not what was requested.
    evaluated = []
    (tmp_path / "p.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}')
    argv = ["evaluate", f"--workdir={workdir}", f"--path={tmp_path / 'p.jsonl'}", f"--out={out}"]
    step = lambda r, state, step, *_: evaluated.append(step) or {"scores": {}}  # noqa: E731
    monkeypatch.setattr(evaluation, "evaluate_step", step)
    places = f" in {workdir}/checkpoints is "
    for flags, steps, said in (
        ([], [0], f"no checkpoint{places}whole"),
        (["--steps=2"], [], f"checkpoint 2{places}damaged ("),
    ):
        evaluated.clear()
        assert evaluate.main([*argv, *flags]) == 2
        assert evaluated == steps
        err = capsys.readouterr().err
        assert err.startswith(f"error: {said}")
        assert err.count("\n") == 1


def test_an_output_folder_that_cannot_be_written_is_refused_early(trained, capsys, monkeypatch):
    """A test may not mount a folder; /proc takes no directory, not even from root."""
    monkeypatch.setattr(pathlib.Path, "is_mount", lambda path: path == trained / "mount")
    for out, said in (
        (trained / "mount", "is a mount point: name a directory in it"),
        ("/proc/o", ": /proc cannot be written ("),
    ):
        assert export.main(["export", f"--workdir={trained}", f"--out={out}"]) == 2
        assert capsys.readouterr().err.partition(f"error: --out={out}")[2].strip().startswith(said)


def test_all_weights_are_no_adapter(tmp_path, capsys):
    settings = SETTINGS | {"train__trainable": "full", "train__steps": 1}
    saved = runs.config("opsd", **settings)
    workdir.create(tmp_path / "w", config_lib.flat(saved), {})
    flags = ["e", f"--workdir={tmp_path / 'w'}", f"--out={tmp_path / 'o'}", "--format=peft"]
    assert export.main(flags) == 2
    assert "--format=peft: train.trainable is full" in capsys.readouterr().err


@pytest.mark.parity
def test_transformers_gives_the_same_logits(trained, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch (extra `parity`)")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    assert export.main(["export", f"--workdir={trained}", f"--out={out}"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        found = theirs(torch.tensor(IDS.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(found, student_logits(trained, jnp.asarray(IDS)), atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer.encode("Habari 12", add_special_tokens=False)) == "Habari 12"


@pytest.mark.slow
def test_the_evaluation_program(trained, tmp_path, capsys):
    """Checkpoints in one table; other problems need a directory of their own."""
    flags = ["evaluate", f"--workdir={trained}", "--path=bundled:held_out", "--samples=1"]
    assert evaluate.main(flags) == 2
    assert "--out is missing: with path, samples" in capsys.readouterr().err
    problems = tmp_path / "p.jsonl"
    rows = [{"id": i, "problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(3)]
    problems.write_text("\n".join(map(json.dumps, rows)))  # no solutions: none are needed
    flags = ["evaluate", f"--workdir={trained}", f"--path={problems}", f"--out={tmp_path / 'o'}"]
    assert evaluate.main([*flags, "--steps=0,2"]) == 0
    printed = capsys.readouterr().out
    assert "step 2 against step 0" in printed
    files = sorted(p.name for p in (tmp_path / "o").iterdir())
    assert files == ["step_000000.json", "step_000002.json"]
    saved = json.loads((tmp_path / "o" / files[1]).read_text())
    assert saved["scores"]["en"]["problems"] == 3
    assert evaluate.main([*flags, "--steps=5"]) == 2
    assert "no checkpoint of [5]; the checkpoints are [1, 2]" in capsys.readouterr().err
    limited = "only the first 4 records: eval.limit of the run (--limit=0 for all)"
    assert limited in printed
    # The flags' own names, and a file with other fields, of which one record is evaluated.
    rows = [{"q": f"{i} + 1?", "a": str(i + 1)} for i in range(3)]
    problems.write_text("\n".join(map(json.dumps, rows)))
    said = "problem is missing (unusable among 3 rows: problem is missing: 3; no row is left; the "
    said += "record has q, a, and --fields can map names)"
    assert evaluate.main([*flags, "--fields="]) == 2
    assert said in capsys.readouterr().err
    flags[-1] = f"--out={tmp_path / 'one'}"
    flags += ["--fields=problem=q,answer=a", "--limit=1", "--checkpoint=1"]
    assert evaluate.main(flags) == 0
    assert limited not in capsys.readouterr().out
    (file,) = (tmp_path / "one").iterdir()
    (found,) = json.loads(file.read_text())["problems"]
    assert (file.name, found["problem"], found["gold"]) == ("step_000001.json", "0 + 1?", "1")
    assert evaluate.main([*flags, "--limit=-1"]) == 2
    assert "error: --limit is -1: it must be at least 0" in capsys.readouterr().err


@pytest.mark.slow
def test_the_ema_teacher_is_saved_and_restored(tmp_path):
    workdir = tmp_path / "w"
    settings = {**SETTINGS, "teacher__weights": "ema", "teacher__ema_decay": 0.5}
    assert main.main(runs.argv("opsd", workdir, **settings)) == 0
    with (
        runs.loaded("opsd", **settings) as (_, like),
        checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints,
    ):
        first, last = checkpoints.load(1, like), checkpoints.load(2, like)
    expected = jax.tree.map(
        lambda e, t: 0.5 * np.asarray(e, np.float64) + 0.5 * np.asarray(t, np.float64),
        first.ema,
        last.trained,
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), last.ema, expected)
    assert isinstance(last, train_step.State)


@pytest.mark.slow
def test_a_run_with_worked_examples_is_evaluated_and_exported(tmp_path, capsys):
    """Both programs read no training rows, from which the shared prefix of a run is made."""
    argv = runs.argv("opsd", tmp_path / "w", prompt__exemplars=2, train__steps=1, eval__limit=2)
    assert main.main(argv) == 0
    assert evaluate.main(["evaluate", f"--workdir={tmp_path / 'w'}"]) == 0
    assert export.main(["export", f"--workdir={tmp_path / 'w'}", f"--out={tmp_path / 'd'}"]) == 0
    assert (tmp_path / "d" / "model.safetensors").is_file()
