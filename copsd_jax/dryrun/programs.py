"""Every program of a run, compiled for devices that nobody has to own.

The programs are made by the very functions that a run makes them with (`making.*`,
`request.prepare_inputs`, `loop.compile_programs`, `train_step.make_step`), of arrays that have
a shape, a dtype and a place, and no values. Lengths are the caps of the settings: no data is read.
"""

import dataclasses
import pathlib
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
from copsd_jax.dryrun import program_cost
from copsd_jax.losses import token_blocks
from copsd_jax.model import policy as policy_lib
from copsd_jax.model import shared_prefix, transformer
from copsd_jax.runtime import hardware, sharding
from copsd_jax.sampler import loop, request
from copsd_jax.training import backends, builders, layout, run_plan, train_step
from copsd_jax.training import loaded_run as run_lib
from copsd_jax.weights import hf_config

EXEMPLAR_TOKENS = 64  # of a worked example, whose text is not read; the bundled ones have 55


class Lengths(NamedTuple):
    """Most tokens of each part, from the settings' caps.

    Attributes:
      prefix: worked examples in front of the student's and the teacher's prompts.
      student, teacher, evaluation, writer: prompts without them.
      completion, answer, reply: what is drawn in rollouts, evaluation, and by an author.
    """

    prefix: int
    student: int
    teacher: int
    evaluation: int
    writer: int
    completion: int
    answer: int
    reply: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that was compiled, or was not, for want of memory.

    Attributes:
      arguments: bytes of its arguments on each device, by their shapes.
      facts: None for one that does not fit.
      needed: bytes that it takes beyond its arguments.
      failure: what the compiler said; "" for none.
    """

    name: str
    arguments: int
    facts: program_cost.Analysis | None
    needed: int
    failure: str = ""


@dataclasses.dataclass
class Phase:
    """A part of the run: what lies in memory, and the programs that run meanwhile.

    Attributes:
      parts: bytes on each device, by part.
    """

    name: str
    parts: dict[str, int]
    programs: list[Program]

    @property
    def working(self) -> int:
        """Bytes beyond the parts that the hungriest program takes."""
        return max((program.needed for program in self.programs), default=0)

    @property
    def total(self) -> int:
        return sum(self.parts.values()) + self.working


class CompiledRun(NamedTuple):
    """All that was compiled."""

    frame: run_plan.ProgramPlan
    target: hardware.Target
    lengths: Lengths
    phases: dict[str, Phase]
    seconds: float


# --- what is meant ----------------------------------------------------------------------------


def find_model_config(config: Any) -> transformer.ModelConfig:
    """The model's shape by its name, or from a folder's config.json; nothing else is read.

    Raises:
      ValueError: for a name that model.SHAPES lacks, with the choices.
    """
    m = config.model
    if m.init == "random" and m.shape:
        name = m.shape
    elif pathlib.Path(m.path).is_dir():
        return hf_config.load_config(pathlib.Path(m.path))
    else:
        name = m.path.rstrip("/").split("/")[-1].lower()
    plain = re.sub(r"[-.]", "_", name.removeprefix("llm-"))
    known = [key for key in transformer.SHAPES if plain == key or plain.startswith(f"{key}_")]
    known += ["smollm2_135m"] if plain == "smollm2" else []
    if not known:
        raise ValueError(
            f"model.path is {m.path!r}: a dry run reads no repository, and knows the shapes of "
            f"{', '.join(transformer.SHAPES)}; a folder with config.json would do too"
        )
    return transformer.SHAPES[max(known, key=len)]


def make_frame(config: Any, found: list) -> run_plan.ProgramPlan:
    """What the programs are made from, checked as `run_plan.make_plan` checks it.

    Raises:
      ValueError: in one sentence.
    """
    shape = find_model_config(config)
    where = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, found)
    setting_rules.check_shards(config, sharding.batch_shards(where))
    setting_rules.check_vocabulary(config, shape.vocab_size)
    backends.choose_loss(config, sharding.platform(where))
    sharding.key_repeats(shape.n_heads, shape.n_kv_heads, where.shape["tensor"])
    dtype = run_plan.choose_dtype(config.model.dtype, where)
    backends.check_attention(config, sharding.platform(where), dtype, shape)
    return run_plan.ProgramPlan(config, where, dtype, shape, run_plan.adapter_scale(config))


def longest_texts(config: Any, shape: transformer.ModelConfig) -> Lengths:
    """The caps, within the positions that the model knows.

    Raises:
      ValueError: if they leave no room for a prompt.
    """
    c, room = config, shape.max_position
    prefix = EXEMPLAR_TOKENS * c.prompt.exemplars
    completion, reply = c.rollout.max_tokens, c.author.max_tokens
    answer = c.eval.max_tokens or completion
    prompt = lambda drawn: min(c.prompt.max_tokens, room - drawn) - prefix  # noqa: E731
    found = Lengths(
        prefix, prompt(completion), run_plan.teacher_limit(c, shape) - prefix, prompt(answer),
        min(c.teacher.max_tokens, room - reply), completion, answer, reply,
    )  # fmt: skip
    sizes = {"rollout": found.student, "evaluation": found.evaluation, "teacher": found.teacher}
    for side, size in sizes.items():
        if size < 1:
            raise ValueError(
                f"the {side}'s prompts have {size} tokens: rollout.max_tokens, eval.max_tokens, "
                f"prompt.exemplars ({EXEMPLAR_TOKENS} each) and the model's {room} positions leave "
                "no room for them"
            )
    return found


def size(tree: Any) -> int:
    """Bytes on each device of arrays with shardings."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


