"""What the compiled programs of the losses hold: matmuls, buffers, memory, collectives.

Read from the optimised program's text by `dryrun/hlo.py`, which is tested first.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import math
import os
import sys
import types

import conftest
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import placing
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_train_step import CONFIG, OPTIONS, TX

from copsd_jax.losses import divergence_loss
from copsd_jax.model import lora, transformer
from copsd_jax.runtime import sharding
from copsd_jax.training import layout, train_step

TEXT = """
HloModule small, entry_computation_layout={(f32[4,8]{1,0})->f32[4,5]{1,0}}

%fused (p0: f32[8,5], p1: f32[4,8]) -> f32[4,5] {
  %p1 = f32[4,8]{1,0} parameter(1)
  %p0 = f32[8,5]{1,0} parameter(0)
  ROOT %dot.1 = f32[4,5]{1,0} dot(%p1, f32[8,5]{1,0} %p0), lhs_contracting_dims={1}
}

%small (t: f32[4,8]) -> f32[4,5] {
  ROOT %all = f32[4,5]{1,0} all-reduce(%t), to_apply=%sum
}

%body (t: (s32[], f32[4,8])) -> (s32[], /*index=1*/f32[4,8]) {
  %t = (s32[], /*index=1*/f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%t), index=1
  %fusion.1 = f32[4,5]{1,0} fusion(%w, %x), kind=kOutput, calls=%fused
  ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%i, %x)
}

ENTRY %main (a: f32[4,8]) -> f32[4,5] {
  %a = f32[4,8]{1,0} parameter(0)
  %known = (s32[], f32[4,8]{1,0}) while(%t), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %open = (s32[], f32[4,8]{1,0}) while(%t), condition=%c, body=%body
  ROOT %pick = f32[4,5]{1,0} conditional(%flag, %a, %a), branch_computations={%fused, %small}
}
"""


def test_the_reader_by_hand():
    """A dot of 2 · 4 · 5 · 8 = 320 FLOP: 3 times, as often as is said, in one branch of two."""
    assert hlo.matmuls(TEXT, 0) == 320 * 4
    assert hlo.matmuls(TEXT, 10) == 320 * 14
    assert hlo.collectives(TEXT) == [("all-reduce", (4, 5))]
    assert (8, 5) in hlo.arrays(TEXT)
    assert max(map(math.prod, hlo.arrays(TEXT))) == 40


CONVOLUTIONS = """
HloModule small

ENTRY %main (a: f32[4,8], b: f32[8,5], c: f32[3,4,8], d: f32[3,8,5]) -> f32[3,4,5] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,5]{1,0} parameter(1)
  %c = f32[3,4,8]{2,1,0} parameter(2)
  %d = f32[3,8,5]{2,1,0} parameter(3)
  %one = f32[4,5]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
  ROOT %three = f32[3,4,5]{2,1,0} convolution(%c, %d), \
