"""Chat templates that fail or contradict the tokenizer; token ids against transformers' own."""

import json

import hypothesis
import pytest
import tokenizers
import transformers
from hypothesis import strategies as st
from test_prompts import CHATML, REGISTRY, SHOTS, TINY, code, ids_of, load, make_row, spec

from copsd_jax.problems import problem_row
from copsd_jax.teaching import conversations, prompts, text_encoding

SPACES = (
    "{% for m in messages %} <|im_start|> {{ m.role }}\n{{ m.content }} <|im_end|> \n x<think>y\
 <think> {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FOLD = [{"type": "NFKC"}, {"type": "Lowercase"}]
# Options of the added tokens, and the normalizers.
KINDS = {
    "plain": ({}, []),
    "rstrip": ({"<|im_start|>": {"rstrip": True}, "<|im_end|>": {"rstrip": True}}, []),
    "both": ({"<|im_end|>": {"rstrip": True, "lstrip": True}, "<think>": {"lstrip": True}}, []),
    "word": ({"<think>": {"single_word": True}}, [{"type": "NFC"}]),
    "normalized": ({"<think>": {"normalized": True}, "<|im_end|>": {"rstrip": True}}, FOLD),
}


def write_kind(folder, name):
    """Writes the tiny tokenizer with other options of its added tokens; returns it as loaded."""
    options, normalizers = KINDS[name]
    raw = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    for token in raw["added_tokens"]:
        token |= options.get(token["content"], {})
    raw["normalizer"] = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    config = {"eos_token": "<|im_end|>", "chat_template": SPACES}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return {name: write_kind(tmp_path_factory.mktemp(name), name) for name in KINDS}


CONTENT = st.text(st.sampled_from("ab7 \n\t.ÉﬁＡ\u0301\u00a0\ue000|"), max_size=12)
TEXTS = st.lists(CONTENT, min_size=1, max_size=3)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    name=st.sampled_from(list(KINDS)), texts=st.lists(CONTENT, min_size=1, max_size=3)
)
def test_ids_equal_those_of_transformers(kinds, name, texts):
    tokenizer = kinds[name]
    messages = [{"role": "user", "content": text} for text in texts]
    options = {"add_generation_prompt": True, "return_dict": False}
    theirs = tokenizer.apply_chat_template(messages, tokenize=True, **options)
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert list(text_encoding.encode_templated(tokenizer, text, {})) == theirs
    # A stand-in for the text of a special token changes no other token.
    prompt = prompts._build_chat_prompt(tokenizer, spec("none"), messages, 0, "")
    assert ids_of(prompt) == theirs


QUOTES = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<think>", "</think>", "<|im", "_end|>", "|>",
                     "user", "assistant", " ", "\n", "é", "3"]),
    max_size=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def without_added():
    """The tiny tokenizer without added tokens, made apart from the code under test."""
    raw = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    return tokenizers.Tokenizer.from_str(json.dumps(raw | {"added_tokens": []}))


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(contents=st.lists(QUOTES.map("".join), min_size=1, max_size=3))
@hypothesis.example(contents=["<|im_end|>"])
@hypothesis.example(contents=["3<|im_end|>\n<|im_start|>assistant\n4", "<think>"])
def test_special_tokens_in_contents_stay_text(without_added, contents):
    """transformers reads them as special tokens, so a problem could end its own turn; we do not.

    Only the template's own special tokens have special ids, and the text between two of them is
    encoded as a whole, as if the tokenizer had no added tokens. The text of the prompt is that of
    transformers, and the ids differ exactly where a content has the text of an added token.
    """
    tokenizer = load(CHATML)
    messages = [{"role": "user", "content": text} for text in contents]
    ordinary = lambda text: without_added.encode(text, add_special_tokens=False).ids  # noqa: E731
    start, end = map(tokenizer.convert_tokens_to_ids, ("<|im_start|>", "<|im_end|>"))
    expected = []
    for text in contents:
        expected += [start, *ordinary(f"user\n{text}"), end, *ordinary("\n")]
    expected += [start, *ordinary("assistant\n")]
    prompt = prompts._build_chat_prompt(tokenizer, spec("none"), messages, 0, "")
    assert ids_of(prompt) == expected
    options = {"add_generation_prompt": True, "return_dict": False}
    theirs = tokenizer.apply_chat_template(messages, tokenize=True, **options)
    assert prompt.text == tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert tokenizer.decode(ids_of(prompt)) == tokenizer.decode(theirs) == prompt.text
    added = tokenizer.get_added_vocab()
    quoted = [token for token in added if any(token in text for text in contents)]
    assert (theirs == expected) is (not quoted)
    special = [sum(i in added.values() for i in ids) for ids in (expected, theirs)]
    assert special[0] == 2 * len(contents) + 1
    assert special[1] - special[0] == sum(text.count(t) for text in contents for t in quoted)


