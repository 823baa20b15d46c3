"""Oracle: the full forward over prefix, prompt and completion as plain tokens, with no cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copsd_jax import lora, model
from copsd_jax.sampler import engine, host, truncate

CONFIG = dataclasses.replace(model.SHAPES["tiny"], vocab_size=300, tie_embeddings=False)
DECODER = model.Decoder(CONFIG, jnp.float32)
PREFIX = (7, 250, 31, 4, 99)
PROMPTS = [(5, 6, 7), (1,), tuple(range(40, 61)), (5, 6, 7), (280,) * 9, (2, 3), (8, 8, 9), (1,)]
PLAIN = host.Sampling(max_tokens=12, temperature=0.8)
CUT = host.Sampling(max_tokens=12, temperature=1.2, top_k=40, top_p=0.9, min_p=0.02)
GREEDY = host.Sampling(max_tokens=12, temperature=0.0)


@functools.cache
def params():
    tree = model.init(CONFIG, jax.random.key(0), jnp.float32)
    tree["head"]["kernel"] = tree["head"]["kernel"] * 12.0  # logits of deviation 2
    return tree


@functools.cache
def prefix():
    return engine.encode_prefix(DECODER, params(), PREFIX)


def keys_of(prompts, seed=0):
    names = [f"row {i}" for i in range(len(prompts))]
    return host.stream_keys(seed, "rollout", 0, names, [0] * len(prompts))


def generate(sampling, prompts=PROMPTS, keys=None, shared=True, **options):
    keys = keys_of(prompts) if keys is None else keys
    options = {"slots": 8, "steps": 4, **options}
    if shared:
        options["prefix"] = prefix()
    return host.generate(DECODER, options.pop("params", params()), prompts, sampling,
                         keys=keys, **options)  # fmt: skip


@functools.partial(jax.jit, static_argnames="length")
def _forward(tokens_BL, lengths_B, tree, length):
    index_L = jnp.arange(length)
    positions = jnp.broadcast_to(index_L[None], tokens_BL.shape)
    segments = (index_L[None] < lengths_B[:, None]).astype(jnp.int32)
    out = DECODER.apply({"params": tree}, (model.Stream(tokens_BL, positions, segments),))[0]
    return model.logits(out.hidden_BLD, model.head(tree))


def predicting(prompts, completions, shared=PREFIX, tree=None):
    """Logits [C, V] that predict each completion's tokens, from the whole text at once."""
    texts = [(*shared, *p, *c.ids) for p, c in zip(prompts, completions, strict=True)]
    tokens = np.zeros((len(texts), 64), np.int32)
    for i, text in enumerate(texts):
        tokens[i, : len(text)] = text
    out = _forward(tokens, np.array([len(t) for t in texts]), tree or params(), 64)
    return [
        np.asarray(out[i, len(text) - len(c.ids) - 1 : len(text) - 1])
        for i, (text, c) in enumerate(zip(texts, completions, strict=True))
    ]


def same(a, b, atol=1e-5):
    assert [c.ids for c in a] == [c.ids for c in b]
    assert [c.finish for c in a] == [c.finish for c in b]
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x.logps, y.logps, atol=atol)
        np.testing.assert_allclose(x.logps_truncated, y.logps_truncated, atol=atol)


@pytest.mark.parametrize("shared", [True, False])
def test_bug_05_greedy_equals_argmax_of_the_full_forward(shared):
    """Prompts of unequal lengths in one batch: each continues from its own last token (bug 5)."""
    out = generate(GREEDY, shared=shared)
    assert [len(c.ids) for c in out] == [12] * len(PROMPTS)
    for c, logits in zip(out, predicting(PROMPTS, out, PREFIX if shared else ()), strict=True):
        np.testing.assert_array_equal(c.ids, logits.argmax(-1))
        want = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
        np.testing.assert_allclose(c.logps, -want, atol=1e-4)
        np.testing.assert_array_equal(c.logps_truncated, 0.0)


@pytest.mark.parametrize("sampling", [PLAIN, CUT])
def test_log_probs_equal_the_full_forward(sampling):
    valid = np.arange(300) < 290
    out = generate(sampling, valid_V=valid)
    s = sampling
    score = jax.jit(truncate.log_probs, static_argnums=(1, 2, 3, 4))
    for c, logits in zip(out, predicting(PROMPTS, out), strict=True):
        assert max(c.ids) < 290
        rows = score(logits, s.temperature, s.top_k, s.top_p, s.min_p, jnp.asarray(valid))
        for got, want in zip((c.logps, c.logps_truncated), rows, strict=True):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, want[np.arange(12), np.array(c.ids)], atol=1e-4)


