"""Oracle: partitions written out by hand, and the shapes of the shards on eight devices."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import placing
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from copsd_jax.model import lora, transformer
from copsd_jax.runtime import sharding
from copsd_jax.sampler import engine
from copsd_jax.training import train_step

LLAMA = {"family": "llama", "qk_norm": False}
QWEN2 = {"family": "qwen2", "qk_norm": False, "qkv_bias": True, "n_heads": 12, "n_kv_heads": 2}
SHAPES = {
    **transformer.SHAPES,
    "qwen2": dataclasses.replace(
        transformer.SHAPES["qwen3_1_7b"], d_model=1536, d_ff=8960, **QWEN2
    ),
    "llama tied": dataclasses.replace(transformer.SHAPES["qwen3_1_7b"], **LLAMA, n_heads=32),
    "llama untied": dataclasses.replace(
        transformer.SHAPES["qwen3_8b"], **LLAMA, vocab_size=128_257, d_ff=14_336
    ),
}
MESHES = list(itertools.product((1, 4, 16), (1, 2, 4, 8, 16)))


def parts_by_hand(name: str, c: transformer.ModelConfig, fsdp: int, tensor: int) -> int:
    """Into how many different parts an array is cut: its dimensions in what must stay together,
    which is a head, and a single number elsewhere."""
    if name.endswith("norm/scale"):
        return 1
    if name in ("embed/embedding", "head/kernel") and c.vocab_size % tensor:
        return next(n for n in (fsdp * tensor, fsdp, tensor, 1) if c.d_model % n == 0)
    D, F, N, K = c.d_model, c.d_ff, c.n_heads, c.n_kv_heads
    column = {"q": N, "k": K, "v": K, "gate": F, "up": F}
    row = {"o": N, "down": F}
    *_, target, leaf = name.split("/")
    if target in ("embed", "head"):
        over = {"tensor": c.vocab_size, "fsdp": D}
    elif target in column:
        kept = {"kernel": ("tensor", "fsdp"), "a": ("fsdp",)}.get(leaf, ("tensor",))
        over = {axis: {"tensor": column[target], "fsdp": D}[axis] for axis in kept}
    else:
        kept = {"kernel": ("tensor", "fsdp"), "a": ("tensor",)}.get(leaf, ("fsdp",))
        over = {axis: {"tensor": row[target], "fsdp": D}[axis] for axis in kept}
    sizes = {"fsdp": fsdp, "tensor": tensor}
    return math.prod(sizes[axis] for axis, units in over.items() if units % sizes[axis] == 0)


def trees(config: transformer.ModelConfig) -> list[Any]:
    params = transformer.abstract_params(config, jnp.float32)
    adapter = jax.eval_shape(lambda: lora.init_adapter(config, 8, lora.TARGETS, jax.random.key(0)))
    state = lambda t: train_step.init_train_state(t, optax.adamw(1e-3), "ema")  # noqa: E731
    states = [jax.eval_shape(state, tree) for tree in (params, adapter)]
    return [params, jax.eval_shape(lora.quantise_projections, params), adapter, *states]


def held(x: Any, place: NamedSharding) -> float:
    """Share of an array that each device has."""
    return math.prod(place.shard_shape(x.shape)) / max(1, math.prod(x.shape))


@pytest.mark.long
def test_every_leaf_of_every_shape_lies_where_it_should():
    """Weights, int8 weights, adapters, optimizer states, averages, caches, on all meshes."""
    seen = set()
    for config in SHAPES.values():
        leaves = [x for tree in trees(config) for x in jax.tree_util.tree_leaves_with_path(tree)]
        for fsdp, tensor in MESHES:
            where: Any = AbstractMesh((1, fsdp, tensor), sharding.AXES, (AxisType.Auto,) * 3)
            if config.n_heads % tensor:
                with pytest.raises(ValueError, match=f"mesh.tensor is {tensor}: "):
                    sharding.count_sharded_key_repeats(config.n_heads, config.n_kv_heads, tensor)
                continue
            for path, leaf in leaves:
                if not leaf.ndim:
                    continue
                name = sharding._name(path)
                spec = sharding.partition_spec(name, leaf.shape, where, config.n_kv_heads)
                share = 1 / parts_by_hand(name, config, fsdp, tensor)
                assert held(leaf, NamedSharding(where, spec)) == share, (name, fsdp, tensor)
                seen.add(name)
            for dtype in (jnp.bfloat16, jnp.int8):
                repeats = sharding.count_sharded_key_repeats(
                    config.n_heads, config.n_kv_heads, tensor
                )
                decoder = transformer.Decoder(config, jnp.bfloat16, key_repeats=repeats)
                state = jax.eval_shape(
                    functools.partial(engine.init_slot_state, decoder, 32, 128, dtype)
                )
                places = engine.partition_state(state, where)
                for leaf, spec in zip(*map(jax.tree.leaves, (state, places)), strict=True):
                    parts = fsdp * (tensor if leaf.ndim > 3 else 1)
                    assert held(leaf, NamedSharding(where, spec)) == 1 / parts
    caches = {name for name in sharding.PARTITIONS if name.startswith("cache/")}
    assert seen == set(sharding.PARTITIONS) - caches


def test_unknown_names_are_refused_wherever_they_are():
    where = sharding.make_mesh(8, 1, 1)
    for tree in trees(transformer.SHAPES["tiny"]):
        assert len(jax.tree.leaves(sharding.shardings(tree, where))) == len(jax.tree.leaves(tree))
        wrong = jax.tree.map(lambda x: {"z": x}, tree)
        with pytest.raises(ValueError, match=r"no partition for parameter '.*/z'"):
            sharding.shardings(wrong, where)


@pytest.mark.parametrize(
    "heads, key_heads, tensor, repeats",
    [(8, 2, 1, 1), (8, 2, 2, 1), (8, 2, 4, 2), (8, 2, 8, 4), (12, 3, 4, 4), (12, 6, 4, 2),
     (64, 8, 16, 2), (12, 4, 6, 3), (9, 3, 9, 3)],
)  # fmt: skip
def test_key_repeats_by_hand(heads, key_heads, tensor, repeats):
    assert sharding.count_sharded_key_repeats(heads, key_heads, tensor) == repeats


def test_a_tensor_axis_that_does_not_divide_the_heads_is_refused():
    message = "mesh.tensor is 6: it does not divide the model's 8 query heads; the choices are 1, "
    with pytest.raises(ValueError, match=f"{message}2, 4, 8"):
        sharding.count_sharded_key_repeats(8, 2, 6)


def test_what_stays_whole_is_named_with_its_bytes():
    """2 key heads over 4, and a width of 6 over 4: k and v, and all that the width is cut of."""
    devices = sharding.make_mesh(1, 2, 4)
    tree = {
        "layers": {
            "k": {"kernel": jnp.zeros((2, 6, 8))},  # 384 bytes; 192 of two parts, 48 of eight
            "gate": {"kernel": jnp.zeros((2, 7, 8))},  # 448 bytes; 112 of four parts, 56 of eight
            "up": {"kernel": jnp.zeros((2, 6, 8))},
        },
        "embed": {"embedding": jnp.zeros((5, 8))},
    }
    names, more = sharding.find_undivided(tree, devices, key_heads=2)
    assert names == {"tensor": ["layers/k/kernel"], "fsdp": ["layers/gate/kernel"]}
    assert more == (192 - 48) + (112 - 56)
    assert sharding.find_undivided(tree, sharding.make_mesh(8, 1, 1), 2) == ({}, 0)


def test_a_part_is_read_once_whatever_devices_have_it():
    devices = sharding.make_mesh(2, 2, 2)
    whole = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    for spec, count in ((P("fsdp", "tensor"), 4), (P(None, "tensor"), 2), (P(), 1)):
        cuts = []
        where = NamedSharding(devices, spec)
        got = sharding.load_shards(
            whole.shape, where, lambda part, cuts=cuts: cuts.append(part) or whole[part]
        )
        np.testing.assert_array_equal(got, whole)
        assert got.sharding == where
        assert len(cuts) == count
    assert (
        sharding.load_shards((), NamedSharding(devices, P()), lambda _: np.array(3, np.float32))
        == 3
    )


def test_partitions_by_hand():
    devices = sharding.make_mesh(2, 2, 2)
    assert sharding.partition_spec("layers/q/kernel", (2, 8, 8), devices) == P(
        None, "fsdp", "tensor"
    )
    assert sharding.partition_spec("layers/down/kernel", (2, 8, 8), devices) == P(
        None, "tensor", "fsdp"
    )
    assert sharding.partition_spec("embed/embedding", (8, 8), devices) == P("tensor", "fsdp")
    assert sharding.partition_spec("embed/embedding", (7, 8), devices) == P(
        None, ("fsdp", "tensor")
    )
    assert sharding.partition_spec("head/kernel", (7, 6), devices) == P(None, "fsdp")
    assert sharding.partition_spec("layers/up/kernel", (2, 7, 8), devices) == P(
        None, None, "tensor"
    )
    assert sharding.partition_spec("layers/k/kernel", (2, 8, 8), devices, 2) == P(
        None, "fsdp", "tensor"
    )
    assert sharding.partition_spec("layers/k/kernel", (2, 8, 8), devices, 3) == P(
        None, "fsdp", None
    )
    assert sharding.partition_spec("v/b", (2, 4, 8), devices, 1) == P(None, None, None)
    tree = {"embed": {"embedding": jnp.zeros((7, 8))}}
    gathered = sharding.shardings(tree, devices, gathered=True)["embed"]["embedding"]
    assert gathered.spec == P(None, "tensor")
    placed = sharding.shard_by_name({"embed": {"embedding": jnp.zeros((8, 6))}}, devices)
    shards = placed["embed"]["embedding"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(4, 3)}
    batch = placing.place_batch(jnp.zeros((8, 3)), devices)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    assert sharding.batch_shards(devices) == 4
    assert sharding.platform(devices) == "cpu"


def test_refusals():
    devices = sharding.make_mesh(2, 2, 2)
    with pytest.raises(ValueError, match="no partition for parameter 'layers/z/kernel'"):
        sharding.partition_spec("layers/z/kernel", (1, 2, 3), devices)
    with pytest.raises(ValueError, match=r"has shape \(2, 8\), but its partition"):
        sharding.partition_spec("layers/q/kernel", (2, 8), devices)
    with pytest.raises(ValueError, match="key_heads is None: the partition of layers/k/kernel"):
        sharding.partition_spec("layers/k/kernel", (1, 2, 8), devices)
    with pytest.raises(ValueError, match="must equal the number of devices, 8"):
        sharding.make_mesh(3, 1, 1)
    with pytest.raises(ValueError, match="one size may be -1"):
        sharding.make_mesh(-1, -1, 1)
    assert sharding.make_mesh(-1, 2, 2).shape["data"] == 2


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 2, 4), (8, 1, 1)])
@pytest.mark.parametrize("V", [40, 37])  # that tensor divides, and does not
def test_lookup_is_indexing_and_its_gradient_a_sum_of_rows(sizes, V):
    devices = sharding.make_mesh(*sizes)
    draw = np.random.default_rng(0)
    table = draw.standard_normal((V, 16), np.float32)
    tokens = draw.integers(0, V, (8, 5)).astype(np.int32)
    weights = draw.standard_normal((8, 5, 16), np.float32)
    placed = sharding.shard_by_name({"embed": {"embedding": jnp.asarray(table)}}, devices)["embed"][
        "embedding"
    ]

    def loss(table, tokens):
        x = sharding.look_up(table, tokens)
        return jnp.sum(x * jnp.asarray(weights)), x

    with jax.set_mesh(devices):
        program = jax.jit(jax.grad(loss, has_aux=True)).lower(
            placed, placing.place_batch(tokens, devices)
        ).compile()  # fmt: skip
        grad, x = program(placed, placing.place_batch(tokens, devices))
    np.testing.assert_array_equal(x, table[tokens])
    expected = np.zeros((V, 16))
    np.add.at(expected, tokens.reshape(-1), weights.reshape(-1, 16).astype(np.float64))
    np.testing.assert_allclose(grad, expected, atol=1e-5)
