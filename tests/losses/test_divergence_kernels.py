"""The divergence kernels in interpret mode equal float64 NumPy, on one device and on shards."""

import functools
import importlib
import itertools
import json
import sys
from typing import Any

import conftest
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import core as jax_core
from jax.sharding import PartitionSpec as P

from copsd_jax.losses import divergences, split_vocabulary, token_values
from copsd_jax.losses.pallas import block_sizes, divergence_gpu, divergence_tpu, row_statistics
from copsd_jax.runtime import hardware

pytestmark = pytest.mark.slow  # minutes; `make kernels`

KERNELS = {
    "tpu": (divergence_tpu, block_sizes.Blocks(tokens=128, vocab=128, rows=128)),
    "gpu": (divergence_gpu, block_sizes.Blocks(tokens=16, vocab=128)),
}
WIDTH = 128
Divergence = divergences.Divergence


def _arrays(seed: int, tokens: int, vocabulary: int, dtype=np.float32, tied: bool = False):
    """hidden s, t, heads s, t, tokens, weight (some 0), old, rollout; rounded to dtype."""
    rng = np.random.default_rng(seed)
    hidden_s = rng.normal(size=(tokens, WIDTH))
    hidden_t = hidden_s + 0.5 * rng.normal(size=(tokens, WIDTH))
    head_s = 3 * rng.normal(size=(vocabulary, WIDTH)) / np.sqrt(WIDTH)
    head_t = head_s if tied else head_s + 0.3 * rng.normal(size=head_s.shape) / np.sqrt(WIDTH)
    weight = rng.uniform(0.1, 1, size=tokens) * (np.arange(tokens) % 5 != 3)
    per_token = [weight, rng.normal(size=tokens) - 6, rng.normal(size=tokens) - 6]
    wide = [jnp.asarray(x, dtype) for x in (hidden_s, hidden_t, head_s, head_t)]
    ids = jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32)
    return (*wide, ids, *(jnp.asarray(x, jnp.float32) for x in per_token))


def _clear(settings: Divergence, tokens: int, vocabulary: int, dtype, margin: float, **options):
    """Arrays no entry of which lies within `margin` of the clip."""
    for seed in range(100):
        arrays = _arrays(seed, tokens, vocabulary, dtype, **options)
        z_s, z_t = _logits(arrays)
        constants = np.asarray(arrays[4]), settings, np.float64(arrays[6]), np.float64(arrays[7])
        frozen = oracle.freeze(z_s, z_t, *constants)
        if oracle.margin(z_s, z_t, settings, frozen) > margin:
            return arrays
    raise AssertionError("no seed keeps away from the clip")


def _logits(arrays):
    return oracle.logits(arrays[0], arrays[2]), oracle.logits(arrays[1], arrays[3])


def _run(kernel: str, settings, arrays, train_head=True, **options):
    sweep = functools.partial(_sweep, kernel, settings, train_head=train_head, **options)
    return jax.jit(sweep)(*arrays)


def _sweep(
    kernel, settings, hidden_s, hidden_t, head_s, head_t, *per_token, blocks=None, interpret=True,
    train_head=True, axis=None, entries=None,
):  # fmt: skip
    """A kernel's sweep of arrays as `_arrays` draws them; head_t is None where it is head_s."""
    module, sizes = KERNELS[kernel]
    heads = (head_s,) if head_t is None else (head_s, head_t)
    shard = split_vocabulary.VocabularyShard(axis, entries)
    sweep = split_vocabulary.Sweep(settings, heads, shard, train_head=train_head)
    rows = (hidden_s, hidden_t), token_values.TokenInputs(*per_token)
    return module.sweep(sweep, rows, blocks or sizes, interpret)


def _expected(settings, arrays):
    """TokenStats and gradients in float64."""
    tokens_T, weight_T, old_T, rollout_T = (np.asarray(x) for x in arrays[4:])
    z_s, z_t = _logits(arrays)
    old = old_T.astype(np.float64)
    frozen = oracle.freeze(z_s, z_t, tokens_T, settings, old, rollout_T.astype(np.float64))
    row_T = np.arange(len(tokens_T))
    logp, logq = (oracle.log_softmax(z / settings.temperature) for z in (z_s, z_t))
    stats: Any = (
        oracle.value(z_s, z_t, tokens_T, settings, frozen),
        logp[row_T, tokens_T],
        logq[row_T, tokens_T],
        oracle.log_softmax(z_s / settings.sampling_temperature)[row_T, tokens_T],
        -(np.exp(logp) * logp).sum(axis=1),
        -(np.exp(logq) * logq).sum(axis=1),
        oracle.clipped_mass(z_s, z_t, settings, frozen),
        frozen.ratio_T,
    )
    dz = oracle.slope(z_s, z_t, tokens_T, settings, frozen) * weight_T[:, None].astype(np.float64)
    return token_values.TokenStats(*stats), dz @ np.float64(arrays[2]), dz.T @ np.float64(arrays[0])


