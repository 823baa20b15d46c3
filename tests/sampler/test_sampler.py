"""Oracle: the full forward over prefix, prompt and completion as plain tokens, with no cache."""

import dataclasses
import functools
import gc
import resource

import jax
import jax.numpy as jnp
import numpy as np
import placing
import pytest
import truncation_oracle
from conftest import mostly_slow

from copsd_jax.model import lora, shared_prefix, transformer
from copsd_jax.model import policy as policy_lib
from copsd_jax.runtime import sharding
from copsd_jax.sampler import engine, loop, program_cache, request, truncation

CONFIG = dataclasses.replace(transformer.SHAPES["tiny"], vocab_size=300, tie_embeddings=False)
DECODER = transformer.Decoder(CONFIG, jnp.float32)
PREFIX = (7, 250, 31, 4, 99)
PROMPTS = [(5, 6, 7), (1,), tuple(range(40, 61)), (5, 6, 7), (280,) * 9, (2, 3), (8, 8, 9), (1,)]
PLAIN = request.Sampling(max_tokens=12, temperature=0.8)
CUT = request.Sampling(max_tokens=12, temperature=1.2, top_k=40, top_p=0.9, min_p=0.02)
GREEDY = request.Sampling(max_tokens=12, temperature=0.0)


@functools.cache
def params():
    tree = transformer.init_params(CONFIG, jax.random.key(0), jnp.float32)
    tree["head"]["kernel"] = tree["head"]["kernel"] * 12.0  # logits of deviation 2
    return tree


@functools.cache
def prefix():
    return shared_prefix.encode_prefix_ids(DECODER, policy_lib.Policy(params()), PREFIX)


def keys_of(prompts, seed=0):
    names = [f"row {i}" for i in range(len(prompts))]
    return request.derive_sampling_keys(seed, "rollout", 0, names, [0] * len(prompts))


SIZES = [field.name for field in dataclasses.fields(request.SamplerSettings)]


def result(sampling, prompts=PROMPTS, keys=None, shared=True, decoder=DECODER, **options):
    keys = keys_of(prompts) if keys is None else keys
    sizes = {"slots": 8, "steps": 4}
    sizes |= {name: options.pop(name) for name in SIZES if name in options}
    if shared:
        options["prefix"] = prefix()
    policy = options.pop("policy", policy_lib.Policy(options.pop("params", params())))
    vocabulary = request.Vocabulary(
        options.pop("valid_V", np.ones(300, bool)), options.pop("token_bytes", ())
    )
    return loop.generate(
        decoder, policy, prompts, sampling, keys=keys, settings=request.SamplerSettings(**sizes),
        vocabulary=vocabulary, **options,
    )  # fmt: skip


def generate(*args, **options):
    return result(*args, **options).completions


@functools.partial(jax.jit, static_argnames="length")
def _forward(tokens_BL, lengths_B, tree, length):
    index_L = jnp.arange(length)
    positions = jnp.broadcast_to(index_L[None], tokens_BL.shape)
    segments = (index_L[None] < lengths_B[:, None]).astype(jnp.int32)
    out = DECODER.apply({"params": tree}, (transformer.Stream(tokens_BL, positions, segments),))[0]
    return transformer.compute_model_logits(out.hidden_BLD, transformer.get_head(tree))


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
    one = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
    dtypes = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    settings = truncation.RowSettings(
        *(jnp.full(12, x, d) for x, d in zip(one, dtypes, strict=True))
    )
    score = jax.jit(truncation_oracle.log_probs, static_argnums=2)
    for c, logits in zip(out, predicting(PROMPTS, out), strict=True):
        assert max(c.ids) < 290
        rows = score(logits, settings, truncation.find_features([one]), jnp.asarray(valid))
        for got, want in zip((c.logps, c.logps_truncated), rows, strict=True):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, want[np.arange(12), np.array(c.ids)], atol=1e-4)


