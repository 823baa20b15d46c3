"""The device mesh, and a table that maps the name of each array to its sharding on the mesh.

The axes `data` and `fsdp` split the completions of a batch. `fsdp` also splits one dimension of the
parameters, and `tensor` splits the other dimension. TPU slices that are joined by a network form
the outermost part of the axis `data`. All axes are Auto axes, and outputs have fixed shardings, so
any function that compiles on one device also compiles on the mesh.

If a mesh axis does not divide a dimension, the dimension is not split along this axis.
`find_undivided` returns the parameters that remain unsplit, and the extra memory that they take.
Two more rules apply to the mesh axis `tensor`:

- Keys and values are split only between heads. The model repeats its K key heads until `tensor`
  divides the number of key heads (`count_sharded_key_repeats`).
- If `tensor` does not divide the vocabulary, the [V, D] matrices are split along the width. A
  program that splits the vocabulary pads it first.
"""

import collections
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from copsd_jax.runtime import processes

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the axes over which completions are split

# Maps the name of each array to its partition. Leaves named `layers/...` have a leading axis for
# the layers.
_PROJECTIONS = {  # mesh axes of (input, output); fsdp splits the model's width
    **dict.fromkeys(("q", "k", "v", "gate", "up"), ("fsdp", "tensor")),
    **dict.fromkeys(("o", "down"), ("tensor", "fsdp")),
}
_SLOTS = (None, BATCH_AXES, "tensor", None)  # [layers, J slots, K key heads, A entries]
Axis = str | tuple[str, ...] | None
PARTITIONS: dict[str, tuple[Axis, ...]] = {
    "embed/embedding": ("tensor", "fsdp"),
    "head/kernel": ("tensor", "fsdp"),
    "final_norm/scale": (None,),
    **{f"layers/{name}_norm/scale": (None, None) for name in ("attn", "mlp", "q", "k")},
    **{f"layers/{name}/kernel": (None, *axes) for name, axes in _PROJECTIONS.items()},
    **{f"layers/{name}/bias": (None, "tensor") for name in ("q", "k", "v")},
    # Scales of int8 kernels: one number per output.
    **{f"layers/{name}/scale": (None, axes[1]) for name, axes in _PROJECTIONS.items()},
    # Adapters: `a` is [layers, in, rank], and `b` is [layers, rank, out].
    **{f"{name}/a": (None, axes[0], None) for name, axes in _PROJECTIONS.items()},
    **{f"{name}/b": (None, None, axes[1]) for name, axes in _PROJECTIONS.items()},
    # Keys and values of decode caches, and of prompts that will be written into a cache. Keys and
    # values have one more axis, H, than the scales of int8 caches.
    **{f"cache/{name}": (*_SLOTS, None) for name in ("k", "v")},
    **{f"cache/{name}_scale": _SLOTS for name in ("k", "v")},
}
VOCABULARIES = ("embed/embedding", "head/kernel")  # [V, D]


def make_mesh(data: int, fsdp: int, tensor: int, devices: list | None = None) -> Mesh:
    """Builds the mesh of all devices; a size of -1 stands for all remaining devices.

    Args:
      data: size of the axis that splits only completions.
      fsdp: size of the axis that splits completions and parameters.
      tensor: size of the axis that splits the other dimension of the parameters.
      devices: the devices of the mesh; None means all devices of JAX.

    Raises:
      ValueError: the product of the sizes is not the number of devices, data is not a multiple of
        the number of slices, JAX uses 64 bits by default, or JAX cannot start a platform.
    """
    if jax.config.values["jax_enable_x64"]:
        raise ValueError(
            "JAX_ENABLE_X64 is set, but the programs of a run need 32-bit indices: unset it"
        )
    devices = processes.list_devices() if devices is None else devices
    sizes = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"{sizes}: sizes must be at least 1; one size may be -1 (the rest)")
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes.values())
    if math.prod(shape) != len(devices):
        raise ValueError(f"{sizes}: the product must equal the number of devices, {len(devices)}")
    slices = collections.defaultdict(list)
    for device in devices:
        # On GPUs, slice_index is the index of the host and is ignored: any axis may use the network
        # between hosts.
        own = 0 if device.platform == "gpu" else getattr(device, "slice_index", 0)
        slices[own].append(device)
    data, *inner = shape
    if data % len(slices):
        raise ValueError(
            f"mesh.data is {data}: it must be a multiple of the number of slices, {len(slices)}, "
            "since only the axis `data` may use the network between slices"
        )
    # TPU slices form the outermost part of the axis `data`, so that the network between slices
    # carries only one gradient reduction per step. One axis of a torus may be divided between two
    # mesh axes; for example, a torus of 4 x 4 x 4 can become a mesh of 32 x 2.
    own_shape = (data // len(slices), *inner)
    parts = [
        mesh_utils.create_device_mesh(own_shape, devices, allow_split_physical_axes=True)
        for _, devices in sorted(slices.items(), key=lambda item: item[0] or 0)
    ]
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * 3)


