"""Top-k sets, the tail, importance weights and rows of weight 0, in float64 to 1e-6 and better."""

import dataclasses
import functools
import itertools

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import mostly_slow

from copsd_jax.losses import clips, dense, divergence_loss, divergences, token_values

TOKENS, WIDTH, VOCABULARY, CHUNK = 21, 6, 23, 16  # chunked: 2 blocks of 11, padded to 16
PORTABLE = ("dense", "chunked")
NAMES = (("fkl", False), ("rkl", False), ("jsd", False), ("jsd", True))
SETS = [(0, "teacher", False)] + [
    (4, whose, tail) for whose, tail in itertools.product(divergences.TOP_K_OF, (False, True))
]
PLAIN = divergence_loss.Divergence(temperature=1.1, sampling_temperature=1.3)
BASE = dataclasses.replace(PLAIN, beta=0.3, ratio_clip=1.2, rollout_clip=1.5)


def _arrays(seed, tokens=TOKENS):
    """Hidden states and heads of both sides, tokens, log-probs of long ago and of the sampler."""
    rng = np.random.default_rng(seed)
    shapes = ((tokens, WIDTH), (tokens, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY, WIDTH))
    draw = [rng.normal(size=shape) * 0.8 for shape in shapes]
    sampled_T = rng.integers(0, VOCABULARY, tokens).astype(np.int32)
    now_T = oracle.log_softmax(oracle.logits(draw[0], draw[2]) / 1.3)[np.arange(tokens), sampled_T]
    old_T = now_T + rng.normal(size=tokens) * 0.3
    return *draw, sampled_T, old_T, old_T + rng.normal(size=tokens) * 0.6


def _point(settings):
    """Arrays, logits and constants where no entry, token or top-k is near its kink."""
    for seed in range(200):
        arrays = _arrays(seed)
        z_s, z_t = oracle.logits(arrays[0], arrays[2]), oracle.logits(arrays[1], arrays[3])
        frozen = oracle.freeze(z_s, z_t, arrays[4], settings, *arrays[5:])
        if oracle.margin(z_s, z_t, settings, frozen) > oracle.KINK_MARGIN:
            return arrays, z_s, z_t, frozen
    raise AssertionError("no inputs with a margin")


def _all_settings(name, normal, k, whose, tail):
    """One for each clip mode, with κ in the middle of the tokens, or among the largest entries."""
    plain = dataclasses.replace(
        BASE, divergence=name, normalize_beta=normal, top_k=k, top_k_of=whose, tail=tail
    )
    arrays = _arrays(0)
    z_s, z_t = oracle.logits(arrays[0], arrays[2]), oracle.logits(arrays[1], arrays[3])
    e = oracle.entries(*oracle.sides(z_s, z_t, plain, oracle.kept_set(z_s, z_t, plain)), plain)
    for mode in divergences.CLIP_MODES:
        clip = np.quantile(e, 0.95) if mode == "element" else np.median(e.sum(axis=1))
        yield dataclasses.replace(plain, clip_mode=mode, clip=float(clip) * 1.01)


def _near(got, want, tolerance, what):
    """Within `tolerance` of the wanted array's largest magnitude; float64 on both sides."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == np.float64
    error = np.abs(got - want).max()
    assert error <= tolerance * max(np.abs(want).max(), 1e-300), (what, error)


def _block(z_s, z_t, settings, tokens_T=None, old_T=None, rollout_T=None):
    """`score_block` in float64 and op by op: most of these tests' time is compilation."""
    tokens_T = np.zeros(len(z_s), np.int32) if tokens_T is None else tokens_T
    with jax.enable_x64(True):
        args = jax.tree.map(jnp.asarray, (z_s, z_t, tokens_T, old_T, rollout_T))
        out = token_values.score_divergence_block(*args[:3], settings, *args[3:])
        return jax.tree.map(np.asarray, out)


