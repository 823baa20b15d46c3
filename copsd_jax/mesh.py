"""The device mesh, and one table from a parameter's name to its place on it.

Axes: `data` and `fsdp` split the completions of a batch; `fsdp` also splits parameters, `tensor`
splits their other dimension. Slices of TPUs, which a network joins, are the outermost part of
`data`. Shardings are Auto axes with pinned outputs, so any function that compiles on one device
compiles on the mesh.
"""

import collections
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes over which completions are split

# Partition of each parameter by its name. `layers/...` leaves carry a leading axis of layers.
_COLUMN = (None, "fsdp", "tensor")  # [layers, in, out] of a projection into heads or the MLP
_ROW = (None, "tensor", "fsdp")  # [layers, in, out] of a projection back to the width
PARTITIONS: dict[str, tuple[str | None, ...]] = {
    "embed/embedding": ("tensor", "fsdp"),
    "head/kernel": ("tensor", "fsdp"),
    "final_norm/scale": (None,),
    "layers/attn_norm/scale": (None, None),
    "layers/mlp_norm/scale": (None, None),
    "layers/q_norm/scale": (None, None),
    "layers/k_norm/scale": (None, None),
    **{f"layers/{name}/kernel": _COLUMN for name in ("q", "k", "v", "gate", "up")},
    **{f"layers/{name}/kernel": _ROW for name in ("o", "down")},
    **{f"layers/{name}/bias": (None, "tensor") for name in ("q", "k", "v")},
    # Of int8 kernels: one number per output.
    **{f"layers/{name}/scale": (None, "tensor") for name in ("q", "k", "v", "gate", "up")},
    **{f"layers/{name}/scale": (None, "fsdp") for name in ("o", "down")},
    # Adapters: a is [layers, in, rank], b is [layers, rank, out].
    **{f"{name}/a": (None, "fsdp", None) for name in ("q", "k", "v", "gate", "up")},
    **{f"{name}/b": (None, None, "tensor") for name in ("q", "k", "v", "gate", "up")},
    **{f"{name}/a": (None, "tensor", None) for name in ("o", "down")},
    **{f"{name}/b": (None, None, "fsdp") for name in ("o", "down")},
}


def make(data: int, fsdp: int, tensor: int, devices: list | None = None) -> Mesh:
    """A mesh of all devices; one size may be -1 for the rest.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices, or data is no multiple of
        the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"{sizes}: sizes are at least 1, and one of them may be -1 for the rest")
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes.values())
    if int(np.prod(shape)) != len(devices):
        raise ValueError(f"{sizes}: their product must be the number of devices, {len(devices)}")
    slices = collections.defaultdict(list)
    for device in devices:
        slices[getattr(device, "slice_index", 0)].append(device)
    data, *inner = shape
    if data % len(slices):
        raise ValueError(
            f"mesh.data is {data}: it must be a multiple of the number of slices, {len(slices)}, "
            "since only data goes over the network between them"
        )
    # Slices outermost: what crosses the network is one reduction of the gradients a step. An axis
    # of a torus may be split, as 4 x 4 x 4 into 32 x 2.
    parts = [
        mesh_utils.create_device_mesh(
            (data // len(slices), *inner), slices[index], allow_split_physical_axes=True
        )
        for index in sorted(slices, key=lambda index: index or 0)
    ]
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * 3)


def platform(mesh: Mesh) -> str:
    """cpu, gpu or tpu: of the mesh's devices, whatever the host's default backend is."""
    return mesh.devices.flat[0].platform


def batch_shards(mesh: Mesh) -> int:
    """Number of parts into which the completions of a micro-batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _name(path: tuple) -> str:
    """`layers/q/kernel` of a tree path; fields of optimizer states are not part of a name."""
    return "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where a parameter lies.

    Raises:
      ValueError: for a name that the table lacks, or a dimension that its axis does not divide.
    """
    if name not in PARTITIONS:
        raise ValueError(f"no partition for parameter {name!r}: add it to mesh.PARTITIONS")
    axes = PARTITIONS[name]
    if len(axes) != len(shape):
        raise ValueError(f"{name} has shape {shape}, but its partition {axes}")
    for size, axis in zip(shape, axes, strict=True):
        if axis and size % mesh.shape[axis]:
            raise ValueError(
                f"mesh.{axis} is {mesh.shape[axis]}: it does not divide {size} of {name} {shape}"
            )
    return PartitionSpec(*axes)


def shardings(tree: Any, mesh: Mesh, *, gathered: bool = False) -> Any:
    """NamedShardings of a tree of parameters, adapters or optimizer state; scalars replicated.

    `gathered` are those for decoding: whole along `fsdp`, where training splits them.
    """

    def one(path: tuple, leaf: jax.Array) -> NamedSharding:
        spec = partition(_name(path), leaf.shape, mesh) if leaf.ndim else PartitionSpec()
        if gathered:
            spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def place(tree: Any, mesh: Mesh) -> Any:
    """Puts parameters, adapters or optimizer state where the table says."""
    return jax.tree.map(put, tree, shardings(tree, mesh))


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process has whole, each device's part on it; nothing travels."""
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])


def place_batch(tree: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Splits arrays along `axis` over the batch axes of the mesh."""
    return from_host(tree, mesh, PartitionSpec(*([None] * axis), BATCH))


def current() -> Mesh:
    """The mesh of the surrounding `jax.set_mesh`; outside of one, the default device alone."""
    context = jax.sharding.get_mesh()
    return make(1, 1, 1, jax.devices()[:1]) if context.empty else context


def rowwise(x: jax.Array) -> jax.Array:
    """Keeps an array's rows where the batch's are, its other dimensions whole.

    Left alone the compiler cuts hidden states along the width where `fsdp` cuts the weights, and
    then sums them over the devices in every layer: far more than the weights that it saves.
    """
    sizes = jax.sharding.get_abstract_mesh()
    if sizes.empty or x.shape[0] % (sizes.shape["data"] * sizes.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH, *(None,) * (x.ndim - 1)))


def from_host(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """`put` of all arrays of a tree, with one partition."""
    return jax.tree.map(lambda x: put(x, NamedSharding(mesh, spec)), tree)


def abstract(tree: Any, mesh: Mesh, places: Any) -> Any:
    """A tree of arrays or shapes as jax.ShapeDtypeStructs on the mesh; nothing is moved.

    Args:
      places: a tree of shardings, or one PartitionSpec for all arrays.
    """
    if isinstance(places, PartitionSpec):
        one = NamedSharding(mesh, places)
        places = jax.tree.map(lambda _: one, tree)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
    )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a whole copy of each array on every device."""
    return from_host(tree, mesh, PartitionSpec())
