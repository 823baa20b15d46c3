"""Eight devices give what one gives: value, statistics, gradients to states and head."""

import jax
import jax.numpy as jnp
import loss_cases
import numpy as np
import pytest

from copsd_jax.losses import divergence_loss
from copsd_jax.runtime import sharding

pytestmark = pytest.mark.slow  # minutes; `make kernels`

USUAL = {
    "divergence": "jsd", "clip": "element", "top_k": "all", "weights": "live", "temperature": 1.3,
    "dtype": "float32", "inputs": "normal",
}  # fmt: skip
# fsdp splits the width 8; 23 tokens and 61 entries are divided by no axis.
CASES = [
    ("chunked", (2, 2, 2), {}),
    ("chunked", (8, 1, 1), {"divergence": "sampled", "clip": "none", "weights": "ratio"}),
    ("chunked", (1, 1, 8), {"divergence": "fkl", "clip": "token_weight", "inputs": "extreme"}),
    ("chunked", (2, 2, 2), {"top_k": "union tail", "weights": "some"}),
    ("pallas_tpu", (2, 2, 2), {}),
    ("pallas_gpu", (2, 2, 2), {"divergence": "fkl", "weights": "ratio"}),
    ("pallas_tpu", (2, 2, 2), {"divergence": "sampled", "clip": "none", "weights": "ratio"}),
    ("pallas_gpu", (1, 1, 8), {"divergence": "sampled", "clip": "none"}),
    ("dense", (2, 2, 2), {}),
]


@pytest.mark.parametrize("implementation, shape, changes", CASES)
def test_eight_devices_equal_one(implementation, shape, changes):
    case = loss_cases.Case({**USUAL, **changes, "implementation": implementation})
    inputs, settings, _ = loss_cases.ready(case)
    args = (inputs.arrays, inputs.weight_T, inputs.live_T)
    want = loss_cases.run(implementation, settings, *args)
    devices = sharding.make_mesh(*shape)
    with jax.set_mesh(devices):
        got = jax.jit(loss_cases.run, static_argnums=(0, 1))(implementation, settings, *args)
    for mine, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        largest = max(np.abs(theirs).max(), 1e-30)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * largest)


LIVE = (24, 5, 0, 1)  # rows of each of four shards of 25, or two of 50


@pytest.mark.parametrize("divergence", ["jsd", "sampled"])
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)])
def test_shards_with_few_and_many_blocks(shape, divergence):
    """Three, one, no and one block of 8, or four and one, equal a single device's logits at once;
    rows without weight hold NaN."""
    rng = np.random.default_rng(0)
    tokens, width, entries = 100, 8, 61
    live_T = np.concatenate([rng.permutation(np.arange(25) < count) for count in LIVE])
    states = [rng.normal(size=(tokens, width)) for _ in range(2)]
    states = [np.where(live_T[:, None], x, np.nan).astype(np.float32) for x in states]
    heads = [rng.normal(size=(entries, width)).astype(np.float32) for _ in range(2)]
    old_T, rollout_T = (rng.normal(size=tokens).astype(np.float32) - 4 for _ in range(2))
    ids = rng.integers(0, entries, tokens).astype(np.int32)
    arrays = (*states, *heads, ids, old_T, rollout_T)
    weight_T = np.where(live_T, rng.uniform(0.2, 1, tokens), 0).astype(np.float32)
    settings = divergence_loss.Divergence(divergence, temperature=1.3, ratio_clip=1.3)
    args = (settings, arrays, weight_T, live_T)
    want = loss_cases.run("dense", *args)
    assert np.isfinite(want[1][0]).all()
    with jax.set_mesh(sharding.make_mesh(*shape)):
        got = jax.jit(loss_cases.run, static_argnums=(0, 1))("chunked", *args)
    for mine, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        largest = max(np.abs(theirs).max(), 1e-30)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)])
def test_log_probs_on_eight_devices_equal_those_on_one(shape):
    case = loss_cases.Case({**USUAL, "clip": "none", "implementation": "chunked"})
    inputs, _, _ = loss_cases.ready(case)
    hidden, _, head, _, tokens_T = inputs.arrays[:5]
    push_T = np.linspace(-1, 1, len(tokens_T), dtype=np.float32)

    def run(hidden, head):
        def total(hidden, head):
            values = divergence_loss.log_probs(
                hidden, head, tokens_T, temperature=1.3, implementation="chunked",
                chunk=loss_cases.CHUNK, train_head=True, live_T=inputs.live_T,
            )  # fmt: skip
            return jnp.sum(values[0] * push_T), values

        return jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, head)

    want = run(hidden, head)
    with jax.set_mesh(sharding.make_mesh(*shape)):
        got = jax.jit(run)(hidden, head)
    for mine, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