def platform(mesh: Mesh) -> str:
    """Returns the platform of the mesh's devices, not of the host: cpu, gpu or tpu."""
    return mesh.devices.flat[0].platform


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts into which the completions of a micro-batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _name(path: tuple) -> str:
    """Returns a tree path's name, such as `layers/q/kernel`, without the optimizer's fields."""
    return "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def _names(axis: Axis) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis or ()


def _size(mesh: Any, axis: Axis) -> int:
    return math.prod(mesh.shape[name] for name in _names(axis))


def count_sharded_key_repeats(heads: int, key_heads: int, tensor: int) -> int:
    """Returns how often to repeat each key head, so that `tensor` divides the number of key heads.

    M is the number of query heads per key head. The result r is the smallest divisor of M for which
    `tensor` divides K * r. With this r, every device has whole key heads, each with M / r query
    heads. For example, N = 8, K = 2 and tensor = 4 give r = 2.

    Args:
      heads: number of query heads, N.
      key_heads: number of key heads, K.
      tensor: size of the axis `tensor`.

    Raises:
      ValueError: `tensor` does not divide the number of query heads.
    """
    if heads % tensor:
        choices = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"mesh.tensor is {tensor}: it does not divide the model's {heads} query heads; the "
            f"choices are {choices}"
        )
    queries = heads // key_heads
    return next(r for r in range(1, queries + 1) if not queries % r and not key_heads * r % tensor)


def partition_spec(
    name: str, shape: tuple[int, ...], mesh: Mesh, key_heads: int | None = None
) -> PartitionSpec:
    """Returns the PartitionSpec of the array that has the given name in `PARTITIONS`.

    Args:
      name: name of the array, such as `layers/q/kernel`.
      shape: shape of the array.
      mesh: the mesh; if a mesh axis does not divide the dimension that the axis should split, the
        axis is left out of the result.
      key_heads: number of key heads, K; needed for keys and values if the size of the mesh axis
        `tensor` is larger than 1.

    Raises:
      ValueError: the name is not in `PARTITIONS`, its entry has a different rank than `shape`, or
        key_heads is needed but None.
    """
    axes = _find_dividing_mesh_axes(name, shape, mesh)
    if "tensor" in axes and name.split("/")[-2] in ("k", "v") and mesh.shape["tensor"] > 1:
        if key_heads is None:
            raise ValueError(f"key_heads is None: the partition of {name} depends on key_heads")
        if key_heads % mesh.shape["tensor"]:
            axes[axes.index("tensor")] = None
    return PartitionSpec(*axes)


def _find_dividing_mesh_axes(name: str, shape: tuple[int, ...], mesh: Any) -> list[Axis]:
    """Returns the mesh axes per dimension; None replaces axes that do not divide the dimension."""
    axes = _look_up_partition(name, shape)
    if name in VOCABULARIES and shape[0] % mesh.shape["tensor"]:
        choices: tuple[Axis, ...] = (("fsdp", "tensor"), "fsdp", "tensor")
        axes = None, next((axis for axis in choices if not shape[1] % _size(mesh, axis)), None)
    return [
        None if size % _size(mesh, axis) else axis for size, axis in zip(shape, axes, strict=True)
    ]


