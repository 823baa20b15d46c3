"""Closed forms of the divergences against the formulas written out in float64."""

import dataclasses
import functools

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from copsd_jax.losses import clips, divergences, token_values

NAMES = tuple(divergences.DIVERGENCES)
# The worked example of the clip: the teacher is sure of token 0, the student prefers token 1, five
# other tokens share the rest.
STUDENT = np.array([0.069, 0.514] + [0.417 / 5] * 5)
TEACHER = np.array([0.955, 0.007] + [0.038 / 5] * 5)


def _run(z_s, z_t, settings, tokens_T=None, compiled=False):
    """Compiled only where fusion could matter: most of the time is compilation."""
    tokens_T = np.zeros(len(z_s), np.int32) if tokens_T is None else tokens_T
    block = functools.partial(token_values.score_divergence_block, settings=settings)
    block = jax.jit(block, compiler_options=conftest.FUSED) if compiled else block
    out = block(jnp.asarray(z_s, jnp.float32), jnp.asarray(z_t, jnp.float32), jnp.asarray(tokens_T))
    return jax.tree.map(np.asarray, out)


def _example(**settings):
    """(value, gradient to the logits) of the worked example."""
    rows = np.log(STUDENT)[None], np.log(TEACHER)[None]
    stats, dz_TV = _run(*rows, divergences.Divergence(**settings))
    return stats.value_T[0], dz_TV[0]


