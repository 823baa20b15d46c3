"""Tokenizers from Hugging Face folders and GGUF files, with stop ids, valid ids and token bytes.

Only byte-level BPE is supported (Qwen, Llama 3, SmolLM2). In byte-level BPE, every token is a
sequence of bytes, so text can be decoded token by token. Stop strings are matched against the bytes
of the tokens.
"""

import contextlib
import copy
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from copsd_jax.runtime import rust_errors
from copsd_jax.weights import gguf_files, hf_config, hub, tensor_files

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types in GGUF files
MAX_VOCABULARY = 10**7  # upper bound of ids; the largest vocabularies have fewer than 300,000 ids
TRIAL_TEXTS = ("", "3 + 4?", " a\u0301b\n")  # encoded and decoded when a tokenizer is loaded


def _build_bpe_splitter(numbers: str) -> pre_tokenizers.PreTokenizer:
    """Returns the pre-tokenizer of Llama 3 or Qwen; the regex `numbers` matches digit groups."""
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    cut = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([cut, letters])


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_DIGITS = pre_tokenizers.Digits(individual_digits=True)
# tokenizer.ggml.pre -> (pre-tokenizer, normalizer, whether words in the vocabulary skip merges)
SPLITTERS = {
    "smollm": (pre_tokenizers.Sequence([_DIGITS, _GPT2]), None, False),
    "gpt-2": (_GPT2, None, False),
    "qwen2": (_build_bpe_splitter(r"\p{N}"), normalizers.NFC(), False),
    "llama-bpe": (_build_bpe_splitter(r"\p{N}{1,3}"), None, True),
}


