"""Reads the text of a compiled program: computations, instructions, arrays, groups of devices.

XLA writes one instruction a line, operands by name, an array as `bf16[16,128]{1,0:T(8,128)S(1)}`:
element type, dimensions, layout; S(1) is memory of the chip, without S it lies in main memory.
"""

import math
import re
from typing import NamedTuple

import numpy as np

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "token": 0}


class Op(NamedTuple):
    """One instruction of a computation.

    Attributes:
      name: of the instruction.
      result: the text of its result's type.
      kind: its opcode.
      operands: names of instructions; the text in brackets of a parameter or a constant.
      rest: the text behind the operands.
      root: whether the computation returns it.
    """

    name: str
    result: str
    kind: str
    operands: tuple[str, ...]
    rest: str
    root: bool


def parse_computations(text: str) -> tuple[dict[str, dict[str, Op]], str]:
    """Parses a program into {computation: {instruction: Op}} and the name of the entry."""
    found: dict[str, dict[str, Op]] = {}
    entry, ops = "", {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)):
            ops = found[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif op := _op(line):
            ops[op.name] = op
    return found, entry


def _op(line: str) -> Op | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line)
    if not found:
        return None
    text = found[3]
    end = _closing(text) if text.startswith("(") else text.index(" ")
    result, text = text[:end], text[end:].strip()
    kind = text[: text.index("(")]
    text = text[len(kind) :]
    end = _closing(text)
    operands = tuple(re.findall(r"%([\w.\-]+)", text[:end]))
    if kind in ("parameter", "constant"):
        operands = (text[1 : end - 1],)
    return Op(found[2], result, kind, operands, text[end:], bool(found[1]))


def _closing(text: str) -> int:
    """Returns the index behind the bracket that closes the first character."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"no closing bracket in {text[:80]!r}")


def parse_arrays(text: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """Parses a result into (element type, dimensions, whether in main memory) of each array."""
    out = []
    for kind, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(size.lstrip("<=")) for size in dims.split(",")) if dims else ()
        space = re.search(r"S\((\d+)\)", layout)
        out.append((kind, shape, not space or space[1] == "0"))
    return out


def array_bytes(array: tuple[str, tuple[int, ...], bool]) -> float:
    """Returns the bytes of an array of `parse_arrays`."""
    kind, shape, _ = array
    bits = _BITS.get(kind)
    if bits is None:
        bits = int(found[1]) if (found := re.search(r"^[a-z]+(\d+)", kind)) else 0
    return math.prod(shape) * bits / 8


def main_memory_bytes(text: str) -> float:
    """Returns the bytes of a result in main memory."""
    return sum(array_bytes(array) for array in parse_arrays(text) if array[2])


def total_bytes(text: str) -> float:
    """Returns the bytes of a result in any memory."""
    return sum(map(array_bytes, parse_arrays(text)))


def constant_value(op: Op) -> int | None:
    """Returns the value of a scalar integer constant; None for any other instruction."""
    if not re.match(r"[su]\d+\[\]", op.result):
        return None
    found = re.fullmatch(r"-?\d+", op.operands[0]) if op.operands else None
    return int(found[0]) if found else None


def parse_replica_groups(rest: str, devices: int) -> list[list[int]]:
    """Parses the groups of partitions that exchange, in each spelling; the pairs of a permutation.

    `{{0,1},{2,3}}` and `[2,2]<=[4]` are the same groups; `[2,2]<=[2,2]T(1,0)` gives [[0, 2], [1,
    3]]. In names they are `mesh['a'=2,'b'=2] {'a'}` and `mesh['a'=2,'b'=2],
    device_ids=([2,2]T(1,0)) {'b'}`.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", rest):
        return [[int(x) for x in p.split(",")] for p in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if iota := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest
    ):  # fmt: skip
        shape, dims = ([int(x) for x in iota[i].split(",")] for i in (1, 2))
        order = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            order = order.transpose([int(x) for x in iota[3].split(",")])
        return order.reshape(shape).tolist()
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", rest
    ):  # fmt: skip
        return _named_groups(*named.groups())
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return [[int(x) for x in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed[1])]
    return [list(range(devices))]


def _named_groups(sizes: str, order: str | None, exchanged: str) -> list[list[int]]:
    """Returns the groups of axes by name.

    `'a':(2)3` is the part of axis 'a' that has 3 devices, inside an outer part of 2.
    """
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    ids = np.arange(math.prod(axes.values()))
    if order:
        shape, turn, listed = (
            re.search(pattern, order)
            for pattern in (r"\[([\d,]+)\](?:T|$)", r"T\(([\d,]+)", r"^\{?([\d,]+)\}?$")
        )
        if listed:
            ids = np.array([int(x) for x in listed[1].split(",")])
        if shape:
            ids = ids.reshape([int(x) for x in shape[1].split(",")])
        if turn:
            ids = ids.transpose([int(x) for x in turn[1].split(",")])
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