# --- compiling --------------------------------------------------------------------------------


class _Maker(NamedTuple):
    """Compiles, and keeps what it compiled."""

    frame: run_plan.ProgramPlan
    said: Callable[[str], None]
    programs: list[Program]

    def __call__(self, name: str, jitted: Any, *args: Any, keeps: bool = True, turns: int = 1):
        """The results of `jitted(*args)` as abstract arrays.

        Args:
          keeps: whether results count as memory of the program, not as a part of their own.
        """
        self.said(f"compiling {name}")
        lowered = jitted.lower(*args)
        held = size(jax.tree.map(_placed(self.frame.mesh), (args,)))
        begun = time.perf_counter()
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            one = failed_program(name, held, error)
            # Where results are a part of their own, that part says what they take.
            self.programs.append(one if keeps else dataclasses.replace(one, needed=0))
            return None
        facts = program_cost.analyse(
            name, program, time.perf_counter() - begun, self.frame.mesh, turns=turns
        )
        needed = (facts.added if keeps else facts.temporary) + max(0, facts.arguments - held)
        self.programs.append(Program(name, held, facts, needed))
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            lowered.out_info, program.output_shardings,
        )  # fmt: skip


def _placed(where: Mesh) -> Callable[[Any], Any]:
    """Arrays without a place count as whole on every device."""
    whole = NamedSharding(where, PartitionSpec())

    def one(x: Any) -> Any:
        if not hasattr(x, "dtype"):
            return jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        sharding = getattr(x, "sharding", None) or whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return one


UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def failed_program(name: str, arguments: int, error: BaseException) -> Program:
    """A program for which the compiler finds no room, with what it would take.

    Raises:
      the error itself, if it is another one.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        raise error
    used = re.search(r"Used ([\d.]+)([KMGT]?) of", text)
    temporary = re.search(r"temporaries \(([\d.]+)([KMGT]?)\)", text)
    needed = 0
    if used:
        needed = int(float(used[1]) * UNITS[used[2]]) - arguments
    elif temporary:
        needed = int(float(temporary[1]) * UNITS[temporary[2]])
    line = text.strip().splitlines()[0]
    return Program(name, arguments, None, max(0, needed), line)


def first_state(frame: run_plan.ProgramPlan, make: _Maker, base: Any) -> tuple[Any, Any, Any]:
    """(state, optimizer, options) of step 0, and the program that makes it."""
    c = frame.config
    options = builders.build_options(frame)
    tx, _ = builders.build_optimizer(c, max(1, c.train.steps))

    begun = builders.build_initializer(frame, tx, options.teacher)
    shapes = jax.eval_shape(begun, base)
    places = builders.find_shardings(shapes, frame)
    given = base if c.train.trainable == "full" else {}
    make("state at step 0", jax.jit(begun, out_shardings=places), given, keeps=False)
    return sharding.to_abstract(shapes, frame.mesh, places), tx, options


def longest_batch(config: Any, long: Lengths) -> layout.Batch:
    """A step's batch of the longest texts: NumPy arrays of zeros, as the methods make them."""
    B = config_lib.completions_per_step(config)
    method = config_lib.traits(config)
    out = layout.build_batch(
        [[0] * long.student] * B, [[0] * long.teacher] * B if method.teacher else None,
        [[0] * long.completion] * B,
    )  # fmt: skip
    logps_BC = np.zeros(out.mask_BC.shape, np.float32)
    if method.samples:
        out = out._replace(logp_rollout_BC=logps_BC)
    if not method.teacher or config.policy.weight:
        out = out._replace(policy_BC=out.mask_BC, advantage_BC=logps_BC)
    return out


