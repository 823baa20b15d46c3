"""The divergence kernels compiled for TPUs and an NVIDIA GPU, without such devices.

The shapes are those of Qwen3-1.7B and 8B. The compiler refuses what does not fit VMEM or shared
memory; text and sizes of the program say what it holds of tokens x vocabulary. Variables of the
environment have to be set before jax is imported, so this file runs itself as a program:
`python FILE CHIP`, with the compiler's packages installed (libtpu; jax-cuda13-plugin, -pjrt).
"""

import dataclasses
import importlib.util
import json
import math
import shutil
import sys
from typing import Any

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import without_devices
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from copsd_jax.losses import divergences, split_vocabulary, token_values
from copsd_jax.losses.pallas import block_sizes, divergence_gpu, divergence_tpu
from copsd_jax.runtime import hardware

VOCABULARY = 151936
FKL = divergences.Divergence("fkl", temperature=1.1, sampling_temperature=0.8)
JSD = divergences.Divergence("jsd", clip_mode="element", ratio_clip=2.0)
SAMPLED = divergences.Divergence("sampled")
TOPOLOGIES = {
    "v4": {"topology_name": "v4:2x2x1", "chip_config_name": "megacore"},
    "v5e": {"topology_name": "v5e:2x2"},
    "v5p": {"topology_name": "v5p:2x2x1"},
    "v6e": {"topology_name": "v6e:2x2"},
    "tpu7x": {"topology_name": "tpu7x:2x2x1"},
}
# (T of a device, D, settings, train_head, devices over which the vocabulary is split)
COMMON = [(32768, 2048, JSD, False, 1), (4096, 4096, FKL, False, 1)]
PROGRAMS = {
    "v4": [(4096, 2048, JSD, False, 1), (4096, 4096, FKL, False, 1)],
    "v5e": [*COMMON, (4096, 2048, JSD, False, 1)],
    "v5p": [*COMMON, (4096, 2048, JSD, True, 4)],
    "v6e": [*COMMON, (4096, 4096, FKL, True, 1)],
    "tpu7x": COMMON,
    "cuda": [
        *COMMON, (32768, 4096, JSD, False, 1), (4096, 4096, JSD, False, 1),
        (4096, 4096, JSD, True, 1), (4096, 2048, SAMPLED, False, 4),
    ],
}  # fmt: skip


# --- the program of its own -------------------------------------------------------------------