window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf
}
"""


def test_the_reader_on_a_tpu_by_hand():
    """One product of 320 FLOP, and three in a window of which one place meets a number at a
    time."""
    assert hlo.matmuls(CONVOLUTIONS, 0) == 320 * 4


def test_the_reader_of_kernels_by_hand():
    """Two programs a block, each a product of 2 · 4 · 5 · 8 = 320 FLOP, for 3 blocks; in one of
    them a second product, which counts as the dearer branch everywhere."""

    def kernel(a_ref, b_ref, out_ref):
        out_ref[...] = jnp.dot(a_ref[...], b_ref[...])

        @pl.when(pl.program_id(0) == 0)
        def _():
            out_ref[...] += jnp.dot(a_ref[...], b_ref[...])

    def run(a_NTC, b):
        strip, whole = (lambda i: (i, 0)), (lambda i: (0, 0))
        call = pl.pallas_call(
            kernel,
            grid=(2,),
            in_specs=[pl.BlockSpec((4, 8), strip), pl.BlockSpec((8, 5), whole)],
            out_specs=pl.BlockSpec((4, 5), strip),
            out_shape=jax.ShapeDtypeStruct((8, 5), jnp.float32),
        )
        return jax.lax.map(lambda a: call(a, b), a_NTC)

    shapes = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((3, 8, 8), (8, 5))]
    jaxpr = jax.make_jaxpr(run)(*shapes).jaxpr
    assert hlo.kernel_matmuls(jaxpr) == 3 * 2 * (320 + 320)


def test_the_reader_on_a_program():
    """A loop of 5 products in a program that is compiled here."""

    def run(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x)

    x, w = np.ones((3, 7), np.float32), np.ones((7, 7), np.float32)
    assert hlo.matmuls(jax.jit(run).lower(x, w).compile().as_text(), 0) == 5 * 2 * 3 * 7 * 7


TOKENS, WIDTH, VOCABULARY, CHUNK = 64, 8, 29, 16
FULL = [
    *(divergence_loss.Divergence(name, clip_mode="element") for name in ("fkl", "rkl", "jsd")),
    divergence_loss.Divergence("jsd", normalize_beta=True, clip_mode="huber", ratio_clip=2.0),
    divergence_loss.Divergence("sampled", sampling_temperature=1.3),
]
ALL_OPTIONS = divergence_loss.Divergence(
    "jsd", top_k=5, top_k_of="union", tail=True, ratio_clip=2.0, rollout_clip=2.0
)


def _compiled(settings, train_head, tokens=TOKENS, width=WIDTH, vocabulary=VOCABULARY, chunk=CHUNK):
    """The step's form: one head for both sides, unless the student's trains."""
    shape = jax.ShapeDtypeStruct
    states = shape((tokens, width), jnp.float32)
    head = shape((vocabulary, width), jnp.float32)
    row = shape((tokens,), jnp.float32)

    def loss(hidden_s, head_s, hidden_t, head_t, tokens_T, weight_T, old_T):
        return divergence_loss.divergence(
            hidden_s, hidden_t, head_s if train_head else head_t, head_t, tokens_T, weight_T,
            settings, implementation="chunked", chunk=chunk, train_head=train_head,
            logp_old_T=old_T, logp_rollout_T=old_T,
        )  # fmt: skip

    grad = jax.value_and_grad(loss, (0, 1) if train_head else 0, has_aux=True)
    args = (states, head, states, head, shape((tokens,), jnp.int32), row, row)
    return jax.jit(grad).lower(*args).compile()


@pytest.mark.parametrize("train_head, count", [(False, 3), (True, 4)])
@pytest.mark.parametrize(
    "settings",
    conftest.mostly_slow([*FULL, ALL_OPTIONS], 2),
    ids=lambda s: f"{s.divergence}{s.top_k}",
)
def test_three_matmuls_and_no_buffer_of_tokens_x_vocabulary(settings, train_head, count):
    """3.0 times 2TDV if all rows are live, 4.0 with the head's gradient; logits of one block."""
    text = _compiled(settings, train_head).as_text()
    flop = hlo.matmuls(text, trips=TOKENS // CHUNK)
    assert flop == count * 2 * TOKENS * WIDTH * VOCABULARY
    sizes = {math.prod(dims) for dims in hlo.arrays(text)}
    assert CHUNK * VOCABULARY in sizes
    assert max(sizes) < TOKENS * VOCABULARY


def test_memory_does_not_grow_with_tokens():
    """32,768 tokens need what 4,096 need, arrays of tokens x width (here 16) and less included."""
    shape = {"width": 16, "vocabulary": 8192, "chunk": 512}
    few, many = (
        _compiled(FULL[2], False, tokens, **shape).memory_analysis().temp_size_in_bytes
        for tokens in (4096, 32768)
    )
    assert many <= 1.2 * few
    assert few < 8 * 512 * 8192 * 4


@pytest.mark.parametrize("what, count", [("values", 1), ("hidden", 2), ("head", 4)])
def test_matmuls_of_log_probs(what, count):
    """One of 2TDV for values, two with the states' gradient, four with the head's; blocks only."""
    rng = np.random.default_rng(0)
    hidden, head = (
        rng.normal(size=(n, WIDTH)).astype(np.float32) for n in (TOKENS, VOCABULARY)
    )  # fmt: skip

    def total(hidden, head):
        return divergence_loss.log_probs(
            hidden, head, np.zeros(TOKENS, np.int32), temperature=1.0, implementation="chunked",
            chunk=CHUNK, train_head=what == "head",
        )[0].sum()  # fmt: skip

    call = {"values": total, "hidden": jax.grad(total), "head": jax.grad(total, (0, 1))}[what]
    text = jax.jit(call).lower(hidden, head).compile().as_text()
    flop = hlo.matmuls(text, trips=TOKENS // CHUNK)
    assert flop == count * 2 * TOKENS * WIDTH * VOCABULARY
    assert max(math.prod(dims) for dims in hlo.arrays(text)) < TOKENS * VOCABULARY


# 256 tokens on 4 shards of rows: 64 each, in blocks of 16; 32 entries on 2 shards: 16 each.
ROWS = ("data", "fsdp")
EXCHANGED = [  # of a block: maxima of both sides, sums, Σ of e, b, clipped mass, dH
    ("all-reduce", (2, 16)), ("all-reduce", (7, 16)), ("all-reduce", (3, 16)),
    ("all-reduce", (16, WIDTH)),
]  # fmt: skip


@pytest.mark.parametrize(
    "settings, train_head, want",
    [
        # the head is gathered over fsdp once, for both sides
        (FULL[2], False, [*EXCHANGED, ("all-gather", (16, WIDTH))]),
        # with its gradient: its sum over rows goes back to the shards of fsdp, then over data
        (
            FULL[2], True,
            [*EXCHANGED, ("all-gather", (16, WIDTH)), ("reduce-scatter", (16, 4)),
             ("all-reduce", (16, 4))],
        ),
        # sampled: nothing is summed but for the softmax
        (FULL[4], False, [*EXCHANGED[:2], EXCHANGED[3], ("all-gather", (16, WIDTH))]),
        # top-k: whole heads, rows over all axes, and nothing travels while blocks run; in the end
        # each device gets the gradients of its rows from those that took part of them
        (
            ALL_OPTIONS, False,
            [("all-gather", (16, WIDTH)), ("all-gather", (32, WIDTH)), ("all-gather", (64, WIDTH))],
        ),
    ],
    ids=["jsd", "jsd head", "sampled", "top-k"],
)  # fmt: skip
def test_what_travels(settings, train_head, want):
    devices = sharding.make_mesh(2, 2, 2)

    def shape(dims, dtype, *spec):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(devices, P(*spec)))

    def loss(hidden_s, hidden_t, head, *rows):
        return divergence_loss.divergence(
            hidden_s, hidden_t, head, head, *rows[:2], settings, implementation="chunked",
            chunk=16, train_head=train_head, logp_rollout_T=rows[1],
        )[0]  # fmt: skip

    states = shape((256, WIDTH), jnp.float32, ROWS)
    head = shape((32, WIDTH), jnp.float32, "tensor", "fsdp")
    row, ids = shape((256,), jnp.float32, ROWS), shape((256,), jnp.int32, ROWS)
    grad = jax.grad(loss, (0, 2) if train_head else 0)
    out = (states.sharding, head.sharding) if train_head else states.sharding
    with jax.set_mesh(devices):
        compiled = jax.jit(grad, out_shardings=out).lower(states, states, head, ids, row).compile()
    assert sorted(hlo.collectives(compiled.as_text())) == sorted(want)


@pytest.mark.long
def test_the_head_is_gathered_once_a_step():
    """Outside the loop over micro-batches, for both sides and all blocks: 92 entries in two parts
    of 46, whose width 64 lies on four devices."""
    config = dataclasses.replace(CONFIG, vocab_size=92, tie_embeddings=False)
    decoder, devices = transformer.Decoder(config, jnp.float32), sharding.make_mesh(1, 4, 2)
    params = transformer.init_params(config, jax.random.key(0), jnp.float32)
    state = train_step.init_train_state(
        lora.init_adapter(config, 8, ("q",), jax.random.key(1)), TX, "fixed"
    )
    batch = layout.build_batch([[1, 2]] * 8, [[3, 4, 5]] * 8, [[6, 7, 8]] * 8)
    options = dataclasses.replace(OPTIONS, micro_batches=2)
    with jax.set_mesh(devices):
        step = jax.jit(
            train_step.make_step(decoder, TX, options),
            out_shardings=(sharding.shardings(state, devices), None),
        )
        placed = (
            sharding.shard_by_name(state, devices),
            sharding.shard_by_name(params, devices, config.n_kv_heads),
        )
        lowered = step.lower(*placed, placing.place_batch(batch, devices), None, None)
    # The compiler must not be what moves them out of the loop.
    plain = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    found, entry = hlo.computations(lowered.compile(compiler_options=plain).as_text())
    gathers = [
        name == entry
        for name, ops in found.items()
        for op in ops.values()
        if op.kind.startswith("all-gather") and (46, 64) in hlo.arrays(op.shape)
    ]
    assert gathers == [True]


# --- the benchmark ----------------------------------------------------------------------------


@pytest.fixture
def benchmark(monkeypatch):
    """`benchmarks/loss.py` with a small shape."""
    monkeypatch.syspath_prepend(str(conftest.ROOT / "benchmarks"))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "unset")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")
    monkeypatch.delitem(sys.modules, "loss", raising=False)
    module = importlib.import_module("loss")
    monkeypatch.setattr(module, "SHAPES", {"smollm2": (WIDTH, VOCABULARY)})
    return module


