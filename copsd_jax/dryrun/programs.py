"""Ahead-of-time compilation of a run's programs for devices that are not present.

The programs are built by the same functions as in a run. The programs' arguments are abstract
arrays, which have a shape, a dtype and a sharding but no values. No data are read: every text is
assumed to be as long as the settings allow.
"""

import dataclasses
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from copsd_jax.config import setting_rules
from copsd_jax.config import settings as config_lib
from copsd_jax.dryrun import memory, program_cost, targets
from copsd_jax.losses import token_blocks
from copsd_jax.model import policy as policy_lib
from copsd_jax.model import shared_prefix, transformer
from copsd_jax.runtime import sharding, storage
from copsd_jax.sampler import engine, loop, request
from copsd_jax.training import (
    backends,
    builders,
    layout,
    model_headers,
    prompt_lengths,
    run_plan,
)
from copsd_jax.training import loaded_run as run_lib
from copsd_jax.weights import hf_config

EXEMPLAR_TOKENS = 64  # assumed tokens per worked example; bundled examples have at most 55


class Lengths(NamedTuple):
    """Maximum numbers of tokens in prompts and completions, according to the settings.

    Attributes:
      prefix: number of tokens in the worked examples at the beginning of student, teacher and
        evaluation prompts.
      student: number of tokens in a student prompt, without worked examples.
      teacher: number of tokens in a teacher prompt, without worked examples.
      evaluation: number of tokens in an evaluation prompt, without worked examples.
      author: number of tokens in a prompt for the author of contexts.
      completion: number of tokens in a completion of a rollout.
      answer: number of tokens in a completion of the evaluation.
      reply: number of tokens in an author's reply.
    """

    prefix: int
    student: int
    teacher: int
    evaluation: int
    author: int
    completion: int
    answer: int
    reply: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that was compiled, or that did not fit into memory.

    Attributes:
      name: name of the program in the report.
      arguments: bytes of the arguments on each device, computed from the arguments' shapes.
      cost: the costs of the program; None if the program was not compiled.
      needed: bytes that the program needs on each device, besides its arguments.
      failure: the reason why the program was not compiled; "" if it was compiled.
    """

    name: str
    arguments: int
    cost: program_cost.Analysis | None
    needed: int
    failure: str = ""


@dataclasses.dataclass
class Phase:
    """A phase of the run: the arrays that stay in memory, and the programs that run.

    Attributes:
      name: name of the phase in the report.
      parts: the bytes of each part of the held arrays on each device.
      programs: the programs that run in this phase.
    """

    name: str
    parts: dict[str, int]
    programs: list[Program]

    @property
    def working(self) -> int:
        """The largest number of bytes that any program needs besides the held arrays."""
        return max((program.needed for program in self.programs), default=0)

    @property
    def total(self) -> int:
        """Bytes of held arrays plus temporaries on each device."""
        return sum(self.parts.values()) + self.working

    @property
    def failure(self) -> str:
        """The message of the first program that was not compiled; "" if all were compiled."""
        return next((p.failure for p in self.programs if p.failure), "")

    def fits(self, usable: float) -> bool:
        """Returns whether all programs were compiled and the phase needs at most `usable` bytes."""
        return not self.failure and self.total <= usable


class SampledPhase(NamedTuple):
    """A sampling phase: its settings section, and its maximum prompt and completion lengths."""

    section: str
    prompt: int
    completion: int


class Run(NamedTuple):
    """A dry run: the run's settings and lengths, the target devices, and the compiled phases.

    Attributes:
      frame: the settings, the mesh, the dtype and the model's shape.
      lengths: maximum lengths of the run's texts.
      target: the target devices.
      usable: number of usable bytes on a device; a phase whose held arrays need more is not
        compiled.
      say: function that prints a line about progress.
      phases: the phases of the run by name, in order of execution.
      seconds: wall time of compiling the phases, in seconds.
    """

    frame: run_plan.ProgramPlan
    lengths: Lengths
    target: targets.Target
    usable: float
    say: Callable[[str], None]
    phases: dict[str, Phase]
    seconds: float = 0.0

    def fits(self) -> bool:
        """Returns whether every phase fits into the usable memory."""
        return all(phase.fits(self.usable) for phase in self.phases.values())


# --- from settings to shapes ------------------------------------------------------------------


def find_dry_run_model(config: config_lib.Config) -> transformer.ModelConfig:
    """Finds the shape of the run's model by the model's name, or in a folder's config.json.

    Raises:
      ValueError: if the name is not in `transformer.SHAPES`.
    """
    m = config.model
    name = m.shape if m.init == "random" else ""
    folder = storage.parse_path(m.path)
    if not name and folder.is_dir():
        return hf_config.load_config(folder)
    name = name or m.path.rstrip("/").split("/")[-1].lower()
    plain = re.sub(r"[-.]", "_", name.removeprefix("llm-"))
    known = [key for key in transformer.SHAPES if plain == key or plain.startswith(f"{key}_")]
    known += ["smollm2_135m"] if plain == "smollm2" else []
    if not known:
        raise ValueError(
            f"model.path is {m.path!r}: a dry run downloads no repository. Use the name of a "
            f"known model ({', '.join(transformer.SHAPES)}) or a folder with config.json"
        )
    return transformer.SHAPES[max(known, key=len)]


def build_dry_run_frame(config: config_lib.Config, devices: list) -> run_plan.ProgramPlan:
    """Builds the plan of a run's programs on the given devices, with the same checks as a run.

    Raises:
      ValueError: if no run can have these settings.
    """
    shape = find_dry_run_model(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    setting_rules.check_shard_settings(config, sharding.batch_shards(mesh))
    setting_rules.check_top_k_settings(config, shape.vocab_size)
    backends.choose_loss(config, sharding.platform(mesh))
    sharding.count_sharded_key_repeats(shape.n_heads, shape.n_kv_heads, mesh.shape["tensor"])
    dtype = model_headers.choose_dtype(config.model.dtype, mesh)
    backends.check_attention(config, sharding.platform(mesh), dtype, shape)
    return run_plan.ProgramPlan(config, mesh, dtype, shape)


def find_dry_run_lengths(config: config_lib.Config, shape: transformer.ModelConfig) -> Lengths:
    """Returns the maximum lengths of texts that the settings and the model's positions allow.

    Raises:
      ValueError: if the settings leave no room for a prompt.
    """
    c, positions = config, shape.max_position
    prefix = EXEMPLAR_TOKENS * c.prompt.exemplars
    completion, reply = c.rollout.max_tokens, c.author.max_tokens
    answer = c.eval.max_tokens or completion
    prompt = lambda sampled: min(c.prompt.max_tokens, positions - sampled) - prefix  # noqa: E731
    lengths = Lengths(
        prefix=prefix, student=prompt(completion),
        teacher=prompt_lengths.teacher_limit(c, shape) - prefix, evaluation=prompt(answer),
        author=min(c.teacher.max_tokens, positions - reply),
        completion=completion, answer=answer, reply=reply,
    )  # fmt: skip
    sides = ("rollout", "evaluation", "teacher")
    prompts = (lengths.student, lengths.evaluation, lengths.teacher)
    for side, tokens in zip(sides, prompts, strict=True):
        if tokens < 1:
            raise ValueError(
                f"the settings leave {tokens} tokens for the {side}'s prompts: lower "
                f"rollout.max_tokens, eval.max_tokens or prompt.exemplars ({EXEMPLAR_TOKENS} "
                f"tokens each); the model has {positions} positions"
            )
    return lengths


def list_sampled_phases(run: Run) -> dict[str, SampledPhase]:
    """Returns the phases that sample on the target devices, by name; {} if a server samples."""
    c, lengths, phases = run.frame.config, run.lengths, {}
    if c.sampler.engine == "server":
        return {}
    if config_lib.traits(c).samples and c.train.steps:
        phases["rollout"] = SampledPhase("rollout", lengths.student, lengths.completion)
    if c.author.kind in ("student", "teacher"):
        phases["author"] = SampledPhase("author", lengths.author, lengths.reply)
    if c.eval.path:
        phases["evaluation"] = SampledPhase("eval", lengths.evaluation, lengths.answer)
    return phases


def build_dry_run_batch(config: config_lib.Config, lengths: Lengths) -> layout.Batch:
    """Builds a step's batch in which all texts have maximum length and all token ids are 0."""
    B, method = config_lib.completions_per_step(config), config_lib.traits(config)
    batch = layout.build_batch(
        [[0] * lengths.student] * B,
        [[0] * lengths.teacher] * B if method.teacher else None,
        [[0] * lengths.completion] * B,
    )
    zeros_BC = np.zeros(batch.mask_BC.shape, np.float32)
    if method.samples:
        batch = batch._replace(logp_rollout_BC=zeros_BC)
    if not method.teacher or config.policy.weight:
        batch = batch._replace(policy_BC=batch.mask_BC, advantage_BC=zeros_BC)
    return batch


