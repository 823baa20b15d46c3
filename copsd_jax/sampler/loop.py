"""The loop around the engine: fills slots, decodes, collects, refills, until all prompts are done.

A text depends on its key, its prompt, its settings and the weights: not on the number of slots, its
neighbours, its place in the list or the devices (beyond the rounding of products of other shapes).

Every decision follows from the arguments and from what was drawn, which each process gets whole:
on several processes all of them run this loop and call the same programs in the same order.
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
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from copsd_jax.attention import decode_attention
from copsd_jax.model import policy as policy_lib
from copsd_jax.model import transformer
from copsd_jax.runtime import sharding
from copsd_jax.sampler import engine, program_cache, prompt_packing, request
from copsd_jax.sampler.request import Inputs as Job


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled text; `ids` includes the token that ended it."""

    ids: tuple[int, ...]
    logps: np.ndarray  # float32 [C], under the tempered distribution
    logps_truncated: np.ndarray  # float32 [C], under the distribution drawn from
    finish: str  # 'stop' or 'length'


class Stats(NamedTuple):
    """How far a call is, and how well it keeps the device busy."""

    done: int  # completions
    total: int
    tokens: int  # drawn so far
    prompt_tokens: int  # run through the model by prefill
    occupancy: float  # share of slots that drew a token, while prompts were waiting; NaN for none
    seconds: float


class Result(NamedTuple):
    completions: list[Completion]  # in the order of the prompts
    stats: Stats


@dataclasses.dataclass
class _PartialCompletion:
    """A completion in the making."""

    parts: list[tuple] = dataclasses.field(default_factory=list)
    tail: bytes = b""  # the last bytes, for stop strings across tokens
    stopped: bool = False


def generate(
    decoder: transformer.Decoder,
    policy: policy_lib.Policy,
    prompts: Sequence[Sequence[int]],
    sampling: request.Sampling | Sequence[request.Sampling],
    *,
    keys: Any,
    settings: request.SamplerSettings = request.SamplerSettings(),  # noqa: B008 - frozen
    prefix: transformer.KV | None = None,
    vocabulary: request.Vocabulary | None = None,
    limits: Sequence[int] | None = None,
    progress: Callable[[Stats], None] | None = None,
    done: Callable[[int, Completion], None] | None = None,
) -> Result:
    """A completion for each prompt, in their order. Equal prompts share their prefill.

    Runs on the mesh of the surrounding `jax.set_mesh`, where the policy has to be.

    Args:
      prompts: token ids without the shared prefix, at least one each.
      sampling: one for all, or one for each prompt.
      keys: uint32 [n, 2] from `request.derive_keys`, one per prompt.
      settings: the sampler's size; slots are rounded up to a multiple of the mesh's batch shards.
      prefix: `shared_prefix.encode_ids` with the same policy.
      vocabulary: ids that may be drawn, and their bytes; None for all ids, without stop strings.
      limits: most tokens of each completion; None for its sampling's max_tokens.
      progress: called with what was reached after each look of the host.
      done: called with (index of the prompt, completion) as soon as it is complete.

    Raises:
      ValueError: in one sentence, for settings or prompts that cannot be served.
      MemoryError: if the cache cannot be made.
    """
    keys_n2 = np.asarray(jax.device_get(keys))
    each = [sampling] * len(prompts) if isinstance(sampling, request.Sampling) else list(sampling)
    if isinstance(sampling, request.Sampling) and not prompts:
        each = [sampling]  # checked all the same
    job = request.prepare_inputs(
        decoder, policy, prompts, each, keys_n2=keys_n2, settings=settings, prefix=prefix,
        vocabulary=vocabulary, limits=limits,
    )  # fmt: skip
    if not job.prompts:
        return Result([], Stats(0, 0, 0, 0, float("nan"), 0.0))
    with jax.set_mesh(job.mesh), _explain_memory_errors(job):
        return _sample_all(job, progress, done)


