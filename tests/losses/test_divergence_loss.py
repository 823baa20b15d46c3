"""Losses against float64 NumPy and finite differences; chunked against dense; weights."""

import dataclasses
import itertools

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import mostly_slow

from copsd_jax.config import settings
from copsd_jax.losses import chunked, divergence_loss, divergences, loss_norms
from copsd_jax.losses.pallas import block_sizes as blocks_lib
from copsd_jax.losses.pallas import dispatch
from copsd_jax.training import backends

# 36 tokens in chunks of at most 16: 3 blocks of 12 rows, padded to 2 strips of 8 each.
ROWS, COLUMNS, CHUNK, MICRO = 4, 9, 16, 2
TOKENS, WIDTH, VOCABULARY = ROWS * COLUMNS, 8, 61
NORMS = tuple(loss_norms.NORMS)
PORTABLE = ("dense", "chunked")
LENGTH = 11  # of the norm constant
MASK_BC = (np.arange(COLUMNS)[None] < np.array([9, 4, 0, 6])[:, None]).astype(np.float32)
CLIP_MODES = tuple(divergences.CLIP_MODES)


def _cases():
    names = (("fkl", False), ("rkl", False), ("jsd", False), ("jsd", True))
    for (name, normal), mode, k in itertools.product(names, CLIP_MODES, (0, 5)):
        # between the smallest and the largest entry, or token, of the test's inputs
        clip = 0.02 if mode == "element" else 0.5
        clip = clip * 0.21 if name == "jsd" and not normal else clip
        yield divergence_loss.Divergence(name, 0.3, normal, 1.1, k, mode, clip)
    yield divergence_loss.Divergence("sampled", temperature=1.1)


CASES = list(_cases())
PLAIN = divergence_loss.Divergence()


def _label(s):
    return f"{s.divergence}{'_normal' * s.normalize_beta}-{s.clip_mode}-{s.top_k}"


def _loss_and_gradient(settings, implementation, chunk, train_head, arrays, weight_T):
    """((loss, stats), (gradient to the student's hidden states, to its head))."""

    def loss(hidden_s, head_s):
        _, hidden_t, _, head_t, tokens = arrays
        return divergence_loss.divergence(
            hidden_s, hidden_t, head_s, head_t, tokens, weight_T, settings,
            implementation=implementation, chunk=chunk, train_head=train_head,
        )  # fmt: skip

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(arrays[0], arrays[2])


_compiled = jax.jit(_loss_and_gradient, static_argnums=(0, 1, 2, 3))


def _run(settings, implementation, chunk, train_head, arrays, weight_T):
    """Op by op for dense: compilation is most of these tests' time, and ops are shared."""
    call = _loss_and_gradient if implementation == "dense" else _compiled
    return call(
        settings, implementation, chunk, train_head,
        jax.tree.map(jnp.asarray, arrays), jnp.asarray(weight_T),
    )  # fmt: skip


def _arrays(seed, tokens=TOKENS, vocabulary=VOCABULARY, width_t=WIDTH):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return (
        draw(tokens, WIDTH),
        draw(tokens, width_t),
        draw(vocabulary, WIDTH) * np.float32(0.5),
        draw(vocabulary, width_t) * np.float32(0.5),
        rng.integers(0, vocabulary, tokens).astype(np.int32),
    )


def _away_from_kinks(settings):
    """Inputs whose entries and tokens keep a margin from κ and whose top-k is no near tie."""
    for seed in range(100):
        arrays = _arrays(seed)
        z_s, z_t = oracle.logits(arrays[0], arrays[2]), oracle.logits(arrays[1], arrays[3])
        frozen = oracle.freeze(z_s, z_t, arrays[4], settings)
        if oracle.margin(z_s, z_t, settings, frozen) > oracle.KINK_MARGIN:
            return arrays, z_s, z_t, frozen
    raise AssertionError("no inputs with a margin")


def _close(got, want, tolerance, name=""):
    """Within `tolerance` of the wanted array's largest magnitude."""
    want = np.asarray(want, np.float64)
    error = np.abs(np.asarray(got, np.float64) - want).max()
    assert error <= tolerance * np.abs(want).max(), (name, error, np.abs(want).max())


