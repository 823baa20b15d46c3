"""Packing and sharding of rows against plain loops over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copsd_jax.losses import token_blocks
from copsd_jax.runtime import sharding


def test_blocks_by_hand():
    """As few as allowed, evenly filled, in whole strips: 36 rows, at most 16."""
    assert token_blocks.divide_evenly(36, 16, 1) == (3, 12)
    assert token_blocks.divide_evenly(36, 16, 8) == (3, 16)
    assert token_blocks.divide_evenly(10, 4, 8) == (3, 4)
    assert token_blocks.divide_evenly(1, 1024, 8) == (1, 1)
    assert token_blocks.divide_evenly(1000, 1024, 8) == (1, 1000)


def _walk(rows, live_T, most, multiple, calls):
    def work(block):
        x_TD, n_T = block
        jax.debug.callback(lambda n: calls.append(np.asarray(n).tolist()), n_T)
        total = jnp.sum(x_TD, axis=0)
        return (x_TD * 2 + total[None], {"n": n_T + 1}), total

    return token_blocks.walk(work, rows, live_T, most, multiple)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 1.0])
@pytest.mark.parametrize("tokens, most", [(9, 2), (9, 4), (33, 5), (7, 7), (1, 3)])
def test_only_live_rows_are_walked(tokens, most, share):
    """In their order, in ceil(live / block) calls; other rows hold NaN, and come back as 0."""
    rng = np.random.default_rng(tokens)
    live_T = rng.random(tokens) < share
    x_TD = np.where(live_T[:, None], rng.normal(size=(tokens, 3)), np.nan).astype(np.float32)
    n_T = np.arange(1, tokens + 1, dtype=np.int32)
    calls: list = []
    (doubled, others), total = jax.jit(lambda *rows: _walk(rows, live_T, most, 1, calls))(x_TD, n_T)
    jax.effects_barrier()
    blocks, count = token_blocks.divide_evenly(tokens, most, 1)
    at = np.flatnonzero(live_T)
    if blocks > 1:
        parts = [at[i : i + count] for i in range(0, len(at), count)]
        want = [[*(part + 1).tolist(), *[0] * (count - len(part))] for part in parts]
        assert sorted(calls) == sorted(want)
    else:
        parts = [at]
        assert calls == [np.where(live_T, n_T, 0).tolist()]
    want_TD = np.zeros_like(x_TD)
    for part in parts:
        want_TD[part] = x_TD[part] * 2 + x_TD[part].sum(axis=0)
    np.testing.assert_allclose(doubled, want_TD, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(others["n"], np.where(live_T, n_T + 1, 0))
    np.testing.assert_allclose(total, x_TD[at].sum(axis=0), rtol=1e-5, atol=1e-6)


def test_the_picture_of_the_module():
    """Live rows 1 2 5 7 8 of 9 in blocks of 2."""
    live_T = np.isin(np.arange(9), [1, 2, 5, 7, 8])
    calls: list = []
    rows = (np.ones((9, 1), np.float32), np.arange(9, dtype=np.int32))
    _walk(rows, live_T, 2, 1, calls)
    jax.effects_barrier()
    assert calls == [[1, 2], [5, 7], [8, 0]]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 1, 8), (1, 8, 1)])
def test_rows_and_entries_on_a_mesh(shape, split):
    """x · headᵀ summed over entries, and Σ x over rows for each entry, of sizes that no axis
    divides; width 6 is divided by fsdp 2 and not by 8."""
    rng = np.random.default_rng(0)
    x_TD, head_VD = (rng.normal(size=(n, 6)).astype(np.float32) for n in (13, 11))
    devices = sharding.make_mesh(*shape)

    def work(rows, heads, axis):
        total_T = jnp.sum(rows @ heads[0].T, axis=1)
        assert axis == ("tensor" if split and shape[2] > 1 else None)
        total_T = jax.lax.psum(total_T, axis) if axis else total_T
        return total_T, heads[0] * jnp.sum(rows, axis=0)[None]

    with jax.set_mesh(devices):
        run = jax.jit(lambda x, head: token_blocks.spread(work, x, (head,), split))
        total_T, grad_VD = run(x_TD, head_VD)
    np.testing.assert_allclose(total_T, (x_TD @ head_VD.T).sum(axis=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad_VD, head_VD * x_TD.sum(axis=0), rtol=1e-5, atol=1e-5)