# --- programs ---------------------------------------------------------------------------------


def _sharding(job: Job, *axes: Any) -> Any:
    return NamedSharding(job.mesh, PartitionSpec(*axes))


def abstract_state(job: Job) -> engine.DecodeState:
    """A state as jax.ShapeDtypeStructs with shardings."""
    s = job.settings
    shape = jax.eval_shape(lambda: engine.init_state(job.decoder, s.slots, s.length, s.cache))
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(job, *spec)),
        shape, engine.partition_state(shape, job.mesh),
    )  # fmt: skip


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def _init_program(job: Job) -> program_cache.Program:
    s = job.settings
    static = (job.decoder, s.slots, s.length, np.dtype(s.cache))
    places = _shardings(abstract_state(job))
    return program_cache.get_program("empty cache", engine.init_state, static, (), None, places)


def _prefill_program(job: Job, packed: engine.PackedPrompts) -> program_cache.Program:
    head = decode_attention.find_mesh_axes(job.mesh, job.settings.slots, job.decoder.key_heads)[1]
    pair = _sharding(job, None, sharding.BATCH, head)
    width = packed.tokens_RT.shape[1]
    return program_cache.get_program(
        f"prefill {width}", engine.prefill, (job.decoder,), (job.weights, packed), None,
        transformer.Output(_sharding(job, sharding.BATCH), transformer.KV(pair, pair)),
    )  # fmt: skip


def _insert_program(job: Job, state, output, entry) -> program_cache.Program:
    width = output.hidden_BLD.shape[1]
    return program_cache.get_program(
        f"insert {width}", engine.insert, (), (state, output, entry), 0, _shardings(state)
    )


def _decode_program(job: Job, state, cancel_J, enough) -> program_cache.Program:
    whole = _sharding(job)  # on every device, so on every process
    return program_cache.get_program(
        f"decode {job.settings.slots} x {job.settings.length}", engine.decode,
        (job.decoder, job.form, job.settings.steps),
        (job.weights, state, cancel_J, enough), 4,
        (_shardings(state), engine.DecodeResult(whole, whole)),
    )  # fmt: skip