@pytest.mark.parametrize("settings", mostly_slow(CASES, 7), ids=_label)
def test_value_and_gradient(settings):
    """float64 formula = finite differences = dense = chunked, for three normalisers."""
    arrays, z_s, z_t, frozen = _away_from_kinks(settings)
    value_T = oracle.value(z_s, z_t, arrays[4], settings, frozen)
    dz_TV = oracle.slope(z_s, z_t, arrays[4], settings, frozen)
    _close(oracle.difference(z_s, z_t, arrays[4], settings, frozen), dz_TV, 1e-7, "differences")
    mass_T = oracle.clipped_mass(z_s, z_t, settings, frozen)
    assert settings.clip_mode == "none" or 0 < mass_T.mean() < 1
    for norm in NORMS[:3]:
        weight_T = oracle.weights(MASK_BC, norm, MICRO).reshape(-1)
        dead_T = weight_T == 0
        grads = ((weight_T[:, None] * dz_TV) @ arrays[2], (weight_T[:, None] * dz_TV).T @ arrays[0])
        results = {}
        for implementation in PORTABLE:
            (loss, stats), got = _run(
                settings, implementation, CHUNK, True, arrays, weight_T.astype(np.float32)
            )
            results[implementation] = (loss, stats, got)
            _close(stats.value_T, np.where(dead_T, 0, value_T), 2e-5, "value")
            _close(stats.clipped_mass_T + 1, np.where(dead_T, 0, mass_T) + 1, 2e-5, "mass")
            scale = np.abs(weight_T * value_T).sum()
            assert abs(float(loss) - (weight_T * value_T).sum()) <= 2e-5 * scale
            for mine, want in zip(got, grads, strict=True):
                _close(mine, want, 2e-5, "gradient")
                assert not np.asarray(got[0])[dead_T].any()
        (_, stats, got), (_, dense_stats, dense_got) = results["chunked"], results["dense"]
        for mine, want in zip((*stats, *got), (*dense_stats, *dense_got), strict=True):
            _close(mine, want, 1e-5, "chunked = dense")
        assert abs(float(results["chunked"][0] - results["dense"][0])) <= 1e-5 * scale


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("settings", mostly_slow(CASES[:-1], 4), ids=_label)
def test_equal_sides_are_exactly_zero(settings, implementation):
    hidden, _, head, _, tokens = _arrays(0)
    weight_T = np.full(TOKENS, 1 / TOKENS, np.float32)
    arrays = jax.tree.map(jnp.asarray, (hidden, hidden, head, head, tokens))
    call = _loss_and_gradient
    if implementation != "dense":
        call = jax.jit(call, static_argnums=(0, 1, 2, 3), compiler_options=conftest.FUSED)
    (loss, stats), grads = call(settings, implementation, CHUNK, True, arrays, weight_T)
    assert float(loss) == 0
    for leaf in (stats.value_T, *grads):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("name", divergences.DIVERGENCES)
def test_sides_that_agree_on_some_entries(name, implementation):
    """Entries with p = q bit for bit have no slope of their own, next to others that have."""
    settings = divergence_loss.Divergence(name, 0.3)
    z_s, z_t = np.array([[2.0, 1, 0, -1]]), np.array([[1.0, 2, 0, -1]])
    tokens = np.zeros(1, np.int32)
    hidden, heads = np.ones((1, 1), np.float32), (z_s.T.astype("f4"), z_t.T.astype("f4"))
    arrays = (hidden, hidden, *heads, tokens)
    frozen = oracle.freeze(z_s, z_t, tokens, settings)
    _, grads = _compiled(settings, implementation, 1, True, arrays, np.ones(1, np.float32))
    _close(grads[1][:, 0], oracle.slope(z_s, z_t, tokens, settings, frozen)[0], 1e-6)


