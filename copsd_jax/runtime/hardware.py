"""Accelerators that a run can target: the rates and the memory of each device.

A device is an entry of `jax.devices()`. On tpu7x, a device is one of the two cores of a chip. On
all other accelerators, a device is a whole chip.

For TPUs, the rates of compute, memory, links and network are from the Cloud TPU documentation
(pages v4, v5e, v5p, v6e and tpu7x). The network rate of a TPU is the rate of a pod divided by the
number of chips in the pod. The sizes of VMEM are from jax.experimental.pallas.tpu. `usable` is the
memory that the compiler of libtpu 0.0.42 lets a program use.

For GPUs, the rates and memory sizes are from NVIDIA's data sheets for A100 SXM 80 GB, H100 SXM and
H200 SXM. The network rate of a GPU assumes one network adapter per GPU, with 400 Gb/s (200 Gb/s for
the A100).

This file does not import JAX, because `dryrun/targets.py` reads it before JAX starts.
"""

import dataclasses
import os

GIB = 2**30
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates and memory of one device.

    Attributes:
      flops: bfloat16 FLOP/s of the device's matrix units.
      bandwidth: bytes/s of the device's memory.
      memory: bytes of the device's memory, as stated by the manufacturer.
      vmem: bytes of VMEM; 0 for a GPU.
      usable: bytes that programs and their arrays may use.
      link: bytes/s that the device sends to other devices of its slice. For a GPU, this is the rate
        of NVLink. For a TPU, this is the rate along one dimension of the torus, as the sum of both
        directions.
      network: bytes/s that the device sends to other slices or hosts.
    """

    flops: float
    bandwidth: float
    memory: float
    vmem: int
    usable: float = 0.0
    link: float = 0.0
    network: float = 0.0


# Maps JAX's `device_kind` to the chip.
CHIPS = {
    "TPU v4": Chip(275e12, 1228e9, 34.4e9, 16 * MIB, 30.75 * GIB, 100e9, 6.25e9),
    "TPU v5 lite": Chip(197e12, 819e9, 16e9, 128 * MIB, 15.75 * GIB, 100e9, 3.125e9),
    "TPU v5": Chip(459e12, 2765e9, 95e9, 64 * MIB, 95.74 * GIB, 200e9, 6.25e9),
    "TPU v6 lite": Chip(918e12, 1640e9, 32e9, 128 * MIB, 31.25 * GIB, 200e9, 12.5e9),
    "TPU7x": Chip(1155e12, 3700e9, 96e9, 64 * MIB, 94.75 * GIB, 100e9, 12.5e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2039e9, 80e9, 0, 79.25 * GIB, 300e9, 25e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 3350e9, 80e9, 0, 79.18 * GIB, 450e9, 50e9),
    "NVIDIA H200": Chip(989e12, 4800e9, 141e9, 0, 140.4 * GIB, 450e9, 50e9),
}
CPU = Chip(1e11, 2e10, 8e9, 0, 8 * GIB, 1e10, 1e9)  # for programs compiled for this machine

GPU_FRACTION = 0.75  # fraction of a GPU's memory that JAX allocates by default


def compute_usable_memory(chip: Chip) -> float:
    """Returns the bytes of a device's memory that a run may use.

    On a GPU, a run may use the fraction of memory that JAX allocates: the environment variable
    XLA_PYTHON_CLIENT_MEM_FRACTION, or `GPU_FRACTION` if the variable is not set.
    """
    if chip.vmem:
        return chip.usable
    return chip.usable * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or GPU_FRACTION)
