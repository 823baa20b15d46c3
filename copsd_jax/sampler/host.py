"""The loop around the engine: fills slots, decodes, collects, refills, until all prompts are done.

A text depends on its key, its prompt, the weights and the sampling settings: not on the number of
slots, its neighbours or its place in the list (beyond the rounding of products of other shapes).
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from copsd_jax import model
from copsd_jax.sampler import engine, truncate

PURPOSES = {"rollout": 0, "evaluation": 1, "author": 2}
PACK = 512  # tokens of a packed prefill, where prompts are not longer
SMALLEST_PACK = 128  # packs are powers of two from here: few programs to compile


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are drawn and what ends them."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()  # strings; a completion ends with the token that completes one


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled text; `ids` includes the token that ended it."""

    ids: tuple[int, ...]
    logps: np.ndarray  # float32 [C], under the tempered distribution
    logps_truncated: np.ndarray  # float32 [C], under the distribution drawn from
    finish: str  # 'stop' or 'length'


def stream_keys(
    seed: int, purpose: str, step: int, row_ids: Sequence[str], samples: Sequence[int]
) -> jax.Array:
    """Threefry key data, uint32 [n, 2]: seed, purpose, step, row id and sample folded in, in turn.

    The engine folds in the token's index. A row id counts by the first 64 bits of its SHA-256.

    Raises:
      ValueError: for an unknown purpose, naming the choices, or lists of unequal lengths.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"purpose is {purpose!r}: the choices are {', '.join(PURPOSES)}")
    if len(row_ids) != len(samples):
        raise ValueError(f"{len(row_ids)} row ids for {len(samples)} samples: give one each")
    digests = [hashlib.sha256(row.encode()).digest()[:8] for row in row_ids]
    words_n2 = np.frombuffer(b"".join(digests), ">u4").astype(np.uint32).reshape(-1, 2)
    root = jax.random.key(seed, impl="threefry2x32")
    for word in (PURPOSES[purpose], step):
        root = jax.random.fold_in(root, word)
    return _row_keys(root, jnp.asarray(words_n2), jnp.asarray(samples, jnp.uint32))


@jax.jit
def _row_keys(root: jax.Array, words_n2: jax.Array, samples_n: jax.Array) -> jax.Array:
    def one(words, sample):
        key = jax.random.fold_in(jax.random.fold_in(root, words[0]), words[1])
        return jax.random.key_data(jax.random.fold_in(key, sample))

    return jax.vmap(one)(words_n2, samples_n)


def bucket(length: int) -> int:
    """The smallest of 32, 48, 64, 96, 128, 192, … that holds `length`: at most half is waste."""
    size = 32
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


@dataclasses.dataclass
class _Text:
    """A completion in the making."""

    ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    logps_truncated: list[float] = dataclasses.field(default_factory=list)
    tail: bytes = b""  # the last bytes, for stop strings across tokens
    stopped: bool = False


@dataclasses.dataclass(frozen=True)
class _Job:
    """All that one call of `generate` needs and does not change."""

    decoder: model.Decoder
    weights: engine.Weights
    settings: engine.Settings
    prompts: Sequence[tuple[int, ...]]
    keys_n2: np.ndarray
    limits: Sequence[int]
    stops: tuple[bytes, ...]
    token_bytes: Sequence[bytes]
    stop_V: np.ndarray
    window: int  # cache entries copied per prompt


def generate(
    decoder: model.Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    keys: Any,
    prefix: model.KV | None = None,
    adapter: Any = None,
    adapter_scale: float = 1.0,
    slots: int = 32,
    valid_V: Any = None,
    token_bytes: Sequence[bytes] | None = None,
    limits: Sequence[int] | None = None,
    steps: int = 16,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[Completion]:
    """A completion for each prompt, in their order. Equal prompts share their prefill.

    Args:
      prompts: token ids without the shared prefix, at least one each.
      keys: uint32 [n, 2] from `stream_keys`, one per prompt.
      prefix: `engine.encode_prefix` with the same params and adapter.
      slots: rows decoded at once; a short list of prompts takes the next power of two instead.
      valid_V: bool [V], ids that may be drawn; None for all.
      token_bytes: the bytes of each id, needed for stop strings.
      limits: most tokens of each completion; None for sampling.max_tokens each.
      steps: tokens per slot between two looks of the host.
      progress: called with (completions done, of how many, tokens so far) after each look.

    Raises:
      ValueError: in one sentence, for settings or prompts that cannot be served.
    """
    prompts = [tuple(prompt) for prompt in prompts]
    limits = [sampling.max_tokens] * len(prompts) if limits is None else list(limits)
    keys_n2 = np.asarray(jax.device_get(keys))
    valid = np.ones(decoder.config.vocab_size, bool) if valid_V is None else np.asarray(valid_V)
    shared = 0 if prefix is None else prefix.k.shape[2]
    _check_settings(decoder.config, sampling, slots, steps, valid, token_bytes)
    _check_prompts(decoder.config, prompts, keys_n2, limits, shared)
    if not prompts:
        return []
    stops = tuple(text.encode() for text in sampling.stop)
    stop_V = _stop_table(sampling.stop_ids, stops, token_bytes or (), len(valid))
    job = _Job(
        decoder=decoder,
        weights=engine.Weights(
            params,
            adapter,
            prefix,
            # No mask at all where it would change nothing: it costs a pass over the logits.
            None if valid.all() else jax.device_put(valid),
            jax.device_put(stop_V),
            adapter_scale,
        ),
        settings=engine.Settings(
            steps, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
        ),
        prompts=prompts, keys_n2=keys_n2, limits=limits, stops=stops,
        token_bytes=token_bytes or (), stop_V=stop_V, window=bucket(max(map(len, prompts))),
    )  # fmt: skip
    texts = _run(job, min(slots, 1 << (len(prompts) - 1).bit_length()), progress)
    return [_completion(job, text) for text in texts]


def _run(job: _Job, slots: int, progress: Callable[[int, int, int], None] | None) -> list[_Text]:
    """The loop: refill, decode, collect."""
    # Equal prompts next to one another, so that they are likely to be filled together.
    first = {prompt: i for i, prompt in reversed(list(enumerate(job.prompts)))}
    order = sorted(range(len(job.prompts)), key=lambda row: (first[job.prompts[row]], row))
    queue = collections.deque(order)
    texts = [_Text() for _ in job.prompts]
    rows: dict[int, int] = {}  # slot -> the prompt it serves
    cancel = np.zeros(slots, bool)  # slots that the host ended while they live on the device
    length = -(-(job.window + max(job.limits)) // 32) * 32
    state = engine.empty(job.decoder, slots, length)
    while queue or rows:
        free = [slot for slot in range(slots) if slot not in rows]
        placed = [(slot, queue.popleft()) for slot in free[: len(queue)]]
        for pack in _packs(job, placed):
            state = _fill(job, state, pack)
        rows.update(placed)
        cancel[list(rows)] = False  # a new text came to life there
        # While prompts wait, the loop ends as soon as an eighth of the slots are free.
        enough = slots - max(1, slots // 8) + 1 if queue else 1
        state, chunk = engine.decode(
            job.decoder, job.settings, job.weights, state,
            jax.device_put(cancel), jax.device_put(np.int32(enough)),
        )  # fmt: skip
        chunk = jax.device_get(chunk)
        cancel[:] = False
        for slot, row in list(rows.items()):
            _collect(job, texts[row], chunk, slot)
            if texts[row].stopped or not chunk.live_J[slot]:
                cancel[slot] = chunk.live_J[slot]
                del rows[slot]
        if progress is not None:
            done = len(job.prompts) - len(queue) - len(rows)
            progress(done, len(job.prompts), sum(len(text.ids) for text in texts))
    return texts


def _packs(job: _Job, placed: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Splits (slot, row) pairs so that the distinct prompts of each part fit one packed row."""
    packs: list[list[tuple[int, int]]] = []
    inside: set[tuple[int, ...]] = set()
    used = 0
    for slot, row in placed:
        prompt = job.prompts[row]
        if prompt not in inside:
            if not packs or used + len(prompt) > PACK:
                packs.append([])
                inside, used = set(), 0
            inside.add(prompt)
            used += len(prompt)
        packs[-1].append((slot, row))
    return packs