def _lines(benchmark, monkeypatch, capsys, arguments: str) -> tuple[int, dict]:
    monkeypatch.setattr(sys, "argv", ["loss.py", "--repetitions=2", *arguments.split()])
    code = benchmark.main()
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    found = {line["form"]: line for line in lines}
    assert len(found) == len(lines)
    return code, found


def test_the_benchmark_counts_and_times(benchmark, monkeypatch, capsys):
    """64 tokens in blocks of 16: three matmuls are the floor, checkpoints compute two again."""
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    code, lines = _lines(benchmark, monkeypatch, capsys, "--tokens=64 --chunk=16")
    assert code == 0
    counts = {name: line["matmuls"] for name, line in lines.items()}
    assert counts == {"floor": 3, "chunked": 3, "remat_chunked": 5, "dense": 3}
    for line in lines.values():
        assert line["seconds"] <= line["seconds_median"]
        assert line["floor_fraction"] == lines["floor"]["seconds"] / line["seconds"]


def test_the_benchmark_survives_forms_that_fail(benchmark, monkeypatch, capsys):
    """One does not compile, one compiles and has no memory when it runs for the second time."""

    def no_memory(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    calls = []

    def timed(call, timed=benchmark.timed):
        calls.append(call)
        return timed(no_memory if len(calls) == 5 else call)  # of three forms the second

    monkeypatch.setattr(benchmark, "remat", no_memory)
    monkeypatch.setattr(benchmark, "timed", timed)
    code, lines = _lines(benchmark, monkeypatch, capsys, "--tokens=20 --chunk=8")
    assert code == 1
    failed = {name for name, line in lines.items() if "failed" in line}
    assert failed == {"remat_chunked", "chunked"}
    assert lines["chunked"]["failed"] == "JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert {name for name, line in lines.items() if "seconds" in line} == {"floor", "dense"}


def test_the_benchmark_forms_agree(benchmark, monkeypatch):
    """Loss and gradients of all forms, with 20 tokens in blocks of 8; kernels get the chip."""
    data = benchmark.arrays(20, WIDTH, VOCABULARY, 0.6)
    settings = divergence_loss.Divergence("jsd", temperature=1.1)
    common = {"train_head": True, "settings": settings, "chunk": 8}
    dense = functools.partial(benchmark.ours, name="dense", chip="", **common)
    (want, _), grads = jax.jit(dense)(*data)
    got, remat_grads = jax.jit(functools.partial(benchmark.remat, **common))(*data)
    for mine, theirs in zip((got, *remat_grads), (want, *grads), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    args = argparse.Namespace(head=False, chunk=8)
    device = types.SimpleNamespace(platform="tpu", device_kind="TPU v4")
    forms = benchmark.jax_forms(args, settings, device)

    def stop(*_, implementation, kernel, **__):
        raise RuntimeError(f"{implementation} on {kernel.chip}")

    monkeypatch.setattr(divergence_loss, "divergence", stop)
    with pytest.raises(RuntimeError, match="pallas_tpu on TPU v4"):
        forms["pallas"](*data)
