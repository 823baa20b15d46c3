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

from copsd_jax.config import settings as config_lib
from copsd_jax.metrics import token_stats
from copsd_jax.model import policy as policy_lib
from copsd_jax.model import shared_prefix, transformer
from copsd_jax.rewards import graders, reward_functions
from copsd_jax.runtime import processes, sharding
from copsd_jax.sampler import handover, loop, request
from copsd_jax.servers import remote_engine
from copsd_jax.teaching import conversations, prompts, text_encoding
from copsd_jax.training import builders, run_plan, train_step
from copsd_jax.weights import hf, peft

# Random streams of a seed besides the sampler's, whose purposes count from 0.
WEIGHTS_STREAM = 1002  # another is making's


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A plan with its weights, compiled functions and helpers."""

    plan: run_plan.Plan
    decoder: transformer.Decoder
    frozen: dict  # LoRA: the base; full: the initial weights if the teacher is fixed, else {}
    options: train_step.Options
    step: Callable[..., tuple[train_step.State, train_step.Aux]]
    rate: Callable[[Any], Any]  # learning rate of a step
    grader: graders.Grader
    rewarder: reward_functions.Rewarder
    token_classes: np.ndarray  # int8 [V], of token_stats
    teacher_kv: tuple[transformer.KV | None, ...] | None  # of the fixed teacher's exemplars
    hand_over: handover.HandOver  # of a policy to the sampler
    served: "ServedPolicy | None"  # of a policy to the server of sampler.engine=server
    lengths: dict[str, int]  # cache entries of a slot, of rollout, eval and author


class EngineError(Exception):
    """The server of sampler.engine=server did not do what it was asked, in one sentence."""


class UnusableFile(Exception):
    """A file of the run that cannot be used, in one sentence with what to do."""


@contextlib.contextmanager
def exit_on_failure(directory: pathlib.Path) -> Iterator[None]:
    """What no traceback would mend ends the program with a sentence: a server that fails, a file
    that is damaged, memory that is not there."""
    try:
        yield
    except (EngineError, UnusableFile) as error:
        raise SystemExit(f"error: {error}; the same command continues {directory}") from error
    except MemoryError as error:
        raise SystemExit(f"error: {error}") from error


def load_run(
    plan: run_plan.Plan, steps: int, folder: pathlib.Path | None = None
) -> tuple[LoadedRun, train_step.State]:
    """Reads the weights onto the mesh; the parts of the run and the State at step 0.

    Args:
      steps: the run's last step, towards which the learning rate decays.
      folder: where weights for a server lie, if sampler.folder names none.

    Raises:
      ValueError: a server without a folder.
    """
    config = plan.config
    decoder = builders.build_decoder(plan)
    base = _weights(plan)
    frozen = (
        base if config.train.trainable == "lora" or builders.needs_initial_weights(config) else {}
    )
    tx, rate = builders.build_optimizer(config, steps)
    options = builders.build_options(plan)
    state = _born(
        builders.build_initializer(plan, tx, options.teacher),
        plan,
        base if config.train.trainable == "full" else {},
    )
    step = builders.build_step(plan, decoder, tx, options, state)
    teacher_kv = None
    if options.teacher == "fixed" and plan.teacher.exemplars and plan.rows:
        prefix = plan.teacher.build_shortest(plan.rows[0]).prefix_ids
        initial = train_step.derive_policies(state, frozen, options, plan.dtype)[1]
        teacher_kv = (shared_prefix.encode_ids(decoder, initial, prefix),)
    grader = graders.Grader(config.prompt.answer, config.eval.extract, config.eval.grade_seconds)
    rewarder = reward_functions.build_rewarder(
        config.reward.kind, grader, conversations.ANSWER_FORMS[config.prompt.answer]
    )
    classes = token_stats.classes(
        plan.vocabulary.token_bytes, plan.vocabulary.stop_ids, plan.special_ids
    )
    return (
        LoadedRun(
            plan, decoder, frozen, options, step, rate, grader, rewarder, classes, teacher_kv,
            builders.build_hand_over(plan, frozen),
            _served(plan, folder),
            _lengths(plan),
        ),
        state,
    )  # fmt: skip


def _lengths(plan: run_plan.Plan) -> dict[str, int]:
    """Longest prompt, without exemplars, and completion; 0 where prompts are only known later."""
    config, out = plan.config, {"author": 0}
    completion = config.rollout.max_tokens
    for name, side, spec, rows, limit in (
        ("rollout", "student", plan.student, plan.rows, completion),
        ("eval", "evaluation", plan.evaluation, plan.eval_rows, config.eval.max_tokens),
    ):
        first = [prompts.build_student_prompt(plan.tokenizer, spec, row) for row in rows[:1]]
        shared = sum(len(prompt.prefix_ids) for prompt in first)
        out[name] = plan.longest[side] - shared + (limit or completion) if rows else 0
    return out


def _born(make: Callable[..., Any], plan: run_plan.Plan, *args: Any) -> Any:
    """`make(*args)`, whose arrays come into being on their shards and are nowhere whole."""
    places = builders.find_shardings(jax.eval_shape(make, *args), plan)
    return jax.jit(make, out_shardings=places)(*args)


def _weights(plan: run_plan.Plan) -> dict:
    """The base parameters, born on their shards; each process reads its own devices' parts."""
    if plan.config.model.init == "random":

        def make() -> dict:
            key = jax.random.fold_in(jax.random.key(plan.config.seed), WEIGHTS_STREAM)
            return transformer.init_params(plan.model_config, key, plan.dtype)

        return _born(make, plan)

    def put(path: hf.LeafPath, shape: tuple[int, ...], part: hf.ReadPart) -> jax.Array:
        spec = sharding.partition_spec(
            "/".join(path), shape, plan.mesh, plan.model_config.n_kv_heads
        )
        return sharding.load_shards(shape, NamedSharding(plan.mesh, spec), part)

    return hf.load_params(plan.weights_path, plan.model_config, plan.dtype, put)


