"""What is asked of the sampler: prompts, settings and random streams, checked before it starts."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from copsd_jax.attention import decode_attention
from copsd_jax.model import policy as policy_lib
from copsd_jax.model import transformer
from copsd_jax.runtime import sharding
from copsd_jax.sampler import engine, prompt_packing, truncation

PURPOSES = {"rollout": 0, "evaluation": 1, "author": 2}
STOP_SETS = 4  # sets of stop ids that a program holds at least


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The ids of a model as its tokenizer uses them.

    Attributes:
      valid_V: bool, the ids that the tokenizer has, which alone may be drawn.
      token_bytes: the bytes of each id; stop strings need those of every valid id.
      stop_ids: the ids that end a text. The sampler reads those of `Sampling`, not these.
    """

    valid_V: np.ndarray
    token_bytes: Sequence[bytes] = ()
    stop_ids: tuple[int, ...] = ()


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
class SamplerSettings:
    """The size of a sampler; no text depends on it."""

    slots: int = 32  # texts decoded at once
    length: int = 0  # cache entries of a slot; 0: what the longest text of a call needs
    steps: int = 16  # tokens per slot between two looks of the host
    pack: int = 512  # prompt tokens that are prefilled at once, where prompts are not longer
    cache: Any = None  # dtype of keys and values, int8 too; None for the decoder's


@dataclasses.dataclass(frozen=True)
class Inputs:
    """All that one call needs and does not change."""

    decoder: transformer.Decoder
    weights: engine.Constants
    form: truncation.Features
    settings: SamplerSettings  # with its length
    mesh: Mesh
    prompts: Sequence[tuple[int, ...]]
    request: engine.Request  # NumPy arrays, one entry a prompt
    stops: Sequence[tuple[bytes, ...]]  # of each set
    vocabulary: Vocabulary
    stop_XV: np.ndarray
    buckets: tuple[int, ...]


def derive_keys(
    seed: int, purpose: str, step: int, row_ids: Sequence[str], samples: Sequence[int]
) -> np.ndarray:
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
    # In powers of two, so that few numbers of texts are programs of their own.
    size = 1 << max(0, len(samples) - 1).bit_length()
    words = np.zeros((size, 2), np.uint32)
    numbers = np.zeros(size, np.uint32)
    words[: len(samples)], numbers[: len(samples)] = words_n2, samples
    return np.asarray(_row_keys(root, words, numbers))[: len(samples)]


@jax.jit
def _row_keys(root: jax.Array, words_n2: jax.Array, samples_n: jax.Array) -> jax.Array:
    def one(words, sample):
        key = jax.random.fold_in(jax.random.fold_in(root, words[0]), words[1])
        return jax.random.key_data(jax.random.fold_in(key, sample))

    return jax.vmap(one)(words_n2, samples_n)