def _close(got, want, tolerance, name):
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape, name
    error, largest = np.abs(got - want).max(), np.abs(want).max()
    assert error <= tolerance * largest, (name, error, largest)


def _check(result, expected, tolerance):
    stats, grad_hidden, grad_head = result
    for name, got, want in zip(stats._fields[:8], stats, expected[0], strict=False):
        assert got.dtype == jnp.float32
        shift = 1 if name == "clipped_mass_T" else 0  # it may be 0 everywhere
        _close(got + shift, want + shift, tolerance, name)
    _close(grad_hidden, expected[1], tolerance, "hidden")
    if grad_head is not None:
        assert grad_head.dtype == jnp.float32
        _close(grad_head, expected[2], tolerance, "head")


CASES = (
    Divergence("fkl"),
    Divergence("fkl", temperature=1.3, clip_mode="huber", clip=0.8, ratio_clip=2.0),
    Divergence("fkl", clip_mode="element", temperature=1.1, sampling_temperature=0.7),
    Divergence("rkl", clip_mode="token", clip=1.0, ratio_clip=2.0, rollout_clip=1.5),
    Divergence("jsd", beta=0.3, temperature=0.8, sampling_temperature=1.2),
    Divergence("jsd", beta=0.6, normalize_beta=True, clip_mode="token_weight", clip=0.7),
    Divergence("jsd", clip_mode="element", clip=0.03),
    Divergence("sampled", temperature=1.2, rollout_clip=2.0),
)


def _label(settings: Divergence) -> str:
    return f"{settings.divergence}-{settings.clip_mode}-{settings.temperature}"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("settings", CASES, ids=_label)
def test_equals_float64(settings, kernel):
    """Two heads, sizes that no block divides, rows without weight, clipped and other tokens."""
    arrays = _clear(settings, 37, 300, np.float32, oracle.KINK_MARGIN)
    expected = _expected(settings, arrays)
    if settings.clip_mode != "none":
        assert 0 < expected[0].clipped_mass_T.mean() < 1
    result = _run(kernel, settings, arrays)
    _check(result, expected, 2e-5)
    assert not np.asarray(result[1])[np.asarray(arrays[5]) == 0].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("settings", [CASES[0], CASES[2], CASES[3], CASES[7]], ids=_label)
