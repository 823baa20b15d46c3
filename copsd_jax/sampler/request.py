"""Settings and inputs of a sampler call, which are checked before any program runs.

Callers create `Vocabulary`, `Sampling` and `SamplerSettings`. `list_texts` checks the arguments
that all engines share, and converts these arguments to one `Text` per prompt.
`prepare_sampler_inputs` builds `Inputs`, the read-only inputs of one call of `loop.generate`.
`derive_sampling_keys` returns one random key for each sample.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from copsd_jax.attention import decode_attention
from copsd_jax.model import policy as policy_lib
from copsd_jax.model import transformer
from copsd_jax.runtime import sharding
from copsd_jax.sampler import engine, prompt_packing, truncation

PURPOSES = {"rollout": 0, "evaluation": 1, "author": 2}
STOP_SETS = 4  # every program has room for at least this many sets of stop ids


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The ids of a model: which ids may be drawn, the bytes of each id, and which ids end a text.

    Attributes:
      valid_V: bool; True for the ids that the tokenizer has. Only ids of the tokenizer can be
        drawn.
      token_bytes: the bytes of each id; stop strings need the bytes of every valid id.
      stop_ids: the ids that end a text. The sampler reads `Sampling.stop_ids` instead of
        `Vocabulary.stop_ids`.
    """

    valid_V: np.ndarray
    token_bytes: Sequence[bytes] = ()
    stop_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of the distribution to draw from, and the ids and strings that end a completion."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()  # a completion ends with the token that completes one of the strings

    @property
    def row(self) -> tuple[float, int, float, float]:
        """The settings in the order of `truncation.RowSettings`."""
        return self.temperature, self.top_k, self.top_p, self.min_p


class Text(NamedTuple):
    """One completion to draw."""

    prompt: tuple[int, ...]
    sampling: Sampling
    limit: int  # maximum number of tokens to draw
    key_2: np.ndarray  # uint32: threefry key data


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """The sizes of a sampler, which affect the texts only through rounding."""

    slots: int = 32  # number of texts that are decoded at once
    length: int = 0  # number of cache entries per slot; 0 means as many as the longest text needs
    steps: int = 16  # maximum number of tokens that one decode call draws for a slot
    pack: int = 512  # number of tokens per packed row; a longer prompt gets its own row
    cache: Any = None  # dtype of keys and values, which may be int8; None means the decoder's dtype


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The read-only inputs of one call of the sampler."""

    decoder: transformer.Decoder
    constants: engine.Constants
    features: truncation.Features
    settings: SamplerSettings  # all values are set; `slots` is a multiple of the number of shards
    mesh: Mesh
    prompts: Sequence[tuple[int, ...]]
    request: engine.Request  # NumPy arrays with one entry per prompt
    stops: Sequence[tuple[bytes, ...]]  # the stop strings for each row of `stop_XV`
    vocabulary: Vocabulary
    stop_XV: np.ndarray  # bool: each row marks the ids that end a text
    buckets: tuple[int, ...]  # widths of packed rows, in ascending order


def derive_sampling_keys(
    seed: int, purpose: str, step: int, row_ids: Sequence[str], samples: Sequence[int]
) -> np.ndarray:
    """Returns one random key for each of n samples.

    The root key is made from the seed. Then four values are folded into the root key: the purpose,
    the step, the first 64 bits of the row id's SHA-256, and the sample number. For each token, the
    engine also folds the token's index into the key.

    Args:
      seed: the run's seed.
      purpose: a key of PURPOSES.
      step: the training step.
      row_ids: ids of the samples' problems, one id for each of the n samples.
      samples: n sample numbers, which distinguish samples of the same problem.

    Returns:
      Threefry key data, uint32 [n, 2].

    Raises:
      ValueError: the purpose is unknown, or the lists have unequal lengths.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"purpose is {purpose!r}: the choices are {', '.join(PURPOSES)}")
    if len(row_ids) != len(samples):
        raise ValueError(f"{len(row_ids)} row ids for {len(samples)} samples: give one per sample")
    digests = [hashlib.sha256(row.encode()).digest()[:8] for row in row_ids]
    words_n2 = np.frombuffer(b"".join(digests), ">u4").astype(np.uint32).reshape(-1, 2)
    root = jax.random.key(seed, impl="threefry2x32")
    for word in (PURPOSES[purpose], step):
        root = jax.random.fold_in(root, word)
    # The number of samples is rounded up to a power of two, so that only a few programs are
    # compiled.
    size = 1 << max(0, len(samples) - 1).bit_length()
    words, numbers = np.zeros((size, 2), np.uint32), np.zeros(size, np.uint32)
    words[: len(samples)], numbers[: len(samples)] = words_n2, samples
    return np.asarray(_row_keys(root, words, numbers))[: len(samples)]