def _look_up_partition(name: str, shape: tuple[int, ...]) -> tuple[Axis, ...]:
    """Returns the entry that `PARTITIONS` has for a name."""
    if name not in PARTITIONS:
        raise ValueError(f"no partition for parameter {name!r}: add it to sharding.PARTITIONS")
    axes = PARTITIONS[name]
    if len(axes) != len(shape):
        raise ValueError(f"{name} has shape {shape}, but its partition is {axes}")
    return axes


def _without(axis: Axis, name: str) -> Axis:
    """Removes mesh axis `name` from a partition's entry; returns None if no mesh axis is left."""
    left = tuple(one for one in _names(axis) if one != name)
    return left if len(left) > 1 else left[0] if left else None


def shardings(
    tree: Any, mesh: Mesh, key_heads: int | None = None, *, gathered: bool = False
) -> Any:
    """Returns the NamedShardings of a tree of parameters, adapters or optimizer state.

    Args:
      tree: a tree of arrays or shapes; every device has a copy of each scalar.
      mesh: the mesh of the shardings.
      key_heads: number of key heads, as for `partition_spec`.
      gathered: whether to leave parameters unsplit along `fsdp`; decoding needs such parameters.
    """

    def one(path: tuple, leaf: jax.Array) -> NamedSharding:
        spec = PartitionSpec()
        if leaf.ndim:
            spec = partition_spec(_name(path), leaf.shape, mesh, key_heads)
        if gathered:
            spec = PartitionSpec(*(_without(axis, "fsdp") for axis in spec))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def find_undivided(
    tree: Any, mesh: Mesh, key_heads: int | None
) -> tuple[dict[str, list[str]], int]:
    """Returns the parameters that an axis should split but cannot, and the extra memory they take.

    Returns:
      First, a dict that maps a mesh axis to the names of the parameters that the axis cannot split.
      Second, the number of bytes that each device would save if the axes could split these
      parameters.
    """
    names: dict[str, list[str]] = collections.defaultdict(list)
    more = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not leaf.ndim:
            continue
        name = _name(path)
        spec = partition_spec(name, leaf.shape, mesh, key_heads)
        found = {one for axis in spec for one in _names(axis)}
        wanted = {one for axis in _look_up_partition(name, leaf.shape) for one in _names(axis)}
        missing = sorted(one for one in wanted - found if mesh.shape[one] > 1)
        for axis in missing:
            names[axis] += [] if name in names[axis] else [name]
        parts = math.prod(mesh.shape[axis] for axis in found)
        size = leaf.size * leaf.dtype.itemsize // parts
        more += size - size // math.prod(mesh.shape[axis] for axis in missing)
    return dict(names), more


def shard_by_name(tree: Any, mesh: Mesh, key_heads: int | None = None) -> Any:
    """Puts parameters, adapters or optimizer state on the mesh, split as `PARTITIONS` defines."""
    return jax.tree.map(shard_array, tree, shardings(tree, mesh, key_heads))


def shard_array(x: Any, sharding: NamedSharding) -> jax.Array:
    """Puts each device's part of `x` on that device; returns an array with the shape of `x`.

    Every process must have all of `x`, because processes exchange no data.
    """
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])


def load_shards(
    shape: tuple[int, ...], sharding: NamedSharding, part: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """Loads an array of the given shape; each process reads only the parts for its own devices.

    Args:
      shape: shape of the whole array.
      sharding: sharding of the result.
      part: function that takes a tuple of slices, one per axis, and returns the values in these
        slices; each slice has a start and a stop. `part` is called once for each distinct part,
        even if several devices need the part. Only one part is in memory at a time.
    """
    devices: dict[tuple, list] = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = (cut.indices(size)[:2] for cut, size in zip(index or (), shape, strict=True))
        devices[tuple(bounds)].append(device)
    pieces = []
    for bounds, those in devices.items():
        values = part(tuple(slice(*pair) for pair in bounds))
        pieces += jax.block_until_ready([jax.device_put(values, device) for device in those])
        del values  # frees the memory before the next part is read
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def current_mesh() -> Mesh:
    """Returns the mesh set by `jax.set_mesh`, or a mesh of the first device if no mesh is set."""
    context = jax.sharding.get_mesh()
    return make_mesh(1, 1, 1, jax.devices()[:1]) if context.empty else context


def constrain_rows(x: jax.Array) -> jax.Array:
    """Splits the rows of `x` [rows, ...] over the batch axes; the other dimensions stay whole.

    Without this constraint, the compiler splits hidden states along the width, because `fsdp`
    splits the weights. With such a split, hidden states have to be summed over the devices in every
    layer. These sums cost far more than gathering the weights.
    """
    sizes = jax.sharding.get_abstract_mesh()
    if sizes.empty or x.shape[0] % (sizes.shape["data"] * sizes.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *(None,) * (x.ndim - 1)))


