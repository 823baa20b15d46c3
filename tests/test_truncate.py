"""Oracle: float64 NumPy with a full sort of the vocabulary, and a chi-square of drawn tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copsd_jax.sampler import truncate

SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (1.0, 7, 1.0, 0.0),
    (1.1, 20, 0.95, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.3, 0, 0.5, 0.0),
    (1.0, 0, 1.0, 0.1),
    (0.8, 0, 0.8, 0.05),
    (1.5, 150, 0.7, 0.2),
    (0.0, 5, 0.9, 0.1),
]


def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()


def oracle(logits, temperature, top_k, top_p, min_p, valid):
    """Probabilities of one row, (tempered, truncated), by sorting; no ties at the edges."""
    every = logits.astype(np.float64)
    x = np.where(valid, every, -np.inf)
    if temperature == 0:
        return softmax(every), np.eye(len(x))[np.argmax(x)]
    tempered, drawable = softmax(every / temperature), softmax(x / temperature)
    order = np.argsort(-drawable, kind="stable")
    p = drawable[order]
    if top_k:
        p = np.where(np.arange(len(p)) < top_k, p, 0.0)
        p = p / p.sum()
    if top_p < 1:
        before = np.cumsum(p) - p
        p = np.where(before < top_p, p, 0.0)
        p = p / p.sum()
    p = np.where(p >= min_p * p[0], p, 0.0)
    out = np.empty_like(p)
    out[order] = p / p.sum()
    return tempered, out


def rows(vocab, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((5, vocab)) * scale).astype(np.float32)
    valid = np.ones(vocab, bool)
    valid[-3:] = False
    logits[:, -3:] = 12.0  # the likeliest ones, which must not be drawn
    return logits, valid


@functools.lru_cache
def compiled(function, settings):
    def run(logits, *rest):
        *keys, valid = rest
        return function(logits, *keys, *settings, valid)

    return jax.jit(run)


@pytest.mark.parametrize("vocab", [40, 256, 1000])
@pytest.mark.parametrize("settings", SETTINGS)
def test_log_probs_equal_sorted_float64(vocab, settings):
    if settings[1] > vocab:
        pytest.skip("top_k above the vocabulary is refused elsewhere")
    logits, valid = rows(vocab)
    tempered, truncated = compiled(truncate.log_probs, settings)(logits, jnp.asarray(valid))
    assert tempered.dtype == truncated.dtype == jnp.float32
    for j in range(len(logits)):
        want_tempered, want = oracle(logits[j], *settings, valid)
        np.testing.assert_array_equal(np.isfinite(truncated[j]), want > 0)
        np.testing.assert_allclose(np.exp(tempered[j]), want_tempered, rtol=2e-5, atol=1e-9)
        np.testing.assert_allclose(np.exp(truncated[j]), want, rtol=2e-5, atol=1e-9)


def test_extreme_logits_are_finite_where_kept():
    logits = np.full((2, 300), -1e4, np.float32)
    logits[0, 7] = 1e4
    logits[1, [3, 200]] = 1e4
    valid = jnp.ones(300, bool)
    for settings in ((1.0, 0, 0.9, 0.0), (1.0, 5, 0.9, 0.01), (1.0, 0, 1.0, 0.0)):
        _, truncated = compiled(truncate.log_probs, settings)(logits, valid)
        np.testing.assert_allclose(truncated[0, 7], 0.0, atol=1e-6)
        np.testing.assert_allclose(truncated[1, [3, 200]], np.log(0.5), atol=1e-6)
        assert not np.isnan(truncated).any()


def test_ties():
    """top-k keeps the lower ids of equal logits; top-p all tokens equal to the one that crosses."""
    logits = np.zeros((1, 300), np.float32)
    logits[0, [290, 291, 130, 20]] = [2.0, 1.0, 1.0, 1.0]
    valid = jnp.ones(300, bool)
    for k, want in ((2, {20, 290}), (4, {20, 130, 290, 291})):
        _, out = compiled(truncate.log_probs, (1.0, k, 1.0, 0.0))(logits, valid)
        assert set(np.flatnonzero(np.isfinite(out[0]))) == want
    _, out = compiled(truncate.log_probs, (1.0, 3, 0.6, 0.0))(logits, valid)
    assert set(np.flatnonzero(np.isfinite(out[0]))) == {20, 130, 290}


def test_top_k_by_blocks_equals_lax():
    """Many equal values, so that the order of ties shows."""
    rng = np.random.default_rng(3)
    x = rng.integers(0, 12, (4, 1408)).astype(np.float32)
    for k in (1, 3, 9, 50):
        value, index = jax.jit(functools.partial(truncate._top_k, k=k))(x)
        want_value, want_index = jax.lax.top_k(x, k)
        np.testing.assert_array_equal(value, want_value)
        np.testing.assert_array_equal(index, want_index)


@pytest.mark.parametrize("settings", SETTINGS)
def test_samples_by_chi_square(settings):
    """20,000 draws of one row against the exact distribution; deterministic keys."""
    count, vocab = 20_000, 300
    logits, valid = rows(vocab, seed=1, scale=2.0)
    keys = jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(jax.random.key(7), i)))(
        jnp.arange(count)
    )
    same = jnp.broadcast_to(logits[:1], (count, vocab))
    tokens, logp, logp_truncated = compiled(truncate.sample, settings)(
        same, keys, jnp.asarray(valid)
    )
    tempered, want = oracle(logits[0], *settings, valid)
    seen = np.bincount(np.asarray(tokens), minlength=vocab)
    assert not seen[want == 0].any()
    np.testing.assert_allclose(logp, np.log(tempered[tokens]), atol=2e-5)
    np.testing.assert_allclose(logp_truncated, np.log(want[tokens]), atol=2e-5)
    expected = want * count
    common = expected >= 5
    chi = ((seen - expected)[common] ** 2 / expected[common]).sum()
    rest = expected[~common].sum()
    if rest > 0:
        chi += (seen[~common].sum() - rest) ** 2 / rest
    freedom = common.sum() - (rest == 0)
    assert chi < freedom + 4 * np.sqrt(2 * freedom) + 1e-6  # 4 sigma


def test_a_row_depends_on_its_key_and_logits_alone():
    logits, valid = rows(300)
    keys = jax.random.bits(jax.random.key(1), (5, 2), jnp.uint32)
    order = np.array([3, 1, 4, 0, 2])
    for settings in ((1.0, 0, 1.0, 0.0), (1.0, 9, 0.9, 0.0), (1.0, 0, 0.9, 0.0)):
        run = compiled(truncate.sample, settings)
        plain = run(logits, keys, jnp.asarray(valid))
        mixed = run(logits[order], keys[order], jnp.asarray(valid))
        for a, b in zip(plain, mixed, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[order], b)


@pytest.mark.parametrize(
    "settings, name",
    [
        ((-0.1, 0, 1.0, 0.0), "temperature"),
        ((float("nan"), 0, 1.0, 0.0), "temperature"),
        ((1.0, 11, 1.0, 0.0), "top_k"),
        ((1.0, -1, 1.0, 0.0), "top_k"),
        ((1.0, 0, 0.0, 0.0), "top_p"),
        ((1.0, 0, 1.0, 1.0), "min_p"),
    ],
)
def test_settings_out_of_range(settings, name):
    with pytest.raises(ValueError, match=f"^{name} is .*must be"):
        truncate.check(*settings, vocab_size=10)
