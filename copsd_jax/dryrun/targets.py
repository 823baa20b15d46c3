"""Names of the devices that a dry run compiles for: TPU slices and groups of GPUs.

This file does not import JAX, because names are checked and the environment is set before JAX
starts.
"""

import dataclasses
import re

from copsd_jax.runtime import hardware

TPU_KINDS = {
    "v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x",
}  # fmt: skip
ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x"}
GPU_KINDS = {
    "a100": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200",
}  # fmt: skip
# For the TPU kinds in COUNTS_CORES, the number in a name counts cores, and a chip has two cores.
# For other TPU kinds, the number in a name counts chips.
COUNTS_CORES = ("v4", "v5p", "tpu7x")
TOPOLOGIES_2D = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
TOPOLOGIES_3D = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
    512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16",
}  # fmt: skip

# Without the variables in ENVIRONMENT, the TPU compiler asks a cloud server about this machine.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
}  # fmt: skip

CHOICES = (
    "v5e:4x8 (also v4, v5p, v6e, tpu7x), v5e-32, 2*v5e:16x16 for two slices, cuda:h200:1x8 for one "
    "host of eight (also h100, a100)"
)


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a dry run compiles for; the devices need not be present.

    Attributes:
      name: the text from the command line.
      platform: tpu or cuda.
      kind: v4, v5e, v5p, v6e or tpu7x on the platform tpu; a100, h100 or h200 on the platform cuda.
      shape: for tpu, the number of chips along each dimension of a slice; for cuda, the number of
        hosts and the number of cards per host.
      slices: number of slices, which are joined by a network; 1 for cuda.
    """

    name: str
    platform: str
    kind: str
    shape: tuple[int, ...]
    slices: int

    @property
    def chip(self) -> hardware.Chip:
        """Rates and memory of one device."""
        return hardware.CHIPS[(TPU_KINDS | GPU_KINDS)[self.kind]]

    @property
    def topology(self) -> str:
        """The target's shape in the compiler's notation, such as 4x8."""
        return "x".join(map(str, self.shape))


def parse_target(text: str) -> Target:
    """Parses a target's name, such as `v5e:4x8`, `v5e-32`, `2*v5p:4x4x4` or `cuda:h200:1x8`.

    For v4, v5p and tpu7x, the number after a hyphen counts cores; a chip has two cores, so v5p-128
    has 64 chips. For v5e and v6e, the number after a hyphen counts chips.

    Raises:
      ValueError: if the text does not name devices; the message lists the choices.
    """
    lower = text.strip().lower()
    if lower.startswith("cuda:"):
        return _parse_gpu_target(text, lower)
    found = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9]+?)(?::(\d+(?:x\d+){1,2})|-(\d+))", lower)
    kind = ALIASES.get(found[2], found[2]) if found else ""
    if not found or kind not in TPU_KINDS:
        raise ValueError(f"--dry_run is {text!r}: examples of valid names are {CHOICES}")
    shape = _parse_topology(text, kind, found[3], found[4])
    slices = int(found[1] or 1)
    if slices < 1 or min(shape) < 1:
        raise ValueError(f"--dry_run is {text!r}: numbers of slices and chips must be at least 1")
    return Target(text, "tpu", kind, shape, slices)


def list_topologies(kind: str) -> dict[int, str]:
    """Returns the topologies that a TPU slice can have, by number of chips."""
    return TOPOLOGIES_2D if kind in ("v5e", "v6e") else TOPOLOGIES_3D


def _parse_topology(
    text: str, kind: str, topology: str | None, number: str | None
) -> tuple[int, ...]:
    table = list_topologies(kind)
    if topology is None:
        cores = 2 if kind in COUNTS_CORES else 1
        chips, rest = divmod(int(number or 0), cores)
        if rest or chips not in table:
            names = ", ".join(f"{kind}-{cores * size}" for size in table)
            raise ValueError(f"--dry_run is {text!r}: the names for {kind} are {names}")
        topology = table[chips]
    example = next(reversed(table.values()))
    if (dimensions := example.count("x") + 1) != topology.count("x") + 1:
        raise ValueError(
            f"--dry_run is {text!r}: a topology of {kind} has {dimensions} numbers, like {example}"
        )
    return tuple(map(int, topology.split("x")))


def _parse_gpu_target(text: str, lower: str) -> Target:
    found = re.fullmatch(r"cuda:(?:([a-z0-9]+):)?(\d+)x(\d+)", lower)
    card = (found[1] or "h100") if found else ""
    if not found or card not in GPU_KINDS:
        raise ValueError(
            f"--dry_run is {text!r}: a GPU target is cuda:CARD:HOSTSxCARDS, like cuda:h200:1x8; "
            f"CARD is one of {', '.join(GPU_KINDS)}"
        )
    shape = int(found[2]), int(found[3])
    if min(shape) < 1:
        raise ValueError(f"--dry_run is {text!r}: at least one host and one card are needed")
    return Target(text, "cuda", card, shape, 1)


def describe_gpu(kind: str) -> str:
    """Returns the protobuf text that describes a card to the compiler for CUDA."""
    name, cores, shared, cache, clock, major, bandwidth, memory = {
        "a100": (GPU_KINDS["a100"], 108, 167936, 41943040, 1.41, 8, 2039, 85093515264),
        "h100": (GPU_KINDS["h100"], 132, 233472, 52428800, 1.98, 9, 3350, 85017493504),
        "h200": (GPU_KINDS["h200"], 132, 233472, 62914560, 1.98, 9, 4800, 150754820096),
    }[kind]
    optin, fpus = shared - 1024, 64 if major == 8 else 128
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores}
  fpus_per_core: {fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}000000000 l2_cache_size: {cache}
  clock_rate_ghz: {clock} device_memory_size: {memory}
  shared_memory_per_block_optin: {optin} cuda_compute_capability {{ major: {major} minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{name}"
"""
