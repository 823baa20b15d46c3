"""Contexts: each teacher prompt written down apart, and the template's own rendering of it."""

import pathlib
import subprocess
import sys

import pytest
import transformers

from copsd_jax.problems import languages, problem_row
from copsd_jax.teaching import contexts, conversations, prompts, replies, teacher_prompts

ROOT = pathlib.Path(__file__).resolve().parents[2]
REGISTRY = languages.load_languages()
ROWS = {
    "en": "Luc has 10 tomatoes and buys 3. How many?",
    "sw": "Luc ana nyanya 10. Ananunua 3 zaidi. Ana ngapi?",
    "yor": "Luc ní tòmátì 10. Ó ra 3 sí i. Mélòó ló ní?",
    "amh": "ሉክ 10 ቲማቲም አለው። 3 ገዛ። ስንት አለው?",
}


def make_row(lang="sw"):
    code = languages.resolve_code(lang, REGISTRY)
    return problem_row.Row("r", ROWS[lang], "10 + 3 = 13.", "13", code, ROWS["en"])


SHOT = problem_row.Row(
    "e", "3 boxes of 5?", "3 * 5 = 15.", "15", make_row("en").lang, "3 boxes of 5?"
)


@pytest.fixture(scope="module")
def tiny():
    folder = ROOT / "copsd_jax" / "weights" / "tiny_tokenizer"
    return transformers.AutoTokenizer.from_pretrained(str(folder))


def spec(thinking="prefix", template="chat", answer="boxed", exemplars=()):
    return conversations.PromptFormat(template, thinking, answer, REGISTRY, tuple(exemplars))


def settings(kind, problem_en=True, solution=True):
    return contexts.Settings(kind, problem_en, solution)


def teach(tokenizer, side, chosen, row, text=""):
    """The teacher's prompt for a row of which nothing is known but what a writer wrote."""
    shots = teacher_prompts.build_exemplars(side, chosen)
    assert [reply for _, reply in shots] == [replies.NONE] * len(side.exemplars)
    reply = replies.read_analysis(text) if text else replies.NONE
    return teacher_prompts.build_teacher_prompt(
        tokenizer, side, chosen, contexts.Attempt(row), reply, shots
    )


def ask(tokenizer, side, chosen, row):
    return teacher_prompts.build_author_prompt(tokenizer, side, chosen, contexts.Attempt(row))


def blocks(row):
    """COPSD's blocks in the row's language."""
    lang = REGISTRY[row.lang]
    return {
        "problem": f"{lang.label_problem}: {row.problem}",
        "english": f"{lang.label_problem_en}: {row.problem_en}",
        "solution": (
            f"{lang.label_solution}:\n{lang.begin_reference}\n{row.solution}\n{lang.end_reference}"
        ),
        "reason": lang.reason_first,
        "derive": f"{lang.transition}\n{lang.instruction}",
        "instruction": lang.instruction,
    }


def rendered(tiny, row, messages):
    text = tiny.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return text + "<think>\n" + REGISTRY[row.lang].think_prefix.strip()


