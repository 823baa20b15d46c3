"""The self-test of a run: sampler and trainer have to compute the same distribution.

Before the first step, the sampler draws a short completion for two problems, and the trainer scores
the same tokens in the layout of training. Three numbers, all in nats per token, decide:

    noise   mean |ln p in the sampler - ln p in the trainer|
    signal  mean |ln p of the teacher - ln p of the student|, if there is a teacher
    effect  mean change of ln p by a random adapter, if an adapter is trained

The noise has to be rounding: at most `BOUNDS`, at most `SHARE` of the signal, because the loss
would otherwise teach the noise, and at most `SHARE` of the effect. A new adapter is zero, so faults
of the adapter's path would not show. Therefore the completions are drawn and scored with the random
adapter, which is dropped after the test.

With equal prompts and the initial weights, student and teacher have to agree as well. If worked
examples stand before the prompts, this is not tested, because the two sides have other examples.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import failures, sharding
from copsd_jax.sampler import loop, request
from copsd_jax.teaching import contexts, conversations, prompts
from copsd_jax.training import builders, layout, loaded_run, rollouts, row_packing, train_step

TOKENS = 16  # maximum number of tokens of a completion
STEP = 2**31 - 1  # selects random streams that no step of the run uses
ADAPTER_STREAM = 1003  # index of the random adapter's stream; see `loaded_run.WEIGHTS_STREAM`
SHAKE = 0.3  # size of the random adapter, relative to the weights that it is added to
VIOLENT = 30.0  # the same if only texts can be compared, which small changes leave as they are
SHARE = 0.2  # largest noise, relative to the signal and to the effect
BOUNDS = {"float32": 5e-4, "bfloat16": 0.06}  # largest noise, in nats per token
INT8_BOUND = 0.3  # largest noise if the sampler rounds weights or cache to int8
FARTHEST = 5.0  # largest mean of ln p of the student - ln p of the teacher, in nats per token
OFF = "; check.self_test=False skips this test"


class _Probe(NamedTuple):
    """The two problems of the test.

    Attributes:
      section: the section of the settings by which the sampler draws: rollout or eval.
      asked: the prompts from which the sampler draws, which the trainer gives to the student.
      told: the prompts that the trainer gives to the teacher; None if the run has no teacher.
      equal: for each problem, whether student and teacher have the same prompt: the second problem,
        if no worked examples stand before the prompts, or both, if the context is empty.
    """

    section: str
    asked: list[prompts.Prompt]
    told: list[prompts.Prompt] | None
    equal: list[bool]


def check(r: loaded_run.LoadedRun, state: train_step.State) -> str:
    """Checks that sampler, student and teacher fit together; returns a line about the result.

    Args:
      r: the loaded run.
      state: the state at step 0.

    Raises:
      failures.RefusedRun: they do not; the message says which two numbers differ.
      failures.EngineError: with sampler.engine=server, the server failed.
    """
    probe = _build_probe(r)
    _check_prompts(r, probe)
    _check_new_adapter(r, state)
    lora = r.plan.config.train.trainable == "lora"
    shaken = _shake_adapter(r, state, SHAKE) if lora else state
    drawn = _sample(r, shaken, probe)
    scores = _build_scores(r, probe, drawn)
    initial = scores(state)
    numbers = _measure(probe, drawn, initial, scores(shaken) if lora else initial)
    _judge(numbers, *_choose_bound(r), known=not contexts.list_inputs(r.plan.context))
    if numbers.noise is None and lora:
        bare, changed = (_sample(r, s, probe) for s in (state, _shake_adapter(r, state, VIOLENT)))
        if [x.ids for x in bare] == [x.ids for x in changed]:
            raise _refuse("the server draws the same texts with and without a random adapter")
    return _describe(numbers)


def _build_probe(r: loaded_run.LoadedRun) -> _Probe:
    plan = r.plan
    section, form, rows = "rollout", plan.student, plan.rows
    if not config_lib.traits(plan.config).samples and plan.eval_rows:
        section, form, rows = "eval", plan.evaluation, plan.eval_rows
    rows = [rows[0], rows[-1]]
    build = functools.partial(prompts.build_student_prompt, plan.tokenizer, form)
    asked = [build(row) for row in rows]
    if not config_lib.traits(plan.config).teacher:
        return _Probe(section, asked, None, [False, False])
    told = [plan.teacher.build_shortest(row) for row in rows]
    if told[1].prefix_ids == asked[1].prefix_ids:
        told[1] = asked[1]
    same = [
        (a.prefix_ids, a.ids) == (b.prefix_ids, b.ids) for a, b in zip(asked, told, strict=True)
    ]
    return _Probe(section, asked, told, same)


# ---- checks without the model ----------------------------------------------------------------


def _refuse(reason: str) -> failures.RefusedRun:
    return failures.RefusedRun(f"the self-test failed: {reason}{OFF}")


def _check_prompts(r: loaded_run.LoadedRun, probe: _Probe) -> None:
    """Checks that a completion follows the same text on both sides."""
    plan = r.plan
    if probe.told is None or plan.config.parity.template_mismatch:
        return
    row, asked, told = plan.rows[0], probe.asked[0], probe.told[0]
    if plan.student.template == "chat":
        turns = conversations.render_messages(plan.student, row, conversations.STUDENT)
        tail = asked.text.rpartition(turns[-1]["content"].strip())[2]
    else:
        tail = asked.text.rpartition("\n")[2]
    if asked.state != told.state or not told.text.endswith(tail):
        raise _refuse(
            f"the student's completion follows {tail!r}, but the teacher's follows "
            f"{told.text[-len(tail) :]!r} (prompt.thinking, teacher.thinking)"
        )


def _check_new_adapter(r: loaded_run.LoadedRun, state: train_step.State) -> None:
    """Checks that an adapter that is new in this run changes nothing."""
    c = r.plan.config
    if c.train.trainable == "full" or (r.plan.start is not None and r.plan.start.is_adapter):
        return
    for target, leaf in state.trained.items():
        if bool(jnp.any(leaf["b"])):
            raise _refuse(f"the new adapter of {target} is not zero")


# ---- sampler ---------------------------------------------------------------------------------


def _shake_adapter(
    r: loaded_run.LoadedRun, state: train_step.State, shake: float
) -> train_step.State:
    """Returns a state with a random adapter, whose product has `shake` times the base's size."""
    scale = r.options.adapter_scale

    def add_noise(adapter: dict, layers: dict) -> dict:
        rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))  # noqa: E731
        out = {}
        for i, (target, leaf) in enumerate(sorted(adapter.items())):
            key = jax.random.fold_in(jax.random.key(ADAPTER_STREAM), i)
            rank = leaf["a"].shape[-1]
            size = shake * rms(layers[target]["kernel"]) / (scale * rank**0.5 * rms(leaf["a"]))
            noise = jax.random.normal(key, leaf["b"].shape, jnp.float32)
            out[target] = {"a": leaf["a"], "b": leaf["b"] + size * noise}
        return out

    places = builders.find_shardings(state.trained, r.plan)
    adapter = jax.jit(add_noise, out_shardings=places)(state.trained, r.frozen["layers"])
    return state._replace(trained=adapter)


