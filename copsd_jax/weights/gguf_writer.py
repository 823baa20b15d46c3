"""Writer of GGUF files, which llama.cpp and `gguf_files` read.

As in llama.cpp's own converter, matrices get the chosen type, and all other tensors are float32.
The `gguf` package rounds the values and writes the file; one tensor at a time is in memory.
"""

import copy
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import gguf
import numpy as np
import tokenizers
import transformers
from tokenizers import models

from copsd_jax.model import transformer
from copsd_jax.weights import gguf_files, hf, names, tensor_files, tokenizer

KINDS = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
_FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
_TOP = {name: stored for name, stored in names.TOP.values()}
_BLOCK = {name: stored for name, stored in names.BLOCK.values()}
_ENDS = ("eos", "eot", "eom")  # the end-of-text ids that a GGUF file can name
VECTOR = gguf.GGMLQuantizationType.F32  # llama.cpp needs norms and biases in float32


def to_gguf_name(name: str) -> str:
    """Converts `model.layers.3.self_attn.q_proj.weight` to `blk.3.attn_q.weight`."""
    if name in _TOP:
        return _TOP[name]
    if name == gguf_files.ROPE_FACTORS:
        return name
    _, _, layer, *module, leaf = name.split(".")
    return f"blk.{layer}.{_BLOCK['.'.join(module)]}.{leaf}"


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """Permutes rows of q or k; the inverse of `gguf_files.unpermute`.

    For example, the rows 0 1 2 3 of a head get the order 0 2 1 3.

    Args:
      w: weights [heads x H, ...].
      heads: number of heads.

    Returns:
      An array of the same shape as `w`.
    """
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def check_gguf_shape(config: transformer.ModelConfig, kind: str) -> None:
    """Refuses a model that the chosen type, or `gguf_files`, cannot represent.

    Args:
      config: config of the model.
      kind: a key of KINDS.

    Raises:
      ValueError: a row of a matrix does not consist of whole blocks, or the RoPE scaling is not
        Llama 3's.
    """
    block = gguf.GGML_QUANT_SIZES[KINDS[kind]][0]
    widths = {"d_model": config.d_model, "d_ff": config.d_ff,
              "n_heads * head_dim": config.n_heads * config.head_dim}  # fmt: skip
    for name, width in widths.items():
        if width % block:
            raise ValueError(
                f"{kind} stores blocks of {block} values, but the model has {name} = {width}: "
                "f16 has no blocks"
            )
    scaling = config.rope_scaling
    if scaling is not None and (config.family != "llama" or scaling not in gguf_files.SCALINGS):
        raise ValueError(
            f"a GGUF file of a {config.family} model cannot state the RoPE scaling {scaling}"
        )