def compiled(devices, tokens, width, settings, train_head, ways) -> dict:
    """Bytes of temporary memory, the largest array, FLOP by XLA and in kernels, kernels called."""
    mesh = Mesh(np.array(devices[:ways]), ("tensor",), axis_types=(AxisType.Auto,))
    kind, shards = devices[0].device_kind, P("tensor")
    entries = VOCABULARY // ways
    if devices[0].platform == "tpu":
        module: Any = divergence_tpu
        sizes = block_sizes.choose_tpu(
            kind, width, entries, jnp.bfloat16, tied=True, train_head=train_head
        )  # fmt: skip
    else:
        module = divergence_gpu
        sizes = block_sizes.choose_gpu(kind, width, entries, jnp.bfloat16, train_head=train_head)

    def device(hidden_s, hidden_t, head, tokens, row):
        shard = split_vocabulary.VocabularyShard("tensor", VOCABULARY - 5)
        sweep = split_vocabulary.Sweep(settings, (head,), shard, train_head=train_head)
        inputs = token_values.TokenInputs(tokens, row, row, row)
        return module.sweep(sweep, ((hidden_s, hidden_t), inputs), sizes)

    specs = (P(), P(), shards, P(), P())
    shapes = [((tokens, width), "bfloat16")] * 2 + [((VOCABULARY, width), "bfloat16")]
    shapes += [((tokens,), "int32"), ((tokens,), "float32")]
    arrays = [
        jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    row_spec: Any = P()
    out = token_values.TokenStats(*[row_spec] * 8), row_spec, shards if train_head else None
    with jax.set_mesh(mesh):
        each = jax.shard_map(device, in_specs=specs, out_specs=out, check_vma=False)
        traced = jax.jit(each).trace(*arrays)
        program = traced.lower().compile()
    text: Any = program.as_text()
    memory: Any = program.memory_analysis()
    return {
        "temporary": memory.temp_size_in_bytes,
        "largest": max(map(math.prod, hlo.arrays(text))),
        "matmuls": hlo.matmuls(text, trips=-(-tokens // sizes.tokens)),
        "kernel_matmuls": hlo.kernel_matmuls(traced.jaxpr.jaxpr),
        "kernels": text.count('custom_call_target="tpu_custom_call"')
        + text.count('custom_call_target="__gpu$xla.gpu.triton"'),
        "sizes": dataclasses.asdict(sizes),
    }


def plain(devices) -> list[float]:
    """What `hlo.matmuls` counts of one matmul, and of three batched ones, in true numbers."""
    place = NamedSharding(Mesh(np.array(devices[:1]), ("tensor",)), P())
    counted = []
    for batch in ((), (3,)):
        a, b = (
            jax.ShapeDtypeStruct((*batch, *shape), "bfloat16", sharding=place)
            for shape in ((256, 512), (512, 384))
        )
        text: Any = jax.jit(jnp.matmul).lower(a, b).compile().as_text()
        flop = 2 * 256 * 512 * 384 * math.prod(batch)
        counted.append(hlo.matmuls(text, trips=0) / flop)
    return counted


def main(chip: str) -> None:
    if chip == "cuda":
        target = {"target_config": without_devices.H200, "topology": "1x1x4"}
        devices = topologies.get_topology_desc("x", platform="cuda", **target).devices
    else:
        devices = topologies.get_topology_desc(platform="tpu", **TOPOLOGIES[chip]).devices
        assert devices[0].device_kind in hardware.CHIPS
    programs = [compiled(devices, *program) for program in PROGRAMS[chip]]
    print(json.dumps({"programs": programs, "plain": plain(devices)}))


# --- tests ------------------------------------------------------------------------------------


def in_its_own_process(chip: str) -> list[dict]:
    """The programs' numbers, from a counter that counts plain matmuls as what they are."""
    found = without_devices.results_of_program(__file__, chip, 560)
    assert found["plain"] == [1.0, 1.0]
    return found["programs"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles_for_tpus(chip):
    """No overflow of VMEM, nothing of tokens x vocabulary, one block's words whatever T."""
    if importlib.util.find_spec("libtpu") is None:
        hlo.missing("libtpu, which compiles for TPUs")
    results = in_its_own_process(chip)
    for program, result in zip(PROGRAMS[chip], results, strict=True):
        tokens, width, settings, train_head, ways = program
        entries = VOCABULARY // ways
        assert result["kernels"] == (3 if settings == JSD else 2)
        sizes = block_sizes.fit(block_sizes.Blocks(**result["sizes"]), tokens)
        padded = -(-entries // sizes.vocab) * sizes.vocab
        whole = -(-tokens // sizes.tokens) * sizes.tokens
        # All of them in the kernels: 3.0, or 4.0 with the head's gradient, of whole blocks.
        assert result["matmuls"] == 0
        assert result["kernel_matmuls"] == (3 + train_head) * 2 * whole * width * padded
        assert whole <= 1.125 * tokens
        head = entries * width
        words = sizes.tokens * padded
        assert result["largest"] == max(head, words, tokens * width)
        most = 4 * words + train_head * 4 * head + 4 * tokens * width * 2
        assert result["temporary"] < 1.05 * most
    if chip == "v5e":
        many, _, few = (result["temporary"] for result in results)
        assert many <= 1.2 * few


@pytest.mark.timeout(600)
def test_compiles_for_h200():
    plugin = importlib.util.find_spec("jax_plugins")
    if plugin is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        hlo.missing("jax-cuda13-plugin and jax-cuda13-pjrt, which compile for NVIDIA GPUs")
    if shutil.which("ptxas") is None:
        hlo.missing("ptxas")
    results = in_its_own_process("cuda")
    for program, result in zip(PROGRAMS["cuda"], results, strict=True):
        tokens, width, settings, train_head, ways = program
        entries = VOCABULARY // ways
        assert result["kernels"] == (3 if settings == JSD else 2)
        # The last block may be filled up.
        floor = (3 + train_head) * 2 * tokens * width * entries
        assert floor <= result["matmuls"] <= 1.03 * floor
        assert result["kernel_matmuls"] == 0
        logits = 2 * min(tokens, result["sizes"]["tokens"]) * entries
        assert result["largest"] <= max(entries * width, logits, tokens * width)
        assert result["temporary"] < 5.5 * logits + train_head * 4 * entries * width
    many, few = (results[i]["temporary"] for i in (2, 3))
    assert many <= 1.2 * few


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("settings", [FKL, JSD, SAMPLED], ids=lambda s: s.divergence)
def test_lowers_without_device_or_plugin(settings, dtype, platform):
    shape = jax.ShapeDtypeStruct
    states, head = shape((300, 256), dtype), shape((1000, 256), dtype)
    row = shape((300,), "float32")
    module: Any = {"tpu": divergence_tpu, "cuda": divergence_gpu}[platform]
    call = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}[platform]
    sizes = block_sizes.Blocks(tokens=256, vocab=256, rows=128)

    def sweep(states, head_s, head_t, tokens, row):
        shard = split_vocabulary.VocabularyShard(None, None)
        constants = split_vocabulary.Sweep(settings, (head_s, head_t), shard, train_head=True)
        inputs = token_values.TokenInputs(tokens, row, row, row)
        return module.sweep(constants, ((states, states), inputs), sizes)

    with without_devices.without_device(platform):
        traced = jax.jit(sweep).trace(states, head, head, shape((300,), "int32"), row)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(f"custom_call @{call}") == (3 if settings == JSD else 2)


if __name__ == "__main__":
    main(sys.argv[1])
