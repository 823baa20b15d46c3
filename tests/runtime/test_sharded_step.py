"""Oracle: one device. Key heads that `tensor` exceeds, vocabularies that it does not divide."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import placing
import pytest

from copsd_jax.losses import divergence_loss
from copsd_jax.model import lora, shared_prefix, transformer
from copsd_jax.model import policy as policy_lib
from copsd_jax.runtime import sharding
from copsd_jax.sampler import engine, handover, loop, request
from copsd_jax.training import layout, train_step

TINY = dataclasses.replace(transformer.SHAPES["tiny"], n_heads=8, n_kv_heads=2, head_dim=8)
SMALL = dataclasses.replace(TINY, d_model=48, n_heads=12, n_kv_heads=3)
QWEN2 = {"family": "qwen2", "qk_norm": False, "qkv_bias": True}
CASES = {  # config, tensor; 509 entries are a prime
    "2 key heads, 8 devices": (dataclasses.replace(TINY, vocab_size=509), 8),
    "3 key heads, 4 devices, biases, untied": (
        dataclasses.replace(SMALL, vocab_size=509, tie_embeddings=False, **QWEN2), 4,
    ),
}  # fmt: skip
FIRST, SECOND = CASES
TX = optax.sgd(1.0)
SCALE = 2.0


def decoder_of(config: transformer.ModelConfig, tensor: int) -> transformer.Decoder:
    repeats = sharding.count_sharded_key_repeats(config.n_heads, config.n_kv_heads, tensor)
    return transformer.Decoder(config, jnp.float32, key_repeats=repeats)


@functools.cache
def trees(config: transformer.ModelConfig) -> tuple[dict, dict]:
    """Weights with logits of some deviation, and an adapter whose b is not zero."""
    params = transformer.init_params(config, jax.random.key(0), jnp.float32)

    def noise(x, seed, size):
        return x + size * jax.random.normal(jax.random.key(seed), x.shape, x.dtype)

    params = jax.tree.map(lambda x: noise(x, 1, 0.1), params)
    adapter = lora.init_adapter(config, 4, lora.TARGETS, jax.random.key(2))
    return params, jax.tree.map(lambda x: noise(x, 3, 0.03), adapter)


def samples(rows: int = 8) -> layout.Batch:
    rng = np.random.default_rng(0)
    draw = lambda low, high: rng.integers(1, 509, rng.integers(low, high)).tolist()  # noqa: E731
    texts = [[draw(*size) for _ in range(rows)] for size in ((2, 12), (10, 25), (1, 9))]
    return layout.build_batch(*texts)


def step_of(config, tensor: int, trainable: str, out: object = None):
    options = train_step.Options(
        trainable=trainable, teacher="fixed", ema_decay=0.9, adapter_scale=SCALE,
        divergence=divergence_loss.Divergence(temperature=1.3), implementation="chunked", chunk=16,
        norm="global_token_mean", group=8, micro_batches=1,
    )  # fmt: skip
    return jax.jit(train_step.make_step(decoder_of(config, tensor), TX, options), out_shardings=out)


@pytest.mark.parametrize(
    "name, trainable",
    [
        pytest.param(FIRST, "lora", marks=pytest.mark.slow),
        pytest.param(FIRST, "full", marks=pytest.mark.slow),
        pytest.param(SECOND, "lora", marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradient_are_those_of_one_device(name, trainable):
    config, tensor = CASES[name]
    params, adapter = trees(config)
    batch = samples()
    # The full model starts away from the teacher, which keeps the given weights.
    trained = adapter if trainable == "lora" else jax.tree.map(lambda x: 1.1 * x, params)
    state = train_step.init_train_state(trained, TX, "fixed")
    alone, aux = step_of(config, 1, trainable)(state, params, batch, None, None)
    devices = sharding.make_mesh(1, 1, tensor, jax.devices()[:tensor])
    place = functools.partial(sharding.shard_by_name, mesh=devices, key_heads=config.n_kv_heads)
    places = sharding.shardings(state, devices, config.n_kv_heads)
    with jax.set_mesh(devices):
        step = step_of(config, tensor, trainable, (places, None))
        spread, spread_aux = step(
            place(state), place(params), placing.place_batch(batch, devices), None, None
        )
    np.testing.assert_allclose(spread_aux.metrics["loss"], aux.metrics["loss"], rtol=1e-5)
    for one, many, before in zip(
        *map(jax.tree.leaves, (alone.trained, spread.trained, trained)), strict=True
    ):
        gradient = np.asarray(one, np.float64) - np.asarray(before)
        gap = np.linalg.norm(np.asarray(many, np.float64) - np.asarray(one))
        assert np.linalg.norm(gradient) > 0
        assert gap <= 1e-5 * np.linalg.norm(gradient) + 1e-7 * np.linalg.norm(before)


PROMPTS = [(5, 6, 7), (1,), tuple(range(40, 61)), (5, 6, 7), (280,) * 9, (2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [FIRST, pytest.param(SECOND, marks=pytest.mark.slow)])
def test_sampled_tokens_are_those_of_one_device(name):
    """With a shared prefix and an adapter; texts of whole and of truncated distributions."""
    config, tensor = CASES[name]
    params, adapter = trees(config)
    sampling = [request.Sampling(10, 1.1), request.Sampling(10, 1.1, top_k=40, top_p=0.9)] * 3
    keys = request.derive_sampling_keys(0, "rollout", 0, [str(i) for i in range(6)], [0] * 6)

    def run(decoder, policy):
        prefix = shared_prefix.encode_prefix_ids(decoder, policy, (7, 250, 31))
        return loop.generate(
            decoder, policy, PROMPTS, sampling, keys=keys, prefix=prefix,
            settings=request.SamplerSettings(slots=4, steps=4),
        ).completions  # fmt: skip

    want = run(decoder_of(config, 1), policy_lib.Policy(params, adapter, SCALE))
    devices = sharding.make_mesh(1, 1, tensor, jax.devices()[:tensor])
    with jax.set_mesh(devices):
        place = functools.partial(sharding.shard_by_name, mesh=devices, key_heads=config.n_kv_heads)
        hand_over = handover.HandOver(
            devices, None, config.n_kv_heads, merge=False, int8=False, gather=True
        )
        placed = policy_lib.Policy(place(params), place(adapter), SCALE)
        got = run(decoder_of(config, tensor), hand_over(placed))
    assert [c.ids for c in got] == [c.ids for c in want]
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)
        np.testing.assert_allclose(one.logps_truncated, other.logps_truncated, atol=1e-5)


def test_padding_is_never_drawn():
    """A head that likes no entry: with padding of zeros among them, ids beyond 509 would come."""
    config = CASES[FIRST][0]
    params = trees(config)[0] | {"head": {"kernel": jnp.zeros((509, 64), jnp.float32)}}
    devices = sharding.make_mesh(1, 1, 8)
    keys = request.derive_sampling_keys(0, "rollout", 0, [str(i) for i in range(16)], [0] * 16)
    with jax.set_mesh(devices):
        placed = sharding.shard_by_name(params, devices, config.n_kv_heads)
        out = loop.generate(
            decoder_of(config, 8),
            policy_lib.Policy(placed),
            [(1, 2)] * 16,
            request.Sampling(40),
            keys=keys,
        ).completions
    drawn = np.array([c.ids for c in out])
    assert drawn.max() < 509
    assert len(np.unique(drawn)) > 300
    np.testing.assert_allclose([c.logps for c in out], -np.log(509), atol=1e-5)


def test_each_device_has_the_key_heads_of_its_queries():
    """K = 2 on 8 devices: 8 key heads with one query each, in the cache too."""
    config, tensor = CASES[FIRST]
    decoder = decoder_of(config, tensor)
    assert (decoder.key_repeats, decoder.key_heads) == (4, 8)
    devices = sharding.make_mesh(1, 1, tensor)
    state = jax.eval_shape(lambda: engine.init_slot_state(decoder, 4, 128, jnp.float32))
    assert state.cache.k.shape == (2, 4, 8, 128, 8)
    spec: Any = engine.partition_state(state, devices).cache.k
    assert jax.sharding.NamedSharding(devices, spec).shard_shape(state.cache.k.shape)[2] == 1
    params, _ = trees(config)
    one, many = transformer.Decoder(config, jnp.float32), decoder
    tokens = jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32)
    stream = transformer.Stream(tokens, jnp.arange(5, dtype=jnp.int32)[None], jnp.ones_like(tokens))
    kv = [d.apply({"params": params}, (stream,), return_kv=True)[0].kv for d in (one, many)]
    for few, repeated in zip(*kv, strict=True):
        for head in range(8):
            copy, first = repeated[:, :, :, head], repeated[:, :, :, head // 4 * 4]
            np.testing.assert_array_equal(copy, first)
            np.testing.assert_allclose(copy, few[:, :, :, head // 4], atol=1e-5)
