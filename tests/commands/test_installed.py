"""The installed package: its console command, and the cards that it contains.

Oracles: the files of `configs/`, and what `python -m` does in the checkout.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import conftest
import pytest

from copsd_jax import command, main

CARDS = {path.name: path.read_text() for path in (conftest.ROOT / "configs").glob("*.py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """A wheel of a copy, so that no folders of the build remain in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(conftest.ROOT / name, folder)
    for name in ("copsd_jax", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(conftest.ROOT / name, folder / name, ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, f"--wheel-dir={folder}", str(folder)], check=True)
    return next(folder.glob("*.whl"))


@pytest.mark.long
def test_the_wheel_has_the_cards_and_its_command_finds_them(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        inside = "copsd_jax/configs/"
        found = {
            name.removeprefix(inside): file.read(name).decode()
            for name in file.namelist()
            if name.startswith(inside)
        }
        folders = {name.split("/")[0] for name in file.namelist()}
    assert found == CARDS
    assert folders == {"copsd_jax", "copsd_jax-0.1.0.dist-info"}
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", f"--target={site}"]
    subprocess.run([*install, str(wheel)], check=True)
    (tmp_path / "here").mkdir()
    # The libraries that the package needs, but not an editable install of the package.
    libraries = sysconfig.get_paths()["purelib"]
    environment = os.environ | {
        "PYTHONPATH": f"{site}{os.pathsep}{libraries}", "JAX_PLATFORMS": "cpu"
    }  # fmt: skip

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, site / "bin" / "copsd-jax", *words],
            cwd=tmp_path / "here", env=environment, capture_output=True, text=True,
        )  # fmt: skip

    done = run("--config=opsd:qwen3_1_7b", "--help")
    assert done.returncode == 0, done.stderr
    assert "  --config.model.path=Qwen/Qwen3-1.7B " in done.stdout
    done = run("new-card", "mine")
    assert (done.returncode, done.stderr) == (0, "")
    done = run("--config=opsd:tiny", "--config.train.lr=fast")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: train.lr is 'fast': it must be a number (a positive number)\n"


def test_words_of_the_console_command(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["/bin/copsd-jax", *words])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(command.startup, "begin", lambda: None)
        code = command.main()
        found = capsys.readouterr()
        return code, found.out, found.err

    for word, said in (("--config=absent", "no such file"), ("--confg=x", "--confg is no flag")):
        code, out, err = run(word)
        assert main.main(["main", word]) == code == 2
        assert (out, err) == ("", capsys.readouterr().err)
        assert said in err
    assert run("--help")[1] == run("-h")[1] != ""
    assert "--config is missing" in run()[2]
    code, _, err = run("eval")
    assert code == 2
    assert err.startswith(
        "error: 'eval' is no command: the commands are evaluate, export, replay, "
    )
    assert err.count("\n") == 1
    for word in ("evaluate", "export", "replay"):
        monkeypatch.setattr(sys, "argv", ["/bin/copsd-jax", word])
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == 2
        assert capsys.readouterr().err.endswith(f" (copsd-jax {word} --help lists the flags)\n")


def test_the_console_command_imports_modules_of_the_directory(monkeypatch, tmp_path, capsys):
    """As `python -m` does, for reward.kind=module:function."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["copsd-jax", "--help"])
    monkeypatch.setattr(sys, "path", ["/elsewhere"])
    monkeypatch.setattr(command.startup, "begin", lambda: None)
    assert command.main() == 0
    assert sys.path == [str(tmp_path), "/elsewhere"]
    assert capsys.readouterr().out
