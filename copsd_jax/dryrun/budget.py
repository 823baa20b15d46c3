"""A model of what lies in a device's memory, by part; no compiler, milliseconds.

What a run holds (weights, optimizer, caches) follows from shapes and partitions and is exact. What
programs add while they run is estimated, of a device with b rows of L tokens of a micro-batch:

  activations  what remat keeps of layers for the backward pass, layers x b x L x (their inputs D;
               attention's output and sum; outputs of projections; or all that it reads)
  temporaries  what is there all the time (gradients of what is trained, the gathered head, a
               layer's weights), and the most of three that follow one another: a layer forward,
               the loss's block of entries with its hidden states, a layer backward. A layer has
               its own values and either the block of attention logits (of splash, a mask of rows
               with parents or examples) or what is between the products of its MLP

It says what to change where a run does not fit, without compiling each choice; `dryrun` prints it
beside what the compiler reports.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from copsd_jax.attention import decode_attention as attention_lib
from copsd_jax.attention import row_attention
from copsd_jax.config import settings as config_lib
from copsd_jax.dryrun import programs
from copsd_jax.losses.pallas import block_sizes
from copsd_jax.model import lora, transformer
from copsd_jax.runtime import hardware, sharding
from copsd_jax.sampler import engine, prompt_packing
from copsd_jax.training import builders, layout, row_packing, run_plan, train_step

QUERIES = transformer.QUERY_BLOCK
LANES = 128  # of a TPU, which the last dimension of an array fills; seen with heads of 64
ADVICE = 3  # proposals at most
ROOM = 0.97  # of a device's memory, for a model that may be wrong


def parts(
    frame: Any, long: programs.Lengths, phase: str, *, micro: int = 0, kind: str = ""
) -> dict[str, int] | None:
    """Bytes on each device by part, of a phase; None for one without a model.

    Args:
      micro: completions of a micro-batch; 0 for the config's.
      kind: the device's; "" for that of the frame's mesh.
    """
    held = _held(frame)
    if phase == "step":
        return held | _step(frame, long, micro, kind)
    if phase in ("rollout", "evaluation"):
        return held | _sampling(frame, long, phase, kind)
    return None


def micro_batches(config: Any, shards: int) -> list[int]:
    """Completions that a micro-batch of this config may have."""
    completions = config_lib.completions_per_step(config)
    return [m for m in range(shards, completions + 1, shards) if completions % m == 0]


def _size(tree: Any, frame: Any, *, gathered: bool = False) -> int:
    """Bytes of each device's part of parameters, adapters or optimizer state."""
    places = sharding.shardings(tree, frame.mesh, frame.model_config.n_kv_heads, gathered=gathered)
    sizes = jax.tree.map(
        lambda x, place: int(np.prod(place.shard_shape(x.shape))) * x.dtype.itemsize, tree, places
    )
    return sum(jax.tree.leaves(sizes))


class _Shapes(NamedTuple):
    base: Any
    int8: Any  # the base with its projections rounded
    trained: Any
    state: train_step.State


_SHAPES: dict[Any, _Shapes] = {}


def _shapes(frame: Any) -> _Shapes:
    """Trees of shapes, which proposals of other meshes share."""
    c, m = frame.config, frame.model_config
    names = ("train.trainable", "train.max_grad_norm", "teacher.weights", "lora.rank")
    key = (m, np.dtype(frame.dtype), tuple(c.lora.targets),
           tuple(c[name.partition(".")[0]][name.partition(".")[2]] for name in names))  # fmt: skip
    if key not in _SHAPES:
        base = transformer.abstract_params(m, frame.dtype)
        trained = run_plan.trained_shapes(c, m)
        tx, _ = builders.build_optimizer(c, max(1, c.train.steps))
        state = jax.eval_shape(lambda t: train_step.init_state(t, tx, c.teacher.weights), trained)
        _SHAPES[key] = _Shapes(
            base, jax.eval_shape(lora.quantise_projections, base), trained, state
        )
    return _SHAPES[key]