@pytest.mark.parametrize("tokens", [1, 9, 33])
def test_sizes_that_no_chunk_divides(tokens):
    settings = divergence_loss.Divergence("jsd", clip_mode="element")
    arrays = _arrays(5, tokens=tokens, width_t=6)
    weight_T = np.linspace(0.5, 1, tokens, dtype=np.float32)
    want = _compiled(settings, "dense", 1, True, arrays, weight_T)
    for chunk in (5, 16):
        got = _compiled(settings, "chunked", chunk, True, arrays, weight_T)
        for mine, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            _close(mine, theirs, 1e-5)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_rows_without_weight_contribute_nothing(implementation):
    """Even if they hold NaN; and an empty mask gives zeros (bug 10: 0/0 in the reference)."""
    settings = divergence_loss.Divergence("fkl", clip_mode="element")
    hidden_s, hidden_t, head_s, head_t, tokens = _arrays(6)
    weight_T = np.linspace(0, 1, TOKENS, dtype=np.float32)
    weight_T[20:] = 0
    keep = slice(0, 20)
    want = _compiled(
        settings, implementation, CHUNK, True,
        (hidden_s[keep], hidden_t[keep], head_s, head_t, tokens[keep]), weight_T[keep],
    )  # fmt: skip
    hidden_s[20:], hidden_t[25:] = np.nan, np.inf
    arrays = (hidden_s, hidden_t, head_s, head_t, tokens)
    (loss, stats), (grad_hidden, grad_head) = _compiled(
        settings, implementation, CHUNK, True, arrays, weight_T
    )
    np.testing.assert_allclose(loss, want[0][0], rtol=1e-6)
    np.testing.assert_allclose(grad_head, want[1][1], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(grad_hidden[20:], 0)
    np.testing.assert_array_equal(np.stack(stats)[:, 20:], 0)
    empty_T = loss_norms.compute_token_weights(
        np.zeros((ROWS, COLUMNS)), "micro_token_mean"
    ).reshape(-1)
    (loss, stats), grads = _compiled(settings, implementation, CHUNK, True, arrays, empty_T)
    for leaf in (loss, *stats, *grads):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_only_the_student_has_a_gradient(implementation):
    """Zero to the teacher, the weights and an untrained head; cotangents scale the rest."""
    settings = divergence_loss.Divergence("jsd")
    arrays = _arrays(7)
    weight_T = np.full(TOKENS, 0.1, np.float32)

    def loss(hidden_s, hidden_t, head_s, head_t, weight_T, scale, train_head=False):
        value, stats = divergence_loss.divergence(
            hidden_s, hidden_t, head_s, head_t, arrays[4], weight_T, settings,
            implementation=implementation, chunk=CHUNK, train_head=train_head,
        )  # fmt: skip
        return scale * value + sum(jnp.sum(leaf) for leaf in stats)

    grad = jax.grad(loss, range(5))
    once = grad(*arrays[:4], weight_T, np.float32(1))
    thrice = jax.grad(loss)(*arrays[:4], weight_T, np.float32(-3))
    assert np.abs(once[0]).max() > 0
    _close(thrice, -3 * np.asarray(once[0]), 1e-6)
    for leaf in once[1:]:
        np.testing.assert_array_equal(leaf, 0)
    # one array as both heads: the gradient is the student's alone
    shared = jnp.asarray(arrays[3])
    args = (arrays[0], arrays[1], shared, shared, weight_T, np.float32(1), True)
    apart = jax.grad(loss, 2)(*args)
    same = jax.grad(lambda head: loss(*args[:2], head, head, *args[4:]))(shared)
    assert np.abs(apart).max() > 0
    np.testing.assert_array_equal(same, apart)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_log_probs(implementation):
    """Values and the gradients to states and head against float64 and finite differences; other
    rows are not touched. 37 tokens: a number that no chunk divides."""
    hidden, _, head, _, tokens = (np.asarray(x, np.float64) for x in _arrays(12, tokens=37))
    tokens, live_T = tokens.astype(np.int32), np.arange(37) % 5 != 1
    logp_TV = oracle.log_softmax(oracle.logits(hidden, head) / 1.3)
    logp_T = np.where(live_T, logp_TV[np.arange(37), tokens], 0)
    cotangent_T = np.random.default_rng(12).normal(size=37)
    push_TV = (np.eye(VOCABULARY)[tokens] - np.exp(logp_TV)) / 1.3 * (live_T * cotangent_T)[:, None]
    broken = np.where(live_T[:, None], hidden, np.nan)

    def total(hidden, head):
        values = divergence_loss.log_probs(
            hidden, head, tokens, temperature=1.3, implementation=implementation, chunk=CHUNK,
            train_head=True, live_T=live_T,
        )  # fmt: skip
        return jnp.sum(values[0] * cotangent_T), values

    with jax.enable_x64(True):
        (_, values), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(broken, head)
        ends = [
            float(total(broken, head + step * np.eye(*head.shape))[0]) for step in (1e-5, -1e-5)
        ]
    np.testing.assert_allclose(values[0], logp_T, rtol=0, atol=1e-12)
    entropy_T = np.where(live_T, -(np.exp(logp_TV) * logp_TV).sum(axis=1), 0)
    np.testing.assert_allclose(values[1], entropy_T, rtol=0, atol=1e-12)
    np.testing.assert_allclose(grads[0], push_TV @ head, rtol=0, atol=1e-12)
    np.testing.assert_allclose(grads[1], push_TV.T @ hidden, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(np.asarray(grads[0])[~live_T], 0)
    slope = (np.asarray(grads[1]) * np.eye(*head.shape)).sum()
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, slope, rtol=1e-6)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_log_probs_in_bfloat16(implementation):
    """Rounded states: float32 results, gradients in the states' and the head's own dtypes."""
    hidden, _, head, _, tokens = _arrays(13)
    hidden = jnp.asarray(hidden, jnp.bfloat16)

    def total(hidden, head):
        values = divergence_loss.log_probs(
            hidden, head, tokens, temperature=1.3, implementation=implementation, chunk=CHUNK,
            train_head=True,
        )  # fmt: skip
        return values[0].sum() * 0.01, values

    (_, values), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, head)
    rounded = np.asarray(jnp.asarray(head, jnp.bfloat16), np.float64)
    logp_TV = oracle.log_softmax(oracle.logits(hidden, rounded) / 1.3)
    push_TV = (np.eye(VOCABULARY)[tokens] - np.exp(logp_TV)) / 1.3 * 0.01
    assert values[0].dtype == values[1].dtype == jnp.float32
    assert (grads[0].dtype, grads[1].dtype) == (jnp.bfloat16, jnp.float32)
    _close(values[0], logp_TV[np.arange(TOKENS), tokens], 2e-5)
    _close(grads[0], push_TV @ rounded, 1e-2)
    _close(grads[1], push_TV.T @ np.asarray(hidden, np.float64), 1e-2)


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("name", ["fkl", "rkl", "jsd"])
def test_bfloat16(name, implementation):
    """Rounded inputs, float32 sums: 1e-2 of the float64 result from the same inputs."""
    settings = divergence_loss.Divergence(name, temperature=1.1)
    arrays = tuple(
        jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x for x in _arrays(10)
    )
    z_s, z_t = (oracle.logits(arrays[i], arrays[i + 2]) for i in (0, 1))
    frozen = oracle.freeze(z_s, z_t, arrays[4], settings)
    weight_T = np.full(TOKENS, 1 / TOKENS, np.float32)
    (loss, stats), grads = _run(settings, implementation, CHUNK, True, arrays, weight_T)
    value_T = oracle.value(z_s, z_t, arrays[4], settings, frozen)
    dz_TV = oracle.slope(z_s, z_t, arrays[4], settings, frozen) / TOKENS
    assert loss.dtype == stats.value_T.dtype == jnp.float32
    assert grads[0].dtype == grads[1].dtype == jnp.bfloat16
    _close(stats.value_T, value_T, 2e-5)
    _close(loss, value_T.mean(), 2e-5)
    _close(grads[0], dz_TV @ np.asarray(arrays[2], np.float64), 1e-2)
    _close(grads[1], dz_TV.T @ np.asarray(arrays[0], np.float64), 1e-2)
    # float32 heads are rounded to the hidden states' dtype; their gradient is not
    heads = (arrays[2].astype(jnp.float32), arrays[3].astype(jnp.float32))
    (again, _), wide = _run(
        settings, implementation, CHUNK, True, (*arrays[:2], *heads, arrays[4]), weight_T
    )
    assert float(again) == float(loss)
    assert wide[1].dtype == jnp.float32
    _close(wide[1], dz_TV.T @ np.asarray(arrays[0], np.float64), 1e-2)


