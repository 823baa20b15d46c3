"""Commands of the documents that run on a laptop in minutes do what the documents say.

A block of commands runs here if the line `<!-- runs -->` stands before it. `build/docs` is a folder
of the test, and a command that stands in two documents runs once.
"""

import pathlib
import re
import shutil
import subprocess
import sys

import conftest
import pytest

PAGES = [conftest.ROOT / "README.md", *sorted((conftest.ROOT / "docs").rglob("*.md"))]


def commands() -> list[str]:
    """The marked commands in order, each once."""
    found: dict[str, None] = {}
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for block in re.findall(r"^<!-- runs -->\n```sh\n(.*?)^```", text, flags=re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                command = " ".join(line.partition("  #")[0].split())
                if command:
                    found[command] = None
    return list(found)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_marked_commands_run(tmp_path: pathlib.Path):
    assert len(commands()) > 3
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for command in commands():
        line = command.replace("build/docs", str(tmp_path))
        done = subprocess.run(
            f'PATH="{python.parent}:$PATH" JAX_PLATFORMS=cpu; export PATH JAX_PLATFORMS; {line}',
            shell=True, cwd=conftest.ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert shutil.which("sh")
    assert (tmp_path / "tiny" / "metrics.jsonl").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_examples_of_the_python_page_run(tmp_path: pathlib.Path):
    """With the tiny preset in place of the page's card."""
    text = (conftest.ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S))
    assert "configs/copsd.py" in code
    code = code.replace("configs/copsd.py", 'configs/opsd.py:tiny", "--config.train.steps=2')
    code = code.replace("--workdir=W", f"--workdir={tmp_path / 'W'}")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=conftest.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ln q - ln p" in done.stdout
