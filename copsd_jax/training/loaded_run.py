"""Loads the weights and functions of a planned run, and samples and grades completions."""

import contextlib
import dataclasses
import functools
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
from copsd_jax.runtime import processes, sharding, stopping, storage
from copsd_jax.sampler import handover, loop, request
from copsd_jax.servers import remote_engine
from copsd_jax.teaching import conversations, prompts, text_encoding
from copsd_jax.training import builders, run_plan, train_step
from copsd_jax.weights import hf, initial_weights, peft

# Index of the random stream from which initial weights are drawn. The sampler's streams are
# numbered from 0; builders.ADAPTER_STREAM is 1001.
WEIGHTS_STREAM = 1002


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A plan with its weights, compiled functions and helpers.

    Attributes:
      plan: the checked plan.
      decoder: the model, without parameters.
      frozen: the parameters that the run needs but does not train. LoRA needs the base parameters.
        Full fine-tuning needs the initial parameters only for some teachers and for the KL term.
        `frozen` is {} if the run needs no such parameters.
      options: the static options of the train step.
      step: the compiled train step.
      rate: function that returns the learning rate of a step.
      grader: context manager that grades final answers and owns the grading processes.
      rewarder: the object that scores completions.
      token_classes: int8 [V], the class of each token, as defined in `token_stats`.
      teacher_kv: keys and values that a fixed teacher computes for the exemplars; None for other
        teachers, or if there are no exemplars.
      hand_over: function that hands a policy to the sampler.
      served: with sampler.engine=server, the function that hands a policy to the server; otherwise
        None.
      lengths: for each of the sections rollout, eval and author, the number of cache entries that a
        slot needs.
      stop: the object that knows whether a signal has asked the run to stop.
    """

    plan: run_plan.Plan
    decoder: transformer.Decoder
    frozen: dict
    options: train_step.Options
    step: Callable[..., tuple[train_step.State, train_step.Aux]]
    rate: Callable[[Any], Any]
    grader: graders.Grader
    rewarder: reward_functions.Rewarder
    token_classes: np.ndarray
    teacher_kv: tuple[transformer.KV | None, ...] | None
    hand_over: handover.HandOver
    served: "ServedPolicy | None"
    lengths: dict[str, int]
    stop: stopping.StopRequest


def load_run(
    plan: run_plan.Plan, steps: int, folder: pathlib.Path | None = None
) -> tuple[LoadedRun, train_step.State]:
    """Loads the weights onto the mesh and builds the parts of the run.

    Args:
      plan: the checked plan.
      steps: number of steps of the run; the decay of the learning rate ends with the last step.
      folder: the folder for the weights that a server loads; used if sampler.folder is "".

    Returns:
      The loaded run, and the training state at step 0.

    Raises:
      ValueError: the engine is a server, and neither sampler.folder nor `folder` names a folder.
      NonFinite: the weights contain NaN or infinite numbers.
    """
    config, e = plan.config, plan.config.eval
    decoder = builders.build_decoder(plan)
    base, start = initial_weights.load_initial(
        plan.start, config.model.path, functools.partial(_load_run_weights, plan),
        plan.model_config, plan.dtype, config.train.trainable,
        functools.partial(builders.find_shardings, frame=plan),
    )  # fmt: skip
    frozen = builders.choose_frozen(config, base)
    tx, rate = builders.build_optimizer(config, steps)
    options = builders.build_options(plan)
    trained = base if config.train.trainable == "full" else {}
    state = _create_on_shards(builders.build_initializer(plan, tx), plan, trained, start)
    step = builders.build_step(plan, decoder, tx, options, state)
    teacher_kv = None
    if options.teacher == "fixed" and plan.teacher.exemplars and plan.rows:
        prefix = plan.teacher.build_shortest(plan.rows[0]).prefix_ids
        initial = train_step.derive_policies(state, frozen, options, plan.dtype)[1]
        teacher_kv = (shared_prefix.encode_prefix_ids(decoder, initial, prefix),)
    grader = graders.Grader(config.prompt.answer, e.extract, e.grade_seconds, e.grader, e.units)
    form, known = conversations.ANSWER_FORMS[config.prompt.answer], plan.vocabulary
    rewarder = reward_functions.build_rewarder(config.reward.kind, grader, form)
    classes = token_stats.classify_vocabulary(known.token_bytes, known.stop_ids, plan.special_ids)
    run = LoadedRun(
        plan, decoder, frozen, options, step, rate, grader, rewarder, classes, teacher_kv,
        builders.build_hand_over(plan, frozen), _build_policy_hand_over(plan, folder),
        _measure_slot_lengths(plan), stopping.StopRequest(),
    )  # fmt: skip
    return run, state


def _measure_slot_lengths(plan: run_plan.Plan) -> dict[str, int]:
    """Returns the number of cache entries that a slot needs in each section.

    A slot has room for the longest prompt (without exemplars) and the longest completion. The
    result is 0 for sections without rows, and for the author, whose prompts are not known yet.
    """
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


def _create_on_shards(make: Callable[..., Any], plan: run_plan.Plan, *args: Any) -> Any:
    """Runs `make(*args)` under jit, so that each device creates only its shards of the result."""
    places = builders.find_shardings(jax.eval_shape(make, *args), plan)
    return jax.jit(make, out_shardings=places)(*args)


def _load_run_weights(plan: run_plan.Plan, folder: pathlib.Path | None = None) -> dict:
    """Returns the base parameters; each process reads only the parts that its own devices hold.

    If `folder` is given, its weights are loaded instead of the weights of model.path.
    """
    if folder is None and plan.config.model.init == "random":

        def make() -> dict:
            key = jax.random.fold_in(jax.random.key(plan.config.seed), WEIGHTS_STREAM)
            return transformer.init_params(plan.model_config, key, plan.dtype)

        return _create_on_shards(make, plan)

    def put(path: hf.LeafPath, shape: tuple[int, ...], part: hf.ReadPart) -> jax.Array:
        heads = plan.model_config.n_kv_heads
        spec = sharding.partition_spec("/".join(path), shape, plan.mesh, heads)
        return sharding.load_shards(shape, NamedSharding(plan.mesh, spec), part)

    return hf.load_params(folder or plan.weights_path, plan.model_config, plan.dtype, put)


@contextlib.contextmanager
def set_mesh_and_precision(plan: run_plan.Plan) -> Iterator[None]:
    """Sets the plan's mesh and, if the plan's dtype is float32, full precision for matrix products.

    By default, accelerators round the operands of float32 matrix products to fewer bits.
    """
    precise = "highest" if plan.dtype == jnp.float32 else None
    with jax.set_mesh(plan.mesh), jax.default_matmul_precision(precise):
        yield


def derive_run_policies(
    run: LoadedRun, state: train_step.State
) -> tuple[policy_lib.Policy, policy_lib.Policy]:
    """Returns the policies (student, teacher) of a state."""
    return train_step.derive_policies(state, run.frozen, run.options, run.plan.dtype)


def list_run_teacher_mixture(run: LoadedRun, state: train_step.State) -> tuple:
    """Returns the teacher as pairs (share, policy); see `train_step.list_teacher_mixture`."""
    return train_step.list_teacher_mixture(*derive_run_policies(run, state), run.options)


def build_sampling(run: LoadedRun, section: str) -> request.Sampling:
    """Builds the sampling settings of a section.

    Stop strings end the student's answers, but not the texts of an author.

    Args:
      run: the loaded run.
      section: the section of the settings: "rollout", "eval" or "author".
    """
    plan = run.plan
    stop = () if section == "author" else tuple(plan.config.rollout.stop)
    return builders.build_sampling(plan.config, section, plan.vocabulary.stop_ids, stop)


def write_run_policy(
    plan: run_plan.Plan, policy: policy_lib.Policy, folder: pathlib.Path, base: str
) -> None:
    """Writes a policy to a folder.

    An adapter is written in PEFT's layout. Without an adapter, the weights are written in Hugging
    Face's layout.

    Args:
      plan: the plan, which has the model's shape, files and tokenizer.
      policy: the policy.
      folder: the folder to write to.
      base: the name of the base model, which is written into the files of an adapter.

    Raises:
      OSError: the folder cannot be written.
    """
    shape, tokenizer = plan.model_config, plan.tokenizer
    if policy.adapter is not None:
        peft.write(folder, policy.adapter, shape, alpha=plan.config.lora.alpha, base=base)
        return
    source, ends = plan.weights_path, plan.vocabulary.stop_ids
    hf.save(folder, policy.params, shape, source_path=source, tokenizer=tokenizer, stop_ids=ends)


class ServedPolicy:
    """A function that hands policies to a server and remembers which policy the server has.

    Two policies count as equal if their arrays are the same objects. `ServedPolicy` holds only weak
    references to the arrays of a policy. Each policy is written to a new folder by
    `write_run_policy`. Older folders are removed after the server has loaded the new policy.

    Args:
      plan: the checked plan.
      server: the server, which serves the base model under the name `sampler.model`.
      folder: the folder that contains the folders of the policies. The server must be able to read
        this folder, and no other run may use this folder.
    """

    def __init__(
        self, plan: run_plan.Plan, server: remote_engine.EngineServer, folder: pathlib.Path
    ):
        self._plan, self._folder = plan, folder
        self._base = self._server = server
        self._held: list[weakref.ref] = []

    def __call__(self, policy: policy_lib.Policy) -> remote_engine.EngineServer:
        """Hands over a policy to the server, and returns the server that samples from the policy.

        If the policy is the last adapter that was handed over, the server is asked for the names of
        its adapters. The adapter is loaded again only if the server lacks it, for example after a
        restart. Full weights are always loaded again, because the server cannot tell which full
        weights it has.

        Raises:
          failures.EngineError: the server did not load the weights.
          OSError: the weights cannot be written.
        """
        adapter, trainable = policy.adapter, self._plan.config.train.trainable
        zero = adapter is None or not any(bool(jnp.any(leaf["b"])) for leaf in adapter.values())
        if trainable == "lora" and zero:
            return self._base  # an adapter with b = 0 has no effect, so the base model suffices
        leaves = jax.tree.leaves(policy.params if adapter is None else adapter)
        if [id(held()) for held in self._held] != [id(leaf) for leaf in leaves]:
            self._held = []  # emptied first, so that after a failure, the next call tries again
            self._server = self._hand_over_run_policy(policy)
            self._held = [weakref.ref(leaf) for leaf in leaves]
        else:
            with remote_engine.translate_server_errors():
                self._server = remote_engine.hand_over(self._server, self._server.folder)
        return self._server

    def _hand_over_run_policy(self, policy: policy_lib.Policy) -> remote_engine.EngineServer:
        """Writes the policy to a new folder; returns the server after it has loaded the policy."""
        former = sorted(self._folder.glob("policy_*"))
        number = 1 + max((int(path.name.removeprefix("policy_")) for path in former), default=0)
        target = self._folder / f"policy_{number:06d}"
        write_run_policy(self._plan, policy, target, self._plan.config.sampler.model)
        with remote_engine.translate_server_errors():
            server = remote_engine.hand_over(self._server, target)
        for path in former:
            shutil.rmtree(path)
        return server


def _build_policy_hand_over(
    plan: run_plan.Plan, folder: pathlib.Path | None
) -> ServedPolicy | None:
    """Builds the function that hands policies to a server, or returns None for other engines."""
    if plan.server is None:
        return None
    chosen = (
        storage.parse_path(plan.config.sampler.folder) if plan.config.sampler.folder else folder
    )
    if chosen is None:
        raise ValueError("sampler.folder is '', but without a work directory it must name a folder")
    return ServedPolicy(plan, plan.server, chosen)


def sample(
    run: LoadedRun,
    policy: policy_lib.Policy,
    asked: Sequence[prompts.Prompt],
    section: str,
    keys: np.ndarray,
    *,
    progress: Callable[[loop.Stats], None] | None = None,
    done: Callable[[int, loop.Completion], None] | None = None,
    sampling: request.Sampling | None = None,
    vocabulary: request.Vocabulary | None = None,
) -> loop.Result:
    """Samples one completion per prompt from a policy, with the settings of a section.

    Args:
      run: the loaded run.
      policy: the weights to sample with.
      asked: the prompts, which all begin with the same exemplars.
      section: the section of settings: rollout, eval or author.
      keys: uint32 [n, 2], one random key per prompt, from `request.derive_sampling_keys`.
      progress: function that is called with the statistics; see `loop.generate`.
      done: function that is called with each completion and its index as soon as the completion
        ends; see `loop.generate`.
      sampling: the settings of the distribution; None for the settings of the section.
      vocabulary: the ids that may be drawn; None for the vocabulary of the plan.

    Returns:
      The completions in the order of the prompts, and statistics.

    Raises:
      ValueError: the prompts begin with different exemplars.
      MemoryError: the cache does not fit on the devices; the message names the section's settings.
      failures.EngineError: with sampler.engine=server, the server failed.
      signals.Stopped: a signal has asked the run to stop.
    """
    sampling, vocabulary = (
        sampling or build_sampling(run, section),
        vocabulary or run.plan.vocabulary,
    )

    def report(stats: loop.Stats) -> None:
        run.stop.poll()
        if progress is not None:
            progress(stats)

    both: dict[str, Any] = {
        "keys": keys, "vocabulary": vocabulary, "progress": report, "done": done,
    }  # fmt: skip
    if run.served is not None:
        server = run.served(policy)
        texts = [(*prompt.prefix_ids, *prompt.ids) for prompt in asked]
        with remote_engine.translate_server_errors():
            return remote_engine.generate(server, texts, sampling, **both)
    prefixes = {prompt.prefix_ids for prompt in asked}
    if len(prefixes) > 1:
        raise ValueError(f"the prompts begin with {len(prefixes)} different sets of exemplars")
    policy = run.hand_over(policy)
    prefix_ids = prefixes.pop() if prefixes else ()
    size = builders.build_sampler_settings(run.plan.config, section, run.lengths[section])
    with _name_memory_settings(section):
        return loop.generate(
            run.decoder, policy, [prompt.ids for prompt in asked], sampling, settings=size,
            prefix=shared_prefix.encode_prefix_ids(run.decoder, policy, prefix_ids), **both,
        )  # fmt: skip


def warms_up_sampler(plan: run_plan.Plan) -> bool:
    """Returns whether to compile the sampler's programs before the first rollout."""
    if plan.server is not None:
        return False
    auto = sharding.platform(plan.mesh) != "cpu"  # on CPUs, compiling takes longer than a step
    return {"auto": auto, "always": True, "never": False}[plan.config.sampler.warmup]


