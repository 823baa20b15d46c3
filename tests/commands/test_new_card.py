"""New cards. Oracle: the settings of the card from which a new card began."""

import ast
import pathlib
import subprocess
import sys

import conftest
import pytest
import runs

from copsd_jax import main, new_card
from copsd_jax.config import cards, declaration
from copsd_jax.config import settings as config_lib
from copsd_jax.training import table_rules

SOURCES = [
    f"{name}:{preset}"
    for name in cards.bundled_cards()
    for preset in cards.describe_card(name).presets
]

optax_promotes = runs.optax_promotes


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("source", SOURCES)
def test_a_new_card_has_the_settings_of_its_source(source, tmp_path, capsys):
    assert new_card.main(["copsd-jax new-card", "my-card", f"--from={source}"]) == 0
    assert capsys.readouterr().out.endswith("to try it: copsd-jax --config=my-card.py:tiny\n")
    text = (tmp_path / "my-card.py").read_text()
    card = source.partition(":")[0]
    for ours, theirs in (("", source), (":run", source), (":tiny", f"{card}:tiny")):
        found, wanted = cards.load_card(f"my-card.py{ours}"), cards.load_card(theirs)
        assert config_lib.flat(found) == config_lib.flat(wanted)
    table_rules.check_choices(main.parse_command(["main", "--config=my-card.py:tiny"]).config)
    assert list(cards.describe_card("my-card.py").presets) == ["run", "tiny"]
    # Each assignment stands below a comment.
    lines = text.split("\n")
    assigned = [
        node.lineno for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Assign) and lines[node.lineno - 1].startswith("    c.")
    ]  # fmt: skip
    assert len(assigned) >= len(new_card.ALWAYS)
    assert all(lines[number - 2].startswith("    # ") for number in assigned)
    check = [sys.executable, "-m", "ruff", "check", "--quiet", "my-card.py"]
    options = ["--config", str(conftest.ROOT / "pyproject.toml")]
    assert subprocess.run([*check, *options]).returncode == 0
    form = [sys.executable, "-m", "ruff", "format", "--check", "--quiet", "my-card.py"]
    assert subprocess.run([*form, *options]).returncode == 0


def test_every_setting_that_is_always_shown_exists():
    assert set(new_card.ALWAYS) <= set(config_lib.SETTINGS)
    assert isinstance(config_lib.SETTINGS["train.steps"].allowed, declaration.Range)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["taken"], "error: taken.py exists: choose another name, or delete this file\n"),
        (["taken.py"], "error: taken.py exists: "),
        (["a/b"], "error: NAME is 'a/b': a name has letters, digits, _ and -, and begins with"),
        (["1"], "error: NAME is '1': "),
        ([""], "error: NAME is '': "),
        (["new", "--from=absent"], "error: --from=absent: the choices are copsd, critique, "),
        (["new", "--from=sft:huge"], "error: --from=sft:huge: the presets of sft are smollm2, "),
        (["new", "--from=sft:"], "error: --from=sft:: the presets of sft are smollm2, tiny, "),
    ],
)
def test_refusals(words, said, tmp_path, capsys):
    (tmp_path / "taken.py").write_text("mine")
    assert new_card.main(["copsd-jax new-card", *words]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith(said)
    assert found.err.count("\n") == 1
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"taken.py": "mine"}


def test_the_flags_are_named_by_the_command_that_the_user_gave(capsys):
    for argv0, shown in (
        ("copsd-jax new-card", "copsd-jax new-card"),
        ("/x/new_card.py", "python -m copsd_jax.new_card"),
    ):
        with pytest.raises(SystemExit) as ended:
            new_card.main([argv0])
        assert ended.value.code == 2
        said = f"error: the following arguments are required: NAME ({shown} --help lists the flags)"
        assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.slow
def test_a_new_card_runs_at_once():
    assert new_card.main(["x", "mine"]) == 0
    assert main.main(["main", "--config=mine.py:tiny", "--config.train.steps=2"]) == 0
    assert [x["step"] for x in runs.steps_of(pathlib.Path("runs/mine-tiny"))] == [1, 2]
