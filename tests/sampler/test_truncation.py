"""Oracle: float64 NumPy with a full sort of the vocabulary, and a chi-square of drawn tokens."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import truncation_oracle
from conftest import mostly_slow
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from copsd_jax.sampler import truncation

PLAIN = (1.0, 0, 1.0, 0.0)
SETTINGS = [
    PLAIN,
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
ALL = list(itertools.product((0.0, 0.7, 1.0, 1.5), (0, 1, 7, 290), (1.0, 0.9, 0.4), (0.0, 0.1)))


def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()


def oracle(logits, setting, valid):
    """Probabilities of one row, (tempered, truncated), by sorting and renormalising."""
    temperature, top_k, top_p, min_p = setting
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
        crossing = p[np.cumsum(p) - p < top_p].min()
        p = np.where(p >= crossing, p, 0.0)
        p = p / p.sum()
    p = np.where(p >= min_p * p[0], p, 0.0)
    out = np.empty_like(p)
    out[order] = p / p.sum()
    return tempered, out


def problem(count, vocab, seed=0, scale=3.0):
    """Logits of `count` rows, the likeliest three ids of which must not be drawn."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((count, vocab)) * scale).astype(np.float32)
    valid = np.ones(vocab, bool)
    valid[-3:] = False
    logits[:, -3:] = 12.0
    return logits, valid


def rows_of(settings):
    types = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    columns = zip(*settings, strict=True)
    return truncation.RowSettings(*(jnp.asarray(c, t) for c, t in zip(columns, types, strict=True)))


def keys_of(count, seed=7):
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(key, i)))(jnp.arange(count))


@functools.lru_cache
def compiled(function, form):
    if function is truncation_oracle.log_probs:
        return jax.jit(lambda logits, rows, valid: function(logits, rows, form, valid))
    return jax.jit(lambda logits, keys, rows, valid: function(logits, keys, rows, form, valid))


def log_probs(logits, settings, valid, form=None):
    run = compiled(truncation_oracle.log_probs, form or truncation.find_features(settings))
    return jax.device_get(run(logits, rows_of(settings), jnp.asarray(valid)))


def sample(logits, keys, settings, valid, form=None):
    run = compiled(truncation.sample, form or truncation.find_features(settings))
    return jax.device_get(run(logits, keys, rows_of(settings), jnp.asarray(valid)))


@pytest.mark.parametrize("vocab", [40, 300, 1000])
@pytest.mark.parametrize("levels", [None, 4])
def test_every_combination_equals_sorted_float64(vocab, levels):
    """One program for all combinations; with `levels`, logits so coarse that edges are ties."""
    settings = [s for s in ALL if s[1] <= vocab]
    logits, valid = problem(len(settings), vocab)
    if levels:
        logits = np.round(logits * levels / 6) / levels * 6
    tempered, truncated = log_probs(logits, settings, valid)
    assert tempered.dtype == truncated.dtype == np.float32
    token, logp, logp_truncated = sample(logits, keys_of(len(settings)), settings, valid)
    for j, setting in enumerate(settings):
        want_tempered, want = oracle(logits[j], setting, valid)
        np.testing.assert_array_equal(np.isfinite(truncated[j]), want > 0, err_msg=str(setting))
        np.testing.assert_allclose(np.exp(tempered[j]), want_tempered, rtol=2e-5, atol=1e-9)
        np.testing.assert_allclose(np.exp(truncated[j]), want, rtol=2e-5, atol=1e-9)
        assert want[token[j]] > 0, setting
        np.testing.assert_allclose(logp[j], np.log(want_tempered[token[j]]), atol=2e-5)
        np.testing.assert_allclose(logp_truncated[j], np.log(want[token[j]]), atol=2e-5)


@pytest.mark.long
@pytest.mark.parametrize("largest", mostly_slow([20, 150]))
def test_mixed_rows_equal_each_row_alone(largest):
    """Alone: one row under its own least Form. The mix needs all machinery, and a larger cap.

    The whole vocabulary takes 134 random numbers a row: more than one cap, fewer than the other.
    """
    vocab = 700
    settings = [s for s in SETTINGS if s[1] <= largest] * 6
    logits, valid = problem(len(settings), vocab, seed=2)
    keys = keys_of(len(settings))
    mixed = both(logits, keys, settings, valid)
    for j, setting in enumerate(settings):
        row = slice(j, j + 1)
        alone = both(logits[row], keys[row], [setting], valid)
        assert mixed[0][j] == alone[0][0], setting
        for got, want in zip(mixed[1:], alone[1:], strict=True):
            np.testing.assert_allclose(got[j], want[0], atol=1e-6, rtol=1e-6, err_msg=str(setting))


