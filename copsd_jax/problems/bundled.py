"""The bundled word problems: package data, written by `tools/generate_problems.py`."""

import pathlib

NAMES = ("train", "held_out", "exemplars")


def find_file(name: str) -> pathlib.Path:
    """Finds the JSONL file of one bundled set.

    Raises:
      ValueError: unknown name.
    """
    if name not in NAMES:
        raise ValueError(
            f"no bundled problems are named {name!r}; the choices are {', '.join(NAMES)}"
        )
    return pathlib.Path(__file__).parent / "bundled" / f"{name}.jsonl"