def load(path: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
    """Loads the tokenizer of a model.

    tokenizer.json is used unchanged. The model-specific tokenizer classes in transformers are not
    used, because they replace parts of tokenizer.json. No code from the model's folder is run.

    Args:
      path: a folder with tokenizer.json, or a GGUF file, as returned by `hub.resolve_model_path`.

    Raises:
      FileNotFoundError: if there is no tokenizer.json.
      ValueError: if the tokenizer cannot be read, or if its kind is not supported.
    """
    gguf = path.suffix == ".gguf"
    if not gguf and not (path / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{path} has no tokenizer.json; set model.tokenizer to a folder")
    if gguf:
        tok = build_from_gguf(gguf_files.read_header(path).metadata, path)
    else:
        _check_folder(path)
        with _explain_errors(path):
            tok = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    _check_tokenizer(tok, path)
    return tok


def _check_folder(folder: pathlib.Path) -> None:
    """Refuses files that are no JSON objects, and a normalizer that could end the process.

    A normalizer of the type Precompiled holds binary data that begin with their own size. The
    library allocates this size unchecked, and a failed allocation in Rust ends the process.
    Byte-level BPE has no such normalizer.
    """
    if (folder / "tokenizer_config.json").is_file():
        tensor_files.read_json(folder / "tokenizer_config.json")
    normalizer = tensor_files.read_json(folder / "tokenizer.json").get("normalizer")
    if '"Precompiled"' in json.dumps(normalizer):
        raise ValueError(
            f"{folder / 'tokenizer.json'}: the normalizer Precompiled is not supported, because "
            "only byte-level BPE is; set model.tokenizer to another folder"
        )


def _explain_errors(path: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Turns each error of the libraries in the `with` block into a one-sentence ValueError."""
    return rust_errors.explain_rust_errors(
        f"the tokenizer in {path} cannot be read",
        "update the packages tokenizers and transformers if the file is newer, or set "
        "model.tokenizer to another folder",
    )


def _check_tokenizer(tok: transformers.PreTrainedTokenizerFast, path: pathlib.Path) -> None:
    """Refuses ids that no model has, and a tokenizer that fails at its first text.

    To write a tokenizer, the library spends time and memory on every number from 0 to the highest
    id. A single wrong id that is very high could therefore take all memory.
    """
    with _explain_errors(path):
        highest = max(tok.get_vocab().values(), default=-1)
    if not 0 <= highest < MAX_VOCABULARY:
        raise ValueError(
            f"the tokenizer in {path} has {'no ids' if highest < 0 else f'the id {highest}'}, but "
            f"must have ids below {MAX_VOCABULARY}: correct tokenizer.json, or set model.tokenizer "
            "to another folder"
        )
    with _explain_errors(path):
        backend = tok.backend_tokenizer
        if backend.padding or backend.truncation:  # a length of 10**12 would take all memory
            backend = copy.deepcopy(backend)
            backend.no_padding()
            backend.no_truncation()
        for text in TRIAL_TEXTS:
            backend.decode(backend.encode(text).ids, skip_special_tokens=False)


def fingerprint(tok: transformers.PreTrainedTokenizerFast) -> dict[str, str]:
    """Returns the SHA-256 of the tokenizer's content and of each of its files, by name.

    A tokenizer from a GGUF file has no files of its own, so only its content is hashed.

    Args:
      tok: the tokenizer, from `load`.
    """
    content = json.dumps([tok.backend_tokenizer.to_str(), tok.chat_template])
    parts = {"tokenizer content": content.encode()}
    if tok.name_or_path:
        files = [pathlib.Path(tok.name_or_path) / name for name in hub.TOKENIZER_FILES]
        parts |= {file.name: file.read_bytes() for file in files if file.is_file()}
    return {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}


def _choose_splitter(fields: Mapping[str, Any], path: pathlib.Path) -> tuple:
    kind, name = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(f"{path}: the tokenizer must be gpt2 (byte-level BPE), not {kind!r}")
    if name not in SPLITTERS:
        known = ", ".join(SPLITTERS)
        raise ValueError(f"{path}: tokenizer.ggml.pre must be one of {known}, not {name!r}")
    return SPLITTERS[name]


def build_from_gguf(
    fields: Mapping[str, Any], path: pathlib.Path
) -> transformers.PreTrainedTokenizerFast:
    """Builds a tokenizer from the vocabulary, merges, splitter and chat template of a GGUF file.

    Args:
      fields: the metadata of the file.
      path: path of the file, for messages.

    Raises:
      ValueError: the metadata do not describe a supported tokenizer.
    """
    splitter, normalizer, ignore_merges = _choose_splitter(fields, path)
    pieces, types, lines = (
        _get_list(fields, f"tokenizer.ggml.{name}", kind, path)
        for name, kind in {"tokens": str, "token_type": int, "merges": str}.items()
    )
    if len(types) != len(pieces):
        raise ValueError(f"{path} has {len(pieces)} tokens, but {len(types)} token types")
    vocab = {piece: i for i, piece in enumerate(pieces) if types[i] != UNUSED}
    merges: list[Any] = [tuple(line.split(" ")) for line in lines]
    if wrong := [line for line, pair in zip(lines, merges, strict=True) if len(pair) != 2]:
        raise ValueError(f"{path}: the merge {wrong[0]!r} does not consist of two parts")
    special = {
        f"{role}_token": pieces[_check_id(fields[key], f"{path}: {key}", len(pieces))]
        for role, name in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items()
        if (key := f"tokenizer.ggml.{name}_token_id") in fields
    }
    if "general.architecture" not in fields:
        raise ValueError(f"{path} has no metadata entry general.architecture")
    positions = gguf_files.get_number(
        fields, f"{fields['general.architecture']}.context_length", path
    )
    with _explain_errors(path):
        tok = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
        if normalizer is not None:
            tok.normalizer = normalizer
        tok.pre_tokenizer, tok.decoder = splitter, decoders.ByteLevel()
        tok.add_tokens(
            [
                tokenizers.AddedToken(piece, special=kind == CONTROL, normalized=False)
                for piece, kind in zip(pieces, types, strict=True)
                if kind in (CONTROL, USER_DEFINED)
            ]
        )
    tok.post_processor = _post_processor(fields, special, path)
    with _explain_errors(path):
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=tok,
            name_or_path=str(path),
            chat_template=fields.get("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            model_max_length=positions,
            **special,
        )


def _get_list(fields: Mapping[str, Any], key: str, kind: type, path: pathlib.Path) -> list:
    """Returns a list from the metadata after checking the type of the list's entries."""
    values = fields.get(key)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise ValueError(
            f"{path}: the metadata entry {key} is missing, or is not a list of {kind.__name__}"
        )
    return values


def _check_id(value: Any, key: str, count: int) -> int:
    """Returns a token id from the metadata after checking that the file has such a token."""
    if type(value) is not int or not 0 <= value < count:
        raise ValueError(f"{key} is {value!r}, but the file has the ids 0 to {count - 1}")
    return value


def _post_processor(
    fields: Mapping[str, Any], special: Mapping[str, str], path: pathlib.Path
) -> Any:
    """Builds a post-processor that adds the BOS token to plain text if add_bos_token is true.

    Chat templates write the BOS token themselves. If the file has no entry add_bos_token, the BOS
    token is added only for the splitter llama-bpe, as in llama.cpp.
    """
    default = fields["tokenizer.ggml.pre"] == "llama-bpe"
    if not fields.get("tokenizer.ggml.add_bos_token", default):
        return processors.ByteLevel(trim_offsets=False)
    if (bos := special.get("bos_token")) is None:
        raise ValueError(
            f"{path}: plain text begins with a BOS token, but the metadata entry "
            "tokenizer.ggml.bos_token_id is missing"
        )
    with _explain_errors(path):
        return processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, fields["tokenizer.ggml.bos_token_id"])],
        )


