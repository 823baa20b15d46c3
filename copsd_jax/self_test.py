"""The self-test of a run: sampler and trainer have to compute the same distribution.

Before the first step, the sampler draws short completions, and the trainer scores the same tokens
in the layout of training. A new adapter is zero, so a fault in its path would not show. Therefore
each problem gets two completions: one from the initial policy, and one from a policy with a random
adapter, which is dropped after the test. All numbers are means over tokens, in nats:

    noise   |ln p in the sampler - ln p in the trainer|
    signal  |ln p of the teacher - ln p of the student|, if there is a teacher
    effect  change of |ln p| by the random adapter
    equal   |ln p of the teacher - ln p of the student| with equal prompts and initial weights

The noise has to be rounding (`BOUNDS`), and small against signal and effect (`SHARE`). A fault may
concern only the first token of a completion, so its noise is bounded as well.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from copsd_jax.config import settings as config_lib
from copsd_jax.model import shared_prefix
from copsd_jax.runtime import failures, sharding
from copsd_jax.sampler import loop, request
from copsd_jax.servers import remote_engine
from copsd_jax.teaching import contexts, conversations, prompts
from copsd_jax.training import builders, layout, loaded_run, row_packing, train_step

TOKENS = 16  # maximum number of tokens of a completion
STEP = 2**31 - 1  # selects random streams that no step of the run uses
ADAPTER_STREAM = 1003  # index of the random adapter's stream; see `loaded_run.WEIGHTS_STREAM`
SHAKE = 0.1  # size of the random adapter, relative to the weights that it is added to
SHARE = 0.2  # largest noise, relative to the signal and to the effect
BOUNDS = {"float32": 5e-4, "bfloat16": 0.06}  # largest noise, in nats per token
INT8_BOUND = 0.3  # largest noise if the sampler rounds weights or cache to int8
FIRST = 3.0  # factor of the bound for the first tokens, which are few
FARTHEST = 5.0  # largest mean of ln p of the student - ln p of the teacher, in nats per token
OFF = " (docs/self_test.md; check.self_test=False skips this test)"


class _Probe(NamedTuple):
    """The problems of the test, one or more per batch shard.

    Attributes:
      section: the section of the settings by which the sampler draws: rollout or eval.
      asked: the prompts from which the sampler draws, which the trainer gives to the student.
      told: the prompts that the trainer gives to the teacher; None if the run has no teacher.
    """

    section: str
    asked: list[prompts.Prompt]
    told: list[prompts.Prompt] | None


class _Drawn(NamedTuple):
    """The completions of the test: those of the initial policy, then those of the shaken one.

    Attributes:
      completions: the completions, with log-probabilities.
      temperature: the temperature at which they were drawn; 1 for greedy completions.
    """

    completions: list[loop.Completion]
    temperature: float


def check(r: loaded_run.LoadedRun, state: train_step.State) -> str:
    """Checks that sampler, student and teacher fit together; returns a line about the result.

    Args:
      r: the loaded run.
      state: the state at step 0.

    Raises:
      failures.RefusedRun: they do not; the message says which two numbers differ.
      failures.EngineError: with sampler.engine=server, the server failed.
    """
    _check_new_adapter(r, state)
    if not config_lib.traits(r.plan.config).samples and not r.plan.eval_rows:
        return "self-test: nothing to compare, because the run draws no completions"
    probe = _build_probe(r)
    _check_prompts(r, probe)
    lora = r.plan.config.train.trainable == "lora"
    shaken = _shake_adapter(r, state) if lora else state
    drawn = _draw(r, probe, state, shaken)
    told = None if probe.told is None else probe.told * 2
    scores = _build_scores(r, probe, drawn, told)
    initial = scores(state)
    numbers = _measure(drawn, initial, scores(shaken) if lora else initial)
    if told is not None:
        same = _build_scores(r, probe, drawn, probe.asked * 2)(state)
        numbers = numbers._replace(equal=_measure(drawn, same, same).signal)
    known = not contexts.list_inputs(r.plan.context)
    _judge(numbers, *_choose_bounds(r, drawn.temperature), known=known)
    return _describe(numbers, known)


def _build_probe(r: loaded_run.LoadedRun) -> _Probe:
    plan = r.plan
    section, form, rows = "rollout", plan.student, plan.rows
    if not config_lib.traits(plan.config).samples:
        section, form, rows = "eval", plan.evaluation, plan.eval_rows
    count = max(2, sharding.batch_shards(plan.mesh))
    rows = [rows[i % len(rows)] for i in range(count)]
    build = functools.partial(prompts.build_student_prompt, plan.tokenizer, form)
    asked = [build(row) for row in rows]
    if not config_lib.traits(plan.config).teacher:
        return _Probe(section, asked, None)
    return _Probe(section, asked, [plan.teacher.build_shortest(row) for row in rows])


# ---- checks without the model ----------------------------------------------------------------


def _refuse(reason: str) -> failures.RefusedRun:
    return failures.RefusedRun(f"the self-test failed: {reason}{OFF}")


def _check_prompts(r: loaded_run.LoadedRun, probe: _Probe) -> None:
    """Checks that a completion follows the same text on both sides."""
    plan = r.plan
    if probe.told is None or plan.config.parity.template_mismatch:
        return
    row, asked, told = plan.rows[0], probe.asked[0], probe.told[0]
    tail = asked.text.rpartition("\n")[2]
    if plan.student.template == "chat":
        turns = conversations.render_messages(plan.student, row, conversations.STUDENT)
        found = asked.text.rpartition(turns[-1]["content"].strip())
        tail = found[2] if found[1] else ""  # a template may change the white space of a content
    if asked.state != told.state or not told.text.endswith(tail):
        raise _refuse(
            f"the student's completion follows {tail!r}, but the teacher's follows "
            f"{told.text[len(told.text) - len(tail) :]!r} (prompt.thinking, teacher.thinking)"
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


def _shake_adapter(r: loaded_run.LoadedRun, state: train_step.State) -> train_step.State:
    """Returns a state with a random adapter, whose product has `SHAKE` times the base's size."""
    scale = r.options.adapter_scale

    def add_noise(adapter: dict, layers: dict) -> dict:
        rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))  # noqa: E731
        out = {}
        for i, (target, leaf) in enumerate(sorted(adapter.items())):
            key = jax.random.fold_in(jax.random.key(ADAPTER_STREAM), i)
            rank = leaf["a"].shape[-1]
            size = SHAKE * rms(layers[target]["kernel"]) / (scale * rank**0.5 * rms(leaf["a"]))
            noise = jax.random.normal(key, leaf["b"].shape, jnp.float32)
            out[target] = {"a": leaf["a"], "b": leaf["b"] + size * noise}
        return out

    places = builders.find_shardings(state.trained, r.plan)
    adapter = jax.jit(add_noise, out_shardings=places)(state.trained, r.frozen["layers"])
    return state._replace(trained=adapter)