def hold_phase(run: Run, name: str, arrays: memory.HeldArrays) -> dict[str, int]:
    """Computes the bytes of each part that a phase holds on each device, from shapes alone.

    Args:
      run: the dry run; `run.frame.mesh` may be an AbstractMesh.
      name: name of the phase.
      arrays: the arrays that a run with this frame holds.
    """
    frame, sampled = run.frame, list_sampled_phases(run)
    held = memory.count_resident_memory(frame, arrays)
    if name == "placement":
        return held | {"read": 0 if arrays.frozen else sharding.count_device_bytes(arrays.base)}
    if name == "step":
        kept = sharding.count_device_bytes(arrays.kept) if sampled else 0
        return held | {"sampler's weights": kept}
    held["sampler's weights"] = memory.count_sampler_memory(frame, arrays)
    if name == "hand-over":
        return held
    section, prompt, completion = sampled[name]
    tokens = prompt + completion + engine.INSERT_BLOCK
    # Each slot of the author's cache has only the entries that the longest prompt and its reply
    # need, rounded up.
    tokens = request.round_up_slot_length(tokens) if name == "author" else tokens
    return held | {"cache": memory.count_decode_memory(frame, section, tokens)}


# --- compiling --------------------------------------------------------------------------------


class _Compiler(NamedTuple):
    """A function that compiles jitted functions, and collects their costs in `programs`."""

    run: Run
    programs: list[Program]

    def __call__(
        self, name: str, jitted: Any, *args: Any, keeps: bool = True, loop_turns: int = 1
    ) -> Any:
        """Returns the results of `jitted(*args)` as abstract arrays; None if memory is too small.

        Args:
          name: name of the program.
          jitted: the jitted function to compile.
          *args: abstract arrays.
          keeps: whether to add the bytes of the results to the memory that the program needs.
            False is for results whose bytes are already counted among the phase's held arrays.
          loop_turns: number of iterations to assume for a loop of unknown length.
        """
        self.run.say(f"compiling {name}")
        mesh = self.run.frame.mesh
        lowered = jitted.lower(*args)
        held = sharding.count_device_bytes(jax.tree.map(lambda x: _with_sharding(x, mesh), args))
        begun = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            program = build_failed_program(name, held, error)
            # If `keeps` is False, the phase's held arrays already include the results.
            self.programs.append(program if keeps else dataclasses.replace(program, needed=0))
            return None
        seconds = time.perf_counter() - begun
        cost = program_cost.analyse_program(name, compiled, seconds, mesh, turns=loop_turns)
        needed = (cost.added if keeps else cost.temporary) + max(0, cost.arguments - held)
        self.programs.append(Program(name, held, cost, needed))
        return sharding.to_abstract(lowered.out_info, mesh, compiled.output_shardings)


