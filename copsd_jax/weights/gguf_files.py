"""Reader of GGUF files: the model's config, and tensors under their Hugging Face names.

A GGUF file is little endian. Every GGUF file begins with a magic number, a version number, a count
of tensors, and a count of metadata entries. Next come the metadata (each entry has a key, a type
and a value), the list of tensors, and the aligned tensor values in encoded form. The `gguf` package
decodes tensor values to float32. Tensors are read one at a time from a memory map.

In files of the architecture `llama`, llama.cpp interleaves the rotary halves of q and k; this
module restores the row order of Hugging Face. Files of the architectures `qwen2` and `qwen3` keep
Hugging Face's row order.
"""

import functools
import math
import mmap
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import gguf
import numpy as np

from copsd_jax.model import transformer
from copsd_jax.weights import names, tensor_files

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Names of supported tensor types. For the types in the first line of TENSOR_TYPES, the tests
# compare the decoded values with the values from a second decoder. The second line of TENSOR_TYPES
# lists other block formats that the gguf package can decode.
TENSOR_TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"),
    *("Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
TOP_NAMES = {stored: name for name, stored in names.TOP.values()}
LAYER_NAMES = {stored: name for name, stored in names.BLOCK.values()}
_CODES = {  # metadata type -> format character of the struct module
    "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "FLOAT32": "f", "BOOL": "?",
    "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q", "FLOAT64": "d",
}  # fmt: skip
NUMBERS = {gguf.GGUFValueType[kind]: code for kind, code in _CODES.items()}
MAX_RANK = 4  # maximum number of axes of a tensor in a GGUF file
# The RoPE scalings of Llama 3: the factor is 8 in Llama 3.1 and 3.3, and 32 in Llama 3.2.
SCALINGS = tuple(transformer.RopeScaling(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))
ROPE_FACTORS = "rope_freqs.weight"  # tensor of divisors for Llama 3's rotary frequencies


class StoredTensor(NamedTuple):
    """An entry in a GGUF file's list of tensors."""

    name: str
    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # axes in NumPy's order, which is the reverse of GGUF's order
    offset: int  # position of the encoded values, in bytes from the start of the file
    size: int  # size of the encoded values, in bytes


class Header(NamedTuple):
    """The part of a GGUF file before the encoded values: the metadata and the list of tensors."""

    metadata: dict[str, Any]  # values are numbers, strings, booleans, or lists of these
    tensors: tuple[StoredTensor, ...]


class _GgufCursor:
    """A sequential reader of numbers, strings and lists from mapped bytes.

    The gguf package's own reader takes seconds per file, because it makes an array for every string
    in the vocabulary.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def numbers(self, code: str, count: int = 1) -> tuple:
        """Reads `count` little-endian numbers; raises struct.error if the file ends too early."""
        values = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{code}")
        return values

    def string(self) -> str:
        (size,) = self.numbers("Q")
        (raw,) = struct.unpack_from(f"<{size}s", self.data, self.at)
        self.at += size
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        """Reads a metadata value (a string, an array or a number) of the given GGUF type."""
        if kind == gguf.GGUFValueType.STRING:
            return self.string()
        if kind != gguf.GGUFValueType.ARRAY:
            return self.numbers(NUMBERS[gguf.GGUFValueType(kind)])[0]
        item, count = (self.numbers(code)[0] for code in "IQ")
        if item in NUMBERS:
            return list(self.numbers(NUMBERS[gguf.GGUFValueType(item)], count))
        return [self.value(item) for _ in range(count)]


def _parse_tensor(cursor: _GgufCursor) -> StoredTensor:
    """Reads an entry of the list of tensors; the entry's offset is relative to the first value."""
    name = cursor.string()
    (rank,) = cursor.numbers("I")
    if not 0 < rank <= MAX_RANK:
        raise ValueError(f"tensor {name} has {rank} axes")
    shape = tuple(reversed(cursor.numbers("Q", rank)))
    kind = gguf.GGMLQuantizationType(cursor.numbers("I")[0])
    block, bytes_per_block = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError(f"tensor {name} has rows of {shape[-1]} values, in blocks of {block}")
    size = math.prod(shape) // block * bytes_per_block
    return StoredTensor(name, kind, shape, cursor.numbers("Q")[0], size)


def _parse_header(data: mmap.mmap) -> Header:
    cursor = _GgufCursor(data)
    magic, version, n_tensors, n_fields = (cursor.numbers(code)[0] for code in "IIQQ")
    if magic != gguf.GGUF_MAGIC or version not in gguf.READER_SUPPORTED_VERSIONS:
        raise ValueError("the file is not a GGUF file of version 2 or 3")
    fields = {}
    for _ in range(n_fields):
        key = cursor.string()
        fields[key] = cursor.value(cursor.numbers("I")[0])
    listed = [_parse_tensor(cursor) for _ in range(n_tensors)]
    alignment = fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    stored = tuple(x._replace(offset=start + x.offset) for x in listed)
    end = max((x.offset + x.size for x in stored), default=0)
    if end > len(data):
        raise ValueError(f"{end} bytes expected")
    if len({x.name for x in stored}) < len(stored):
        raise ValueError("a tensor is listed twice")
    return Header(fields, stored)


def read_header(path: pathlib.Path) -> Header:
    """Reads a GGUF file's metadata and its list of tensors.

    Raises:
      ValueError: if the file is truncated or is not a GGUF file.
    """
    stat = path.stat()
    return _read_header(path, stat.st_size, stat.st_mtime_ns)


# The file's size and modification time are part of the cache key, so that a changed file is read
# again.
@functools.lru_cache(maxsize=2)
def _read_header(path: pathlib.Path, size: int, mtime: int) -> Header:
    try:
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse_header(data)
    except (ValueError, KeyError, OverflowError, RecursionError, struct.error) as error:
        raise ValueError(
            f"{path} is not a complete GGUF file; it may be truncated ({size} bytes; {error})"
        ) from error


def get_number(fields: Mapping[str, Any], key: str, path: pathlib.Path) -> Any:
    """Returns a number of the metadata.

    Args:
      fields: the metadata of the file.
      key: the name of the entry.
      path: path of the file, for the error message.

    Raises:
      ValueError: if the entry is missing, or is no number.
    """
    if key not in fields:
        raise ValueError(f"{path} has no metadata entry {key}")
    value = fields[key]
    if not isinstance(value, int | float):
        raise ValueError(f"{path}: {key} is {value!r}; it must be one number for all layers")
    # A float32 value is read as the intended decimal number: 1e-5, not 9.999999747378752e-06.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _check_supported(fields: Mapping[str, Any], path: pathlib.Path) -> str:
    """Checks that a file's architecture and options are supported; returns the architecture."""
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{path}: architecture {arch!r} is not supported (supported: {known})")
    for key, allowed in {
        f"{arch}.expert_count": (0,),
        f"{arch}.attention.sliding_window": (0,),
        f"{arch}.rope.scaling.type": ("none",),
        "split.count": (0, 1),
    }.items():
        if key in fields and fields[key] not in allowed:
            raise ValueError(f"{path}: {key} = {fields[key]!r} is not supported")
    return arch


def _rope_scaling(
    path: pathlib.Path, head_dim: int, theta: float
) -> transformer.RopeScaling | None:
    """Finds Llama 3's RoPE scaling parameters from the divisors that a GGUF file stores."""
    stored = next((x for x in read_header(path).tensors if x.name == ROPE_FACTORS), None)
    if stored is None:
        return None
    if stored.type.name in TENSOR_TYPES and stored.shape == (head_dim // 2,):
        divisors = _decode_gguf_tensor(path, stored, None)
        frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim)
        for scaling in SCALINGS:
            expected = 1 / transformer.compute_llama3_factors(scaling, frequency)
            if np.allclose(expected, divisors, rtol=1e-4):
                return scaling
    raise ValueError(
        f"{path}: {ROPE_FACTORS} is not Llama 3's RoPE scaling (factor 8 or 32, low 1, high 4, "
        "8192 positions); only Llama 3's scaling is supported"
    )


def load_config(path: pathlib.Path) -> transformer.ModelConfig:
    """Reads the config of the model in a GGUF file.

    Raises:
      ValueError: if the architecture or an option is not supported, or if a key is missing.
    """
    fields, tensors = read_header(path)
    arch = _check_supported(fields, path)
    get = lambda key: get_number(fields, f"{arch}.{key}", path)  # noqa: E731
    shapes = {x.name: x.shape for x in tensors}
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{path} has no tensor token_embd.weight")
    n_heads, d_model = get("attention.head_count"), get("embedding_length")
    explicit = f"{arch}.attention.key_length" in fields
    head_dim = get("attention.key_length") if explicit else d_model // max(n_heads, 1)
    rotary = f"{arch}.rope.dimension_count"
    if rotary in fields and fields[rotary] != head_dim:
        raise ValueError(f"{path}: {rotary} = {fields[rotary]}, but heads have size {head_dim}")
    theta = get("rope.freq_base") if f"{arch}.rope.freq_base" in fields else 10_000.0
    vocab_size, listed = shapes["token_embd.weight"][0], fields.get(f"{arch}.vocab_size")
    if listed not in (None, vocab_size):
        raise ValueError(
            f"{path}: {arch}.vocab_size is {listed!r}, but token_embd.weight has {vocab_size} rows"
        )
    return transformer.ModelConfig(
        family=arch, vocab_size=vocab_size, d_model=d_model,
        d_ff=get("feed_forward_length"), n_layers=get("block_count"), n_heads=n_heads,
        n_kv_heads=get("attention.head_count_kv"), head_dim=head_dim, rope_theta=theta,
        rope_scaling=_rope_scaling(path, head_dim, theta),
        rms_eps=get("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in shapes, qkv_bias=arch == "qwen2",
        qk_norm=arch == "qwen3", max_position=get("context_length"),
    )  # fmt: skip


def to_hf_name(name: str, path: pathlib.Path) -> str:
    """Converts `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`.

    Args:
      name: name of a tensor in the file.
      path: path of the file, for the error message.

    Raises:
      ValueError: if no supported architecture has a tensor of this name.
    """
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise ValueError(f"{path} contains the tensor {name}, which no supported architecture has")


def unpermute(w: np.ndarray, heads: int) -> np.ndarray:
    """Permutes rows of q or k: rotary pairs (2i, 2i+1) become Hugging Face's pairs (i, i+H/2).

    For example, a GGUF file stores a head of 4 rows in the order 0 2 1 3; the result has the order
    0 1 2 3.

    Args:
      w: weights or bias [heads x H, ...].
      heads: number of heads.

    Returns:
      An array of the same shape as `w`.
    """
    return w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def open_tensors(path: pathlib.Path) -> dict[str, tensor_files.Tensor]:
    """Maps Hugging Face names to the tensors of a GGUF file.

    `Tensor.read` returns float32 values in Hugging Face's layout.

    Raises:
      ValueError: if the name or the type of a tensor is not supported.
    """
    c = load_config(path)
    heads = {"attn_q": c.n_heads, "attn_k": c.n_kv_heads} if c.family == "llama" else {}
    out = {}
    for stored in read_header(path).tensors:
        if stored.name == ROPE_FACTORS:  # `load_config` reads the tensor ROPE_FACTORS.
            continue
        if stored.type.name not in TENSOR_TYPES:
            raise ValueError(
                f"{path}: tensor {stored.name} has type {stored.type.name}, which is not "
                f"supported (supported: {', '.join(TENSOR_TYPES)})"
            )
        name = to_hf_name(stored.name, path)
        read = functools.partial(
            _decode_gguf_tensor, path, stored, heads.get(stored.name.split(".")[-2])
        )
        out[name] = tensor_files.Tensor(stored.shape, read)
    return out


def _decode_gguf_tensor(
    path: pathlib.Path, stored: StoredTensor, heads: int | None, part: tuple[slice, ...] = ()
) -> np.ndarray:
    """Decodes a tensor, or a part of the tensor, to float32.

    Only blocks that overlap the requested part are decoded.

    Args:
      path: path of the GGUF file.
      stored: the tensor's entry in the list of tensors.
      heads: number of heads if the rows of each head are interleaved; otherwise None.
      part: one slice for each axis; () means the whole tensor.
    """
    *rows, columns = part or (slice(None),) * len(stored.shape)
    begin, end, _ = columns.indices(stored.shape[-1])
    block, size = gguf.GGML_QUANT_SIZES[stored.type]
    first, last = begin // block, -(-end // block)
    raw = np.memmap(path, np.uint8, "r", stored.offset, (stored.size,))
    encoded = np.frombuffer(raw, np.uint8).reshape(*stored.shape[:-1], -1, size)
    if heads:
        rows = [unpermute(np.arange(stored.shape[0]), heads)[rows[0]]]
    picked = encoded[(*rows, slice(first, last))]
    picked = picked.reshape(*picked.shape[:-2], -1)
    values = gguf.dequantize(picked, stored.type).reshape(*picked.shape[:-1], -1)
    return values[..., begin - first * block : end - first * block]
