"""Devices of a dry run's target; only the compiler for the devices must be installed."""

import importlib.util
import shutil
import sys
from typing import Any

import jax
from jax.experimental import topologies

from copsd_jax.dryrun import targets

_PIP = f"{sys.executable} -m pip install"


def make_devices(target: targets.Target) -> list:
    """Returns the devices of a target, for which programs can be compiled but not run.

    Raises:
      ValueError: if the topology does not exist, or if the compiler for the devices is not
        installed. If the compiler is missing, the message gives the command that installs the
        compiler.
    """
    if target.platform == "cuda":
        return _make_gpu_topology(target)
    if importlib.util.find_spec("libtpu") is None:
        command = f'{_PIP} "jax[tpu]=={jax.__version__}"'
        raise ValueError(f"--dry_run for TPUs needs JAX's compiler for TPUs: {command}")
    settings: dict[str, Any] = {"chip_config_name": "megacore"} if target.kind == "v4" else {}
    if target.shape == (1, 1):
        settings["chips_per_host_bounds"] = (1, 1, 1)
    if target.slices > 1:
        settings["num_slices"] = target.slices
    name = f"{target.kind}:{target.topology}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **settings)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        said = f"--dry_run is {target.name!r}: there is no such slice: "
        raise ValueError(said + str(error).strip().splitlines()[0]) from error
    return list(found.devices)


def _make_gpu_topology(target: targets.Target) -> list:
    spec = importlib.util.find_spec
    if spec("jax_plugins") is None or spec("jax_plugins.xla_cuda13") is None:
        version = jax.__version__
        packages = f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
        command = f"{_PIP} --no-deps {packages}"
        raise ValueError(f"--dry_run for GPUs needs JAX's compiler for GPUs: {command}")
    if shutil.which("ptxas") is None:
        command = f"{_PIP} nvidia-cuda-nvcc, which contains it as nvidia/cu13/bin/ptxas"
        raise ValueError(f"--dry_run for GPUs needs the program ptxas on PATH: {command}")
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="x", topology=f"1x{target.topology}",
        target_config=targets.describe_gpu(target.kind),
    )  # fmt: skip
    return list(found.devices)
