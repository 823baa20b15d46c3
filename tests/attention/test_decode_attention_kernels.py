"""Decode attention kernels in interpret mode against float64 NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_slow
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from copsd_jax.attention import decode_attention_gpu, decode_attention_tpu, decode_cache

LAYER = 1
LENGTHS = (0, 256, 1, 127, 128, 129, 0, 255, 257, 383, 384)
# Slots of a program that do not divide the slots; splits that are cut by the cache's end.
BLOCKS = {
    "tpu": decode_attention_tpu.BlockSizes(keys=256, buffers=2, slots=4),
    "gpu": decode_attention_gpu.BlockSizes(keys=32, split=256),
}
KERNELS: dict[str, Any] = {"tpu": decode_attention_tpu, "gpu": decode_attention_gpu}
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "int8": 1e-2}
# dtype of the cache, of the query; K, M, H. Each has another way through the kernels.
CASES = {
    "float32": ("float32", "float32", 3, 3, 64),
    "bfloat16": ("bfloat16", "bfloat16", 1, 2, 128),
    "int8": ("int8", "bfloat16", 2, 1, 128),
    "int8 turned": ("int8", "float32", 2, 2, 64),
    "mixed": ("bfloat16", "float32", 4, 1, 64),
}


def inputs(case: str, lengths=LENGTHS, layers=2, seed=0):
    """Query, keys, values and their scales (or None), NumPy, with garbage beyond the lengths."""
    dtype, query, heads, queries, size = CASES[case]
    rng = np.random.default_rng(seed)
    slots, length = len(lengths), 384
    q = rng.normal(size=(slots, heads, queries, size)) * 0.3
    shape = (layers, slots, heads, length)
    if dtype == "int8":
        k, v = (rng.integers(-127, 128, (*shape, size)).astype(np.int8) for _ in range(2))
        scales = [rng.uniform(0.5, 1.5, shape).astype(np.float32) / 64 for _ in range(2)]
    else:
        k, v = (rng.normal(size=(*shape, size)).astype(jnp.dtype(dtype)) for _ in range(2))
        scales = []
    for slot, live in enumerate(lengths):
        for x in scales or (k, v):
            x[:, slot, :, live:] = np.nan
    return q.astype(jnp.dtype(query)), k, v, *(scales or (None, None))


def oracle(arrays, layer, lengths):
    """out, top and total of every slot in float64."""
    q, k, v, k_scale, v_scale = arrays
    q, k, v = (x.astype(np.float64) for x in (q, k[layer], v[layer]))
    if k_scale is not None:
        k, v = k * k_scale[layer][..., None], v * v_scale[layer][..., None]
    out, top, total = np.zeros(q.shape), np.full(q.shape[:3], -1e30), np.zeros(q.shape[:3])
    for j, n in enumerate(lengths):
        if n:
            logit = np.einsum("kmh,kah->kma", q[j], k[j, :, :n])
            top[j] = logit.max(axis=-1)
            weight = np.exp(logit - top[j][..., None])
            total[j] = weight.sum(axis=-1)
            out[j] = np.einsum("kma,kah->kmh", weight, v[j, :, :n])
    return out, top, total


@functools.cache
def program(name: str, interpret: Any = True):
    kernel = KERNELS[name]
    return jax.jit(functools.partial(kernel.attend, blocks=BLOCKS[name], interpret=interpret))


def run(name: str, arrays, lengths, interpret: Any = True):
    call = program(name, interpret)
    return call(
        arrays[0], decode_cache.Cache(*arrays[1:]), jnp.int32(LAYER), np.array(lengths, np.int32)
    )


def check(got, want, lengths, tolerance):
    dead = np.array(lengths) == 0
    for i, (mine, exact) in enumerate(zip(got, want, strict=True)):
        mine = np.asarray(mine)
        assert mine.dtype == np.float32
        assert mine.shape == exact.shape
        np.testing.assert_array_equal(mine[dead], np.float32([0, -1e30, 0][i]))
        if not dead.all():
            bound = tolerance * np.abs(exact[~dead]).max()
            np.testing.assert_allclose(mine[~dead], exact[~dead], rtol=0, atol=bound)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", mostly_slow(CASES, 2))
def test_equals_float64(name, case):
    """Ragged lengths around blocks' edges; whatever lies beyond a length is NaN."""
    arrays = inputs(case)
    want = oracle(arrays, LAYER, LENGTHS)
    check(run(name, arrays, LENGTHS), want, LENGTHS, TOLERANCE[CASES[case][0]])


