"""Costs of a compiled program, read from the program's text and sizes; the program is not run.

The compiler's own cost analysis counts the body of a loop only once. This file counts an
instruction in a loop once per iteration, so a scan over layers costs as much as all layers
together. If the program's text does not state the number of iterations, the constant in the loop's
condition is used instead. If the loop's condition has no constant, the caller gives the number of
iterations.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from copsd_jax.dryrun import hlo
from copsd_jax.runtime import hardware

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
# Instructions that move no data themselves.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
    "opt-barrier add-dependency async-update recv domain get-dimension-size".split()
)


class Cost(NamedTuple):
    """The cost of one instruction: FLOPs of matrix products, bytes moved, and number of runs."""

    name: str
    flops: float
    bytes: float
    times: int


class Collective(NamedTuple):
    """One exchange of data between devices.

    Attributes:
      kind: opcode of the exchange.
      axes: names of the mesh axes of the exchange, joined by +.
      network: whether the exchange crosses the network between slices or hosts.
      bytes: number of bytes that a device sends in each exchange.
      times: number of times that the exchange runs.
    """

    kind: str
    axes: str
    network: bool
    bytes: float
    times: int


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Costs of one compiled program on each device.

    Attributes:
      name: name of the program.
      seconds: time that the compilation took, in seconds.
      flops: FLOPs of the program's matrix products.
      bytes: bytes that the program reads from and writes to main memory.
      arguments: bytes of the program's arguments.
      outputs: bytes of the program's results.
      aliased: bytes of results that reuse the memory of arguments.
      temporary: bytes of temporary memory while the program runs.
      costs: costs of the program's instructions.
      collectives: the program's exchanges between devices.
    """

    name: str
    seconds: float
    flops: float
    bytes: float
    arguments: int
    outputs: int
    aliased: int
    temporary: int
    costs: tuple[Cost, ...]
    collectives: tuple[Collective, ...]

    @property
    def added(self) -> int:
        """Bytes that the program needs at run time, besides its arguments."""
        return self.temporary + max(0, self.outputs - self.aliased)


def analyse_program(
    name: str, program: Any, seconds: float, mesh: Any, *, turns: int = 1
) -> Analysis:
    """Returns the costs of a compiled program.

    Args:
      name: name of the program in the report.
      program: the compiled program, a jax.stages.Compiled.
      seconds: time that the compilation took, in seconds.
      mesh: the mesh whose axis names describe the collectives; None for one device.
      turns: number of iterations to assume for a loop of unknown length.
    """
    costs, collectives = read_program_text(program.as_text(), mesh, turns=turns)
    memory = program.memory_analysis()
    return Analysis(
        name, seconds,
        sum(c.flops * c.times for c in costs), sum(c.bytes * c.times for c in costs),
        memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.alias_size_in_bytes,
        memory.temp_size_in_bytes, costs, collectives,
    )  # fmt: skip


def estimate_roofline_seconds(found: Analysis, chip: hardware.Chip) -> tuple[float, float]:
    """Returns roofline estimates of computation time and communication time, in seconds.

    Each instruction is assumed to take the time of its FLOPs or of its bytes, whichever is longer.
    Exchanges between devices are assumed not to overlap one another.
    """
    own = sum(max(c.flops / chip.flops, c.bytes / chip.bandwidth) * c.times for c in found.costs)
    rates = {False: chip.link, True: chip.network}
    return own, sum(c.bytes * c.times / rates[c.network] for c in found.collectives)


def sum_collectives_by_axes(found: Analysis) -> dict[str, dict[str, list]]:
    """Adds up the collectives as {axes: {kind: [number of runs, bytes that a device sends]}}."""
    out: dict[str, dict[str, list]] = {}
    for one in found.collectives:
        name = one.axes + (" (network)" if one.network else "")
        pair = out.setdefault(name, {}).setdefault(one.kind, [0, 0.0])
        pair[:] = pair[0] + one.times, pair[1] + one.bytes * one.times
    return out


# --- text -------------------------------------------------------------------------------------


def read_program_text(text: str, mesh: Any = None, *, turns: int = 1) -> tuple[tuple, tuple]:
    """Returns the instruction costs and the collectives that a program's text contains."""
    found, entry = hlo.parse_computations(text)
    program = _Program(found, mesh, turns, [], [], set())
    _walk_hlo_computation(program, entry, 1)
    return tuple(program.costs), tuple(program.collectives)


class _Program(NamedTuple):
    computations: dict[str, dict[str, hlo.Op]]
    mesh: Any
    turns: int
    costs: list[Cost]
    collectives: list[Collective]
    channels: set[str]  # channels of the collectives found so far


# --- walking ----------------------------------------------------------------------------------


