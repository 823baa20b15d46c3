"""Oracle: the compiler at the proposed sizes, and lines by hand; CPU devices stand in."""

import dataclasses
from typing import Any

import jax
import pytest
import runs
from jax.sharding import AbstractMesh, AxisType

from copsd_jax.dryrun import memory, programs, proposals, targets
from copsd_jax.runtime import sharding
from copsd_jax.training import builders

optax_promotes = runs.optax_promotes
MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
SHORT = {"prompt__max_tokens": 120, "teacher__max_tokens": 200, "sampler__pack": 128}
V5E8 = targets.parse_target("v5e-8")


@pytest.fixture(scope="module")
def built():
    """A dry run of the tiny OPSD card on the mesh of eight CPU devices."""
    return programs.compile_run(runs.config("opsd", **MESH, **SHORT), V5E8, jax.devices(), 1e12)


def compile_with(run: programs.Run, name: str, setting: str, size: int) -> programs.Phase:
    config = proposals.apply_proposed_settings(run.frame.config, {setting: size})
    frame = dataclasses.replace(run.frame, config=config)
    return programs.compile_phase(run._replace(frame=frame), name)


@pytest.mark.slow
def test_held_arrays_need_no_devices(built):
    """An abstract mesh gives the same bytes as the devices do."""
    mesh: Any = AbstractMesh((2, 2, 2), sharding.AXES, (AxisType.Auto,) * 3)
    frame = dataclasses.replace(built.frame, mesh=mesh)
    arrays = memory.list_held_arrays(frame)
    for name, phase in built.phases.items():
        parts = programs.hold_phase(built._replace(frame=frame), name, arrays)
        assert sum(parts.values()) > 0
        assert parts == {part: phase.parts[part] for part in parts}


@pytest.mark.slow
def test_cache_is_what_the_sampler_allocates(built):
    """The cache by shapes, and the results of the program that makes it."""
    for phase in ("rollout", "evaluation"):
        empty = built.phases[phase].programs[0]
        assert empty.name == "empty cache"
        assert empty.cost is not None
        assert built.phases[phase].parts["cache"] == pytest.approx(empty.cost.outputs, rel=1e-3)


def test_cache_counts_repeated_key_heads():
    """2 key heads on a tensor axis of 4: each device has one, so that they are stored twice."""
    frame = programs.build_dry_run_frame(
        runs.config("opsd", mesh__data=2, mesh__tensor=4), jax.devices()
    )
    assert builders.build_decoder(frame).key_heads == 4
    counted = memory.count_decode_memory(frame, "rollout", 200)
    layers, slots, entries, head = 2, 32 // 2, 256, 16 * 4
    of_slot = 64 * 4 + 2 + 3 * 4 + 2 * 4 + 8 + 4 * 4  # what a slot has besides its entries
    assert counted == slots * (2 * layers * entries * head + of_slot)


def phase_of(size: int, fixed: int, *needs: int, failure: str = "") -> programs.Phase:
    """A phase with a cache of 10 bytes for each unit of its size, and programs."""
    found = [programs.Program(str(i), 0, None, need, failure) for i, need in enumerate(needs)]
    return programs.Phase("rollout", {"weights": fixed, "cache": 10 * size}, found)


def test_each_program_has_a_line():
    """A program that grows overtakes one that does not: 100 + 10 s + max(50, 20 s)."""
    small, large = phase_of(1, 100, 50, 20), phase_of(2, 100, 50, 40)
    line = proposals.fit_memory_line((small, 1), (large, 2))
    assert [line(size) for size in (1, 2, 3, 10)] == [160, 170, 190, 400]
    assert proposals.find_largest_below(range(1, 20), line, 399) == 9
    assert proposals.find_largest_below(range(1, 20), line, 400) == 10
    assert proposals.find_largest_below(range(1, 20), line, 159) == 0
    # One failed program stands for all of a sampler: the line of the largest needs.
    line = proposals.fit_memory_line((small, 1), (phase_of(2, 100, 70, failure="no room"), 2))
    assert line(3) == 100 + 30 + 90


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "setting", "sizes"),
    [("step", "train.micro_batch", (2, 8, 4)), ("rollout", "rollout.slots", (8, 16, 12))],
)
def test_memory_is_a_line_in_the_size(name, setting, sizes):
    """A third compiled size lies on the line through two, and is proposed where it alone fits."""
    settings = {
        "mesh__data": 1, "prompt__max_tokens": 128, "teacher__max_tokens": 256, "eval__path": "",
        "rollout__max_tokens": 128, "train__batch": 16, "sampler__pack": 128,
    }  # fmt: skip
    config = runs.config("opsd", **settings)
    frame = programs.build_dry_run_frame(config, jax.devices()[:1])
    lengths = programs.find_dry_run_lengths(config, frame.model_config)
    run = programs.Run(frame, lengths, V5E8, 1e12, lambda _: None, {})
    small, large, third = (compile_with(run, name, setting, size) for size in sizes)
    line = proposals.fit_memory_line((small, sizes[0]), (large, sizes[1]))
    assert line(sizes[0]) == pytest.approx(small.total)
    assert line(sizes[1]) == pytest.approx(large.total)
    assert line(sizes[2]) == pytest.approx(third.total, rel=0.05)
    usable = (third.total + large.total) / 2
    assert proposals.find_largest_below(sorted(sizes), line, usable) == sizes[2]
    assert third.fits(usable)
    assert not large.fits(usable)


