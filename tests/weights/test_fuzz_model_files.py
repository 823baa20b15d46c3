"""Damaged model files: each is read, or refused in one sentence that names it; never a crash.

A header that lies about its sizes must not make the program allocate them.
"""

import contextlib
import functools
import random

import fuzz
import gguf_writer
import numpy as np
import pytest

from copsd_jax.model import transformer
from copsd_jax.teaching import text_encoding
from copsd_jax.weights import gguf_files, hf, hf_config, peft, tensor_files, tokenizer

SHAPE = transformer.SHAPES["tiny"]
BYTES = sorted(tokenizer._byte_alphabet())
VALUES = [
    *(None, True, False, 0, -1, 1, 2, 1.5, 1e300, 1 << 31, 1 << 63, 10**400, float("nan")),
    *(float("inf"), "", "x", "a/b", "..", "x\0", "x" * 300, "<|im_end|>", "\ud800", "llama"),
    *("10000", [], [1], [[]], ["x"], {}, {"type": 1}),
]  # fmt: skip
attempt = functools.partial(fuzz.attempt, spelled=True)


def write_gguf(folder):
    """A GGUF file with a model and a tokenizer, and headers of 4 KiB."""
    writer = gguf_writer.open_llama(path := folder / "m.gguf")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([*BYTES, "ab", "<|im_start|>", "<|im_end|>"])
    writer.add_token_types([1] * 257 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_chat_template("{{ messages }}")
    for name, shape in {
        "token_embd.weight": (259, 32),
        "rope_freqs.weight": (8,),
        "blk.0.attn_q.weight": (32, 32),
    }.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    gguf_writer.finish(writer)
    return path


def read_gguf(path):
    gguf_files._read_header.cache_clear()  # two files of one size, at one time
    for tensor in (attempt(lambda: hf.open_tensors(path), "m.gguf") or {}).values():
        tensor.read()
    tok = attempt(lambda: tokenizer.load(path), "m.gguf")
    attempt(lambda: hf_config.read_stop_ids(path, 259), "m.gguf")
    if tok is not None:
        attempt(lambda: tokenizer.list_token_bytes(tok), "tokenizer is not supported: token")
        attempt(lambda: tokenizer.find_stop_ids(tok, path, 259), "m.gguf")
        attempt(lambda: text_encoding.encode_text(tok, "ab 12 ab"), "")
    return tok


def write_safetensors(folder):
    one = tensor_files.Tensor((4, 3), lambda: np.ones((4, 3), np.float32))
    names = ("model.norm.weight", "lm_head.weight")
    path = folder / "model.safetensors"
    tensor_files.write_file(path, [(name, one) for name in names], np.dtype(np.float32))
    return path


def read_folder(path):
    found = attempt(lambda: tensor_files.open_folder(path.parent), str(path.parent))
    for tensor in (found or {}).values():
        assert tensor.read().shape == tensor.shape
    return found


def write_index(folder):
    one = tensor_files.Tensor((2,), lambda: np.ones(2, np.float32))
    items = {"model.norm.weight": one, "lm_head.weight": one}
    tensor_files.write_folder(folder, items, np.dtype(np.float32), 8)
    return folder / tensor_files.INDEX


def write_config(folder):
    raw = hf_config.to_config_json(SHAPE, "float32", {"eos_token_id": 5, "pad_token_id": 0})
    raw["rope_parameters"] = {
        "rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    tensor_files.write_json(folder / "config.json", raw)
    return folder / "config.json"


def read_config(path):
    attempt(lambda: hf_config.read_stop_ids(path.parent, 64), "config.json")
    return attempt(lambda: hf_config.load_config(path.parent), str(path.parent))


def write_generation(folder):
    raw = {"eos_token_id": [5, 7], "bos_token_id": 1, "pad_token_id": 0, "temperature": 0.6}
    tensor_files.write_json(folder / "generation_config.json", raw)
    return folder / "generation_config.json"


def read_generation(path):
    ids = {"bos_token_id": None, "eos_token_id": 5, "pad_token_id": None}
    found = attempt(lambda: hf_config.read_stop_ids(path.parent, 64), path.name)
    if found is not None:
        hf_config.to_generation_json(path.parent, ids)
    return found


def write_adapter(folder):
    about = {"base_model_name_or_path": "base", "target_modules": "all-linear"}
    raw = peft._to_config_json(["q", "k"], 4, 8.0) | about
    tensor_files.write_json(folder / peft.CONFIG, raw)
    return folder / peft.CONFIG


def read_adapter(path):
    with contextlib.suppress(FileNotFoundError):  # if the settings are accepted
        attempt(lambda: peft.open_adapter(path.parent, SHAPE), "adapter")


FILES = {  # kind -> functions that write a whole file and read a damaged one; bytes of the header
    "gguf": (write_gguf, read_gguf, 8000),
    "safetensors": (write_safetensors, read_folder, 250),
    "index": (write_index, read_folder, None),
    "config": (write_config, read_config, None),
    "generation": (write_generation, read_generation, None),
    "adapter": (write_adapter, read_adapter, None),
}


@fuzz.sizes(100)
@pytest.mark.parametrize("kind", list(FILES))
def test_damaged_files_give_one_sentence(tmp_path, kind, cases):
    write, read, header = FILES[kind]
    path = write(tmp_path)
    if kind != "adapter":
        assert read(path) is not None
    whole, r = path.read_bytes(), random.Random(16)
    for case in range(cases):
        damage = fuzz.change_json(r, whole, VALUES) if header is None else fuzz.damage_header(
            r, whole, header
        )  # fmt: skip
        path.write_bytes(damage)
        try:
            with fuzz.bounded():
                read(path)
        except BaseException as error:
            error.add_note(f"{kind}, case {case}: {damage[:3000]!r}")
            raise
