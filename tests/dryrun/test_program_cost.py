"""Oracle: arithmetic by hand on programs whose loops, products and exchanges are known."""

import functools

import hlo as text_of_programs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from copsd_jax.dryrun import hlo, program_cost
from copsd_jax.runtime import hardware, sharding

F32 = jnp.float32


def shape(*dims, place=None):
    return jax.ShapeDtypeStruct(dims, F32, sharding=place)


def text_of(function, *args) -> str:
    return str(jax.jit(function).lower(*args).compile().as_text())


def flops(text: str, **settings) -> float:
    return sum(c.flops * c.times for c in program_cost.read_program_text(text, **settings)[0])


def moved(text: str, **settings) -> float:
    return sum(c.bytes * c.times for c in program_cost.read_program_text(text, **settings)[0])


def layers(x, w, n=1):
    """n times through all layers, which are scanned."""

    def once(x, _):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], None

    return jax.lax.scan(once, x, None, length=n)[0]


def test_products_count_as_often_as_their_loops_turn():
    text = text_of(functools.partial(layers, n=3), shape(64, 128), shape(5, 128, 128))
    assert flops(text) == 3 * 5 * 2 * 64 * 128 * 128
    assert flops(text) == text_of_programs.matmuls(text, 1)


def test_loops_without_a_number_turn_as_often_as_said():
    def until(x, w, n):
        return jax.lax.fori_loop(0, n, lambda _, x: x @ w, x)

    text = text_of(until, shape(64, 64), shape(64, 64), jax.ShapeDtypeStruct((), jnp.int32))
    assert flops(text, turns=7) == 7 * 2 * 64**3
    assert flops(text) == 2 * 64**3


def test_of_a_conditional_the_dearer_branch_counts():
    def either(choice, x, w):
        return jax.lax.cond(choice, lambda: x @ w @ w, lambda: x @ w)

    text = text_of(either, jax.ShapeDtypeStruct((), bool), shape(64, 64), shape(64, 64))
    assert flops(text) == 2 * 2 * 64**3


def test_a_layer_is_read_once_and_not_all_layers_each_time():
    text = text_of(layers, shape(8, 512), shape(16, 512, 512))
    weights = 16 * 512 * 512 * 4
    # Cut out of the stack and multiplied: read twice and written once at most.
    assert weights <= moved(text) <= 3.2 * weights


def test_kernels_of_triton_state_their_cost_in_the_name_of_a_scope():
    text = """HloModule m

ENTRY %main (x: bf16[4,16,16]) -> f32[16,16] {
  %x = bf16[4,16,16]{2,1,0} parameter(0)
  ROOT %k = f32[16,16]{1,0} custom-call(%x), custom_call_target="t", metadata={op_name="f/cost:300:77/k"}
}
"""  # noqa: E501
    (cost,) = program_cost.read_program_text(text)[0]
    assert (cost.flops, cost.bytes, cost.times) == (300, 77, 1)
    (plain,) = program_cost.read_program_text(text.replace("cost:", "a:"))[0]
    assert (plain.flops, plain.bytes) == (0, 4 * 16 * 16 * 2 + 16 * 16 * 4)


def test_a_cache_that_is_written_in_place_is_not_moved():
    def write(cache, x):
        return jax.lax.fori_loop(
            0, 10, lambda i, c: jax.lax.dynamic_update_slice(c, x + c[i, 0], (i, 0)), cache
        )

    program = jax.jit(write, donate_argnums=0).lower(shape(1000, 4096), shape(1, 4096)).compile()
    assert moved(str(program.as_text())) < 10 * 8 * 4096 * 4 + 2 * 1000 * 4096 * 4


