"""The self-test of a run: sampler and trainer have to compute the same distribution.

Before the first step, the sampler draws a short completion for some problems, and the trainer
scores the same tokens in the layout of training. A new adapter is zero, so an error in the code
that applies adapters would not show. Therefore the completions come from a policy with a small
random adapter, which is dropped after the test. All numbers are means over tokens, in nats:

    noise     |ln p in the sampler - ln p in the trainer|
    effect    |ln p with the random adapter - ln p without it|, both in the trainer
    signal    |ln p of the teacher - ln p of the student|, if there is a teacher
    distance  ln p of the student - ln p of the teacher, with its sign
    equal     the signal if both sides get the student's prompt; only rounding can make this number
              differ from 0, because student and teacher have equal weights before the first step

The test passes if sampler and trainer differ only by rounding. This means:

  - The noise is at most an entry of `BOUNDS`. The noise at first tokens alone is at most `FIRST`
    times this bound. The second check finds errors that concern only the first token of a
    completion.
  - The noise is at most `SHARE` times the effect, and at most `SHARE` times the signal. If sampler
    and trainer applied the adapter differently, the noise would be about as large as the effect.
  - `equal` is at most the bound of the dtype, and the distance is at most `FARTHEST`. Larger values
    mean that the two sides score different tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import failures, sharding
from copsd_jax.sampler import loop, request
from copsd_jax.servers import remote_engine
from copsd_jax.teaching import contexts, conversations, prompts
from copsd_jax.training import builders, layout, loaded_run, rollouts, row_packing, train_step

TOKENS = 8  # maximum number of tokens of a completion
STEP = 2**31 - 1  # selects random streams that no step of the run uses
SHAKE = 0.06  # size of the random adapter, relative to the weights that it is added to
SHARE = 0.2  # largest noise, as a share of the effect, and as a share of the signal
LEAST = 0.01  # a noise of at most this share of its bound is not compared with the effect
BOUNDS = {"float32": 5e-4, "bfloat16": 0.06}  # largest noise, in nats per token
INT8_BOUND = 0.3  # largest noise if the sampler rounds weights or cache to int8
FIRST = 3.0  # factor by which the bound for first tokens is larger, because they are few
FARTHEST = 5.0  # largest mean of ln p of the student - ln p of the teacher, in nats per token
OFF = " (docs/self_test.md; check.self_test=False skips this test)"


class _SelfTestProbe(NamedTuple):
    """The problems of the test, one or more per batch shard.

    Attributes:
      section: the section of the settings that the sampler uses: rollout or eval.
      asked: the prompts that the sampler completes, and that the student gets in the trainer.
      filler: further prompts that only the sampler completes. They fill a row of its prefill, so
        that the first rollouts use the same compiled programs.
      told: the prompts that the trainer gives to the teacher; None if the run has no teacher.
      equal: whether the trainer can also give the student's prompts to the teacher. The trainer
        cannot do this if the two sides have different worked examples before their prompts.
    """

    section: str
    asked: list[prompts.Prompt]
    filler: list[prompts.Prompt]
    told: list[prompts.Prompt] | None
    equal: bool


class _SelfTestCompletions(NamedTuple):
    """The completions of the test.

    Attributes:
      completions: the completions, with log-probabilities.
      temperature: the temperature at which they were drawn; 1 for greedy completions.
    """

    completions: list[loop.Completion]
    temperature: float


def check(r: loaded_run.LoadedRun, state: train_step.State) -> str:
    """Checks that sampler and trainer agree about student and teacher; returns a line of results.

    Args:
      r: the loaded run.
      state: the state at step 0.

    Raises:
      failures.RefusedRun: a check failed; the message says what differs.
      failures.EngineError: with sampler.engine=server, the server failed.
    """
    _check_new_adapter(r, state)
    if not config_lib.traits(r.plan.config).samples and not r.plan.eval_rows:
        return "self-test: nothing to compare, because the run draws no completions"
    probe = _build_probe(r)
    _check_prompts(r, probe)
    lora = r.plan.config.train.trainable == "lora"
    shaken = _shake_adapter(r, state) if lora else state
    drawn = _draw_test_completions(r, probe, shaken)
    scores = _build_scores(r, state, probe, drawn)
    initial = scores(state)
    numbers = _measure(probe, drawn, initial, scores(shaken) if lora else initial)
    known = not contexts.list_inputs(r.plan.context)
    _judge(numbers, *_choose_bounds(r, drawn.temperature), known=known)
    return _describe(numbers, known)


def _build_probe(r: loaded_run.LoadedRun) -> _SelfTestProbe:
    plan = r.plan
    section, form, rows = "rollout", plan.student, plan.rows
    if not config_lib.traits(plan.config).samples:
        section, form, rows = "eval", plan.evaluation, plan.eval_rows
    shards = sharding.batch_shards(plan.mesh)
    count = max(2, shards)
    build = functools.partial(prompts.build_student_prompt, plan.tokenizer, form)
    asked = [build(rows[i % len(rows)]) for i in range(count)]
    filler: list[prompts.Prompt] = []
    room = shards * plan.config.sampler.pack // 2 - sum(len(prompt.ids) for prompt in asked)
    for row in rows[count : plan.config[section].slots] if plan.server is None else ():
        if room >= 0:
            filler.append(build(row))
            room -= len(filler[-1].ids)
    if not config_lib.traits(plan.config).teacher:
        return _SelfTestProbe(section, asked, filler, None, False)
    told = [plan.teacher.build_shortest(rows[i % len(rows)]) for i in range(count)]
    equal = told[0].prefix_ids == asked[0].prefix_ids
    return _SelfTestProbe(section, asked, filler, told, equal)


# ---- checks without the model ----------------------------------------------------------------


def _refuse(reason: str) -> failures.RefusedRun:
    return failures.RefusedRun(f"the self-test failed: {reason}{OFF}")


def _check_prompts(r: loaded_run.LoadedRun, probe: _SelfTestProbe) -> None:
    """Checks that the prompts of both sides end in the same text and the same template state."""
    plan = r.plan
    if probe.told is None or plan.config.parity.template_mismatch:
        return
    row, asked, told = plan.rows[0], probe.asked[0], probe.told[0]
    tail = asked.text.rpartition("\n")[2]
    if plan.student.template == "chat":
        turns = conversations.render_messages(plan.student, row, conversations.STUDENT)
        found = asked.text.rpartition(turns[-1]["content"].strip())
        tail = found[2] if found[1] else ""  # a template may change the white space of a message
    if asked.state != told.state or not told.text.endswith(tail):
        raise _refuse(
            f"the student's completion follows {tail!r}, but the teacher's follows "
            f"{told.text[len(told.text) - len(tail) :]!r} (prompt.thinking, teacher.thinking)"
        )


def _check_new_adapter(r: loaded_run.LoadedRun, state: train_step.State) -> None:
    """Checks that the adapter changes nothing if the adapter is new in this run."""
    c = r.plan.config
    if c.train.trainable == "full" or (r.plan.start is not None and r.plan.start.is_adapter):
        return
    trained = {target: leaf["b"] for target, leaf in state.trained.items()}
    # One program for all arrays compiles faster than one for each shape.
    changed = jax.jit(lambda arrays: jax.tree.map(jnp.any, arrays))(trained)
    for target, found in jax.device_get(changed).items():
        if found:
            raise _refuse(f"the new adapter of {target} is not zero")


# ---- sampler ---------------------------------------------------------------------------------


def _shake_adapter(r: loaded_run.LoadedRun, state: train_step.State) -> train_step.State:
    """Returns a state with a random adapter, whose product has `SHAKE` times the base's size."""
    scale = r.options.adapter_scale

    def add_noise(adapter: dict, layers: dict) -> dict:
        rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))  # noqa: E731
        out = {}
        for target, leaf in adapter.items():
            rank = leaf["a"].shape[-1]
            # One layer is enough to find the size of the weights.
            whole, low = rms(layers[target]["kernel"][0]), rms(leaf["a"][0])
            size = SHAKE * whole / (scale * rank**0.5 * low)
            # Sines of growing angles look random, and compile faster than random numbers.
            at = [jax.lax.broadcasted_iota(jnp.float32, leaf["b"].shape, i) for i in range(3)]
            noise = jnp.sqrt(2.0) * jnp.sin((at[0] + 1) * (at[1] + 1) * (at[2] + 1) * 0.7)
            out[target] = {"a": leaf["a"], "b": leaf["b"] + size * noise}
        return out

    places = builders.find_shardings(state.trained, r.plan)
    adapter = jax.jit(add_noise, out_shardings=places)(state.trained, r.frozen["layers"])
    return state._replace(trained=adapter)


