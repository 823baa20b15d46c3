"""Computes the memory that a run holds, from shapes and shardings alone.

This file allocates and compiles nothing. Only the compiler knows how much temporary memory a
program needs, so `dryrun` compiles the programs to find out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from copsd_jax.attention import decode_attention
from copsd_jax.config import settings as config_lib
from copsd_jax.model import policy as policy_lib
from copsd_jax.model import transformer
from copsd_jax.runtime import sharding
from copsd_jax.sampler import engine
from copsd_jax.training import builders, model_headers, run_plan, train_step


class HeldArrays(NamedTuple):
    """The arrays that a run holds between its programs, as jax.ShapeDtypeStructs with shardings.

    Attributes:
      base: the parameters as loaded.
      frozen: the parameters that do not change during the run; {} if full fine-tuning needs none.
      state: the training state.
      sampler: the policy that the sampler reads.
      kept: the sampler's copy of weights that stays in memory during the training step, or None.
    """

    base: dict
    frozen: dict
    state: train_step.State
    sampler: policy_lib.Policy
    kept: dict | None


def list_held_arrays(
    frame: run_plan.ProgramPlan,
    *,
    call: Callable[..., Any] = lambda program, *args: program.eval_shape(*args),
) -> HeldArrays:
    """Returns the arrays that a run holds, found by tracing the functions that create them.

    Args:
      frame: the settings, the model's shape and the mesh, which may be an AbstractMesh.
      call: function that the hand-over uses to get the abstract results of a jitted function.
    """
    c = frame.config
    shapes = transformer.abstract_params(frame.model_config, frame.dtype)
    base = sharding.to_abstract(shapes, frame.mesh, builders.find_shardings(shapes, frame))
    tx, _ = builders.build_optimizer(c, max(1, c.train.steps))
    state = jax.eval_shape(builders.build_initializer(frame, tx), base)
    state = sharding.to_abstract(state, frame.mesh, builders.find_shardings(state, frame))
    frozen, lora = builders.choose_frozen(c, base), c.train.trainable == "lora"
    hand_over = builders.build_hand_over(frame, frozen if lora else {}, call=call)
    student = policy_lib.Policy(base, state.trained if lora else None, frame.adapter_scale)
    sampler = hand_over(student)
    return HeldArrays(base, frozen, state, sampler, hand_over.kept())


def count_resident_memory(frame: run_plan.ProgramPlan, arrays: HeldArrays) -> dict[str, int]:
    """Returns the bytes that each part of a run holds on each device at all times.

    Args:
      frame: the settings.
      arrays: the result of `list_held_arrays`.

    Returns:
      The bytes of `weights`, `adapters`, `optimizer` and `average`. The part `average` is the
      teacher's moving average of the trained parameters.
    """
    trained = sharding.count_device_bytes(arrays.state.trained)
    lora = frame.config.train.trainable == "lora"
    return {
        "weights": sharding.count_device_bytes(arrays.frozen) + (0 if lora else trained),
        "adapters": trained if lora else 0,
        "optimizer": sharding.count_device_bytes(arrays.state.optimizer),
        "average": sharding.count_device_bytes(arrays.state.ema),
    }


def count_sampler_memory(frame: run_plan.ProgramPlan, arrays: HeldArrays) -> int:
    """Returns the bytes that the sampler's own copies of weights take on each device.

    Args:
      frame: the settings.
      arrays: the result of `list_held_arrays`.
    """
    lora = frame.config.train.trainable == "lora"
    policy = arrays.sampler
    copies = 0 if policy.params is arrays.base else sharding.count_device_bytes(policy.params)
    if lora and policy.adapter is not arrays.state.trained:
        copies += sharding.count_device_bytes(policy.adapter)
    # With full fine-tuning, each sampling phase begins with a cast of the float32 weights.
    return copies if lora else copies + sharding.count_device_bytes(arrays.base)


def count_decode_memory(frame: run_plan.ProgramPlan, section: str, tokens: int) -> int:
    """Returns the bytes that the decode cache and the state of its slots take on each device.

    Args:
      frame: the settings, the model's shape and the mesh.
      section: the section of the settings that sets the number of slots: rollout, eval or author.
      tokens: number of cache entries that a slot needs, including spare entries for insertions.
    """
    m, settings = frame.model_config, builders.build_sampler_settings(frame.config, section, 0)
    tensor, shards = frame.mesh.shape["tensor"], sharding.batch_shards(frame.mesh)
    repeats = sharding.count_sharded_key_repeats(m.n_heads, m.n_kv_heads, tensor)
    decoder = transformer.Decoder(m, frame.dtype, key_repeats=repeats)
    slots = -(-settings.slots // shards) * shards
    multiple = decode_attention.CACHE_LENGTH_MULTIPLE
    entries = -(-tokens // multiple) * multiple
    dtype = decoder.dtype if settings.cache is None else settings.cache
    state = jax.eval_shape(lambda: engine.init_slot_state(decoder, slots, entries, dtype))
    specs = engine.partition_state(state, frame.mesh)
    places = jax.tree.map(lambda spec: NamedSharding(frame.mesh, spec), specs)
    return sharding.count_device_bytes(sharding.to_abstract(state, frame.mesh, places))


def summarize_memory(plan: run_plan.Plan) -> dict[str, int]:
    """Returns the bytes that weights, training state and decode cache take on each device.

    The decode cache of rollouts is counted, but the temporary memory of programs is not.
    """
    arrays = list_held_arrays(plan)
    held = count_resident_memory(plan, arrays)
    tokens = plan.longest["student"] + plan.config.rollout.max_tokens + engine.INSERT_BLOCK
    samples = plan.server is None and config_lib.traits(plan.config).samples
    weights = held.pop("weights") + (count_sampler_memory(plan, arrays) if samples else 0)
    return {
        "weights": weights,
        "training state": sum(held.values()),
        "decode cache": count_decode_memory(plan, "rollout", tokens) if samples else 0,
    }


def report_undivided_memory(frame: run_plan.ProgramPlan) -> str:
    """Describes the parameters that an axis of the mesh should split but cannot.

    Returns:
      One line that lists the undivided parameters of each axis and the additional memory on each
      device; "" if the mesh divides every parameter. For trained parameters, the memory includes
      the gradients, the two moments of AdamW and the teacher's average.
    """
    c, where, shape = frame.config, frame.mesh, frame.model_config
    base = transformer.abstract_params(shape, frame.dtype)
    names, more = sharding.find_undivided(base, where, shape.n_kv_heads)
    trained = model_headers.trained_shapes(c, shape)
    trained_names, trained_more = sharding.find_undivided(trained, where, shape.n_kv_heads)
    by_axis = []
    for axis in sharding.AXES:
        if whole := dict.fromkeys((*names.get(axis, ()), *trained_names.get(axis, ()))):
            by_axis.append(f"along mesh.{axis}={where.shape[axis]} {', '.join(whole)}")
    if not by_axis:
        return ""
    more += (4 + (c.teacher.weights == "ema")) * trained_more
    return f"{'; '.join(by_axis)}: {more / 2**20:,.1f} MiB more on each device"