def prepare_inputs(
    decoder, policy: policy_lib.Policy, prompts, each: Sequence[Sampling], *, keys_n2, settings,
    prefix, vocabulary: Vocabulary | None, limits, longest: int = 1, put: Any = sharding.from_host,
) -> Inputs:  # fmt: skip
    """What `generate` will do, checked.

    Args:
      longest: tokens of the longest prompt that other calls will have.
      put: brings NumPy arrays onto the mesh; `sharding.abstract` where its devices are not there.
    """
    prompts = [tuple(prompt) for prompt in prompts]
    if limits is None:
        limits = [s.max_tokens for s in each[: len(prompts)]]
    if vocabulary is None:
        vocabulary = Vocabulary(np.ones(decoder.config.vocab_size, bool))
    valid_V = vocabulary.valid_V
    _check_settings(decoder.config, settings, valid_V)
    for one in dict.fromkeys(each):
        _check_sampling(decoder.config, one, vocabulary)
    shared = 0 if prefix is None else prefix.k.shape[2]
    _check_prompts(decoder.config, prompts, each, keys_n2, limits, shared, settings.length)
    longest = max(longest, *map(len, prompts)) if prompts else longest
    # Behind a prompt there is room for the rest of a block that `insert` copies.
    length = settings.length + engine.INSERT_BLOCK
    if not settings.length:
        pairs = zip(prompts, limits, strict=True)
        need = max((len(prompt) + limit for prompt, limit in pairs), default=1)
        length = round_up_length(need + engine.INSERT_BLOCK)
    devices = sharding.current()
    shards = sharding.batch_shards(devices)
    settings = dataclasses.replace(
        settings,
        slots=-(-settings.slots // shards) * shards,
        length=-(-length // decode_attention.CACHE_LENGTH_MULTIPLE)
        * decode_attention.CACHE_LENGTH_MULTIPLE,
        cache=decoder.dtype if settings.cache is None else settings.cache,
    )
    stops = list(dict.fromkeys(_stop_conditions(s) for s in each))
    sets = max(STOP_SETS, 1 << (len(stops) - 1).bit_length())
    stop_XV = np.zeros((sets, len(valid_V)), bool)
    for row, (ids, texts) in zip(stop_XV, stops, strict=False):
        row[:] = _stop_table(ids, texts, vocabulary.token_bytes, len(valid_V))
    return Inputs(
        decoder=decoder,
        weights=engine.Constants(
            policy, prefix,
            # No mask at all where it would change nothing: it costs a pass over the logits.
            None if valid_V.all() else put(valid_V, devices, PartitionSpec()),
            put(stop_XV, devices, PartitionSpec()),
            engine.unstack_layers(policy, prefix, devices),
        ),
        form=truncation.find_features([(s.temperature, s.top_k, s.top_p, s.min_p) for s in each]),
        settings=settings, mesh=devices, prompts=prompts,
        request=_pack_requests(each[: len(prompts)], limits, keys_n2, stops),
        stops=[texts for _, texts in stops], vocabulary=vocabulary, stop_XV=stop_XV,
        buckets=prompt_packing.list_buckets(settings.pack, longest),
    )  # fmt: skip


def _stop_conditions(sampling: Sampling) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
    return tuple(sampling.stop_ids), tuple(text.encode() for text in sampling.stop)


def _pack_requests(each: Sequence[Sampling], limits, keys_n2: Any, stops: list) -> engine.Request:
    number = {ends: i for i, ends in enumerate(stops)}

    def column(name: str, dtype: Any) -> Any:
        return np.array([getattr(one, name) for one in each], dtype)

    stop: Any = np.array([number[_stop_conditions(one)] for one in each], np.int32)
    rows = truncation.RowSettings(
        column("temperature", np.float32), column("top_k", np.int32),
        column("top_p", np.float32), column("min_p", np.float32),
    )  # fmt: skip
    limit: Any = np.array(limits, np.int32)
    return engine.Request(limit, keys_n2, stop, rows)


def round_up_length(length: int) -> int:
    """The smallest of 128, 256, 384, 512, 768, 1024, 1536, ... that holds `length`."""
    size = decode_attention.CACHE_LENGTH_MULTIPLE
    while size < length:
        size = 256 if size == 128 else size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


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


def _check_settings(config, settings: SamplerSettings, valid_V) -> None:
    vocab = config.vocab_size
    for name, least in (("slots", 1), ("steps", 1), ("pack", 1), ("length", 0)):
        value = getattr(settings, name)
        if value < least:
            raise ValueError(f"{name} is {value!r}: it must be at least {least}")
    dtypes = {np.dtype(name).name for name in ("float32", "bfloat16", "int8")}
    if settings.cache is not None and np.dtype(settings.cache).name not in dtypes:
        raise ValueError(
            f"cache is {np.dtype(settings.cache).name}: the choices are float32, bfloat16, int8"
        )
    if valid_V.shape != (vocab,) or not valid_V.any():
        raise ValueError(
            f"valid_V has shape {valid_V.shape} and {int(valid_V.sum())} ids: it must have shape "
            f"({vocab},) and at least one id"
        )


def _check_sampling(config, sampling: Sampling, vocabulary: Vocabulary) -> None:
    vocab = config.vocab_size
    truncation.check_settings(
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, vocab_size=vocab
    )
    if sampling.max_tokens < 1:
        raise ValueError(f"max_tokens is {sampling.max_tokens!r}: it must be at least 1")
    for token in sampling.stop_ids:
        if not 0 <= token < vocab:
            raise ValueError(f"stop_ids has {token}: the model has the ids 0 to {vocab - 1}")
    if "" in sampling.stop:
        raise ValueError(f"stop is {sampling.stop!r}: a stop string must not be empty")
    count = len(vocabulary.token_bytes)
    if sampling.stop and (count > vocab or vocabulary.valid_V[count:].any()):
        raise ValueError(
            f"stop is {sampling.stop!r}: stop strings need token_bytes of every valid id and of "
            f"at most {vocab}, and there are {count}"
        )


def _check_prompts(config, prompts, each, keys_n2, limits, shared: int, length: int) -> None:
    if prompts and len(each) != len(prompts):
        raise ValueError(f"sampling has {len(each)} entries for {len(prompts)} prompts")
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
        if length and len(prompt) + limit > length:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens and may get {limit} more: length is "
                f"{length}, the cache entries of a slot"
            )
        if shared + len(prompt) + limit > config.max_position:
            raise ValueError(
                f"prompt {i} has {shared + len(prompt)} tokens (shared prefix {shared}) and may "
                f"get {limit} more: the model has {config.max_position} positions"
            )
