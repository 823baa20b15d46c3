"""What each policy keeps, in bytes by formula, and what it computes again, in FLOP.

Oracles: gradients without remat, sizes written out by hand, products counted in compiled programs.
"""

import dataclasses
import functools
from typing import Any

import conftest
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copsd_jax.model import lora, transformer

CONFIG = dataclasses.replace(transformer.SHAPES["tiny"], vocab_size=32, n_layers=3, d_ff=96)
B, L, LAYERS, D, F, N, K, H, R = 2, 40, 3, 64, 96, 4, 2, 16, 4
POLICIES = ["none", "dots", "attention", "layer"]


@functools.cache
def trees():
    params = transformer.init_params(CONFIG, jax.random.key(0), jnp.float32)
    adapter = lora.init_adapter(CONFIG, R, lora.TARGETS, jax.random.key(1))
    return params, jax.tree.map(lambda x: x + jnp.float32(0.03), adapter)


def loss(adapter, params, tokens, remat="none", streams=1):
    """Of one stream, or of one whose teacher goes through the layers with it."""
    own = transformer.Stream(tokens, tokens, jnp.ones_like(tokens), adapter)
    rows = (own, dataclasses.replace(own, adapter=None))[:streams]
    apply: Any = transformer.Decoder(CONFIG, jnp.float32, remat).apply
    out = apply({"params": params}, rows)
    target = jax.lax.stop_gradient(out[-1].hidden_BLD)
    return jnp.sum(jnp.sin(out[0].hidden_BLD) * target)


def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 32, (B, L)), jnp.int32)


@functools.cache
def grads(remat):
    return jax.jit(jax.grad(functools.partial(loss, remat=remat)))(*trees()[::-1], tokens())


@pytest.mark.long
@pytest.mark.parametrize("remat", conftest.mostly_slow(POLICIES[1:]))
def test_gradients_are_those_without_remat(remat):
    for mine, theirs in zip(jax.tree.leaves(grads(remat)), jax.tree.leaves(grads("none")),
                            strict=True):  # fmt: skip
        assert np.abs(theirs).max() > 1e-3
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


def kept(remat, **options):
    """Values per token and layer that the backward pass is handed."""

    def back(adapter, params, rows):
        return jax.vjp(lambda a: loss(a, params, rows, remat, **options), adapter)[1]

    shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(back, *trees()[::-1], tokens()))]
    return sum(int(np.prod(s[3:])) for s in shapes if s[:3] == (LAYERS, B, L))


def test_what_is_kept():
    flash = N * H + N  # output and log-sum-exp of attention
    assert kept("layer") == D
    assert kept("attention") == D + flash
    assert kept("dots") == D + flash + N * H + 2 * K * H + D + 2 * F
    assert kept("none") > 2 * kept("dots")


@pytest.mark.parametrize("remat", POLICIES)
def test_nothing_of_the_teacher_is_kept(remat):
    assert kept(remat, streams=2) == kept(remat)


@functools.cache
def matmuls(remat, streams, slope=True):
    run = functools.partial(loss, remat=remat, streams=streams)
    run = jax.jit(jax.grad(run) if slope else run)
    text: Any = run.lower(*trees()[::-1], tokens()).compile().as_text()
    return hlo.matmuls(text, 1)


WIDTHS = (D + N * H) * 2 + (D + K * H) * 2 + (D + F) * 3  # of the adapters, in and out
LOW, NARROW = 2 * R * WIDTHS, 2 * R * (5 * D + N * H + F)  # both products, and x a alone
PROJECTIONS = 2 * (2 * D * N * H + 2 * D * K * H + 3 * D * F)
WEIGHTED = 2 * L * N * H  # of attention's two products one


@pytest.mark.long
def test_what_is_computed_again():
    """FLOP per token and layer.

    A layer's last product is never needed again, but for the adapter's x a. Attention's logits are
    computed once for the layer and its gradient.
    """
    a_token = LAYERS * B * L
    forward = matmuls("none", 1, slope=False)
    assert forward == a_token * (PROJECTIONS + LOW + 2 * WEIGHTED)
    again = {name: (matmuls(name, 1) - matmuls("none", 1)) / a_token for name in POLICIES}
    layer = PROJECTIONS + LOW - 2 * D * F - 2 * R * D
    # With jax 0.12 one of attention's two products more, as observed; which one is not known.
    logits = WEIGHTED if conftest.OLD_JAX else 2 * WEIGHTED
    assert again == {
        "none": 0, "dots": NARROW, "attention": layer, "layer": layer + logits,
    }  # fmt: skip


@pytest.mark.parametrize("remat", conftest.mostly_slow(POLICIES))
def test_the_teacher_runs_forward_once(remat):
    """It has no adapter here."""
    alone = matmuls("none", 1, slope=False) - LAYERS * B * L * LOW
    assert matmuls(remat, 2) - matmuls(remat, 1) == alone
