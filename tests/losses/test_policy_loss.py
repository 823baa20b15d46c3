"""Advantages and the clipped surrogate by hand; the sum of all parts against differences."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from copsd_jax.losses import divergence_loss, loss_norms, policy_loss

OFF = {"clip_low": 0.0, "clip_high": 0.0, "dual_clip": 0.0}


def test_advantages_by_hand():
    """Three prompts, dealt out in any order, and one completion that stands alone.

    Group 7 has rewards 1 0 0 1: mean .5, Σ (r - mean)² = 1, std √(1/3) = .57735, so ±.5 / .57745.
    Group 2 has 0 0 0 1: mean .25, Σ = .75, std .5: -.25 and .75 over .5001.
    Group 5 is all right, group 9 alone: 0.
    """
    groups_B = np.array([7, 2, 7, 5, 2, 7, 2, 5, 9, 7, 2])
    rewards_B = np.array([1.0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1])
    plain = [0.5, -0.25, -0.5, 0, -0.25, -0.5, -0.25, 0, 0, 0.5, 0.75]
    scaled = [
        0.865876, -0.4999, -0.865876, 0, -0.4999, -0.865876, -0.4999, 0, 0, 0.865876, 1.4997,
    ]  # fmt: skip
    got = policy_loss.compute_advantages(rewards_B, groups_B, scale="none")
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, plain)
    got = policy_loss.compute_advantages(rewards_B, groups_B, scale="std")
    np.testing.assert_allclose(got, scaled, atol=1e-6)
    want = [True, True, True, False, True, True, True, False, False, True, True]
    np.testing.assert_array_equal(
        policy_loss.mark_policy_loss_completions(rewards_B, groups_B), want
    )


def test_advantages_of_graded_rewards():
    """Group by group with NumPy's own mean and deviation; equal fractions give 0, not 1e-17 / ε."""
    rng = np.random.default_rng(0)
    groups_B = rng.integers(0, 5, 40)
    rewards_B = rng.choice([0.0, 0.1, 0.7, 1.0], 40)
    got = policy_loss.compute_advantages(rewards_B, groups_B, scale="std", eps=0.01)
    for group in range(5):
        inside = rewards_B[groups_B == group]
        want = (inside - inside.mean()) / (
            np.sqrt(inside.var() * len(inside) / (len(inside) - 1)) + 0.01
        )
        np.testing.assert_allclose(got[groups_B == group], want, rtol=1e-12)
    same = policy_loss.compute_advantages(np.full(10, 0.1), np.zeros(10, int), scale="std", eps=0.0)
    np.testing.assert_array_equal(same, 0)
    assert len(policy_loss.compute_advantages(np.zeros(0), np.zeros(0, int), scale="std")) == 0