def compile_run_sampler(run: LoadedRun, state: train_step.State) -> Iterator[str]:
    """Compiles the sampler's programs for rollouts and evaluation, and yields one line per program.

    Args:
      run: the loaded run.
      state: the state with the student's weights.

    Raises:
      MemoryError: the programs do not fit on the devices; the message names the section's settings.
    """
    plan, policy = run.plan, run.hand_over(derive_run_policies(run, state)[0])
    drawn = plan.rows if config_lib.traits(plan.config).samples else []
    sections = {"rollout": (drawn, plan.student), "eval": (plan.eval_rows, plan.evaluation)}
    for section, (rows, spec) in sections.items():
        if not rows:
            continue
        prompt = prompts.build_student_prompt(plan.tokenizer, spec, rows[0])
        sampling, length = build_sampling(run, section), run.lengths[section]
        with _name_memory_settings(section):
            job = request.prepare_sampler_inputs(
                run.decoder, policy, [prompt.ids], [sampling],
                keys_n2=np.zeros((1, 2), np.uint32),
                settings=builders.build_sampler_settings(plan.config, section, length),
                prefix=shared_prefix.encode_prefix_ids(run.decoder, policy, prompt.prefix_ids),
                vocabulary=plan.vocabulary, limits=None, longest=length - sampling.max_tokens,
            )  # fmt: skip
            for program in loop.compile_programs(job):
                yield (
                    f"  {section:<8} {program.name:<24} {program.seconds:6.1f} s, holds "
                    f"{program.held / 2**20:,.0f} MiB, {program.temporary / 2**20:,.0f} more "
                    "while it runs"
                )


