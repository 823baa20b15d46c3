"""Oracle: partitions written out by hand, and the shapes of the shards on eight devices."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from copsd_jax import lora, mesh, model, train_step


@pytest.mark.parametrize("name", ["tiny", "qwen3_8b", "smollm2_135m"])
def test_every_leaf_of_every_shape_has_a_partition(name):
    config = model.SHAPES[name]
    one = mesh.make(8, 1, 1)
    params = model.abstract(config, jnp.float32)
    adapter = jax.eval_shape(lambda: lora.init(config, 8, lora.TARGETS, jax.random.key(0)))
    state = jax.eval_shape(lambda t: train_step.init(t, optax.adamw(1e-3), "ema"), adapter)
    for tree in (params, adapter, state):
        assert len(jax.tree.leaves(mesh.shardings(tree, one))) == len(jax.tree.leaves(tree))


def test_partitions_by_hand():
    devices = mesh.make(2, 2, 2)
    assert mesh.partition("layers/q/kernel", (2, 8, 8), devices) == P(None, "fsdp", "tensor")
    assert mesh.partition("layers/down/kernel", (2, 8, 8), devices) == P(None, "tensor", "fsdp")
    assert mesh.partition("embed/embedding", (8, 8), devices) == P("tensor", "fsdp")
    placed = mesh.place({"embed": {"embedding": jnp.zeros((8, 6))}}, devices)
    shards = placed["embed"]["embedding"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(4, 3)}
    batch = mesh.place_batch(jnp.zeros((8, 3)), devices)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    assert mesh.batch_shards(devices) == 4
    assert mesh.platform(devices) == "cpu"


def test_refusals():
    devices = mesh.make(2, 2, 2)
    with pytest.raises(ValueError, match="no partition for parameter 'layers/z/kernel'"):
        mesh.partition("layers/z/kernel", (1, 2, 3), devices)
    with pytest.raises(ValueError, match=r"has shape \(2, 8\), but its partition"):
        mesh.partition("layers/q/kernel", (2, 8), devices)
    with pytest.raises(ValueError, match="layers/k/kernel follows from the model's key_heads"):
        mesh.partition("layers/k/kernel", (1, 2, 8), devices)
    with pytest.raises(ValueError, match="must be the number of devices, 8"):
        mesh.make(3, 1, 1)
    with pytest.raises(ValueError, match="one of them may be -1"):
        mesh.make(-1, -1, 1)
    assert mesh.make(-1, 2, 2).shape["data"] == 2