def _draw(
    r: loaded_run.LoadedRun, probe: _Probe, state: train_step.State, shaken: train_step.State
) -> _Drawn:
    """Draws a completion per problem from both policies.

    If the model has padded ids, the shaken policy draws only even ids. The model gives little mass
    to its padded ids, so a sampler that ignores which ids are valid would otherwise not show.
    """
    plan = r.plan
    vocabulary, valid_V = plan.vocabulary, np.asarray(plan.vocabulary.valid_V)
    real_V = np.zeros_like(valid_V)
    real_V[sorted(plan.tokenizer.get_vocab().values())] = True
    if (valid_V & ~real_V).any():
        raise _refuse("the sampler may draw ids that the tokenizer does not have")
    sampling = loaded_run.build_sampling(r, probe.section)
    sampling = dataclasses.replace(sampling, max_tokens=min(TOKENS, sampling.max_tokens))
    if plan.server is None:
        # Without stop conditions, no completion is too short to compare.
        sampling = dataclasses.replace(sampling, stop=(), stop_ids=())
        if not valid_V.all():
            even_V = valid_V & (np.arange(len(valid_V)) % 2 == 0)
            vocabulary = dataclasses.replace(vocabulary, valid_V=even_V)
    elif not remote_engine.reports_log_probs(plan.server.logprobs, sampling)[0]:
        sampling = dataclasses.replace(sampling, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
    completions = []
    for policy, known in ((state, plan.vocabulary), (shaken, vocabulary)):
        ids = [f"self-test {i}" for i in range(len(probe.asked))]
        keys = request.derive_keys(plan.config.seed, "rollout", STEP, ids, [0] * len(ids))
        student = loaded_run.derive_run_policies(r, policy)[0]
        found = loaded_run.sample(
            r, student, probe.asked, probe.section, keys, sampling=sampling, vocabulary=known
        ).completions
        if any(completion.finish == "nonfinite" for completion in found):
            raise _refuse("the sampler's logits are not finite")
        allowed_V = known.valid_V
        if wrong := [i for completion in found for i in completion.ids if not allowed_V[i]]:
            raise _refuse(f"the sampler draws ids that it must not draw, such as {wrong[0]}")
        completions += found
    return _Drawn(completions, sampling.temperature or 1.0)


# ---- trainer ---------------------------------------------------------------------------------


def _build_scores(
    r: loaded_run.LoadedRun, probe: _Probe, drawn: _Drawn, told: list[prompts.Prompt] | None
):
    """Builds the function that maps a state to the trainer's scores of the completions.

    Args:
      r: the loaded run.
      probe: the problems.
      drawn: the completions.
      told: the teacher's prompt for each completion; None if the run has no teacher.
    """
    batch = _build_batch(r, probe.asked * 2, told, drawn.completions)
    options = dataclasses.replace(r.options, micro_batches=1, group=0)
    if options.divergence:  # all numbers at one temperature
        at = options.divergence.sampling_temperature if r.plan.server is None else drawn.temperature
        options = dataclasses.replace(options, divergence=dataclasses.replace(
            options.divergence, temperature=at, sampling_temperature=at
        ))  # fmt: skip
    if options.policy and (options.policy.kind == "nll" or r.plan.server is not None):
        policy = dataclasses.replace(options.policy, temperature=drawn.temperature)
        options = dataclasses.replace(options, policy=policy)
    whole = NamedSharding(r.plan.mesh, PartitionSpec())  # so that every process can read all
    program = jax.jit(train_step.make_scores(r.decoder, options), out_shardings=whole)
    placed = layout.place_batch(batch, r.plan.mesh)

    def scores(state: train_step.State) -> Any:
        first = probe.asked[0].prefix_ids
        student = np.asarray(first, np.int32) if first else None
        kvs = None
        if told is not None and told[0].prefix_ids:
            kvs = tuple(
                shared_prefix.encode_prefix_ids(r.decoder, policy, told[0].prefix_ids)
                for _, policy in loaded_run.list_run_teacher_mixture(r, state)
            )
        return jax.device_get(program(state, r.frozen, placed, student, kvs))

    return scores


def _build_batch(
    r: loaded_run.LoadedRun, asked: Sequence[prompts.Prompt],
    told: Sequence[prompts.Prompt] | None, completions: Sequence[loop.Completion],
) -> layout.Batch:  # fmt: skip
    """Builds the layout of a training step, alone or packed, with two or more rows per shard."""
    batch = layout.build_batch(
        [prompt.ids for prompt in asked],
        None if told is None else [prompt.ids for prompt in told],
        [completion.ids for completion in completions],
        student_prefix=len(asked[0].prefix_ids),
        teacher_prefix=len(told[0].prefix_ids) if told else 0,
    )
    C = batch.mask_BC.shape[1]
    logps_BC = layout.pad_rows([completion.logps for completion in completions], C, np.float32)
    batch = batch._replace(logp_rollout_BC=logps_BC)
    if r.options.policy:
        zeros_BC = np.zeros(batch.mask_BC.shape, np.float32)
        batch = batch._replace(policy_BC=batch.mask_BC, advantage_BC=zeros_BC)
    pack = r.plan.config.train.pack
    if pack == "off":
        return batch
    lengths, sides = layout.measure_prompts(batch, pack == "shared")
    plan = row_packing.plan_rows(lengths, sides, shards=sharding.batch_shards(r.plan.mesh))
    return layout.pack_rows(batch, plan, pack == "shared")


# ---- the verdict -----------------------------------------------------------------------------


class _Numbers(NamedTuple):
    """Measurements in nats per token; None for a measurement that the run does not allow.

    Attributes:
      noise: the difference between sampler and trainer, for the initial policy.
      first: the same for the first token of each completion.
      shaken: the noise for the policy with the random adapter.
      effect: the change of the student's log-probabilities by the random adapter.
      signal: the difference between student and teacher with their own prompts.
      distance: the mean of ln p of the student - ln p of the teacher with their own prompts.
      equal: the difference between student and teacher with equal prompts and initial weights.
    """

    noise: float
    first: float
    shaken: float | None
    effect: float | None
    signal: float | None
    distance: float | None
    equal: float | None = None


def _measure(drawn: _Drawn, initial, shaken) -> _Numbers:
    """Computes the numbers from the scores without and with the random adapter.

    Raises:
      failures.RefusedRun: a log-probability is not finite.
    """
    completions, half = drawn.completions, len(drawn.completions) // 2

    def take(scores, name: str) -> list[np.ndarray]:
        """Returns the values of the tokens of each completion."""
        values_BC = scores[1].logp_T if scores[0] is None else getattr(scores[0], name)
        found = [values_BC[i, : len(completion.ids)] for i, completion in enumerate(completions)]
        if not all(np.isfinite(values).all() for values in found):
            raise _refuse("the trainer's log-probabilities are not finite")
        return found

    def subtract(one, other, first: int = 0, last: int = half) -> np.ndarray:
        """Returns the differences of all tokens of some completions, as one array."""
        pairs = zip(one[first:last], other[first:last], strict=True)
        return np.concatenate([np.asarray(a) - np.asarray(b) for a, b in pairs])

    size = lambda values: float(np.mean(np.abs(values)))  # noqa: E731
    sampled = [completion.logps for completion in completions]
    before, after = (take(scores, "logp_sampling_T") for scores in (initial, shaken))
    firsts = [[values[:1] for values in some] for some in (sampled, before)]
    found = _Numbers(
        size(subtract(sampled, before)), size(subtract(*firsts)), None, None, None, None
    )
    if shaken is not initial:
        effect = size(subtract(before, after, half, None))
        found = found._replace(shaken=size(subtract(sampled, after, half, None)), effect=effect)
    if initial[0] is not None:
        apart = subtract(take(initial, "logp_student_T"), take(initial, "logp_teacher_T"))
        found = found._replace(signal=size(apart), distance=float(np.mean(apart)))
    return found


def _judge(numbers: _Numbers, bound: float, equal: float, kind: str, known: bool) -> None:
    """Refuses the run if a number exceeds its bound.

    Args:
      numbers: the measured numbers.
      bound: the largest noise.
      equal: the largest difference between student and teacher with equal prompts and weights.
      kind: what explains the bound, for messages.
      known: whether the teacher's context is known before the first step. Otherwise the signal says
        nothing about the contexts of the run.
    """
    differ = f"sampler and trainer differ by {numbers.noise:.2g} nats per token"
    if not numbers.noise <= bound:
        raise _refuse(f"{differ}, and {kind} explains at most {bound:.2g}")
    if not numbers.first <= FIRST * bound:
        raise _refuse(
            f"sampler and trainer differ by {numbers.first:.2g} nats at the first token, and "
            f"{kind} explains at most {FIRST * bound:.2g}"
        )
    if numbers.effect is not None and numbers.shaken is not None:
        if numbers.effect == 0:
            raise _refuse("a random adapter changes nothing in the trainer")
        if not numbers.shaken <= max(SHARE * numbers.effect, 2 * numbers.noise):
            raise _refuse(
                f"with a random adapter, sampler and trainer differ by {numbers.shaken:.2g} nats "
                f"per token, and the adapter changes the trainer by {numbers.effect:.2g}: sampler "
                "and trainer apply it differently"
            )
    if numbers.signal is None or numbers.distance is None or numbers.equal is None:
        return
    if not numbers.equal <= equal:
        raise _refuse(
            f"with equal prompts and weights, student and teacher differ by {numbers.equal:.2g} "
            f"nats per token (at most {equal:.2g}): they do not score the same tokens"
        )
    if not numbers.distance <= FARTHEST:
        raise _refuse(
            f"the teacher gives the student's tokens {numbers.distance:.2g} nats per token less "
            f"than the student (at most {FARTHEST:g}): they do not score the same tokens"
        )
    if known and numbers.signal > 0 and not numbers.noise <= SHARE * numbers.signal:
        raise _refuse(
            f"{differ}, which is more than {SHARE} of the difference between student and teacher, "
            f"{numbers.signal:.2g}"
        )


def _describe(numbers: _Numbers, known: bool) -> str:
    line = f"self-test: sampler and trainer differ by {numbers.noise:.1e} nats per token"
    if numbers.effect is not None and numbers.effect < 2 / SHARE * numbers.noise:
        line += ", too much to compare how they apply an adapter"
    if numbers.signal is None:
        return line
    more = "" if known else " (with a placeholder for the texts of the context)"
    return f"{line}, student and teacher by {numbers.signal:.1e}{more}"


def _choose_bounds(r: loaded_run.LoadedRun, temperature: float) -> tuple[float, float, str]:
    """Returns the largest noise, the largest difference of equal sides, and what explains them.

    A low temperature multiplies the logits and their rounding.
    """
    sampler, dtype = r.plan.config.sampler, np.dtype(r.plan.dtype).name
    factor = max(1.0, 1 / temperature)
    bound, kind = BOUNDS[dtype], f"rounding to {dtype}"
    if sampler.engine == "server":
        bound, kind = BOUNDS["bfloat16"], "the rounding of a server (sampler.model, .logprobs)"
    elif sampler.int8 or sampler.cache == "int8":
        bound, kind = INT8_BOUND, "rounding to int8 (sampler.int8, sampler.cache)"
    elif sampler.cache == "bfloat16":
        bound, kind = BOUNDS["bfloat16"], "rounding to bfloat16 (sampler.cache)"
    return bound * factor, BOUNDS[dtype] * factor, kind