@pytest.mark.parametrize("sampling", mostly_slow([CUT, PLAIN]))
def test_texts_do_not_depend_on_slots_order_or_neighbours(sampling):
    want = generate(sampling)
    keys = np.asarray(keys_of(PROMPTS))
    assert len({c.ids for c in want}) == len(PROMPTS)  # equal prompts, other keys, other texts
    for slots, steps in ((1, 16), (3, 4)):
        same(generate(sampling, slots=slots, steps=steps), want)
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    mixed = generate(sampling, [PROMPTS[i] for i in order], keys[order], slots=3)
    same(mixed, [want[i] for i in order])
    same(generate(sampling, PROMPTS[4:5], keys[4:5]), want[4:5])
    same(generate(sampling, pack=1, length=256), want)


def test_equal_prompts_are_prefilled_once():
    prompts = [(3, 4, 5)] * 7 + [(9, 9)]
    out = result(PLAIN, prompts, slots=2)
    assert out.stats.prompt_tokens == 5
    assert len({c.ids for c in out.completions[:7]}) == 7


def test_what_prompts_begin_with_is_prefilled_once():
    """Two families and a prompt that is the beginning of others; as if each stood alone."""
    one, two = tuple(range(30, 60)), tuple(range(90, 110))
    prompts = [(*one, 3, 4), (*one, 7), two, (*two, 9), one, (5, 6), (*one, 3, 4)]
    for sampling in (GREEDY, PLAIN):
        want = [c for i, prompt in enumerate(prompts)
                for c in generate(sampling, [prompt], keys_of(prompts)[i : i + 1])]  # fmt: skip
        got = result(sampling, prompts, keys_of(prompts))
        same(got.completions, want)
        assert got.stats.prompt_tokens == 30 + 3 + 20 + 1 + 2


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
    sampling = request.Sampling(40, stop_ids=(0, 17))
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
    free = generate(request.Sampling(30), prompts, shared=False, valid_V=valid)
    out = generate(request.Sampling(30, stop=stop), prompts, shared=False, valid_V=valid, slots=3,
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
    out = generate(request.Sampling(40), params=tree, shared=False)
    drawn = np.array([c.ids for c in out])
    assert len(np.unique(drawn)) > 150  # 320 draws of 300
    np.testing.assert_allclose([c.logps for c in out], -np.log(300), atol=1e-5)


def test_adapter_equals_merged_weights():
    key = jax.random.key(3)
    adapter = lora.init_adapter(CONFIG, 4, ("q", "v", "down"), key)
    adapter = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape, x.dtype), adapter)
    policy = policy_lib.Policy(params(), adapter, 0.5)
    kv = shared_prefix.encode_prefix_ids(DECODER, policy, PREFIX)
    run = functools.partial(generate, PLAIN, shared=False)
    merged = policy_lib.Policy(lora.merge_adapter(params(), adapter, 0.5))
    want = run(policy=merged, prefix=shared_prefix.encode_prefix_ids(DECODER, merged, PREFIX))
    same(run(prefix=kv, policy=policy), want, atol=1e-4)
    assert [c.ids for c in want] != [c.ids for c in generate(PLAIN)]


