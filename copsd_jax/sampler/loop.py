"""The sampler's loop: fills slots, decodes, collects tokens and refills slots until all texts end.

A text depends on its key, its prompt, its settings and the weights. The number of slots, the other
texts, the text's index in the list, and the devices change the shapes of matrix products. Different
shapes affect a text only through rounding.

Every decision of the loop follows from the arguments and from the drawn tokens. Each process has
all arguments and tokens, so all processes call the same programs in the same order.
"""

import collections
import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from copsd_jax.attention import decode_attention
from copsd_jax.model import policy as policy_lib
from copsd_jax.model import transformer
from copsd_jax.runtime import sharding
from copsd_jax.sampler import engine, program_cache, prompt_packing, request

# The values of `Completion.finish` that mean that the tokens have been dropped. 'nonfinite': the
# logits contained NaN or +inf, or were all -inf. 'failed': a server gave no usable completion.
DROPPED = ("nonfinite", "failed")


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled text of C tokens."""

    ids: tuple[int, ...]  # C token ids, including the token that ended the text
    logps: np.ndarray  # float32 [C]: log-probabilities under the tempered distribution
    logps_truncated: np.ndarray  # float32 [C]: log-probabilities under the truncated distribution
    finish: str  # 'stop', 'length', or one of DROPPED
    detail: str = ""  # for 'failed', one readable line with the reason

    @property
    def dropped(self) -> bool:
        """Returns whether the completion is empty because its tokens could not be used."""
        return self.finish in DROPPED


class Stats(NamedTuple):
    """Progress of a sampler call, and how fully the call uses the slots."""

    done: int  # number of completions that have ended
    total: int  # number of completions in the call
    tokens: int  # number of tokens drawn so far
    prompt_tokens: int  # number of tokens that prefill ran through the model
    occupancy: float  # share of slots that drew a token while texts waited; NaN if no text waited
    seconds: float  # time since the start of the call


class Result(NamedTuple):
    """All completions of a call."""

    completions: list[Completion]  # in the order of the prompts
    stats: Stats


@dataclasses.dataclass
class _PartialCompletion:
    """The tokens that have been drawn for one text so far."""

    # `parts` has one list of arrays for each decode call.
    parts: list[list[np.ndarray]] = dataclasses.field(default_factory=list)
    tail: bytes = b""  # the last bytes of the text, for stop strings that span several tokens
    stopped: bool = False  # whether a stop string was found
    finite: bool = True  # whether all log-probabilities are finite


Progress = Callable[[Stats], None] | None
Done = Callable[[int, Completion], None] | None


def generate(
    decoder: transformer.Decoder, policy: policy_lib.Policy, prompts: Sequence[Sequence[int]],
    sampling: request.Sampling | Sequence[request.Sampling], *, keys: Any,
    settings: request.SamplerSettings = request.SamplerSettings(),  # noqa: B008 - frozen
    prefix: transformer.KV | None = None, vocabulary: request.Vocabulary | None = None,
    limits: Sequence[int] | None = None, progress: Progress = None, done: Done = None,
) -> Result:  # fmt: skip
    """Samples one completion for each prompt; equal prompts share their prefill.

    The sampler runs on the mesh of the surrounding `jax.set_mesh`; the policy must be on the same
    mesh.

    Args:
      decoder: the model.
      policy: the weights and adapter of the model.
      prompts: lists of token ids without the shared prefix; each list has at least one token.
      sampling: one `Sampling` for all prompts, or a list with one per prompt.
      keys: uint32 [n, 2] from `request.derive_sampling_keys`, one key per prompt.
      settings: the sampler's sizes; the number of slots is rounded up to a multiple of the number
        of batch shards.
      prefix: keys and values of the tokens that all prompts begin with; must be computed by
        `shared_prefix.encode_prefix_ids` with the same policy.
      vocabulary: ids that may be drawn, and their bytes; None allows all ids, but then stop strings
        cannot be used.
      limits: maximum number of tokens of each completion; None means `Sampling.max_tokens`.
      progress: called with the statistics after each decode call.
      done: called with (index of the prompt, completion) as soon as the completion has ended.

    Returns:
      The completions in the order of the prompts, and statistics.

    Raises:
      ValueError: the sampler does not support the settings or prompts.
      MemoryError: the cache does not fit into the devices' memory.
    """
    inputs = request.prepare_sampler_inputs(
        decoder, policy, prompts, sampling, keys_n2=keys, settings=settings, prefix=prefix,
        vocabulary=vocabulary, limits=limits,
    )  # fmt: skip
    if not inputs.prompts:
        return Result([], Stats(0, 0, 0, 0, float("nan"), 0.0))
    with jax.set_mesh(inputs.mesh), _explain_memory_errors(inputs):
        return _sample_all(inputs, progress, done)


# --- the loop ---------------------------------------------------------------------------------


class _Prefilled(NamedTuple):
    """A text whose prompt has been prefilled."""

    row: int  # index of the text in the call
    output: transformer.Output  # result of `prefill` for the packed rows of all shards
    place: prompt_packing.Placement  # location of the prompt in its shard's packed row


_Queues = list[collections.deque[_Prefilled]]  # one queue per shard


class _Waiting:
    """A queue of distinct prompts, each with the indices of all texts that have this prompt."""

    def __init__(self, prompts: Sequence[tuple[int, ...]]):
        texts: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            texts.setdefault(prompt, []).append(row)
        self.groups = collections.deque(texts.items())
        self.texts = len(prompts)

    def take(self, wanted: int, width: int) -> list[tuple[tuple[int, ...], list[int]]]:
        """Removes and returns prompts for `wanted` texts, but no more than fit in one row."""
        candidates, texts = [], 0
        for prompt, rows in self.groups:
            if texts >= wanted:
                break
            candidates.append(prompt)
            texts += len(rows)
        fitting = max(1, prompt_packing.count_fitting(candidates, width))
        taken = [self.groups.popleft() for _ in range(fitting)]
        self.texts -= sum(len(rows) for _, rows in taken)
        return taken

    def put_back(self, prompt: tuple[int, ...], rows: list[int]) -> None:
        """Puts texts of a prompt back at the front of the queue."""
        self.groups.appendleft((prompt, rows))
        self.texts += len(rows)


def _sample_all(inputs: request.Inputs, progress: Progress, done: Done) -> Result:
    started = time.perf_counter()
    slots, shards = inputs.settings.slots, sharding.batch_shards(inputs.mesh)
    check_memory(inputs, 0, _count_memory_for_slots(inputs))
    state = _init_program(inputs).call()
    waiting = _Waiting(inputs.prompts)
    prefilled: _Queues = [collections.deque() for _ in range(shards)]
    texts = {row: _PartialCompletion() for row in range(len(inputs.prompts))}
    completions: dict[int, Completion] = {}
    serving: dict[int, int] = {}  # slot -> index of the text in this slot
    cancel = np.zeros(slots, bool)  # marks the live slots that the next decode call must free
    tokens = prompt_tokens = busy = possible = 0
    while waiting.texts or any(prefilled) or serving:
        state = _insert_prefilled(inputs, state, prefilled, serving)
        # Texts are inserted into their slots before the next prefill. Therefore, at most two
        # prefill results are in memory at a time, no matter how many slots there are.
        while waiting.texts and len(serving) < slots:
            prompt_tokens += _prefill_row(inputs, waiting, prefilled, serving)
            state = _insert_prefilled(inputs, state, prefilled, serving)
        cancel[list(serving)] = False  # these slots now hold new texts
        more = bool(waiting.texts or any(prefilled))
        # While texts wait, a decode call ends once max(1, slots // 16) texts have ended.
        enough = max(1, len(serving) - max(1, slots // 16) + 1) if more else 1
        args = _to_devices(inputs, (cancel, np.int32(enough)))
        state, result = _decode_program(inputs, state, *args).call(inputs.constants, state, *args)
        packed_JX, steps = jax.device_get(result)  # device_get waits for the device
        drawn = engine.unpack_tokens(packed_JX)
        cancel[:] = False
        for slot, row in list(serving.items()):
            tokens += _append_drawn_tokens(inputs, row, texts[row], drawn, slot)
            if texts[row].stopped or not drawn.live_J[slot]:
                cancel[slot] = drawn.live_J[slot]
                del serving[slot]
                completions[row] = _finish_completion(inputs, row, texts.pop(row))
                if done is not None:
                    done(row, completions[row])
        if more:
            busy += int((drawn.token_JE >= 0).sum())
            possible += slots * int(steps)
        stats = Stats(
            len(completions), len(inputs.prompts), tokens, prompt_tokens,
            busy / possible if possible else float("nan"), time.perf_counter() - started,
        )  # fmt: skip
        if progress is not None:
            progress(stats)
    return Result([completions[row] for row in range(len(inputs.prompts))], stats)


def _list_free_slots(slots: int, shards: int, serving: dict[int, int]) -> list[list[int]]:
    """Lists the free slots of each shard; a shard has `slots // shards` slots in all."""
    parts = np.arange(slots).reshape(shards, -1).tolist()
    return [[slot for slot in part if slot not in serving] for part in parts]


def _to_devices(inputs: request.Inputs, x: Any, *axes: Any) -> Any:
    return sharding.shard_tree(x, inputs.mesh, PartitionSpec(*axes))


def _prefill_row(
    inputs: request.Inputs, waiting: _Waiting, prefilled: _Queues, serving: dict[int, int]
) -> int:
    """Runs prefill on one row of prompts per shard; returns the number of tokens in all rows.

    A shard takes texts for its free slots. A shard also takes texts in advance, as long as it
    takes no more than its share of the waiting texts. Prefill computes a row for every shard, even
    if the row is empty. Therefore, even a shard without free slots takes texts, unless the shard
    still has prefilled texts.
    """
    slots, shards = inputs.settings.slots, len(prefilled)
    free = _list_free_slots(slots, shards, serving)
    share = waiting.texts // shards
    taken: list[list] = [[] for _ in range(shards)]
    for r in sorted(range(shards), key=lambda r: -len(free[r])):
        need = len(free[r])
        wanted = max(need, min(need + slots // shards, share))
        if prefilled[r] or not wanted or not waiting.texts:
            continue
        for prompt, rows in waiting.take(wanted, inputs.settings.pack):
            # With a single shard, all samples of a prompt share one prefill, even if there are more
            # than `wanted` samples.
            room = max(1, wanted - sum(len(rows) for _, rows in taken[r]))
            keep = rows if shards == 1 else rows[:room]
            if rows[len(keep) :]:
                waiting.put_back(prompt, rows[len(keep) :])
            taken[r].append((prompt, keep))
    prompts = [[prompt for prompt, _ in part] for part in taken]
    sizes = [prompt_packing.count_tokens(part) for part in prompts]
    width = next(size for size in inputs.buckets if size >= max(sizes))
    packed, places = _pack_prompts(prompts, width)
    packed = _to_devices(inputs, packed, sharding.BATCH_AXES)
    output = _prefill_program(inputs, packed).call(inputs.constants, packed)
    for r, part in enumerate(taken):
        for prompt, texts in part:
            prefilled[r].extend(_Prefilled(row, output, places[r][prompt]) for row in texts)
    return sum(sizes)


def _pack_prompts(parts: list[list[tuple[int, ...]]], width: int) -> tuple[Any, tuple]:
    """Returns packed prompts as NumPy arrays [R, width], and each shard's placements."""
    packed = [prompt_packing.pack_row(part, width) for part in parts]
    rows, places = zip(*packed, strict=True)
    return engine.PackedPrompts(*np.stack(rows, axis=1)), places