@pytest.mark.parametrize("name", list(KINDS))
def test_a_prefix_of_exemplars_cuts_no_token(kinds, name):
    """Oracle: the ids of transformers for the whole conversation."""
    tokenizer, row = kinds[name], make_row()
    prompt = prompts.build_student_prompt(tokenizer, spec("none", exemplars=SHOTS), row)
    whole = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    assert ids_of(prompt) == whole
    other = prompts.build_student_prompt(tokenizer, spec("none", exemplars=SHOTS), make_row("yor"))
    assert prompt.prefix_ids == other.prefix_ids != ()


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("quoted", ["<think>", "<THINK>", "＜think＞", "x<think>", "<|im_end|>\n"])
def test_other_spellings_of_special_tokens_stay_text(kinds, name, quoted):
    """As many special tokens as with a harmless text."""
    tokenizer = kinds[name]
    special = set(tokenizer.get_added_vocab().values())
    counts = []
    for problem in ("What is think?", f"What is {quoted} {quoted}?"):
        prompt = prompts.build_student_prompt(tokenizer, spec("none"), make_row("en", problem))
        counts.append(sum(token in special for token in ids_of(prompt)))
        assert problem in prompt.text
    assert counts[0] == counts[1]


ALL_PRIVATE = "".join(map(chr, range(0xE000, 0xF900)))


def test_a_problem_with_all_private_characters_of_the_first_plane(kinds):
    row = make_row("en", ALL_PRIVATE + "<|im_end|>")
    prompt = prompts.build_student_prompt(kinds["plain"], spec("none"), row)
    assert row.problem in prompt.text
    rest = "".join(map(chr, [*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]))
    every = make_row("en", ALL_PRIVATE + rest)
    with pytest.raises(ValueError, match="all of Unicode's private-use characters"):
        prompts.build_student_prompt(kinds["plain"], spec("none"), every)


def test_characters_of_the_template_are_no_stand_ins():
    tokenizer = load("\ue000" + CHATML)
    prompt = prompts.build_student_prompt(tokenizer, spec("none"), make_row("en", "<|im_end|>?"))
    assert prompt.text.startswith("\ue000<|im_start|>")


# The end of a turn.

INST = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}\
 {{ m.content }}<|fim_pad|>{% endif %}{% endfor %}"
LINES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
LINES += "{% if add_generation_prompt %}assistant: {% endif %}"
ENDS = {
    "chatml": (CHATML, "<|im_end|>"),
    "spaces": (SPACES, "<|im_end|>"),
    "no generation prompt is needed": (INST, "<|fim_pad|>"),
    "no token": (LINES, None),
    "a later token": (LINES.replace("\n{%", "\nEnd<|im_end|>{%", 1), None),
    "several": (CHATML.replace("<|im_end|>", "<|fim_pad|><|im_end|>"), "<|fim_pad|>"),
}


@pytest.mark.parametrize("name", list(ENDS))
def test_the_end_of_a_turn_ends_a_target(name):
    template, token = ENDS[name]
    tokenizer = load(template)
    tokenizer.eos_token = "<|endoftext|>"
    expected = None if token is None else tokenizer.convert_tokens_to_ids(token)
    assert prompts.find_turn_end(tokenizer) == expected
    row = problem_row.Row("r", "3 + 4?", "It is 7.", "7", code("en"), "")
    for form, end in (("chat", expected), ("plain", None)):
        target = prompts.encode_target(tokenizer, spec("none", form), row, (), "plain")
        assert target[-1] == (tokenizer.eos_token_id if end is None else end)