def test_ratio_clip_by_hand():
    """Low .2, high .28, dual 3; ratios .5, .9, 1.2, 1.5 and 4, advantages 2 and -1.

    A = 2: -2ρ up to 1.28. A = -1: ρ from .8 up to 3, whatever the upper bound. Where a bound is in
    force there is no gradient; elsewhere it is -A ρ.
    """
    ratio = np.array([0.5, 0.9, 1.2, 1.5, 4.0])
    logp_BC = jnp.asarray(np.log([ratio, ratio]), jnp.float32)
    advantage_BC = jnp.asarray([[2.0] * 5, [-1.0] * 5], jnp.float32)
    bounds = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}

    def total(logp_BC):
        out = policy_loss.compute_surrogate(
            logp_BC, jnp.zeros_like(logp_BC), advantage_BC, **bounds
        )
        return jnp.sum(out[0]), out

    (_, (loss_BC, clipped_BC)), grad_BC = jax.value_and_grad(total, has_aux=True)(logp_BC)
    want = [[-1, -1.8, -2.4, -2.56, -2.56], [0.8, 0.9, 1.2, 1.5, 3]]
    np.testing.assert_allclose(loss_BC, want, rtol=1e-6)
    np.testing.assert_array_equal(clipped_BC, [[0, 0, 0, 1, 1], [1, 0, 0, 0, 1]])
    np.testing.assert_allclose(grad_BC, [[-1, -1.8, -2.4, 0, 0], [0, 0.9, 1.2, 1.5, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    "low, high, dual", list(itertools.product((0.0, 0.2), (0.0, 0.3), (0.0, 2.5)))
)
def test_surrogate_is_the_published_minimum(low, high, dual):
    """Each bound on and off, against min and max spelled out, value and slope, in float64."""
    rng = np.random.default_rng(1)
    logp, old = rng.normal(size=(2, 6, 9))
    advantage = rng.normal(size=(6, 9))
    advantage[0, :3] = 0
    bounds = {"clip_low": low, "clip_high": high, "dual_clip": dual}
    with jax.enable_x64(True):
        args = (jnp.asarray(old), jnp.asarray(advantage))

        def total(logp_BC):
            out = policy_loss.compute_surrogate(logp_BC, *args, **bounds)
            return jnp.sum(out[0]), out

        (_, (loss_BC, clipped_BC)), grad_BC = jax.value_and_grad(total, has_aux=True)(
            jnp.asarray(logp)
        )
    loss_BC, clipped_BC, grad_BC = map(np.asarray, (loss_BC, clipped_BC, grad_BC))
    published = np.vectorize(lambda *x: oracle.policy_loss(*x, **bounds))
    np.testing.assert_allclose(loss_BC, published(logp, old, advantage), rtol=1e-12)
    ends = [published(logp + step, old, advantage) for step in (1e-6, -1e-6)]
    slope = (ends[0] - ends[1]) / 2e-6
    np.testing.assert_allclose(grad_BC, slope, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(clipped_BC, (slope == 0) & (advantage != 0))
    assert clipped_BC.any() == bool(low or high or dual)


def test_on_policy_it_is_the_policy_gradient():
    """ρ = 1: the value is -A, the slope -A, nothing is clipped; and old and A are constants."""
    logp_BC = jnp.asarray([[-0.1, -2.0, -7.0]], jnp.float32)
    advantage_BC = jnp.asarray([[1.5, -0.5, 0.0]], jnp.float32)

    def total(*args):
        out = policy_loss.compute_surrogate(*args, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
        return jnp.sum(out[0]), out

    grads, (loss_BC, clipped_BC) = jax.grad(total, (0, 1, 2), has_aux=True)(
        logp_BC, logp_BC, advantage_BC
    )
    assert not clipped_BC.any()
    np.testing.assert_array_equal(loss_BC, -advantage_BC)
    np.testing.assert_array_equal(grads[0], -advantage_BC)
    np.testing.assert_array_equal(grads[1:], 0)


def test_far_ratios_stay_finite():
    """1e30 nats apart: bounded by e^20, and 0 where the advantage is 0."""
    logp_BC = jnp.asarray([[1e30, -1e30, 1e30]], jnp.float32)
    advantage_BC = jnp.asarray([[-1.0, -1.0, 0.0]], jnp.float32)
    loss_BC, _ = policy_loss.compute_surrogate(logp_BC, jnp.zeros((1, 3)), advantage_BC, **OFF)
    np.testing.assert_allclose(loss_BC, [[np.exp(20), np.exp(-20), 0]], rtol=1e-5)


def test_kl_estimate():
    """By hand, and unbiased: its mean under the policy is the KL of two known distributions."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    got = policy_loss.estimate_kl(
        jnp.log(jnp.asarray(p, jnp.float32)), jnp.log(jnp.asarray(q, jnp.float32))
    )
    np.testing.assert_allclose(got, q / p - np.log(q / p) - 1, rtol=1e-5)
    np.testing.assert_allclose(got @ p, (p * np.log(p / q)).sum(), rtol=1e-5)
    np.testing.assert_array_equal(policy_loss.estimate_kl(got, got), 0)
    own, other = jax.grad(lambda *x: policy_loss.estimate_kl(*x).sum(), (0, 1))(
        jnp.asarray([-1.0]), jnp.asarray([-1.5])
    )
    np.testing.assert_allclose(own, 1 - np.exp(-0.5), rtol=1e-6)
    np.testing.assert_array_equal(other, 0)


@pytest.mark.parametrize("norm", ["seq_mean_all", "constant", "global_token_mean"])
def test_grpo_through_the_head(norm):
    """-(1/B) Σ_i 1/|o_i| Σ_t min(ρA, clip(ρ)A) + k3, written out, and its differences against
    the same from hidden states, in float64: GRPO, Dr. GRPO and DAPO differ in the norm."""
    rng = np.random.default_rng(2)
    B, C, D, V = 4, 6, 5, 13
    mask_BC = np.arange(C)[None] < np.array([6, 2, 5, 3])[:, None]
    hidden, head = rng.normal(size=(B * C, D)), rng.normal(size=(V, D))
    tokens = rng.integers(0, V, B * C).astype(np.int32)
    old_BC, ref_BC = (rng.normal(size=(B, C)) * 0.4 - 2.5 for _ in range(2))
    advantage_B = policy_loss.compute_advantages(
        np.array([1.0, 0, 1, 0]), np.array([0, 0, 1, 1]), scale="std"
    )
    bounds = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}

    def written_out(hidden):
        logp_TV = oracle.log_softmax(hidden @ head.T / 0.9)
        logp_BC = logp_TV[np.arange(B * C), tokens].reshape(B, C)
        total = 0.0
        for i, t in zip(*np.nonzero(mask_BC), strict=True):
            x = ref_BC[i, t] - logp_BC[i, t]
            value = oracle.policy_loss(logp_BC[i, t], old_BC[i, t], advantage_B[i], **bounds)
            value += 0.04 * (np.exp(x) - x - 1)
            total += (
                value
                / {
                    "seq_mean_all": B * mask_BC[i].sum(),
                    "constant": B * 8,
                    "global_token_mean": mask_BC.sum(),
                }[norm]
            )
        return total

    def loss(hidden):
        logp_BC = divergence_loss.log_probs(
            hidden, head, tokens, temperature=0.9, implementation="chunked", chunk=8,
            live_T=mask_BC.reshape(-1),
        )[0].reshape(B, C)  # fmt: skip
        advantage_BC = jnp.asarray(np.repeat(advantage_B[:, None], C, axis=1))
        value_BC, _ = policy_loss.compute_surrogate(
            logp_BC, jnp.asarray(old_BC), advantage_BC, **bounds
        )
        value_BC = value_BC + 0.04 * policy_loss.estimate_kl(logp_BC, jnp.asarray(ref_BC))
        weight_BC = oracle.weights(mask_BC, norm, B, 8)
        assert np.allclose(
            weight_BC, loss_norms.compute_token_weights(mask_BC, norm, 0, 8), rtol=1e-6
        )
        return jnp.sum(weight_BC * value_BC)

    with jax.enable_x64(True):
        value, grad = jax.value_and_grad(loss)(jnp.asarray(hidden))
        value, grad = float(value), np.asarray(grad)
    np.testing.assert_allclose(value, written_out(hidden), rtol=1e-10)
    slope = np.zeros_like(hidden)
    for at in np.ndindex(hidden.shape):
        step = np.zeros_like(hidden)
        step[at] = 1e-6
        slope[at] = (written_out(hidden + step) - written_out(hidden - step)) / 2e-6
    np.testing.assert_allclose(grad, slope, rtol=0, atol=1e-6 * np.abs(slope).max())
    np.testing.assert_array_equal(grad.reshape(B, C, D)[~mask_BC], 0)


@pytest.mark.parametrize(
    "rewards, groups, scale, words",
    [
        ([1.0, 0.0], [0, 0], "batch", "'batch'.*std.*none"),
        ([1.0, 0.0], [0], "std", r"\(2,\) and groups \(1,\)"),
        ([1.0, 0.0, np.nan], [0, 0, 0], "std", r"rewards_B\[2\] is not finite"),
    ],
)
def test_wrong_rewards_are_refused(rewards, groups, scale, words):
    with pytest.raises(ValueError, match=words):
        policy_loss.compute_advantages(np.array(rewards), np.array(groups), scale=scale)


@pytest.mark.parametrize("wrong", [{"clip_low": 1.0}, {"clip_high": -0.1}, {"dual_clip": 1.0}])
def test_wrong_bounds_are_refused(wrong):
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=re.escape(" ".join(map(str, *wrong.items())))):
        policy_loss.compute_surrogate(x, x, x, **{**OFF, **wrong})