def _insert_prefilled(
    inputs: request.Inputs, state: engine.DecodeState, prefilled: _Queues, serving: dict[int, int]
) -> engine.DecodeState:
    """Puts prefilled texts into free slots and records them in `serving`; returns the new state."""
    slots, shards = inputs.settings.slots, len(prefilled)
    per, free = slots // shards, _list_free_slots(slots, shards, serving)
    outputs: dict[int, tuple[transformer.Output, list[list]]] = {}
    for r in range(shards):
        for slot in free[r][: len(prefilled[r])]:
            text = prefilled[r].popleft()
            serving[slot] = text.row
            parts = outputs.setdefault(id(text.output), (text.output, [[] for _ in range(shards)]))
            parts[1][r].append((slot - r * per, text))
    for output, parts in outputs.values():
        insertion = _to_devices(inputs, _pack_insertions(inputs, parts, per), sharding.BATCH_AXES)
        state = _insert_program(inputs, state, output, insertion).call(state, output, insertion)
    return state


def _pack_insertions(inputs: request.Inputs, parts: list[list], per: int) -> engine.Insertion:
    """Builds NumPy arrays from each shard's pairs (slot in the shard, text).

    Suppose, for example, that a row has two prompts. The prompt of 3 tokens goes into slots 4 and
    5, and the prompt of 2 tokens goes into slot 7:

        slot 4 5 7    start 0 0 3    split 3 3 2    own 0 0 3    length 3 3 2
    """
    numbers = np.zeros((5, len(parts), per), np.int32)
    rows = np.zeros((len(parts), per), np.int32)  # index of each text in the call; 0 at padding
    for r, part in enumerate(parts):
        for i, (slot, text) in enumerate(part):
            numbers[:, r, i] = slot, *text.place, len(inputs.prompts[text.row])
            rows[r, i] = text.row
    request = jax.tree.map(lambda x: x[rows], inputs.request)
    fields: list[Any] = [*numbers, request, np.array([len(part) for part in parts], np.int32)]
    return engine.Insertion(*fields)