# What the compiler for TPUs writes; layouts say what lies in memory, S(1) is on the chip.
TPU = """HloModule m

%fused (a: bf16[2,1,16], b: bf16[16,16,128]) -> bf16[2,16,128] {
  %a = bf16[2,1,16]{2,1,0} parameter(0)
  %b = bf16[16,16,128]{2,1,0} parameter(1)
  ROOT %c = bf16[2,16,128]{2,0,1} convolution(%a, %b), window={size=16 pad=15_15 rhs_reversal=1}, dim_labels=b0f_0io->b0f
}

%body (p: (s32[], bf16[2,1,16])) -> (s32[], bf16[2,1,16]) {
  %p = (s32[]{:T(128)}, bf16[2,1,16]{2,1,0}) parameter(0)
  %x = bf16[2,1,16]{2,1,0} get-tuple-element(%p), index=1
  %w = bf16[16,16,128]{2,1,0:T(8,128)(2,1)S(1)} constant({...})
  %y = bf16[2,16,128]{2,0,1:T(8,128)} fusion(%x, %w), kind=kOutput, calls=%fused
  %k = bf16[2,16,128]{2,0,1} custom-call(%y), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","transcendentals":"5","bytes_accessed":"77"}}}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %r = (s32[]{:T(128)}, bf16[2,1,16]{2,1,0}) tuple(%i, %x)
}

%cond (p.1: (s32[], bf16[2,1,16])) -> pred[] {
  %one = s32[] constant(1)
  %n = s32[]{:T(128)} constant(28)
  %p.1 = (s32[]{:T(128)}, bf16[2,1,16]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

ENTRY %main (x.1: bf16[2,1,16]) -> bf16[2,1,16] {
  %x.1 = bf16[2,1,16]{2,1,0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], bf16[2,1,16]{2,1,0}) tuple(%zero, %x.1)
  %while = (s32[]{:T(128)}, bf16[2,1,16]{2,1,0}) while(%t), condition=%cond, body=%body
  ROOT %out = bf16[2,1,16]{2,1,0} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def test_what_the_compiler_for_tpus_writes():
    costs, collectives = program_cost.read_program_text(TPU)
    assert not collectives
    by_name = {cost.name: cost for cost in costs}
    # A product of [2, 16] and [16, 16 x 128] as a convolution: each output meets one input row.
    assert by_name["y"][1:] == (2 * 2 * 16 * 16 * 128, 2 * 16 * 2 + 2 * 16 * 128 * 2, 28)
    assert by_name["k"][1:] == (1000, 77, 28)


# An exchange that goes on beside two products stands in the fusion of each.
BESIDE = """HloModule m

%first (a: f32[8,64]) -> (f32[8,64], f32[32,64]) {
  %a = f32[8,64]{1,0} parameter(0)
  %g = f32[32,64]{1,0} all-gather(%a), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %r = (f32[8,64]{1,0}, f32[32,64]{1,0}) tuple(%a, %g)
}

