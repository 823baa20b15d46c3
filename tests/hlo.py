"""Reads the text of a compiled program: matmuls with their trip counts, arrays, collectives."""

import math
import re
from typing import NamedTuple

ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip


class Op(NamedTuple):
    """One instruction: its name, the text of its result's shape, its operands, all behind them."""

    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    rest: str


def _balanced(text: str) -> int:
    """The place behind the bracket that closes the first character."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return place + 1
    raise ValueError(f"no closing bracket in {text[:80]!r}")


def _op(line: str) -> Op | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line)
    if not found:
        return None
    name, text = found.groups()
    end = _balanced(text) if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].strip()
    kind = text[: text.index("(")]
    text = text[len(kind) :]
    end = _balanced(text)
    # Operands are written with or without their shapes, as versions go.
    operands = tuple(re.findall(r"%([\w.\-]+)", text[:end]))
    return Op(name, shape, kind, operands, text[end:])


def computations(text: str) -> tuple[dict[str, dict[str, Op]], str]:
    """{computation: {instruction: Op}} and the name of the entry."""
    found, entry, ops = {}, "", {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            ops = found[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif op := _op(line):
            ops[op.name] = op
    return found, entry


def arrays(text: str) -> list[tuple[int, ...]]:
    """The dimensions of every array that the program names."""
    return [tuple(map(int, dims.split(","))) if dims else () for _, dims in ARRAY.findall(text)]


def _dims(op: Op) -> tuple[int, ...]:
    return arrays(op.shape)[0]


def _called(op: Op) -> list[str]:
    """Computations that an instruction runs; those of reductions and sorts are scalar."""
    if op.kind in ("fusion", "call"):
        return re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", op.rest)
    if op.kind == "while":
        return re.findall(r"body=%?([\w.\-]+)", op.rest)
    if op.kind == "conditional":
        names = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", op.rest)
        for group in re.findall(r"branch_computations=\{(.*?)\}", op.rest):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return names
    return []


def matmuls(text: str, trips: int) -> int:
    """FLOP of all dots, loops counted as often as they run and conditionals by their dearer branch.

    Args:
      trips: of loops whose number of trips the program computes itself.
    """
    found, entry = computations(text)

    def of(name: str) -> int:
        ops, total = found[name], 0
        for op in ops.values():
            if op.kind == "dot":
                axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)[1]
                left = _dims(ops[op.operands[0]])
                inner = math.prod(left[int(axis)] for axis in axes.split(",") if axis)
                total += 2 * inner * math.prod(_dims(op))
            inside = [of(called) for called in _called(op)]
            if op.kind == "while":
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.rest)
                inside = [sum(inside) * (int(known[1]) if known else trips)]
            elif op.kind == "conditional":
                inside = [max(inside)]
            total += sum(inside)
        return total

    return of(entry)


def collectives(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(kind, dimensions) of every array that travels, in order."""
    return [
        (op.kind.removesuffix("-start"), dims)
        for ops in computations(text)[0].values()
        for op in ops.values()
        if op.kind.removesuffix("-start") in COLLECTIVES
        for dims in arrays(op.shape)
    ]
