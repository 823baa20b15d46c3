"""Oracles: the trainer's own arrays (no copy), merged weights, products in float64."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copsd_jax.model import lora, transformer
from copsd_jax.model import policy as policy_lib
from copsd_jax.runtime import sharding
from copsd_jax.sampler import handover, loop, request

CONFIG = dataclasses.replace(transformer.SHAPES["tiny"], vocab_size=128)
DECODER = transformer.Decoder(CONFIG, jnp.float32)


def trees():
    params = transformer.init_params(CONFIG, jax.random.key(0), jnp.float32)
    adapter = lora.init_adapter(CONFIG, 4, lora.TARGETS, jax.random.key(1))
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape)  # noqa: E731
    return params, jax.tree.map(noise, adapter)


def hand_over(devices, frozen=None, **changes):
    settings = {"merge": False, "int8": False, "gather": True}
    return handover.HandOver(devices, frozen, CONFIG.n_kv_heads, **settings | changes)


def close(a, b, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (2, 1, 4)])
def test_nothing_is_copied_where_both_layouts_are_one(sizes):
    devices = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    params, adapter = (sharding.shard_by_name(tree, devices, CONFIG.n_kv_heads) for tree in trees())
    policy = policy_lib.Policy(params, adapter, 0.5)
    got = hand_over(devices)(policy)
    assert got.scale == 0.5
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(policy), strict=True):
        assert x is y


def test_what_fsdp_splits_is_gathered_once_and_the_adapter_each_time():
    devices = sharding.make_mesh(1, 4, 2)
    params, adapter = (sharding.shard_by_name(tree, devices, CONFIG.n_kv_heads) for tree in trees())
    policy = policy_lib.Policy(params, adapter, 0.5)
    over = hand_over(devices, params)
    handed = over(policy)
    base, first = handed.params, handed.adapter
    close(base, params)
    close(first, adapter)
    kernel = base["layers"]["q"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 64, 32)  # split over tensor alone
    a = first["q"]["a"]
    assert a.sharding.shard_shape(a.shape) == a.shape
    later = jax.tree.map(lambda x: x + 1, adapter)
    again = over(dataclasses.replace(policy, adapter=later))
    assert again.params is base
    close(again.adapter, later)
    other = jax.tree.map(lambda x: x * 2, params)
    moved = over(dataclasses.replace(policy, params=other)).params
    close(moved, other)
    kept = weakref.ref(moved["embed"]["embedding"])
    assert over(policy).params is base
    del moved
    gc.collect()
    assert kept() is None  # nothing is held of what is not frozen
    same = hand_over(devices, gather=False)(policy)
    assert same.params is params
    assert same.adapter is adapter


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_merged(sizes):
    devices = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    params, adapter = (sharding.shard_by_name(tree, devices, CONFIG.n_kv_heads) for tree in trees())
    merged = hand_over(devices, merge=True)(policy_lib.Policy(params, adapter, 0.5))
    assert merged.adapter is None
    got = merged.params
    for name in lora.TARGETS:
        parts = params["layers"][name]["kernel"], adapter[name]["a"], adapter[name]["b"]
        kernel, a, b = (np.asarray(x, np.float64) for x in parts)
        want = kernel + 0.5 * np.einsum("lir,lro->lio", a, b)
        np.testing.assert_allclose(got["layers"][name]["kernel"], want, atol=1e-5)
    np.testing.assert_array_equal(got["embed"]["embedding"], params["embed"]["embedding"])


@pytest.mark.long
def test_int8_kernels():
    """Products with rounded kernels, and the rounding itself, at most half of a 127th."""
    params, adapter = trees()
    devices = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    over = hand_over(devices, params, int8=True)
    policy = policy_lib.Policy(params, adapter, 0.5)
    handed = over(policy)
    got = handed.params
    assert handed.adapter is adapter
    assert over(policy).params is got
    plain = dict(got, layers=dict(got["layers"]))
    for name in lora.TARGETS:
        kernel = np.asarray(params["layers"][name]["kernel"])
        whole, scale = (np.asarray(got["layers"][name][leaf]) for leaf in ("kernel", "scale"))
        assert whole.dtype == np.int8
        rounded = whole * scale[:, None]
        assert (np.abs(rounded - kernel) <= np.abs(kernel).max(1)[:, None] / 254 * 1.001).all()
        plain["layers"][name] = {"kernel": jnp.asarray(rounded)}
    ones = jnp.ones((1, 9), jnp.int32)
    stream = transformer.Stream(jnp.arange(9)[None], jnp.arange(9)[None], ones, adapter, 0.5)
    run = lambda tree: DECODER.apply({"params": tree}, (stream,))[0].hidden_BLD  # noqa: E731
    np.testing.assert_allclose(run(got), run(plain), atol=1e-4)
    assert np.abs(run(got) - run(params)).max() > 1e-3


@pytest.mark.long
def test_int8_weights_on_a_mesh_and_in_the_sampler():
    params, adapter = trees()
    prompts, sampling = [(5, 6), (7,)], request.Sampling(8, temperature=0.0)
    keys = request.derive_sampling_keys(0, "rollout", 0, ["a", "b"], [0, 0])
    texts = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        devices = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        placed = [
            sharding.shard_by_name(tree, devices, CONFIG.n_kv_heads) for tree in (params, adapter)
        ]
        policy = hand_over(devices, int8=True)(policy_lib.Policy(*placed, 0.5))
        with jax.set_mesh(devices):
            out = loop.generate(
                DECODER,
                policy,
                prompts,
                sampling,
                keys=keys,
                settings=request.SamplerSettings(slots=8),
            )
        texts.append([c.ids for c in out.completions])
    assert texts[0] == texts[1]