def _fill(job: _Job, state: engine.State, pack: Sequence[tuple[int, int]]) -> engine.State:
    """Prefills a pack's distinct prompts and inserts all its texts.

    Prompts of 3 and 2 tokens for slots 4, 5 (both the first) and 7:
      tokens a b c d e · · ·     index 0 1 2 0 1 0 0 0     segments 1 1 1 2 2 0 0 0
      slot 4 5 7    start 0 0 3    length 3 3 2
    """
    starts: dict[tuple[int, ...], int] = {}
    total = 0
    for _, row in pack:
        if job.prompts[row] not in starts:
            starts[job.prompts[row]] = total
            total += len(job.prompts[row])
    width = max(SMALLEST_PACK, 1 << (total - 1).bit_length())
    tokens, index, segments = np.zeros((3, 1, width), np.int32)
    for number, (prompt, start) in enumerate(starts.items(), 1):
        part = slice(start, start + len(prompt))
        tokens[0, part], index[0, part], segments[0, part] = prompt, range(len(prompt)), number
    output = engine.prefill(job.decoder, job.weights, *jax.device_put((tokens, index, segments)))
    slots = state.slots.live_J.shape[0]
    slot_I, start_I, length_I, limit_I = np.zeros((4, slots), np.int32)
    key_I2 = np.zeros((slots, 2), np.uint32)
    for i, (slot, row) in enumerate(pack):
        prompt = job.prompts[row]
        slot_I[i], start_I[i], length_I[i] = slot, starts[prompt], len(prompt)
        limit_I[i], key_I2[i] = job.limits[row], job.keys_n2[row]
    entry = jax.device_put(engine.Entry(slot_I, start_I, length_I, limit_I, key_I2))  # pyright: ignore
    count = jax.device_put(np.int32(len(pack)))
    return engine.insert(state, output, entry, count, window=job.window)