def _walk_hlo_computation(program: _Program, name: str, times: int) -> None:
    ops = program.computations[name]
    for op in ops.values():
        if op.kind == "while":
            _walk_hlo_computation(
                program, _read_hlo_attribute(op, "body"), times * _read_hlo_trip_count(program, op)
            )
        elif op.kind in ("call", "async-start"):
            if inner := _find_called_computation(op):
                _walk_hlo_computation(program, inner, times)
        elif op.kind == "conditional":
            _cost_dearest_branch(program, op, times)
        elif op.kind == "send":
            # TPU slices exchange data through their hosts. Only the mesh axis `data` spans several
            # slices.
            sent = hlo.count_hlo_bytes(ops[op.operands[0]].result)
            program.collectives.append(Collective("send", "data", True, sent, times))
        elif op.kind.removesuffix("-start") in COLLECTIVES:
            _add_hlo_collective(program, ops, op, times)
        elif op.kind not in _FREE and not op.kind.endswith("-done"):
            fused = op.kind == "fusion"
            flops = (
                _cost_fused_computation(program, _find_called_computation(op), times)
                if fused
                else _count_hlo_flops(ops, op)
            )
            program.costs.append(Cost(op.name, flops, _count_hlo_traffic(program, ops, op), times))


def _read_hlo_attribute(op: hlo.Op, key: str) -> str:
    found = re.search(rf"\b{key}=%?([\w.\-]+)", op.rest)
    return found[1] if found else ""


def _find_called_computation(op: hlo.Op) -> str:
    return _read_hlo_attribute(op, "calls") or _read_hlo_attribute(op, "to_apply")


def _read_hlo_trip_count(program: _Program, op: hlo.Op) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.rest):
        return int(known[1])
    condition = program.computations[_read_hlo_attribute(op, "condition")]
    bounds = [hlo.read_hlo_constant(one) or 0 for one in condition.values()]
    return max([bound for bound in bounds if bound > 1], default=program.turns)


def _cost_dearest_branch(program: _Program, op: hlo.Op, times: int) -> None:
    """Adds the costs of the conditional branch with the most FLOPs; bytes break a tie."""
    names = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", op.rest)
    for group in re.findall(r"branch_computations=\{(.*?)\}", op.rest):
        names += [name.strip().lstrip("%") for name in group.split(",")]
    tried = []
    for name in names:
        branch = program._replace(costs=[], collectives=[])
        _walk_hlo_computation(branch, name, times)
        work = [sum(getattr(c, key) * c.times for c in branch.costs) for key in ("flops", "bytes")]
        tried.append((work, branch))
    if tried:
        _, best = max(tried, key=lambda one: one[0])
        program.costs.extend(best.costs)
        program.collectives.extend(best.collectives)


def _cost_fused_computation(program: _Program, name: str, times: int) -> float:
    """Returns the FLOPs of a fusion, and adds the fusion's collectives to the program."""
    ops, total = program.computations[name], 0.0
    for op in ops.values():
        if op.kind in ("fusion", "call"):
            total += _cost_fused_computation(program, _find_called_computation(op), times)
        elif op.kind.removesuffix("-start") in COLLECTIVES:
            _add_hlo_collective(program, ops, op, times)
        else:
            total += _count_hlo_flops(ops, op)
    return total


# --- FLOPs ------------------------------------------------------------------------------------


def _parse_hlo_shape(op: hlo.Op) -> tuple[int, ...]:
    return hlo.parse_arrays(op.result)[0][1]


def _count_hlo_flops(ops: dict[str, hlo.Op], op: hlo.Op) -> float:
    if op.kind == "dot":
        left = _parse_hlo_shape(ops[op.operands[0]])
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
        inner = math.prod(left[int(a)] for a in axes[1].split(",") if a) if axes else 1
        return 2.0 * inner * math.prod(_parse_hlo_shape(op))
    if op.kind == "convolution":
        return _count_convolution_flops(ops, op)
    if op.kind == "custom-call":
        if estimate := _read_custom_call_cost(op):
            return estimate[0]
        if re.search(r'custom_call_target="[^"]*gemm', op.rest):
            return _count_gemm_flops(ops, op)
    return 0.0


def _read_custom_call_cost(op: hlo.Op) -> tuple[float, float] | None:
    """Returns the FLOPs and bytes that a kernel declares, or None if the kernel declares no cost.

    Mosaic kernels declare their FLOPs and bytes in a cost estimate. Triton kernels declare their
    FLOPs and bytes in a scope name of the form `cost:FLOPS:BYTES`.
    """
    flops = re.search(r'"cost_estimate":\{[^{}]*"flops":"?(\d+)', op.rest)
    moved = re.search(r'"cost_estimate":\{[^{}]*"bytes_accessed":"?(\d+)', op.rest)
    if flops and moved:
        return float(flops[1]), float(moved[1])
    named = re.search(r'op_name="[^"]*\bcost:(\d+):(\d+)', op.rest)
    return (float(named[1]), float(named[2])) if named else None