def _append_drawn_tokens(
    inputs: request.Inputs, row: int, text: _PartialCompletion, drawn: engine.DrawnTokens, slot: int
) -> int:
    """Appends a slot's new tokens, up to the end of a stop string; returns how many it appends."""
    columns = np.flatnonzero(drawn.token_JE[slot] >= 0)
    end, text.tail = request.find_stop_string(
        text.tail, drawn.token_JE[slot, columns].tolist(),
        inputs.stops[int(inputs.request.stop[row])], inputs.vocabulary.token_bytes,
    )  # fmt: skip
    text.stopped = end is not None
    text.finite = bool(np.isfinite(drawn.logp_JE[slot, columns[:end]]).all())
    text.parts.append([x[slot, columns[:end]] for x in drawn[:3]])
    return len(columns[:end])


def drop_tokens(finish: str = "nonfinite", detail: str = "") -> Completion:
    """Returns an empty completion, which replaces a completion that cannot be used."""
    none = np.zeros(0, np.float32)
    return Completion((), none, none, finish, detail)


def _finish_completion(inputs: request.Inputs, row: int, text: _PartialCompletion) -> Completion:
    if not text.finite:
        return drop_tokens()
    ids, logps, logps_truncated = (np.concatenate(x) for x in zip(*text.parts, strict=True))
    ended = text.stopped or inputs.stop_XV[inputs.request.stop[row], ids[-1]]
    return Completion(
        ids=tuple(map(int, ids)), logps=logps, logps_truncated=logps_truncated,
        finish="stop" if ended else "length",
    )  # fmt: skip