@contextlib.contextmanager
def set_mesh_and_precision(plan: run_plan.Plan) -> Iterator[None]:
    """Within it the plan's programs run: on its mesh, and float32 products in float32.

    Accelerators would otherwise round the operands of float32 products to fewer bits.
    """
    precise = "highest" if plan.dtype == jnp.float32 else None
    with jax.set_mesh(plan.mesh), jax.default_matmul_precision(precise):
        yield


def derive_policies(
    run: LoadedRun, state: train_step.State
) -> tuple[policy_lib.Policy, policy_lib.Policy]:
    """(student, teacher) weights of a state."""
    return train_step.derive_policies(state, run.frozen, run.options, run.plan.dtype)


def teacher_mixture(run: LoadedRun, state: train_step.State) -> tuple:
    """The policies that the teacher mixes, with their shares; see `train_step.teacher_mixture`."""
    return train_step.teacher_mixture(*derive_policies(run, state), run.options)


def encode_prefix(
    run: LoadedRun, policy: policy_lib.Policy, prefix_ids: Sequence[int]
) -> transformer.KV | None:
    """Keys of the exemplars under a policy; None without exemplars."""
    return shared_prefix.encode_ids(run.decoder, policy, prefix_ids)


def _sampling(run: LoadedRun, section: str) -> request.Sampling:
    """Sampling settings of `rollout`, `eval` or `author`.

    Stop strings end answers, not what an author writes.
    """
    plan = run.plan
    stop = () if section == "author" else tuple(plan.config.rollout.stop)
    return builders.build_sampling(plan.config, section, plan.vocabulary.stop_ids, stop)


def _sampler_settings(run: LoadedRun, section: str) -> request.SamplerSettings:
    """The sampler's size of `rollout`, `eval` or `author`."""
    return builders.build_sampler_settings(run.plan.config, section, run.lengths[section])


class ServedPolicy:
    """Hands weights over to a server; knows which policy it holds.

    Policies are told apart by the identity of their arrays, which are not kept alive. An adapter
    goes there as PEFT's folder, all weights as Hugging Face's; each has a folder of its own, and
    the former ones are removed once the server has the new one.

    Args:
      plan: with the server, which holds the base under its `model`.
      folder: where the folders lie, in the server's sight too; of this run alone.
    """

    def __init__(self, plan: run_plan.Plan, folder: pathlib.Path):
        assert plan.server is not None
        self._plan, self._folder, self._base = plan, folder, plan.server
        self._server: remote_engine.EngineServer = plan.server
        self._held: list[weakref.ref] = []

    def __call__(self, policy: policy_lib.Policy) -> remote_engine.EngineServer:
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

    def _handed(self, policy: policy_lib.Policy) -> remote_engine.EngineServer:
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
            server = remote_engine.hand_over(self._server, target)
        for path in former:
            shutil.rmtree(path)
        return server


