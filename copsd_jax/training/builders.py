"""What a run and a dry run make alike: decoder, optimizer, step, and the sampler's settings."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from copsd_jax.attention import row_attention
from copsd_jax.config import settings as config_lib
from copsd_jax.model import lora, transformer
from copsd_jax.runtime import sharding
from copsd_jax.sampler import handover, request
from copsd_jax.teaching import contexts, prompts
from copsd_jax.training import backends, layout, prompt_lengths, row_packing, run_plan, train_step

ADAPTER_STREAM = 1001  # random stream of a seed besides the sampler's, whose purposes count from 0


def build_decoder(frame: run_plan.ProgramPlan) -> transformer.Decoder:
    c, m, platform = frame.config, frame.model_config, sharding.platform(frame.mesh)
    return transformer.Decoder(
        m,
        frame.dtype,
        remat=c.model.remat,
        query_block=row_attention.CPU_QUERY_BLOCK if platform == "cpu" else transformer.QUERY_BLOCK,
        decode=backends.choose_decode_attention(c, platform),
        attention=backends.choose_row_attention(c, platform, frame.dtype, m),
        key_repeats=sharding.key_repeats(m.n_heads, m.n_kv_heads, frame.mesh.shape["tensor"]),
    )


def build_optimizer(config, steps: int) -> tuple[Any, Callable[[Any], Any]]:
    """The optimizer and its learning rate of a step; `steps` is the last one."""
    names = "lr schedule warmup weight_decay b1 b2 eps max_grad_norm".split()
    return train_step.make_optimizer(steps=steps, **{n: config.train[n] for n in names})


def find_shardings(tree: Any, frame: run_plan.ProgramPlan) -> Any:
    """Where parameters, adapters and optimizer state of this model lie."""
    return sharding.shardings(tree, frame.mesh, frame.model_config.n_kv_heads)


def build_step(frame: run_plan.ProgramPlan, decoder, tx, options, state) -> Any:
    """The jitted training step; `state` may be abstract, its values are not read."""
    whole = NamedSharding(frame.mesh, PartitionSpec())  # so that each process has all of it
    return jax.jit(
        train_step.make_step(decoder, tx, options),
        donate_argnums=0,
        out_shardings=(find_shardings(state, frame), whole),
    )


def pack_batch(
    frame: run_plan.ProgramPlan, batch: layout.Batch, caps: bool = False
) -> layout.Batch:
    """The batch of `layout.build_batch`, its samples in rows and micro-batches as train.pack says.

    Every process makes the same of the same lengths.

    Args:
      caps: of a dry run's batch, with texts as long as they may be: one a row, none shared.

    Raises:
      ValueError: a sample that train.micro_tokens does not hold.
    """
    c = frame.config
    if c.train.pack == "off":
        return batch
    shared = c.train.pack == "shared"
    lengths, sides = layout.measure_prompts(batch, shared and not caps)
    plan = (row_packing.plan_one_per_row if caps else row_packing.plan_rows)(
        lengths, sides, shards=sharding.batch_shards(frame.mesh),
        micros=build_options(frame).micro_batches, budget=c.train.micro_tokens,
        row=c.train.row_tokens,
    )  # fmt: skip
    return layout.pack_rows(batch, plan, shared)


def check_row_budget(plan: run_plan.Plan) -> None:
    """Whether train.micro_tokens holds the longest sample that a step may have.

    Raises:
      ValueError: with the least that would.
    """
    c = plan.config
    if not c.train.micro_tokens or not plan.rows:
        return
    prompts_of = {
        "student": prompts.build_student_prompt(plan.tokenizer, plan.student, plan.rows[0])
    }
    if config_lib.traits(c).teacher:
        prompts_of["teacher"] = plan.teacher.build_shortest(plan.rows[0])
    longest = dict(plan.longest)
    if {"feedback", "other"} & {
        *contexts.list_inputs(plan.context)
    }:  # of which no length is known before
        longest["teacher"] = prompt_lengths.teacher_limit(c, plan.model_config)
    row_packing.check_budget(
        c.train.micro_tokens,
        [
            max(c.train.row_tokens, longest[side] - len(one.prefix_ids) + c.rollout.max_tokens)
            for side, one in prompts_of.items()
        ],
    )


def build_hand_over(
    frame: run_plan.ProgramPlan, frozen: dict, **call: Callable
) -> handover.HandOver:
    """What hands weights to the sampler; `call` as HandOver has it."""
    s = frame.config.sampler
    return handover.HandOver(
        frame.mesh, frozen, frame.model_config.n_kv_heads, merge=s.merge, int8=s.int8,
        gather=s.gather, **call,
    )  # fmt: skip


def build_initializer(frame: run_plan.ProgramPlan, tx: Any, teacher: str) -> Callable[..., Any]:
    """What makes the State at step 0, of a new adapter, or of all weights in float32.

    A function of the base parameters, which an adapter does not read.
    """
    c = frame.config

    def begun(base: dict) -> train_step.State:
        if c.train.trainable == "lora":
            key = jax.random.fold_in(jax.random.key(c.seed), ADAPTER_STREAM)
            trained = lora.init_adapter(frame.model_config, c.lora.rank, c.lora.targets, key)
        else:
            trained = jax.tree.map(lambda x: x.astype(jnp.float32), base)
        return train_step.init_state(trained, tx, teacher)

    return begun


def needs_initial_weights(config) -> bool:
    """Whether full fine-tuning has to keep the initial weights."""
    method = config_lib.traits(config)
    if method.teacher and config.teacher.weights in ("fixed", "trust_region"):
        return True
    return config.policy.kl > 0 and (method.policy_gradient or config.policy.weight > 0)


def teacher_weights(config) -> str:
    """Returns teacher.weights; 'fixed' for a method without a teacher."""
    return config.teacher.weights if config_lib.traits(config).teacher else "fixed"


def build_options(plan: run_plan.ProgramPlan) -> train_step.Options:
    """The static choices of a run's step."""
    c = plan.config
    completions = config_lib.completions_per_step(c)
    micro = c.train.micro_batch or completions
    distills = config_lib.traits(c).teacher
    divergence = backends.build_divergence(c)
    return train_step.Options(
        trainable=c.train.trainable,
        teacher=teacher_weights(c),
        ema_decay=c.teacher.ema_decay,
        adapter_scale=plan.adapter_scale,
        divergence=divergence,
        implementation=backends.choose_loss(c, sharding.platform(plan.mesh)),
        chunk=c.loss.chunk,
        norm=c.loss.norm,
        group=c.loss.group or micro,
        micro_batches=completions // micro,
        rho=c.teacher.rho,
        weight=1 - c.policy.weight if distills else 0.0,
        policy=_policy_loss(c),
        chip=plan.mesh.devices.flat[0].device_kind,
    )