def _held(frame: Any) -> dict[str, int]:
    """What is always there, and the sampler's copies of weights."""
    c = frame.config
    full = c.train.trainable == "full"
    base, _, trained, state = _shapes(frame)
    frozen = _size(base, frame) if not full or builders.needs_initial_weights(c) else 0
    return {
        "weights": frozen + (_size(trained, frame) if full else 0),
        "adapters": 0 if full else _size(trained, frame),
        "optimizer": _size(state.optimizer, frame),
        "average": 0 if state.ema is None else _size(state.ema, frame),
    }


def _copies(frame: Any) -> tuple[int, int]:
    """(of the weights that the sampler reads, what of it stays through the step)."""
    c, where = frame.config, frame.mesh
    if not programs.sampled_sections(c, programs.longest_texts(c, frame.model_config)):
        return 0, 0
    shapes = _shapes(frame)
    base = shapes.int8 if c.sampler.int8 else shapes.base
    gather = c.sampler.gather and where.shape["fsdp"] > 1
    moved = gather or c.sampler.int8
    whole = _size(base, frame, gathered=gather)
    if c.train.trainable == "full":
        cast = _size(shapes.base, frame)
        return (whole if moved else 0) + cast, 0
    more = _size(shapes.trained, frame, gathered=True) if gather and not c.sampler.merge else 0
    if c.sampler.merge:
        return whole, 0
    return (whole if moved else 0) + more, whole if moved else 0