@pytest.mark.parametrize("shared", [True, False])
def test_what_a_kernel_is_given(shared, monkeypatch):
    """A stand-in in plain array code: widths padded to its lanes, one head where the sides share
    it, whole calls of its blocks of tokens over live rows only, and gradients cut back."""
    calls = []

    def sweep(constants, rows, blocks, interpret):
        assert (*constants.shard, interpret) == (None, VOCABULARY, True)
        assert blocks.tokens == 4
        calls.append([x.shape for x in (*rows[0], *constants.heads, rows[1].tokens_T)])
        one, grad_head = chunked.sweep_block(constants._replace(gradient=True), rows)
        return *one, grad_head

    rule = lambda *_, **__: blocks_lib.Blocks(4, 0)  # noqa: E731
    monkeypatch.setitem(dispatch.KERNELS, "pallas_tpu", dispatch.Kernel(sweep, rule, 16))
    hidden_s, hidden_t, head_s, head_t, tokens_T = _arrays(15, tokens=32)
    head_s, head_t = jnp.asarray(head_s), jnp.asarray(head_s if shared else head_t)
    weight_T = (np.arange(32) % 2 / 32).astype(np.float32)

    def run(implementation, train_head):
        def total(hidden, head):
            other = head if shared else head_t
            return divergence_loss.divergence(
                hidden, hidden_t, head, other, tokens_T, weight_T,
                divergence_loss.Divergence("rkl"), implementation=implementation, chunk=16,
                train_head=train_head, kernel=divergence_loss.KernelOptions(interpret=True),
            )  # fmt: skip

        return jax.value_and_grad(total, (0, 1), has_aux=True)(jnp.asarray(hidden_s), head_s)

    # one block of 4 a call; with the head's gradient 4 of them
    for train_head, rows in ((False, 4), (True, 16)):
        calls.clear()
        got, want = run("pallas_tpu", train_head), run("chunked", train_head)
        for mine, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            _close(mine, theirs, 1e-6) if np.any(theirs) else np.testing.assert_array_equal(mine, 0)
        states, head = (rows, 16), (VOCABULARY, 16)
        assert calls
        heads = [head] if shared else [head, head]
        assert all(call == [states, states, *heads, (rows,)] for call in calls)


