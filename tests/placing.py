"""Arrays of tests on a mesh."""

from typing import Any

from jax.sharding import Mesh, PartitionSpec

from copsd_jax.runtime import sharding


def place_batch(tree: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Splits arrays along `axis` over the batch axes of the mesh."""
    return sharding.shard_tree(tree, mesh, PartitionSpec(*([None] * axis), sharding.BATCH_AXES))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a whole copy of each array on every device."""
    return sharding.shard_tree(tree, mesh, PartitionSpec())
