"""Oracle: softmax attention in float64 NumPy, slot by slot, over its own live entries alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copsd_jax.attention import decode_attention, visibility
from copsd_jax.runtime import sharding

LAYERS, J, K, M, A, H = 2, 5, 2, 3, 256, 16
LENGTHS = np.array([70, 0, 64, 1, 256], np.int32)


def inputs(dtype, seed=0, scale=1.0, slots=J):
    """Queries, new entries and a cache whose dead entries are not numbers."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(0, scale, shape), jnp.float32)  # noqa: E731
    cache = decode_attention.create_cache(LAYERS, slots, K, A, H, dtype)
    cache = decode_attention.convert_entries(cache, normal(*cache.k.shape), normal(*cache.v.shape))
    float_type = jnp.float32 if dtype == jnp.int8 else dtype
    q, k, v = normal(slots, K, M, H), normal(slots, K, H), normal(slots, K, H)
    return q.astype(float_type), k.astype(float_type), v.astype(float_type), cache


def spoilt(cache, lengths):
    """Entries at and beyond each length become NaN, or any scale of an int8 cache."""
    dead = np.arange(A)[None, :] >= lengths[:, None]  # [J, A]

    def spoil(x):
        if x.dtype == jnp.int8:
            return x
        mask = jnp.asarray(dead)[None, :, None]
        return jnp.where(mask if x.ndim == 4 else mask[..., None], jnp.nan, x).astype(x.dtype)

    return jax.tree.map(spoil, cache)


def wide(cache):
    """Keys and values as float64, from what the cache holds."""
    k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (cache.k, cache.v))
    if cache.k_scale is not None:
        k, v = k * np.asarray(cache.k_scale)[..., None], v * np.asarray(cache.v_scale)[..., None]
    return k, v


def expected(q, cache, layer, lengths):
    """Normalised output [J, K, M, H], 0 for a dead slot, and the log of the sum of exponentials."""
    k, v = wide(cache)
    q = np.asarray(q.astype(jnp.float32), np.float64)
    out, log_total = np.zeros(q.shape), np.full(q.shape[:-1], -np.inf)
    for j, length in enumerate(lengths):
        for h in range(q.shape[1]) if length else ():
            logit = q[j, h] @ k[layer, j, h, :length].T
            top = logit.max(-1, keepdims=True)
            weight = np.exp(logit - top)
            log_total[j, h] = np.log(weight.sum(-1)) + top[:, 0]
            out[j, h] = weight @ v[layer, j, h, :length] / weight.sum(-1, keepdims=True)
    return out, log_total


@functools.partial(jax.jit, static_argnames="implementation")
def attend(q, cache, layer, length_J, implementation):
    return decode_attention.IMPLEMENTATIONS[implementation](q, cache, layer, length_J)


@pytest.mark.parametrize("implementation", ["dense", "blocks"])
@pytest.mark.parametrize(
    "dtype, scale, tolerance",
    [(jnp.float32, 1.0, 2e-5), (jnp.float32, 40.0, 2e-5), (jnp.bfloat16, 1.0, 1e-2),
     (jnp.int8, 1.0, 2e-5)],
)  # fmt: skip
def test_parts_equal_plain_attention(implementation, dtype, scale, tolerance):
    q, _, _, cache = inputs(dtype, scale=scale)
    part = attend(q, spoilt(cache, LENGTHS), jnp.int32(1), jnp.asarray(LENGTHS), implementation)
    want, log_total = expected(q, cache, 1, LENGTHS)
    live = LENGTHS > 0
    got = np.asarray(part.out_JKMH)[live] / np.asarray(part.total_JKM)[live][..., None]
    np.testing.assert_allclose(got, want[live], rtol=0, atol=tolerance * np.abs(want).max())
    got = np.log(np.asarray(part.total_JKM)[live]) + np.asarray(part.top_JKM)[live]
    size = np.abs(log_total[live]).max()
    np.testing.assert_allclose(got, log_total[live], rtol=0, atol=tolerance * size)
    for name, value in (("out_JKMH", 0), ("total_JKM", 0), ("top_JKM", visibility.MASKED_LOGIT)):
        np.testing.assert_array_equal(np.asarray(getattr(part, name))[~live], np.float32(value))