def test_bfloat16(settings, kernel):
    """One head; several blocks on a TPU too. The clip is decided within 2^-9 of itself."""
    tokens = 150 if kernel == "tpu" and settings.clip_mode == "none" else 40
    options = {"margin": settings.clip / 2**9, "tied": True}
    arrays = _clear(settings, tokens, 300, jnp.bfloat16, **options)
    result = _run(kernel, settings, (*arrays[:3], None, *arrays[4:]))
    _check(result, _expected(settings, arrays), 1e-2)
    assert result[1].dtype == jnp.bfloat16


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "name, dtype",
    [("fkl", jnp.bfloat16), ("rkl", jnp.bfloat16), ("jsd", jnp.bfloat16), ("jsd", "f4")],
)
def test_close_and_saturated_sides(name, kernel, dtype):
    """Sides that differ in the third digit, and students that are nearly sure of one token: the
    gradients are small beside the probabilities; float32 sums give them two digits."""
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(2, 8, WIDTH))
    hidden[1, :4] = hidden[0, :4] * (1 + 2.0**-7 * (np.arange(WIDTH) % 7 == 0))
    hidden[:, :, 0] = np.r_[0, 0, 0, 0, 20, 24, 28, 32]
    hidden[1, 4:, 0] = 10
    head = rng.normal(size=(300, WIDTH)) / 8
    head[:, 0] = 0
    head[5, 0] = 0.5
    arrays = list(_arrays(0, 8, 300, dtype))
    arrays[:4] = [jnp.asarray(x, dtype) for x in (*hidden, head, head)]
    expected = _expected(Divergence(name), arrays)
    stats, grad, _ = _run(kernel, Divergence(name), tuple(arrays), train_head=False)
    for row in range(8):
        if arrays[5][row]:
            _close(grad[row], expected[1][row], 1e-2, f"row {row}")
            value = expected[0].value_T[row]
            assert abs(float(stats.value_T[row]) - value) <= 2e-2 * value


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["fkl", "rkl", "jsd", "sampled"])
def test_extreme_logits(name, kernel):
    """Logits are head columns: multiples of 2 up to 256, exact in bfloat16 too; some
    rows have 64 times that."""
    rng = np.random.default_rng(5)
    head = 2.0 * rng.integers(-128, 128, size=(300, WIDTH))
    head[:, :8] /= 16
    hidden = np.eye(WIDTH)
    if name != "fkl":  # whose float64 formula divides by p
        hidden[8:10] *= 64
    settings = Divergence(name, temperature=1.3, sampling_temperature=1.2)
    dtype, tolerance = (np.float32, 2e-5) if name in ("fkl", "sampled") else (jnp.bfloat16, 1e-2)
    arrays = list(_arrays(1, 12, 300, dtype))
    states = hidden[:12], hidden[np.r_[1:7, 20:22, 8, 24:27]]
    arrays[:4] = [jnp.asarray(x, dtype) for x in (*states, head, head)]
    # The likeliest tokens: their log-probabilities are small beside the logits.
    arrays[4] = jnp.asarray(np.argmax(_logits(arrays)[0], axis=1), jnp.int32)
    expected = _expected(settings, arrays)
    result = _run(kernel, settings, tuple(arrays))
    _check(result, expected, tolerance)
    _close(result[0].logp_sampling_T, expected[0].logp_sampling_T, 2e-5, "sampling")


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_token(kernel):
    settings = Divergence("jsd", clip_mode="element", clip=0.03)
    arrays = _clear(settings, 1, 300, np.float32, oracle.KINK_MARGIN)
    _check(_run(kernel, settings, arrays), _expected(settings, arrays), 2e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "name, dtype", [("fkl", "f4"), ("rkl", jnp.bfloat16), ("jsd", jnp.bfloat16)]
)
def test_equal_sides_are_exactly_zero(name, kernel, dtype):
    arrays = list(_arrays(2, 9, 300, dtype))
    arrays[1], arrays[3] = arrays[0], arrays[2]
    settings = Divergence(name, temperature=1.1, clip_mode="element")
    stats, *grads = _run(kernel, settings, tuple(arrays))
    for array in (stats.value_T, stats.clipped_mass_T, *grads):
        assert not np.asarray(array).any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "shards, settings", [(2, CASES[2]), (8, CASES[3]), (2, CASES[7])], ids=["2", "8", "2 sampled"]
)
def test_sharded_vocabulary(shards, settings, kernel):
    """300 entries on shards of a padded head; padding would win every maximum if it counted.

    The eighth shard of eight holds nothing real. The sampled token's own entry is on one shard.
    """
    arrays = _clear(settings, 11, 300, np.float32, oracle.KINK_MARGIN)
    size = {2: 160, 8: 43}[shards]
    pad = ((0, shards * size - 300), (0, 0))
    heads = [jnp.pad(x, pad, constant_values=9.0) for x in arrays[2:4]]
    mesh = jax.make_mesh((shards,), ("v",), axis_types=(jax.sharding.AxisType.Auto,))
    sweep = functools.partial(_sweep, kernel, settings, axis="v", entries=300)
    row: Any = P()
    mapped = jax.shard_map(
        sweep,
        mesh=mesh,
        in_specs=(P(), P(), P("v"), P("v"), P(), P(), P(), P()),
        out_specs=(token_values.TokenStats(*[row] * 8), row, P("v")),
        check_vma=False,
    )
    stats, grad, grad_head = jax.jit(mapped)(*arrays[:2], *heads, *arrays[4:])
    assert not np.asarray(grad_head)[300:].any()
    _check((stats, grad, grad_head[:300]), _expected(settings, arrays), 2e-5)


def test_what_is_kept_of_an_entry():
    """Relative errors of at most 2^-11, exact zeros, order and signs kept."""
    rng = np.random.default_rng(0)
    larger = np.exp(-rng.uniform(0, 40, size=(64, 128))).astype(np.float32)
    gap = (rng.choice([-1, 1], larger.shape) * np.exp(rng.uniform(-11, 9, larger.shape))).astype(
        np.float32
    )
    larger[0], gap[1] = 0, 0
    larger[2] = 1
    got = divergence_tpu.unpack(divergence_tpu.pack(jnp.asarray(larger), jnp.asarray(gap)))
    for mine, want in zip(got, (larger, gap), strict=True):
        error = np.abs(np.float64(mine) - np.float64(want))
        assert (error <= 2.0**-11 * np.abs(want)).all()
        assert error.max() > 0
    assert not np.asarray(got[0])[0].any()
    assert not np.asarray(got[1])[1].any()
    assert (np.asarray(got[0])[2] == 1).all()