def _differentiated(z_s, z_t, settings, tokens_T=None, ratio_T=1.0):
    """Value, clipped mass and gradient of the dense form, in float64."""
    tokens_T = np.zeros(len(z_s), np.int32) if tokens_T is None else tokens_T

    def total(z_s):
        value_T, mass_T = dense.compute_values(
            z_s, jnp.asarray(z_t), jnp.asarray(tokens_T), settings
        )
        return jnp.sum(value_T * ratio_T), (value_T * ratio_T, mass_T)

    with jax.enable_x64(True):
        (_, out), grad = jax.value_and_grad(total, has_aux=True)(jnp.asarray(z_s))
        return jax.tree.map(np.asarray, (*out, grad))


def _filled(z):
    """Rows repeated and ids without probability added, so that all tests share their shapes."""
    wide = np.concatenate([z, np.full((len(z), VOCABULARY - z.shape[1]), -1e5)], axis=1)
    return np.resize(wide, (TOKENS, VOCABULARY))


@pytest.mark.parametrize("k, whose, tail", mostly_slow(SETS, 1, several=True))
@pytest.mark.parametrize("name, normal", NAMES)
def test_every_form_at_1e_6(name, normal, k, whose, tail):
    """Closed form = formula = differences = differentiated value, for the five clip modes."""
    for settings in _all_settings(name, normal, k, whose, tail):
        arrays, z_s, z_t, frozen = _point(settings)
        value_T = oracle.value(z_s, z_t, arrays[4], settings, frozen)
        dz_TV = oracle.slope(z_s, z_t, arrays[4], settings, frozen)
        mass_T = oracle.clipped_mass(z_s, z_t, settings, frozen)
        assert settings.clip_mode == "none" or 0 < mass_T.mean() < 1
        _near(oracle.difference(z_s, z_t, arrays[4], settings, frozen), dz_TV, 1e-6, "differences")
        stats, got_TV = _block(z_s, z_t, settings, *arrays[4:])
        _near(stats.ratio_T, frozen.ratio_T, 1e-12, "ratio")
        dense = _differentiated(z_s, z_t, settings, arrays[4], stats.ratio_T)
        for value, mass, grad in ((stats.value_T, stats.clipped_mass_T, got_TV), dense):
            _near(value, value_T, 1e-10, (settings, "value"))
            _near(mass + 1, mass_T + 1, 1e-10, (settings, "mass"))
            _near(grad, dz_TV, 1e-10, (settings, "gradient"))


def _loss(settings, implementation, arrays, weight_T, live_T=None):
    """((loss, stats), gradients to the student's states and head)."""

    def loss(hidden_s, head_s):
        _, hidden_t, _, head_t, tokens, old, rollout = arrays
        return divergence_loss.divergence(
            hidden_s, hidden_t, head_s, head_t, tokens, weight_T, settings,
            implementation=implementation, chunk=CHUNK, train_head=True,
            logp_old_T=old, logp_rollout_T=rollout, live_T=live_T,
        )  # fmt: skip

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(arrays[0], arrays[2])