# --- programs and memory ----------------------------------------------------------------------


def _sharding(inputs: request.Inputs, *axes: Any) -> Any:
    return NamedSharding(inputs.mesh, PartitionSpec(*axes))


def _to_abstract(inputs: request.Inputs, x: Any, *axes: Any) -> Any:
    return sharding.to_abstract(x, inputs.mesh, PartitionSpec(*axes))


def abstract_state(inputs: request.Inputs) -> engine.DecodeState:
    """Returns the decode state as jax.ShapeDtypeStructs with shardings."""
    s = inputs.settings
    shape = jax.eval_shape(
        lambda: engine.init_slot_state(inputs.decoder, s.slots, s.length, s.cache)
    )
    specs = engine.partition_state(shape, inputs.mesh)
    return jax.tree.map(lambda x, spec: _to_abstract(inputs, x, *spec), shape, specs)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def _init_program(inputs: request.Inputs) -> program_cache.Program:
    s = inputs.settings
    static = (inputs.decoder, s.slots, s.length, np.dtype(s.cache))
    places = _shardings(abstract_state(inputs))
    return program_cache.get_program("empty cache", engine.init_slot_state, static, (), (), places)


def _prefill_program(inputs: request.Inputs, packed: engine.PackedPrompts) -> program_cache.Program:
    slots, key_heads = inputs.settings.slots, inputs.decoder.key_heads
    head = decode_attention.find_mesh_axes(inputs.mesh, slots, key_heads)[1]
    pair = _sharding(inputs, None, sharding.BATCH_AXES, head)
    width = packed.tokens_RT.shape[1]
    return program_cache.get_program(
        f"prefill {width}", engine.prefill, (inputs.decoder,), (inputs.constants, packed), (),
        transformer.Output(_sharding(inputs, sharding.BATCH_AXES), transformer.KV(pair, pair)),
    )  # fmt: skip


def _insert_program(inputs: request.Inputs, state, output, entry) -> program_cache.Program:
    width = output.hidden_BLD.shape[1]
    return program_cache.get_program(
        f"insert {width}", engine.insert, (), (state, output, entry), (0,), _shardings(state)
    )


def _decode_program(inputs: request.Inputs, state, cancel_J, enough) -> program_cache.Program:
    whole = _sharding(inputs)  # replicated on every device, so that every process can read it
    return program_cache.get_program(
        f"decode {inputs.settings.slots} x {inputs.settings.length}", engine.decode,
        (inputs.decoder, inputs.features, inputs.settings.steps),
        (inputs.constants, state, cancel_J, enough), (4,),
        (_shardings(state), engine.DecodeResult(whole, whole)),
    )  # fmt: skip