def compile_run(
    config: Any,
    target: hardware.Target,
    found: list,
    limit: float,
    said: Callable[[str], None] = lambda _: None,
) -> CompiledRun:
    """Compiles every program of a run for these devices.

    Args:
      limit: bytes of a device; what begins with more is not compiled.
      said: told what is being done.

    Raises:
      ValueError: for settings that no run would take.
    """
    begun = time.perf_counter()
    one = make_frame(config, found)
    long = longest_texts(config, one.model_config)
    plan_like: Any = one
    with run_lib.set_mesh_and_precision(plan_like):
        phases = _phases(one, long, limit, said)
    return CompiledRun(one, target, long, phases, time.perf_counter() - begun)


def _phases(one: run_plan.ProgramPlan, long: Lengths, limit: float, said) -> dict[str, Phase]:
    c, where = one.config, one.mesh
    shapes = transformer.abstract_params(one.model_config, one.dtype)
    base = sharding.to_abstract(shapes, where, builders.find_shardings(shapes, one))
    lora_run = c.train.trainable == "lora"
    placing, handing = _Maker(one, said, []), _Maker(one, said, [])
    state, tx, options = first_state(one, placing, base)
    frozen = base if lora_run or builders.needs_initial_weights(c) else {}
    resident = {
        "weights": size(frozen) + (0 if lora_run else size(state.trained)),
        "adapters": size(state.trained) if lora_run else 0,
        "optimizer": size(state.optimizer),
        "average": size(state.ema),
    }
    student = policy_lib.Policy(base, state.trained if lora_run else None, one.adapter_scale)

    def call(program: Any, *args: Any) -> Any:
        name = "weights" if len(args) > 1 else "adapter"  # as HandOver has them
        return handing(f"{name} to the sampler", program, *args, keeps=False)

    sampled = sampled_sections(c, long)
    hand_over = builders.build_hand_over(one, frozen if lora_run else {}, call=call)
    handed_over = hand_over(student) if sampled else student
    copies = 0 if handed_over.params is student.params else size(handed_over.params)
    copies += 0 if handed_over.adapter is student.adapter else size(handed_over.adapter)
    # Full fine-tuning casts the masters for each phase of sampling.
    cast = 0 if lora_run else size(base)
    phases = {
        "placement": Phase("placement", {**resident, "read": size(base) if frozen == {} else 0},
                           placing.programs),
    }  # fmt: skip
    if sampled:
        phases["hand-over"] = Phase(
            "hand-over", {**resident, "sampler's weights": copies + cast}, handing.programs
        )
    handed = {**resident, "sampler's weights": copies + cast}
    for name, section, asked, drawn in sampled:
        if handed_over.params is None or sum(handed.values()) > limit:
            phases[name] = _unmade(name, handed, f"sampler of {section}")
        else:
            phases[name] = compile_sampler(
                one, long, section, asked, drawn, handed_over, handed, said
            )
    kept = hand_over.kept()
    held = {**resident, "sampler's weights": 0 if kept is None else size(kept)}
    if c.train.steps and sum(held.values()) > limit:
        phases["step"] = _unmade("step", held, "training step")
    elif c.train.steps:
        phases["step"] = compile_step(one, long, (state, frozen, base), (tx, options), held, said)
    return phases


def _unmade(name: str, held: dict[str, int], program: str) -> Phase:
    """Minutes of compiling would only say what is known: the weights alone do not fit."""
    reason = "not compiled: what it begins with does not fit"
    return Phase(name, held, [Program(program, sum(held.values()), None, 0, reason)])


def sampled_sections(c: Any, long: Lengths) -> list[tuple[str, str, int, int]]:
    """(phase, section of the settings, prompt, completion) of what is sampled here."""
    if c.sampler.engine == "server":
        return []
    out = []
    if config_lib.traits(c).samples and c.train.steps:
        out.append(("rollout", "rollout", long.student, long.completion))
    if c.author.kind in ("student", "teacher"):
        out.append(("author", "author", long.writer, long.reply))
    if c.eval.path:
        out.append(("evaluation", "eval", long.evaluation, long.answer))
    return out