def compile_programs(job: Job, memory: int | None = None) -> tuple[program_cache.Program, ...]:
    """Compiles all that calls of this size need: nothing is compiled after it, and nothing is run.

    Arrays of the job may be jax.ShapeDtypeStructs with shardings.

    Args:
      memory: bytes of a device; None asks it.

    Raises:
      MemoryError: if they cannot fit the devices: which buffer is how large, and what would fit.
    """
    memory = _free_memory(job) if memory is None else memory
    check_memory(job, 0, memory)
    with jax.set_mesh(job.mesh), _explain_memory_errors(job):
        state = abstract_state(job)
        shards, slots = sharding.batch_shards(job.mesh), job.settings.slots
        made = [_init_program(job)]
        for width in job.buckets:
            packed = engine.PackedPrompts(*[_like(job, (shards, width), jnp.int32)] * 4)
            made.append(_prefill_program(job, packed))
            run = functools.partial(engine.prefill, job.decoder)
            shapes = jax.eval_shape(run, job.weights, packed)
            output = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                shapes, made[-1].call.output_shardings,
            )  # fmt: skip
            entry = jax.tree.map(
                lambda x: _like(job, x.shape, x.dtype),
                _pack_insertions(job, [[] for _ in range(shards)], slots // shards),
            )
            made.append(_insert_program(job, state, output, entry))
        cancel_J = jax.ShapeDtypeStruct((slots,), bool, sharding=_sharding(job))
        enough = jax.ShapeDtypeStruct((), jnp.int32, sharding=_sharding(job))
        made.append(_decode_program(job, state, cancel_J, enough))
        # The rows of one prefill wait for slots while the next is made.
        check_memory(job, max(one.temporary for one in made) + 2 * device_bytes(output), memory)
    return tuple(made)


@contextlib.contextmanager
def _explain_memory_errors(job: Job) -> Iterator[None]:
    """What a device or the compiler says when memory is short, with the sizes of the buffers."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        check_memory(job, 0, None)


def _like(job: Job, shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=_sharding(job, sharding.BATCH))


def _free_memory(job: Job) -> int:
    """Bytes of a device that others do not hold; of one that does not tell, more than any has."""
    stats = job.mesh.local_devices[0].memory_stats() or {}
    if job.mesh.devices.flat[0].platform == "cpu":
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return pages // jax.local_device_count()
    if "bytes_limit" not in stats:
        return sys.maxsize
    return stats["bytes_limit"] - max(0, stats.get("bytes_in_use", 0) - _weights(job))


def device_bytes(tree: Any) -> int:
    """Bytes on each device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _weights(job: Job) -> int:
    """Bytes of the weights on each device; those of `layers` share theirs with the others."""
    return device_bytes(job.weights._replace(layers=None))


def check_memory(job: Job, temporary: int, limit: int | None) -> None:
    """Refuses a sampler whose buffers do not fit a device of `limit` bytes; None refuses all.

    Args:
      temporary: bytes of the program that needs most besides weights and cache.

    Raises:
      MemoryError: in one sentence.
    """
    s, cache, held = job.settings, device_bytes(abstract_state(job)), _weights(job)
    if limit is not None and cache + held + temporary <= limit:
        return
    parts = {
        f"the cache ({s.slots} slots x {s.length} entries of {np.dtype(s.cache).name})": cache,
        "the weights": held,
        "what programs need while they run": temporary,
    }
    sizes = sorted(parts.items(), key=lambda part: -part[1])
    told = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in sizes)
    shards = sharding.batch_shards(job.mesh)
    fits = 0 if limit is None else (limit - held - temporary) // (cache * shards // s.slots)
    if limit is None:
        cure = f"slots={max(1, s.slots // 2)} halves the cache"
        cure += "" if np.dtype(s.cache) == np.int8 else ", cache=int8 makes it smaller"
    elif fits >= 1:
        cure = f"slots={fits * shards} makes it fit"
    else:
        cure = "no slot fits: a smaller length, cache=int8, or more devices along mesh.tensor"
    have = "" if limit is None else f", and it has {limit / 2**30:.2f} GiB"
    raise MemoryError(f"out of memory: on each device {told}{have}; {cure}")


# --- the loop ---------------------------------------------------------------------------------


class _Prefilled(NamedTuple):
    """A text whose prompt is prefilled."""

    row: int
    output: transformer.Output  # of the rows of all shards
    place: prompt_packing.Placement


class _Waiting:
    """Prompts and the texts that begin with them, those of equal prompts together."""

    def __init__(self, prompts: Sequence[tuple[int, ...]]):
        texts: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            texts.setdefault(prompt, []).append(row)
        self.groups = collections.deque(texts.items())
        self.texts = len(prompts)

    def take(self, wanted: int, width: int) -> list[tuple[tuple[int, ...], list[int]]]:
        """Groups of `wanted` texts or a little more, whose prompts fit a row; at least one."""
        candidates, texts = [], 0
        for prompt, rows in self.groups:
            if texts >= wanted:
                break
            candidates.append(prompt)
            texts += len(rows)
        taken = []
        for _ in range(max(1, prompt_packing.count_fitting(candidates, width))):
            taken.append(self.groups.popleft())
            self.texts -= len(taken[-1][1])
        return taken

    def back(self, prompt: tuple[int, ...], rows: list[int]) -> None:
        self.groups.appendleft((prompt, rows))
        self.texts += len(rows)