CASES = {
    "reference": (settings("reference"), ("problem", "solution", "derive")),
    "copsd": (settings("crosslingual"), ("problem", "english", "solution", "derive")),
    "no problem": (settings("crosslingual", problem_en=False), ("problem", "solution", "derive")),
    "no solution": (
        settings("crosslingual", solution=False),
        ("problem", "english", "instruction"),
    ),
    "none": (settings("none"), ("problem", "instruction")),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("lang", list(ROWS))
def test_teacher_equals_the_tokenizers_own_template(tiny, case, lang):
    chosen, parts = CASES[case]
    row = make_row(lang)
    content = "\n\n".join(blocks(row)[part] for part in parts)
    text = rendered(tiny, row, [{"role": "user", "content": content}])
    made = teach(tiny, spec(), chosen, row)
    assert made.text == text
    assert list(made.ids) == tiny.encode(text, add_special_tokens=False)


PLAIN = {
    "reference": (
        settings("reference"),
        "Question: {0}\nReference solution: {2} ({3})\nAnswer:",
    ),
    "copsd": (
        settings("crosslingual"),
        "Question: {0}\nEnglish question: {1}\nReference solution: {2} ({3})\nAnswer:",
    ),
    "no solution": (
        settings("crosslingual", solution=False),
        "Question: {0}\nEnglish question: {1}\nAnswer:",
    ),
    "none": (settings("none"), "Question: {0}\nAnswer:"),
}


@pytest.mark.parametrize("case", list(PLAIN))
def test_plain_teacher_has_exemplars_in_its_own_format(tiny, case):
    chosen, form = PLAIN[case]
    row = make_row()
    text = form.format(SHOT.problem, SHOT.problem_en, SHOT.solution, SHOT.answer)
    text += f" {SHOT.solution} The answer is {SHOT.answer}.\n\n"
    text += form.format(row.problem, row.problem_en, row.solution, row.answer)
    made = teach(tiny, spec("none", "plain", "answer_is", [SHOT]), chosen, row)
    assert made.text == text
    assert list(made.prefix_ids + made.ids) == tiny.encode(text, add_special_tokens=False)


def test_plain_solutions_stay_on_their_line(tiny):
    row = problem_row.Row("r", "a\nb", "one\n\ntwo", "2", make_row("en").lang, "a\nb")
    made = teach(tiny, spec("none", "plain"), settings("reference"), row)
    assert made.text == "Question: a b\nReference solution: one two (2)\nAnswer:"


@pytest.mark.parametrize(
    "template, thinking", [("chat", "prefix"), ("chat", "off"), ("plain", "none")]
)
@pytest.mark.parametrize("exemplars", [(), (SHOT,)])
def test_context_none_is_the_students_prompt(tiny, template, thinking, exemplars):
    side = spec(thinking, template, exemplars=exemplars)
    student = prompts.build_student_prompt(tiny, side, make_row())
    assert teach(tiny, side, settings("none"), make_row()) == student
    for kind in ("reference", "crosslingual", "reason_first"):
        other = teach(tiny, side, settings(kind), make_row())
        assert other.ids != student.ids
        assert other.state == student.state


def test_bug_16_the_analysis_is_a_turn_of_a_proper_conversation(tiny):
    row = make_row()
    parts = blocks(row)
    asked = "\n\n".join(parts[part] for part in ("problem", "solution", "reason"))
    reply = "<think>\nhmm\n</think>\n\nFirst, 3 is added."
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "First, 3 is added."},
        {"role": "user", "content": parts["derive"]},
    ]
    made = teach(tiny, spec(), settings("reason_first"), row, reply)
    assert made.text == rendered(tiny, row, messages)
    assert list(made.ids) == tiny.encode(made.text, add_special_tokens=False)
    end = tiny.convert_tokens_to_ids("<|im_end|>")
    assert list(made.ids).count(end) == 3  # each turn is ended
    think = tiny.convert_tokens_to_ids("<think>")
    assert list(made.ids).count(think) == 1  # the one that the student's completion stands in
    before = ask(tiny, spec(), settings("reason_first"), row)
    assert before.text == rendered(tiny, row, messages[:1])


def test_bug_16_an_open_think_block_does_not_reach_the_teacher(tiny):
    reply = "<think>\nIt never ends, 3 <|im_end|> is added"
    read = replies.read_analysis(reply)
    assert (read.text, read.status) == ("It never ends, 3 <|im_end|> is added", "thought")
    made = teach(tiny, spec(), settings("reason_first"), make_row(), reply)
    think, end = tiny.convert_tokens_to_ids(["<think>", "<|im_end|>"])
    assert list(made.ids).count(think) == 1
    assert list(made.ids).count(end) == 3  # the quoted one is text


@pytest.mark.parametrize(
    "reply, expected",
    [
        ("It adds.", ("It adds.", "ok")),
        ("<think>a</think>\n b </think> c ", ("c", "ok")),
        ("a</think>b", ("b", "ok")),  # the prompt had opened the block
        ("<think>a</think> \n", ("", "empty")),
        ("  ", ("", "empty")),
        ("", ("", "empty")),
    ],
)
def test_analysis_and_its_status(reply, expected):
    read = replies.read_analysis(reply)
    assert (read.text, read.status) == expected


