"""The bundled word problems: package data, written by `tools/generate_problems.py`."""

import pathlib

NAMES = ("train", "held_out", "exemplars")


def path(name: str) -> pathlib.Path:
    """The JSONL file of one bundled set; raises ValueError on an unknown name."""
    if name not in NAMES:
        raise ValueError(f"no bundled problems named {name!r}; there are {', '.join(NAMES)}")
    return pathlib.Path(__file__).parent / "bundled" / f"{name}.jsonl"
