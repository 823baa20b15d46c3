"""Decode attention kernels compiled for TPU pods and NVIDIA GPUs, without such devices.

What compiles is the loop of a decoder at the shape of Qwen3-1.7B: tokens, and in each 28 layers
that write an entry per slot and attend. The compiler refuses what does not fit VMEM or shared
memory; its text and sizes say whether a cache is copied. Variables of the environment have to be
set before jax is imported, so this file runs itself as a program: `python FILE tpu|cuda`.
"""

import functools
import importlib.util
import json
import re
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import without_devices
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from copsd_jax.attention import decode_attention_gpu, decode_attention_tpu, decode_cache

LAYERS, SLOTS, QUERIES, LENGTH, TOKENS = 28, 256, 2, 4096, 8
# dtype, K, H, ways over key heads: Qwen3-1.7B in three forms, then SmolLM2's heads.
SHAPES = [
    ("bfloat16", 8, 128, 1), ("int8", 8, 128, 1), ("bfloat16", 8, 128, 4), ("bfloat16", 3, 64, 1),
]  # fmt: skip


# --- the program of its own -------------------------------------------------------------------


def write(platform, caches, entry_JKH, layer, index_J):
    """One entry per slot, its scale its first number."""
    new = tuple(x.astype(c.dtype) for x, c in zip([entry_JKH] * 2, caches, strict=False))
    new += tuple(entry_JKH[..., 0].astype(jnp.float32) for _ in caches[2:])
    if platform == "tpu":
        return tuple(decode_attention_tpu.write_cache_entries(caches, new, layer, index_J))
    rows_J = jnp.arange(index_J.shape[0], dtype=jnp.int32)
    at_J = jnp.where(index_J < 0, caches[0].shape[3], index_J)
    return tuple(
        c.at[layer, rows_J, :, at_J].set(x, mode="drop") for c, x in zip(caches, new, strict=True)
    )


def decoder(platform, spec, q_JKMH, caches, length_J):
    """A few tokens through all layers; what attention gives is the next query."""
    slot, inside = PartitionSpec("data", spec), PartitionSpec(None, "data", spec)
    kernel = decode_attention_tpu if platform == "tpu" else decode_attention_gpu

    def local(q_JKMH, caches, layer, length_J):
        caches = write(platform, caches, q_JKMH[:, :, 0], layer, length_J - 1)
        out, _, total = kernel.attend(q_JKMH, decode_cache.Cache(*caches), layer, length_J)
        return (out / total[..., None]).astype(q_JKMH.dtype), caches

    each = jax.shard_map(
        local, in_specs=(slot, inside, PartitionSpec(), PartitionSpec("data")),
        out_specs=(slot, inside), check_vma=False,
    )  # fmt: skip

    def token(carry):
        step, q, caches, length_J = carry
        layers = jnp.arange(LAYERS, dtype=jnp.int32)
        (q, caches), _ = jax.lax.scan(
            lambda c, i: (each(*c, i, length_J), None), (q, caches), layers
        )
        return step + 1, q, caches, length_J + (length_J > 0)

    carry = jnp.int32(0), q_JKMH, caches, length_J
    return jax.lax.while_loop(lambda c: c[0] < TOKENS, token, carry)[1:3]