def _logits(seed, rows=5, vocabulary=11, scale=2.0):
    rng = np.random.default_rng(seed)
    draw = rng.normal(size=(2, rows, vocabulary)) * scale
    return draw.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("beta", [0.3, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_table(name, beta):
    """The three closed gradients: p - q, p (ln(p/q) - KL), (1 - β) p (ln(p/M) - KL(p‖M))."""
    tau = 1.1
    z_s, z_t = _logits(0)
    p, q = oracle.softmax(z_s / tau), oracle.softmax(z_t / tau)
    mix = (1 - beta) * p + beta * q

    def kl(a, b):
        return (a * np.log(a / b)).sum(axis=1, keepdims=True)

    want = {
        "fkl": (p - q) / tau,
        "rkl": p * (np.log(p / q) - kl(p, q)) / tau,
        "jsd": (1 - beta) * p * (np.log(p / mix) - kl(p, mix)) / tau,
    }[name]
    value = {
        "fkl": kl(q, p),
        "rkl": kl(p, q),
        "jsd": beta * kl(q, mix) + (1 - beta) * kl(p, mix),
    }[name][:, 0]
    stats, dz_TV = _run(
        z_s, z_t, divergences.Divergence(divergence=name, beta=beta, temperature=tau)
    )
    np.testing.assert_allclose(dz_TV, want, rtol=0, atol=2e-6 * np.abs(want).max())
    np.testing.assert_allclose(stats.value_T, value, rtol=2e-6)


def test_element_clip_pushes_clipped_entries_down():
    """With U the unclipped entries and Q_U their teacher's mass: p Q_U - q on U, p Q_U off it."""
    z_s, z_t = _logits(1)
    p, q = oracle.softmax(z_s), oracle.softmax(z_t)
    kept = q * np.log(q / p) <= 0.05
    want = p * (q * kept).sum(axis=1, keepdims=True) - q * kept
    settings = divergences.Divergence(clip_mode="element", clip=0.05)
    stats, dz_TV = _run(z_s, z_t, settings)
    assert 0 < kept.mean() < 1
    assert (dz_TV[~kept] > 0).all()
    np.testing.assert_allclose(dz_TV, want, rtol=0, atol=2e-6)
    np.testing.assert_allclose(stats.clipped_mass_T, (q * ~kept).sum(axis=1), atol=2e-6)


def test_bug_08_element_clip_is_per_entry_as_in_the_reference():
    """Bug 8: the clip is of vocabulary entries; its numbers for one hard token."""
    clip = {"clip_mode": "element", "clip": 0.05}
    _, free = _example(divergence="fkl")
    _, clipped = _example(divergence="fkl", **clip)
    np.testing.assert_allclose([free[0], clipped[0]], [-0.886, 0.003], atol=6e-4)
    np.testing.assert_allclose([free[1], clipped[1]], [0.507, 0.017], atol=1.2e-3)
    _, free = _example(divergence="jsd", beta=0.5)
    _, clipped = _example(divergence="jsd", beta=0.5, **clip)
    np.testing.assert_allclose([free[1], clipped[1]], [0.056, -0.065], atol=6e-4)


def test_bug_09_jsd_scale():
    """Bug 9: the JSD's ends are not the two KLs unless it is divided by β (1 - β)."""
    fkl, _ = _example(divergence="fkl")
    rkl, _ = _example(divergence="rkl")
    np.testing.assert_allclose([fkl, rkl], [2.382, 3.059], rtol=0.015)
    plain = [_example(divergence="jsd", beta=b)[0] for b in (0.01, 0.99)]
    np.testing.assert_allclose(plain, [0.0232, 0.0288], rtol=0.015)
    normal = [_example(divergence="jsd", beta=b, normalize_beta=True)[0] for b in (0.01, 0.5, 0.99)]
    np.testing.assert_allclose(normal, [2.35, 1.93, 2.90], rtol=0.015)
    near = [_example(divergence="jsd", beta=b, normalize_beta=True)[0] for b in (1e-4, 1 - 1e-4)]
    np.testing.assert_allclose(near, [fkl, rkl], rtol=2e-3)


@pytest.mark.parametrize("clip_mode", divergences.CLIP_MODES)
@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits(name, clip_mode):
    """Logits of ±1e4: finite, and equal to float64 where that is finite too."""
    z_s = np.array([[1e4, -1e4, 0, 1], [-1e4, 1e4, 0, 0], [1e4, 1e4, -1e4, 0], [0, 0, 0, 0]])
    z_t = np.array([[-1e4, 1e4, 0, 1], [-1e4, 1e4, 0, 0], [1e4, 0, -1e4, 1e4], [1e4, 0, 0, 0]])
    for normalize_beta in (False, True):
        settings = divergences.Divergence(
            divergence=name, beta=0.3, normalize_beta=normalize_beta, clip_mode=clip_mode
        )
        stats, dz_TV = _run(z_s, z_t, settings)
        for leaf in jax.tree.leaves((stats, dz_TV)):
            assert np.isfinite(leaf).all()
        frozen = oracle.freeze(z_s, z_t, np.zeros(4, int), settings)
        want = oracle.value(z_s, z_t, np.zeros(4, int), settings, frozen)
        np.testing.assert_allclose(stats.value_T, want, rtol=2e-6, atol=1e-6)
        np.testing.assert_array_equal(dz_TV[1], 0)  # equal rows


@pytest.mark.parametrize("clip_mode", ["none", "element"])
@pytest.mark.parametrize("name", NAMES)
def test_equal_logits_are_exactly_zero(name, clip_mode):
    z = np.random.default_rng(2).normal(size=(16, 1000)) * 4
    settings = divergences.Divergence(
        divergence=name, beta=0.3, clip_mode=clip_mode, temperature=1.1
    )
    stats, dz_TV = _run(z, z, settings, compiled=True)
    np.testing.assert_array_equal(stats.value_T, 0)
    np.testing.assert_array_equal(dz_TV, 0)
    np.testing.assert_array_equal(stats.clipped_mass_T, 0)


@pytest.mark.parametrize("name", NAMES)
def test_nearly_equal_sides(name):
    """Small divergences: the value to 2e-6 nats, the gradient to 1e-4 of its largest entry."""
    rng = np.random.default_rng(3)
    z_s = (rng.normal(size=(4, 1000)) * 2).astype(np.float32).astype(np.float64)
    z_t = (z_s + rng.normal(size=z_s.shape) * 0.03).astype(np.float32).astype(np.float64)
    settings = divergences.Divergence(divergence=name, beta=0.3)
    frozen = oracle.freeze(z_s, z_t, np.zeros(4, int), settings)
    stats, dz_TV = _run(z_s, z_t, settings)
    want = oracle.value(z_s, z_t, np.zeros(4, int), settings, frozen)
    assert 5e-5 < want.min() < want.max() < 6e-4
    np.testing.assert_allclose(stats.value_T, want, rtol=0, atol=2e-6)
    slope = oracle.slope(z_s, z_t, np.zeros(4, int), settings, frozen)
    np.testing.assert_allclose(dz_TV, slope, rtol=0, atol=1e-4 * np.abs(slope).max())


def test_token_clips():
    """The three clips of a whole token, below and above κ = .05."""
    d_T = jnp.array([0.0, 0.02, 0.05, 0.2], jnp.float32)
    want = {
        "none": ([0, 0.02, 0.05, 0.2], [1, 1, 1, 1]),
        "token": ([0, 0.02, 0.05, 0.05], [1, 1, 1, 0]),
        "token_weight": ([0, 0.02, 0.05, 0.05], [1, 1, 1, 0.25]),
        "huber": ([0, 0.004, 0.025, 0.175], [0, 0.4, 1, 1]),
    }
    for mode, (value, factor) in want.items():
        got = clips.clip_tokens(d_T, divergences.Divergence(clip_mode=mode, clip=0.05))
        np.testing.assert_allclose(got[0], value, rtol=1e-6, err_msg=mode)
        np.testing.assert_allclose(got[1], factor, rtol=1e-6, err_msg=mode)


def test_statistics():
    z_s, z_t = _logits(4)
    tokens_T = np.array([3, 0, 10, 7, 7], np.int32)
    settings = divergences.Divergence(temperature=0.7, top_k=3, sampling_temperature=1.9)
    stats, _ = _run(z_s, z_t, settings, tokens_T)
    sampling_TV = oracle.log_softmax(z_s / 1.9)
    np.testing.assert_allclose(
        stats.logp_sampling_T, sampling_TV[np.arange(5), tokens_T], rtol=2e-6
    )
    for z, logp_T, entropy_T in (
        (z_s, stats.logp_student_T, stats.entropy_student_T),
        (z_t, stats.logp_teacher_T, stats.entropy_teacher_T),
    ):
        logp_TV = oracle.log_softmax(z / 0.7)
        np.testing.assert_allclose(logp_T, logp_TV[np.arange(5), tokens_T], rtol=2e-6)
        np.testing.assert_allclose(entropy_T, -(np.exp(logp_TV) * logp_TV).sum(1), rtol=2e-6)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"divergence": "kl"}, "fkl.*rkl.*jsd.*sampled"),
        ({"clip_mode": "hard"}, "element.*huber"),
        ({"beta": 1.0}, "beta is 1.0"),
        ({"temperature": 0.0}, "temperature"),
        ({"sampling_temperature": 0.0}, "sampling_temperature is 0"),
        ({"clip": 0.0}, "clip"),
        ({"top_k": -1}, "top_k"),
        ({"divergence": "sampled", "top_k": 5}, "sampled"),
        ({"top_k_of": "both"}, "teacher.*student.*union"),
        ({"tail": True}, "top_k is 0"),
        ({"ratio_clip": -1.0}, "ratio_clip is -1"),
        ({"rollout_clip": -2.0}, "rollout_clip is -2"),
        ({"divergence": "sampled", "clip_mode": "token"}, "sampled"),
    ],
)
def test_wrong_settings_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(divergences.Divergence(), **wrong)
