"""All commands start alike: signals from the first import on, closed pipes, platforms, `~`.

Oracle: exit codes and sentences by hand.
"""

import os
import runpy
import shutil
import signal
import subprocess
import sys
import venv

import conftest
import jax
import pytest
import runs

from copsd_jax import evaluate, export, main, replay
from copsd_jax.config import settings as config_lib
from copsd_jax.problems import languages
from copsd_jax.runtime import processes, sharding, workdir
from copsd_jax.servers import client

# The first slow import of each command.
FIRST = {
    "main": "absl", "evaluate": "jax", "export": "jax", "replay": "jax",
    "new_card": "ml_collections", "command": "absl",
}  # fmt: skip
FLAGS = {
    "main": ["--config=configs/opsd.py:tiny"], "evaluate": [], "export": ["--out=d"],
    "replay": ["--step=1"], "new_card": [], "command": ["--config=opsd:tiny"],
}  # fmt: skip


def start(command: str, *flags: str, path: str = "", **variables: str) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | variables
    environment["PYTHONPATH"] = f"{path}{os.pathsep}{conftest.ROOT}"
    return subprocess.Popen(
        [sys.executable, "-m", f"copsd_jax.{command}", *FLAGS[command], *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        cwd=conftest.ROOT,
    )  # fmt: skip


@pytest.mark.parametrize("command", FIRST)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_is_one_sentence(tmp_path, command, number):
    """A module in the place of the first slow import sends the signal, and would never end."""
    text = f"import os, time\nos.kill(os.getpid(), {number:d})\ntime.sleep(60)\n"
    (tmp_path / f"{FIRST[command]}.py").write_text(text)
    run = start(command, "--workdir=w", path=str(tmp_path))
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (128 + number, "")
    said = f"stopped by {number.name}: to start again or to continue, repeat the command"
    assert err.split("\n") == ["", said, ""]


@pytest.mark.parametrize("command", FIRST)
def test_output_during_the_imports_may_lose_its_reader(tmp_path, command):
    (tmp_path / f"{FIRST[command]}.py").write_text("import sys\nprint('x' * 10**6)\nsys.exit(7)\n")
    run = start(command, path=str(tmp_path), PYTHONUNBUFFERED="")
    assert run.stdout is not None
    run.stdout.close()
    assert run.wait(timeout=60) == 7
    assert run.communicate()[1] == ""


@pytest.fixture
def directory(tmp_path):
    """A work directory without checkpoints."""
    workdir.create(tmp_path / "w", config_lib.flat(runs.config("opsd", data__limit=8)), {})
    return tmp_path / "w"


UNKNOWN = (
    "Unable to initialize backend 'banana': Backend 'banana' is not in the list of known backends: "
    "['cpu', 'tpu']. (set JAX_PLATFORMS='' to automatically choose an available backend)"
)


@pytest.mark.parametrize(
    "error, reason",
    [
        (
            RuntimeError(UNKNOWN),
            "Backend 'banana' is not in the list of known backends: ['cpu', 'tpu']",
        ),
        (AssertionError(), "there is no GPU"),  # of JAX, for cuda without a GPU
        (RuntimeError("a (busy) TPU"), "a (busy) TPU"),
    ],
)
def test_a_platform_that_jax_cannot_start_is_refused(monkeypatch, error, reason):
    def fails():
        raise error

    monkeypatch.setattr(jax, "devices", fails)
    monkeypatch.setenv("JAX_PLATFORMS", "banana,cuda")
    with pytest.raises(ValueError, match=r"^JAX_PLATFORMS is 'banana,cuda', but JAX ") as caught:
        sharding.make_mesh(1, 1, 1)
    assert f"{reason}): set this environment variable to cpu, or unset it" in str(caught.value)
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(ValueError, match=r"^JAX cannot start a platform \(") as caught:
        processes.join_processes(config_lib.default())
    assert str(caught.value).endswith("): set JAX_PLATFORMS=cpu to use the CPU")


@pytest.mark.long
@pytest.mark.parametrize(
    "command, name", [("main", "cuda"), ("evaluate", "banana"), ("export", "cuda")]
)
def test_a_wrong_platform_ends_a_command_in_one_sentence(directory, command, name):
    place = directory if command != "main" else directory.with_name("new")
    before = sorted(directory.parent.rglob("*"))
    run = start(command, f"--workdir={place}", JAX_PLATFORMS=name, CUDA_VISIBLE_DEVICES="")
    out, err = run.communicate(timeout=120)
    assert (run.returncode, out) == (2, "")
    assert err.startswith(f"error: JAX_PLATFORMS is '{name}', but JAX cannot start these ")
    assert err.count("\n") == 1
    assert sorted(directory.parent.rglob("*")) == before


def test_a_tilde_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    card = conftest.ROOT / "configs" / "opsd.py"
    (tmp_path / "card.py").write_text(card.read_text())
    flags = ["--workdir=~/w", "--dry_run=v5e:2x2", "--dry_run_json=~/r.json"]
    found = main.parse_command(["main", "--config=~/card.py:tiny", *flags])
    assert found.workdir == tmp_path / "w"
    assert found.dry_run is not None
    assert found.dry_run.report_path == str(tmp_path / "r.json")
    for parse in (evaluate.parse_evaluate_flags, export.parse_export_flags):
        args = parse(["x", "--workdir=~/w", "--out=~/o"])
        assert (args.workdir, args.out) == (tmp_path / "w", tmp_path / "o")
    shutil.copy(languages.BUILT_IN, tmp_path / "languages.json")
    assert languages.load_languages("~/languages.json") == languages.load_languages()
    server = client.server_from_settings(found.config.author, "author", "~/replies")
    assert server.cache == str(tmp_path / "replies")


@pytest.mark.parametrize("name", ["train", "summary", "self_test", "token_comparison", "api"])
def test_a_module_that_is_no_command_names_the_command(name):
    with pytest.raises(SystemExit, match=f"copsd_jax.{name} is no command: .* copsd_jax.main"):
        runpy.run_path(str(conftest.ROOT / "copsd_jax" / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("command", [evaluate, export, replay])
@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "the following arguments are required: --workdir"),
        (["--workdir=w", "--out=o", "--step=1", "--stepz=1"], "unrecognized arguments: "),
        (["--workd=w", "--out=o", "--step=1"], "the following arguments are required: --workdir"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(capsys, command, flags, said):
    with pytest.raises(SystemExit) as ended:
        command.main([command.__name__, *flags])
    found = capsys.readouterr()
    assert (ended.value.code, found.out) == (2, "")
    assert found.err.startswith(f"error: {said}")
    assert found.err.endswith(f" (python -m {command.__name__} --help lists the flags)\n")
    assert found.err.count("\n") == 1


def test_a_script_beside_the_checkout_imports_the_package(tmp_path):
    """An import hook of an editable install would come after the folder beside the script."""
    project = tmp_path / "copsd_jax"
    (project / "copsd_jax").mkdir(parents=True)
    (project / "copsd_jax" / "__init__.py").write_text("load_model = 1\n")
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(conftest.ROOT / name, project / name)
    (project / "configs").mkdir()
    venv.create(tmp_path / "venv", with_pip=False, system_site_packages=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    build = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, f"--target={site}", "-e", str(project)], check=True)
    (tmp_path / "script.py").write_text("import copsd_jax\nprint(copsd_jax.load_model)\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "script.py"], cwd=tmp_path, capture_output=True, text=True, env=env
    )
    assert done.stdout == "1\n", done.stderr