def find_stop_ids(
    tok: transformers.PreTrainedTokenizerBase, path: pathlib.Path, vocab_size: int | None = None,
    turn_end: int | None = None,
) -> tuple[int, ...]:  # fmt: skip
    """Finds the end-of-text ids in the generation settings, the config and the tokenizer.

    Args:
      tok: the tokenizer.
      path: the resolved path of the model.
      vocab_size: the number of embeddings of the model; None accepts every id.
      turn_end: the id with which the chat template ends a turn; None if there is no such id.

    Returns:
      The ids in ascending order.

    Raises:
      ValueError: if there is no end-of-text id, or if the model lacks one of the ids.
    """
    eos: Any = tok.eos_token_id
    ids = {*hf_config.read_stop_ids(path, vocab_size), eos, turn_end} - {None}
    if not ids:
        raise ValueError(f"{path} does not name an end-of-text token")
    return tuple(sorted(ids))


def describe_contradictions(
    tok: transformers.PreTrainedTokenizerBase, turn_end: int | None
) -> list[str]:
    """Describes contradictions in a tokenizer's files that do not stop a run, one in each line.

    Args:
      tok: the tokenizer, from `load`.
      turn_end: the id with which the chat template ends a turn; None if there is no such id.
    """
    lines = []
    if turn_end not in (None, tok.eos_token_id):
        lines.append(
            f"the chat template ends a turn with {tok.convert_ids_to_tokens(turn_end)!r}, but the "
            f"tokenizer's end token is {tok.eos_token!r}: both end a completion"
        )
    folder = pathlib.Path(tok.name_or_path)
    file, other = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if tok.name_or_path and file.is_file() and other.is_file():
        own = tensor_files.read_json(file).get("chat_template")
        if own is not None and own != other.read_text(encoding="utf-8"):
            lines.append(
                f"{other} is used, as in transformers, although {file.name} has another template"
            )
    return lines


def mark_valid_ids(tok: transformers.PreTrainedTokenizerBase, vocab_size: int) -> np.ndarray:
    """Marks the token ids that the tokenizer has; the model's other ids are never sampled.

    Args:
      tok: the tokenizer.
      vocab_size: V, the number of embeddings in the model.

    Returns:
      bool [V].

    Raises:
      ValueError: if the tokenizer has ids that the model lacks.
    """
    ids = np.fromiter(tok.get_vocab().values(), np.int64)
    if ids.max() >= vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {ids.max()}, but the model has only {vocab_size} "
            "embeddings: the tokenizer does not belong to this model"
        )
    valid = np.zeros(vocab_size, np.bool_)
    valid[ids] = True
    return valid


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Maps each letter of the byte-level alphabet to its byte (GPT-2's table).

    A byte that is printable in Latin-1 is represented by its Latin-1 character. All other bytes, in
    ascending order, are represented by the characters from code point 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


def list_token_bytes(tok: transformers.PreTrainedTokenizerFast) -> list[bytes]:
    """Lists the bytes of each token id.

    For an added token, such as a special token, the bytes are the token's text; for a missing id,
    the bytes are b"". A character may begin in one token and end in the next, so the bytes of a
    text's tokens must be joined before decoding. Decoding the joined bytes as UTF-8 with
    errors="replace" gives the same text as decoding with the tokenizer.

    Raises:
      ValueError: if the tokenizer is not byte-level BPE.
    """
    added = {i: token.content for i, token in tok.added_tokens_decoder.items()}
    vocab = tok.get_vocab()
    out = [b""] * (max(vocab.values()) + 1)
    byte_of = _byte_alphabet()
    for piece, i in vocab.items():
        if i in added:
            out[i] = added[i].encode()
        elif unknown := set(piece) - byte_of.keys():
            raise ValueError(
                f"the tokenizer is not supported: token {i} is {piece!r}, and {min(unknown)!r} is "
                "not a letter of byte-level BPE"
            )
        else:
            out[i] = bytes(byte_of[letter] for letter in piece)
    return out
