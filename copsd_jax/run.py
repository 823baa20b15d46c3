"""A plan's loaded parts: weights on the mesh, compiled functions, and what is done with them."""

import contextlib
import dataclasses
import pathlib
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from copsd_jax import (
    graders,
    hf,
    implementations,
    lora,
    mesh,
    model,
    peft,
    plans,
    prompts,
    rewards,
    token_stats,
    train_step,
)
from copsd_jax.sampler import engine, host, jobs, remote, weights

# Random streams of a seed besides the sampler's, whose purposes count from 0.
ADAPTER_STREAM, WEIGHTS_STREAM = 1001, 1002


@dataclasses.dataclass(frozen=True)
class Run:
    """A plan with its weights, compiled functions and helpers."""

    plan: plans.Plan
    decoder: model.Decoder
    frozen: dict  # LoRA: the base; full: the initial weights if the teacher is fixed, else {}
    options: train_step.Options
    step: Callable[..., tuple[train_step.State, train_step.Aux]]
    rate: Callable[[Any], Any]  # learning rate of a step
    grader: graders.Grader
    rewarder: rewards.Rewarder
    token_classes: np.ndarray  # int8 [V], of token_stats
    teacher_kv: tuple[model.KV | None, ...] | None  # of the fixed teacher's exemplars
    hand_over: weights.HandOver  # of a policy to the sampler
    served: "Served | None"  # of a policy to the server of sampler.engine=server
    lengths: dict[str, int]  # cache entries of a slot, of rollout, eval and author


class EngineError(Exception):
    """The server of sampler.engine=server did not do what it was asked, in one sentence."""


class Unusable(Exception):
    """A file of the run that cannot be used, in one sentence with what to do."""


@contextlib.contextmanager
def resumable(directory: pathlib.Path) -> Iterator[None]:
    """What no traceback would mend ends the program with a sentence: a server that fails, a file
    that is damaged, memory that is not there."""
    try:
        yield
    except (EngineError, Unusable) as error:
        raise SystemExit(f"error: {error}; the same command continues {directory}") from error
    except MemoryError as error:
        raise SystemExit(f"error: {error}") from error


def load(
    plan: plans.Plan, steps: int, folder: pathlib.Path | None = None
) -> tuple[Run, train_step.State]:
    """Reads the weights onto the mesh; the parts of the run and the State at step 0.

    Args:
      steps: the run's last step, towards which the learning rate decays.
      folder: where weights for a server lie, if sampler.folder names none.

    Raises:
      ValueError: a server without a folder.
    """
    config = plan.config
    decoder = make_decoder(plan)
    base = _weights(plan)
    if config.train.trainable == "lora":
        key = jax.random.fold_in(jax.random.key(config.seed), ADAPTER_STREAM)
        trained = lora.init(plan.model_config, config.lora.rank, config.lora.targets, key)
        frozen = base
    else:
        # A copy: what is trained is donated to the step, what is frozen must not be.
        trained = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), base)
        frozen = base if needs_initial(config) else {}
    tx, rate = make_optimizer(config, steps)
    options = make_options(plan)
    state = mesh.place(train_step.init(trained, tx, options.teacher), plan.mesh)
    step = make_step(plan, decoder, tx, options, state)
    teacher_kv = None
    if config.method == "distill" and options.teacher == "fixed" and plan.shots and plan.rows:
        prefix = plans.probe(plan, plan.rows[0]).prefix_ids
        initial = train_step.policies(state, frozen, options, plan.dtype)[1]
        teacher_kv = (engine.encode_prefix(decoder, initial.params, prefix),)
    grader = graders.Grader(config.prompt.answer, config.eval.extract, config.eval.grade_seconds)
    rewarder = rewards.make(config.reward.kind, grader, prompts.ANSWERS[config.prompt.answer])
    classes = token_stats.classes(plan.token_bytes, plan.stop_ids, plan.special_ids)
    return (
        Run(
            plan, decoder, frozen, options, step, rate, grader, rewarder, classes, teacher_kv,
            make_hand_over(plan, frozen),
            _served(plan, folder),
            _lengths(plan),
        ),
        state,
    )  # fmt: skip


def make_decoder(frame: plans.Frame | plans.Plan) -> model.Decoder:
    return model.Decoder(
        frame.model_config,
        frame.dtype,
        remat=frame.config.model.remat,
        decode=implementations.attention(frame.config, mesh.platform(frame.mesh)),
    )


def make_optimizer(config, steps: int) -> tuple[Any, Callable[[Any], Any]]:
    """The optimizer and its learning rate of a step; `steps` is the last one."""
    names = "lr schedule warmup weight_decay b1 b2 eps max_grad_norm".split()
    return train_step.optimizer(steps=steps, **{n: config.train[n] for n in names})