@pytest.mark.parametrize("sampling", [PLAIN, CUT])
def test_texts_do_not_depend_on_slots_order_or_neighbours(sampling, monkeypatch):
    want = generate(sampling)
    keys = np.asarray(keys_of(PROMPTS))
    assert len({c.ids for c in want}) == len(PROMPTS)  # equal prompts, other keys, other texts
    for slots, steps in ((1, 16), (3, 4)):
        same(generate(sampling, slots=slots, steps=steps), want)
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    mixed = generate(sampling, [PROMPTS[i] for i in order], keys[order], slots=3)
    same(mixed, [want[i] for i in order])
    same(generate(sampling, PROMPTS[4:5], keys[4:5]), want[4:5])
    monkeypatch.setattr(host, "PACK", 24)
    monkeypatch.setattr(host, "SMALLEST_PACK", 8)
    same(generate(sampling), want)


def test_equal_prompts_are_prefilled_once(monkeypatch):
    rows = []
    prefill = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda *a: rows.append(int(a[-1].max())) or prefill(*a))
    prompts = [(3, 4, 5)] * 7 + [(9, 9)]
    out = generate(PLAIN, prompts)
    assert rows == [2]
    assert len({c.ids for c in out[:7]}) == 7


def test_limits_of_single_texts():
    limits = [1, 2, 5, 12, 3, 1, 7, 12]
    want = generate(PLAIN)
    out = generate(PLAIN, limits=limits, slots=3)
    assert [len(c.ids) for c in out] == limits
    for a, b in zip(out, want, strict=True):
        assert a.ids == b.ids[: len(a.ids)]
        assert a.finish == "length"


def test_bug_06_stop_ids_end_a_text_and_are_part_of_it():
    """Whatever the id is: 0, which pads every array here, is sampled, kept and scored (bug 6)."""
    tree = params() | {"head": {"kernel": params()["head"]["kernel"].at[0].set(0.0)}}
    bias = np.ones(300, bool)
    bias[40:] = False  # 40 ids left, so that each of them is drawn often
    sampling = host.Sampling(40, stop_ids=(0, 17))
    out = generate(sampling, params=tree, shared=False, valid_V=bias, slots=3)
    ends = {c.ids[-1] for c in out if c.finish == "stop"}
    assert ends == {0, 17}
    logits = predicting(PROMPTS, out, (), tree)
    for c, rows in zip(out, logits, strict=True):
        assert not {0, 17} & set(c.ids[:-1])
        assert (c.finish == "stop") == (c.ids[-1] in (0, 17))
        assert c.finish == "stop" or len(c.ids) == 40
        at = np.arange(len(c.ids)), list(c.ids)
        np.testing.assert_allclose(c.logps, jax.nn.log_softmax(rows)[at], atol=1e-4)
        want = jax.nn.log_softmax(jnp.where(bias[None], rows, -np.inf))
        np.testing.assert_allclose(c.logps_truncated, want[at], atol=1e-4)


def letters(*_):
    """Bytes of the ids: 0-9 one letter, 10-19 that letter doubled, the rest others."""
    alphabet = "abcdefghij"
    table = [*alphabet, *(x * 2 for x in alphabet)]
    return [text.encode() for text in table] + [f"<{i}>".encode() for i in range(20, 300)]


@pytest.mark.parametrize("stop", [("a",), ("bb",), ("ab", "ca"), ("ccc", "ddd", "é")])
def test_stop_strings_cut_after_the_token_that_completes_them(stop):
    valid = np.arange(300) < 20
    pieces = letters()
    prompts = [(i, 3) for i in range(24)]
    free = generate(host.Sampling(30), prompts, shared=False, valid_V=valid)
    out = generate(host.Sampling(30, stop=stop), prompts, shared=False, valid_V=valid, slots=3,
                   token_bytes=pieces)  # fmt: skip
    stopped = 0
    for a, b in zip(out, free, strict=True):
        texts = [b"".join(pieces[t] for t in b.ids[: n + 1]).decode() for n in range(30)]
        cut = next((n + 1 for n, text in enumerate(texts) if any(s in text for s in stop)), None)
        assert a.ids == b.ids[:cut]
        assert len(a.logps) == len(a.logps_truncated) == len(a.ids)
        np.testing.assert_allclose(a.logps, b.logps[:cut], atol=1e-5)
        assert a.finish == ("length" if cut is None else "stop")
        stopped += cut is not None and cut > 1
    assert stopped > 2


def test_every_token_has_noise_of_its_own():
    """A head of zeros: all tokens equally likely, whatever came before."""
    tree = params() | {"head": {"kernel": jnp.zeros((300, CONFIG.d_model), jnp.float32)}}
    out = generate(host.Sampling(40), params=tree, shared=False)
    drawn = np.array([c.ids for c in out])
    assert len(np.unique(drawn)) > 150  # 320 draws of 300
    np.testing.assert_allclose([c.logps for c in out], -np.log(300), atol=1e-5)