def look_up(table_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """Returns table_VD[tokens_BL] as [B, L, D], with the rows split over the batch axes.

    Each device looks up its part of the embedding width for all rows of its `fsdp` group. The
    devices of a group then exchange their parts, so that each device gets whole rows. In this
    exchange, each device receives only the states of its own rows. Without this function, the
    compiler would send the states of the whole batch to every device.
    """
    sizes = jax.sharding.get_abstract_mesh()
    groups = 1 if sizes.empty else sizes.shape["fsdp"]
    if groups == 1 or tokens_BL.shape[0] % (sizes.shape["data"] * groups):
        return table_VD[tokens_BL]
    spec = _find_dividing_mesh_axes("embed/embedding", table_VD.shape, sizes)
    if "fsdp" not in _names(spec[1]):
        return table_VD[tokens_BL]

    def device(table_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
        all_BL = jax.lax.all_gather(tokens_BL, "fsdp", tiled=True)
        if spec[0] is None:
            x_BLD = table_VD[all_BL]
        else:
            own_BL = all_BL - jax.lax.axis_index("tensor") * jnp.int32(len(table_VD))
            here_BL = (own_BL >= 0) & (own_BL < len(table_VD))
            x_BLD = table_VD[jnp.where(here_BL, own_BL, 0)]
            x_BLD = jnp.where(here_BL[:, :, None], x_BLD, jnp.zeros((), x_BLD.dtype))
            x_BLD = jax.lax.psum(x_BLD, "tensor")
        if "tensor" in _names(spec[1]):
            x_BLD = jax.lax.all_gather(x_BLD, "tensor", axis=2, tiled=True)
        return jax.lax.all_to_all(x_BLD, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    rows = PartitionSpec(BATCH_AXES, None)
    run = jax.shard_map(
        device, in_specs=(PartitionSpec(*spec), rows),
        out_specs=PartitionSpec(BATCH_AXES, None, None), check_vma=False,
    )  # fmt: skip
    return run(table_VD, tokens_BL)


def constrain_heads(x_BLKH: jax.Array) -> jax.Array:
    """Splits the K heads of an array [B, L, K, H] over the axis `tensor` if `tensor` divides K."""
    sizes = jax.sharding.get_abstract_mesh()
    if sizes.empty or x_BLKH.shape[2] % sizes.shape["tensor"]:
        return x_BLKH
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x_BLKH, PartitionSpec(free, free, "tensor", free))


def shard_tree(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Puts all arrays of a tree on the mesh with the same PartitionSpec, using `shard_array`."""
    return jax.tree.map(lambda x: shard_array(x, NamedSharding(mesh, spec)), tree)


def to_abstract(tree: Any, mesh: Mesh, places: Any) -> Any:
    """Returns arrays or shapes as jax.ShapeDtypeStructs with shardings; no data is moved.

    Args:
      tree: a tree of arrays or shapes.
      mesh: the mesh of the shardings, used only if `places` is a PartitionSpec.
      places: a tree of shardings, or one PartitionSpec for all arrays.
    """
    if isinstance(places, PartitionSpec):
        one = NamedSharding(mesh, places)
        places = jax.tree.map(lambda _: one, tree)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
    )


def count_device_bytes(tree: Any) -> int:
    """Returns the number of bytes that a tree's arrays occupy on each device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
