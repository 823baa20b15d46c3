"""Compiles for devices that this machine lacks: the environment, a chip, a process of its own."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
from jax.sharding import AxisType

TPU = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""


def results_of_program(file: str, argument: str, timeout: float) -> Any:
    """Runs a test file as a program for TPUs, and returns the JSON of its last line.

    The variables in TPU have to be set before jax is imported, hence a process of its own.
    """
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | TPU
    # The child lacks what pytest's setting `pythonpath` adds.
    environment["PYTHONPATH"] = str(pathlib.Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, file, argument],
        env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


DEVICES = {"tpu": ("TPU v6 lite", 1, "tpu"), "cuda": ("NVIDIA H200", 132, "gpu")}


def without_device(platform: str):
    """From jax 0.11 on kernels are lowered for a device; an abstract one will do."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    sharding: Any = jax.sharding
    kind, cores, name = DEVICES[platform]
    device = sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform=name)
    mesh = sharding.AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device
    )  # fmt: skip
    return sharding.use_abstract_mesh(mesh)