def test_adapter_equals_merged_weights():
    key = jax.random.key(3)
    adapter = lora.init(CONFIG, 4, ("q", "v", "down"), key)
    adapter = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape, x.dtype), adapter)
    kv = engine.encode_prefix(DECODER, params(), PREFIX, adapter, 0.5)
    run = functools.partial(host.generate, DECODER, prompts=PROMPTS, sampling=PLAIN,
                            keys=keys_of(PROMPTS), slots=8, steps=4)  # fmt: skip
    merged = lora.merge(params(), adapter, 0.5)
    want = run(merged, prefix=engine.encode_prefix(DECODER, merged, PREFIX))
    same(run(params(), prefix=kv, adapter=adapter, adapter_scale=0.5), want, atol=1e-4)
    assert [c.ids for c in want] != [c.ids for c in generate(PLAIN)]


def test_bfloat16_weights():
    decoder = model.Decoder(CONFIG, jnp.bfloat16)
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    out = host.generate(decoder, tree, PROMPTS, PLAIN, keys=keys_of(PROMPTS), steps=4)
    logits = predicting(PROMPTS, out, ())
    for c, rows in zip(out, logits, strict=True):
        want = jax.nn.log_softmax(rows / 0.8)[np.arange(12), list(c.ids)]
        np.testing.assert_allclose(c.logps, want, atol=0.25)


def test_nothing_is_compiled_again_for_other_texts():
    calls = []
    generate(PLAIN, progress=lambda *a: calls.append(a))
    assert calls[-1] == (8, 8, 96)
    programs = (engine.prefill, engine.insert, engine.decode)
    before = [f._cache_size() for f in programs]
    others = [(*(int(t) + 1 for t in p), 4) for p in reversed(PROMPTS)]
    generate(PLAIN, others, keys_of(others, seed=5), limits=[3, 4, 5, 6, 7, 8, 9, 10])
    assert [f._cache_size() for f in programs] == before


def test_keys():
    """The chain by hand; every part counts; nothing else does."""
    rows = ["a", "a", "b", "a"]
    keys = np.asarray(host.stream_keys(1, "evaluation", 2, rows, [0, 1, 0, 0]))
    assert keys.dtype == np.uint32
    assert keys.shape == (4, 2)
    fold = jax.random.fold_in
    words = (1, 2, 0xCA978112, 0xCA1BBDCA, 1)  # SHA-256 of "a" begins with ca978112ca1bbdca
    by_hand = functools.reduce(fold, words, jax.random.key(1, impl="threefry2x32"))
    np.testing.assert_array_equal(keys[1], jax.random.key_data(by_hand))
    np.testing.assert_array_equal(keys[0], keys[3])
    others = [host.stream_keys(*a, ["a"], [0]) for a in
              ((1, "rollout", 2), (1, "evaluation", 3), (2, "evaluation", 2))]  # fmt: skip
    assert len({tuple(k) for k in [*keys[:3].tolist(), *(np.asarray(o)[0] for o in others)]}) == 6
    with pytest.raises(ValueError, match=r"purpose is 'x': the choices are rollout, evaluation"):
        host.stream_keys(0, "x", 0, [], [])


def test_no_prompts():
    assert generate(PLAIN, [], np.zeros((0, 2), np.uint32)) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"slots": 0}, "slots is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"sampling": host.Sampling(0)}, "max_tokens is 0"),
        ({"sampling": host.Sampling(3, temperature=-1.0)}, "temperature is -1.0"),
        ({"sampling": host.Sampling(3, top_k=301)}, "top_k is 301: it must be 0 .off. to 300"),
        ({"sampling": host.Sampling(3, stop_ids=(300,))}, "stop_ids has 300"),
        ({"sampling": host.Sampling(3, stop=("",))}, "stop string must not be empty"),
        ({"sampling": host.Sampling(3, stop=("a",))}, "stop strings need token_bytes"),
        ({"sampling": host.Sampling(4093)}, "prompt 0 has 8 tokens .* the model has 4096"),
        ({"prompts": [(1,), ()]}, "prompt 1 is empty"),
        ({"prompts": [(1,), (300,)]}, "prompt 1 has ids 300 to 300"),
        ({"limits": [1] * 7 + [0]}, r"limits\[7\] is 0"),
        ({"limits": [1]}, "limits has 1 entries for 8"),
        ({"valid_V": np.zeros(300, bool)}, "at least one id"),
        ({"valid_V": np.ones(299, bool)}, "valid_V has shape"),
        ({"keys": np.zeros((3, 2), np.uint32)}, "keys are uint32"),
        (
            {"sampling": host.Sampling(3, stop=("a",)), "token_bytes": [b"a"]},
            "token_bytes has 1 entries",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message) as info:
        generate(options.pop("sampling", PLAIN), **options)
    assert "\n" not in str(info.value)