@pytest.mark.long
@pytest.mark.parametrize(
    "adapted, shared", mostly_slow([(True, True), (False, False), (False, True)], several=True)
)
def test_layers_as_arrays_of_their_own(adapted, shared, monkeypatch):
    options = {"shared": shared and not adapted}
    if adapted:
        adapter = lora.init_adapter(CONFIG, 2, lora.TARGETS, jax.random.key(1))
        noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape)  # noqa: E731
        policy = policy_lib.Policy(params(), jax.tree.map(noise, adapter), 0.5)
        prefix_kv = shared_prefix.encode_prefix_ids(DECODER, policy, PREFIX)
        options |= {"policy": policy, "prefix": prefix_kv}
    with jax.set_mesh(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
        stacked = generate(CUT, **options)
        monkeypatch.setattr(engine, "UNSTACK_FROM", 0)
        same(generate(CUT, **options), stacked)
        real = engine.unstack_layers
        monkeypatch.setattr(
            engine, "unstack_layers", lambda *a: jax.tree.map(jnp.zeros_like, real(*a))
        )
        changed = generate(CUT, **options)
    assert [c.ids for c in changed] != [c.ids for c in stacked]  # it is these that are read


@pytest.mark.slow
def test_when_layers_are_arrays_of_their_own():
    one = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    large = transformer.init_params(
        dataclasses.replace(CONFIG, d_ff=8192), jax.random.key(0), jnp.float32
    )  # of 7 MiB a layer
    place = lambda tree, where: policy_lib.Policy(  # noqa: E731
        sharding.shard_by_name(tree, where, CONFIG.n_kv_heads)
    )
    policy = place(large, one)
    layers = engine.unstack_layers(policy, None, one)
    assert layers is not None
    assert len(layers) == CONFIG.n_layers
    begin = policy.params["layers"]["up"]["kernel"].unsafe_buffer_pointer()
    for i, layer in enumerate(layers):  # no memory of their own
        kernel = layer.params["up"]["kernel"]
        assert kernel.unsafe_buffer_pointer() == begin + i * kernel.nbytes
        np.testing.assert_array_equal(kernel, large["layers"]["up"]["kernel"][i])
    two = sharding.make_mesh(1, 1, 2, devices=jax.devices()[:2])
    assert engine.unstack_layers(place(large, two), None, two) is None
    assert engine.unstack_layers(jax.eval_shape(lambda: policy), None, one) is None
    small = place(transformer.init_params(CONFIG, jax.random.key(0), jnp.float32), one)
    assert engine.unstack_layers(small, None, one) is None
    assert engine.unstack_layers(place(lora.quantise_projections(large), one), None, one) is None


@pytest.mark.slow
def test_bfloat16_weights():
    decoder = transformer.Decoder(CONFIG, jnp.bfloat16)
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    out = generate(PLAIN, shared=False, decoder=decoder, params=tree)
    logits = predicting(PROMPTS, out, ())
    for c, rows in zip(out, logits, strict=True):
        want = jax.nn.log_softmax(rows / 0.8)[np.arange(12), list(c.ids)]
        np.testing.assert_allclose(c.logps, want, atol=0.25)


SIZES_OF_MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 4)]


@pytest.mark.long
@pytest.mark.parametrize("sizes", mostly_slow(SIZES_OF_MESHES))
@pytest.mark.parametrize("sampling", mostly_slow([CUT, GREEDY]))
def test_texts_do_not_depend_on_the_mesh(sizes, sampling):
    """Slots over data and fsdp, heads and vocabulary over tensor; groups of equal prompts too."""
    prompts = [*PROMPTS, *[(5, 6, 7)] * 9, *[(*range(60, 80), i) for i in range(5)]]
    tree, keys = params(), keys_of(prompts)
    want = generate(sampling, prompts, keys, slots=3)
    devices = jax.devices()[: int(np.prod(sizes))]
    with jax.set_mesh(sharding.make_mesh(*sizes, devices=devices)) as _:
        here = sharding.current_mesh()
        placed = jax.device_put(
            tree, sharding.shardings(tree, here, CONFIG.n_kv_heads, gathered=True)
        )
        got = result(
            sampling, prompts, keys, shared=False, params=placed, slots=8,
            prefix=shared_prefix.encode_prefix_ids(DECODER, policy_lib.Policy(placed), PREFIX),
        )  # fmt: skip
    same(got.completions, want)


@pytest.mark.long
@pytest.mark.parametrize("count", mostly_slow([3, 17, 1, 9, 10], 2))
def test_few_texts_on_many_devices_end(count):
    """One slot on each of 8 devices: some have nothing to do while texts wait for others."""
    prompts = [(i, i + 1) for i in range(count)]
    want = generate(PLAIN, prompts, shared=False, slots=3)
    with jax.set_mesh(sharding.make_mesh(8, 1, 1)):
        placed = placing.replicate(params(), sharding.current_mesh())
        got = result(PLAIN, prompts, shared=False, params=placed, slots=8)
    same(got.completions, want)


