"""The decoder against a float64 NumPy forward, its ways of reading a text against each other."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_slow

from copsd_jax.attention import decode_attention, row_attention
from copsd_jax.model import lora, transformer

SCALING = transformer.RopeScaling(8.0, 1.0, 4.0, 64)
TINY = dataclasses.replace(
    transformer.SHAPES["tiny"],
    vocab_size=61,
    d_model=32,
    d_ff=48,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
)
CONFIGS = {
    "qwen3": TINY,
    "qwen2": dataclasses.replace(TINY, family="qwen2", qkv_bias=True, qk_norm=False, rms_eps=1e-3),
    "llama": dataclasses.replace(
        TINY, family="llama", qk_norm=False, tie_embeddings=False, rope_scaling=SCALING
    ),
}
F32 = jnp.float32


def random_params(config: transformer.ModelConfig, seed: int = 0) -> dict:
    """Weights large enough that every part matters, norm scales and biases not at 1 and 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.3, 0.5, leaf.shape), F32),
        transformer.abstract_params(config, F32),
    )


def adapter_of(config: transformer.ModelConfig, seed: int = 5) -> dict:
    """An adapter of rank 3 with a `b` that is not 0."""
    rng = np.random.default_rng(seed)
    tree = lora.init_adapter(config, 3, lora.TARGETS, jax.random.key(seed))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), F32), tree)


@functools.cache
def _apply(config, dtype, remat, block, return_kv, decode):
    decoder = transformer.Decoder(config, dtype, remat, block, decode)
    return jax.jit(lambda params, streams: decoder.apply({"params": params}, streams, return_kv))


def run(params, *streams, config=TINY, dtype=F32, remat="none", block=512, return_kv=False,
        decode="blocks"):  # fmt: skip
    return _apply(config, dtype, remat, block, return_kv, decode)(params, streams)


def text(rows: int, length: int, start: int = 0, seed: int = 1) -> transformer.Stream:
    """Random tokens, one segment, positions from `start`."""
    tokens = np.random.default_rng(seed).integers(0, TINY.vocab_size, (rows, length))
    positions = np.broadcast_to(np.arange(start, start + length), (rows, length))
    return stream(tokens, positions, np.ones((rows, length)))


def stream(tokens, positions, segments, **fields) -> transformer.Stream:
    arrays = [
        None if x is None else jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments)
    ]
    return transformer.Stream(*arrays, **fields)


def cut(
    whole: transformer.Stream, start: int, stop: int | None = None, **fields
) -> transformer.Stream:
    part = {
        name: getattr(whole, name)[:, start:stop]
        for name in ("tokens_BL", "positions_BL", "segments_BL")
    }
    return dataclasses.replace(whole, **part, **fields)


def empty_cache(rows: int, length: int, config=TINY, dtype=F32) -> decode_attention.Cache:
    shape = (config.n_layers, rows, config.n_kv_heads, length, config.head_dim)
    # Not zeros: what was never written must not be read.
    return decode_attention.Cache(jnp.full(shape, jnp.nan, dtype), jnp.full(shape, jnp.nan, dtype))


# --- the float64 oracle: one token at a time, no batch, no matrices of logits


def _rms(x, scale, eps):
    return x / np.sqrt((x * x).mean() + eps) * scale