def _sampling(frame: Any, long: programs.Lengths, phase: str, kind: str) -> dict[str, int]:
    c, m, where = frame.config, frame.model_config, frame.mesh
    section = c.rollout if phase == "rollout" else c.eval
    asked = long.student if phase == "rollout" else long.evaluation
    drawn = long.completion if phase == "rollout" else long.answer
    shards, tensor = where.shape["data"] * where.shape["fsdp"], where.shape["tensor"]
    slots = -(-section.slots // shards)
    entries = -(-(asked + drawn + engine.INSERT_BLOCK) // 128) * 128
    heads = _key_heads(m, tensor)
    item = np.dtype(frame.dtype).itemsize
    kept = jnp.dtype(frame.dtype if c.sampler.cache == "auto" else c.sampler.cache)
    entry = m.head_dim * kept.itemsize + (4 if kept == jnp.int8 else 0)
    width = prompt_packing.list_buckets(c.sampler.pack, asked)[-1]
    row = 2 * m.n_layers * heads * (width + engine.INSERT_BLOCK) * m.head_dim * item
    row += width * m.d_model * item
    vocabulary = -(-m.vocab_size // tensor)
    decode = slots * vocabulary * 4 * 3
    if m.vocab_size % tensor:  # the padded head
        decode += vocabulary * m.d_model * item
    if _tpu(frame, kind):
        decode += _before_decoding(frame)
    if c.sampler.attention == "blocks" or (kind or _kind(where)) == "cpu":
        # Keys and values of the pairs of slot and block that are looked at together.
        pairs = min(max(16, 4 * slots), slots * entries // attention_lib.BLOCK)
        decode += 2 * pairs * heads * attention_lib.BLOCK * m.head_dim * item
    layer = width * _layer(m, tensor, item)
    # Prompts have parents: splash holds a mask of the row.
    logits = m.n_heads // tensor * _queries(frame, width, kind) * width * 6
    if _splash(frame, kind):
        logits = 5 * width * (width + long.prefix)
    cached = 2 * m.n_layers * slots * heads * entries
    # Of narrow heads the entries are in the lanes; to write texts in, XLA lays the heads there.
    padded = _padded(frame, kind)
    inserting = cached * padded * kept.itemsize if padded > m.head_dim else 0
    return {
        "sampler's weights": _copies(frame)[0],
        "cache": cached * entry,
        "prompts' keys": 2 * row,
        "examples' keys": 2 * m.n_layers * heads * long.prefix * m.head_dim * item,
        "temporaries": max(decode, layer + logits + row, inserting),
    }


def _before_decoding(frame: Any) -> int:
    """What the compiler for TPU takes out of the loop over tokens and holds through it: kernels of
    q, k and v of all layers in another layout, and adapters in the compute dtype."""
    c, shapes = frame.config, _shapes(frame)
    gathered = c.sampler.gather and frame.mesh.shape["fsdp"] > 1
    base = shapes.int8 if c.sampler.int8 else shapes.base
    layers = {name: base["layers"][name] for name in ("q", "k", "v")}
    held = _size({"layers": layers}, frame, gathered=gathered)
    return held + (0 if c.sampler.merge else _rounded_adapters(frame, gathered=gathered))


def _rounded_adapters(frame: Any, *, gathered: bool) -> int:
    """Adapters, float32 at rest, in the compute dtype; 0 of a run without."""
    if frame.config.train.trainable == "full":
        return 0
    held = _size(_shapes(frame).trained, frame, gathered=gathered)
    return held * np.dtype(frame.dtype).itemsize // 4


def _padded(frame: Any, kind: str) -> int:
    """Numbers that a head takes as the last dimension of an array."""
    size = frame.model_config.head_dim
    return LANES if size < LANES and _tpu(frame, kind) else size


def _key_heads(m: transformer.ModelConfig, tensor: int) -> int:
    """Of a device, repeated where there are too few."""
    return m.n_kv_heads * sharding.key_repeats(m.n_heads, m.n_kv_heads, tensor) // tensor


class Rows(NamedTuple):
    """Of a micro-batch on one device, if every text is as long as it may be.

    Attributes:
      micros: micro-batches.
      count: rows of each side.
      student, teacher: their lengths, 0 without a teacher.
      tokens: places for completion tokens.
    """

    micros: int
    count: int
    student: int
    teacher: int
    tokens: int

    @property
    def micro_tokens(self) -> int:
        return self.count * (self.student + self.teacher)


def rows(frame: Any, long: programs.Lengths, micro: int = 0) -> Rows:
    """Rows of a micro-batch of `micro` completions, 0 for what the config says: packed rows as one
    sample each."""
    c = frame.config
    shards = frame.mesh.shape["data"] * frame.mesh.shape["fsdp"]
    completions = config_lib.completions_per_step(c)
    size = layout.pad_length
    if c.train.pack != "off":
        size = lambda n: row_packing.round_up(max(n, c.train.row_tokens), row_packing.ROW_MULTIPLE)  # noqa: E731
    student = size(long.student + long.completion)
    teacher = size(long.teacher + long.completion) if config_lib.traits(c).teacher else 0
    budget = 0 if micro else c.train.micro_tokens
    micro = micro or c.train.micro_batch or completions
    micros, count = row_packing.size_bins(
        [student, teacher], completions, shards=shards, micros=completions // micro, budget=budget
    )
    each = layout.pad_length(long.completion) if c.train.pack == "off" else student
    return Rows(micros, count, student, teacher, count * each)


def micro_setting(frame: Any, long: programs.Lengths, micro: int) -> tuple[str, int]:
    """The setting that makes micro-batches of so many completions, and its value."""
    if frame.config.train.micro_tokens:
        return "train.micro_tokens", rows(frame, long, micro).micro_tokens
    return "train.micro_batch", micro


def _step(frame: Any, long: programs.Lengths, micro: int, kind: str) -> dict[str, int]:
    c, m, where = frame.config, frame.model_config, frame.mesh
    tensor, item = where.shape["tensor"], np.dtype(frame.dtype).itemsize
    found = rows(frame, long, micro)
    student = found.count * found.student
    kept = _kept(frame, tensor, item, kind)
    shapes = _shapes(frame)
    full, fsdp = c.train.trainable == "full", where.shape["fsdp"] > 1
    # Of all micro-batches, and of the one at hand.
    always = 2 * _size(shapes.trained, frame)
    # A layer's weights are cut out of those of all; along fsdp, the next one's come meanwhile.
    always += _one_layer(m, tensor, item) * (2 if fsdp else 1)
    if fsdp or m.vocab_size % tensor:
        always += -(-m.vocab_size // tensor) * m.d_model * item * (2 if full else 1)
    if full:
        always += _size(shapes.base, frame)
    elif found.micros > 1 and _tpu(frame, kind):  # taken out of the loop over micro-batches
        always += _rounded_adapters(frame, gathered=True)
    # What meets in the loss: states of both sides, and gradients to the student's.
    states = 4 * found.tokens * m.d_model * 4
    most = max(
        _forward(frame, found, long, kind),
        states + _entries(frame, found.tokens, kind),
        _backward(frame, found, long, kind),
    )
    return {
        "sampler's weights": _copies(frame)[1],
        "batch": _batch(frame, found, long),
        "activations": m.n_layers * (student + long.prefix) * kept,  # the prefix once for all
        "temporaries": always + most,
    }


def _forward(frame: Any, found: Rows, long: programs.Lengths, kind: str) -> int:
    """A layer's values forward: the states of all sides before and after it, and of the longest
    side what its attention or its MLP holds."""
    m, tensor = frame.model_config, frame.mesh.shape["tensor"]
    item, longest = np.dtype(frame.dtype).itemsize, max(found.student, found.teacher)
    states = 2 * found.count * (found.student + found.teacher) * m.d_model * item
    # Logits and their exponentials, float32.
    attending = _attention(frame, found.count, longest, long, kind, 8, 5)
    attending += found.count * longest * (2 * m.d_model + _heads(m, tensor)) * item
    mlp = found.count * longest * (m.d_model + 3 * m.d_ff // tensor) * item
    return states + max(attending, mlp) + _masks(frame, found, kind)


def _backward(frame: Any, found: Rows, long: programs.Lengths, kind: str) -> int:
    """A layer's values, which remat computes again, and their gradients, of the student: at its
    MLP, where all of both are there, or at its attention, where the MLP's are gone."""
    m, tensor = frame.model_config, frame.mesh.shape["tensor"]
    item, tokens = np.dtype(frame.dtype).itemsize, found.count * found.student
    # Weights and their gradients, float32 and rounded; sums for keys and values are float32.
    attending = _attention(frame, found.count, found.student, long, kind, 8 + 2 * item, 10)
    attending += tokens * (4 * m.d_model + _heads(m, tensor)) * item
    attending += tokens * 4 * _key_heads(m, tensor) * m.head_dim * 4
    again = _layer(m, tensor, item) + _lows(frame) * item
    again = 0 if frame.config.model.remat == "none" else again
    mlp = tokens * (_layer(m, tensor, item) + again)
    return max(attending, mlp) + _masks(frame, found, kind)


def _attention(
    frame: Any, count: int, length: int, long: programs.Lengths, kind: str, entry: int, masked: int
) -> int:
    """Bytes of a block of queries against all keys, `entry` for each of its logits; splash holds
    one row's mask at a time, `masked` for each entry, where rows have parents or a prefix."""
    if _splash(frame, kind):
        there = long.prefix or frame.config.train.pack == "shared"
        return masked * length * (length + long.prefix) if there else 0
    heads = frame.model_config.n_heads // frame.mesh.shape["tensor"]
    return count * heads * _queries(frame, length, kind) * (length + long.prefix) * entry


def _masks(frame: Any, found: Rows, kind: str) -> int:
    """The two constants that the portable form's mask selects from, float32, which XLA lays out as
    arrays ahead of the layers: of a block of queries against the keys of each range of them."""
    if _splash(frame, kind):
        return 0
    total = 0
    for length in (found.student, found.teacher):
        queries = _queries(frame, length, kind)
        ranges = row_attention.split_queries(length, queries) if length else []
        total += queries * sum(stop for _, stop in ranges)
    return 2 * 4 * found.count * total


def _queries(frame: Any, length: int, kind: str) -> int:
    """Queries of a block of portable attention, as `build_decoder` and `attend` have them."""
    m = frame.model_config
    small = length**2 * m.n_heads * m.head_dim < row_attention.SMALL_WORK
    if (kind or _kind(frame.mesh)) == "cpu":
        return min(
            length, row_attention.SMALL_WORK_BLOCK if small else row_attention.CPU_QUERY_BLOCK
        )
    return min(length, QUERIES)


def _tpu(frame: Any, kind: str) -> bool:
    chip = hardware.CHIPS.get(kind or _kind(frame.mesh))
    return chip is not None and bool(chip.vmem)


def _splash(frame: Any, kind: str) -> bool:
    """Whether attention of rows holds no logits."""
    return _tpu(frame, kind) and frame.config.model.attention != "portable"


def _kept(frame: Any, tensor: int, item: int, kind: str) -> int:
    """Bytes of a layer's values for a token that are kept for the backward pass."""
    c, m = frame.config, frame.model_config
    query, key = m.n_heads * m.head_dim // tensor, m.n_kv_heads * m.head_dim // tensor
    mlp, out = m.d_ff // tensor, query * item + 4 * m.n_heads // tensor
    if c.model.remat == "none":
        # Norms' inputs are float32. Of SiLU: gate, sigmoid, 1 - sigmoid, product; then up, product.
        norms = 2 * m.d_model + (query + key if m.qk_norm else 0)
        read = 2 * m.d_model + 2 * query + 2 * key + 6 * mlp + _lows(frame)
        # One of two of the queries, keys and values are kept by heads.
        more = (_padded(frame, kind) - m.head_dim) * (m.n_heads + 2 * m.n_kv_heads) // tensor
        return norms * 4 + (read + more) * item + out
    return {
        "dots": (2 * m.d_model + query + 2 * key + 2 * mlp) * item + out,
        "attention": m.d_model * item + out,
        "layer": m.d_model * item,
    }[c.model.remat]


def _layer(m: transformer.ModelConfig, tensor: int, item: int) -> int:
    """Bytes of a layer's values for a token."""
    return (4 * m.d_model + _heads(m, tensor) + 3 * m.d_ff // tensor) * item


def _lows(frame: Any) -> int:
    """Numbers of a token between the factors of a layer's adapters."""
    c = frame.config
    return 0 if c.train.trainable == "full" else c.lora.rank * len(c.lora.targets)


def _heads(m: transformer.ModelConfig, tensor: int) -> int:
    """Numbers of a token in queries, keys, values and attention's output."""
    return (2 * m.n_heads // tensor + 2 * _key_heads(m, tensor)) * m.head_dim


def _one_layer(m: transformer.ModelConfig, tensor: int, item: int) -> int:
    """Bytes of a layer's weights, whole along fsdp."""
    return sum(a * b for a, b in m.projections().values()) * item // tensor


def _entries(frame: Any, tokens: int, kind: str) -> int:
    """What the divergence keeps of a block."""
    c, m, where = frame.config, frame.model_config, frame.mesh
    if not config_lib.traits(c).teacher:
        return 3 * 4 * min(tokens, c.loss.chunk) * m.vocab_size // where.shape["tensor"]
    cpu = (kind or _kind(where)) == "cpu"
    if c.loss.top_k or cpu or c.loss.implementation == "chunked":
        return 4 * 4 * min(tokens, c.loss.chunk) * m.vocab_size
    chip = hardware.CHIPS.get(kind or _kind(where))
    if chip is None or not chip.vmem:
        most = block_sizes.gpu(kind or _kind(where), m.d_model, m.vocab_size, frame.dtype).tokens
        return min(most, tokens) * m.vocab_size * block_sizes.entry_bytes("gpu", frame.dtype)
    sizes = block_sizes.tpu(
        kind or _kind(where), m.d_model, m.vocab_size // where.shape["tensor"], frame.dtype,
        tied=True, train_head=c.train.trainable == "full",
    )  # fmt: skip
    block = min(sizes.tokens, -(-tokens // 128) * 128)
    return block * m.vocab_size // where.shape["tensor"] * block_sizes.kept_bytes(frame.dtype)


def _kind(where: Any) -> str:
    return where.devices.flat[0].device_kind if hasattr(where, "devices") else ""


def _batch(frame: Any, found: Rows, long: programs.Lengths) -> int:
    """All of a step's rows on a device: three int32 a position (four with shared prompts), and an
    index and more a token. Where rows are packed, completions' own arrays are on every device."""
    c = frame.config
    C, sides = layout.pad_length(long.completion), 2 if found.teacher else 1
    policy = not config_lib.traits(c).teacher or c.policy.weight > 0
    # Tokens and two masks; log-probabilities of what was sampled; mask and advantage of a policy.
    own = 6 + 4 * config_lib.traits(c).samples + 5 * policy
    positions = found.micros * found.micro_tokens
    if c.train.pack == "off":
        return 12 * positions + found.micros * found.count * (4 * sides + own) * C
    each = 16 if c.train.pack == "shared" else 12
    index = found.micros * found.tokens * 4 * (sides + 1)
    return each * positions + index + config_lib.completions_per_step(c) * own * C


# --- advice -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Choice:
    """A change of settings, in words and as a frame."""

    words: str
    frame: run_plan.ProgramPlan
    micro: int


def advice(
    frame: run_plan.ProgramPlan, target: hardware.Target, long: programs.Lengths, usable: float
) -> list[str]:
    """Up to three changes with which the model of memory fits, the smallest first."""
    phases = [name for name, *_ in programs.sampled_sections(frame.config, long)]
    phases += ["step"] if frame.config.train.steps else []
    out = []
    for choice in _choices(frame, target):
        need = [
            sum((parts(choice.frame, long, phase, micro=choice.micro, kind=_kind(frame.mesh)) or {})
                .values())
            for phase in phases
        ]  # fmt: skip
        if max(need) <= ROOM * usable:
            out.append(choice.words)
        if len(out) == ADVICE:
            break
    return out


def _choices(frame: run_plan.ProgramPlan, target: hardware.Target) -> Iterator[_Choice]:
    """On these devices first other meshes and micro-batches, then adapters, then more devices."""
    size, slices = frame.mesh.devices.size, target.slices
    yield from _meshes(frame, frame.config, size, slices, "")
    if frame.config.train.trainable == "full":
        config = _changed(frame.config, {"train.trainable": "lora"})
        yield from _meshes(frame, config, size, slices, "--config.train.trainable=lora ")
    if target.platform != "tpu":
        return
    table = hardware.TOPOLOGIES_2D if target.kind in ("v5e", "v6e") else hardware.TOPOLOGIES_3D
    per_chip = frame.mesh.devices.size // (int(np.prod(target.shape)) * target.slices)
    for count, topology in table.items():
        if count > int(np.prod(target.shape)) * target.slices:
            words = f"{target.kind}:{topology} with "
            yield from _meshes(frame, frame.config, count * per_chip, 1, words)


def _meshes(
    frame: run_plan.ProgramPlan, config: Any, devices: int, data: int, words: str
) -> Iterator[_Choice]:
    """Parameters split over all devices of a slice, of which there are `data`; batch over as many
    as it has completions for."""
    completions = config_lib.completions_per_step(config)
    for remat in dict.fromkeys((config.model.remat, "layer")):
        for tensor in (1, 2, 4, 8):
            fsdp = devices // (tensor * data)
            shards = fsdp * data
            if (
                devices % (tensor * data)
                or completions % shards
                or frame.model_config.n_heads % tensor
            ):
                continue
            where: Any = AbstractMesh((data, fsdp, tensor), sharding.AXES, (AxisType.Auto,) * 3)
            changed = _changed(config, {"model.remat": remat})
            told = f"{words}--config.mesh.data={data} --config.mesh.fsdp={fsdp}"
            told += f" --config.mesh.tensor={tensor}" if tensor > 1 else ""
            told += f" --config.model.remat={remat}" if remat != config.model.remat else ""
            other: Any = dataclasses.replace(frame, config=changed, mesh=where)
            long = programs.longest_texts(changed, frame.model_config)
            now = config.train.micro_batch or completions
            if config.train.micro_tokens:
                now = rows(other, long).count * shards
            for micro in reversed(micro_batches(config, shards)):
                if micro > now and micro != shards:
                    continue
                name, value = micro_setting(other, long, micro)
                more = "" if micro == now else f" --config.{name}={value}"
                yield _Choice(told + more, other, micro)


def _changed(config: Any, values: dict[str, Any]) -> Any:
    changed = config.copy_and_resolve_references()
    for name, value in values.items():
        section, _, key = name.partition(".")
        changed[section][key] = value
    return changed