def _draw_test_completions(
    r: loaded_run.LoadedRun, probe: _SelfTestProbe, state: train_step.State
) -> _SelfTestCompletions:
    """Draws one completion per problem, with log-probabilities."""
    plan = r.plan
    real_V = np.zeros_like(plan.vocabulary.valid_V)
    real_V[sorted(plan.tokenizer.get_vocab().values())] = True
    if (plan.vocabulary.valid_V & ~real_V).any():
        raise _refuse("the sampler may draw ids that the tokenizer does not have")
    sampling = loaded_run.build_sampling(r, probe.section)
    sampling = dataclasses.replace(sampling, max_tokens=min(TOKENS, sampling.max_tokens))
    if plan.server is None:
        # Without stop conditions, no completion is too short to compare.
        sampling = dataclasses.replace(sampling, stop=(), stop_ids=())
    elif not remote_engine.reports_log_probs(plan.server.logprobs, sampling)[0]:
        sampling = dataclasses.replace(sampling, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
    asked, count = probe.asked + probe.filler, len(probe.asked)
    ids = [f"self-test {i}" for i in range(len(asked))]
    keys = request.derive_sampling_keys(plan.config.seed, "rollout", STEP, ids, [0] * len(ids))
    policy = loaded_run.derive_run_policies(r, state)[0]
    drawn = loaded_run.sample(r, policy, asked, probe.section, keys, sampling=sampling).completions
    drawn = drawn[:count]
    if any(completion.finish == "nonfinite" for completion in drawn):
        raise _refuse("the sampler's logits are not finite")
    if wrong := [i for completion in drawn for i in completion.ids if not real_V[i]]:
        raise _refuse(f"the sampler draws ids that the tokenizer does not have, such as {wrong[0]}")
    return _SelfTestCompletions(drawn, sampling.temperature or 1.0)


# ---- trainer ---------------------------------------------------------------------------------


def _build_scores(
    r: loaded_run.LoadedRun,
    initial: train_step.State,
    probe: _SelfTestProbe,
    drawn: _SelfTestCompletions,
) -> Callable[[train_step.State], Any]:
    """Builds the function that maps a state to the trainer's scores of the completions.

    If `probe.equal` is true, every completion is scored twice: first with the teacher's own prompt,
    and then with the student's prompt on both sides. The teacher's worked examples are encoded
    once, with the teacher's initial weights, because nothing reads the teacher's scores in other
    states.
    """
    times = 1 + probe.equal
    told = None if probe.told is None else [*probe.told, *(probe.asked if probe.equal else ())]
    batch = _build_self_test_batch(r, probe.asked * times, told, drawn.completions * times)
    options = dataclasses.replace(r.options, micro_batches=1, group=0)
    if options.divergence:  # computes all numbers at one temperature
        at = options.divergence.sampling_temperature if r.plan.server is None else drawn.temperature
        options = dataclasses.replace(options, divergence=dataclasses.replace(
            options.divergence, temperature=at, sampling_temperature=at
        ))  # fmt: skip
    if options.policy and (options.policy.kind == "nll" or r.plan.server is not None):
        policy = dataclasses.replace(options.policy, temperature=drawn.temperature)
        options = dataclasses.replace(options, policy=policy)
    whole = NamedSharding(r.plan.mesh, PartitionSpec())  # so that every process can read all scores
    program = jax.jit(train_step.make_scores(r.decoder, options), out_shardings=whole)
    placed = layout.place_batch(batch, r.plan.mesh)

    first = None if told is None else told[0]
    prefixes = rollouts.encode_training_prefixes(r, initial, probe.asked[0], first)
    return lambda state: jax.device_get(program(state, r.frozen, placed, *prefixes))


def _build_self_test_batch(
    r: loaded_run.LoadedRun, asked: Sequence[prompts.Prompt],
    told: Sequence[prompts.Prompt] | None, completions: Sequence[loop.Completion],
) -> layout.Batch:  # fmt: skip
    """Builds a batch in the layout of a training step, packed or not packed."""
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


class _SelfTestNumbers(NamedTuple):
    """Measurements in nats per token; None if the run does not allow a measurement.

    Attributes:
      noise: the difference between sampler and trainer.
      first: the same difference at the first token of each completion.
      effect: the amount by which the random adapter changes the student's log-probabilities.
      signal: the difference between student and teacher, each with its own prompt.
      distance: the mean of ln p of the student - ln p of the teacher, each with its own prompt.
      equal: the difference between student and teacher with equal prompts and initial weights.
    """

    noise: float
    first: float
    effect: float | None = None
    signal: float | None = None
    distance: float | None = None
    equal: float | None = None


def _measure(
    probe: _SelfTestProbe, drawn: _SelfTestCompletions, initial, shaken
) -> _SelfTestNumbers:
    """Computes the numbers from the scores without and with the random adapter.

    Raises:
      failures.RefusedRun: a log-probability is not finite.
    """
    count, completions = len(drawn.completions), drawn.completions * (1 + probe.equal)

    def take(scores, name: str, rows: slice = slice(None)) -> list[np.ndarray]:
        """Returns the values of the tokens of each completion, for some rows of the batch."""
        values_BC = scores[1].logp_T if scores[0] is None else getattr(scores[0], name)
        pairs = zip(values_BC[rows], completions[rows], strict=True)
        found = [values_C[: len(completion.ids)] for values_C, completion in pairs]
        if not all(np.isfinite(values).all() for values in found):
            raise _refuse("the trainer's log-probabilities are not finite")
        return found

    def subtract(one, other) -> np.ndarray:
        """Returns the differences of all tokens, as one array."""
        return np.concatenate([a - b for a, b in zip(one, other, strict=True)])

    size = lambda values: float(np.mean(np.abs(values)))  # noqa: E731
    before, after = (take(scores, "logp_sampling_T") for scores in (initial, shaken))
    sampled = [completion.logps for completion in completions]
    first = subtract([x[:1] for x in sampled], [x[:1] for x in after])
    found = _SelfTestNumbers(size(subtract(sampled, after)), size(first))
    if shaken is not initial:
        found = found._replace(effect=size(subtract(before, after)))
    if probe.told is None:
        return found
    sides = (take(initial, f"logp_{name}_T", slice(count)) for name in ("student", "teacher"))
    apart = subtract(*sides)
    found = found._replace(signal=size(apart), distance=float(np.mean(apart)))
    if probe.equal:
        rest = slice(count, None)
        sides = (take(initial, f"logp_{name}_T", rest) for name in ("student", "teacher"))
        found = found._replace(equal=size(subtract(*sides)))
    return found


def _judge(numbers: _SelfTestNumbers, bound: float, equal: float, kind: str, known: bool) -> None:
    """Refuses the run if a number exceeds its bound.

    Args:
      numbers: the measured numbers.
      bound: the largest noise that is accepted.
      equal: the largest accepted difference between student and teacher with equal prompts and
        weights.
      kind: the cause of a noise up to `bound`, such as "rounding to float32", for messages.
      known: whether the teacher's context is known before the first step. If it is not, the test
        uses a placeholder, and the noise is not compared with the signal.
    """
    differ = f"sampler and trainer differ by {numbers.noise:.2g} nats per token"
    if not numbers.noise <= bound:
        raise _refuse(f"{differ}, and {kind} explains at most {bound:.2g}")
    if not numbers.first <= FIRST * bound:
        raise _refuse(
            f"sampler and trainer differ by {numbers.first:.2g} nats at the first token, and "
            f"{kind} explains at most {FIRST * bound:.2g}"
        )
    if numbers.effect is not None:
        if numbers.effect == 0:
            raise _refuse("a random adapter changes nothing in the trainer")
        if not numbers.noise <= max(SHARE * numbers.effect, LEAST * bound):
            raise _refuse(
                f"{differ}, and a random adapter changes the trainer by {numbers.effect:.2g}: "
                "sampler and trainer apply the adapter differently"
            )
    if numbers.signal is None or numbers.distance is None:
        return
    if numbers.equal is not None and not numbers.equal <= equal:
        raise _refuse(
            f"with equal prompts and weights, student and teacher differ by {numbers.equal:.2g} "
            f"nats per token (at most {equal:.2g}): they do not score the same tokens"
        )
    if not numbers.distance <= FARTHEST:
        raise _refuse(
            f"the teacher's ln p is {numbers.distance:.2g} nats per token below the student's (at "
            f"most {FARTHEST:g}): student and teacher do not score the same tokens"
        )
    if known and numbers.signal > 0 and not numbers.noise <= SHARE * numbers.signal:
        raise _refuse(
            f"{differ}, which is more than {SHARE} of the difference between student and teacher, "
            f"{numbers.signal:.2g}"
        )


def _describe(numbers: _SelfTestNumbers, known: bool) -> str:
    line = f"self-test: sampler and trainer differ by {numbers.noise:.1e} nats per token"
    if numbers.signal is None:
        return line
    line += f", student and teacher by {numbers.signal:.1e}"
    skipped = [] if known else ["the context is a placeholder"]
    skipped += ["with equal prompts not tested"] if numbers.equal is None else []
    return line + (f" ({'; '.join(skipped)})" if skipped else "")


def _choose_bounds(r: loaded_run.LoadedRun, temperature: float) -> tuple[float, float, str]:
    """Returns the arguments `bound`, `equal` and `kind` of `_judge`.

    At a temperature T below 1, both bounds are multiplied by 1 / T, because the logits and their
    rounding are divided by T.
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


if __name__ == "__main__":
    raise SystemExit("error: copsd_jax.self_test is no command: use python -m copsd_jax.main")