@pytest.mark.long
def test_each_prompt_has_settings_of_its_own():
    """Limits, temperatures, truncation and what ends a text; each as if all had its settings."""
    pieces, valid = letters(), np.arange(300) < 20
    kinds = [
        request.Sampling(6, temperature=0.0),
        request.Sampling(25, temperature=1.3, top_k=9, stop=("a",), stop_ids=tuple(range(2, 6))),
        request.Sampling(25, top_p=0.9, stop=("bb", "c"), stop_ids=tuple(range(12, 19))),
    ]
    prompts = [(i, 3) for i in range(12)]
    options = {"shared": False, "valid_V": valid, "token_bytes": pieces, "slots": 4}
    each = [kinds[i % 3] for i in range(12)]
    got = generate(each, prompts, **options)
    for number, kind in enumerate(kinds):
        want = generate(kind, prompts, **options)
        same(got[number::3], want[number::3])
    assert {c.finish for c in got} == {"stop", "length"}
    for number in (1, 2):
        assert {c.ids[-1] for c in got[number::3]} & set(kinds[number].stop_ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cache, gap", mostly_slow([(jnp.int8, 3e-2), (jnp.bfloat16, 1e-2)], several=True)
)
def test_smaller_caches_stay_near(cache, gap):
    """One token each after 60 of a prompt: what follows from a token that differs is no measure."""
    rng = np.random.default_rng(0)
    prompts = [tuple(map(int, rng.integers(0, 300, 60))) for _ in range(60)]
    one = dataclasses.replace(GREEDY, max_tokens=2)
    want = generate(one, prompts, slots=16)
    got = generate(one, prompts, slots=16, cache=cache)
    both = [(x.ids[1], y.ids[1], x.logps[1] - y.logps[1]) for x, y in zip(got, want, strict=True)]
    assert np.mean([a == b for a, b, _ in both]) >= 0.95
    gaps = np.abs([d for a, b, d in both if a == b])
    assert 0 < gaps.mean() < gap


def test_a_refill_does_not_wait_for_the_slowest():
    """One text of 60 tokens, 40 of 3: slots are busy while prompts wait, and results come early."""
    prompts, order, seen = [(i, 9) for i in range(41)], [], []
    limits = [60, *[3] * 40]
    out = result(PLAIN, prompts, slots=4, limits=limits, progress=seen.append,
                 done=lambda i, c: order.append((i, c)))  # fmt: skip
    assert sorted(i for i, _ in order) == list(range(41))
    assert dict(order) == dict(enumerate(out.completions))
    assert order[-1][0] == 0
    assert out.stats.occupancy >= 0.9
    steps = 60 + 40 * 3 / 3
    assert len(seen) < steps  # the host does not look after each token
    assert [s.done for s in seen] == sorted(s.done for s in seen)
    assert out.stats.tokens == 60 + 120


@pytest.mark.slow
def test_prefilled_prompts_do_not_pile_up(monkeypatch):
    """64 slots and prompts of which one fills a row: each has its slot before the next is made."""
    held, insert = [], loop._insert_prefilled

    def counted(job, state, ready, serving):
        held.append(len({id(text.output) for part in ready for text in part}))
        return insert(job, state, ready, serving)

    monkeypatch.setattr(loop, "_insert_prefilled", counted)
    prompts = [tuple(range(i, i + 100)) for i in range(30)] * 2
    out = result(PLAIN, prompts, slots=32, pack=128, limits=[1 + i % 3 for i in range(60)])
    assert max(held) <= 2
    assert out.stats.prompt_tokens == 30 * 100


@pytest.mark.long
def test_rows_and_caches_without_room_to_spare():
    """A row that is full to its end, and a slot that its text fills: as each prompt alone."""
    stem = tuple(range(100, 120))
    for prompts, sizes in (
        ([tuple(range(98)), tuple(range(150, 180))], {"pack": 128, "length": 110}),
        ([(*stem, *range(k, k + 100)) for k in (0, 150)], {"length": 128}),
    ):
        keys, one = keys_of(prompts), dataclasses.replace(PLAIN, max_tokens=8)
        got = generate(one, prompts, keys, **sizes)
        want = [generate(one, [prompt], keys[i : i + 1], length=600)[0]
                for i, prompt in enumerate(prompts)]  # fmt: skip
        same(got, want)


def test_a_slot_whose_text_ended_at_a_string_is_ended_on_the_device():
    """Limits of 200 tokens, stops after a few, nothing waiting: few looks of the host."""
    valid, pieces, looks = np.arange(300) < 20, letters(), []
    sampling = request.Sampling(200, stop=("a", "b", "c", "d"))
    out = generate(sampling, [(i, 3) for i in range(4)], shared=False, valid_V=valid,
                   token_bytes=pieces, slots=4, progress=looks.append)  # fmt: skip
    longest = max(len(c.ids) for c in out)
    assert longest < 60
    assert len(looks) <= longest // 4 + 1
    assert looks[-1].tokens == sum(len(c.ids) for c in out)