@jax.jit
def _row_keys(root: jax.Array, words_n2: jax.Array, samples_n: jax.Array) -> jax.Array:
    def one(words, sample):
        key = jax.random.fold_in(jax.random.fold_in(root, words[0]), words[1])
        return jax.random.key_data(jax.random.fold_in(key, sample))

    return jax.vmap(one)(words_n2, samples_n)


def prepare_sampler_inputs(
    decoder: transformer.Decoder, policy: policy_lib.Policy, prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling], *, keys_n2: Any, settings: SamplerSettings,
    prefix: transformer.KV | None = None, vocabulary: Vocabulary | None = None,
    limits: Sequence[int] | None = None, longest: int = 1, put: Any = sharding.shard_tree,
) -> Inputs:  # fmt: skip
    """Checks the arguments of `loop.generate` and builds the inputs of the sampler's programs.

    Args:
      decoder: the model.
      policy: the weights and adapter of the model; the arrays are on the mesh or are abstract.
      prompts: token ids without the shared prefix.
      sampling: one `Sampling` for all prompts, or a list with one per prompt.
      keys_n2: uint32, as returned by `derive_sampling_keys`.
      settings: the sampler's sizes.
      prefix: keys and values of the shared prefix.
      vocabulary: ids that may be drawn, and their bytes; None allows all ids.
      limits: maximum number of tokens of each completion; None means `Sampling.max_tokens`.
      longest: number of tokens of the longest prompt in other calls that use the same programs.
      put: function that moves NumPy arrays to the mesh; pass `sharding.to_abstract` if the devices
        are not present.

    Raises:
      ValueError: the sampler does not support the settings or prompts.
    """
    vocabulary = vocabulary or Vocabulary(np.ones(decoder.config.vocab_size, bool))
    valid_V, devices = vocabulary.valid_V, sharding.current_mesh()
    _check_sampler_settings(decoder.config, settings, valid_V)
    texts = list_texts(prompts, sampling, keys_n2, limits, vocabulary)
    if settings.length:
        room = f"length is {settings.length}, the number of cache entries per slot"
        check_lengths(texts, settings.length, room)
    shared, positions = 0 if prefix is None else prefix.k.shape[2], decoder.config.max_position
    room = f"the model has {positions} positions (shared prefix {shared})"
    check_lengths(texts, positions, room, shared)
    settings = _complete_sampler_settings(settings, texts, devices, decoder.dtype)
    kinds = _list_kinds(sampling)
    stops = list(dict.fromkeys(_stop_conditions(kind) for kind in kinds))
    stop_XV = _stop_tables(stops, vocabulary)
    return Inputs(
        decoder=decoder,
        constants=engine.Constants(
            policy, prefix,
            # A mask costs a pass over the logits, so there is no mask if all ids are valid.
            None if valid_V.all() else put(valid_V, devices, PartitionSpec()),
            put(stop_XV, devices, PartitionSpec()),
            engine.unstack_layers(policy, prefix, devices),
        ),
        features=truncation.find_features([kind.row for kind in kinds]),
        settings=settings, mesh=devices, prompts=[text.prompt for text in texts],
        request=_pack_requests(texts, stops), stops=[strings for _, strings in stops],
        vocabulary=vocabulary, stop_XV=stop_XV,
        buckets=prompt_packing.list_buckets(
            settings.pack, max([longest, *(len(text.prompt) for text in texts)])
        ),
    )  # fmt: skip