def _angles(config):
    out = []
    for pair in range(config.head_dim // 2):
        frequency = 1.0 / config.rope_theta ** (2 * pair / config.head_dim)
        s = config.rope_scaling
        if s is not None:
            wavelength = 2 * np.pi / frequency
            if wavelength > s.original_max_position / s.low_freq_factor:
                frequency /= s.factor
            elif wavelength > s.original_max_position / s.high_freq_factor:
                smooth = s.original_max_position / wavelength - s.low_freq_factor
                smooth /= s.high_freq_factor - s.low_freq_factor
                frequency = (1 - smooth) * frequency / s.factor + smooth * frequency
        out.append(frequency)
    return np.array(out)


def _turn(x, position, config):
    """Each pair (i, i + H/2) as a complex number, turned."""
    half = config.head_dim // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * _angles(config))
    return np.concatenate([z.real, z.imag])


def _heads(layer, name, x, heads, position, config):
    y = x @ layer[name]["kernel"]
    if config.qkv_bias:
        y = y + layer[name]["bias"]
    y = y.reshape(heads, config.head_dim)
    if config.qk_norm and name != "v":
        y = np.stack([_rms(head, layer[name + "_norm"]["scale"], config.rms_eps) for head in y])
    if name != "v":
        y = np.stack([_turn(head, position, config) for head in y])
    return y


def reference(config, params, tokens, positions, segments) -> np.ndarray:
    """Hidden states of one row, [L, D] float64; padding is left 0."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    real = [i for i in range(len(tokens)) if segments[i] > 0]
    hidden = {i: params["embed"]["embedding"][tokens[i]] for i in real}
    group = config.n_heads // config.n_kv_heads
    for n in range(config.n_layers):
        layer = jax.tree.map(lambda leaf, n=n: leaf[n], params["layers"])
        x = {i: _rms(hidden[i], layer["attn_norm"]["scale"], config.rms_eps) for i in real}
        q, k, v = (
            {i: _heads(layer, name, x[i], heads, positions[i], config) for i in real}
            for name, heads in (
                ("q", config.n_heads), ("k", config.n_kv_heads), ("v", config.n_kv_heads),
            )
        )  # fmt: skip
        for i in real:
            seen = [j for j in real if j <= i and segments[j] == segments[i]]
            mixed = []
            for head in range(config.n_heads):
                z = np.array([q[i][head] @ k[j][head // group] for j in seen])
                weight = np.exp((z - z.max()) / np.sqrt(config.head_dim))
                values = np.stack([v[j][head // group] for j in seen])
                mixed.append(weight / weight.sum() @ values)
            hidden[i] = hidden[i] + np.concatenate(mixed) @ layer["o"]["kernel"]
            y = _rms(hidden[i], layer["mlp_norm"]["scale"], config.rms_eps)
            gate = y @ layer["gate"]["kernel"]
            inner = gate / (1 + np.exp(-gate)) * (y @ layer["up"]["kernel"])
            hidden[i] = hidden[i] + inner @ layer["down"]["kernel"]
    out = np.zeros((len(tokens), config.d_model))
    for i in real:
        out[i] = _rms(hidden[i], params["final_norm"]["scale"], config.rms_eps)
    return out


@pytest.mark.parametrize("family", CONFIGS)
def test_forward_equals_numpy(family):
    config = CONFIGS[family]
    params = random_params(config)
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, config.vocab_size, (2, 12))
    segments = np.array(
        [[1, 1, 1, 0, 2, 2, 2, 2, 2, 3, 0, 0], [0, 5, 5, 5, 5, 5, 5, 1, 1, 1, 1, 1]]
    )
    positions = np.array(
        [[0, 1, 2, 9, 30, 31, 32, 33, 34, 0, 0, 0], [0, 0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]]
    )
    (out,) = run(params, stream(tokens, positions, segments), config=config)
    for row in range(2):
        expected = reference(config, params, tokens[row], positions[row], segments[row])
        np.testing.assert_allclose(out.hidden_BLD[row], expected, atol=2e-5, rtol=2e-5)


def test_causality_by_gradient():
    params = random_params(TINY)
    tokens = np.arange(10)[None] + 7  # each once, so a row of the embedding is a token of the text
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0]])
    one = stream(tokens, np.arange(10)[None], segments)

    def hidden(embedding):
        (out,) = run({**params, "embed": {"embedding": embedding}}, one)
        return out.hidden_BLD[0].sum(axis=-1)

    slopes = jax.jit(jax.jacobian(hidden))(params["embed"]["embedding"])
    depends = np.abs(np.asarray(slopes)).sum(axis=-1)[:, tokens[0]] > 0
    same = (segments[0][:, None] == segments[0][None]) & (segments[0] > 0)[None]
    np.testing.assert_array_equal(depends, same & np.tri(10, dtype=bool))


def test_prefix_equals_the_whole_text_in_value_and_gradient():
    """Rows that share their first 5 tokens: encoded once, or written out in each row."""
    params, adapter = random_params(TINY), adapter_of(TINY)
    own = text(3, 7, start=5)
    shared = text(1, 5, seed=2)
    join = functools.partial(jnp.concatenate, axis=1)
    whole = transformer.Stream(
        join([jnp.broadcast_to(shared.tokens_BL, (3, 5)), own.tokens_BL]),
        jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[None], (3, 12)),
        jnp.ones((3, 12), jnp.int32),
    )
    weight = jax.random.normal(jax.random.key(0), (3, 7, TINY.d_model))

    def through_prefix(params, adapter):
        (first,) = run(params, dataclasses.replace(shared, adapter=adapter), return_kv=True)
        (out,) = run(params, dataclasses.replace(own, adapter=adapter, prefix=first.kv))
        return (out.hidden_BLD * weight).sum(), out.hidden_BLD

    def written_out(params, adapter):
        (out,) = run(params, dataclasses.replace(whole, adapter=adapter))
        return (out.hidden_BLD[:, 5:] * weight).sum(), out.hidden_BLD[:, 5:]

    through, out = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)) for f in (through_prefix, written_out)
    )
    (_, a), grads_a = through(params, adapter)
    (_, b), grads_b = out(params, adapter)
    np.testing.assert_allclose(a, b, atol=1e-5)
    close_trees(grads_a, grads_b)


def close_trees(a, b, tolerance=2e-5):
    """Equal to `tolerance` of each leaf's largest magnitude."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * float(jnp.abs(y).max()), rtol=0)


@pytest.mark.parametrize("implementation", ["dense", "blocks"])
@pytest.mark.parametrize("prefix_length", [0, 4])
def test_cache_decode_equals_full_forward(prefix_length, implementation):
    """One token at a time; the second row ends early and is dead from then on."""
    params, adapter = random_params(TINY), adapter_of(TINY)
    whole = dataclasses.replace(text(2, 14), adapter=adapter, adapter_scale=0.5)
    (full,) = run(params, whole, return_kv=True)
    prefix = None
    if prefix_length:  # row 1 begins with row 0's tokens, so that both may share the prefix
        tokens = whole.tokens_BL.at[1, :prefix_length].set(whole.tokens_BL[0, :prefix_length])
        whole = dataclasses.replace(whole, tokens_BL=tokens)
        (full,) = run(params, whole, return_kv=True)
        prefix = transformer.KV(*(x[:, :1, :prefix_length] for x in full.kv))
    lengths, cache = np.array([9, 6]), empty_cache(2, 128)
    for step in range(9):
        live = step < lengths
        at = prefix_length + np.minimum(step, lengths - 1)
        token = np.asarray(whole.tokens_BL)[[0, 1], at]
        one = stream(
            token[:, None], at[:, None], live[:, None],
            adapter=adapter, adapter_scale=0.5, prefix=prefix, cache=cache,
        )  # fmt: skip
        (out,) = run(params, one, decode=implementation)
        cache = out.cache
        for row in range(2):
            want = full.hidden_BLD[row, at[row]] if live[row] else np.zeros(TINY.d_model)
            np.testing.assert_allclose(out.hidden_BLD[row, 0], want, atol=1e-5)
    own = full.kv.k[:, :, prefix_length : prefix_length + 9].swapaxes(2, 3)
    for row in range(2):
        kept = cache.k[:, row, :, : lengths[row]]
        np.testing.assert_allclose(kept, own[:, row, :, : lengths[row]], atol=1e-5)
        assert jnp.isnan(cache.k[:, row, :, lengths[row] :]).all()  # a dead slot writes nothing


def test_padding_is_inert():
    params = random_params(TINY)
    segments = np.array([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
    base = text(2, 6)
    one = dataclasses.replace(base, segments_BL=jnp.asarray(segments, jnp.int32))
    tokens = np.where(segments > 0, base.tokens_BL, 60)
    other = stream(tokens, np.where(segments > 0, base.positions_BL, 1000), segments)
    prefix = transformer.KV(*jax.random.normal(jax.random.key(1), (2, 2, 1, 3, 2, 8)))

    def loss(params, s):
        (out,) = run(params, dataclasses.replace(s, prefix=prefix))
        return (out.hidden_BLD * out.hidden_BLD).sum() + out.hidden_BLD.sum(), out.hidden_BLD

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, a), grads = step(params, one)
    (_, b), other_grads = step(params, other)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a[segments == 0], 0)
    jax.tree.map(np.testing.assert_array_equal, grads, other_grads)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    unseen = np.setdiff1d(np.arange(61), np.asarray(base.tokens_BL)[0, :4])
    np.testing.assert_array_equal(np.asarray(grads["embed"]["embedding"])[unseen], 0)


def test_two_streams_equal_two_calls():
    params, adapter = random_params(TINY), adapter_of(TINY)
    student = dataclasses.replace(text(2, 6), adapter=adapter, adapter_scale=2.0)
    prefix = transformer.KV(*jax.random.normal(jax.random.key(1), (2, 2, 1, 3, 2, 8)))
    teacher = dataclasses.replace(
        text(3, 9, start=3, seed=8), prefix=prefix, adapter=adapter_of(TINY, 6), adapter_scale=0.3
    )
    both = run(params, student, teacher, return_kv=True)
    alone = (*run(params, student, return_kv=True), *run(params, teacher, return_kv=True))
    close_trees(both, alone, 1e-6)
    (plain,) = run(params, dataclasses.replace(student, adapter=None))
    assert np.abs(plain.hidden_BLD - both[0].hidden_BLD).max() > 0.01  # the scale and adapter count
    (scaled,) = run(params, dataclasses.replace(student, adapter_scale=1.0))
    assert np.abs(scaled.hidden_BLD - both[0].hidden_BLD).max() > 0.01


def _loss(params, adapter, prefix, own, **options):
    own = dataclasses.replace(own, adapter=adapter, prefix=prefix)
    (out,) = run(params, own, **options)
    weight = jax.random.normal(jax.random.key(4), out.hidden_BLD.shape)
    return (out.hidden_BLD * weight).sum()


@functools.cache
def _value_and_slopes(**options):
    return jax.jit(jax.value_and_grad(functools.partial(_loss, **options), (0, 1, 2)))


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    mostly_slow([{"block": 4, "remat": "layer"}, {"remat": "layer"}, {"block": 5}]),
    ids=str,
)
def test_remat_and_blocks_change_no_number(options, monkeypatch):
    """Block sizes that divide the length of 12 and that do not; gradients to all arguments."""
    monkeypatch.setattr(row_attention, "SMALL_WORK", 0)  # blocks also where rows are small
    params, adapter = random_params(TINY), adapter_of(TINY)
    prefix = transformer.KV(*jax.random.normal(jax.random.key(1), (2, 2, 1, 3, 2, 8)))
    own = text(2, 12, start=3)
    segments = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], jnp.int32)
    own = dataclasses.replace(own, segments_BL=segments)
    arguments = (params, adapter, prefix, own)
    close_trees(_value_and_slopes(**options)(*arguments), _value_and_slopes()(*arguments))