def compiled_events():
    """Every compilation of XLA from now on, whoever asks for it."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: events.append(name) if "backend_compile" in name else None
    )
    return events


@pytest.mark.slow
def test_nothing_is_compiled_after_warmup():
    """Nor for other prompts, settings of the same form, limits and orders."""
    size = request.SamplerSettings(slots=4, length=150, steps=5, pack=100)
    keys = np.asarray(keys_of([*PROMPTS, *PROMPTS]))
    job = request.prepare_sampler_inputs(
        DECODER, policy_lib.Policy(params()), PROMPTS, [CUT] * 8, keys_n2=keys[:8], settings=size,
        longest=138, prefix=prefix(), vocabulary=None, limits=None,
    )  # fmt: skip
    names = [program.name for program in loop.compile_programs(job)]
    assert names == ["empty cache", "prefill 128", "insert 128", "prefill 256", "insert 256",
                     "decode 4 x 256"]  # fmt: skip
    keys_of(PROMPTS)
    before, events = program_cache.list_programs(), compiled_events()
    generate(CUT, [*PROMPTS, *PROMPTS], keys, slots=4, length=150, steps=5, pack=100)
    others = [(*range(i, i + 130), i) for i in range(8)]
    generate(dataclasses.replace(CUT, top_k=33, temperature=0.3), others, keys[:8], slots=4,
             length=150, steps=5, pack=100, limits=[3, 4, 5, 6, 7, 8, 9, 10])  # fmt: skip
    for count in (5, 6, 7):
        keys_of(PROMPTS[:count])
    assert program_cache.list_programs() == before
    assert events == []


@pytest.mark.slow
def test_10_000_generations_leave_nothing_behind():
    prompts = [(i % 300, i % 7, i % 11) for i in range(500)]
    keys = np.asarray(keys_of(prompts))
    generate(PLAIN, prompts, keys, limits=[1 + i % 6 for i in range(500)])
    gc.collect()
    before, size = len(jax.live_arrays()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    built = program_cache.list_programs()
    for _ in range(20):
        generate(PLAIN, prompts, keys, limits=[1 + i % 6 for i in range(500)])
    gc.collect()
    assert program_cache.list_programs() == built
    assert len(jax.live_arrays()) == before
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size
    assert grown < 20_000  # KiB; the cache alone has 4 MiB, made 20 times


def test_memory_that_is_not_there(monkeypatch):
    monkeypatch.setattr(engine, "UNSTACK_FROM", 0)  # weights in two shapes are counted once
    size = request.SamplerSettings(slots=64, length=960, cache=jnp.bfloat16)
    keys = np.zeros((1, 2), np.uint32)
    job = request.prepare_sampler_inputs(
        DECODER, policy_lib.Policy(params()), [(1,)], [PLAIN], keys_n2=keys, settings=size,
        prefix=None, vocabulary=None, limits=None,
    )  # fmt: skip
    entry = 2 * 2 * 2 * 16 * 2  # layers, keys and values, key heads, head size, bytes
    cache = 64 * 1024 * entry
    slots = sum(
        x.nbytes // 64
        for x in jax.tree.leaves(engine.init_slot_state(DECODER, 64, 128, bool).slots)
    )
    weights = sum(x.nbytes for x in jax.tree.leaves(params())) + 4 * 300
    loop.check_memory(job, 1 << 20, cache + 64 * slots + weights + (1 << 20))
    message = (
        r"out of memory: each device needs 0.02 GiB for the cache .64 slots x 1024 entries of "
        r"bfloat16.* 0.00 GiB for the weights.*, but has only 0.01 GiB; slots={} makes it fit$"
    )
    assert job.constants.layers is not None
    limit = (cache + 64 * slots) // 2 + weights
    with pytest.raises(MemoryError, match=message.format(32)):
        loop.check_memory(job, 0, limit)
    with pytest.raises(MemoryError, match="no slot fits: use a smaller length, cache=int8, or"):
        loop.check_memory(job, 0, weights)
    with pytest.raises(MemoryError, match=r"50000000 slots x 2048 entries.*slots=\d+ makes it fit"):
        generate(PLAIN, slots=50_000_000, length=1984)
    with pytest.raises(
        MemoryError, match=r"slots=32 halves the cache, cache=int8 makes it smaller"
    ):
        loop.check_memory(job, 0, None)


def test_keys():
    """The chain by hand; every part counts; nothing else does."""
    rows = ["a", "a", "b", "a"]
    keys = np.asarray(request.derive_sampling_keys(1, "evaluation", 2, rows, [0, 1, 0, 0]))
    assert keys.dtype == np.uint32
    assert keys.shape == (4, 2)
    fold = jax.random.fold_in
    words = (1, 2, 0xCA978112, 0xCA1BBDCA, 1)  # SHA-256 of "a" begins with ca978112ca1bbdca
    by_hand = functools.reduce(fold, words, jax.random.key(1, impl="threefry2x32"))
    np.testing.assert_array_equal(keys[1], jax.random.key_data(by_hand))
    np.testing.assert_array_equal(keys[0], keys[3])
    others = [request.derive_sampling_keys(*a, ["a"], [0]) for a in
              ((1, "rollout", 2), (1, "evaluation", 3), (2, "evaluation", 2))]  # fmt: skip
    assert len({tuple(k) for k in [*keys[:3].tolist(), *(np.asarray(o)[0] for o in others)]}) == 6
    with pytest.raises(ValueError, match=r"purpose is 'x': the choices are rollout, evaluation"):
        request.derive_sampling_keys(0, "x", 0, [], [])


def test_a_prompt_may_be_an_array():
    vocabulary = request.Vocabulary(np.ones(300, bool))
    arrays = [np.asarray(prompt, np.int32) for prompt in (*PROMPTS, (0,))]
    texts = request.list_texts(arrays, PLAIN, keys_of(arrays), None, vocabulary)
    assert [text.prompt for text in texts] == [*PROMPTS, (0,)]
    assert {type(token) for text in texts for token in text.prompt} == {int}


def test_no_prompts():
    out = result(PLAIN, [], np.zeros((0, 2), np.uint32))
    assert out.completions == []
    assert out.stats.total == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"slots": 0}, "slots is 0"),
        ({"pack": 0}, "pack is 0"),
        ({"length": -1}, "length is -1: it must be at least 0"),
        ({"length": 20}, "prompt 2 has 21 tokens and may get 12 more: length is 20"),
        ({"cache": jnp.float16}, "cache is float16: the choices are float32, bfloat16, int8"),
        ({"sampling": [PLAIN] * 3}, "sampling has 3 entries for 8 prompts"),
        ({"steps": 0}, "steps is 0"),
        ({"sampling": request.Sampling(0)}, "max_tokens is 0"),
        ({"sampling": request.Sampling(3, temperature=-1.0)}, "temperature is -1.0"),
        ({"sampling": request.Sampling(3, top_k=301)}, "top_k is 301: it must be 0 .off. to 300"),
        ({"sampling": request.Sampling(3, stop_ids=(300,))}, "stop_ids has 300"),
        ({"sampling": request.Sampling(3, stop=("",))}, "stop string must not be empty"),
        ({"sampling": request.Sampling(3, stop=("a",))}, "token_bytes must have the bytes"),
        ({"sampling": request.Sampling(4093)}, "prompt 0 has 8 tokens .* the model has 4096"),
        ({"prompts": [(1,), ()]}, "prompt 1 is empty"),
        ({"prompts": [(1,), (300,)]}, "prompt 1 has ids 300 to 300"),
        ({"limits": [1] * 7 + [0]}, r"limits\[7\] is 0"),
        ({"limits": [1]}, "limits has 1 entries for 8"),
        ({"valid_V": np.zeros(300, bool)}, "at least one id"),
        ({"valid_V": np.ones(299, bool)}, "valid_V has shape"),
        ({"keys": np.zeros((3, 2), np.uint32)}, "keys are uint32"),
        (
            {"sampling": request.Sampling(3, stop=("a",)), "token_bytes": [b"a"]},
            "of every valid id, and at most 300 entries; token_bytes has 1",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message) as info:
        generate(options.pop("sampling", PLAIN), **options)
    assert "\n" not in str(info.value)