def compiled(platform, devices, dtype, heads, size, ways) -> dict:
    """Sizes in bytes on one device, copies of a cache, and the kernels called."""
    shape = np.array(devices).reshape(-1, ways)
    mesh = Mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = "tensor" if ways > 1 else None
    slot = NamedSharding(mesh, PartitionSpec("data", spec))
    inside = NamedSharding(mesh, PartitionSpec(None, "data", spec))
    cache = jax.ShapeDtypeStruct((LAYERS, SLOTS, heads, LENGTH, size), dtype, sharding=inside)
    scale = jax.ShapeDtypeStruct(cache.shape[:4], "float32", sharding=inside)
    caches = (cache, cache) + (scale, scale) * (dtype == "int8")
    q = jax.ShapeDtypeStruct((SLOTS, heads, QUERIES, size), "bfloat16", sharding=slot)
    at = NamedSharding(mesh, PartitionSpec("data"))
    length = jax.ShapeDtypeStruct((SLOTS,), "int32", sharding=at)
    with jax.set_mesh(mesh):
        program = jax.jit(
            functools.partial(decoder, platform, spec), donate_argnums=1,
            out_shardings=(slot, (inside,) * len(caches)),
        )  # fmt: skip
        program = program.lower(q, caches, length).compile()
    text: Any = program.as_text()
    memory: Any = program.memory_analysis()
    costs: Any = program.cost_analysis() or {}  # none for CUDA
    local = inside.shard_shape(cache.shape)
    copy = rf"= \(?\w+\[{','.join(map(str, local))}\]\S* (?:copy|copy-start|transpose)\("
    return {
        "cache": sum(np.prod(inside.shard_shape(x.shape)) * x.dtype.itemsize for x in caches),
        "alias": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "copies": re.findall(copy, text),
        "calls": sorted(set(re.findall(r'custom_call_target="([^"]+)"', text))),
        "read": costs.get("bytes accessed"),
    }


def main(platform: str) -> None:
    if platform == "tpu":
        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    else:
        target = {"target_config": without_devices.H200, "topology": "1x1x4"}
        devices = topologies.get_topology_desc("x", platform="cuda", **target).devices
    results = [compiled(platform, devices, *shape) for shape in SHAPES]
    print(json.dumps(results, default=int))


# --- tests ------------------------------------------------------------------------------------


def check(result: dict, kernel: str) -> None:
    assert kernel in result["calls"]
    assert result["copies"] == []
    assert result["alias"] >= result["cache"]
    assert result["temporary"] < 0.01 * result["cache"]


def test_compiles_for_v5e_without_copies_of_the_cache():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, which compiles for TPUs")
    results = without_devices.results_of_program(__file__, "tpu", 280)
    for result in results:
        check(result, "tpu_custom_call")
    # XLA counts a loop's body once: one layer of one token, where slots are half full.
    live = SLOTS / 16 * 8 * LENGTH / 2 * 2 * 128 * 2
    assert live < results[0]["read"] < 1.15 * live
    assert 0.5 * live < results[1]["read"] < 0.65 * live


def test_compiles_for_h200_without_copies_of_the_cache():
    plugin = importlib.util.find_spec("jax_plugins")
    if plugin is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        pytest.skip("needs jax-cuda13-plugin and jax-cuda13-pjrt, which compile for NVIDIA GPUs")
    if shutil.which("ptxas") is None:
        pytest.skip("needs ptxas")
    for result in without_devices.results_of_program(__file__, "cuda", 280):
        check(result, "__gpu$xla.gpu.triton")


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("dtype,size", [("bfloat16", 128), ("int8", 64)])
def test_lowers_without_device_or_plugin(platform, dtype, size):
    shape = jax.ShapeDtypeStruct
    q, index = shape((16, 3, 3, size), "bfloat16"), shape((16,), "int32")
    cache: Any = shape((4, 16, 3, 512, size), dtype)
    scale: Any = shape(cache.shape[:4], "float32") if dtype == "int8" else None
    kernel, call = {
        "tpu": (decode_attention_tpu, "tpu_custom_call"),
        "cuda": (decode_attention_gpu, "__gpu$xla.gpu.triton"),
    }[platform]
    with without_devices.without_device(platform):
        caches = decode_cache.Cache(cache, cache, scale, scale)
        traced = jax.jit(kernel.attend).trace(q, caches, shape((), "int32"), index)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(f"custom_call @{call}") == 1
    # The kernel gets both caches whole: nothing else computes with them.
    whole = "x".join(map(str, cache.shape))
    assert not re.findall(
        rf"stablehlo\.(?:dynamic_slice|slice|gather|convert|pad)\b.*{whole}", text
    )


if __name__ == "__main__":
    main(sys.argv[1])