def compile_sampler(
    one, long: Lengths, section: str, asked: int, drawn: int, policy: policy_lib.Policy, held, said
) -> Phase:
    """The sampler's programs of a section, with its cache."""
    make = _Maker(one, said, [])
    decoder = builders.build_decoder(one)
    shape = one.model_config
    # An author's prompts have no worked examples; its texts are as long as a call needs.
    prefix = None if section == "author" else _prefix(one, make, decoder, long, policy)
    length = 0 if section == "author" else asked + drawn
    valid_V = np.ones(shape.vocab_size, bool)
    valid_V[-1] = False  # tokenizers have fewer ids than embeddings have rows
    job = request.prepare_inputs(
        decoder, policy, [(0,) * asked], [builders.build_sampling(one.config, section, (0,), ())],
        keys_n2=np.zeros((1, 2), np.uint32),
        settings=builders.build_sampler_settings(one.config, section, length), prefix=prefix,
        vocabulary=request.Vocabulary(valid_V), limits=None, longest=asked, put=sharding.to_abstract,  # noqa: E501
    )  # fmt: skip
    said(f"compiling the sampler of {section}")
    programs, rows = make.programs, 0
    held_by_job = size(job.constants)
    try:
        made = loop.compile_programs(job, sys.maxsize)
    except MemoryError as error:
        programs.append(failed_program(f"sampler of {section}", held_by_job, _cause(error)))
        made = ()
    for program in made:
        call: Any = program.call
        facts = program_cost.analyse(program.name, call, program.seconds, one.mesh)
        needed = 0 if program.name == "empty cache" else facts.temporary
        programs.append(Program(program.name, facts.arguments, facts, needed))
        if program.name.startswith("prefill"):
            rows = max(rows, 2 * facts.outputs)
    cache = size(loop.abstract_state(job))
    parts = {**held, "cache": cache, "prompts' keys": rows, "examples' keys": size(prefix)}
    return Phase(section, parts, programs)


def _cause(error: BaseException) -> BaseException:
    """What the compiler said, behind an error that tells it in other words."""
    return error.__cause__ or error.__context__ or error


def _prefix(
    one, make: _Maker, decoder, long: Lengths, policy: policy_lib.Policy
) -> transformer.KV | None:
    if not long.prefix:
        return None
    whole = NamedSharding(one.mesh, PartitionSpec())
    tokens = jax.ShapeDtypeStruct((1, long.prefix), jnp.int32, sharding=whole)
    bound = jax.jit(lambda policy, tokens: shared_prefix.encode(decoder, policy, tokens))
    return make("worked examples", bound, policy, tokens, keeps=False)


def compile_step(one, long: Lengths, trees, parts, held, said) -> Phase:
    """The training step, teacher included, on a batch of the longest texts."""
    state, frozen, base = trees
    tx, options = parts
    c, make = one.config, _Maker(one, said, [])
    decoder = builders.build_decoder(one)
    whole = PartitionSpec()
    rows = builders.pack_batch(one, longest_batch(c, long), caps=True)
    arrays = sharding.to_abstract(rows, one.mesh, layout.batch_shardings(rows, one.mesh))
    prefix = kvs = None
    if long.prefix:
        prefix = sharding.to_abstract(np.zeros(long.prefix, np.int32), one.mesh, whole)
    if long.prefix and config_lib.traits(c).teacher:
        kv = _prefix(
            one,
            _Maker(one, lambda _: None, make.programs),
            decoder,
            long,
            policy_lib.Policy(base, scale=one.adapter_scale),
        )
        kvs = (kv,) * (2 if options.teacher == "trust_region" else 1)
    factor = sharding.to_abstract(np.float32(1), one.mesh, whole)
    jitted = builders.build_step(one, decoder, tx, options, state)
    make(
        "training step", jitted, state, frozen, arrays, prefix, kvs, factor,
        turns=_blocks(one, options, arrays),
    )  # fmt: skip
    return Phase(
        "step", {**held, "batch": size(arrays), "examples' keys": size(kvs)}, make.programs
    )


def _blocks(one, options: train_step.Options, arrays: layout.Batch) -> int:
    """Blocks of tokens that the loss goes over, if every token has weight."""
    B, C = arrays.mask_BC.shape
    if arrays.source_UST is not None:
        tokens = arrays.source_UST.shape[2]
    else:
        tokens = B * C // options.micro_batches // sharding.batch_shards(one.mesh)
    return token_blocks.size(tokens, options.chunk, 1)[0]