%second (b: f32[8,64]) -> f32[32,64] {
  %b = f32[8,64]{1,0} parameter(0)
  ROOT %h = f32[32,64]{1,0} all-gather(%b), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (x: f32[8,64]) -> f32[32,64] {
  %x = f32[8,64]{1,0} parameter(0)
  %y = (f32[8,64]{1,0}, f32[32,64]{1,0}) fusion(%x), kind=kCustom, calls=%first
  ROOT %z = f32[32,64]{1,0} fusion(%x), kind=kCustom, calls=%second
}
"""


BETWEEN = """HloModule m

ENTRY %main (x: f32[8,64]) -> f32[8,64] {
  %x = f32[8,64]{1,0} parameter(0)
  %t = token[] after-all()
  %s = (f32[8,64]{1,0}, u32[], token[]) send(%x, %t), channel_id=3, is_host_transfer=true
  %d = token[] send-done(%s), channel_id=3, is_host_transfer=true
  %r = (f32[8,64]{1,0}, u32[], token[]) recv(%d), channel_id=2, is_host_transfer=true
  %e = (f32[8,64]{1,0}, token[]) recv-done(%r), channel_id=2, is_host_transfer=true
  ROOT %out = f32[8,64]{1,0} get-tuple-element(%e), index=0
}
"""


def test_what_slices_send_one_another_goes_over_the_network():
    costs, collectives = program_cost.read_program_text(BETWEEN, sharding.make_mesh(2, 2, 2))
    assert collectives == (program_cost.Collective("send", "data", True, 8 * 64 * 4, 1),)
    assert not costs


def test_an_exchange_beside_several_products_counts_once():
    (one,) = program_cost.read_program_text(BESIDE, sharding.make_mesh(2, 2, 2))[1]
    assert one == program_cost.Collective("all-gather", "fsdp+tensor", False, 3 * 8 * 64 * 4, 1)


@pytest.mark.parametrize(
    "stride, pad, left_hole, right_hole", [(1, 0, 1, 1), (2, 3, 2, 1), (1, 4, 1, 2), (3, 2, 4, 1)]
)
def test_meetings_by_convolving_ones(stride, pad, left_hole, right_hole):
    left, right = np.ones(9), np.ones(4)
    wide = np.zeros((len(left) - 1) * left_hole + 1)
    wide[::left_hole] = left
    kernel = np.zeros((len(right) - 1) * right_hole + 1)
    kernel[::right_hole] = right
    out = np.correlate(np.pad(wide, pad), kernel, mode="valid")[::stride]
    window = {"stride": stride, "pad": pad, "lhs_dilate": left_hole, "rhs_dilate": right_hole}
    assert (
        program_cost._count_convolution_pairs(len(left), len(right), len(out), window) == out.sum()
    )


GROUPS = [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,2},{1,3}}, x", GROUPS),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", GROUPS),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", GROUPS),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", GROUPS),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", GROUPS),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,2},{1,3}}, x", GROUPS),
    ],
)
def test_groups_of_each_spelling(text, groups):
    found = hlo.parse_replica_groups(text, 4)
    assert sorted(map(sorted, found)) == sorted(groups)


def exchanges(body, spec, devices, dims=(8, 64)):
    run = jax.shard_map(body, in_specs=spec, out_specs=spec, check_vma=False)
    place = NamedSharding(devices, spec)
    with jax.set_mesh(devices):
        program = jax.jit(run).lower(shape(*dims, place=place)).compile()
    return program, program_cost.read_program_text(str(program.as_text()), devices)[1]


def test_exchanges_by_axis_with_their_bytes():
    devices = sharding.make_mesh(2, 2, 2)
    local = 4 * 64 * 4  # bytes: rows are split over data

    def body(x):
        def once(x, _):
            return jax.lax.psum(x, ("fsdp", "tensor")) * 0.1, None

        return jax.lax.scan(once, x, None, length=6)[0]

    _, (one,) = exchanges(body, P("data"), devices)
    assert one == program_cost.Collective("all-reduce", "fsdp+tensor", False, 2 * local * 3 / 4, 6)
    _, (one,) = exchanges(
        lambda x: jax.lax.all_gather(x, "data").sum(0) + x, P(("data", "fsdp")), devices
    )
    assert one == program_cost.Collective("all-gather", "data", False, local / 2, 1)
    program, (one,) = exchanges(
        lambda x: jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)]), P("data"), devices
    )
    assert one[:2] == ("collective-permute", "tensor")
    found = program_cost.analyse_program("p", program, 1.0, devices)
    assert program_cost.sum_collectives_by_axes(found) == {
        "tensor": {"collective-permute": [1, local]}
    }


def test_time_is_that_of_the_slower_side_of_each_instruction():
    costs = (program_cost.Cost("a", 4e9, 1e3, 2), program_cost.Cost("b", 1.0, 3e6, 5))
    travel = (
        program_cost.Collective("all-gather", "fsdp", False, 2e6, 3),
        program_cost.Collective("all-reduce", "data", True, 1e6, 1),
    )
    found = program_cost.Analysis("p", 1.0, 0.0, 0.0, 0, 0, 0, 0, costs, travel)
    chip = hardware.Chip(1e12, 1e9, 0, 0, 0, 1e9, 1e8)
    own, exchanged = program_cost.estimate_roofline_seconds(found, chip)
    assert own == pytest.approx(2 * 4e-3 + 5 * 3e-3)
    assert exchanged == pytest.approx(3 * 2e-3 + 1e-2)