def _with_sharding(x: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Returns an argument as an abstract array; replicates an argument that has no sharding."""
    whole = NamedSharding(mesh, PartitionSpec())
    if not hasattr(x, "dtype"):  # a Python number
        return jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or whole)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def build_failed_program(name: str, arguments: int, error: BaseException) -> Program:
    """Returns the `Program` for a failed compilation, with the bytes that the program would need.

    Raises:
      BaseException: `error` itself, if a lack of memory was not the cause of the failure.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        raise error
    used = re.search(r"Used ([\d.]+)([KMGT]?) of", text)
    found = used or re.search(r"temporaries \(([\d.]+)([KMGT]?)\)", text)
    needed = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    needed -= arguments if used else 0
    return Program(name, arguments, None, max(0, needed), text.strip().splitlines()[0])


def compile_run(
    config: config_lib.Config,
    target: targets.Target,
    devices: list,
    usable: float,
    say: Callable[[str], None] = lambda _: None,
) -> Run:
    """Compiles every program of a run for the given devices.

    Args:
      config: the settings of the run.
      target: the target devices, for the report.
      devices: the devices of a topology, or real devices.
      usable: number of usable bytes on a device; a phase whose held arrays need more is not
        compiled.
      say: function that prints a line about progress.

    Raises:
      ValueError: if no run can have these settings.
    """
    begun = time.perf_counter()
    frame = build_dry_run_frame(config, devices)
    run = Run(frame, find_dry_run_lengths(config, frame.model_config), target, usable, say, {})
    sampled = list_sampled_phases(run)
    names = ["placement", *(["hand-over"] if sampled else []), *sampled]
    names += ["step"] if config.train.steps else []
    phases = {name: compile_phase(run, name) for name in names}
    return run._replace(phases=phases, seconds=time.perf_counter() - begun)


def compile_phase(run: Run, name: str) -> Phase:
    """Compiles the programs of one phase, unless the phase's held arrays alone are too large."""
    arrays = memory.list_held_arrays(run.frame)
    parts, compiler = hold_phase(run, name, arrays), _Compiler(run, [])
    if name not in ("placement", "hand-over") and sum(parts.values()) > run.usable:
        reason = "not compiled: the arrays that the phase holds do not fit"
        return Phase(name, parts, [Program(name, sum(parts.values()), None, 0, reason)])
    frame: Any = run.frame  # `set_mesh_and_precision` reads only the mesh and the dtype
    with run_lib.set_mesh_and_precision(frame):
        if name == "placement":
            _compile_first_state(compiler, arrays)
        elif name == "hand-over":
            _compile_hand_over(compiler)
        elif name == "step":
            parts |= _compile_step(compiler, arrays)
        else:
            parts |= _compile_sampler(compiler, arrays, name)
    return Phase(name, parts, compiler.programs)


def _compile_first_state(compiler: _Compiler, arrays: memory.HeldArrays) -> None:
    frame = compiler.run.frame
    tx, _ = builders.build_optimizer(frame.config, max(1, frame.config.train.steps))
    make_state = builders.build_initializer(frame, tx)
    base = arrays.base if frame.config.train.trainable == "full" else {}
    shardings = builders.find_shardings(arrays.state, frame)
    compiler("state at step 0", jax.jit(make_state, out_shardings=shardings), base, keeps=False)


def _compile_hand_over(compiler: _Compiler) -> None:
    def call(jitted: Any, *args: Any) -> Any:
        # The arguments are (adapter,) or (weights, adapter); in the pair, adapter may be None.
        name = "weights" if len(args) > 1 else "adapter"
        compiler(f"{name} to the sampler", jitted, *args, keeps=False)
        return jitted.eval_shape(*args)

    memory.list_held_arrays(compiler.run.frame, call=call)


def _compile_sampler(compiler: _Compiler, arrays: memory.HeldArrays, phase: str) -> dict[str, int]:
    """Compiles a phase's sampler; returns {"prompts' keys": bytes, "examples' keys": bytes}."""
    frame, c = compiler.run.frame, compiler.run.frame.config
    section, asked, completion = list_sampled_phases(compiler.run)[phase]
    decoder = builders.build_decoder(frame)
    # The author's prompts have no worked examples. Each slot of the author's cache has only the
    # entries that the longest prompt and its reply need.
    author = section == "author"
    prefix = None if author else _compile_prefix(compiler, decoder, arrays.sampler)
    valid_V = np.ones(frame.model_config.vocab_size, bool)
    valid_V[-1] = False  # a tokenizer may have fewer ids than the model has embeddings
    length = 0 if author else asked + completion
    job = request.prepare_sampler_inputs(
        decoder, arrays.sampler, [(0,) * asked], [builders.build_sampling(c, section, (0,), ())],
        keys_n2=np.zeros((1, 2), np.uint32),
        settings=builders.build_sampler_settings(c, section, length), prefix=prefix,
        vocabulary=request.Vocabulary(valid_V), longest=asked, put=sharding.to_abstract,
    )  # fmt: skip
    compiler.run.say(f"compiling the sampler of {section}")
    rows = 0
    try:
        programs = loop.compile_programs(job, sys.maxsize)
    except MemoryError as error:
        # The compiler's error is the cause of the sampler's error.
        cause = error.__cause__ or error.__context__ or error
        held = sharding.count_device_bytes(job.constants)
        compiler.programs.append(build_failed_program(f"sampler of {section}", held, cause))
        programs = ()
    for program in programs:
        cost = program_cost.analyse_program(program.name, program.call, program.seconds, frame.mesh)
        needed = 0 if program.name == "empty cache" else cost.temporary
        compiler.programs.append(Program(program.name, cost.arguments, cost, needed))
        if program.name.startswith("prefill"):
            # The rows of one prefill wait for slots while the next prefill runs.
            rows = max(rows, 2 * cost.outputs)
    return {"prompts' keys": rows, "examples' keys": sharding.count_device_bytes(prefix)}


def _compile_prefix(
    compiler: _Compiler, decoder: transformer.Decoder, policy: policy_lib.Policy
) -> transformer.KV | None:
    """Compiles the encoding of the worked examples; returns the examples' keys and values."""
    frame, tokens = compiler.run.frame, compiler.run.lengths.prefix
    if not tokens:
        return None
    whole = NamedSharding(frame.mesh, PartitionSpec())
    tokens_1L = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=whole)
    encode = jax.jit(lambda policy, tokens: shared_prefix.encode_prefix(decoder, policy, tokens))
    return compiler("worked examples", encode, policy, tokens_1L, keeps=False)


