"""Proposals of settings with which a run would fit into memory, based on compiled programs.

The memory of the training step is affine in the size of the micro-batch, and the memory of a
sampling phase is affine in the number of slots. If a proposal depends on the size of a phase, the
phase is compiled at two sizes. A straight line through a phase's memory at two sizes gives the
largest size that fits. For other meshes, nothing is compiled: the bytes of held arrays are computed
from shapes.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, AxisType

from copsd_jax.config import settings as config_lib
from copsd_jax.dryrun import memory, programs, targets
from copsd_jax.runtime import sharding
from copsd_jax.training import builders, run_plan

CHANGES = 3  # maximum number of proposed changes
MOST_SLOTS = 2**16  # maximum number of slots per batch shard
SLOTS = {"rollout": "rollout.slots", "author": "author.slots", "evaluation": "eval.slots"}


class Sizes(NamedTuple):
    """A phase, and the setting that determines the size of the phase.

    Attributes:
      phase: the phase, compiled with the value `now`.
      setting: name of the setting.
      now: the setting's current value, rounded up in the same way as in the run.
      choices: all useful values, in ascending order.
      second: the second value to compile with, besides `now`; 0 if no second value is needed.
    """

    phase: programs.Phase
    setting: str
    now: int
    choices: Sequence[int]
    second: int


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of settings with which the run fits, or may fit.

    Attributes:
      words: the change as command-line flags; if the devices change, their name comes first.
      held: bytes of the held arrays on each device, without temporaries; 0 if compiled programs
        show that the change fits.
      config: the changed settings.
      target: the devices.
    """

    words: str
    held: int
    config: config_lib.Config
    target: targets.Target


@dataclasses.dataclass
class Proposals:
    """The largest sizes that fit, and, if the run does not fit, changes that may make it fit.

    Attributes:
      largest: for each setting, the largest useful value that fits; 0 if no value fits.
      changes: the changes, the smallest change first; empty if the run fits.
      compilations: the number of phases that were compiled again for the proposals.
    """

    largest: dict[str, int]
    changes: list[Change]
    compilations: int


def propose(run: programs.Run) -> Proposals:
    """Returns sizes and settings that fit; compiles phases at a second size where needed."""
    proposals, fixes, fixable = Proposals({}, [], 0), {}, True
    for name, phase in run.phases.items():
        fits = phase.fits(run.usable)
        if name not in ("step", *SLOTS):
            fixable = fixable and fits
            continue
        sizes = find_size_settings(run, phase)
        value = _find_largest(run, sizes, proposals)
        proposals.largest[sizes.setting] = value
        if value and not fits:
            fixes[sizes.setting] = value
        elif not fits and name == "step" and _fits_with_remat(run, sizes, proposals):
            fixes |= {"model.remat": "layer", sizes.setting: sizes.choices[0]}
        elif not fits:
            fixable = False
    if fixes and fixable:
        config = apply_proposed_settings(run.frame.config, fixes)
        proposals.changes.append(Change(_spell_proposal(fixes), 0, config, run.target))
    if not run.fits():
        room = CHANGES - len(proposals.changes)
        proposals.changes += itertools.islice(_propose_other_meshes(run), room)
    return proposals


# --- sizes ------------------------------------------------------------------------------------


def find_size_settings(run: programs.Run, phase: programs.Phase) -> Sizes:
    """Returns the setting that determines a phase's size, and the values to choose from."""
    config, shards = run.frame.config, sharding.batch_shards(run.frame.mesh)
    completions = config_lib.completions_per_step(config)
    if phase.name == "step":
        setting, now, choices = _list_micro_batch_sizes(run, completions, shards)
        second = choices[0] if now != choices[0] else next(iter(choices[1:]), 0)
    else:
        setting = SLOTS[phase.name]
        section, _, key = setting.partition(".")
        now = _round_proposed_slots(config[section][key], shards)
        # If there were more slots than completions in a step, the extra slots would stay empty.
        evaluates = phase.name == "evaluation"
        most = MOST_SLOTS * shards if evaluates else _round_proposed_slots(completions, shards)
        choices = range(shards, most + 1, shards)
        second = _propose_other_slots(now, shards)
    # No second size is needed if the phase fits at the largest useful size, or fails at the
    # smallest size.
    at_end = now >= choices[-1] if phase.fits(run.usable) else now == choices[0]
    return Sizes(phase, setting, now, choices, 0 if at_end else second)