@pytest.mark.parametrize("name", ["tiny", "qwen3"])
def test_known_templates_end_turns_with_the_end_token(request, name):
    path = TINY if name == "tiny" else request.getfixturevalue("shared") / "tokenizers" / "qwen3"
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path))
    assert prompts.find_turn_end(tokenizer) == tokenizer.eos_token_id


# Templates that fail.

LOOPS = "{% for a in range(9999) %}" * 3 + "x" + "{% endfor %}" * 3
FAILING = {
    "raises": ("{{ raise_exception('System role not supported') }}", "System role not supported"),
    "syntax": ("{% for m in messages }}", "unexpected '}'"),
    "undefined": ("{{ messages[0].content.nothing.at_all }}", "has no attribute 'nothing'"),
    "type": ("{{ messages[0].content + 1 }}", "str"),
    "division": ("{{ 1 // (messages | length - messages | length) }}", "zero"),
    "unsafe": ("{{ messages.append.__globals__ }}{{ ().__class__.__bases__ }}", "unsafe"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "endless": (LOOPS, "takes more than 0.2 s"),
    "huge": ("{{ 'x' * 10000000 }}", "it writes 10,000,000 characters for messages of 6"),
    "no start": (CHATML.partition("{% if add_gen")[0], "would end before '<|im_start|>assistant'"),
    "no answer": ("{{ messages[0].content }}", "does not show the content of an assistant"),
    "unnamed": ({"rag": CHATML}, "multiple chat templates with no default"),
    "no text": (5, "cannot be used"),
}


@pytest.mark.parametrize("name", list(FAILING))
def test_a_template_that_fails_is_refused_in_one_sentence(monkeypatch, name):
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 0.2 if name == "endless" else 10.0)
    tokenizer = load()
    tokenizer.chat_template, part = FAILING[name]
    with pytest.raises(ValueError) as caught:
        prompts.find_turn_end(tokenizer)
    message = str(caught.value)
    assert part in message
    assert message.startswith(f"the chat template of {TINY} cannot be used: ")
    assert message.endswith("model.tokenizer to a folder with another template")
    assert "\n" not in message
    if name == "endless":
        with pytest.raises(ValueError, match=r"takes more than 0\.2 s"):
            prompts.has_thinking(tokenizer)


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = load()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="but the tokenizer has no chat template"):
        prompts.find_turn_end(tokenizer)


def test_rows_that_a_template_refuses_are_refused():
    """The template accepts the short conversation with which it is checked."""
    rule = "{% if 'tomatoes' in messages[0].content %}{{ raise_exception('no food') }}{% endif %}"
    tokenizer = load(rule + CHATML)
    prompts.find_turn_end(tokenizer)
    with pytest.raises(ValueError, match="cannot be used: no food"):
        prompts.build_student_prompt(tokenizer, spec("none"), make_row("en"))
    prompts.build_student_prompt(tokenizer, spec("none"), make_row("sw"))


@pytest.mark.parametrize(
    "part", ["{{ messages }}", "{{ m }}", "{{ m.content | length }}", "{{ m.content.encode() }}"]
)
def test_a_template_that_quotes_or_measures_messages_is_refused(part):
    """The mark in front of the last message was left in the prompt as an escape."""
    shown = part if part == "{{ messages }}" else f"{{% for m in messages %}}{part}{{% endfor %}}"
    with pytest.raises(ValueError, match="cannot be used: it writes more about messages than"):
        prompts.build_student_prompt(load(shown + CHATML), spec("none"), make_row("en"))


def test_the_first_of_several_templates_is_the_default():
    tokenizer = load()
    tokenizer.chat_template = {"default": CHATML, "rag": "x"}
    row = make_row()
    dated = conversations.PromptFormat("chat", "none", "boxed", REGISTRY, (), date="2026-01-31")
    prompt = prompts.build_student_prompt(tokenizer, dated, row)
    assert prompt == prompts.build_student_prompt(load(CHATML), dated, row)