THROUGH_THE_HEADS = [
    dataclasses.replace(BASE, top_k=4, top_k_of="student", tail=True, divergence="jsd"),
    dataclasses.replace(BASE, top_k=4, top_k_of="union", clip_mode="element", clip=0.02),
    dataclasses.replace(BASE, divergence="sampled"),
]


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("settings", mostly_slow(THROUGH_THE_HEADS, 2), ids=lambda s: s.divergence)
def test_through_the_heads_in_float64(settings, implementation):
    arrays, z_s, z_t, frozen = _point(settings)
    weight_T = np.linspace(0.1, 1, TOKENS)
    value_T = oracle.value(z_s, z_t, arrays[4], settings, frozen)
    dz_TV = oracle.slope(z_s, z_t, arrays[4], settings, frozen) * weight_T[:, None]
    with jax.enable_x64(True):
        (loss, stats), grads = _loss(settings, implementation, arrays, weight_T)
    _near(stats.value_T, value_T, 1e-10, "value")
    _near(loss, weight_T @ value_T, 1e-10, "loss")
    _near(grads[0], dz_TV @ arrays[2], 1e-10, "states")
    _near(grads[1], dz_TV.T @ arrays[0], 1e-10, "head")


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_sdpo_as_published(alpha, implementation):
    """Student's top k with tail, is_clip 2, rollout weights up to 2, micro-batches of one sequence,
    an empty one among them."""
    B, C = 3, 7
    mask_BC = np.arange(C)[None] < np.array([7, 0, 4])[:, None]
    arrays = list(_arrays(3))
    arrays[6] = arrays[5] + np.random.default_rng(4).normal(size=TOKENS)
    temperature, shape = 1.3, (B, C, VOCABULARY)
    z_s, z_t = (oracle.logits(arrays[i], arrays[i + 2]).reshape(shape) for i in (0, 1))
    want = oracle.sdpo(
        z_s / temperature, z_t / temperature, *(x.reshape(B, C) for x in (arrays[4], mask_BC)),
        *(x.reshape(B, C) for x in arrays[5:]), alpha=alpha, k=5,
    )  # fmt: skip
    settings = divergence_loss.Divergence(
        divergence={0.0: "fkl", 0.5: "jsd", 1.0: "rkl"}[alpha], beta=0.5, temperature=temperature,
        sampling_temperature=temperature, top_k=5, top_k_of="student", tail=True,
        ratio_clip=2.0, rollout_clip=2.0,
    )  # fmt: skip
    weight_BC = oracle.weights(mask_BC, "seq_mean_all", 1)
    with jax.enable_x64(True):
        (loss, stats), _ = _loss(settings, implementation, arrays, weight_BC.reshape(-1))
    np.testing.assert_allclose(float(loss), want, rtol=1e-9)
    ratio_T = np.asarray(stats.ratio_T)[mask_BC.reshape(-1)]
    assert (np.asarray(stats.ratio_T)[~mask_BC.reshape(-1)] == 0).all()
    assert 0 < ratio_T.min() < 1 < 2 < ratio_T.max() <= 4


def test_sdpo_without_logits_is_the_sampled_divergence():
    """Its loss_t = sg(ls_y - lq_y) · ls_y, times the ratio, whatever was sampled."""
    settings = dataclasses.replace(BASE, divergence="sampled", temperature=1.0, ratio_clip=2.0)
    arrays = _arrays(5)
    z_s, z_t = oracle.logits(arrays[0], arrays[2]), oracle.logits(arrays[1], arrays[3])
    rows = np.arange(TOKENS)
    ls_T, lq_T = (oracle.log_softmax(z)[rows, arrays[4]] for z in (z_s, z_t))
    now_T = oracle.log_softmax(z_s / 1.3)[rows, arrays[4]]
    ratio_T = np.minimum(np.exp(now_T - arrays[5]), 2)
    ratio_T = ratio_T * np.minimum(np.exp(arrays[5] - arrays[6]), 1.5)
    with jax.enable_x64(True):
        (_, stats), _ = _loss(settings, "chunked", arrays, np.ones(TOKENS))
    np.testing.assert_allclose(stats.value_T, (ls_T - lq_T) * ls_T * ratio_T, rtol=1e-9)


