"""Random inputs of readers, from a fixed seed, and the outcomes that are allowed."""

import contextlib
import copy
import json
import pathlib
import random
import resource
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from copsd_jax.runtime import streams

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


def damage_header(r: random.Random, raw: bytes, header: int) -> bytes:
    """Returns bytes whose first `header` have other bytes, sizes, cuts or repetitions."""
    out = bytearray(raw)
    for _ in range(r.choice((1, 1, 2, 5))):
        at = r.randrange(min(header, len(out)) or 1)
        match r.randrange(5):
            case 0:
                out[at : at + 1] = r.randbytes(1)
            case 1:
                size = r.choice((0, 1, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
                out[at : at + 8] = size.to_bytes(8, "little")
            case 2:
                del out[at : at + r.randrange(1, 20)]
            case 3:
                out[at:at] = out[r.randrange(len(out) or 1) :][: r.randrange(1, 20)]
            case 4 if r.random() < 0.2:
                del out[at:]
    return bytes(out)


def change_json(r: random.Random, raw: bytes, values: list) -> bytes:
    """Returns JSON in which values anywhere are replaced, removed or renamed; or damaged bytes."""
    if r.random() < 0.1:
        return damage_header(r, raw, len(raw))
    content = json.loads(raw)
    for _ in range(r.choice((1, 1, 2, 3))):
        node = content
        while keys := list(node) if isinstance(node, dict) else range(len(node)):
            key = r.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and r.random() < 0.8:
                node = node[key]
                continue
            kind = r.random()
            if kind < 0.2:
                del node[key]
            elif kind < 0.3 and isinstance(node, dict):
                node[make_text(r, 2)] = node.pop(key)
            else:
                node[key] = copy.deepcopy(r.choice(values))
            break
    return json.dumps(content).encode()


@contextlib.contextmanager
def bounded(seconds: float = 15.0, memory: int = 1 << 30) -> Iterator[None]:
    """Bounds the time of the block, and the memory that it may ask for besides that in use.

    A reader that believes a wrong size in a file fails with a MemoryError, which no test accepts.
    """
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    former = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, former[1]))
    start = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, former)
    assert time.process_time() - start < seconds


def attempt(function: Callable[[], Any], named: str, spelled: bool = False) -> Any:
    """Returns the function's result, or None if it refuses in one sentence that has `named`.

    With `spelled`, the sentence is taken as a command prints it: names of tensors and of keys in
    a model's files may have line breaks.
    """
    try:
        return function()
    except (ValueError, OSError) as error:
        said = streams.spell_error(error) if spelled else str(error)
        assert said
        assert len(said.splitlines()) == 1, said
        assert len(said) < 2000, said
        assert named in said, said
        return None


def spell(text: str) -> str:
    """The text that a reader has to keep of a text: NFC, without surrounding white space."""
    return unicodedata.normalize("NFC", text.strip())
