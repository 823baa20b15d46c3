"""Cards and command lines that are wrong: one sentence with the file or the setting, by hand."""

import json

import conftest
import pytest

from copsd_jax import main
from copsd_jax.config import cards
from copsd_jax.config import settings as config_lib

BEGIN = "from copsd_jax import config\ndef get_config(preset=''):\n  c = config.default()\n"
END = "\n  return c\n"
CARD = f"--config={conftest.ROOT / 'configs' / 'opsd.py'}:tiny"


def refuse(argv, match) -> None:
    with pytest.raises((ValueError, OSError), match=match) as caught:
        main.parse_command(["main", *argv])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


WRONG = {
    "def get_config(:\n": r"card\.py', line 1: the file is not valid Python \(invalid syntax\)",
    "\0": r"card\.py': the file is not valid Python",
    "x = 1\n": r"card\.py': AttributeError: module .* has no attribute 'get_config'",
    "import absent_module\n": r"card\.py', line 1: ModuleNotFoundError: No module named 'absent",
    "import sys\nsys.exit(3)\n": r"card\.py', line 2: SystemExit: 3",
    "def get_config(p=''):\n  raise RuntimeError('a\\nb')\n": "line 2: RuntimeError: a b$",
    "def get_config(p=''):\n  raise ValueError('no preset')\n": "line 2: no preset$",
    "def get_config(p=''):\n  raise ValueError\n": "line 2: ValueError$",
    "def get_config(p=''):\n  return {}['x']\n": "line 2: KeyError: 'x'$",
    "def get_config(p=''):\n  pass\n": r"must return the config .* but it returned NoneType",
    "def get_config(p=''):\n  return {'seed': 1}\n": "but it returned dict",
    BEGIN + "  c.train.stepz = 3" + END: "line 4: the settings have no 'stepz': did you mean s",
    BEGIN + "  c.trian.steps = 3" + END: "line 4: the settings have no 'trian': did you mean t",
    BEGIN + "  c.train.steps = 'many'" + END: r"the value of 'steps' must have the type int$",
    BEGIN + "  c.data.lang = 'en'" + END: r"line 4: the value of 'lang' must have the type tuple$",
    BEGIN + "  c.train.steps = None" + END: r"card\.py': train\.steps is None: it must be a",
    BEGIN + "  c.train.steps = True" + END: r"train\.steps is True: it must be a whole numb",
    BEGIN + "  c.unlock()\n  c.train.extra = 1" + END: r"config\.train\.extra is not a sett",
    BEGIN + "  c.unlock()\n  del c.seed" + END: r"card\.py': the card lacks the setting seed",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_cards_that_are_refused(tmp_path, text):
    (tmp_path / "card.py").write_text(text)
    refuse([f"--config={tmp_path / 'card.py'}"], WRONG[text])


def test_files_that_are_no_cards(tmp_path):
    (tmp_path / "notes.md").write_text("# Notes\n")
    refuse([f"--config={tmp_path / 'notes.md'}"], r"notes\.md': a card is a Python file")
    refuse([f"--config={tmp_path}"], "there is no such file")
    refuse(["--config", "absent.py"], "'absent.py': there is no such file")
    refuse(["--config="], "--config is missing")
    refuse(
        ["--config=opsd.txt:tiny"], "'opsd.txt': there is no such file; the cards that .* copsd,"
    )
    refuse(["--config=opds"], "cards that have a name are copsd, critique, grpo, opsd, rosd, sdpo")
    refuse(["--config=sft:huge"], "line .*: preset is 'huge': the choices are smollm2, tiny, qwen3")
    (tmp_path / "card.py").write_text(
        "from copsd_jax import config\ndef get_config():\n  return config.default()\n"
    )
    assert cards.load_card(str(tmp_path / "card.py")).seed == 0
    refuse([f"--config={tmp_path / 'card.py'}:tiny"], "takes 0 positional arguments")


def test_bundled_cards_have_names(tmp_path, monkeypatch):
    """In any directory; a file of the same name comes first, and a folder does not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sdpo").mkdir()
    for name in ("copsd", "sdpo"):
        file = conftest.ROOT / "configs" / f"{name}.py"
        for preset in ("", ":tiny"):
            found = main.parse_command(["main", f"--config={name}{preset}"])
            wanted = main.parse_command(["main", f"--config={file}{preset}"])
            assert config_lib.flat(found.config) == config_lib.flat(wanted.config)
            assert found.workdir == wanted.workdir
    (tmp_path / "opsd").write_text("")
    refuse(["--config=opsd"], "'opsd': a card is a Python file")


def test_a_card_may_have_a_dataclass(tmp_path):
    text = (
        "from __future__ import annotations\nimport dataclasses\nfrom copsd_jax import config\n"
        "@dataclasses.dataclass\nclass Size:\n  n: int = 3\n"
        "def get_config(preset=''):\n  c = config.default()\n  c.train.steps = Size().n\n"
        "  return c\n"
    )
    (tmp_path / "card.py").write_text(text)
    assert cards.load_card(str(tmp_path / "card.py:")).train.steps == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["train.steps=abc"], r"^train\.steps is 'abc': it must be a whole number \(at least 0\)$"),
        (["train.steps="], r"^train\.steps is '': it must be a whole number"),
        (["train.steps=1e3"], "whole number"),
        (["train.steps=" + "9" * 5000], r"^train\.steps is '9+…: it must be a whole number"),
        (["train.lr=fast"], r"^train\.lr is 'fast': it must be a number \(a positive number\)"),
        (["train.log_rollouts=maybe"], "log_rollouts is 'maybe': it must be True or False$"),
        (["train.steps=3\n4"], r"is '3\\n4'"),
        (["train.steps"], "--config.train.steps needs a value"),
        (["data.lang=sw", "data.lang=fr"], "occurs twice.*write several values with commas"),
        (["train=3"], "--config.train is a section .* where NAME is one of steps, batch, "),
        (["rollout.stop=a b,"], "^--config.rollout.stop=a b,"),
        (["data.lang=" + "-" * 100_000 + "1"], "^a value of .* is nested too deeply$"),
    ],
)
def test_overrides_that_are_refused(flags, message):
    refuse([CARD, *(f"--config.{flag}" for flag in flags)], message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--flagfile=x"], "--flagfile is no flag: the flags are --config, --workdir"),
        (["--noworkdir"], "--noworkdir is no flag"),
        (["--config.description", "--workdir=w"], "--config.description needs a value: write"),
        (["--workdir", "--config.train.steps=3"], "--workdir needs a value: write --workdir=VALUE"),
        (["--noconfig.train.steps"], "is no flag"),
        (["--search=maybe"], "--search is 'maybe'"),
        (["--workdir"], "--workdir needs a value"),
        (["--workdir=a", "--workdir=b"], "--workdir occurs twice"),
        ([CARD], "--config occurs twice"),
        (["--", "x"], "unexpected argument '--'"),
        (["x"], "unexpected argument 'x'"),
    ],
)
def test_flags_that_are_refused(flags, message):
    refuse([CARD, *flags], message)


def test_the_last_value_of_a_setting_counts():
    flags = [f"--config.{flag}" for flag in ("train.steps=1", "train.lr=1e-3", "train.steps=3")]
    config = main.parse_command(["main", CARD, *flags])[0]
    assert (config.train.steps, config.train.lr) == (3, 1e-3)


def test_values_may_follow_their_flags():
    words = [
        CARD,
        "--workdir",
        "--odd",
        "-config.train.steps",
        "7",
        "--noconfig.train.log_rollouts",
    ]
    config, workdir, _ = main.parse_command(["main", *words, "--config.eval.limit=0x10"])
    assert (config.train.steps, config.train.log_rollouts, config.eval.limit) == (7, False, 16)
    assert str(workdir) == "--odd"
    # Numbers whose defaults are 0 and 1 are no switches.
    words = [CARD, "--config.data.limit", "5", "--config.rollout.temperature", "0.5"]
    config, _, _ = main.parse_command(["main", *words])
    assert (config.data.limit, config.rollout.temperature) == (5, 0.5)


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [("train.lr", 1, 1.0), ("seed", 7, 7), ("data.lang", ["sw"], ("sw",)), ("seed", True, None),
     ("train.lr", "1", None), ("train.lr", False, None), ("data.path", None, None),
     ("data.lang", "sw", None), ("train.log_rollouts", 1, None), ("seed", 1.5, None)],
)  # fmt: skip
def test_saved_settings_have_the_types_of_the_defaults(name, value, kept):
    config = config_lib.default()
    if kept is None:
        with pytest.raises(ValueError, match=f"^{name} is .*: it must be"):
            config_lib.assign(config, {name: value})
        return
    config_lib.assign(config, json.loads(json.dumps({name: value})))
    found = config_lib.flat(config)[name]
    assert (found, type(found)) == (kept, type(kept))