def _moved(equation) -> int:
    """Bytes that a pallas_call's windows move: a block is fetched where its index changes."""
    mapping = equation.params["grid_mapping"]
    total = 0
    for block in mapping.block_mappings:
        shape = [getattr(n, "block_size", n) for n in block.block_shape]
        array = block.array_aval
        if "smem" in str(block.transformed_block_aval).lower():
            continue
        if "any" in str(block.transformed_block_aval).lower():  # copied once, by hand
            total += array.size * array.dtype.itemsize
            continue
        index = functools.partial(
            jax_core.eval_jaxpr, block.index_map_jaxpr.jaxpr, block.index_map_jaxpr.consts
        )
        seen, moves = None, 0
        for step in np.ndindex(*mapping.grid):
            now = tuple(int(i) for i in index(*(np.int32(k) for k in step)))
            moves += now != seen
            seen = now
        total += moves * int(np.prod(shape)) * array.dtype.itemsize
    return total


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "settings, train_head, tied",
    [(CASES[0], False, True), (CASES[2], False, True), (CASES[5], True, False)],
)
def test_cost_is_what_the_program_moves(settings, train_head, tied, dtype):
    """Bytes from the block shapes and index maps of the traced kernels, step by step, and FLOP
    from their matmuls."""
    sizes = block_sizes.Blocks(tokens=512, vocab=256, rows=256)
    shapes = [(1000, 256)] * 2 + [(700, 256)] * 2
    arrays: list[Any] = [jax.ShapeDtypeStruct(x, dtype) for x in shapes]
    arrays[3] = None if tied else arrays[3]
    arrays += [jax.ShapeDtypeStruct((1000,), x) for x in (jnp.int32, *[jnp.float32] * 3)]
    jaxpr = jax.make_jaxpr(
        functools.partial(
            _sweep, "tpu", settings, train_head=train_head, blocks=sizes, interpret=False
        )
    )(*arrays)
    found = list(hlo.kernels(jaxpr.jaxpr))
    assert len(found) == 2 + row_statistics.needs_sums_pass(settings, train_head)
    for equation, _ in found:
        assert equation.params["cost_estimate"].bytes_accessed == _moved(equation)
    flops, _ = _estimate(jaxpr.jaxpr)
    assert flops == hlo.kernel_matmuls(jaxpr.jaxpr)
    assert flops == (3 + train_head) * 2 * 1024 * 256 * 768  # in whole blocks


def _estimate(jaxpr) -> tuple[int, int]:
    """FLOP and bytes of a sweep, by the estimates of its kernels."""
    found = [(times, equation.params["cost_estimate"]) for equation, times in hlo.kernels(jaxpr)]
    flops = sum(times * estimate.flops for times, estimate in found)
    return flops, sum(times * estimate.bytes_accessed for times, estimate in found)


@pytest.mark.parametrize("kind, most", [("TPU v5 lite", 1.35), ("TPU v6 lite", 1.75)])
@pytest.mark.parametrize("settings", [CASES[0], CASES[2], CASES[6]], ids=_label)
def test_time_by_count(settings, kind, most):
    """FLOPs over peak plus bytes over bandwidth, in units of three matmuls at the peak."""
    tokens, width, vocabulary = 32768, 2048, 151936
    chip = hardware.CHIPS[kind]
    sizes = block_sizes.choose_tpu(
        kind, width, vocabulary, jnp.bfloat16, tied=True, train_head=False
    )
    states = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)
    head = jax.ShapeDtypeStruct((vocabulary, width), jnp.bfloat16)
    per_token = [jax.ShapeDtypeStruct((tokens,), x) for x in (jnp.int32, *[jnp.float32] * 3)]
    sweep = functools.partial(
        _sweep, "tpu", settings, train_head=False, blocks=sizes, interpret=False
    )
    flops, moved = _estimate(jax.make_jaxpr(sweep)(states, states, head, None, *per_token).jaxpr)
    floor = 3 * 2 * tokens * width * vocabulary / chip.flops
    assert flops / chip.flops + moved / chip.bandwidth <= most * floor
    assert vocabulary * sizes.tokens * 4 <= chip.memory / 8