def _compile_step(compiler: _Compiler, arrays: memory.HeldArrays) -> dict[str, int]:
    """Compiles the step and its teacher; returns {"batch": bytes, "examples' keys": bytes}."""
    frame, lengths, c = compiler.run.frame, compiler.run.lengths, compiler.run.frame.config
    tx, _ = builders.build_optimizer(c, max(1, c.train.steps))
    options, decoder = builders.build_options(frame), builders.build_decoder(frame)
    rows = builders.pack_batch(frame, build_dry_run_batch(c, lengths), caps=True)
    batch = sharding.to_abstract(rows, frame.mesh, layout.batch_shardings(rows, frame.mesh))
    examples = np.zeros(lengths.prefix, np.int32) if lengths.prefix else None
    factor, kvs = np.float32(1), None
    prefix, factor = sharding.to_abstract((examples, factor), frame.mesh, PartitionSpec())
    if lengths.prefix and config_lib.traits(c).teacher:
        base = policy_lib.Policy(arrays.base, scale=frame.adapter_scale)
        kv = _compile_prefix(compiler, decoder, base)
        kvs = (kv,) * (2 if options.teacher == "trust_region" else 1)
    jitted = builders.build_step(frame, decoder, tx, options, arrays.state)
    args = (arrays.state, arrays.frozen, batch, prefix, kvs, factor)
    compiler("training step", jitted, *args, loop_turns=_count_step_loop_turns(frame, batch))
    return {
        "batch": sharding.count_device_bytes(batch),
        "examples' keys": sharding.count_device_bytes(kvs),
    }


def _count_step_loop_turns(frame: run_plan.ProgramPlan, batch: layout.Batch) -> int:
    """Returns the number of token blocks that the loss processes if no position is padding."""
    options, (B, C) = builders.build_options(frame), batch.mask_BC.shape
    if batch.source_UST is not None:
        tokens = batch.source_UST.shape[2]
    else:
        tokens = B * C // options.micro_batches // sharding.batch_shards(frame.mesh)
    return token_blocks.divide_evenly(tokens, options.chunk, 1)[0]