def _sample(
    r: loaded_run.LoadedRun, state: train_step.State, probe: _Probe
) -> list[loop.Completion]:
    """Draws a completion per problem, without every second id if the model has padded ids.

    Half of the ids are left out because the model gives little mass to its padded ids. Whether the
    sampler leaves out any ids would otherwise hardly ever show.
    """
    plan, limit = r.plan, TOKENS
    limit = min(limit, loaded_run.build_sampling(r, probe.section).max_tokens)
    vocabulary = plan.vocabulary
    valid_V = np.asarray(vocabulary.valid_V)
    real = np.zeros_like(valid_V)
    real[sorted(plan.tokenizer.get_vocab().values())] = True
    if (valid_V & ~real).any():
        raise _refuse("the sampler may draw ids that the tokenizer does not have")
    if plan.server is None and not valid_V.all():
        valid_V = valid_V & (np.arange(len(valid_V)) % 2 == 0)
        vocabulary = dataclasses.replace(vocabulary, valid_V=valid_V)
    ids = [f"self-test {i}" for i in range(len(probe.asked))]
    keys = request.derive_keys(plan.config.seed, "rollout", STEP, ids, [0] * len(ids))
    policy = loaded_run.derive_run_policies(r, state)[0]
    drawn = loaded_run.sample(
        r, policy, probe.asked, probe.section, keys, limit=limit, vocabulary=vocabulary
    ).completions
    if any(completion.finish == "nonfinite" for completion in drawn):
        raise _refuse("the sampler's logits are not finite")
    if wrong := [i for completion in drawn for i in completion.ids if not valid_V[i]]:
        raise _refuse(f"the sampler draws ids that it must not draw, such as {wrong[0]}")
    return drawn