def make_step(frame: plans.Frame | plans.Plan, decoder, tx, options, state) -> Any:
    """The jitted training step; `state` may be abstract, its values are not read."""
    return jax.jit(
        train_step.make(decoder, tx, options),
        donate_argnums=0,
        out_shardings=(mesh.shardings(state, frame.mesh), None),
    )


def make_hand_over(
    frame: plans.Frame | plans.Plan, frozen: dict, **call: Callable
) -> weights.HandOver:
    """What hands weights to the sampler; `call` as HandOver has it."""
    s = frame.config.sampler
    return weights.HandOver(frame.mesh, frozen, merge=s.merge, int8=s.int8, gather=s.gather, **call)


def _lengths(plan: plans.Plan) -> dict[str, int]:
    """Longest prompt, without exemplars, and completion; 0 where prompts are only known later."""
    config, out = plan.config, {"author": 0}
    completion = config.rollout.max_tokens
    for name, side, spec, rows, limit in (
        ("rollout", "student", plan.student, plan.rows, completion),
        ("eval", "evaluation", plan.evaluation, plan.eval_rows, config.eval.max_tokens),
    ):
        first = [prompts.student(plan.tokenizer, spec, row) for row in rows[:1]]
        shared = sum(len(prompt.prefix_ids) for prompt in first)
        out[name] = plan.longest[side] - shared + (limit or completion) if rows else 0
    return out


def needs_initial(config) -> bool:
    """Whether full fine-tuning has to keep the initial weights."""
    if config.method == "distill" and config.teacher.weights in ("fixed", "trust_region"):
        return True
    return config.policy.kl > 0 and (config.method == "grpo" or config.policy.weight > 0)


def _weights(plan: plans.Plan) -> dict:
    """The base parameters, leaf by leaf onto their shards."""
    shapes = model.abstract(plan.model_config, plan.dtype)
    places = mesh.shardings(shapes, plan.mesh)
    if plan.config.model.init == "random":
        key = jax.random.fold_in(jax.random.key(plan.config.seed), WEIGHTS_STREAM)
        return jax.device_put(model.init(plan.model_config, key, plan.dtype), places)

    def put(path: tuple[str, ...], values: np.ndarray) -> jax.Array:
        spec = mesh.partition("/".join(path), values.shape, plan.mesh)
        return jax.device_put(values, NamedSharding(plan.mesh, spec))

    return hf.load_params(plan.weights_path, plan.model_config, plan.dtype, put)


def make_options(plan: plans.Frame | plans.Plan) -> train_step.Options:
    """The static choices of a run's step."""
    c = plan.config
    completions = c.train.batch * c.rollout.per_prompt
    micro = c.train.micro_batch or completions
    distills = c.method == "distill"
    divergence = implementations.divergence(c)
    return train_step.Options(
        trainable=c.train.trainable,
        teacher=c.teacher.weights if distills else "fixed",
        ema_decay=c.teacher.ema_decay,
        adapter_scale=plan.adapter_scale,
        divergence=divergence,
        implementation=implementations.loss(c, mesh.platform(plan.mesh)),
        chunk=c.loss.chunk,
        norm=c.loss.norm,
        group=c.loss.group or micro,
        micro_batches=completions // micro,
        rho=c.teacher.rho,
        weight=1 - c.policy.weight if distills else 0.0,
        policy=_policy_loss(c),
        skip_below=c.loss.skip_below,
        chip=plan.mesh.devices.flat[0].device_kind,
    )


POLICY_NORMS = {"sequence": "seq_mean_all", "token": "global_token_mean", "constant": "constant"}


def _policy_loss(c) -> train_step.PolicyLoss | None:
    """The loss on sampled tokens of a method; None where there is none."""
    if c.method == "sft":
        return train_step.PolicyLoss("nll", 1.0, 1.0, POLICY_NORMS[c.policy.norm], 1)
    weight = 1.0 if c.method == "grpo" else c.policy.weight
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


@contextlib.contextmanager
def scope(plan: plans.Plan) -> Iterator[None]:
    """Within it the plan's programs run: on its mesh, and float32 products in float32.

    Accelerators would otherwise round the operands of float32 products to fewer bits.
    """
    precise = "highest" if plan.dtype == jnp.float32 else None
    with jax.set_mesh(plan.mesh), jax.default_matmul_precision(precise):
        yield


def policies(run: Run, state: train_step.State) -> tuple[train_step.Policy, train_step.Policy]:
    """(student, teacher) weights of a state."""
    return train_step.policies(state, run.frozen, run.options, run.plan.dtype)