def test_importance_by_hand():
    """Rows: as sampled; twice as likely as then; then half as likely as the sampler said; far off
    both ways (e^20 at most, before the clip)."""
    now = np.log([0.2, 0.4, 0.1, 0.5, 0.5]) + np.array([0, 0, 0, 0, -60.0])
    old = np.log([0.2, 0.2, 0.1, 0.5, 0.5]) + np.array([0, 0, 0, -60.0, 0])
    rollout = np.log([0.2, 0.2, 0.2, 0.5, 0.5]) + np.array([0, 0, 0, -60.0, 0])
    args = tuple(jnp.asarray(x, jnp.float32) for x in (now, old, rollout))

    def factor(ratio_clip, rollout_clip, args=args):
        settings = dataclasses.replace(PLAIN, ratio_clip=ratio_clip, rollout_clip=rollout_clip)
        return np.asarray(clips.clip_importance_ratio(*args, settings))

    np.testing.assert_array_equal(factor(0.0, 0.0), 1)
    np.testing.assert_allclose(factor(1.5, 0.0), [1, 1.5, 1, 1.5, np.exp(-20)], rtol=1e-5)
    np.testing.assert_allclose(factor(1e9, 0.0)[3], np.exp(20), rtol=1e-5)
    np.testing.assert_allclose(factor(0.0, 1.5), [1, 1, 0.5, 1, 1], rtol=1e-5)
    np.testing.assert_allclose(factor(3.0, 1.5), [1, 2, 0.5, 3, np.exp(-20)], rtol=1e-5)
    # without logp_old the first factor is 1 and the second compares with now
    got = factor(3.0, 1.5, (args[0], None, args[2]))
    np.testing.assert_allclose(got, [1, 1.5, 0.5, 1.5, np.exp(-60)], rtol=1e-5)


EQUAL_CASES = list(zip(divergences.DIVERGENCES, itertools.cycle(divergences.TOP_K_OF)))


@pytest.mark.parametrize("name, whose", EQUAL_CASES)
def test_equal_sides_are_exactly_zero_with_a_tail(name, whose):
    """Fused by the compiler, in float32, with tails from large to at their floor."""
    scale_T1 = np.array([0.1, 1, 4, 40])[:, None]
    z = jnp.asarray(np.random.default_rng(2).normal(size=(4, 200)) * scale_T1, jnp.float32)
    tokens_T = jnp.zeros(4, jnp.int32)
    settings = dataclasses.replace(PLAIN, divergence=name, top_k=20, top_k_of=whose, tail=True)

    @functools.partial(jax.jit, compiler_options=conftest.FUSED)
    def run(z_s, z_t):
        total = lambda z_s: dense.compute_values(z_s, z_t, tokens_T, settings)[0].sum()  # noqa: E731
        stats, dz_TV = token_values.score_divergence_block(z_s, z_t, tokens_T, settings)
        return stats.value_T, dz_TV, *jax.value_and_grad(total)(z_s)

    for leaf in run(z, z):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("name", divergences.DIVERGENCES)
