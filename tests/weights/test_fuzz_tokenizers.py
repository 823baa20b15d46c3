"""Damaged tokenizers: each is read, or refused in one sentence; panics of Rust, wrong ids."""

import copy
import functools
import json
import random

import fuzz
import pytest
import test_fuzz_model_files
import tokenizers
import transformers

from copsd_jax.runtime import signals
from copsd_jax.teaching import text_encoding
from copsd_jax.weights import hub, tensor_files, tokenizer

TINY = hub.resolve_model_path("tiny")
BYTES = test_fuzz_model_files.BYTES
TEXTS = ("", "ab 12 ab", " a\u0301\n😀\0", "ab <|im_end|>\n")
SPLIT = {"behavior": "Isolated", "invert": False}
# Parts of tokenizers, by the sections that can have them; most are unusual, and some are wrong.
PARTS = {
    "normalizer": [
        *({"type": kind} for kind in ("NFC", "NFKD", "Lowercase", "StripAccents", "Nmt", "X")),
        *({"type": "Prepend", "prepend": text} for text in ("", "ab", "\u0301")),
        *({"type": "Precompiled", "precompiled_charsmap": s} for s in ("", "AAAA", "/////w==")),
        *({"type": "Replace", "pattern": {"Regex": r}, "content": ""} for r in ("(", "", "(a*)*b")),
        {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
    ],
    "pre_tokenizer": [
        *({"type": "FixedLength", "length": size} for size in (0, 1, 1 << 63)),
        *({"type": "Split", "pattern": {"Regex": r}, **SPLIT} for r in ("[", "", "(a|aa)+$")),
        *({"type": "Metaspace", "replacement": c, "prepend_scheme": "first"} for c in ("", "a")),
        {"type": "Split", "pattern": {"String": ""}, "behavior": "MergedWithNext", "invert": True},
        {"type": "Digits", "individual_digits": True}, {"type": "Whitespace"}, {"type": "X"},
    ],
    "post_processor": [
        *({"type": kind, "sep": ["x", 1 << 31], "cls": ["y", 1], "trim_offsets": True,
           "add_prefix_space": True} for kind in ("RobertaProcessing", "BertProcessing")),
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
         "pair": [], "special_tokens": {"x": {"id": "x", "ids": [], "tokens": ["x"]}}},
    ],
    "decoder": [
        {"type": "Fuse"}, {"type": "ByteFallback"}, {"type": "BPEDecoder", "suffix": ""},
        {"type": "Strip", "content": "a", "start": 99, "stop": (1 << 64) - 1}, {"type": "X"},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    ],
    "model": [
        {"type": "Unigram", "unk_id": 99, "vocab": [["a", 0.0]], "byte_fallback": False},
        {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]], "byte_fallback": True},
        {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 0}},
        {"type": "WordPiece", "unk_token": "x", "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 3, "vocab": {}},
        {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 7}, "merges": ["a b"], "unk_token": "zz",
         "byte_fallback": True, "dropout": 2.0},
        {"type": "BPE", "vocab": {"a": 1 << 31, "b": 1}, "merges": [], "end_of_word_suffix": "b"},
    ],
    "truncation": [
        {"direction": "Left", "max_length": size, "strategy": "OnlySecond", "stride": 5}
        for size in (0, 2, 1 << 62)
    ],
    "padding": [
        {"strategy": s, "direction": "Left", "pad_to_multiple_of": n, "pad_id": 0, "pad_type_id": 0,
         "pad_token": "x"} for s, n in (({"Fixed": 1 << 40}, None), ("BatchLongest", 0))
    ],
}  # fmt: skip
VALUES = [*test_fuzz_model_files.VALUES, "##", "ab", "\u0120", (1 << 32) - 1, (1 << 32) - 2, 10**6]
LISTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders",
         "post_processor": "processors"}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _panics_without_backtrace():
    """Rust looks up the names of its functions at each panic, which takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUST_BACKTRACE", "0")
        yield


def write_tokenizer(folder):
    """A tokenizer of the bytes and one merge."""
    raw = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    raw["model"] |= {"vocab": {p: i for i, p in enumerate([*BYTES, "ab"])}, "merges": [["a", "b"]]}
    raw["added_tokens"] = raw["added_tokens"][:3]
    for i, token in enumerate(raw["added_tokens"]):
        token["id"] = 257 + i
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    write_config(folder)
    return folder / "tokenizer.json"


def write_config(folder):
    config = {
        "eos_token": "<|im_end|>", "chat_template": "{{ messages }}", "pad_token": None,
        "additional_special_tokens": ["<|im_start|>"], "model_max_length": 64,
        "padding_side": "left",
        "add_bos_token": False, "clean_up_tokenization_spaces": False, "extra_special_tokens": {},
        "added_tokens_decoder": {"259": {"content": "<|im_end|>", "special": True}},
    }  # fmt: skip
    tensor_files.write_json(folder / "tokenizer_config.json", config)
    return folder / "tokenizer_config.json"


def write_both(folder):
    write_tokenizer(folder)
    return write_config(folder)


def read(path):
    folder = str(path.parent)
    tok = fuzz.attempt(lambda: tokenizer.load(path.parent), folder, spelled=True)
    if tok is None:
        return None
    valid = fuzz.attempt(lambda: tokenizer.mark_valid_ids(tok, 300), "the tokenizer has ids up to")
    if valid is not None:
        fuzz.attempt(lambda: tokenizer.list_token_bytes(tok), "the tokenizer is not supported")
    tokenizer.fingerprint(tok)
    for text in TEXTS:
        fuzz.attempt(lambda text=text: text_encoding.encode_templated(tok, text, {}), folder, True)
        # A vocabulary may itself give a special id.
        found = fuzz.attempt(lambda text=text: text_encoding.encode_text(tok, text), "", True)
        if found is not None:
            fuzz.attempt(lambda ids=found.ids: text_encoding.decode_ids(tok, ids), folder, True)
    return tok


def damage(r, kind, whole):
    if kind == "tokenizer" and r.random() < 0.4:
        raw = json.loads(whole)
        for section in r.sample(list(PARTS), r.choice((1, 1, 2))):
            raw[section] = copy.deepcopy(r.choice(PARTS[section]))
            if section in LISTS and r.random() < 0.2:
                other = copy.deepcopy(r.choice(PARTS[section]))
                raw[section] = {"type": "Sequence", LISTS[section]: [raw[section], other]}
        whole = json.dumps(raw).encode()
    return fuzz.change_json(r, whole, VALUES) if r.random() < 0.8 else whole


FILES = {"tokenizer": (write_tokenizer, read, None), "tokenizer_config": (write_both, read, None)}


@fuzz.sizes(60)
@pytest.mark.parametrize("kind", list(FILES))
def test_damaged_tokenizers_give_one_sentence(tmp_path, kind, cases):
    path, accepted = FILES[kind][0](tmp_path), 0
    assert read(path) is not None
    whole, r = path.read_bytes(), random.Random(16)
    for case in range(cases):
        path.write_bytes(changed := damage(r, kind, whole))
        try:
            with fuzz.bounded():
                accepted += read(path) is not None
        except BaseException as error:
            error.add_note(f"{kind}, case {case}: {changed[:5000]!r}")
            raise
    assert accepted > cases / 10


# Cases that were found.


def write_changed(folder, change):
    path = write_tokenizer(folder)
    raw = json.loads(path.read_bytes())
    change(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def put(section, value):
    return lambda raw: raw.update({section: value})


PANICS = {
    "while it is read": lambda raw: raw["model"].update(continuing_subword_prefix="##"),
    "at any text": put("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    "at some texts": put("normalizer", {"type": "Prepend", "prepend": ""}),
}


@pytest.mark.parametrize("name", list(PANICS))
def test_panics_become_one_sentence(tmp_path, name):
    path = write_changed(tmp_path, PANICS[name])
    with pytest.raises(BaseException) as theirs:
        tokenizers.Tokenizer.from_file(str(path)).encode("ab")
    assert type(theirs.value).__name__ == "PanicException"
    assert not isinstance(theirs.value, Exception)
    with pytest.raises(ValueError, match=f"^the tokenizer in {tmp_path} cannot be read: ") as ours:
        tokenizer.load(tmp_path)
    assert "set model.tokenizer to another folder" in str(ours.value)
    assert "\n" not in str(ours.value)


def test_a_panic_at_a_later_text_becomes_one_sentence(tmp_path, monkeypatch):
    write_changed(tmp_path, PANICS["at some texts"])
    monkeypatch.setattr(tokenizer, "TRIAL_TEXTS", ("", "3 + 4?"))
    tok = tokenizer.load(tmp_path)
    for encode in (
        functools.partial(text_encoding.encode_text, tok),
        functools.partial(text_encoding.encode_templated, tok, literal={}),
        functools.partial(text_encoding.find_token_spans, tok),
    ):
        encode("3 + 4?")
        with pytest.raises(
            ValueError, match=f"^the tokenizer in {tmp_path} fails at a text: index"
        ):
            encode("ab")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), signals.Stopped(15)])
def test_signals_pass(tmp_path, monkeypatch, error):
    def stop(*_, **__):
        raise error

    path = write_tokenizer(tmp_path)
    tok = tokenizer.load(tmp_path)
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", stop)
    with pytest.raises(type(error)):
        tokenizer.load(path.parent)
    monkeypatch.setattr(text_encoding, "_copy_backend", lambda *_, **__: tok)
    monkeypatch.setattr(type(tok), "encode", stop)
    with pytest.raises(type(error)):
        text_encoding.encode_text(tok, "a")


def test_a_normalizer_with_a_size_of_its_own_is_refused(tmp_path):
    """The library allocates 4 GiB for these 4 bytes; where it cannot, the process is aborted."""
    part = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    for normalizer in (part, {"type": "Sequence", "normalizers": [{"type": "NFC"}, part]}):
        path = write_changed(tmp_path, put("normalizer", normalizer))
        with pytest.raises(ValueError, match=f"^{path}: the normalizer Precompiled is not"):
            tokenizer.load(tmp_path)


def test_a_panic_while_decoding_becomes_one_sentence(tmp_path, monkeypatch):
    write_changed(
        tmp_path, put("decoder", {"type": "Strip", "content": "a", "start": 0, "stop": 99})
    )
    monkeypatch.setattr(tokenizer, "TRIAL_TEXTS", ())
    tok = tokenizer.load(tmp_path)
    with pytest.raises(BaseException, match="index out of bounds") as theirs:
        tok.decode([BYTES.index("a")])
    assert type(theirs.value).__name__ == "PanicException"
    with pytest.raises(ValueError, match=f"^the tokenizer in {tmp_path} fails at a text: index"):
        text_encoding.decode_ids(tok, [BYTES.index("a")])


def test_an_id_that_no_model_has_is_refused(tmp_path):
    """To write such a tokenizer, the library counts up to the id: it took all memory."""
    write_changed(tmp_path, lambda raw: raw["model"]["vocab"].update(F=(1 << 32) - 2))
    with pytest.raises(ValueError, match=f"^the tokenizer in {tmp_path} has the id 4294967294"):
        tokenizer.load(tmp_path)


def test_a_padding_of_a_terabyte_is_not_made(tmp_path):
    """Neither is it lost: the fingerprint is that of the file."""
    write_changed(tmp_path, put("padding", PARTS["padding"][0]))
    tok = tokenizer.load(tmp_path)
    assert tok.backend_tokenizer.padding["length"] == 1 << 40
    assert text_encoding.encode_text(tok, "ab").ids == [256]
