"""Resident memory of a process and its descendants, for benchmarks/step.py; needs Linux."""

import os
import pathlib

PROC = pathlib.Path("/proc")


def _field(process: int, name: str) -> int:
    """Returns the bytes in a field of /proc/PID/status, or 0 if the process has ended."""
    try:
        text = (PROC / str(process) / "status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(found[0]) if found else 0


def _family() -> list[int]:
    """Returns the ids of this process and its descendants."""
    parents = {}
    for folder in PROC.glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text(encoding="utf-8")
        except OSError:
            continue
        # The name before the closing parenthesis may contain any characters.
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    family = [os.getpid()]
    for process in family:
        family += [child for child, parent in parents.items() if parent == process]
    return family


def now() -> dict[str, int]:
    """Returns the resident bytes of this process, and of its descendants together."""
    sizes = [_field(process, "VmRSS") for process in _family()]
    return {"process": sizes[0], "children": sum(sizes[1:])}


def peak() -> dict[str, int]:
    """Returns the peak resident bytes of this process, and the sum of its descendants' peaks."""
    sizes = [_field(process, "VmHWM") for process in _family()]
    return {"process": sizes[0], "children": sum(sizes[1:])}