POLICY_NORMS = {"sequence": "seq_mean_all", "token": "global_token_mean", "constant": "constant"}


def _policy_loss(c) -> train_step.PolicyLoss | None:
    """The loss on sampled tokens of a method; None where there is none."""
    method = config_lib.traits(c)
    if not method.samples:
        return train_step.PolicyLoss("nll", 1.0, 1.0, POLICY_NORMS[c.policy.norm], 1)
    weight = 1.0 if method.policy_gradient else c.policy.weight
    if not weight:
        return None
    return train_step.PolicyLoss(
        kind="surrogate",
        weight=weight,
        temperature=c.rollout.temperature or 1.0,
        norm=POLICY_NORMS[c.policy.norm],
        length=c.rollout.max_tokens,
        clip_low=c.policy.clip_low,
        clip_high=c.policy.clip_high,
        dual_clip=c.policy.dual_clip,
        kl=c.policy.kl,
        old=c.policy.old,
        rollout_clip=c.policy.rollout_clip,
    )


def build_sampling(config, section: str, stop_ids, stop: tuple[str, ...]) -> request.Sampling:
    """How completions of a section are drawn, with what ends a text."""
    s = config[section]
    return request.Sampling(
        max_tokens=s.max_tokens or config.rollout.max_tokens,  # 0 of eval is the rollout's
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        stop_ids=stop_ids,
        stop=stop,
    )


def build_sampler_settings(c, section: str, length: int) -> request.SamplerSettings:
    """The sampler's size of a section; `length`: cache entries of a slot, 0 for a call's need."""
    return request.SamplerSettings(
        slots=c[section].slots,
        length=length,
        steps=c.sampler.steps,
        pack=c.sampler.pack,
        cache=None if c.sampler.cache == "auto" else jnp.dtype(c.sampler.cache),
    )
