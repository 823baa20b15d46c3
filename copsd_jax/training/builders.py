"""Builds the decoder, optimizer, train step and sampler settings, for runs and dry runs."""

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
from copsd_jax.weights import initial_weights

ADAPTER_STREAM = 1001  # index of the adapter's random stream; the sampler's streams start at 0


def build_decoder(frame: run_plan.ProgramPlan) -> transformer.Decoder:
    """Builds the decoder of a run, with the attention implementations that fit the run's mesh."""
    c, m, platform = frame.config, frame.model_config, sharding.platform(frame.mesh)
    return transformer.Decoder(
        m,
        frame.dtype,
        remat=c.model.remat,
        query_block=row_attention.CPU_QUERY_BLOCK if platform == "cpu" else transformer.QUERY_BLOCK,
        decode=backends.choose_decode_attention(c, platform),
        attention=backends.choose_row_attention(c, platform, frame.dtype, m),
        key_repeats=sharding.count_sharded_key_repeats(
            m.n_heads, m.n_kv_heads, frame.mesh.shape["tensor"]
        ),
    )


def build_optimizer(config, steps: int) -> tuple[Any, Callable[[Any], Any]]:
    """Builds the optimizer, and its learning rate as a function of the step.

    Args:
      config: the settings of the run; section `train` is read.
      steps: number of optimizer steps of the run; the schedule ends with the last step.
    """
    names = "lr schedule warmup weight_decay b1 b2 eps max_grad_norm"
    return train_step.make_optimizer(steps=steps, **config_lib.pick(config.train, names))


def find_shardings(tree: Any, frame: run_plan.ProgramPlan) -> Any:
    """Returns the shardings of a tree of parameters, adapters or optimizer state."""
    return sharding.shardings(tree, frame.mesh, frame.model_config.n_kv_heads)


def build_step(frame: run_plan.ProgramPlan, decoder, tx, options, state) -> Any:
    """Builds the jitted train step, which donates the memory of its state.

    Args:
      frame: the plan of the run's programs.
      decoder: the model.
      tx: the optimizer.
      options: the choices that are fixed when the step is compiled.
      state: a State whose shapes determine the shardings of the output. An abstract State suffices,
        because no values are read.
    """
    # Measurements are replicated to every device, so that each process can read all of them.
    whole = NamedSharding(frame.mesh, PartitionSpec())
    return jax.jit(
        train_step.make_step(decoder, tx, options),
        donate_argnums=0,
        out_shardings=(find_shardings(state, frame), whole),
    )


def pack_batch(
    frame: run_plan.ProgramPlan, batch: layout.Batch, caps: bool = False
) -> layout.Batch:
    """Packs the samples of a batch into rows and micro-batches, according to `train.pack`.

    Every process has the same batch, and therefore makes the same packing plan.

    Args:
      frame: the plan of the run's programs.
      batch: a batch from `layout.build_batch`; it is returned unchanged if `train.pack` is off.
      caps: whether the batch belongs to a dry run, whose texts are all as long as the limits allow.
        In a dry run's batch, each completion gets its own row, and no prompt is shared.

    Raises:
      ValueError: a sample does not fit into `train.micro_tokens`.
    """
    c = frame.config
    if c.train.pack == "off":
        return batch
    shared = c.train.pack == "shared"
    lengths, sides = layout.measure_prompts(batch, shared and not caps)
    plan = row_packing.plan_rows(
        lengths, sides, shards=sharding.batch_shards(frame.mesh),
        micros=build_options(frame).micro_batches, budget=c.train.micro_tokens,
        row=c.train.row_tokens, one_per_row=caps,
    )  # fmt: skip
    return layout.pack_rows(batch, plan, shared)


def check_row_budget(plan: run_plan.Plan) -> None:
    """Checks that `train.micro_tokens` is large enough for the longest sample of any step.

    Raises:
      ValueError: `train.micro_tokens` is too small; the message gives the smallest sufficient
        value.
    """
    c = plan.config
    if not c.train.micro_tokens or not plan.rows:
        return
    longest = dict(plan.longest)
    if {"feedback", "other"} & {*contexts.list_inputs(plan.context)}:
        # Before the run, the lengths of feedback texts and of other problems in the context are
        # unknown. The limit for teacher prompts is therefore used as the length.
        longest["teacher"] = prompt_lengths.teacher_limit(c, plan.model_config)
    asked = {"student": prompts.build_student_prompt(plan.tokenizer, plan.student, plan.rows[0])}
    if config_lib.traits(c).teacher:
        asked["teacher"] = plan.teacher.build_shortest(plan.rows[0])
    own = {side: longest[side] - len(prompt.prefix_ids) for side, prompt in asked.items()}
    row_packing.check_budget(
        c.train.micro_tokens,
        [max(c.train.row_tokens, n + c.rollout.max_tokens) for n in own.values()],
    )


def build_hand_over(frame: run_plan.ProgramPlan, frozen: dict, **call: Any) -> handover.HandOver:
    """Builds the function that hands policies to the sampler.

    Args:
      frame: the plan of the run's programs.
      frozen: parameters that the run does not train.
      **call: the optional argument `call` of `handover.HandOver`.
    """
    how = config_lib.pick(frame.config.sampler, "merge int8 gather")
    return handover.HandOver(frame.mesh, frozen, frame.model_config.n_kv_heads, **how, **call)