def compile_programs(
    inputs: request.Inputs, memory: int | None = None
) -> tuple[program_cache.Program, ...]:
    """Compiles and returns all programs for sampler calls of this size; runs no program.

    Args:
      inputs: the inputs of a call; arrays may be jax.ShapeDtypeStructs with shardings.
      memory: memory per device, in bytes; None means the memory that is available on the device.

    Raises:
      MemoryError: the buffers do not fit; the message states the buffers' sizes and a setting to
        change.
    """
    memory = _count_memory_for_slots(inputs) if memory is None else memory
    check_memory(inputs, 0, memory)
    with jax.set_mesh(inputs.mesh), _explain_memory_errors(inputs):
        state = abstract_state(inputs)
        shards, slots = sharding.batch_shards(inputs.mesh), inputs.settings.slots
        programs = [_init_program(inputs)]
        for width in inputs.buckets:
            packed, _ = _pack_prompts([[]] * shards, width)
            packed = _to_abstract(inputs, packed, sharding.BATCH_AXES)
            programs.append(_prefill_program(inputs, packed))
            run = functools.partial(engine.prefill, inputs.decoder)
            output = sharding.to_abstract(
                jax.eval_shape(run, inputs.constants, packed), inputs.mesh,
                programs[-1].call.output_shardings,
            )  # fmt: skip
            entry = _pack_insertions(inputs, [[]] * shards, slots // shards)
            entry = _to_abstract(inputs, entry, sharding.BATCH_AXES)
            programs.append(_insert_program(inputs, state, output, entry))
        args = _to_abstract(inputs, (np.zeros(slots, bool), np.int32(0)))
        programs.append(_decode_program(inputs, state, *args))
        # Two prefill results are counted, because one result waits for free slots while the next
        # result is computed.
        temporary = max(program.temporary for program in programs)
        temporary += 2 * sharding.count_device_bytes(output)
        check_memory(inputs, temporary, memory)
    return tuple(programs)


@contextlib.contextmanager
def _explain_memory_errors(inputs: request.Inputs) -> Iterator[None]:
    """Replaces JAX's out-of-memory error with a MemoryError that states the buffers' sizes."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        check_memory(inputs, 0, None)


def _count_memory_for_slots(inputs: request.Inputs) -> int:
    """Returns the number of bytes per device that the sampler may use; sys.maxsize if unknown."""
    stats = inputs.mesh.local_devices[0].memory_stats() or {}
    if sharding.platform(inputs.mesh) == "cpu":
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return pages // jax.local_device_count()
    if "bytes_limit" not in stats:
        return sys.maxsize
    return stats["bytes_limit"] - max(0, stats.get("bytes_in_use", 0) - _constant_bytes(inputs))


def _constant_bytes(inputs: request.Inputs) -> int:
    """Returns the bytes of weights and prefix per device; `layers` uses no memory of its own."""
    return sharding.count_device_bytes(inputs.constants._replace(layers=None))


def check_memory(inputs: request.Inputs, temporary: int, limit: int | None) -> None:
    """Checks that the sampler's buffers fit into the memory of a device.

    Args:
      inputs: the inputs of the call, which determine the sizes of cache and weights.
      temporary: number of bytes that the most demanding program needs besides weights and cache.
      limit: memory per device, in bytes; with None, the function always raises MemoryError.

    Raises:
      MemoryError: the buffers do not fit; the message states the buffers' sizes and the setting to
        change.
    """
    s, cache, held = (
        inputs.settings,
        sharding.count_device_bytes(abstract_state(inputs)),
        _constant_bytes(inputs),
    )
    if limit is not None and cache + held + temporary <= limit:
        return
    parts = {
        f"the cache ({s.slots} slots x {s.length} entries of {np.dtype(s.cache).name})": cache,
        "the weights": held,
        "what programs need while they run": temporary,
    }
    sizes = sorted(parts.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{size / 2**30:.2f} GiB for {name}" for name, size in sizes)
    shards = sharding.batch_shards(inputs.mesh)
    fits = 0 if limit is None else (limit - held - temporary) // (cache * shards // s.slots)
    if limit is None:
        cure = f"slots={max(1, s.slots // 2)} halves the cache"
        cure += "" if np.dtype(s.cache) == np.int8 else ", cache=int8 makes it smaller"
    elif fits >= 1:
        cure = f"slots={fits * shards} makes it fit"
    else:
        cure = "no slot fits: use a smaller length, cache=int8, or more devices along mesh.tensor"
    available = "" if limit is None else f", but has only {limit / 2**30:.2f} GiB"
    raise MemoryError(f"out of memory: each device needs {listed}{available}; {cure}")