def both(logits, keys, settings, valid):
    """`sample` and `log_probs` in one program, which compiles faster than two."""
    run = all_at_once(truncation.find_features(settings))
    return jax.device_get(run(logits, keys, rows_of(settings), valid))


@functools.lru_cache
def all_at_once(form):
    def run(logits, keys, rows, valid):
        drawn = truncation.sample(logits, keys, rows, form, valid)
        return *drawn, *truncation_oracle.log_probs(logits, rows, form, valid)

    return jax.jit(run)


def test_a_row_depends_on_its_key_logits_and_settings_alone():
    """Bit for bit within one program: wherever the row stands and whatever stands beside it."""
    settings = SETTINGS * 2
    logits, valid = problem(len(settings), 300)
    keys = keys_of(len(settings))
    order = np.random.default_rng(0).permutation(len(settings))
    plain = sample(logits, keys, settings, valid)
    moved = sample(logits[order], keys[order], [settings[j] for j in order], valid)
    for a, b in zip(plain, moved, strict=True):
        np.testing.assert_array_equal(a[order], b)
    form = truncation.find_features(settings)
    others = [s if j % 3 == 0 else PLAIN for j, s in enumerate(settings)]
    for a, b in zip(plain, sample(logits, keys, others, valid, form), strict=True):
        np.testing.assert_array_equal(a[::3], b[::3])


def test_noise_is_a_prefix_of_longer_noise():
    """What lets a row have the same token in a program that needs more numbers."""
    keys = keys_of(3)
    longest = np.asarray(truncation._gumbel(keys, 700))
    for size in (1, 16, 128, 131, 512):
        np.testing.assert_array_equal(truncation._gumbel(keys, size), longest[:, :size])
    assert len(np.unique(longest)) > 2000  # of 2,100: no number twice but by chance


def test_extreme_logits_are_finite_where_kept():
    logits = np.full((2, 300), -1e4, np.float32)
    logits[0, 7] = 1e4
    logits[1, [3, 200]] = 1e4
    valid = np.ones(300, bool)
    for setting in ((1.0, 0, 0.9, 0.0), (1.0, 5, 0.9, 0.01), PLAIN):
        _, truncated = log_probs(logits, [setting] * 2, valid)
        np.testing.assert_allclose(truncated[0, 7], 0.0, atol=1e-6)
        np.testing.assert_allclose(truncated[1, [3, 200]], np.log(0.5), atol=1e-6)
        assert not np.isnan(truncated).any()


def test_what_is_off_keeps_the_faintest_tokens():
    """Down to weights below the normal numbers, though other rows use top-p and min-p."""
    logits = np.full((4, 300), -300.0, np.float32)
    logits[:, [5, 140, 299]] = [0.0, -40.0, -90.0]
    settings = [(1.0, 3, 1.0, 0.0), PLAIN, (1.0, 3, 0.9, 0.1), (1.0, 0, 0.9, 0.1)]
    _, truncated = log_probs(logits, settings, np.ones(300, bool))
    for j in (0, 1):
        np.testing.assert_allclose(truncated[j, [5, 140, 299]], [0.0, -40.0, -90.0], rtol=1e-6)
    for j in (2, 3):
        assert np.flatnonzero(np.isfinite(truncated[j])).tolist() == [5]


def test_ties():
    """top-k keeps the lower ids of equal logits; top-p all tokens equal to the one that crosses."""
    row = np.zeros(300, np.float32)
    row[[290, 291, 130, 20]] = [2.0, 1.0, 1.0, 1.0]
    peaked = np.where(row > 0, row + 9, 0).astype(np.float32)
    cases = [
        (row, (1.0, 2, 1.0, 0.0), {20, 290}),
        (row, (1.0, 4, 1.0, 0.0), {20, 130, 290, 291}),
        (row, (1.0, 3, 0.6, 0.0), {20, 130, 290}),
        (peaked, (1.0, 0, 0.6, 0.0), {20, 130, 290, 291}),
        (peaked, (1.0, 0, 0.4, 0.0), {290}),
    ]
    logits = np.stack([case[0] for case in cases])
    _, out = log_probs(logits, [case[1] for case in cases], np.ones(300, bool))
    for j, (_, setting, want) in enumerate(cases):
        assert set(np.flatnonzero(np.isfinite(out[j]))) == want, setting


