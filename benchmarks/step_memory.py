"""Resident memory of a process and of those that it started, for benchmarks/step.py; Linux."""

import os
import pathlib

PROC = pathlib.Path("/proc")


def _field(process: int, name: str) -> int:
    """Bytes of a field of /proc/PID/status; 0 of a process that is gone."""
    try:
        text = (PROC / str(process) / "status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(found[0]) if found else 0


def _family() -> list[int]:
    """This process and its descendants."""
    parents = {}
    for folder in PROC.glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text(encoding="utf-8")
        except OSError:
            continue
        # The name before the parenthesis may hold anything.
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    family = [os.getpid()]
    for process in family:
        family += [child for child, parent in parents.items() if parent == process]
    return family


def now() -> dict[str, int]:
    """Bytes that are resident, of this process and of all that it started."""
    sizes = [_field(process, "VmRSS") for process in _family()]
    return {"process": sizes[0], "children": sum(sizes[1:])}


def peak() -> dict[str, int]:
    """The most bytes that ever were; of the children the sum of each one's own peak."""
    sizes = [_field(process, "VmHWM") for process in _family()]
    return {"process": sizes[0], "children": sum(sizes[1:])}