def list_texts(
    prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling], keys: Any,
    limits: Sequence[int] | None, vocabulary: Vocabulary,
) -> list[Text]:  # fmt: skip
    """Returns one `Text` for each prompt, after checking the arguments of `generate`.

    Raises:
      ValueError: a setting or limit is out of range, a list does not have one entry per prompt, the
        keys are not uint32 [n, 2], or a prompt is empty or has an unknown id.
    """
    for kind in _list_kinds(sampling):
        _check_sampling(kind, vocabulary)
    prompts = [tuple(map(int, prompt)) for prompt in prompts]
    count, size = len(prompts), len(vocabulary.valid_V)
    each = [sampling] * count if isinstance(sampling, Sampling) else sampling
    if prompts and len(each) != count:
        raise ValueError(f"sampling has {len(each)} entries for {count} prompts")
    keys_n2 = np.asarray(jax.device_get(keys))
    if keys_n2.shape != (count, 2) or keys_n2.dtype != np.uint32:
        raise ValueError(
            f"keys are {keys_n2.dtype} {keys_n2.shape}: they must be uint32 ({count}, 2), one key "
            "per prompt"
        )
    limits = [one.max_tokens for one in each] if limits is None else limits
    if len(limits) != count:
        raise ValueError(f"limits has {len(limits)} entries for {count} prompts")
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if limit < 1:
            raise ValueError(f"limits[{i}] is {limit}: a completion has at least 1 token")
        if not prompt:
            raise ValueError(f"prompt {i} is empty: it must have at least one token")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= size:
            rule = f"the model has the ids 0 to {size - 1}"
            raise ValueError(f"prompt {i} has ids {low} to {high}: {rule}")
    return [Text(*text) for text in zip(prompts, each, map(int, limits), keys_n2, strict=True)]


def find_stop_string(
    tail: bytes, tokens: Sequence[int], stops: Sequence[bytes], token_bytes: Sequence[bytes]
) -> tuple[int | None, bytes]:
    """Finds the first token that completes a stop string.

    Args:
      tail: the last bytes before `tokens`, as returned by the previous call; b"" in the first call.
      tokens: ids of the next tokens.
      stops: the stop strings.
      token_bytes: the bytes of each id.

    Returns:
      A pair. The first value is the number of tokens up to and including the token that completes a
      stop string; None if no stop string is complete. The second value is the last bytes of the
      text, which the next call takes as `tail`.
    """
    reach = max(map(len, stops), default=1) - 1
    for count, token in enumerate(tokens if stops else (), 1):
        tail += token_bytes[token]
        if any(stop in tail for stop in stops):
            return count, tail
        tail = tail[max(0, len(tail) - reach) :]
    return None, tail


def _list_kinds(sampling: Sampling | Sequence[Sampling]) -> list[Sampling]:
    """Returns the distinct settings; a single `Sampling` is kept even if there are no prompts."""
    return [sampling] if isinstance(sampling, Sampling) else list(dict.fromkeys(sampling))