# ---- trainer ---------------------------------------------------------------------------------


def _build_scores(r: loaded_run.LoadedRun, probe: _Probe, drawn: Sequence[loop.Completion]):
    """Builds the function that maps a state to the trainer's scores of the completions."""
    batch = _build_batch(r, probe, drawn)
    options = dataclasses.replace(r.options, micro_batches=1, group=0)
    if options.policy and options.policy.kind == "nll":  # a cross entropy has no sampler
        drawn_at = loaded_run.build_sampling(r, probe.section).temperature or 1.0
        policy = dataclasses.replace(options.policy, temperature=drawn_at)
        options = dataclasses.replace(options, policy=policy)
    program = jax.jit(train_step.make_scores(r.decoder, options))
    placed = layout.place_batch(batch, r.plan.mesh)

    def scores(state: train_step.State) -> Any:
        told = probe.told[0] if probe.told else None
        prefixes = rollouts.encode_prefixes(r, state, probe.asked[0], told)
        return jax.device_get(program(state, r.frozen, placed, *prefixes))

    return scores


def _build_batch(
    r: loaded_run.LoadedRun, probe: _Probe, drawn: Sequence[loop.Completion]
) -> layout.Batch:
    """Builds the layout of a training step, alone or packed, with both problems on each shard."""
    shards = sharding.batch_shards(r.plan.mesh)
    told = probe.told
    batch = layout.build_batch(
        [prompt.ids for prompt in probe.asked] * shards,
        None if told is None else [prompt.ids for prompt in told] * shards,
        [completion.ids for completion in drawn] * shards,
        student_prefix=len(probe.asked[0].prefix_ids),
        teacher_prefix=len(told[0].prefix_ids) if told else 0,
    )
    C = batch.mask_BC.shape[1]
    logps_BC = layout.pad_rows([x.logps for x in drawn] * shards, C, np.float32)
    batch = batch._replace(logp_rollout_BC=np.nan_to_num(logps_BC))
    if r.options.policy:
        zeros_BC = np.zeros(batch.mask_BC.shape, np.float32)
        batch = batch._replace(policy_BC=batch.mask_BC, advantage_BC=zeros_BC)
    pack = r.plan.config.train.pack
    if pack == "off":
        return batch
    lengths, sides = layout.measure_prompts(batch, pack == "shared")
    plan = row_packing.plan_rows(lengths, sides, shards=shards)
    return layout.pack_rows(batch, plan, pack == "shared")


# ---- the verdict -----------------------------------------------------------------------------


class _Numbers(NamedTuple):
    """Measurements in nats per token; None for a measurement that the run does not allow.

    Attributes:
      noise: the difference between sampler and trainer.
      effect: the change of the student by the random adapter.
      equal: the difference between student and teacher with equal prompts and initial weights.
      signal: the difference between student and teacher with their own prompts.
      distance: the mean of ln p of the student - ln p of the teacher with their own prompts.
    """

    noise: float | None
    effect: float | None
    equal: float | None
    signal: float | None
    distance: float | None