def test_tied_edge_is_drawn_as_often_as_its_equals():
    """All tokens of the edge of top-p and min-p, in several blocks, and none below."""
    rng = np.random.default_rng(5)
    row = rng.normal(size=1000).astype(np.float32) - 9
    row[[4, 300, 301, 999]] = 0.7310586
    settings = [(0.7, 0, 0.9, 0.0), (0.9, 0, 1.0, 0.999), (1.1, 0, 0.3, 0.5)] * 2000
    logits = np.broadcast_to(row, (len(settings), 1000))
    token, _, logp = sample(logits, keys_of(len(settings), 0), settings, np.ones(1000, bool))
    np.testing.assert_allclose(logp, np.log(0.25), atol=1e-6)
    for k in range(3):
        seen = np.bincount(token[k::3], minlength=1000)[[4, 300, 301, 999]]
        assert seen.sum() == 2000
        assert scipy.stats.chisquare(seen).pvalue > 0.01


@pytest.mark.parametrize("vocab", [256, 1408, 6400])
def test_top_k_by_blocks_equals_a_stable_sort(vocab):
    """Many equal values, so that the order of ties shows; zeros of both signs are equal."""
    rng = np.random.default_rng(3)
    x = rng.integers(-10, 2, (4, vocab)).astype(np.float32)
    x[2:] = rng.integers(-vocab // 6, 2, (2, vocab))  # the best ones far apart
    x[x == 0] *= rng.choice([-1, 1], (x == 0).sum()).astype(np.float32)
    order = np.argsort(-x, axis=-1, kind="stable")

    @functools.partial(jax.jit, static_argnames="k")
    def best(x_JV, k):
        x_JNb = truncation._cut_into_draw_blocks(x_JV)
        return truncation._find_drawable_top_k(x_JNb, jnp.max(x_JNb, axis=-1), k)

    for k in (1, 9, 50, 200):
        value, index = best(x, k)
        np.testing.assert_array_equal(index, order[:, :k])
        np.testing.assert_array_equal(value, np.take_along_axis(x, order[:, :k], axis=1))


CHI_SQUARE = {
    "plain": PLAIN,
    "temperature": (0.7, 0, 1.0, 0.0),
    "top_k": (1.0, 20, 1.0, 0.0),
    "top_p": (1.0, 0, 0.9, 0.0),
    "min_p": (1.0, 0, 1.0, 0.02),
    "all": (1.3, 60, 0.9, 0.03),
}


# The slow ones each take five seconds; `all` has their filters together.
@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("top_k", "top_p") else ())
        for name in CHI_SQUARE
    ],
)
def test_samples_by_chi_square(name):
    """50,000 draws of one row against the exact distribution; deterministic keys."""
    count, vocab, setting = 50_000, 300, CHI_SQUARE[name]
    logits, valid = problem(1, vocab, seed=1, scale=2.0)
    same = jnp.broadcast_to(logits, (count, vocab))
    tokens, logp, logp_truncated = sample(same, keys_of(count), [setting] * count, valid)
    tempered, want = oracle(logits[0], setting, valid)
    seen = np.bincount(tokens, minlength=vocab)
    assert not seen[want == 0].any()
    np.testing.assert_allclose(logp, np.log(tempered[tokens]), atol=2e-5)
    np.testing.assert_allclose(logp_truncated, np.log(want[tokens]), atol=2e-5)
    assert p_value(seen, want * count) > 0.01