def _sizes(jaxpr) -> list[int]:
    """Elements of every intermediate array, inner programs included."""
    out = []
    for equation in jaxpr.eqns:
        out += [v.aval.size for v in equation.outvars]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            out += _sizes(getattr(inner, "jaxpr", inner))
    return out


def test_long_rows_never_hold_all_logits_and_a_prefix_is_never_repeated(monkeypatch):
    monkeypatch.setattr(row_attention, "SMALL_WORK", 0)  # blocks also where rows are small
    config = dataclasses.replace(TINY, n_layers=1)
    params = transformer.abstract_params(config, F32)
    shape = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    kv = jax.ShapeDtypeStruct((1, 1, 8192, 2, 8), F32)
    rows = transformer.Stream(shape, shape, shape)

    def largest(block, s):
        decoder = transformer.Decoder(config, F32, query_block=block)

        def loss(params, s):
            return decoder.apply({"params": params}, (s,))[0].hidden_BLD.sum()

        return max(_sizes(jax.make_jaxpr(jax.grad(loss))(params, s).jaxpr))

    logits = 2 * config.n_heads * 256 * 256
    assert largest(256, rows) >= logits
    assert largest(32, rows) <= logits // 8
    one = jax.ShapeDtypeStruct((64, 1), jnp.int32)
    decode = transformer.Stream(one, one, one, prefix=transformer.KV(kv, kv))
    # The largest array is the logits of 4 heads; keys for each row would be 2 x 8 a position.
    assert largest(32, decode) == 64 * config.n_heads * 8192


