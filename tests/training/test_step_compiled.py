"""What a compiled training step exchanges, read from its text on eight devices that split weights.

The oracle is arithmetic: a layer's weights are so many bytes, and a device lacks 7/8 of them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mostly_slow
from jax.sharding import PartitionSpec

from copsd_jax.dryrun import program_cost
from copsd_jax.losses import divergence_loss
from copsd_jax.model import lora, transformer
from copsd_jax.runtime import sharding
from copsd_jax.training import layout, train_step

F32 = jnp.float32
SHAPE = dataclasses.replace(transformer.SHAPES["tiny"], n_layers=5, d_model=128, d_ff=256)
OPTIONS = train_step.Options(
    trainable="lora", teacher="fixed", ema_decay=0.0, adapter_scale=1.0,
    divergence=divergence_loss.Divergence("fkl"), implementation="chunked", chunk=64,
    norm="global_token_mean", group=8, micro_batches=1,
)  # fmt: skip


def gathered(micro_batches: int, remat: str, trainable: str = "lora") -> tuple[float, float]:
    """Bytes of all-gathers in the loops over layers of a step, by bytes of one gather of all; and
    FLOPs of all products."""
    devices = sharding.make_mesh(1, 8, 1)
    teacher = "fixed" if trainable == "lora" else "live"
    options = dataclasses.replace(
        OPTIONS, micro_batches=micro_batches, trainable=trainable, teacher=teacher
    )
    decoder = transformer.Decoder(SHAPE, F32, remat=remat)
    tx = optax.sgd(1e-3)
    frozen = transformer.abstract_params(SHAPE, F32)
    trained = frozen
    if trainable == "lora":
        trained = jax.eval_shape(
            lambda: lora.init_adapter(SHAPE, 4, lora.TARGETS, jax.random.key(0))
        )
    state = jax.eval_shape(lambda t: train_step.init_train_state(t, tx, "fixed"), trained)
    batch = layout.build_batch([[1] * 9] * 16, [[2] * 40] * 16, [[3] * 20] * 16)
    with jax.set_mesh(devices):
        state = sharding.to_abstract(state, devices, sharding.shardings(state, devices))
        program = (
            jax.jit(train_step.make_step(decoder, tx, options))
            .lower(
                state,
                sharding.to_abstract(frozen, devices, sharding.shardings(frozen, devices)),
                sharding.to_abstract(batch, devices, PartitionSpec(sharding.BATCH_AXES)),
                None,
                None,
            )
            .compile()
        )
    text = program.as_text()
    assert text
    costs, collectives = program_cost.read_program_text(text, devices)
    in_layers = [
        one for one in collectives
        if one.kind == "all-gather" and one.times == SHAPE.n_layers * micro_batches
    ]  # fmt: skip
    weights = sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen["layers"]) if x.ndim == 3
    )
    moved = sum(one.bytes * one.times for one in in_layers) / micro_batches
    return moved / (weights * 7 / 8), sum(cost.flops * cost.times for cost in costs)


def apart(decoder, sides):
    """`train_step._compute_side_states` with a pass over the layers for each side."""
    out = []
    for policy, side, prefix in sides:
        stream = transformer.Stream(
            side.tokens_BL,
            side.positions_BL,
            side.segments_BL,
            policy.adapter,
            policy.scale,
            prefix,
        )
        hidden = decoder.apply({"params": policy.params}, (stream,))[0].hidden_BLD
        out.append(hidden.reshape(-1, hidden.shape[-1])[side.gather_BC.reshape(-1)])
    return out


@pytest.mark.long
@pytest.mark.parametrize("remat", mostly_slow(["layer", "none"]))
def test_weights_of_a_layer_are_gathered_twice_a_step_not_three_times(monkeypatch, remat):
    """Once for both sides on the way forward, once backward; adapters are the rest."""
    adapters = 2 * 4 * sum(map(sum, SHAPE.projections().values()))  # forward and backward, at most
    weights = sum(a * b for a, b in SHAPE.projections().values())
    together, _ = gathered(1, remat)
    assert 2 <= together <= 2 + 2 * adapters / weights
    monkeypatch.setattr(train_step, "_compute_side_states", apart)
    separate, _ = gathered(1, remat)
    assert 3 <= separate <= 3 + 2 * adapters / weights
    np.testing.assert_allclose(separate - together, 1, atol=1e-6)


def without_gradient(decoder, sides):
    """`apart`, the weights of all sides but the student's as constants."""
    (student, *others) = sides
    others = [
        (dataclasses.replace(policy, params=jax.lax.stop_gradient(policy.params)), side, prefix)
        for policy, side, prefix in others
    ]
    return apart(decoder, [student, *others])


@pytest.mark.slow
def test_all_weights_of_a_live_teacher_are_gathered_twice_too(monkeypatch):
    """And the teacher goes through the layers once, forward."""
    moved, flops = gathered(1, "layer", "full")
    assert moved == pytest.approx(2, rel=1e-3)
    monkeypatch.setattr(train_step, "_compute_side_states", without_gradient)
    moved, apart_flops = gathered(1, "layer", "full")
    assert moved == pytest.approx(3, rel=1e-3)
    assert flops == apart_flops