def teachers(run: Run, state: train_step.State) -> tuple:
    """The policies that the teacher mixes, with their shares; see `train_step.teachers`."""
    return train_step.teachers(*policies(run, state), run.options)


def encode_prefix(
    run: Run, policy: train_step.Policy, prefix_ids: Sequence[int]
) -> model.KV | None:
    """Keys of the exemplars under a policy; None without exemplars."""
    return engine.encode_prefix(
        run.decoder, policy.params, prefix_ids, policy.adapter, run.plan.adapter_scale
    )


def sampling(run: Run, section: str) -> jobs.Sampling:
    """Sampling settings of `rollout`, `eval` or `author`.

    Stop strings end answers, not what an author writes.
    """
    plan = run.plan
    stop = () if section == "author" else tuple(plan.config.rollout.stop)
    return make_sampling(plan.config, section, plan.stop_ids, stop)


def make_sampling(config, section: str, stop_ids, stop: tuple[str, ...]) -> jobs.Sampling:
    """`sampling` of a config, with what ends a text."""
    s = config[section]
    return jobs.Sampling(
        max_tokens=s.max_tokens or config.rollout.max_tokens,  # 0 of eval is the rollout's
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        stop_ids=stop_ids,
        stop=stop,
    )


def sampler(run: Run, section: str) -> jobs.Settings:
    """The sampler's size of `rollout`, `eval` or `author`."""
    return make_sampler(run.plan.config, section, run.lengths[section])


def make_sampler(c, section: str, length: int) -> jobs.Settings:
    """`sampler` of a config; `length` is the cache entries of a slot, 0 for what a call needs."""
    return jobs.Settings(
        slots=c[section].slots,
        length=length,
        steps=c.sampler.steps,
        pack=c.sampler.pack,
        cache=None if c.sampler.cache == "auto" else jnp.dtype(c.sampler.cache),
    )


class Served:
    """Hands weights over to a server; knows which policy it holds.

    Policies are told apart by the identity of their arrays, which are not kept alive. An adapter
    goes there as PEFT's folder, all weights as Hugging Face's; each has a folder of its own, and
    the former ones are removed once the server has the new one.

    Args:
      plan: with the server, which holds the base under its `model`.
      folder: where the folders lie, in the server's sight too; of this run alone.
    """

    def __init__(self, plan: plans.Plan, folder: pathlib.Path):
        assert plan.server is not None
        self._plan, self._folder, self._base = plan, folder, plan.server
        self._server: remote.Server = plan.server
        self._held: list[weakref.ref] = []

    def __call__(self, policy: train_step.Policy) -> remote.Server:
        """The server to ask for completions of this policy.

        Raises:
          EngineError: it did not take the weights.
          OSError: they cannot be written.
        """
        adapter, trainable = policy.adapter, self._plan.config.train.trainable
        zero = adapter is None or not any(bool(jnp.any(leaf["b"])) for leaf in adapter.values())
        if trainable == "lora" and zero:
            return self._base  # exactly what sampler.model is
        leaves = jax.tree.leaves(policy.params if adapter is None else adapter)
        if len(leaves) != len(self._held) or any(
            held() is not leaf for held, leaf in zip(self._held, leaves, strict=True)
        ):
            self._held = []
            self._server = self._handed(policy)
            self._held = [weakref.ref(leaf) for leaf in leaves]
        return self._server

    def _handed(self, policy: train_step.Policy) -> remote.Server:
        plan, c = self._plan, self._plan.config
        former = sorted(self._folder.glob("policy_*"))
        number = 1 + max((int(path.name.removeprefix("policy_")) for path in former), default=0)
        target = self._folder / f"policy_{number:06d}"
        if policy.adapter is not None:
            peft.write(
                target, policy.adapter, plan.model_config, alpha=c.lora.alpha, base=c.sampler.model
            )
        else:
            hf.save(
                target, policy.params, plan.model_config,
                source_path=plan.weights_path, tokenizer=plan.tokenizer,
            )  # fmt: skip
        with _asked():
            server = remote.hand_over(self._server, target)
        for path in former:
            shutil.rmtree(path)
        return server


def _served(plan: plans.Plan, folder: pathlib.Path | None) -> Served | None:
    if plan.server is None:
        return None
    chosen = pathlib.Path(plan.config.sampler.folder) if plan.config.sampler.folder else folder
    if chosen is None:
        raise ValueError("sampler.folder is '': without a work directory, name one")
    return Served(plan, chosen)