def test_cache_is_updated_in_place():
    config, rows, length = TINY, 4, 512
    cache = jax.eval_shape(lambda: empty_cache(rows, length))
    one = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    decoder = transformer.Decoder(config, F32)

    def decode(params, cache, tokens):
        def step(at, carry):
            cache, hidden = carry
            positions = jnp.full((rows, 1), at, jnp.int32)
            (out,) = decoder.apply({"params": params}, (stream_of(tokens, positions, cache),))
            return out.cache, hidden + out.hidden_BLD.sum()

        return jax.lax.fori_loop(0, 5, step, (cache, jnp.zeros((), F32)))

    def stream_of(tokens, positions, cache):
        return transformer.Stream(tokens, positions, None, cache=cache)

    compiled = jax.jit(decode, donate_argnums=1).lower(
        transformer.abstract_params(config, F32), cache, one
    )
    memory = compiled.compile().memory_analysis()
    held = sum(leaf.size * 4 for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= held
    # The blocks of one step of one layer, not a layer's cache.
    assert memory.temp_size_in_bytes < held / 2


def test_bfloat16_stays_near_float32():
    params, adapter = random_params(TINY), adapter_of(TINY)
    params = jax.tree.map(lambda leaf: leaf * jnp.asarray(0.3, F32), params)
    own = dataclasses.replace(text(2, 9), adapter=adapter)
    (exact,) = run(params, own, return_kv=True)
    for stored in (F32, jnp.bfloat16):
        weights = jax.tree.map(lambda leaf, stored=stored: leaf.astype(stored), params)
        (out,) = run(weights, own, dtype=jnp.bfloat16, return_kv=True)
        assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}
        error = np.abs(np.asarray(out.hidden_BLD, np.float32) - np.asarray(exact.hidden_BLD))
        assert error.mean() < 0.02 * np.abs(exact.hidden_BLD).mean()
        head = transformer.get_head(weights).astype(jnp.bfloat16)
        assert transformer.compute_model_logits(out.hidden_BLD, head).dtype == F32


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_head_and_logits(family):
    params = random_params(CONFIGS[family])
    leaf = params["head"]["kernel"] if family == "llama" else params["embed"]["embedding"]
    hidden = np.random.default_rng(0).normal(size=(2, 3, 32))
    expected = hidden @ np.asarray(leaf, np.float64).T
    got = transformer.compute_model_logits(jnp.asarray(hidden, F32), transformer.get_head(params))
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.slow
def test_init_has_the_abstract_tree_and_its_statistics():
    for config in CONFIGS.values():
        params = transformer.init_params(config, jax.random.key(0), F32)
        tree = transformer.abstract_params(config, F32)
        assert jax.tree.structure(params) == jax.tree.structure(tree)
        for (path, leaf), like in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(tree), strict=True
        ):
            assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
            name = path[-1].key
            if name in ("scale", "bias"):
                np.testing.assert_array_equal(leaf, 1 if name == "scale" else 0)
            else:
                assert 0.018 < np.std(leaf) < 0.022
    kernel = params["layers"]["q"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01  # layers differ
    assert {
        leaf.dtype for leaf in jax.tree.leaves(transformer.abstract_params(TINY, jnp.bfloat16))
    } == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("qwen3_0_6b", 596_049_920),
        ("qwen3_1_7b", 1_720_574_976),
        ("qwen3_4b", 4_022_468_096),
        ("qwen3_8b", 8_190_735_360),
        ("qwen3_32b", 32_762_123_264),
        ("smollm2_135m", 134_515_008),
    ],
)
def test_shapes_have_the_published_sizes(name, parameters):
    tree = transformer.abstract_params(transformer.SHAPES[name], jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == parameters


def test_refusals():
    params = random_params(TINY)
    with pytest.raises(ValueError, match=r"model\.remat is 'some'.*none, dots, attention, layer"):
        run(params, text(1, 2), remat="some")
    bare = dataclasses.replace(text(1, 2), segments_BL=None)
    with pytest.raises(ValueError, match="segments_BL is None"):
        run(params, bare)
