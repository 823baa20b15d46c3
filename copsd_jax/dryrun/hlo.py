"""Parser of compiled programs' text: computations, instructions, arrays, and device groups.

XLA writes one instruction per line and refers to operands by name. `bf16[16,128]{1,0:T(8,128)S(1)}`
describes an array by its element type, dimensions and layout. S(1) means that the array is in
on-chip memory; without S, the array is in main memory.
"""

import math
import re
from typing import NamedTuple

import numpy as np

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")


class Op(NamedTuple):
    """One instruction of a computation.

    Attributes:
      name: name of the instruction.
      result: type of the result, as text.
      kind: opcode of the instruction.
      operands: names of the operands; for a parameter or a constant, the text in parentheses.
      rest: the text after the operands.
      root: whether the computation returns this instruction's result.
    """

    name: str
    result: str
    kind: str
    operands: tuple[str, ...]
    rest: str
    root: bool


def parse_computations(text: str) -> tuple[dict[str, dict[str, Op]], str]:
    """Returns {computation: {instruction: Op}} and the name of the entry computation."""
    found: dict[str, dict[str, Op]] = {}
    entry, ops = "", {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)):
            ops = found[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif op := _parse_hlo_op(line):
            ops[op.name] = op
    return found, entry


def _parse_hlo_op(line: str) -> Op | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line)
    if not found:
        return None
    root, name, text = found.groups()
    end = _find_hlo_bracket_end(text) if text.startswith("(") else text.index(" ")
    result, (kind, paren, text) = text[:end], text[end:].strip().partition("(")
    text = paren + text
    end = _find_hlo_bracket_end(text)
    operands = tuple(re.findall(r"%([\w.\-]+)", text[:end]))
    if kind in ("parameter", "constant"):
        operands = (text[1 : end - 1],)
    return Op(name, result, kind, operands, text[end:], bool(root))


def _find_hlo_bracket_end(text: str) -> int:
    """Returns the index just after the parenthesis that closes the parenthesis at index 0."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"no closing bracket in {text[:80]!r}")


def parse_arrays(text: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """Returns (element type, dimensions, whether in main memory) for each array in a result."""
    return [
        (kind, tuple(map(int, re.findall(r"\d+", dims))), not re.search(r"S\([1-9]", layout))
        for kind, dims, layout in _ARRAY.findall(text)
    ]


def count_hlo_array_bytes(array: tuple[str, tuple[int, ...], bool]) -> float:
    """Returns the number of bytes of an array that `parse_arrays` returned."""
    kind, shape, _ = array
    bits = re.match(r"[a-z]+(\d+)", "pred8" if kind == "pred" else kind)  # None for type `token`
    return math.prod(shape) * int(bits[1] if bits else 0) / 8


def count_hlo_main_bytes(text: str) -> float:
    """Returns how many bytes of a result are in main memory."""
    return sum(count_hlo_array_bytes(array) for array in parse_arrays(text) if array[2])


def count_hlo_bytes(text: str) -> float:
    """Returns how many bytes a result has, in main memory and on-chip memory together."""
    return sum(map(count_hlo_array_bytes, parse_arrays(text)))


def read_hlo_constant(op: Op) -> int | None:
    """Returns the value of a scalar integer constant; None for any other instruction."""
    scalar = op.kind == "constant" and re.match(r"[su]\d+\[\]", op.result)
    return int(op.operands[0]) if scalar and re.fullmatch(r"-?\d+", op.operands[0]) else None


def parse_replica_groups(rest: str, devices: int) -> list[list[int]]:
    """Returns groups of partitions that exchange data, or a permutation's (source, target) pairs.

    XLA has several notations for groups. `{{0,1},{2,3}}` and `[2,2]<=[4]` both mean the groups
    [[0, 1], [2, 3]]. `[2,2]<=[2,2]T(1,0)` means the groups [[0, 2], [1, 3]]. With axis names, the
    groups [[0, 2], [1, 3]] are written `mesh['a'=2,'b'=2] {'a'}` or
    `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}`.
    """
    if found := re.search(r"(?:source_target_pairs|replica_groups)=\{(\{.*?\})\}", rest):
        return [_parse_hlo_integers(group) for group in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _expand_hlo_iota(found[2]).reshape(_parse_hlo_integers(found[1])).tolist()
    named = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}"
    if found := re.search(named, rest):
        return _parse_hlo_named_groups(*found.groups())
    return [list(range(devices))]


def _parse_hlo_integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _expand_hlo_iota(text: str) -> np.ndarray:
    """Returns the array for a text such as `[2,3]T(1,0)`, meaning `arange(6).reshape(2, 3).T`."""
    ((shape, turn),) = re.findall(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$", text)
    ids = np.arange(math.prod(_parse_hlo_integers(shape))).reshape(_parse_hlo_integers(shape))
    return ids.transpose(_parse_hlo_integers(turn)) if turn else ids


def _parse_hlo_named_groups(sizes: str, order: str | None, exchanged: str) -> list[list[int]]:
    """Returns the groups of devices that exchange data along the named axes.

    `'a':(2)3` names a part of axis 'a': the sub-axis of size 3 inside an outer sub-axis of size 2.
    """
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    ids = np.arange(math.prod(axes.values()))
    if order:
        ids = (
            _expand_hlo_iota(order)
            if "[" in order
            else np.array(_parse_hlo_integers(order.strip("{}")))
        )
    parts: dict[str, list[tuple[str, int]]] = {name: [(name, size)] for name, size in axes.items()}
    chosen = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", exchanged):
        if before:
            outer, part = int(before), int(size)
            rest = axes[name] // outer // part
            parts[name] = [(f"{name} outer", outer), (name, part), (f"{name} inner", rest)]
        chosen.append(name)
    names = [part for one in parts.values() for part, _ in one]
    grid = ids.reshape([size for one in parts.values() for _, size in one])
    last = [names.index(name) for name in chosen]
    grid = np.moveaxis(grid, last, range(grid.ndim - len(last), grid.ndim))
    return grid.reshape(-1, math.prod(grid.shape[grid.ndim - len(last) :])).tolist()