def build_initializer(frame: run_plan.ProgramPlan, tx: Any) -> Callable[..., Any]:
    """Builds the function that makes the State at step 0 from the base parameters.

    If the run has a tree to start from, this tree becomes the trained tree of the State. Otherwise,
    the trained tree is a new adapter (LoRA) or a float32 copy of all weights (full fine-tuning). A
    new adapter is made without reading the base parameters.

    Args:
      frame: the plan of the run's programs.
      tx: the optimizer.
    """
    c = frame.config
    keep = initial_weights.keeps_adapter(c.model.init_from, c.train.trainable)

    def create_state(base: dict, start: dict | None = None) -> train_step.State:
        if start is not None:
            trained = start
        elif c.train.trainable == "lora":
            key = jax.random.fold_in(jax.random.key(c.seed), ADAPTER_STREAM)
            trained = lora.init_adapter(frame.model_config, c.lora.rank, c.lora.targets, key)
        else:
            trained = jax.tree.map(lambda x: x.astype(jnp.float32), base)
        return train_step.init_train_state(trained, tx, teacher_weights(c), keep)

    return create_state


def choose_frozen(config, base: dict) -> dict:
    """Returns the base parameters if the run keeps them, else {}.

    LoRA reads the base parameters in every step. Full fine-tuning keeps the base parameters if the
    teacher or the KL term uses the initial weights.

    Args:
      config: the settings of the run.
      base: the base parameters, as a tree of arrays or of their shapes.
    """
    method = config_lib.traits(config)
    if config.train.trainable == "lora":
        return base
    if method.teacher and config.teacher.weights in ("fixed", "trust_region"):
        return base
    policy = method.policy_gradient or config.policy.weight > 0
    return base if config.policy.kl > 0 and policy else {}


def teacher_weights(config) -> str:
    """Returns `teacher.weights`, or 'fixed' for a method without a teacher."""
    return config.teacher.weights if config_lib.traits(config).teacher else "fixed"


def build_options(plan: run_plan.ProgramPlan) -> train_step.Options:
    """Builds the options of a run's train step, which are fixed when the step is compiled."""
    c = plan.config
    completions = config_lib.completions_per_step(c)
    return train_step.Options(
        trainable=c.train.trainable,
        teacher=teacher_weights(c),
        ema_decay=c.teacher.ema_decay,
        adapter_scale=plan.adapter_scale,
        divergence=backends.build_divergence(c),
        implementation=backends.choose_loss(c, sharding.platform(plan.mesh)),
        **config_lib.pick(c.loss, "chunk norm"),
        group=c.loss.group or c.train.micro_batch,
        micro_batches=completions // (c.train.micro_batch or completions),
        rho=c.teacher.rho,
        weight=1 - c.policy.weight if config_lib.traits(c).teacher else 0.0,
        policy=_build_policy_loss_options(c),
        chip=plan.mesh.devices.flat[0].device_kind,
        min_grad_norm=c.train.min_grad_norm,
    )


POLICY_NORMS = {"sequence": "seq_mean_all", "token": "global_token_mean", "constant": "constant"}


def _build_policy_loss_options(c) -> train_step.PolicyLoss | None:
    """Builds the settings of the policy loss, or returns None if the run has no policy loss."""
    method = config_lib.traits(c)
    if not method.samples:
        return train_step.PolicyLoss("nll", 1.0, 1.0, POLICY_NORMS[c.policy.norm], 1)
    weight = 1.0 if method.policy_gradient else c.policy.weight
    if not weight:
        return None
    return train_step.PolicyLoss(
        "surrogate", weight, c.rollout.temperature or 1.0, POLICY_NORMS[c.policy.norm],
        length=c.rollout.max_tokens,
        **config_lib.pick(c.policy, "clip_low clip_high dual_clip kl old rollout_clip"),
    )  # fmt: skip


def build_sampling(config, section: str, stop_ids, stop: tuple[str, ...]) -> request.Sampling:
    """Builds the sampling settings of a section, with the ids and strings that end a completion.

    Args:
      config: the settings of the run.
      section: rollout, eval or author.
      stop_ids: token ids that end a completion.
      stop: strings that end a completion.
    """
    s = config[section]
    return request.Sampling(
        s.max_tokens or config.rollout.max_tokens,  # eval.max_tokens=0 means rollout.max_tokens
        **config_lib.pick(s, "temperature top_k top_p min_p"),
        stop_ids=stop_ids,
        stop=stop,
    )


def build_sampler_settings(c, section: str, length: int) -> request.SamplerSettings:
    """Builds the sampler's settings for a section, such as the number of slots.

    Args:
      c: the settings of the run.
      section: rollout, eval or author.
      length: number of cache entries per slot; with 0, each sampler call uses as many entries as
        its longest text needs.
    """
    cache = None if c.sampler.cache == "auto" else jnp.dtype(c.sampler.cache)
    how = config_lib.pick(c.sampler, "steps pack")
    return request.SamplerSettings(c[section].slots, length, cache=cache, **how)