def test_an_empty_tail_changes_nothing(name):
    """top_k = V: both tails are the constant 1e-7, and the rest is the whole vocabulary's."""
    arrays = _arrays(6)
    z_s, z_t = oracle.logits(arrays[0], arrays[2]), oracle.logits(arrays[1], arrays[3])
    whole = dataclasses.replace(PLAIN, divergence=name)
    full = dataclasses.replace(whole, top_k=VOCABULARY, tail=True)
    want, want_TV = _block(z_s, z_t, whole)
    got, got_TV = _block(z_s, z_t, full)
    dense_T, _, dense_TV = _differentiated(z_s, z_t, full)
    for value_T, dz_TV in ((got.value_T, got_TV), (dense_T, dense_TV)):
        np.testing.assert_allclose(value_T, want.value_T, rtol=0, atol=1e-12)
        np.testing.assert_allclose(dz_TV, want_TV, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", divergences.DIVERGENCES)
def test_a_tail_at_its_floor_does_not_move(name):
    """A student sure of its top k: a tail below 1e-7 is 1e-7, with no gradient of its own.

    The entries then sum to 1 + 1e-7, which the shift by p - q lets into the value.
    """
    z_s = _filled(np.array([[30.0, 29, 0, 0, 1, 2], [1e4, -1e4, 0, 0, 0, 0], [3, 2, 1, 0, -1, 0]]))
    z_t = _filled(np.array([[1.0, 2, 3, 0, 0, 1], [-1e4, 1e4, 0, 0, 0, 0], [40, 41, 1, 0, 0, 0]]))
    settings = divergence_loss.Divergence(name, top_k=4, top_k_of="student", tail=True)
    tokens_T = np.zeros(TOKENS, np.int32)
    frozen = oracle.freeze(z_s, z_t, tokens_T, settings)
    want_T = oracle.value(z_s, z_t, tokens_T, settings, frozen)
    want_TV = oracle.difference(z_s, z_t, tokens_T, settings, frozen)
    largest = np.abs(want_TV).max()
    stats, dz_TV = _block(z_s, z_t, settings)
    dense_T, _, dense_TV = _differentiated(z_s, z_t, settings)
    for value_T, grad_TV in ((stats.value_T, dz_TV), (dense_T, dense_TV)):
        np.testing.assert_allclose(value_T, want_T, rtol=1e-9, atol=2e-7)
        np.testing.assert_allclose(grad_TV, want_TV, rtol=0, atol=2e-7 * largest)
    np.testing.assert_allclose(dense_TV, dz_TV, rtol=0, atol=1e-9)
    args = (*(jnp.asarray(x, jnp.float32) for x in (z_s, z_t)), jnp.asarray(tokens_T))
    rough, rough_TV = token_values.score_divergence_block(*args, settings)
    np.testing.assert_allclose(rough.value_T, stats.value_T, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(rough_TV, dz_TV, rtol=0, atol=1e-5 * largest)


def test_bug_42_what_only_the_teacher_likes():
    """Bug 42: of a token outside the student's top k nothing is seen but the tail: all its ids rise
    together, in proportion to what the student gives them; with the union the token itself does.

    Student .6 .2 .1 .06 .04 and teacher .1 .1 .1 .1 .6, k = 2: the teacher's choice is id 4.
    """
    p, q = np.array([[0.6, 0.2, 0.1, 0.06, 0.04]]), np.array([[0.11, 0.1, 0.1, 0.09, 0.6]])

    def gradient(whose, tail):
        settings = divergence_loss.Divergence("fkl", top_k=2, top_k_of=whose, tail=tail)
        return _block(_filled(np.log(p)), _filled(np.log(q)), settings)[1][0, :5]

    # renormalised: .75 .25 against .11 .1 over .21, and nothing at all about the others
    want = [0.75 - 0.11 / 0.21, 0.25 - 0.1 / 0.21, 0, 0, 0]
    np.testing.assert_allclose(gradient("student", False), want, atol=1e-12)
    # tail: .6 .2 .2 against .11 .1 .79; the tail's -.59 is shared .1 : .06 : .04
    want = [0.49, 0.1, -0.295, -0.177, -0.118]
    np.testing.assert_allclose(gradient("student", True), want, rtol=1e-9)
    # the teacher's two are 4 and 0; union {0, 1, 4}: .6 .2 .04, rest .16, against .11 .1 .6 .19
    want = [0.49, 0.1, -0.03 / 1.6, -0.03 * 0.6 / 1.6, -0.56]
    np.testing.assert_allclose(gradient("union", True), want, rtol=1e-9)


@pytest.mark.parametrize("tail", [False, True])
def test_the_union_counts_an_id_once(tail):
    """Where both sides name the same ids, the union is either side's set."""
    rng = np.random.default_rng(7)
    ranks = np.tile(np.arange(VOCABULARY) / 3, (TOKENS, 1))
    z_s = rng.permuted(ranks, axis=1)
    z_t = z_s * 0.5 + rng.normal(size=z_s.shape) * 0.01
    student, teacher, union = (
        _block(z_s, z_t, divergence_loss.Divergence("jsd", top_k=4, top_k_of=whose, tail=tail))
        for whose in ("student", "teacher", "union")
    )
    for stats, dz_TV in (student, teacher):
        np.testing.assert_allclose(stats.value_T, union[0].value_T, rtol=1e-12)
        np.testing.assert_allclose(dz_TV, union[1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_rows_of_weight_0_that_are_live(implementation):
    """A correct prefix: reported as ever, weight exactly 0, and no gradient of its own; rows that
    are neither live nor weighted may hold anything."""
    settings = THROUGH_THE_HEADS[0]
    arrays, z_s, z_t, frozen = _point(settings)
    weight_T = np.linspace(0.1, 1, TOKENS)
    weight_T[:9] = 0
    live_T = np.arange(TOKENS) >= 4
    value_T = oracle.value(z_s, z_t, arrays[4], settings, frozen)
    dz_TV = oracle.slope(z_s, z_t, arrays[4], settings, frozen) * weight_T[:, None]
    broken = tuple(x.copy() for x in arrays)
    for x, fill in zip(broken, (np.nan, np.inf, None, None, None, np.nan, -np.inf), strict=True):
        if fill is not None:
            x[:4] = fill
    with jax.enable_x64(True):
        (loss, stats), grads = _loss(settings, implementation, broken, weight_T, live_T)
        (plain, _), plain_grads = _loss(settings, implementation, broken, weight_T)
        nothing = _loss(settings, implementation, broken, weight_T * 0, live_T)
    np.testing.assert_allclose(stats.value_T, np.where(live_T, value_T, 0), rtol=1e-10)
    for leaf in map(np.asarray, stats):
        assert np.isfinite(leaf).all()
        np.testing.assert_array_equal(leaf[:4], 0)
    assert np.asarray(stats.entropy_student_T)[4:9].all()
    _near(grads[1], dz_TV.T @ arrays[0], 1e-10, "head")
    np.testing.assert_array_equal(grads[0][:9], 0)
    assert np.abs(grads[0][9:]).min(axis=1).all()
    assert float(loss) == float(plain)
    np.testing.assert_array_equal(grads[0], plain_grads[0])
    # live rows of weight 0 move the others to other blocks, whose sums add up in another order
    _near(grads[1], plain_grads[1], 1e-14, "head")
    for leaf in (nothing[0][0], *nothing[1]):
        np.testing.assert_array_equal(leaf, 0)
    np.testing.assert_array_equal(nothing[0][1].value_T, stats.value_T)


def test_weighted_rows_are_live():
    """live_T adds rows; it takes none away."""
    settings = dataclasses.replace(PLAIN, divergence="fkl")
    arrays = _arrays(8)
    weight_T = np.linspace(0, 1, TOKENS)
    with jax.enable_x64(True):
        want = _loss(settings, "dense", arrays, weight_T)
        got = _loss(settings, "dense", arrays, weight_T, np.zeros(TOKENS, bool))
    for mine, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_the_ratio_moves_the_gradient_and_has_none():
    """d(f v)/dz = f dv/dz with f constant, though f depends on the student; and old = now is 1."""
    settings = dataclasses.replace(BASE, divergence="rkl")
    off = dataclasses.replace(settings, ratio_clip=0.0, rollout_clip=0.0)
    arrays = _arrays(9)
    z_s, z_t = oracle.logits(arrays[0], arrays[2]), oracle.logits(arrays[1], arrays[3])
    plain, plain_TV = _block(z_s, z_t, off, *arrays[4:])
    stats, dz_TV = _block(z_s, z_t, settings, *arrays[4:])
    _, fresh_TV = _block(z_s, z_t, settings, arrays[4], None, stats.logp_sampling_T)
    ratio_T = stats.ratio_T
    assert ratio_T.min() < 1 < ratio_T.max()
    np.testing.assert_array_equal(plain.ratio_T, 1)
    np.testing.assert_allclose(stats.value_T, ratio_T * plain.value_T, rtol=1e-12)
    np.testing.assert_allclose(dz_TV, ratio_T[:, None] * plain_TV, rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(fresh_TV, plain_TV)