def _count_gemm_flops(ops: dict[str, hlo.Op], op: hlo.Op) -> float:
    left = _parse_hlo_shape(ops[op.operands[0]])
    axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', op.rest)
    inner = [int(a) for a in re.findall(r"\d+", axes[1])] if axes else [len(left) - 1]
    return 2.0 * math.prod(left[a] for a in inner) * math.prod(_parse_hlo_shape(op))


def _count_convolution_flops(ops: dict[str, hlo.Op], op: hlo.Op) -> float:
    """Counts the FLOPs of a convolution, excluding products with padding or dilation holes.

    On TPUs, XLA writes matrix products as convolutions. The batch dimensions of a matrix product
    become spatial dimensions, which are dilated so that each output position uses one input
    position.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    if not labels:
        return 0.0
    arrays = (ops[op.operands[0]], ops[op.operands[1]], op)
    left, right, out = (
        dict(zip(names, _parse_hlo_shape(one), strict=True))
        for names, one in zip(labels.groups(), arrays, strict=True)
    )
    window = re.search(r"window=\{([^}]*)\}", op.rest)
    total = 2.0 * right["i"] * out["b"] * out["f"]
    for k in filter(str.isdigit, labels[1]):
        of_axis = _parse_hlo_window(window[1] if window else "", int(k))
        total *= _count_convolution_pairs(left[k], right[k], out[k], of_axis)
    return total


def _parse_hlo_window(text: str, k: int) -> dict[str, int]:
    """Reads the numbers of dimension k from a text such as `size=8x1 stride=7x1 pad=0_0x0_0`."""
    out = {"stride": 1, "lhs_dilate": 1, "rhs_dilate": 1, "pad": 0}
    for name in out:
        if found := re.search(rf"\b{name}=(\S+)", text):
            out[name] = int(found[1].split("x")[k].split("_")[0])
    return out


def _count_convolution_pairs(left: int, right: int, out: int, window: dict[str, int]) -> int:
    """Counts the pairs (output position, kernel position) that use a value of the input.

    All other pairs use padding, or a hole that dilation leaves between two values of the input.
    """
    at = np.arange(out)[:, None] * window["stride"] - window["pad"]
    at = at + np.arange(right)[None] * window["rhs_dilate"]
    inside = (at >= 0) & (at <= (left - 1) * window["lhs_dilate"])
    return int((inside & (at % window["lhs_dilate"] == 0)).sum())


# --- bytes ------------------------------------------------------------------------------------


def _count_hlo_traffic(program: _Program, ops: dict[str, hlo.Op], op: hlo.Op) -> float:
    """Counts the bytes that an instruction reads from and writes to main memory."""
    result = hlo.count_hlo_main_bytes(op.result)
    if op.kind == "custom-call" and (estimate := _read_custom_call_cost(op)):
        return estimate[1]
    if op.kind in ("copy-start", "slice-start"):
        # The result of copy-start or slice-start is (destination, source, state). The copied data
        # count twice, as a read and a write, if the destination and the source are both in main
        # memory; otherwise, the copied data count once.
        arrays = [array for array in hlo.parse_arrays(op.result) if array[1]]
        least = min(map(hlo.count_hlo_array_bytes, arrays), default=0.0)
        return least * (2 if all(array[2] for array in arrays) else 1)
    if op.kind in ("iota", "broadcast"):
        return result
    if op.kind in ("dynamic-slice", "slice", "gather"):
        return result + hlo.count_hlo_bytes(op.result)
    if op.kind in ("dynamic-update-slice", "scatter"):
        return 2 * hlo.count_hlo_bytes(ops[op.operands[1]].result)
    if op.kind == "fusion":
        return _count_fusion_bytes(program, _find_called_computation(op), ops, op)
    read = [hlo.count_hlo_main_bytes(ops[name].result) for name in op.operands if name in ops]
    if op.kind == "custom-call":
        # An operand that is updated in place is not moved as a whole. The program's text does not
        # say how much of an updated operand is moved, so updated operands are not counted.
        aliases = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", op.rest)
        for number in re.findall(r": \((\d+),", aliases[1]) if aliases else ():
            result -= read[int(number)]
            read[int(number)] = 0.0
    return max(0.0, result) + sum(read)


def _count_fusion_bytes(program: _Program, inner: str, ops: dict[str, hlo.Op], op: hlo.Op) -> float:
    """Counts the bytes that a fusion reads from its operands and writes to its results."""
    total = _count_fusion_writes(program.computations[inner], op)
    for number, name in enumerate(op.operands):
        if name in ops and hlo.count_hlo_main_bytes(ops[name].result):
            total += _count_fusion_reads(
                program, inner, _find_fusion_parameter(program, inner, number)
            )
    return total


def _find_fusion_parameter(program: _Program, name: str, number: int) -> hlo.Op:
    return next(
        op for op in program.computations[name].values()
        if op.kind == "parameter" and int(op.operands[0]) == number
    )  # fmt: skip


def _count_fusion_reads(program: _Program, inner: str, one: hlo.Op) -> float:
    """Counts the bytes that a fusion and its nested fusions read from one operand."""
    total = 0.0
    users = [op for op in program.computations[inner].values() if one.name in op.operands]
    for user in users:
        first = user.operands[0] == one.name
        if user.kind == "bitcast":
            total += _count_fusion_reads(program, inner, user)
        elif user.kind == "fusion":
            called = _find_called_computation(user)
            for number, name in enumerate(user.operands):
                if name == one.name:
                    total += _count_fusion_reads(
                        program, called, _find_fusion_parameter(program, called, number)
                    )
        elif user.kind in ("dynamic-slice", "slice", "gather") and first:
            total += hlo.count_hlo_bytes(user.result)
        elif user.kind != "parameter" and not (user.kind == "dynamic-update-slice" and first):
            return hlo.count_hlo_bytes(one.result)
    return min(total, hlo.count_hlo_bytes(one.result))


def _count_fusion_writes(inner: dict[str, hlo.Op], op: hlo.Op) -> float:
    """Counts the bytes that a fusion writes; for an update in place, counts only the update."""
    root = next(one for one in inner.values() if one.root)
    parts = [inner[name] for name in root.operands] if root.kind == "tuple" else [root]
    arrays = hlo.parse_arrays(op.result)
    if len(parts) != len(arrays):
        return hlo.count_hlo_main_bytes(op.result)
    total = 0.0
    for part, array in zip(parts, arrays, strict=True):
        while part.kind == "bitcast":
            part = inner[part.operands[0]]
        if part.kind == "dynamic-update-slice":
            total += hlo.count_hlo_bytes(inner[part.operands[1]].result)
        elif array[2]:
            total += hlo.count_hlo_array_bytes(array)
    return total


# --- collectives ------------------------------------------------------------------------------


def _add_hlo_collective(program: _Program, ops: dict[str, hlo.Op], op: hlo.Op, times: int) -> None:
    """Adds a collective, unless a collective with the same channel was added before.

    A collective that overlaps with several fusions appears in each of these fusions, with the same
    channel.
    """
    channel = re.search(r"channel_id=(\d+)", op.rest)
    if channel and channel[1] in program.channels:
        return
    program.channels.update(channel.groups() if channel else ())
    program.collectives.append(_read_hlo_collective(program, ops, op, times))


def _read_hlo_collective(
    program: _Program, ops: dict[str, hlo.Op], op: hlo.Op, times: int
) -> Collective:
    kind, mesh = op.kind.removesuffix("-start"), program.mesh
    groups = hlo.parse_replica_groups(op.rest, 1 if mesh is None else mesh.devices.size)
    size = max(map(len, groups), default=1)
    given = sum(hlo.count_hlo_bytes(ops[name].result) for name in op.operands if name in ops)
    share = (size - 1) / size
    sent = {
        "all-gather": given * (size - 1), "all-reduce": 2 * given * share,
        "collective-permute": given, "collective-broadcast": given,
    }.get(kind, given * share)  # fmt: skip
    return Collective(kind, *_find_collective_axes(mesh, groups), sent, times)


def _find_collective_axes(mesh: Any, groups: Sequence[Sequence[int]]) -> tuple[str, bool]:
    """Returns the mesh axes of an exchange, and whether the exchange crosses the network.

    Partitions are numbered in the order of the mesh's devices.
    """
    if mesh is None:
        return "", False
    places = np.stack(np.unravel_index(np.arange(mesh.devices.size), mesh.devices.shape), axis=1)
    where = [_find_collective_host(device) for device in mesh.devices.flat]
    differ, network = np.zeros(places.shape[1], bool), False
    for group in groups:
        differ |= (places[list(group)] != places[group[0]]).any(axis=0)
        network |= len({where[i] for i in group}) > 1
    names = [name for name, other in zip(mesh.axis_names, differ, strict=True) if other]
    return "+".join(names), network


def _find_collective_host(device: Any) -> Any:
    """Returns the unit within which a device has fast links: a TPU's slice or a GPU's host."""
    if device.platform == "tpu":
        return getattr(device, "slice_index", 0)
    return device.process_index