def _list_micro_batch_sizes(
    run: programs.Run, completions: int, shards: int
) -> tuple[str, int, Sequence[int]]:
    """Returns the setting for the micro-batch's size, the current value, and the useful values."""
    c = run.frame.config
    if not c.train.micro_tokens:
        choices = [m for m in range(shards, completions + 1, shards) if completions % m == 0]
        return "train.micro_batch", c.train.micro_batch or completions, choices
    rows = builders.pack_batch(run.frame, programs.build_dry_run_batch(c, run.lengths), caps=True)
    # Each row has one completion, so a device's micro-batch consists of whole samples.
    sample = sum(side.tokens_BL.shape[-1] for side in (rows.student, rows.teacher) if side)
    each, most = rows.student.tokens_BL.shape[1] // shards, -(-completions // shards)
    return "train.micro_tokens", each * sample, range(sample, most * sample + 1, sample)


def _round_proposed_slots(number: int, multiple: int) -> int:
    return max(1, -(-number // multiple)) * multiple


def _find_largest(run: programs.Run, sizes: Sizes, proposals: Proposals) -> int:
    """Returns the largest size at which a phase fits; 0 if the phase fits at no size."""
    phase, usable = sizes.phase, run.usable
    held = sum(phase.parts.values())
    if held > usable:
        # The phase was not compiled. Of the phase's held arrays, only the cache depends on the
        # number of slots.
        cache = phase.parts.get("cache", 0)
        room = int((usable - held + cache) * sizes.now / cache) if cache else 0
        slots = find_largest_below(sizes.choices, float, room)
        if not slots:
            return 0
        phase = _compile_again(run, phase.name, {sizes.setting: slots}, proposals)
        shards = sizes.choices[0]
        sizes = sizes._replace(now=slots, second=_propose_other_slots(slots, shards))
    if not sizes.second:
        return sizes.choices[-1] if phase.fits(usable) else 0
    other = _compile_again(run, phase.name, {sizes.setting: sizes.second}, proposals)
    if _is_unknown(other) or _is_unknown(phase):
        compiled = [(phase, sizes.now), (other, sizes.second)]
        return max((size for one, size in compiled if one.fits(usable)), default=0)
    line = fit_memory_line((phase, sizes.now), (other, sizes.second))
    return find_largest_below(sizes.choices, line, usable)


def _propose_other_slots(slots: int, shards: int) -> int:
    return _round_proposed_slots(slots // 2, shards) if slots > shards else 2 * shards


def find_largest_below(choices: Sequence[int], line: Callable[[int], float], usable: float) -> int:
    """Returns the largest of the ascending `choices` that needs at most `usable` bytes, or 0."""
    count = bisect.bisect_right(choices, usable, key=line)
    return choices[count - 1] if count else 0


def _is_unknown(phase: programs.Phase) -> bool:
    """Returns whether a phase has a failed program whose memory need is unknown."""
    return any(program.failure and not program.needed for program in phase.programs)


def fit_memory_line(
    one: tuple[programs.Phase, int], two: tuple[programs.Phase, int]
) -> Callable[[int], float]:
    """Returns a function that maps the size of a phase to the phase's bytes on each device.

    Every part and every program gets its own straight line of bytes against size, because different
    programs may need the most memory at different sizes.

    Args:
      one: a phase, and the size at which the phase was compiled.
      two: the same phase compiled at a second size, and this second size.
    """
    (phase, size), (other, other_size) = one, two

    def at(here: int, there: int, wanted: int) -> float:
        return here + (there - here) * (wanted - size) / (other_size - size)

    needs = [(p.needed, q.needed) for p, q in zip(phase.programs, other.programs, strict=False)]
    if len(phase.programs) != len(other.programs):  # a sampler that failed is listed as one program
        needs = [(phase.working, other.working)]
    parts = [(phase.parts[k], other.parts[k]) for k in phase.parts.keys() & other.parts.keys()]

    def total(wanted: int) -> float:
        held = sum(at(*part, wanted) for part in parts)
        return held + max((at(*need, wanted) for need in needs), default=0.0)

    return total


def _compile_again(
    run: programs.Run, name: str, values: dict[str, Any], proposals: Proposals
) -> programs.Phase:
    """Compiles a phase with other settings, counts the compilation, and returns the phase."""
    config = apply_proposed_settings(run.frame.config, values)
    run.say(f"for proposals, with {_spell_proposal(values)}:")
    frame = dataclasses.replace(run.frame, config=config)
    proposals.compilations += 1
    # The sampler caches compiled programs, so a program that does not depend on the number of slots
    # is compiled only once.
    return programs.compile_phase(run._replace(frame=frame), name)


def _fits_with_remat(run: programs.Run, sizes: Sizes, proposals: Proposals) -> bool:
    """Returns whether the smallest micro-batch would fit if only the layers' inputs were kept."""
    if run.frame.config.model.remat == "layer" or sum(sizes.phase.parts.values()) > run.usable:
        return False
    values = {"model.remat": "layer", sizes.setting: sizes.choices[0]}
    return _compile_again(run, "step", values, proposals).fits(run.usable)


# --- other meshes -----------------------------------------------------------------------------


def _propose_other_meshes(run: programs.Run) -> Iterator[Change]:
    """Yields meshes that fit, in this order: same devices; same devices with LoRA; more devices."""
    frame, target = run.frame, run.target
    devices, chips = frame.mesh.devices.size, int(np.prod(target.shape)) * target.slices
    yield from _rank_meshes(run, {}, devices, target)
    if frame.config.train.trainable == "full":
        yield from _rank_meshes(run, {"train.trainable": "lora"}, devices, target)
    if target.platform == "tpu":
        for count, topology in targets.list_topologies(target.kind).items():
            if count > chips:
                larger = targets.parse_target(f"{target.kind}:{topology}")
                yield from _rank_meshes(run, {}, count * devices // chips, larger)


def _rank_meshes(
    run: programs.Run, values: dict[str, Any], devices: int, target: targets.Target
) -> Iterator[Change]:
    """Yields fitting meshes of `devices` devices, in ascending order of memory use."""
    found = []
    for mesh in _list_candidate_meshes(run.frame, devices, target.slices):
        if not values and mesh == {f"mesh.{k}": n for k, n in run.frame.mesh.shape.items()}:
            continue  # this is the current mesh, which does not fit
        changes = {**values, **mesh, **_adapt_micro_batch(run.frame.config, mesh)}
        config = apply_proposed_settings(run.frame.config, changes)
        held, total = _measure(run, config, mesh)
        if total <= run.usable:
            more = "" if target is run.target else f"{target.name} with "
            change = Change(more + _spell_proposal(changes), held, config, target)
            found.append((held, mesh["mesh.tensor"], change))
    yield from [change for *_, change in sorted(found, key=lambda one: one[:2])]


def _list_candidate_meshes(
    frame: run_plan.ProgramPlan, devices: int, slices: int
) -> Iterator[dict[str, int]]:
    """Yields meshes that split the parameters over all devices of a slice."""
    completions = config_lib.completions_per_step(frame.config)
    for tensor in (1, 2, 4, 8):
        fsdp = devices // (tensor * slices)
        even = devices % (tensor * slices) == 0 and frame.model_config.n_heads % tensor == 0
        if even and completions % (fsdp * slices) == 0:
            yield {"mesh.data": slices, "mesh.fsdp": fsdp, "mesh.tensor": tensor}


def _adapt_micro_batch(config: config_lib.Config, mesh: dict[str, int]) -> dict[str, int]:
    """Returns the smallest micro-batch that a mesh can split, or {} if the current size works."""
    shards = mesh["mesh.data"] * mesh["mesh.fsdp"]
    return {"train.micro_batch": shards} if config.train.micro_batch % shards else {}


def _measure(
    run: programs.Run, config: config_lib.Config, sizes: dict[str, int]
) -> tuple[int, int]:
    """Returns the bytes that a run needs on a mesh, without and with estimated temporaries.

    The temporaries on a new mesh are estimated, because nothing is compiled for this mesh. If a
    phase fits on the current mesh, its temporaries on the new mesh are estimated to be the same. If
    a phase does not fit on the current mesh, its temporaries on the new mesh are estimated as 0.
    """
    mesh: Any = AbstractMesh(tuple(sizes.values()), sharding.AXES, (AxisType.Auto,) * 3)
    frame = dataclasses.replace(run.frame, config=config, mesh=mesh)
    arrays, held, total = memory.list_held_arrays(frame), 0, 0
    for name, phase in run.phases.items():
        parts = sum(programs.hold_phase(run._replace(frame=frame), name, arrays).values())
        held = max(held, parts)
        total = max(total, parts + (phase.working if phase.fits(run.usable) else 0))
    return held, total


# --- words ------------------------------------------------------------------------------------


def apply_proposed_settings(config: config_lib.Config, values: dict[str, Any]) -> config_lib.Config:
    """Returns a copy of the settings with some values changed."""
    changed = config.copy_and_resolve_references()
    for name, value in values.items():
        section, _, key = name.partition(".")
        changed[section][key] = value
    return changed


def _spell_proposal(values: dict[str, Any]) -> str:
    """Returns settings as command-line flags, without mesh.tensor=1, which is the default."""
    shown = {name: value for name, value in values.items() if (name, value) != ("mesh.tensor", 1)}
    return " ".join(f"--config.{name}={value}" for name, value in shown.items())
