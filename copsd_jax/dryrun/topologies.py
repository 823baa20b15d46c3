"""Devices of a target that nobody has to own: there is a compiler for them, and nothing more."""

import importlib.util
import shutil
import sys
from typing import Any

import jax
from jax.experimental import topologies

from copsd_jax.runtime import hardware


def make_devices(target: hardware.Target) -> list:
    """Returns the devices of a topology, which only the compiler knows.

    Raises:
      ValueError: there is no such topology, or its compiler is not installed; the message has the
        command that installs it.
    """
    if target.platform == "cuda":
        return _cards(target)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "--dry_run for TPUs needs their compiler: "
            f'{sys.executable} -m pip install "jax[tpu]=={jax.__version__}"'
        )
    settings: dict[str, Any] = {}
    if target.kind == "v4":
        settings["chip_config_name"] = "megacore"
    if target.shape == (1, 1):
        settings["chips_per_host_bounds"] = (1, 1, 1)
    if target.slices > 1:
        settings["num_slices"] = target.slices
    name = f"{target.kind}:{target.topology}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **settings)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        said = f"--dry_run is {target.name!r}: there is no such slice: {reason}"
        raise ValueError(said) from error
    return list(found.devices)


def _cards(target: hardware.Target) -> list:
    spec = importlib.util.find_spec
    if spec("jax_plugins") is None or spec("jax_plugins.xla_cuda13") is None:
        version = jax.__version__
        raise ValueError(
            "--dry_run for GPUs needs their compiler: "
            f"{sys.executable} -m pip install --no-deps jax-cuda13-plugin=={version} "
            f"jax-cuda13-pjrt=={version}"
        )
    if shutil.which("ptxas") is None:
        raise ValueError(
            "--dry_run for GPUs needs the program ptxas on PATH: "
            f"{sys.executable} -m pip install nvidia-cuda-nvcc, which brings it as "
            "nvidia/cu13/bin/ptxas"
        )
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="x", topology=f"1x{target.topology}",
        target_config=hardware.describe_gpu(target.kind),
    )  # fmt: skip
    return list(found.devices)