@pytest.mark.slow
def test_phases_that_are_compiled_again(built, monkeypatch):
    """A phase is compiled at one more size if a proposal needs it, and not where nothing would."""
    compiled = []

    def compile_phase(run, name):
        c = run.frame.config
        compiled.append((name, c.train.micro_batch, c.eval.slots))
        return phase_of(c.eval.slots, 0, 0) if name == "evaluation" else built.phases[name]

    monkeypatch.setattr(programs, "compile_phase", compile_phase)
    proposed = proposals.propose(built._replace(usable=2**30))
    # All of a step's completions are one micro-batch already, and fill the slots of rollouts.
    assert compiled == [("evaluation", 0, 32)]
    assert proposed.compilations == 1
    assert proposed.largest["train.micro_batch"] == proposed.largest["rollout.slots"] == 8
    assert not proposed.changes
    compiled.clear()
    proposals.propose(built._replace(usable=built.phases["step"].total - 1))
    # The stand-in needs as much with 4 completions, so that fewer kept activations are tried too.
    assert compiled == [("evaluation", 0, 32), ("step", 4, 64), ("step", 4, 64)]


@pytest.mark.slow
def test_changes_for_a_step_that_does_not_fit(built):
    """The smaller micro-batch that fits is first, then other meshes by the bytes that they hold."""
    usable = built.phases["step"].total - 1
    proposed = proposals.propose(built._replace(usable=usable))
    assert proposed.largest["train.micro_batch"] == 4
    first, *meshes = proposed.changes
    assert first.words == "--config.train.micro_batch=4"
    assert first.config.train.micro_batch == 4
    assert compile_with(built, "step", "train.micro_batch", 4).fits(usable)
    assert len(meshes) == 2
    assert all("--config.mesh.fsdp=" in one.words for one in meshes)
    assert [one.held for one in meshes] == sorted(one.held for one in meshes)
    # On real devices the first of them holds what was counted on a mesh without devices.
    frame = programs.build_dry_run_frame(meshes[0].config, jax.devices())
    arrays, run = memory.list_held_arrays(frame), built._replace(frame=frame)
    held = [programs.hold_phase(run, name, arrays) for name in built.phases]
    assert meshes[0].held == max(sum(parts.values()) for parts in held)


@pytest.mark.slow
def test_slots_where_the_cache_alone_does_not_fit(built, monkeypatch):
    """Nothing was compiled: the cache by shapes says which slots are worth compiling."""
    config = proposals.apply_proposed_settings(built.frame.config, {"eval.slots": 4096})
    run = built._replace(frame=dataclasses.replace(built.frame, config=config), usable=2**24)
    phase = programs.compile_phase(run, "evaluation")
    assert "not compiled" in phase.failure
    run = run._replace(phases={"evaluation": phase})
    proposed = proposals.propose(run)
    slots = proposed.largest["eval.slots"]
    assert 0 < slots < 4096
    assert proposed.compilations == 2
    assert compile_with(run, "evaluation", "eval.slots", slots).fits(2**24)
    assert not compile_with(run, "evaluation", "eval.slots", int(slots * 1.1)).fits(2**24)
    assert proposed.changes[0].words == f"--config.eval.slots={slots}"


def test_meshes_that_are_proposed_for_slices_exist():
    """Two slices of four: what does not fit gets proposals that split nothing over the network."""
    frame = programs.build_dry_run_frame(runs.config("opsd", mesh__data=8), jax.devices())
    meshes = list(proposals._list_candidate_meshes(frame, 8, 2))
    assert [tuple(sizes.values()) for sizes in meshes] == [(2, 4, 1), (2, 2, 2), (2, 1, 4)]
    config = runs.config("opsd", train__micro_batch=4)
    assert proposals._adapt_micro_batch(config, meshes[0]) == {"train.micro_batch": 8}
    assert proposals._adapt_micro_batch(config, meshes[1]) == {}