@pytest.mark.parametrize("implementation", ["dense", "chunked"])
@pytest.mark.parametrize("name", ["fkl", "rkl", "jsd"])
def test_entries_far_below_the_others(name, implementation):
    """50 to 200 nats down, where probabilities underflow and their quotients overflow."""
    settings = divergence_loss.Divergence(name)
    head_s = np.array([[0.0], [1], [2], [-50], [-100], [-200]], np.float32)
    head_t = np.array([[1.0], [0], [2], [-51], [-99], [-180]], np.float32)
    one, token, weight_T = np.ones((1, 1), np.float32), np.zeros(1, np.int32), np.ones(1)
    z_s, z_t = np.float64(head_s.T), np.float64(head_t.T)
    frozen = oracle.freeze(z_s, z_t, token, settings)
    want = oracle.slope(z_s, z_t, token, settings, frozen) @ head_s

    def total(hidden):
        return divergence_loss.divergence(
            hidden, one, head_s, head_t, token, weight_T.astype(np.float32), settings,
            implementation=implementation, chunk=8,
        )[0]  # fmt: skip

    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(one)), want, rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("micro_batch", [0, 1, 2, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_token_weights(norm, micro_batch):
    got = loss_norms.compute_token_weights(MASK_BC.astype(bool), norm, micro_batch, LENGTH)
    want = oracle.weights(MASK_BC, norm, micro_batch or ROWS, LENGTH)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_bug_10_token_weights_of_nothing(norm):
    """Bug 10: no token, no NaN; and a padding row changes only what counts completions."""
    np.testing.assert_array_equal(
        loss_norms.compute_token_weights(np.zeros((4, 3)), norm, 2, LENGTH), 0
    )
    padded_BC = np.concatenate([MASK_BC, np.zeros((2, COLUMNS), np.float32)])
    got = loss_norms.compute_token_weights(padded_BC, norm, 6, LENGTH)[:ROWS]
    share = 4 / 6 if norm in ("seq_mean_all", "constant") else 1
    want = np.asarray(loss_norms.compute_token_weights(MASK_BC, norm, 4, LENGTH)) * share
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_bug_43_normalisers_that_do_not_depend_on_micro_batches():
    """Bug 43: the mean over micro-batches of token means moves with their size; the others do not.

    Lengths 4, 2, 0, 1 with values 1, 2, -, 4. Micro-batches of one: (1 + 2 + 0 + 4) / 4, which is
    also the mean over all sequences; of two: (8/6 + 4) / 2.
    """
    mask_BC = np.arange(4)[None] < np.array([4, 2, 0, 1])[:, None]
    value_BC = np.array([1.0, 2, 9, 4])[:, None] * mask_BC

    def loss(norm, micro_batch):
        weight_BC = loss_norms.compute_token_weights(mask_BC, norm, micro_batch, length=5)
        return float((weight_BC * value_BC).sum())

    for norm, want in (
        ("micro_token_mean", (7 / 4, 8 / 3)),
        ("seq_mean_all", (7 / 4, 7 / 4)),
        ("seq_mean", (7 / 3, 7 / 3)),
        ("global_token_mean", (12 / 7, 12 / 7)),
        ("constant", (12 / 20, 12 / 20)),
    ):
        np.testing.assert_allclose([loss(norm, 1), loss(norm, 2)], want, rtol=1e-6, err_msg=norm)


def test_wrong_arguments_are_refused():
    arrays = _arrays(11)
    weight_T = np.ones(TOKENS, np.float32)
    good = {"implementation": "chunked", "chunk": 8}

    def call(arrays=arrays, settings=CASES[0], weight_T=weight_T, **keywords):
        divergence_loss.divergence(*arrays, weight_T, settings, **{**good, **keywords})

    with pytest.raises(ValueError, match=r"'pallas'.*dense, chunked, pallas_tpu, pallas_gpu"):
        call(implementation="pallas")
    for name in ("pallas_tpu", "pallas_gpu"):
        with pytest.raises(ValueError, match=f"top_k is 5: implementation {name}.*use chunked"):
            call(settings=CASES[1], implementation=name)
    with pytest.raises(ValueError, match="chunk is 0"):
        call(chunk=0)
    with pytest.raises(ValueError, match=r"top_k is 62: the vocabulary has only 61"):
        call(settings=dataclasses.replace(CASES[0], top_k=62))
    with pytest.raises(ValueError, match="first axis"):
        call(weight_T=weight_T[:-1])
    with pytest.raises(ValueError, match="60 rows: the counts must be equal"):
        call(arrays=(*arrays[:3], arrays[3][:-1], arrays[4]))
    with pytest.raises(ValueError, match=r"norm is 'mean'.*seq_mean"):
        loss_norms.compute_token_weights(MASK_BC, "mean")
    with pytest.raises(ValueError, match="micro_batch is 3"):
        loss_norms.compute_token_weights(MASK_BC, "seq_mean", 3)
    with pytest.raises(ValueError, match=r"constant.*length is 0"):
        loss_norms.compute_token_weights(MASK_BC, "constant")
    with pytest.raises(ValueError, match=r"rollout_clip is 2.*logp_rollout_T"):
        call(settings=dataclasses.replace(CASES[0], rollout_clip=2.0))
    with pytest.raises(ValueError, match="first axis"):
        call(live_T=np.ones(TOKENS + 1, bool))
    hidden, head, tokens = arrays[0], arrays[2], arrays[4]
    with pytest.raises(ValueError, match="temperature is 0"):
        divergence_loss.log_probs(hidden, head, tokens, temperature=0.0, **good)
    with pytest.raises(ValueError, match="first axis"):
        divergence_loss.log_probs(hidden, head, tokens[1:], temperature=1.0, **good)
    with pytest.raises(ValueError, match=r"'pallas'.*dense, chunked"):
        divergence_loss.log_probs(
            hidden, head, tokens, temperature=1.0, **{**good, "implementation": "pallas"}
        )


FEW = divergence_loss.Divergence("jsd", top_k=5)


@pytest.mark.parametrize(
    "implementation, settings, want",
    [
        ("dense", PLAIN, ("dense", "dense", "dense")),
        ("chunked", FEW, ("chunked", "chunked", "chunked")),
        ("auto", PLAIN, ("chunked", "pallas_gpu", "pallas_tpu")),
        ("auto", FEW, ("chunked", "chunked", "chunked")),
        ("auto", None, ("chunked", "chunked", "chunked")),
        ("pallas", PLAIN, ("mesh is cpu; use chunked", "pallas_gpu", "pallas_tpu")),
        ("pallas", FEW, ("mesh is cpu", "not support top_k, which is 5; use", "support top_k")),
        ("pallas", None, ("mesh is cpu", "no divergence", "no divergence")),
        ("fast", PLAIN, ("'fast': the choices are auto, dense, chunked, pallas",) * 3),
    ],
)
def test_what_runs_follows_from_the_mesh(implementation, settings, want):
    """By the platform of the mesh, whatever the host is; a refusal is one sentence."""
    for platform, expected in zip(("cpu", "gpu", "tpu"), want, strict=True):
        if expected in divergence_loss.IMPLEMENTATIONS:
            got = divergence_loss.resolve_implementation(implementation, settings, platform)
            assert got == expected
        else:
            with pytest.raises(ValueError, match=expected):
                divergence_loss.resolve_implementation(implementation, settings, platform)


def test_a_mix_of_heads_has_no_kernel():
    assert (
        divergence_loss.resolve_implementation("auto", PLAIN, "tpu", one_width=False) == "chunked"
    )
    with pytest.raises(ValueError, match="a trust region gives the teacher wider states"):
        divergence_loss.resolve_implementation("pallas", PLAIN, "tpu", one_width=False)
    c = settings.default()
    c.teacher.weights, c.loss.implementation = "trust_region", "pallas"
    assert backends.choose_loss(c, "tpu") == "pallas_tpu"  # one head, of the base
    c.train.trainable = "full"
    with pytest.raises(ValueError, match=r"loss\.implementation is 'pallas'.*trust region"):
        backends.choose_loss(c, "tpu")


def test_a_new_divergence_is_one_entry(monkeypatch):
    """Squared Hellinger distance: dense differentiates its value, chunked takes its derivative."""

    def hellinger(student, teacher, settings):
        del settings
        root = jnp.sqrt(student.p * teacher.p)
        return divergences.Entry(student.p + teacher.p - 2 * root, student.p - root, 0.0)

    kind = divergences.Kind(hellinger)
    monkeypatch.setitem(divergences.DIVERGENCES, "hellinger", kind)
    new = divergence_loss.Divergence("hellinger", temperature=1.1)
    arrays, weight_T = _arrays(16), np.full(TOKENS, 1 / TOKENS, np.float32)
    (loss, stats), grads = _run(new, "dense", CHUNK, True, arrays, weight_T)
    p, q = (
        oracle.softmax(oracle.logits(arrays[i], arrays[i + 2]) / new.temperature) for i in (0, 1)
    )
    _close(stats.value_T, ((np.sqrt(p) - np.sqrt(q)) ** 2).sum(axis=1), 2e-5)
    (chunked_loss, _), chunked_grads = _run(new, "chunked", CHUNK, True, arrays, weight_T)
    _close(chunked_loss, loss, 1e-5)
    for mine, want in zip(chunked_grads, grads, strict=True):
        _close(mine, want, 1e-5)
    assert divergence_loss.resolve_implementation("auto", new, "tpu") == "chunked"
    with pytest.raises(ValueError, match="not support the divergence hellinger; use chunked"):
        divergence_loss.resolve_implementation("pallas", new, "gpu")
