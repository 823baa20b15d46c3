"""Adapters: against float64 NumPy, at b = 0, merged, and under the gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_slow

from copsd_jax.model import lora, transformer

CONFIG = dataclasses.replace(
    transformer.SHAPES["tiny"], vocab_size=61, d_model=32, d_ff=48, n_heads=4, n_kv_heads=2,
    head_dim=8, family="qwen2", qkv_bias=True, qk_norm=False,
)  # fmt: skip
F32 = jnp.float32


@pytest.fixture(scope="module")
def params() -> dict:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.1, 0.3, leaf.shape), F32),
        transformer.abstract_params(CONFIG, F32),
    )


def filled(targets=lora.TARGETS) -> dict:
    """An adapter whose `b` is not 0."""
    adapter = lora.init_adapter(CONFIG, 3, targets, jax.random.key(0))
    rng = np.random.default_rng(1)
    return {
        name: {"a": leaf["a"], "b": jnp.asarray(rng.normal(0, 0.3, leaf["b"].shape), F32)}
        for name, leaf in adapter.items()
    }


def hidden(params, adapter, scale, dtype=F32) -> jax.Array:
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 61, (2, 7)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32)[None], (2, 7))
    one = transformer.Stream(tokens, positions, jnp.ones_like(tokens), adapter, scale)
    (out,) = jax.jit(transformer.Decoder(CONFIG, dtype).apply)({"params": params}, (one,))
    return out.hidden_BLD


@pytest.mark.parametrize("use_bias", [False, True])
def test_projection_equals_numpy(use_bias):
    rng = np.random.default_rng(0)
    x, w, bias, a, b = (rng.normal(size=s) for s in ((4, 6), (6, 5), (5,), (6, 2), (2, 5)))
    weights = {"kernel": w, "bias": bias} if use_bias else {"kernel": w}
    weights, adapter, x32 = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, F32), (weights, {"a": a, "b": b}, x)
    )
    got = lora.Projection(5, use_bias, F32).apply({"params": weights}, x32, adapter, 0.7)
    expected = x @ (w + 0.7 * a @ b) + (bias if use_bias else 0)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_init_is_uniform_below_one_over_root_in_with_b_zero():
    wide = transformer.SHAPES["qwen3_0_6b"]
    wide = dataclasses.replace(wide, n_layers=2)
    adapter = lora.init_adapter(wide, 8, ("q", "down"), jax.random.key(0))
    assert set(adapter) == {"q", "down"}
    for name, width, out in (("q", 1024, 2048), ("down", 3072, 1024)):
        a, b = adapter[name]["a"], adapter[name]["b"]
        assert (a.shape, b.shape) == ((2, width, 8), (2, 8, out))
        assert (a.dtype, b.dtype) == (F32, F32)
        np.testing.assert_array_equal(b, 0)
        bound = width**-0.5
        assert 0.99 * bound < np.abs(a).max() <= bound
        np.testing.assert_allclose(np.std(a), bound / 3**0.5, rtol=0.03)  # of a uniform variable
    alone = lora.init_adapter(wide, 8, ("down",), jax.random.key(0))
    np.testing.assert_array_equal(alone["down"]["a"], adapter["down"]["a"])
    assert (
        np.abs(np.corrcoef(adapter["q"]["a"][0].ravel(), adapter["q"]["a"][1].ravel()))[0, 1] < 0.1
    )


def test_unknown_target_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"lora\.targets is 'query': .*q, k, v, o, gate, up, down"):
        lora.init_adapter(CONFIG, 2, ("q", "query"), jax.random.key(0))


def test_b_zero_equals_base_exactly(params):
    fresh = lora.init_adapter(CONFIG, 3, lora.TARGETS, jax.random.key(1))
    np.testing.assert_array_equal(hidden(params, fresh, 2.0), hidden(params, None, 1.0))


@pytest.mark.parametrize("targets", [lora.TARGETS, ("k", "down")], ids=str)
def test_merged_equals_unmerged(params, targets):
    adapter = filled(targets)
    merged = lora.merge_adapter(params, adapter, 0.5)
    apart = hidden(params, adapter, 0.5)
    np.testing.assert_allclose(hidden(merged, None, 1.0), apart, atol=2e-5)
    assert np.abs(apart - hidden(params, None, 1.0)).max() > 0.05
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for name in set(lora.TARGETS) - set(targets):
        assert merged["layers"][name] is params["layers"][name]
    if "q" in targets:
        assert merged["layers"]["q"]["bias"] is params["layers"]["q"]["bias"]
        a, b = (np.asarray(adapter["q"][x], np.float64) for x in ("a", "b"))
        expected = np.asarray(params["layers"]["q"]["kernel"], np.float64) + 0.5 * a @ b
        np.testing.assert_allclose(merged["layers"]["q"]["kernel"], expected, atol=1e-6)


def test_merge_keeps_the_kernels_dtype(params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    merged = lora.merge_adapter(half, filled(), 0.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.long
@pytest.mark.parametrize("dtype", mostly_slow([F32, jnp.bfloat16]))
def test_gradient_is_the_adapters_tree_in_float32(params, dtype):
    adapter = filled(("q", "v", "up"))

    def loss(adapter):
        return hidden(params, adapter, 0.5, dtype).astype(F32).sum()

    grads = jax.grad(loss)(adapter)
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)
    for leaf in jax.tree.leaves(grads):
        assert leaf.dtype == F32
        assert np.abs(leaf).max() > 0
    if dtype == F32:  # one direction by finite differences
        step = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(3), leaf.shape), adapter)
        move = lambda t: jax.tree.map(lambda x, d: x + jnp.asarray(t, F32) * d, adapter, step)  # noqa: E731
        slope = (float(loss(move(1e-3))) - float(loss(move(-1e-3)))) / 2e-3
        along = sum(float((g * d).sum()) for g, d in zip(*map(jax.tree.leaves, (grads, step))))  # noqa: B905
        np.testing.assert_allclose(along, slope, rtol=2e-2)