def test_block_sizes():
    """Whole lanes that fit the chip's VMEM, and what no chip of its size takes is refused."""
    assert block_sizes.divide_rows_evenly(5000, 4096, 256) == 2560
    assert block_sizes.divide_rows_evenly(1, 4096, 128) == 128
    assert block_sizes.fit(block_sizes.Blocks(4096, 1024, 256), 130).rows == 256
    options: dict[str, Any] = {"dtype": jnp.bfloat16, "tied": True}
    kinds = [kind for kind in ("", *hardware.CHIPS) if "NV" not in kind]
    for kind, width, head in itertools.product(kinds, (576, 1024, 2048, 4096), (False, True)):
        vmem = hardware.CHIPS[kind].vmem if kind else 16 * block_sizes.MIB
        if (vmem, width, head) == (16 * block_sizes.MIB, 4096, True):
            with pytest.raises(
                ValueError, match=r"width is 4096: no block.*implementation=chunked"
            ):
                block_sizes.choose_tpu(kind, width, 151936, train_head=head, **options)
            continue
        sizes = block_sizes.choose_tpu(kind, width, 151936, train_head=head, **options)
        assert sizes.tokens % sizes.rows == sizes.vocab % 128 == 0
        need = block_sizes.count_loss_vmem(sizes, width, train_head=head, **options)
        assert need < block_sizes.compute_loss_vmem_limit(need) <= vmem
        assert (
            block_sizes.compute_loss_vmem_limit(need) >= need + min(14 * block_sizes.MIB, vmem // 4)
            or vmem > 2**24
        )
    assert block_sizes.choose_gpu("NVIDIA H200", 4096, 151936, jnp.bfloat16).tokens == 512
    with pytest.raises(ValueError, match="width is 1048576"):
        block_sizes.choose_tpu("", 2**20, 1000, jnp.bfloat16, tied=True, train_head=False)


def test_no_chip_is_smaller_than_the_smallest():
    for chip in hardware.CHIPS.values():
        assert chip.memory >= block_sizes.SMALLEST.memory
        assert not chip.vmem or chip.vmem >= block_sizes.SMALLEST.vmem


@pytest.mark.parametrize("platform, width", [("tpu", 128), ("gpu", 100)])
def test_the_tuner_measures_both_forms(platform, width, monkeypatch, capsys):
    """Width 100 as the kernels get it: in whole lanes for a TPU. Times mean nothing here."""
    arguments = "--width=100 --vocabulary=300 --tokens=16 --repetitions=1 --dtype=float32"
    monkeypatch.syspath_prepend(str(conftest.ROOT / "benchmarks"))
    tune_loss = importlib.import_module("tune_loss")
    monkeypatch.setattr(tune_loss, "CHOICES", {platform: {"tokens": (128,)}})
    argv = ["tune_loss.py", *arguments.split(), f"--interpret={platform}"]
    monkeypatch.setattr(sys, "argv", argv)
    tune_loss.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["tied"] for line in lines if "seconds" in line] == [True, False]
    best = [line for line in lines if "best" in line]
    assert [(line["width"], line["tied"]) for line in best] == [(width, True), (width, False)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_wrong_arguments_are_refused(kernel, monkeypatch):
    arrays = list(_arrays(0, 4, 40))
    with pytest.raises(ValueError, match=r"top_k is 3.*chunked"):
        _run(kernel, Divergence("fkl", top_k=3), tuple(arrays))
    with pytest.raises(ValueError, match="vocabulary has 0 entries"):
        _run(kernel, CASES[0], tuple(arrays), entries=0)
    mixed = (arrays[0].astype(jnp.bfloat16), *arrays[1:])
    with pytest.raises(ValueError, match=r"bfloat16.*float32.*the same dtype on both"):
        _run(kernel, CASES[0], mixed)
    with pytest.raises(ValueError, match="rollout_clip is 2"):
        _run(kernel, Divergence("fkl", rollout_clip=2.0), (*arrays[:7], None))
    if kernel == "tpu":
        narrow = tuple(x[:, :100] for x in arrays[:4])
        with pytest.raises(ValueError, match=r"width is 100.*128"):
            _run(kernel, CASES[0], (*narrow, *arrays[4:]))
    monkeypatch.setitem(divergences.DIVERGENCES, "new", divergences.DIVERGENCES["rkl"])
    with pytest.raises(ValueError, match=r"divergence is 'new': the kernels support fkl.*chunked"):
        _run(kernel, Divergence("new"), tuple(arrays))
