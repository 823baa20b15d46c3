"""Random arguments: the value that was given, or one sentence that names its setting or flag."""

import contextlib
import math
import random
import re

import conftest
import fuzz
import pytest

from copsd_jax import main
from copsd_jax.config import cards
from copsd_jax.config import settings as config_lib

CARD = f"{conftest.ROOT / 'configs' / 'opsd.py'}:tiny"
WORDS = (
    *("0", "1", "-1", "7", "3.5", "1e-3", "1e999", "nan", "inf", "0x10", "1_0", "٣", "9" * 30),
    *("True", "false", "None", "()", "('en',)", "en,sw", "a b", "(1,", "[1]", "{'a': 1}", "--x"),
    *("distill", "auto", "q,k", "float32", "-" * 300 + "1", "(" * 300, "9" * 5000, "b'a'", "1j"),
)  # fmt: skip


def make_override(r: random.Random) -> tuple[str, str]:
    name = r.choice(list(config_lib.SETTINGS))
    if r.random() < 0.3:
        return name, str(config_lib.SETTINGS[name].default)
    if r.random() < 0.05:
        name = r.choice((name[:-1], name + ".x", name.upper(), fuzz.make_text(r, 2), "no" + name))
    value = r.choice(WORDS) if r.random() < 0.7 else fuzz.make_text(r)
    return name, value


def read_number(text: str) -> float | None:
    """The number that a text is in Python, such as 1_0 or 0x10; None if it is none."""
    for read in (lambda: int(text, 0), lambda: float(text)):
        with contextlib.suppress(ValueError):
            return read()
    return None


@fuzz.sizes(100)
def test_overrides(cases, monkeypatch):
    r, accepted = random.Random(16), 0
    values = config_lib.flat(cards.load_card(CARD))

    def load(_):
        config = config_lib.default()
        config_lib.assign(config, values)
        return config

    monkeypatch.setattr(cards, "load_card", load)
    for _ in range(cases):
        given = [make_override(r) for _ in range(r.choice((1, 1, 1, 2)))]
        flags = [f"--config.{name}={value}" for name, value in given]
        found = fuzz.attempt(
            lambda flags=flags: main.parse_command(["m", "--config=x", *flags]), ""
        )
        if found is None:
            continue
        accepted += 1
        config = config_lib.flat(found.config)
        for name, text in dict(given).items():  # the last value of a setting counts
            kept = config[name]
            match values[name]:
                case bool():
                    assert kept is (text.lower() in ("true", "t", "1"))
                case int():
                    assert kept == int(text, 16 if text.startswith("0x") else 10)
                case float():
                    assert kept == float(text) or math.isnan(kept)
                case str():
                    assert kept == text
                case tuple():
                    parts = [part.strip(" ()[]'\"") for part in text.split(",")]
                    for item in kept:
                        given_number = item in [read_number(part) for part in parts]
                        assert given_number or str(item) in text, (name, text, kept)
    assert accepted > cases / 8


@pytest.mark.parametrize("name", ["data.lang", "eval.lang", "lora.targets"])
@pytest.mark.parametrize("text", ["1e999", "7", "1_0", "('en',7)", "None", "[True]"])
def test_lists_of_words_have_no_numbers(name, text):
    """1e999 was the word inf, and 1_0 the word 10."""
    with pytest.raises(ValueError, match=f"{name} (has|is) .*: it must be a list of"):
        main.parse_command(["m", f"--config={CARD}", f"--config.{name}={text}"])


@pytest.mark.parametrize("name", ["data.lang", "data.weights", "lora.targets"])
@pytest.mark.parametrize("text", ["b'a'", "{'en': 1}", "{1, 2}", " {}"])
def test_lists_are_no_bytes_and_no_dicts(name, text):
    """b'a' was the list of the number 97."""
    with pytest.raises(ValueError, match=f"{name} is .*: it must be a list of values"):
        main.parse_command(["m", f"--config={CARD}", f"--config.{name}={text}"])


@fuzz.sizes(100)
def test_command_lines(cases):
    r = random.Random(16)
    for _ in range(cases):
        flags = (
            "--config",
            "--workdir",
            "--search",
            "--dry_run",
            "-config.seed",
            "--",
            "x",
            "--no",
        )
        argv = [r.choice((*flags, fuzz.make_text(r, 3))) for _ in range(r.randrange(5))]
        argv = [word + r.choice(("", "=", "=1", f"={fuzz.make_text(r, 2)}")) for word in argv]
        found = fuzz.attempt(lambda argv=argv: cards.split_arguments(["m", *argv]), "")
        if found is not None:
            assert all(re.match("--", word) for word in found.others)


@pytest.mark.parametrize(
    "text", ["-" * 100_000 + "1", "(" * 100_000, "[" * 100_000 + "]" * 100_000]
)
def test_deep_values(text):
    argv = ["m", f"--config={CARD}", f"--config.data.lang={text}"]
    fuzz.attempt(lambda: main.parse_command(argv), "")
