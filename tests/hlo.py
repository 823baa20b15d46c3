"""Reads the text of a compiled program: matmuls with their trip counts, arrays, collectives.

And the jaxprs of Pallas kernels, of which a compiled program shows nothing.
"""

import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.extend
import pytest

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


def _dot(op: Op, ops: dict[str, Op]) -> int:
    axes: Any = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
    left = _dims(ops[op.operands[0]])
    inner = math.prod(left[int(axis)] for axis in axes[1].split(",") if axis)
    return 2 * inner * math.prod(_dims(op))


def _convolution(op: Op, ops: dict[str, Op]) -> int:
    """A TPU's dot; its batch and further contracted axes are a window's, of which most is padding
    that multiplies nothing."""
    labels: Any = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    shapes = [_dims(ops[name]) for name in op.operands] + [_dims(op)]
    left, right, out = (
        dict(zip(names, dims, strict=True))
        for names, dims in zip(labels.groups(), shapes, strict=True)
    )
    total = 2 * out["b"] * out["f"] * right["i"]
    for axis in range(len(out) - 2):
        total *= _pairs(op.rest, axis, left[str(axis)], out[str(axis)], right[str(axis)])
    return total


def _pairs(text: str, axis: int, size: int, places: int, width: int) -> int:
    """How often a number of a window's axis meets one of the operand's: neither hole nor edge."""

    def option(name: str, usual: str) -> str:
        found = re.search(rf"window=\{{[^}}]*\b{name}=([\w\-]+)", text)
        return found[1].split("x")[axis] if found else usual

    step, before = int(option("stride", "1")), int(option("pad", "0_0").split("_")[0])
    hole, spread = int(option("lhs_dilate", "1")), int(option("rhs_dilate", "1"))
    at = [p * step + w * spread - before for p in range(places) for w in range(width)]
    return sum(0 <= x <= (size - 1) * hole and x % hole == 0 for x in at)


def matmuls(text: str, trips: int) -> int:
    """FLOP of all dots, loops counted as often as they run and conditionals by their dearer branch.

    A TPU's program has convolutions in place of dots; kernels count as nothing.

    Args:
      trips: of loops whose number of trips the program computes itself.
    """
    found, entry = computations(text)

    def of(name: str) -> int:
        ops, total = found[name], 0
        for op in ops.values():
            if op.kind in ("dot", "convolution"):
                total += {"dot": _dot, "convolution": _convolution}[op.kind](op, ops)
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


# --- kernels -----------------------------------------------------------------------------------


def kernels(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """(equation of each pallas_call, how often the loops around it run it)."""
    for equation in jaxpr.eqns:
        inner = times * equation.params.get("length", 1)
        if equation.primitive.name == "pallas_call":
            yield equation, times
            continue
        for sub in jax.extend.core.jaxprs_in_params(equation.params):
            yield from kernels(sub, inner)


def dots(jaxpr: Any) -> int:
    """FLOP of all dots of a kernel's step, conditionals by their dearer branch."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contract)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        inside = [dots(sub) for sub in jax.extend.core.jaxprs_in_params(equation.params)]
        if equation.primitive.name == "cond":
            inside = [max(inside)]
        total += equation.params.get("length", 1) * sum(inside)
    return total


def kernel_matmuls(jaxpr: Any) -> int:
    """FLOP of all dots in all kernels, every step of their grids."""
    return sum(
        times * math.prod(equation.params["grid_mapping"].grid) * dots(equation.params["jaxpr"])
        for equation, times in kernels(jaxpr)
    )


def missing(what: str) -> None:
    """Skips a test of a compiler that is not there; fails it where COPSD_COMPILE=1 asks for it."""
    if os.environ.get("COPSD_COMPILE") == "1":
        pytest.fail(f"COPSD_COMPILE is 1: needs {what}")
    pytest.skip(f"needs {what}")