def p_value(seen, expected):
    """Of the chi-square test; tokens expected fewer than 5 times count as one."""
    common = expected >= 5
    seen = np.append(seen[common], seen[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    filled = expected > 0
    return scipy.stats.chisquare(seen[filled], expected[filled]).pvalue


def test_greedy_rows_among_noisy_ones():
    """Even rows greedy, with settings that they ignore; of equal logits the lowest id."""
    settings = [(0.0, 3, 0.5, 0.5), (0.7, 0, 0.9, 0.0), (0.0, 0, 1.0, 0.0), (1.0, 9, 1.0, 0.0)] * 8
    logits, valid = problem(len(settings), 300, seed=4)
    logits[:, [31, 160, 290]] = 11.0
    token, logp, logp_truncated = sample(logits, keys_of(len(settings)), settings, valid)
    np.testing.assert_array_equal(token[::2], 31)
    assert len(set(token[1::2].tolist())) > 1
    np.testing.assert_array_equal(logp_truncated[::2], 0.0)
    want = [np.log(softmax(row.astype(np.float64))[31]) for row in logits[::2]]
    np.testing.assert_allclose(logp[::2], want, atol=2e-6)


def test_ids_outside_valid_are_never_drawn():
    """Three ids of one block may be drawn, all others are likelier; and None is all ids."""
    settings = SETTINGS * 60
    logits, _ = problem(len(settings), 300)
    few = np.zeros(300, bool)
    few[[140, 150, 160]] = True
    logits[:, few] -= 40
    keys = keys_of(len(settings))
    token, *_ = sample(logits, keys, settings, few)
    assert set(token.tolist()) == {140, 150, 160}
    form, rows = truncation.find_features(settings), rows_of(settings)
    everywhere = sample(logits, keys, settings, np.ones(300, bool))
    unmasked = jax.jit(lambda x, k, r: truncation.sample(x, k, r, form, None))(logits, keys, rows)
    np.testing.assert_array_equal(unmasked[0], everywhere[0])
    for a, b in zip(unmasked[1:], everywhere[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("vocab", mostly_slow([300, 1152]))
def test_rows_and_vocabulary_split_over_devices(vocab):
    """Eight devices equal one. With `shards`, no device gets the logits of a whole row."""
    assert vocab % (128 * 2)
    settings = [s for s in SETTINGS * 2 if s[1] <= 20][:16]
    form, rows = truncation.find_features(settings), rows_of(settings)
    logits, valid = problem(len(settings), vocab, seed=6)
    keys = keys_of(len(settings))
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    over_rows = ("data", "fsdp")
    split = [
        jax.device_put(x, NamedSharding(mesh, P(*place)))
        for x, place in (
            (logits, (over_rows, "tensor")), (keys, (over_rows,)), (rows, (over_rows,)),
            (valid, ("tensor",)),
        )
    ]  # fmt: skip
    want = sample(logits, keys, settings, valid)
    for shards in (1, 2):
        run = jax.jit(
            lambda x, k, r, v, shards=shards: truncation.sample(x, k, r, form, v, shards=shards)
        )
        program = run.lower(*split).compile()
        token, *others = program(*split)
        np.testing.assert_array_equal(token, want[0])
        for got, alone in zip(others, want[1:], strict=True):
            np.testing.assert_allclose(got, alone, atol=1e-6, rtol=1e-6)
        if shards == 2:
            text = str(program.as_text())
            gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
            assert gathered
            assert max(int(shape.split(",")[-1]) for shape in gathered) < vocab, gathered


def test_form_is_the_least_that_serves_all():
    off = truncation.Features(
        greedy=False, noise=True, tempered=False, cap=0, full=True, top_p=False, min_p=False
    )
    assert vars(truncation.find_features([PLAIN])) == vars(off)
    greedy = vars(truncation.find_features([(0.0, 40, 0.9, 0.1)]))
    assert greedy == dict.fromkeys(greedy, False) | {"greedy": True, "cap": 0}
    for settings, changed in (
        ([(0.7, 0, 1.0, 0.0)], {"tempered": True}),
        ([(0.0, 40, 0.9, 0.1), PLAIN], {"greedy": True}),
        ([(1.0, 1, 1.0, 0.0)], {"cap": 16, "full": False}),
        ([(1.0, 16, 1.0, 0.0)], {"cap": 16, "full": False}),
        ([(1.0, 17, 1.0, 0.0), (1.0, 3, 1.0, 0.0)], {"cap": 32, "full": False}),
        ([(1.0, 64, 1.0, 0.0), PLAIN], {"cap": 64}),
        ([(1.0, 5, 1.0, 0.0), (0.0, 0, 1.0, 0.0)], {"cap": 16, "full": False, "greedy": True}),
        ([(1.0, 0, 0.9, 0.0), PLAIN], {"top_p": True}),
        ([PLAIN, (1.0, 0, 1.0, 0.1)], {"min_p": True}),
    ):
        assert vars(truncation.find_features(settings)) == vars(off) | changed, settings
    with pytest.raises(ValueError, match="at least one"):
        truncation.find_features([])


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
        truncation.check_settings(*settings, vocab_size=10)