@contextlib.contextmanager
def _name_memory_settings(section: str) -> Iterator[None]:
    """Adds to a MemoryError the names of the settings that determine the sampler's size."""
    try:
        yield
    except MemoryError as error:
        raise MemoryError(f"{section}.slots, {section}.max_tokens, sampler.*: {error}") from error


def decode_completion(run: LoadedRun, ids: Sequence[int]) -> str:
    """Decodes completion ids to text, without the token that ended the completion."""
    stops = set(run.plan.vocabulary.stop_ids)
    return text_encoding.decode_ids(run.plan.tokenizer, [i for i in ids if i not in stops])


def grade_completions(
    run: LoadedRun, golds: Sequence[str], asked: Sequence[prompts.Prompt], texts: Sequence[str]
) -> list[reward_functions.Verdict]:
    """Grades completions; marks a completion as correct if its reward reaches reward.threshold.

    The threshold is used only for verdicts whose `correct` is None. A completion without a reward
    is not correct. Only the leading process grades completions. Because of time limits or a user's
    reward function, other processes could get other verdicts.

    Args:
      run: the loaded run, with an open grader.
      golds: the gold answer of each completion.
      asked: the prompt of each completion.
      texts: the completions as text.

    Returns:
      One verdict per completion, in the order of the completions.
    """
    whole = [
        prompts.restore_think_tag(prompt, text) for prompt, text in zip(asked, texts, strict=True)
    ]
    threshold = run.plan.config.reward.threshold
    verdicts = processes.run_on_leader(lambda: run.rewarder.score(golds, whole))

    def judge(verdict: reward_functions.Verdict) -> bool:
        return verdict.reward >= threshold and not reward_functions.lacks_reward(verdict.status)

    return [
        v if v.correct is not None else dataclasses.replace(v, correct=judge(v)) for v in verdicts
    ]
