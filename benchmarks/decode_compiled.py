"""Compiles the sampler's programs for Qwen3-1.7B on devices that are not present.

    python benchmarks/decode_compiled.py v5e:4x4
    python benchmarks/decode_compiled.py cuda

For each dtype of the cache, the script prints one JSON line with the memory of each program on a
device. The line also has the bytes that a decode step reads at a mean context, and compares them
with the least number of bytes (weights and live cache, each read once). The script needs libtpu, or
jax-cuda13-plugin and ptxas (extra `compile`).
"""

import json
import os
import sys

TARGET = sys.argv[1] if len(sys.argv) > 1 else "v5e:4x4"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from copsd_jax.attention import decode_attention_gpu, decode_attention_tpu
from copsd_jax.model import policy as policy_lib
from copsd_jax.model import transformer
from copsd_jax.runtime import sharding
from copsd_jax.sampler import engine, loop, prompt_packing, request, truncation

SLOTS, CONTEXT, LENGTH = 256, 1200, 4096
# target -> mesh, kernel, memory of a device in bytes
TARGETS = {
    "v5e:4x4": ((4, 1, 4), "pallas_tpu", 16 * 2**30),
    "cuda": ((1, 1, 1), "pallas_gpu", 141 * 10**9),
}
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""


def devices(target: str):
    """Returns the devices of a topology; they need not be present."""
    if target == "cuda":
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="x", target_config=H200, topology="1x1x1"
        )
    else:
        found = topologies.get_topology_desc(platform="tpu", topology_name=target)
    return list(found.devices)


def job(target: str, cache: str) -> request.Inputs:
    """Returns the inputs of a rollout phase, with abstract arrays."""
    sizes, kernel, _ = TARGETS[target]
    here = sharding.make_mesh(*sizes, devices=devices(target))
    config = transformer.SHAPES["qwen3_1_7b"]
    decoder = transformer.Decoder(config, jnp.bfloat16, decode=kernel)
    shapes = transformer.abstract_params(config, jnp.bfloat16)
    whole = NamedSharding(here, PartitionSpec())
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes, sharding.shardings(shapes, here, config.n_kv_heads, gathered=True),
    )  # fmt: skip
    like = lambda *shape: jax.ShapeDtypeStruct(shape, bool, sharding=whole)  # noqa: E731
    zero = np.zeros(1, np.int32)
    rows = truncation.RowSettings(*[zero.astype(np.float32)] * 4)._replace(top_k_J=zero)
    return request.Inputs(
        decoder=decoder,
        constants=engine.Constants(
            policy_lib.Policy(params), None, like(config.vocab_size), like(4, config.vocab_size)
        ),
        features=truncation.find_features([(1.0, 0, 1.0, 0.0)]),
        settings=request.SamplerSettings(SLOTS, LENGTH, 16, 1024, jnp.dtype(cache)),
        mesh=here, prompts=[(1,)], request=engine.Request(zero, np.zeros((1, 2), np.uint32), zero,
                                                         rows),
        stops=[()], vocabulary=request.Vocabulary(np.ones(config.vocab_size, bool)),
        stop_XV=np.zeros((4, config.vocab_size), bool),
        buckets=prompt_packing.list_buckets(1024, 1),
    )  # fmt: skip


def bytes_of_step(one: request.Inputs, target: str, cache: str) -> dict[str, float]:
    """Returns the GB that a device reads for one decode step of its slots at the mean context."""
    data, _, tensor = TARGETS[target][0]
    config, kernel = (
        one.decoder.config,
        decode_attention_tpu if tensor > 1 else decode_attention_gpu,
    )
    shape = (
        SLOTS // data, config.n_kv_heads // tensor, config.n_heads // config.n_kv_heads,
        config.head_dim,
    )  # fmt: skip
    weights = sharding.count_device_bytes(one.constants.policy.params)
    entry = 2 * (config.head_dim * jnp.dtype(cache).itemsize + 4 * (cache == "int8"))
    live = config.n_layers * shape[0] * shape[1] * CONTEXT * entry
    read = config.n_layers * kernel.estimate_cost(shape, cache, CONTEXT).bytes_accessed
    return {
        "weights": weights / 1e9, "live cache": live / 1e9, "attention reads": read / 1e9,
        "floor over read": (weights + live) / (weights + read),
    }  # fmt: skip


def main() -> None:
    for cache in ("bfloat16", "int8"):
        one = job(TARGET, cache)
        with jax.set_mesh(one.mesh):
            made = loop.compile_programs(one, TARGETS[TARGET][2])
        decode = made[-1]
        held = sharding.count_device_bytes(loop.abstract_state(one)) + sharding.count_device_bytes(
            one.constants
        )
        print(json.dumps({
            "target": TARGET, "cache": cache, "slots": SLOTS, "entries": LENGTH,
            "context": CONTEXT, "mesh": TARGETS[TARGET][0],
            "seconds to compile": round(sum(p.seconds for p in made), 1),
            "temporary MiB": {p.name: round(p.temporary / 2**20, 1) for p in made},
            "weights and cache GiB": round(held / 2**30, 2),
            "decode holds GiB": round(decode.held / 2**30, 2),
            "bytes of a step, GB": bytes_of_step(one, TARGET, cache),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