def _sample_all(job: Job, progress, done) -> Result:
    """Refill, decode, collect."""
    begun = time.perf_counter()
    slots, shards = job.settings.slots, sharding.batch_shards(job.mesh)
    waiting = _Waiting(job.prompts)
    ready: list[collections.deque[_Prefilled]] = [collections.deque() for _ in range(shards)]
    texts = {row: _PartialCompletion() for row in range(len(job.prompts))}
    completions: dict[int, Completion] = {}
    serving: dict[int, int] = {}  # slot -> row of its text
    cancel = np.zeros(slots, bool)  # slots that the host ended while they live on the device
    state = _make_state(job)
    tokens = prompt_tokens = drawn = possible = 0
    while waiting.texts or any(ready) or serving:
        state = _insert_prefilled(job, state, ready, serving)
        # Each prefill's texts go into their slots before the next: what waits ahead of a slot is
        # of one or two prefills, whatever the number of slots.
        while waiting.texts and len(serving) < slots:
            prompt_tokens += _prefill_row(job, waiting, ready, _list_free_slots(job, serving))
            state = _insert_prefilled(job, state, ready, serving)
        cancel[list(serving)] = False  # a new text came to life there
        more = bool(waiting.texts or any(ready))
        # While texts wait, the loop ends as soon as a sixteenth of the slots, or one, gets free.
        enough = max(1, len(serving) - max(1, slots // 16) + 1) if more else 1
        args = _to_devices(job, cancel), _to_devices(job, np.int32(enough))
        state, looked = _decode_program(job, state, *args).call(job.weights, state, *args)
        bits, steps = jax.device_get(looked)
        chunk = engine.unpack_tokens(bits)
        cancel[:] = False
        for slot, row in list(serving.items()):
            tokens += _append_tokens(job, texts[row], int(job.request.stop[row]), chunk, slot)
            if texts[row].stopped or not chunk.live_J[slot]:
                cancel[slot] = chunk.live_J[slot]
                del serving[slot]
                completions[row] = _finish(job, row, texts.pop(row))
                if done is not None:
                    done(row, completions[row])
        if more:
            drawn += int((chunk.token_JE >= 0).sum())
            possible += slots * int(steps)
        stats = Stats(
            len(completions), len(job.prompts), tokens, prompt_tokens,
            drawn / possible if possible else float("nan"), time.perf_counter() - begun,
        )  # fmt: skip
        if progress is not None:
            progress(stats)
    return Result([completions[row] for row in range(len(job.prompts))], stats)


def _make_state(job: Job) -> engine.DecodeState:
    """An empty state on the devices."""
    check_memory(job, 0, _free_memory(job))
    return _init_program(job).call()


def _list_free_slots(job: Job, serving: dict[int, int]) -> list[list[int]]:
    """The free slots of each shard."""
    shards = sharding.batch_shards(job.mesh)
    per = job.settings.slots // shards
    return [
        [slot for slot in range(r * per, (r + 1) * per) if slot not in serving]
        for r in range(shards)
    ]


def _to_devices(job: Job, x, *axes):
    return sharding.from_host(x, job.mesh, PartitionSpec(*axes))


def _prefill_row(job: Job, waiting: _Waiting, ready, free) -> int:
    """Prefills a row of prompts for every shard; the number of tokens.

    A shard takes as many as its free slots need, and those that it will need next, but no more than
    its share of what is left. One without a free slot takes some ahead if it has none: its row is
    paid for anyway.
    """
    shards, per = len(ready), job.settings.slots // len(ready)
    share = waiting.texts // shards
    taken: list[list] = [[] for _ in range(shards)]
    for r in sorted(range(shards), key=lambda r: -len(free[r])):
        need = len(free[r])
        wanted = max(need, min(need + per, share))
        if ready[r] or not wanted or not waiting.texts:
            continue
        for prompt, rows in waiting.take(wanted, job.settings.pack):
            # On one shard the samples of a prompt stay together, whatever their number.
            room = max(1, wanted - sum(len(rows) for _, rows in taken[r]))
            keep = rows if shards == 1 else rows[:room]
            if rows[len(keep) :]:
                waiting.back(prompt, rows[len(keep) :])
            taken[r].append((prompt, keep))
    sizes = [prompt_packing.count_tokens([prompt for prompt, _ in part]) for part in taken]
    width = next(size for size in job.buckets if size >= max(sizes))
    rows = [prompt_packing.pack_row([prompt for prompt, _ in part], width) for part in taken]
    packed = _to_devices(
        job, engine.PackedPrompts(*np.stack([row for row, _ in rows], axis=1)), sharding.BATCH
    )
    output = _prefill_program(job, packed).call(job.weights, packed)
    for r, part in enumerate(taken):
        for prompt, texts in part:
            ready[r].extend(_Prefilled(row, output, rows[r][1][prompt]) for row in texts)
    return sum(sizes)


def _insert_prefilled(job: Job, state, ready, serving: dict[int, int]):
    """Puts texts that are ready into free slots; notes them in `serving`."""
    shards, per, free = len(ready), job.settings.slots // len(ready), _list_free_slots(job, serving)
    outputs: dict[int, tuple[transformer.Output, list[list]]] = {}
    for r in range(shards):
        for slot in free[r][: len(ready[r])]:
            text = ready[r].popleft()
            serving[slot] = text.row
            parts = outputs.setdefault(id(text.output), (text.output, [[] for _ in range(shards)]))
            parts[1][r].append((slot - r * per, text))
    for output, parts in outputs.values():
        entry = _to_devices(job, _pack_insertions(job, parts, per), sharding.BATCH)
        state = _insert_program(job, state, output, entry).call(state, output, entry)
    return state


def _pack_insertions(job: Job, parts: list[list], per: int) -> engine.Insertion:
    """NumPy arrays of the (local slot, text) pairs of each shard.

    Prompts of 3 and 2 tokens in one row, for slots 4, 5 (both the first) and 7:
      slot 4 5 7    start 0 0 3    split 3 3 2    own 0 0 3    length 3 3 2
    """
    numbers = np.zeros((5, len(parts), per), np.int32)
    rows = np.zeros((len(parts), per), np.int32)  # whose settings; any where no text is
    for r, part in enumerate(parts):
        for i, (slot, text) in enumerate(part):
            numbers[:, r, i] = slot, *text.place, len(job.prompts[text.row])
            rows[r, i] = text.row
    request = jax.tree.map(lambda x: x[rows], job.request)
    count: Any = np.array([len(part) for part in parts], np.int32)
    slot, start, split, own, length = (part for part in numbers)
    return engine.Insertion(slot, start, split, own, length, request, count)  # pyright: ignore


def _append_tokens(
    job: Job, text: _PartialCompletion, stop_set: int, chunk: engine.DrawnTokens, slot: int
) -> int:
    """Appends what a chunk drew for a slot, up to the token that completes a stop string; how many
    tokens these are."""
    columns = np.flatnonzero(chunk.token_JE[slot] >= 0)
    stops = job.stops[stop_set]
    reach = max(map(len, stops), default=1) - 1
    for number, column in enumerate(columns if stops else ()):
        text.tail += job.vocabulary.token_bytes[int(chunk.token_JE[slot, column])]
        if any(stop in text.tail for stop in stops):
            text.stopped = True
            columns = columns[: number + 1]
            break
        text.tail = text.tail[max(0, len(text.tail) - reach) :]
    text.parts.append(
        tuple(x[slot, columns] for x in (chunk.token_JE, chunk.logp_JE, chunk.logp_truncated_JE))
    )
    return len(columns)


def _finish(job: Job, row: int, text: _PartialCompletion) -> Completion:
    ids, logps, logps_truncated = (np.concatenate(x) for x in zip(*text.parts, strict=True))
    ended = text.stopped or job.stop_XV[job.request.stop[row], ids[-1]]
    return Completion(
        ids=tuple(map(int, ids)), logps=logps, logps_truncated=logps_truncated,
        finish="stop" if ended else "length",
    )  # fmt: skip