def _collect(job: _Job, text: _Text, chunk: engine.Chunk, slot: int) -> None:
    """Appends what a chunk drew for a slot, up to the token that completes a stop string."""
    reach = max(map(len, job.stops), default=1) - 1
    for column in np.flatnonzero(chunk.token_JE[slot] >= 0):
        token = int(chunk.token_JE[slot, column])
        text.ids.append(token)
        text.logps.append(float(chunk.logp_JE[slot, column]))
        text.logps_truncated.append(float(chunk.logp_truncated_JE[slot, column]))
        if job.stops:
            text.tail += job.token_bytes[token]
            if any(stop in text.tail for stop in job.stops):
                text.stopped = True
                return
            text.tail = text.tail[max(0, len(text.tail) - reach) :]


def _completion(job: _Job, text: _Text) -> Completion:
    ended = text.stopped or job.stop_V[text.ids[-1]]
    return Completion(
        ids=tuple(text.ids),
        logps=np.asarray(text.logps, np.float32),
        logps_truncated=np.asarray(text.logps_truncated, np.float32),
        finish="stop" if ended else "length",
    )


def _stop_table(
    stop_ids: Sequence[int], stops: Sequence[bytes], token_bytes: Sequence[bytes], vocab: int
) -> np.ndarray:
    """bool [V]: ids that end a text by themselves, stop strings within one token included."""
    table = np.zeros(vocab, bool)
    table[list(stop_ids)] = True
    if stops:
        inside = [any(stop in piece for stop in stops) for piece in token_bytes]
        table[: len(inside)] |= inside
    return table


def _check_settings(config, sampling: Sampling, slots, steps, valid_V, token_bytes) -> None:
    vocab = config.vocab_size
    truncate.check(
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, vocab_size=vocab
    )
    for name, value in (("max_tokens", sampling.max_tokens), ("slots", slots), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} is {value!r}: it must be at least 1")
    for token in sampling.stop_ids:
        if not 0 <= token < vocab:
            raise ValueError(f"stop_ids has {token}: the model has the ids 0 to {vocab - 1}")
    if valid_V.shape != (vocab,) or not valid_V.any():
        raise ValueError(
            f"valid_V has shape {valid_V.shape} and {int(valid_V.sum())} ids: it must have shape "
            f"({vocab},) and at least one id"
        )
    if "" in sampling.stop:
        raise ValueError(f"stop is {sampling.stop!r}: a stop string must not be empty")
    if sampling.stop and token_bytes is None:
        raise ValueError(f"stop is {sampling.stop!r}: stop strings need token_bytes")
    if sampling.stop and (len(token_bytes) > vocab or valid_V[len(token_bytes) :].any()):
        raise ValueError(
            f"token_bytes has {len(token_bytes)} entries: it must have one for each valid id and "
            f"at most {vocab}"
        )


def _check_prompts(config, prompts, keys_n2: np.ndarray, limits, shared: int) -> None:
    if keys_n2.shape != (len(prompts), 2) or keys_n2.dtype != np.uint32:
        raise ValueError(
            f"keys are {keys_n2.dtype} {keys_n2.shape}: they must be uint32 ({len(prompts)}, 2), "
            "one for each prompt"
        )
    if len(limits) != len(prompts):
        raise ValueError(f"limits has {len(limits)} entries for {len(prompts)} prompts")
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if limit < 1:
            raise ValueError(f"limits[{i}] is {limit}: a completion has at least 1 token")
        if not prompt:
            raise ValueError(f"prompt {i} is empty: it must have at least one token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(
                f"prompt {i} has ids {min(prompt)} to {max(prompt)}: the model has the ids 0 to "
                f"{config.vocab_size - 1}"
            )
        if shared + len(prompt) + limit > config.max_position:
            raise ValueError(
                f"prompt {i} has {shared + len(prompt)} tokens (shared prefix {shared}) and may "
                f"get {limit} more: the model has {config.max_position} positions"
            )