def write_gguf(
    file: pathlib.Path, params: dict, config: transformer.ModelConfig, *, kind: str,
    tok: transformers.PreTrainedTokenizerFast, stop_ids: Iterable[int], title: str,
) -> None:  # fmt: skip
    """Writes a GGUF file with a model and its tokenizer.

    Args:
      file: the file to write.
      params: tree of parameters, as returned by `hf.load_params`.
      config: config of the model.
      kind: a key of KINDS.
      tok: the tokenizer, from `tokenizer.load`.
      stop_ids: the ids that end a text.
      title: the name of the model in the metadata.

    Raises:
      ValueError: the type cannot hold a value, or GGUF cannot represent the model or the tokenizer.
    """
    check_gguf_shape(config, kind)
    fields = {
        "general.type": "model", "general.name": title,
        "general.file_type": int(_FILE_TYPES[kind]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **_list_shape_fields(config), **collect_tokenizer_fields(tok, config, stop_ids),
    }  # fmt: skip
    tensors = {name: _prepare(name, x, config) for name, x in _list_tensors(params, config).items()}
    types = {name: KINDS[kind] if len(x.shape) > 1 else VECTOR for name, x in tensors.items()}
    writer = gguf.GGUFWriter(file, config.family)
    try:
        for name, value in fields.items():
            _add_field(writer, name, value)
        for name, x in tensors.items():
            block, size = gguf.GGML_QUANT_SIZES[types[name]]
            count = int(np.prod(x.shape)) // block * size
            writer.add_tensor_info(
                to_gguf_name(name), x.shape, np.dtype(np.float32), count, types[name]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, x in tensors.items():
            writer.write_tensor_data(_encode(name, x, types[name]))
    finally:
        writer.close()


def _list_tensors(params: dict, config: transformer.ModelConfig) -> hf.Tensors:
    tensors = hf.export_tensors(params, config)
    if config.rope_scaling is not None:
        half = np.arange(0, config.head_dim, 2) / config.head_dim
        factors = transformer.compute_llama3_factors(config.rope_scaling, config.rope_theta**-half)
        divisors = np.asarray(1 / factors, np.float32)
        tensors[gguf_files.ROPE_FACTORS] = tensor_files.Tensor(divisors.shape, lambda: divisors)
    return tensors


def _prepare(
    name: str, tensor: tensor_files.Tensor, config: transformer.ModelConfig
) -> tensor_files.Tensor:
    """Returns a tensor that is read in GGUF's order of rows, as float32."""
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}
    module = name.split(".")[-2]
    if config.family != "llama" or module not in heads:
        return tensor
    return tensor_files.Tensor(tensor.shape, lambda: permute(tensor.read(), heads[module]))


def _encode(name: str, tensor: tensor_files.Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Reads and encodes a tensor; refuses values that float16 cannot hold."""
    if kind == gguf.GGMLQuantizationType.F16:
        return tensor_files.convert_dtype(name, tensor, np.dtype(np.float16)).read()
    values = np.asarray(tensor.read(), np.float32)
    # The scale of a block of Q8_0 is a float16 number: the largest magnitude divided by 127.
    if kind == gguf.GGMLQuantizationType.Q8_0 and (worst := float(np.abs(values).max())) > 8e6:
        raise ValueError(f"tensor {name} has a value of magnitude {worst:.6g}, which is too large")
    return gguf.quantize(values, kind)


def _list_shape_fields(config: transformer.ModelConfig) -> dict[str, Any]:
    """Returns the metadata that describe the model's shape."""
    fields = {
        "vocab_size": config.vocab_size, "context_length": config.max_position,
        "embedding_length": config.d_model, "block_count": config.n_layers,
        "feed_forward_length": config.d_ff, "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads, "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim, "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "attention.layer_norm_rms_epsilon": float(config.rms_eps),
    }  # fmt: skip
    return {f"{config.family}.{name}": value for name, value in fields.items()}


def _add_field(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    add: Mapping[type, Any] = {
        str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32,
        float: writer.add_float32, list: writer.add_array,
    }  # fmt: skip
    add[type(value)](name, value)


# ---- the tokenizer ---------------------------------------------------------------------------


def collect_tokenizer_fields(
    tok: transformers.PreTrainedTokenizerFast, config: transformer.ModelConfig,
    stop_ids: Iterable[int],
) -> dict[str, Any]:  # fmt: skip
    """Returns the metadata that describe a tokenizer.

    Args:
      tok: the tokenizer, from `tokenizer.load`.
      config: config of the model; ids that only the model has get the type UNUSED.
      stop_ids: the ids that end a text.

    Raises:
      ValueError: GGUF cannot represent the tokenizer, or more than three ids end a text.
    """
    state = json.loads(tok.backend_tokenizer.to_str())
    pieces = [f"[PAD{i}]" for i in range(config.vocab_size)]
    types = [tokenizer.UNUSED] * config.vocab_size
    for piece, i in tok.get_vocab().items():
        pieces[i], types[i] = piece, tokenizer.NORMAL
    for i, token in tok.added_tokens_decoder.items():
        types[i] = tokenizer.CONTROL if token.special else tokenizer.USER_DEFINED
    merges = state["model"]["merges"]
    start = tok.encode("", add_special_tokens=True)[:1]
    fields = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _find_splitter(state, tok),
        "tokenizer.ggml.tokens": pieces, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [x if isinstance(x, str) else " ".join(x) for x in merges],
        "tokenizer.ggml.add_bos_token": bool(start) and start[0] == tok.bos_token_id,
        **_list_special_fields(tok, stop_ids),
    }  # fmt: skip
    if tok.chat_template:
        fields["tokenizer.chat_template"] = tok.get_chat_template()
    _compare_tokenizers(tok, fields, config)
    return fields


def _list_special_fields(
    tok: transformers.PreTrainedTokenizerFast, stop_ids: Iterable[int]
) -> dict[str, int]:
    first: Any = tok.eos_token_id
    ends = [first] if first is not None else []
    ends += [i for i in stop_ids if i not in ends]
    if len(ends) > len(_ENDS):
        raise ValueError(
            f"a GGUF file can name {len(_ENDS)} end-of-text ids, but the model has {ends}"
        )
    found: dict[str, Any] = dict(zip(_ENDS, ends, strict=False))
    found |= {"bos": tok.bos_token_id, "padding": tok.pad_token_id, "unknown": tok.unk_token_id}
    return {f"tokenizer.ggml.{k}_token_id": i for k, i in found.items() if i is not None}


def _find_splitter(state: Mapping[str, Any], tok: transformers.PreTrainedTokenizerFast) -> str:
    """Returns the name of the tokenizer's splitter in `tokenizer.SPLITTERS`."""
    own = _simplify((state["pre_tokenizer"], state["normalizer"]))
    for name, (splitter, normalizer, ignore_merges) in tokenizer.SPLITTERS.items():
        empty = tokenizers.Tokenizer(models.BPE())
        empty.pre_tokenizer = splitter
        if normalizer is not None:
            empty.normalizer = normalizer
        known = json.loads(empty.to_str())
        same = own == _simplify((known["pre_tokenizer"], known["normalizer"]))
        if same and bool(state["model"].get("ignore_merges")) == ignore_merges:
            return name
    raise ValueError(
        f"the tokenizer {tok.name_or_path or ''} splits text in a way for which GGUF export knows "
        f"no name (known: {', '.join(tokenizer.SPLITTERS)}): use --format=hf"
    )


def _simplify(value: Any) -> Any:
    """Removes the option trim_offsets, which does not change any id."""
    if isinstance(value, dict):
        return {k: _simplify(item) for k, item in value.items() if k != "trim_offsets"}
    return [_simplify(item) for item in value] if isinstance(value, list | tuple) else value


def _compare_tokenizers(
    tok: transformers.PreTrainedTokenizerFast, fields: dict[str, Any],
    config: transformer.ModelConfig,
) -> None:  # fmt: skip
    """Refuses a tokenizer that is another one after it has been read back."""
    shape = {"general.architecture": config.family, **_list_shape_fields(config)}
    again = tokenizer.build_from_gguf(copy.copy(fields) | shape, pathlib.Path("the GGUF file"))
    sides = []
    for one in (tok, again):
        added = {
            i: (x.content, x.special, x.lstrip, x.rstrip, x.single_word)
            for i, x in one.added_tokens_decoder.items()
        }
        text = one.encode("a", add_special_tokens=True)
        sides.append({"vocabulary": one.get_vocab(), "added tokens": added, "start token": text})
    for part, value in sides[0].items():
        if value != sides[1][part]:
            raise ValueError(f"a GGUF file cannot represent the {part} of this tokenizer")