def test_the_list_of_live_blocks():
    slot_X, block_X, number = decode_attention.list_live_blocks(jnp.asarray([70, 0, 64]), 4, 64)
    assert int(number) == 3
    assert list(zip(slot_X[:3].tolist(), block_X[:3].tolist(), strict=True)) == [
        (0, 0), (0, 1), (2, 0),
    ]  # fmt: skip
    assert slot_X.shape == (12,)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_a_step_writes_its_entry_and_sees_it(dtype):
    """Index 255 is the last entry, and a dead slot (-1) leaves its cache as it is."""
    q, k, v, cache = inputs(dtype)
    index = np.array([69, -1, 0, 128, 255], np.int32)
    run = jax.jit(functools.partial(decode_attention.write_and_attend, implementation="blocks"))
    part, new = run(q, k, v, spoilt(cache, index), jnp.int32(1), jnp.asarray(index))
    at = np.arange(J), slice(None), index
    by_hand = jax.tree.map(
        lambda x, entry: x.at[1, 0, :, 69].set(entry[0]).at[1, 2, :, 0].set(entry[2])
        .at[1, 3, :, 128].set(entry[3]).at[1, 4, :, 255].set(entry[4]),
        cache, decode_attention.convert_entries(cache, k, v),
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(new.k[1])[at][[0, 2, 3, 4]],
                                  np.asarray(by_hand.k[1])[at][[0, 2, 3, 4]])  # fmt: skip
    want, _ = expected(q, by_hand, 1, index + 1)
    live = index >= 0
    got = np.asarray(part.out_JKMH)[live] / np.asarray(part.total_JKM)[live][..., None]
    np.testing.assert_allclose(got, want[live], atol=2e-5 * np.abs(want).max())
    if dtype == jnp.float32:
        assert np.isnan(new.k[1, 1]).all()
        assert np.isnan(new.k[0, 0, :, 69:]).all()


def test_int8_rounds_to_a_255th_of_the_range():
    x = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    whole, scale = decode_attention.quantise(jnp.asarray(x))
    assert whole.dtype == jnp.int8
    error = np.abs(np.asarray(whole) * np.asarray(scale)[:, None] - x).max(axis=1)
    assert (error <= np.abs(x).max(axis=1) / 254 * 1.0001).all()
    np.testing.assert_array_equal(decode_attention.quantise(jnp.zeros((3, 16)))[0], 0)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 1, 2), (1, 2, 4)])
def test_on_a_mesh_each_device_has_its_slots_and_heads(sizes):
    """Key heads that `tensor` does not divide (2 over 4) are on all of its devices."""
    q, k, v, cache = inputs(jnp.float32, slots=8)
    index = jnp.asarray([69, -1, 0, 128, 255, 63, 64, -1], jnp.int32)
    run = jax.jit(functools.partial(decode_attention.write_and_attend, implementation="blocks"))
    want = run(q, k, v, cache, jnp.int32(1), index)
    with jax.set_mesh(sharding.make_mesh(*sizes)) as _:
        got = run(q, k, v, cache, jnp.int32(1), index)
        text = run.lower(q, k, v, cache, jnp.int32(1), index).compile().as_text()
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    head = 2 if 2 % sizes[2] else 2 // sizes[2]
    assert f"f32[2,{8 // (sizes[0] * sizes[1])},{head},256,16]" in text
    assert "all-gather" not in text


def test_refusals():
    q, k, v, cache = inputs(jnp.float32)
    args = (q, k, v, cache, jnp.int32(0), jnp.zeros(J, jnp.int32))
    with pytest.raises(ValueError, match="decode attention is 'fast': the choices are dense, bl"):
        decode_attention.write_and_attend(*args, "fast")
    with (
        jax.set_mesh(sharding.make_mesh(8, 1, 1)),
        pytest.raises(ValueError, match="5 slots: the mesh needs a multiple of 8"),
    ):
        decode_attention.write_and_attend(*args, "blocks")