@contextlib.contextmanager
def _asked() -> Iterator[None]:
    """Failures of a server, apart from those of this machine's files."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise EngineError(str(error)) from error


def sample(
    run: Run,
    policy: train_step.Policy,
    asked: Sequence[prompts.Prompt],
    section: str,
    keys: np.ndarray,
    *,
    progress: Callable[[host.Stats], None] | None = None,
    done: Callable[[int, host.Completion], None] | None = None,
) -> host.Result:
    """One completion for each prompt under a policy, with the settings of a section.

    All prompts share their exemplars. See `host.generate` for the last two.

    Raises:
      MemoryError: naming the section's settings.
      EngineError: of sampler.engine=server.
    """
    if run.served is not None:
        server = run.served(policy)
        with _asked():
            return remote.generate(
                server,
                [(*prompt.prefix_ids, *prompt.ids) for prompt in asked],
                sampling(run, section),
                keys=keys,
                vocab_size=run.plan.model_config.vocab_size,
                valid_V=run.plan.valid_V,
                token_bytes=run.plan.token_bytes,
                progress=progress,
                done=done,
            )
    prefixes = {prompt.prefix_ids for prompt in asked}
    if len(prefixes) > 1:
        raise ValueError(f"the prompts begin with {len(prefixes)} different sets of exemplars")
    scale = run.plan.adapter_scale
    params, adapter = run.hand_over(policy.params, policy.adapter, scale)
    prefix_ids = prefixes.pop() if prefixes else ()
    with _named(section):
        return host.generate(
            run.decoder,
            params,
            [prompt.ids for prompt in asked],
            sampling(run, section),
            keys=keys,
            settings=sampler(run, section),
            prefix=engine.encode_prefix(run.decoder, params, prefix_ids, adapter, scale),
            adapter=adapter,
            adapter_scale=scale,
            valid_V=run.plan.valid_V,
            token_bytes=run.plan.token_bytes,
            progress=progress,
            done=done,
        )


def warmup(run: Run, state: train_step.State) -> Iterator[str]:
    """Compiles the sampler's programs for rollouts and evaluation; yields a line on each.

    Raises:
      MemoryError: if they do not fit the devices, naming the section's settings.
    """
    params, adapter = run.hand_over(*policies(run, state)[0], run.plan.adapter_scale)
    sections = {"rollout": (run.plan.rows, run.plan.student),
                "eval": (run.plan.eval_rows, run.plan.evaluation)}  # fmt: skip
    for section, (rows, spec) in sections.items():
        if not rows or (section == "rollout" and run.plan.config.method == "sft"):
            continue
        prompt = prompts.student(run.plan.tokenizer, spec, rows[0])
        with _named(section):
            job = jobs.plan(
                run.decoder, params, [prompt.ids], [sampling(run, section)],
                keys_n2=np.zeros((1, 2), np.uint32), settings=sampler(run, section),
                prefix=engine.encode_prefix(
                    run.decoder, params, prompt.prefix_ids, adapter, run.plan.adapter_scale
                ),
                adapter=adapter, adapter_scale=run.plan.adapter_scale,
                valid_V=run.plan.valid_V, token_bytes=run.plan.token_bytes, limits=None,
                longest=run.lengths[section] - sampling(run, section).max_tokens,
            )  # fmt: skip
            for program in host.warmup(job):
                yield (
                    f"  {section:<8} {program.name:<24} {program.seconds:6.1f} s, holds "
                    f"{program.held / 2**20:,.0f} MiB, {program.temporary / 2**20:,.0f} more "
                    "while it runs"
                )


@contextlib.contextmanager
def _named(section: str) -> Iterator[None]:
    """A sampler that does not fit is told with the settings that are to blame."""
    try:
        yield
    except MemoryError as error:
        raise MemoryError(f"{section}.slots, {section}.max_tokens, sampler.*: {error}") from error


def text(run: Run, ids: Sequence[int]) -> str:
    """Completion ids as text, without the token that ended it."""
    stops = set(run.plan.stop_ids)
    return prompts.text_of(run.plan.tokenizer, [i for i in ids if i not in stops])


def opened(prompt: prompts.Prompt, text: str) -> str:
    """A completion with the think block that its prompt opened: without a closing tag nothing in
    it is an answer, or an analysis."""
    return ("<think>\n" if prompt.state == "open" else "") + text


def grade(
    run: Run, golds: Sequence[str], asked: Sequence[prompts.Prompt], texts: Sequence[str]
) -> list[rewards.Verdict]:
    """Verdicts on completions of these prompts; a bare reward counts as right from
    reward.threshold on."""
    whole = [opened(prompt, text) for prompt, text in zip(asked, texts, strict=True)]
    threshold = run.plan.config.reward.threshold
    return [
        v if v.correct is not None else dataclasses.replace(v, correct=v.reward >= threshold)
        for v in run.rewarder.score(golds, whole)
    ]
