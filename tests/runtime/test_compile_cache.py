"""A second start finds the programs of the first, and gets the same numbers."""

import json
import os
import re
import subprocess
import sys

import conftest
import pytest
import runs

from copsd_jax.runtime import compile_cache


def start(tmp_path, name, *flags):
    """Runs two steps of the tiny card in a process of its own; returns its lines."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-m", "copsd_jax.main", f"--config={conftest.ROOT}/configs/opsd.py:tiny",
         f"--workdir={tmp_path / name}", "--config.eval.path=", "--config.data.limit=64", *flags],
        capture_output=True, text=True, cwd=tmp_path,
        env=environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_second_start_finds_the_programs(tmp_path):
    counts, numbers = [], []
    for name, flags in (("a", ()), ("b", ()), ("c", ("--config.compile.cache=",))):
        lines = start(tmp_path, name, *flags)
        rows = runs.steps_of(tmp_path / name)
        numbers.append([{k: v for k, v in x.items() if "seconds" not in k} for x in rows])
        said = [line for line in lines if line.startswith("compiled programs: ")]
        (folder,) = (tmp_path / "cache" / "copsd_jax" / "compiled").iterdir()
        if flags:
            assert said == []
            continue
        match = re.fullmatch(rf"compiled programs: (\d+) were in {folder}, (\d+) are new", said[0])
        counts.append(tuple(map(int, match.groups())))
        stored = len(list(folder.glob("*-cache")))
    assert counts[0][0] == 0
    assert counts[0][1] > 3
    assert counts[1][0] >= counts[0][1]
    assert counts[1][1] <= 1
    assert stored >= counts[0][1]
    assert numbers[0] == numbers[1] == numbers[2]
    assert json.loads((tmp_path / "a/config.json").read_text())["compile.cache"] == "auto"


def test_a_folder_that_cannot_be_created_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    options = []
    monkeypatch.setattr(compile_cache.jax.config, "update", lambda *option: options.append(option))
    monkeypatch.setattr(
        type(compile_cache.jax.config), "jax_compilation_cache_dir", None, raising=False
    )
    with pytest.raises(ValueError, match=r"^compile\.cache is '.*/file/x': the folder cannot be"):
        compile_cache.open_compile_cache(f"{tmp_path}/file/x")
    # The user has not asked for the default folder, so the run goes on without it.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compile_cache.open_compile_cache("auto")
    assert options == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_cache.open_compile_cache("auto")
    name, folder = options[0]
    assert name == "jax_compilation_cache_dir"
    assert folder.startswith(f"{tmp_path}/copsd_jax/compiled/jax-")


def test_flags_of_the_compiler_choose_another_folder(monkeypatch):
    before = compile_cache._name_machine()
    assert compile_cache._name_machine() == before
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_other=1")
    assert compile_cache._name_machine() != before
