"""Damaged model files: 20,000 changed headers, templates and JSON files, and no crash or hang.

Only the errors that a plan reports as one sentence may be raised: ValueError and OSError. A header
that lies about its sizes must not make the program allocate them.
"""

import contextlib
import json
import random
import resource
import time

import gguf as format
import numpy as np
import pytest

from copsd_jax.model import transformer
from copsd_jax.teaching import prompts, text_encoding
from copsd_jax.weights import gguf_files, hf, hf_config, hub, peft, tensor_files, tokenizer

TINY = hub.resolve_model_path("tiny")
SHAPE = transformer.SHAPES["tiny"]
BYTES = sorted(tokenizer._byte_alphabet())
VALUES = [
    *(None, True, False, 0, -1, 1, 2, 1.5, 1e300, 1 << 31, 1 << 63, 10**400, float("nan")),
    *(
        float("inf"),
        "",
        "x",
        "<|im_end|>",
        "\ud800",
        "llama",
        [],
        [1],
        [[]],
        ["x"],
        {},
        {"type": 1},
    ),
]


def write_gguf(folder):
    """A GGUF file with a model and a tokenizer, and headers of 4 KiB."""
    writer = format.GGUFWriter(path := folder / "m.gguf", "llama")
    for name, size in {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 32,
        "head_count": 2,
        "head_count_kv": 2,
    }.items():
        getattr(writer, f"add_{name}")(size)
    writer.add_layer_norm_rms_eps(1e-5)
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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_gguf(path):
    gguf_files._read_header.cache_clear()  # two files of one size, at one time
    for read in (hf_config.load_config, hf.open_tensors, hf_config.read_stop_ids):
        attempt(read, path)
    tok = tokenizer.load(path)
    tokenizer.list_token_bytes(tok)
    tokenizer.find_stop_ids(tok, path, 259)
    text_encoding.encode_text(tok, "ab 12 ab")


def write_safetensors(folder):
    one = tensor_files.Tensor((4, 3), lambda: np.ones((4, 3), np.float32))
    names = ("model.norm.weight", "lm_head.weight")
    path = folder / "model.safetensors"
    tensor_files.write_file(path, [(name, one) for name in names], np.dtype(np.float32))
    return path


def read_safetensors(path):
    for tensor in tensor_files.open_folder(path.parent).values():
        tensor.read()


def write_config(folder):
    raw = hf_config.to_config_json(SHAPE, "float32", {"eos_token_id": 5, "pad_token_id": 0})
    raw["rope_parameters"] = {
        "rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    tensor_files.write_json(folder / "config.json", raw)
    return folder / "config.json"


def read_config(path):
    attempt(lambda: hf_config.read_stop_ids(path.parent, 64))
    hf_config.load_config(path.parent)


def write_adapter(folder):
    raw = peft._to_config_json(["q", "k"], 4, 8.0, "base") | {"target_modules": "all-linear"}
    tensor_files.write_json(folder / peft.CONFIG, raw)
    return folder / peft.CONFIG


def read_adapter(path):
    with contextlib.suppress(FileNotFoundError):  # if the settings are accepted
        peft.open_adapter(path.parent, SHAPE)


def write_tokenizer(folder):
    """A tokenizer of the bytes and one merge, beside which the settings stay whole."""
    raw = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    raw["model"] |= {"vocab": {p: i for i, p in enumerate([*BYTES, "ab"])}, "merges": [["a", "b"]]}
    raw["added_tokens"] = raw["added_tokens"][:3]
    for i, token in enumerate(raw["added_tokens"]):
        token["id"] = 257 + i
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    config = {"eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
    tensor_files.write_json(folder / "tokenizer_config.json", config)
    return folder / "tokenizer.json"


def read_tokenizer(path):
    tok = tokenizer.load(path.parent)
    tokenizer.mark_valid_ids(tok, 300)
    tokenizer.list_token_bytes(tok)
    text_encoding.encode_templated(tok, "ab <|im_end|>\n", {})
    text_encoding.encode_text(tok, "ab 12 ab")


def write_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(tokenizer.load(TINY).chat_template, encoding="utf-8")
    return path


def read_template(path):
    tok = tokenizer.load(TINY)
    tok.chat_template = path.read_text(encoding="utf-8", errors="replace")
    prompts.find_turn_end(tok)
    prompts.has_thinking(tok)


FILES = {  # kind -> functions that write a whole file and read a damaged one; bytes of the header
    "gguf": (write_gguf, read_gguf, 8000),
    "safetensors": (write_safetensors, read_safetensors, 250),
    "config": (write_config, read_config, None),
    "adapter": (write_adapter, read_adapter, None),
    "tokenizer": (write_tokenizer, read_tokenizer, None),
    "template": (write_template, read_template, 4000),
}


def attempt(read, *args):
    with contextlib.suppress(ValueError, OSError):
        read(*args)


def damage_bytes(whole, header, draw):
    """Truncates the file, or overwrites, inserts or removes bytes of its header."""
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(min(header, len(data)) or 1)
        kind = draw.randrange(5)
        if kind == 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            data[at : at + 8] = draw.choice((0, 1, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
                                            ).to_bytes(8, "little")  # fmt: skip
        elif kind == 2:
            del data[at : at + draw.randrange(1, 20)]
        elif kind == 3:
            data[at:at] = data[draw.randrange(len(data) or 1) :][: draw.randrange(1, 20)]
        elif draw.random() < 0.2:
            del data[at:]
    return bytes(data)


def damage_json(whole, draw):
    """Replaces or removes values anywhere in a JSON file; now and then damages its bytes."""
    if draw.random() < 0.1:
        return damage_bytes(whole, len(whole), draw)
    raw = json.loads(whole)
    for _ in range(draw.choice((1, 1, 2))):
        node = raw
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.8:
                node = node[key]
            elif draw.random() < 0.2:
                del node[key]
                break
            else:
                node[key] = draw.choice(VALUES)
                break
    return json.dumps(raw).encode()


def check_damaged(folder, kind, cases, seed):
    write, read, header = FILES[kind]
    path = write(folder)
    read(path)
    whole, draw = path.read_bytes(), random.Random(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(cases):
        bad = damage_json(whole, draw) if header is None else damage_bytes(whole, header, draw)
        path.write_bytes(bad)
        start = time.process_time()
        try:
            attempt(read, path)
        except BaseException as error:
            error.add_note(f"{kind}, seed {seed}, case {case}: {bad[:3000]!r}")
            raise
        assert time.process_time() - start < 15, (kind, seed, case)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 19, f"{grown} KiB more"


@pytest.mark.parametrize("kind", list(FILES))
def test_damaged_files_give_one_sentence(tmp_path, kind):
    check_damaged(tmp_path, kind, {"template": 20, "tokenizer": 60}.get(kind, 100), 0)


CASES = {"gguf": 5000, "safetensors": 5000, "config": 3000, "adapter": 2000, "tokenizer": 3000}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", list(FILES))
def test_20000_damaged_files_give_one_sentence(tmp_path, kind):
    check_damaged(tmp_path, kind, CASES.get(kind, 2000), 1)