@pytest.mark.parametrize("status", ["empty", "timeout", "missing", "leak_dropped", "overlong"])
def test_without_an_analysis_nothing_is_taught(tiny, status):
    """A writer that fails must not turn reason_first into OPSD."""
    attempt = contexts.Attempt(make_row())
    reply = replies.Reply(status)
    assert (
        teacher_prompts.build_teacher_prompt(tiny, spec(), settings("reason_first"), attempt, reply)
        is None
    )
    # Exemplars, about which nothing is written, show the reference.
    shown = teacher_prompts.build_teacher_prompt(tiny, spec(), settings("reason_first"), attempt)
    assert shown == teacher_prompts.build_teacher_prompt(
        tiny, spec(), settings("reference"), attempt
    )


def test_plain_reason_first(tiny):
    row, side = make_row(), spec("none", "plain")
    start = f"Question: {row.problem}\nReference solution: {row.solution} (13)\nAnalysis:"
    assert ask(tiny, side, settings("reason_first"), row).text == start
    made = teach(tiny, side, settings("reason_first"), row, "It\nadds 3.")
    assert made.text == start + " It adds 3.\nAnswer:"


def test_bug_22_prefix_only_where_it_is_set(tiny):
    """The reference opens the teacher's block even where the student's is closed."""
    row = make_row()
    for thinking, state in (("off", "closed"), ("on", "unopened"), ("prefix", "open")):
        side = spec(thinking)
        teacher = teach(tiny, side, settings("crosslingual"), row)
        assert teacher.state == state
        prompts.check_template_states(
            prompts.build_student_prompt(tiny, side, row), teacher, allow=False
        )
    # OPSD v3: student off, teacher on.
    with pytest.raises(ValueError, match="template_mismatch"):
        prompts.check_template_states(
            prompts.build_student_prompt(tiny, spec("off"), row),
            teach(tiny, spec("on"), settings("reference"), row),
            allow=False,
        )


WRITTEN_BY_DATA = ("reference", "crosslingual", "reason_first", "none")


@pytest.mark.parametrize("kind", WRITTEN_BY_DATA)
def test_bug_26_and_30_label_and_final_instruction(tiny, kind):
    """The teacher's turn has the student's label, and pieces are apart by line breaks."""
    for lang in ROWS:
        row = make_row(lang)
        words = REGISTRY[row.lang]
        text = teach(tiny, spec(), settings(kind), row, "It adds.").text
        assert f"<|im_start|>user\n{words.label_problem}: {row.problem}\n\n" in text
        assert f"\n{words.instruction}<|im_end|>" in text
        if kind == "reason_first":
            assert f"\n\n{words.reason_first}<|im_end|>\n" in text
            assert f"<|im_start|>user\n{words.transition}\n{words.instruction}<|im_end|>" in text


def test_bug_15_only_some_contexts_have_an_author():
    with_author = {kind for kind, context in contexts.CONTEXTS.items() if context.author}
    assert with_author == {"reason_first", "reflection", "critique"}
    for kind, context in contexts.CONTEXTS.items():
        assert ("reply" in context.inputs(settings(kind))) == (kind in with_author)
        assert set(context.inputs(settings(kind))) <= set(contexts.INPUTS)
        if context.author is None:
            assert context.author_kinds == ("none",)
            with pytest.raises(ValueError, match=f"{kind!r}: no author"):
                contexts.get_author(settings(kind))
            continue
        by_rule = context.author.write_by_rule is not None
        assert ("grader" in context.author_kinds) == by_rule


def test_contexts_and_rewards_are_checked_without_jax_and_transformers():
    """`main` reads the tables before it sets the environment in which jax starts."""
    code = (
        "import sys\n"
        "from copsd_jax.rewards import reward_functions\n"
        "from copsd_jax.teaching import contexts\n"
        "print(sorted({'jax', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_needs_are_what_the_prompt_shows(tiny):
    """A row without a needed field is refused; without any other it makes the same prompt."""
    for chosen, _ in CASES.values():
        row = make_row()
        made = teach(tiny, spec(), chosen, row)
        for name in ("problem_en", "solution"):
            poor = problem_row.Row(**{**vars(row), name: ""})
            if name in contexts.list_row_fields(chosen):
                with pytest.raises(ValueError, match=f"no {name}"):
                    teach(tiny, spec(), chosen, poor)
            else:
                assert teach(tiny, spec(), chosen, poor) == made


def test_an_unknown_context_lists_the_choices():
    with pytest.raises(ValueError, match=r"context\.kind is 'referense'.*crosslingual"):
        contexts.list_row_fields(settings("referense"))