def _measure(probe: _Probe, drawn: Sequence[loop.Completion], initial, shaken) -> _Numbers:
    """Computes the numbers from the scores without and with the random adapter."""

    def take(scores, name: str) -> list[np.ndarray]:
        """Returns the values of the tokens of each completion."""
        values_BC = scores[1].logp_T if scores[0] is None else getattr(scores[0], name)
        return [values_BC[i, : len(completion.ids)] for i, completion in enumerate(drawn)]

    def subtract(one, other, kept=(True, True)) -> np.ndarray:
        """Returns the differences of all tokens of the kept completions, as one array."""
        return np.concatenate([a - b for a, b, keep in zip(one, other, kept, strict=True) if keep])

    size = lambda values: float(np.mean(np.abs(values)))  # noqa: E731
    before, after = (take(scores, "logp_sampling_T") for scores in (initial, shaken))
    sampled = [np.asarray(completion.logps, np.float32) for completion in drawn]
    known = all(len(x) and not np.isnan(x).any() for x in sampled)
    noise = size(subtract(sampled, after)) if known else None
    effect = None if shaken is initial else size(subtract(before, after))
    if probe.told is None:
        return _Numbers(noise, effect, None, None, None)
    own = [not same for same in probe.equal]
    sides = take(initial, "logp_student_T"), take(initial, "logp_teacher_T")
    equal = size(subtract(*sides, probe.equal)) if any(probe.equal) else None
    apart = subtract(*sides, own) if any(own) else None
    if apart is None:
        return _Numbers(noise, effect, equal, None, None)
    return _Numbers(noise, effect, equal, size(apart), float(np.mean(apart)))


def _judge(numbers: _Numbers, bound: float, kind: str, known: bool) -> None:
    """Refuses the run if a number cannot be explained.

    Args:
      numbers: the measured numbers.
      bound: the largest noise that rounding explains.
      kind: the kind of rounding, for messages.
      known: whether the context of the teacher is known before the first step, so that the signal
        says something about the contexts of the run.
    """
    noise, most = numbers.noise or 0.0, f"but rounding to {kind} gives at most {bound:g}"
    differ = f"sampler and trainer differ by {noise:.2g} nats per token"
    if noise > bound:
        raise _refuse(f"{differ}, {most}: they do not compute the same distribution")
    if numbers.effect is not None and not noise <= SHARE * numbers.effect > 0:
        raise _refuse(
            f"{differ}, and a random adapter changes the trainer by {numbers.effect:.2g}: one of "
            "the two does not apply the adapter as the other does"
        )
    if numbers.equal is not None and numbers.equal > bound:
        raise _refuse(
            f"with equal prompts and weights, student and teacher differ by {numbers.equal:.2g} "
            f"nats per token, {most}: they do not score the same text"
        )
    if numbers.distance is not None and numbers.distance > FARTHEST:
        raise _refuse(
            f"the teacher gives the student's tokens {numbers.distance:.2g} nats per token less "
            f"than the student, at most {FARTHEST:g} is plausible: they do not score the same text"
        )
    if known and numbers.signal is not None and noise > SHARE * numbers.signal:
        raise _refuse(
            f"{differ}, which is more than {SHARE} of the difference between teacher and student, "
            f"{numbers.signal:.2g}: the loss would teach rounding errors"
        )


def _describe(numbers: _Numbers) -> str:
    if numbers.noise is None:
        line = "self-test: the server reports no log-probabilities"
    else:
        line = f"self-test: sampler and trainer differ by {numbers.noise:.1e} nats per token"
    if numbers.signal is not None:
        line += f", student and teacher by {numbers.signal:.1e}"
    return line


def _choose_bound(r: loaded_run.LoadedRun) -> tuple[float, str]:
    """Returns the largest noise, and the rounding that explains it."""
    sampler, dtype = r.plan.config.sampler, np.dtype(r.plan.dtype).name
    if sampler.int8 or sampler.cache == "int8":
        return INT8_BOUND, "int8"
    if sampler.engine == "server" or sampler.cache == "bfloat16":
        return BOUNDS["bfloat16"], "bfloat16"
    return BOUNDS[dtype], dtype
