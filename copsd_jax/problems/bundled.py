"""The bundled word problems: package data, written by `tools/generate_problems.py`."""

import pathlib

NAMES = ("train", "held_out", "exemplars")


def find_file(name: str) -> pathlib.Path:
    """Returns the path of a bundled JSONL file; `name` is one of `NAMES`."""
    return pathlib.Path(__file__).parent / "bundled" / f"{name}.jsonl"