@pytest.mark.parametrize("name", KERNELS)
def test_extreme_logits(name):
    """Logits up to 2e5, in steps of 16 and exact in float32, of either sign and in any order."""
    q, k, v, *none = inputs("float32")
    rng = np.random.default_rng(5)
    q = (rng.integers(-8, 9, q.shape) * 16).astype(np.float32)
    k = np.where(np.isnan(k), k, rng.integers(-8, 9, k.shape)).astype(np.float32)
    k[:, :, 0, :200] *= -16  # the top of the first head's first blocks is far off
    arrays = (q, k, v, *none)
    want = oracle(arrays, LAYER, LENGTHS)
    assert np.abs(want[1][1:]).max() > 1e4
    check(run(name, arrays, LENGTHS), want, LENGTHS, 2e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_no_live_slot(name):
    lengths = [0] * len(LENGTHS)
    arrays = inputs("float32", lengths)
    check(run(name, arrays, lengths), oracle(arrays, LAYER, lengths), lengths, 0)


@pytest.mark.parametrize("when", ["eager", "on_wait"])
def test_copies_are_neither_read_too_early_nor_overwritten(when):
    """With a simulated memory, NaN at first, copies being made as early or as late as can be."""
    arrays = inputs("int8")
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode=when)
    got = run("tpu", arrays, LENGTHS, interpret)
    check(got, oracle(arrays, LAYER, LENGTHS), LENGTHS, TOLERANCE["int8"])


@pytest.mark.long
@pytest.mark.parametrize("name", KERNELS)
def test_two_shards_of_slots_and_a_loop_over_layers(name):
    """Default blocks; the cache is carried and written in the loop, as the sampler does it."""
    kernel, layers, lengths = KERNELS[name], 3, (0, 5, 130, 384)
    arrays = inputs("bfloat16", lengths, layers)
    q, k, v = (jnp.asarray(x) for x in arrays[:3])
    rows = jnp.arange(len(lengths) // 2, dtype=jnp.int32)

    def local(q, k, v, length_J):
        def body(cache, layer):
            k, v = (x.at[layer, rows, :, length_J - 1].set(jnp.bfloat16(0.5)) for x in cache)
            out = kernel.attend(q, decode_cache.Cache(k, v), layer, length_J, interpret=True)
            return (k, v), out

        return jax.lax.scan(body, (k, v), jnp.arange(layers, dtype=jnp.int32))[1]

    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    slot, inside = PartitionSpec("data"), PartitionSpec(None, "data")
    with jax.set_mesh(mesh):
        sharded = jax.shard_map(
            local, in_specs=(slot, inside, inside, slot), out_specs=inside, check_vma=False
        )
        got = jax.jit(sharded)(q, k, v, jnp.array(lengths, jnp.int32))
    for x in arrays[1:3]:
        for j, n in enumerate(lengths):
            x[:, j, :, n - 1] = 0.5
    for layer in range(layers):
        want = oracle(arrays, layer, lengths)
        check([x[layer] for x in got], want, lengths, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("case", ["float32", "bfloat16", "int8", "int8 turned"])
def test_write_puts_one_entry_into_each_slot(case):
    """Indices at the ends, at a tile's edges, and outside: those slots keep what they have."""
    index = np.array([-1, 0, 31, 32, 127, 128, 300, 383, 384, 400, 7], np.int32)
    _, k, v, *scales = inputs(case, [384] * len(index))
    caches = tuple(x for x in (k, v, *scales) if x is not None)
    new = tuple(np.roll(x[0, :, :, 5], 1, axis=0) for x in caches)
    want = [x.copy() for x in caches]
    for cache, entry in zip(want, new, strict=True):
        for j, at in enumerate(index):
            if 0 <= at < 384:
                cache[LAYER, j, :, at] = entry[j]
    write = jax.jit(functools.partial(decode_attention_tpu.write_cache_entries, interpret=True))
    got = write(caches, new, jnp.int32(LAYER), index)
    for mine, exact in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), exact)