def _complete_sampler_settings(
    settings: SamplerSettings, texts: Sequence[Text], mesh: Mesh, dtype: Any
) -> SamplerSettings:
    """Fills in the length and the cache dtype; rounds up the length and the number of slots."""
    # `insert` copies whole blocks, so a slot needs room for one more block after its text.
    length = settings.length + engine.INSERT_BLOCK
    if not settings.length:
        need = max((len(text.prompt) + text.limit for text in texts), default=1)
        length = round_up_slot_length(need + engine.INSERT_BLOCK)
    shards, multiple = sharding.batch_shards(mesh), decode_attention.CACHE_LENGTH_MULTIPLE
    return dataclasses.replace(
        settings,
        slots=-(-settings.slots // shards) * shards,
        length=-(-length // multiple) * multiple,
        cache=dtype if settings.cache is None else settings.cache,
    )


def _stop_conditions(sampling: Sampling) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
    return tuple(sampling.stop_ids), tuple(text.encode() for text in sampling.stop)


def _pack_requests(texts: Sequence[Text], stops: list) -> engine.Request:
    """Builds arrays with one entry per text; `stops` lists the distinct stop conditions."""
    number = {ends: i for i, ends in enumerate(stops)}

    def column(values: Any, dtype: Any) -> Any:
        return np.array(values, dtype)

    rows = np.array([text.sampling.row for text in texts]).reshape(-1, 4).T
    return engine.Request(
        column([text.limit for text in texts], np.int32),
        column([text.key_2 for text in texts], np.uint32).reshape(-1, 2),
        column([number[_stop_conditions(text.sampling)] for text in texts], np.int32),
        truncation.RowSettings(*map(column, rows, truncation.ROW_DTYPES)),
    )


def round_up_slot_length(length: int) -> int:
    """Returns the first of 128, 256, 384, 512, 768, 1024, 1536, ... that is at least `length`."""
    size = decode_attention.CACHE_LENGTH_MULTIPLE
    while size < length:
        size = 256 if size == 128 else size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _stop_tables(stops: list, vocabulary: Vocabulary) -> np.ndarray:
    """Returns bool [X, V], which marks stop ids and ids whose bytes contain a stop string."""
    sets = max(STOP_SETS, 1 << (len(stops) - 1).bit_length())
    stop_XV = np.zeros((sets, len(vocabulary.valid_V)), bool)
    for row_V, (ids, strings) in zip(stop_XV, stops, strict=False):
        row_V[list(ids)] = True
        if strings:
            inside = [any(stop in piece for stop in strings) for piece in vocabulary.token_bytes]
            row_V[: len(inside)] |= inside
    return stop_XV


def _check_sampler_settings(
    config: transformer.ModelConfig, settings: SamplerSettings, valid_V: np.ndarray
) -> None:
    for name, least in (("slots", 1), ("steps", 1), ("pack", 1), ("length", 0)):
        value = getattr(settings, name)
        if value < least:
            raise ValueError(f"{name} is {value!r}: it must be at least {least}")
    choices = ("float32", "bfloat16", "int8")
    if settings.cache is not None and (name := np.dtype(settings.cache).name) not in choices:
        raise ValueError(f"cache is {name}: the choices are {', '.join(choices)}")
    if valid_V.shape != (config.vocab_size,) or not valid_V.any():
        raise ValueError(
            f"valid_V has shape {valid_V.shape} and {int(valid_V.sum())} ids: it must have shape "
            f"({config.vocab_size},) and at least one id"
        )


def _check_sampling(sampling: Sampling, vocabulary: Vocabulary) -> None:
    """Checks one `Sampling` against the vocabulary; raises ValueError if a setting is invalid."""
    size, count = len(vocabulary.valid_V), len(vocabulary.token_bytes)
    truncation.check_settings(*sampling.row, vocab_size=size)
    if sampling.max_tokens < 1:
        raise ValueError(f"max_tokens is {sampling.max_tokens!r}: it must be at least 1")
    for token in sampling.stop_ids:
        if not 0 <= token < size:
            raise ValueError(f"stop_ids has {token}: the model has the ids 0 to {size - 1}")
    if "" in sampling.stop:
        raise ValueError(f"stop is {sampling.stop!r}: a stop string must not be empty")
    if sampling.stop and (count > size or vocabulary.valid_V[count:].any()):
        raise ValueError(
            f"stop is {sampling.stop!r}: token_bytes must have the bytes of every valid id, "
            f"and at most {size} entries; token_bytes has {count}"
        )


def check_lengths(texts: Sequence[Text], most: int, room: str, shared: int = 0) -> None:
    """Checks that no text, together with the shared prefix, can become longer than `most` tokens.

    Raises:
      ValueError: a text may exceed the limit; the message ends with the explanation `room`.
    """
    for i, text in enumerate(texts):
        tokens, more = shared + len(text.prompt), text.limit
        if tokens + more > most:
            raise ValueError(f"prompt {i} has {tokens} tokens and may get {more} more: {room}")