def _served(plan: run_plan.Plan, folder: pathlib.Path | None) -> ServedPolicy | None:
    if plan.server is None:
        return None
    chosen = pathlib.Path(plan.config.sampler.folder) if plan.config.sampler.folder else folder
    if chosen is None:
        raise ValueError("sampler.folder is '': without a work directory, name one")
    return ServedPolicy(plan, chosen)


@contextlib.contextmanager
def _asked() -> Iterator[None]:
    """Failures of a server, apart from those of this machine's files."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise EngineError(str(error)) from error


def sample(
    run: LoadedRun,
    policy: policy_lib.Policy,
    asked: Sequence[prompts.Prompt],
    section: str,
    keys: np.ndarray,
    *,
    progress: Callable[[loop.Stats], None] | None = None,
    done: Callable[[int, loop.Completion], None] | None = None,
) -> loop.Result:
    """One completion for each prompt under a policy, with the settings of a section.

    All prompts share their exemplars. See `loop.generate` for the last two.

    Raises:
      MemoryError: naming the section's settings.
      EngineError: of sampler.engine=server.
    """
    if run.served is not None:
        server = run.served(policy)
        with _asked():
            return remote_engine.generate(
                server,
                [(*prompt.prefix_ids, *prompt.ids) for prompt in asked],
                _sampling(run, section),
                keys=keys,
                vocabulary=run.plan.vocabulary,
                progress=progress,
                done=done,
            )
    prefixes = {prompt.prefix_ids for prompt in asked}
    if len(prefixes) > 1:
        raise ValueError(f"the prompts begin with {len(prefixes)} different sets of exemplars")
    policy = run.hand_over(policy)
    prefix_ids = prefixes.pop() if prefixes else ()
    with _named(section):
        return loop.generate(
            run.decoder,
            policy,
            [prompt.ids for prompt in asked],
            _sampling(run, section),
            keys=keys,
            settings=_sampler_settings(run, section),
            prefix=shared_prefix.encode_ids(run.decoder, policy, prefix_ids),
            vocabulary=run.plan.vocabulary,
            progress=progress,
            done=done,
        )


def compile_sampler(run: LoadedRun, state: train_step.State) -> Iterator[str]:
    """Compiles the sampler's programs for rollouts and evaluation; yields a line on each.

    Raises:
      MemoryError: if they do not fit the devices, naming the section's settings.
    """
    policy = run.hand_over(derive_policies(run, state)[0])
    sections = {"rollout": (run.plan.rows, run.plan.student),
                "eval": (run.plan.eval_rows, run.plan.evaluation)}  # fmt: skip
    for section, (rows, spec) in sections.items():
        samples = section != "rollout" or config_lib.traits(run.plan.config).samples
        if not rows or not samples:
            continue
        prompt = prompts.build_student_prompt(run.plan.tokenizer, spec, rows[0])
        with _named(section):
            job = request.prepare_inputs(
                run.decoder, policy, [prompt.ids], [_sampling(run, section)],
                keys_n2=np.zeros((1, 2), np.uint32), settings=_sampler_settings(run, section),
                prefix=encode_prefix(run, policy, prompt.prefix_ids),
                vocabulary=run.plan.vocabulary, limits=None,
                longest=run.lengths[section] - _sampling(run, section).max_tokens,
            )  # fmt: skip
            for program in loop.compile_programs(job):
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


def decode_completion(run: LoadedRun, ids: Sequence[int]) -> str:
    """Completion ids as text, without the token that ended it."""
    stops = set(run.plan.vocabulary.stop_ids)
    return text_encoding.decode_ids(run.plan.tokenizer, [i for i in ids if i not in stops])


def restore_think_tag(prompt: prompts.Prompt, text: str) -> str:
    """A completion with the think block that its prompt opened: without a closing tag nothing in
    it is an answer, or an analysis."""
    return ("<think>\n" if prompt.state == "open" else "") + text


def grade_completions(
    run: LoadedRun, golds: Sequence[str], asked: Sequence[prompts.Prompt], texts: Sequence[str]
) -> list[reward_functions.Verdict]:
    """Verdicts on completions of these prompts, of the leading process: limits of time and a
    user's function may end otherwise elsewhere. A bare reward counts as right from
    reward.threshold on."""
    whole = [restore_think_tag(prompt, text) for prompt, text in zip(asked, texts, strict=True)]
    threshold = run.plan.config.reward.threshold
    return [
        v if v.correct is not None else dataclasses.replace(v, correct=v.reward >= threshold)
        for v in processes.run_on_leader(lambda: run.rewarder.score(golds, whole))
    ]