def test_default_blocks():
    """At Qwen3-1.7B's shape: 1 us of 8 heads is 200 entries on v5e, 390 on v6e."""
    q, k = (16, 8, 2, 128), (28, 16, 8, 4096, 128)
    assert decode_attention_tpu.choose_blocks(
        q, k, jnp.bfloat16
    ) == decode_attention_tpu.BlockSizes(256, 3, 16)
    assert decode_attention_tpu.choose_blocks(q, k, jnp.bfloat16, "TPU v6 lite").keys == 384
    assert decode_attention_tpu.choose_blocks(q, k, jnp.bfloat16, "TPU v5").slots == 8  # two cores
    with pytest.raises(ValueError, match="chip is 'TPU v4': the choices are TPU v5 lite,"):
        decode_attention_tpu.choose_blocks(q, k, jnp.bfloat16, "TPU v4")
    # 132 processors: one slot of 8 heads is split as far as it goes, 256 slots are not.
    assert decode_attention_gpu.choose_blocks((1, *q[1:]), k, jnp.bfloat16).split == 128
    assert decode_attention_gpu.choose_blocks((256, *q[1:]), k, jnp.bfloat16).split == 512


@pytest.mark.parametrize("name", KERNELS)
def test_cost(name):
    """Counted for one slot, then scaled: 3 heads, 2 queries, 10 live entries of size 64, int8."""
    live = 10 + (64 if name == "tpu" else 0)  # chunks of 128 are half used at their end
    multiplications = sum(1 for _ in range(3 * 2) for _ in range(live) for _ in range(64 * 2))
    got = KERNELS[name].estimate_cost((5, 3, 2, 64), jnp.int8, 10)
    assert got.flops == 5 * 2 * multiplications
    assert got.transcendentals == 5 * 3 * 2 * live
    rows = 3 * 2 * (64 * 4 + 64 * 4 + 4 + 4)
    assert got.bytes_accessed == 5 * (3 * live * 2 * (64 + 4) + rows)


def abstract(length=384, slots=2, heads=1, queries=2, size=64, dtype="bfloat16"):
    shape = jax.ShapeDtypeStruct
    cache = shape((4, slots, heads, length, size), dtype)
    scale = shape(cache.shape[:4], "float32") if dtype == "int8" else None
    q = shape((slots, heads, queries, size), "bfloat16")
    caches: Any = (cache, cache, scale, scale)
    return q, decode_cache.Cache(*caches), shape((), "int32"), shape((slots,), "int32")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precision_of_products(name, dtype):
    """No unit rounds float32 to fewer bits (a CPU never would); bfloat16 takes the fast way."""
    q, *rest = abstract(dtype=dtype)
    q = jax.ShapeDtypeStruct(q.shape, dtype)
    text = str(jax.make_jaxpr(KERNELS[name].attend)(q, *rest))
    products = text.count("dot_general[")
    assert products >= 2
    assert text.count("precision=(Precision.HIGHEST") == (products if dtype == "float32" else 0)
    assert text.count("preferred_element_type=float32") == products


REFUSED = [
    ("tpu", {"length": 96}, None, "the cache length is 96: it must be a multiple of 128"),
    ("gpu", {"length": 96}, None, "the cache length is 96: it must be a multiple of 128"),
    ("tpu", {}, decode_attention_tpu.BlockSizes(192, 2, 2), "blocks.keys is 192: .* a multiple"),
    ("tpu", {}, decode_attention_tpu.BlockSizes(512, 2, 2), "blocks.keys is 512: .* up to 384"),
    ("tpu", {}, decode_attention_tpu.BlockSizes(128, 1, 2), "blocks.buffers is 1: .* at least 2"),
    ("gpu", {}, decode_attention_gpu.BlockSizes(48, 192), "is 48, .* must be a power of two"),
    ("gpu", {}, decode_attention_gpu.BlockSizes(64, 96), "is 96: .* a multiple of blocks.keys"),
    ("gpu", {"queries": 17}, None, "there are 17 queries .* at most 16"),
    ("gpu", {"size": 96}, None, "size 96: .* a power of two"),
    ("gpu", {"dtype": "int8", "slots": 30_000}, None, "2\\*\\*31 to 2\\*\\*32"),
]  # fmt: skip


@pytest.mark.parametrize("name,shape,blocks,message", REFUSED)
def test_refused(name, shape, blocks, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(KERNELS[name].attend, blocks=blocks), *abstract(**shape))
