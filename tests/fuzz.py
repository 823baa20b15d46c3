"""Random inputs of readers, from a fixed seed, and the outcomes that are allowed."""

import random
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest

MANY = 20_000
# Pieces of texts that readers treat specially, and pieces that they must leave alone.
PIECES = (
    *("", " ", "\n", "\r\n", "\t", "\0", "\x1b[2J", "\u2028", "\ufeff", "\u00a0", "\ue000"),
    *("a", "Two?", "2 + 2", "ẹ̀kọ́", "e\u0301", "ስንት", "٣", "😀", "e\u0301\u0323", "\u1e17", "Å"),
    *("#### 42", "####", "<<6*7=42>>", "\\boxed{5}", "$", "{", "}", "\\", '"', "'", "[", "]", ","),
    *("<think>", "</think>", "<|im_end|>", "true", "null", "NaN", "1e5", "-0", "0.1", "=", ":"),
)  # fmt: skip
NUMBERS = (
    0,
    1,
    -1,
    7,
    10**18,
    10**30,
    0.5,
    -0.0,
    2.0,
    1e22,
    1e-7,
    1e300,
    float("inf"),
    float("nan"),
)


def sizes(few: int) -> pytest.MarkDecorator:
    """Parametrizes a test by the number of cases: few, or 20,000 in a slow test."""
    slow = pytest.param(MANY, marks=(pytest.mark.slow, pytest.mark.timeout(7200)))
    return pytest.mark.parametrize("cases", [few, slow])


def make_text(r: random.Random, most: int = 6) -> str:
    """Returns a text of up to `most` pieces."""
    return "".join(r.choice(PIECES) for _ in range(r.randrange(most + 1)))


def make_value(r: random.Random, depth: int = 2) -> Any:
    """Returns a value that JSON can have; most are texts."""
    kind = r.randrange(10)
    if kind < 5:
        return make_text(r)
    if kind < 7:
        return r.choice(NUMBERS)
    if kind == 7 or not depth:
        return r.choice((None, True, False))
    if kind == 8:
        return [make_value(r, depth - 1) for _ in range(r.randrange(3))]
    return {make_text(r, 2): make_value(r, depth - 1) for _ in range(r.randrange(3))}


def damage(r: random.Random, raw: bytes) -> bytes:
    """Returns bytes with up to three cuts, insertions or changed bytes."""
    out = bytearray(raw)
    for _ in range(r.randrange(1, 4)):
        at = r.randrange(len(out) + 1)
        match r.randrange(4):
            case 0:
                del out[at:]
            case 1:
                out[at:at] = r.randbytes(r.randrange(1, 5))
            case 2:
                del out[at : at + r.randrange(1, 9)]
            case 3:
                out[at : at + 1] = r.randbytes(1)
    return bytes(out)


def attempt(function: Callable[[], Any], named: str) -> Any:
    """Returns the function's result, or None if it refuses in one sentence that has `named`."""
    try:
        return function()
    except (ValueError, OSError) as error:
        said = str(error)
        assert said
        assert len(said.splitlines()) == 1, said
        assert len(said) < 2000, said
        assert named in said, said
        return None


def spell(text: str) -> str:
    """The text that a reader has to keep of a text: NFC, without surrounding white space."""
    return unicodedata.normalize("NFC", text.strip())
