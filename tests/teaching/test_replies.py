"""Replies as writers write them, well and badly, and leaks of the answer in every script."""

import json
import re
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from copsd_jax.problems import problem_row, record_files
from copsd_jax.teaching import answer_leaks, replies, rule_author, solution_steps, step_checker

QUOTE, WHY = "<error_quote>5 * 3 = 16</error_quote>", "<explanation>5 * 3 is 15.</explanation>"


def read(text: str, correct: bool = False) -> tuple[str, str, str]:
    reply = replies.read_reflection(text, correct)
    assert reply.raw == text
    assert (reply.step, reply.case, reply.trace) == (None, "", "")
    return reply.status, reply.text, reply.quote


GOOD = ("ok", "5 * 3 is 15.", "5 * 3 = 16")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (QUOTE + WHY, GOOD),
        (f"Let me see.\n{QUOTE}\n\n{WHY}\nDone.", GOOD),
        (f"<think>{QUOTE} <explanation> hm</think>\n{QUOTE}{WHY}", GOOD),
        (f"hm {QUOTE}</think> and again</think>{QUOTE}{WHY}", GOOD),
        (QUOTE.replace("5 * 3 = 16", "\n 5 * 3 = 16 \n") + WHY.replace("15.", "15.\n"), GOOD),
        ("<error_quote>a <\n> d</error_quote>" + WHY, ("ok", "5 * 3 is 15.", "a <\n> d")),
        (WHY, ("no_quote", "5 * 3 is 15.", "")),
        ("<error_quote> </error_quote>" + WHY, ("no_quote", "5 * 3 is 15.", "")),
        (QUOTE, ("no_explanation", "", "")),
        ("5 * 3 is 15.", ("no_explanation", "", "")),
        (QUOTE + "<explaination>5 * 3 is 15.</explaination>", ("no_explanation", "", "")),
        (QUOTE + "<Explanation>5 * 3 is 15.</Explanation>", ("no_explanation", "", "")),
        ("", ("empty", "", "")),
        ("<think>so</think>\n ", ("empty", "", "")),
        (QUOTE + "<explanation> \n</explanation>", ("empty", "", "")),
        ("<think>so " + QUOTE + WHY, ("unclosed", "", "")),
        ("<think>so</think> <think>and " + QUOTE + WHY, ("unclosed", "", "")),
        (QUOTE + "<explanation>5 * 3 is 15.", ("unclosed", "", "")),
        ("<error_quote>5 * 3 = 16" + WHY, ("unclosed", "", "")),
        ("</error_quote>" + WHY, ("unclosed", "", "")),
        (QUOTE + "5 * 3 is 15.</explanation>", ("unclosed", "", "")),
        (QUOTE + WHY + WHY, ("repeated_tag", "", "")),
        (QUOTE + QUOTE + WHY, ("repeated_tag", "", "")),
        (QUOTE + "<explanation><explanation>x</explanation>", ("repeated_tag", "", "")),
        (QUOTE + WHY + "</explanation>", ("repeated_tag", "", "")),
        (f"<explanation>{QUOTE} is wrong</explanation>", ("misplaced_tag", "", "")),
        (WHY + QUOTE, ("misplaced_tag", "", "")),
        ("<error_quote>a<explanation>b</error_quote>c</explanation>", ("misplaced_tag", "", "")),
    ],
)  # fmt: skip
def test_diagnoses(text, expected):
    assert read(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WHY, ("ok", "5 * 3 is 15.", "")),
        (QUOTE + WHY, ("misplaced_tag", "", "")),
        (WHY + WHY, ("repeated_tag", "", "")),
        ("15", ("no_explanation", "", "")),
        ("<think>15", ("unclosed", "", "")),
    ],
)
def test_explanations(text, expected):
    assert read(text, correct=True) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (QUOTE + WHY, GOOD),
        (WHY, ("no_quote", "5 * 3 is 15.", "")),
        (QUOTE, ("no_explanation", "", "5 * 3 = 16")),  # independent of one another
        ("", ("no_explanation", "", "")),
        ("<ERROR_quote>a</error_QUOTE><Explanation>b\nc</EXPLANATION>", ("ok", "b\nc", "a")),
        # The misspelt name first, wherever it stands; then the name, then "reflection".
        (QUOTE + WHY + "<explaination>z</explaination>", ("ok", "z", "5 * 3 = 16")),
        (QUOTE + "<reflection>z</reflection>" + WHY, GOOD),
        (QUOTE + "<reflection>z</reflection>", ("ok", "z", "5 * 3 = 16")),
        ("<explaination> </explaination>" + WHY, ("no_explanation", "", "")),
        # The first, up to the nearest end; a beginning inside does not count.
        (QUOTE + "<explanation>a<explanation>b</explanation>c</explanation>",
         ("ok", "a<explanation>b", "5 * 3 = 16")),
        # Thinking counts as text.
        ("<think><explanation>a</explanation></think>" + QUOTE + WHY, ("ok", "a", "5 * 3 = 16")),
        (QUOTE + "<explanation>never ends", ("no_explanation", "", "5 * 3 = 16")),
    ],
)  # fmt: skip
def test_reflections_as_published(text, expected):
    reply = replies.read_published_reflection(text, correct=False)
    assert (reply.status, reply.text, reply.quote) == expected


def test_explanations_as_published_have_no_quote():
    reply = replies.read_published_reflection(QUOTE + WHY, correct=True)
    assert (reply.status, reply.text, reply.quote) == ("ok", "5 * 3 is 15.", "")


def critique(case="wrong", first="2", steps=("2 + 3 = 5", "5 * 3 = 15"), answer="15") -> str:
    first = f"<first_wrong>{first}</first_wrong>" if first else ""
    trace = "".join(f"<step_{k}>{step}</step_{k}>\n" for k, step in enumerate(steps, start=1))
    return f"<case>{case}</case>\n{first}{trace}<answer>{answer}</answer>"


TRACE = "<step_1>2 + 3 = 5</step_1>\n<step_2>5 * 3 = 15</step_2>\n<answer>15</answer>"


@pytest.mark.parametrize("case", tuple(step_checker.CASES))
def test_the_four_cases_of_a_critique(case):
    first = "2" if case == "wrong" else ""
    text = "<think><case>right</case></think> I say: " + critique(case, first)
    step = 2 if case == "wrong" else None
    expected = replies.Reply("ok", "", "", step, case, TRACE, text)
    assert replies.read_critique(text) == expected
    assert replies.read_critique(
        text.replace("<step_2>", "that is,  <step_2>\n ")
    ) == replies.Reply(
        "ok", "", "", step, case, TRACE, text.replace("<step_2>", "that is,  <step_2>\n ")
    )


@pytest.mark.parametrize(
    ("status", "text"),
    [
        ("ok", critique(first="3")),  # only the answer is wrong
        ("empty", " \n"),
        ("empty", "<think>well</think>"),
        ("unclosed", "<think>" + critique()),
        ("unclosed", critique().removesuffix("</answer>")),
        ("unclosed", critique().replace("</case>", "")),
        ("unclosed", "</answer>" + critique()),
        ("no_case", critique().replace("<case>wrong</case>", "")),
        ("no_case", critique("D")),
        ("no_case", critique("Wrong")),
        ("no_case", critique("right|wrong")),
        ("no_case", "It is all right."),
        ("no_step", critique(first="")),
        ("no_step", critique(first="0")),
        ("no_step", critique(first="two")),
        ("no_step", critique(first="-1")),
        ("no_step", critique(first="2.0")),
        ("no_step", critique(first="٢")),
        ("no_step", critique(first="4")),
        ("no_step", critique("right", "2")),
        ("no_step", critique("thin", "x")),
        ("no_step", critique().replace(">2</first_wrong>", "></first_wrong>")),
        ("bad_steps", critique(steps=())),
        ("bad_steps", critique(steps=("a", " "))),
        ("bad_steps", critique().replace("step_2", "step_3")),
        ("bad_steps", critique().replace("step_1", "step_0")),
        ("bad_steps", critique().replace("step_1", "step_01")),
        ("bad_steps", critique().replace("</step_2>", "")),
        ("bad_steps", critique().replace("</step_2>", "</step_1>")),
        ("bad_steps", re.sub("step_([12])", lambda m: f"step_{3 - int(m[1])}", critique())),
        ("bad_steps", critique().replace("step_2", "step_1")),
        ("bad_steps", critique(steps=("a <step_2>b</step_2>",))),
        ("no_answer", critique(answer=" ")),
        ("no_answer", critique().replace("<answer>15</answer>", "")),
        ("repeated_tag", critique() + "<answer>16</answer>"),
        ("repeated_tag", "<case>wrong</case>" + critique()),
        ("misplaced_tag", "<answer>15</answer>" + critique().replace("<answer>15</answer>", "")),
        ("misplaced_tag", critique().replace("<case>wrong</case>", "") + "<case>wrong</case>"),
        ("misplaced_tag", critique(first="") + "<first_wrong>2</first_wrong>"),
        ("misplaced_tag", critique(answer="<case>x</case>").replace("<case>wrong</case>", "")),
    ],
)  # fmt: skip
def test_critiques(status, text):
    reply = replies.read_critique(text)
    assert reply.status == status
    assert reply.raw == text
    if status != "ok":
        assert reply == replies.Reply(status, raw=text)


ATTEMPT = ["2 + 3 = 5", "5 * 3 = 16", "16 is the answer"]


@pytest.mark.parametrize(
    ("status", "text", "attempt"),
    [
        ("ok", critique(), ATTEMPT),
        ("ok", critique(), ["<step_1>2 +\n3  = 5</step_1>", " 5 * 3 = 16"]),
        ("ok", critique(first="1", steps=("7 - 2 = 5",)), ATTEMPT),
        ("ok", critique(first="3"), ["2 + 3 = 5", "5 * 3 = 15"]),
        ("no_step", critique(first="3"), ["2 + 3 = 5"]),
        ("prefix_changed", critique(steps=("2 + 3 = 6", "5 * 3 = 15")), ATTEMPT),
        ("prefix_changed", critique(steps=("2 + 3 = 5.", "5 * 3 = 15")), ATTEMPT),
        ("prefix_changed", critique(steps=("5 * 3 = 15",)), ATTEMPT),
        ("prefix_changed", critique(first="3", steps=("2 + 3 = 5", "5 * 3 = 15")), ATTEMPT),
        # A missing step may be put in before the first wrong one; what is there stays in order.
        (
            "ok",
            critique(first="3", steps=("2 + 3 = 5", "x", "5 * 3 = 15")),
            ["2 + 3 = 5", "5 * 3 = 15", "no"],
        ),
        ("ok", critique(steps=("x", "2 + 3 = 5", "5 * 3 = 15")), ATTEMPT),
        (
            "prefix_changed",
            critique(first="3", steps=("5 * 3 = 15", "2 + 3 = 5")),
            ["2 + 3 = 5", "5 * 3 = 15"],
        ),
        ("prefix_changed", critique("right", "", ("x", *ATTEMPT)), ATTEMPT),
        ("quotes_error", critique(steps=("5 * 3 = 16", "2 + 3 = 5")), ATTEMPT),
        ("quotes_error", critique(steps=("2 + 3 = 5", "not 5 *  3 = 16, but 15")), ATTEMPT),
        ("quotes_error", critique(steps=("2 + 3 = 5", "5 * 3 = 16")), ATTEMPT),
        ("quotes_error", critique(steps=("2 + 3 = 5", "x", "so 5 * 3 = 16.")), ATTEMPT),
        ("quotes_error", critique(answer="5 * 3 = 16"), ATTEMPT),
        ("quotes_error", critique(steps=("2 + 3 = 5", "AS X IS 4")), ["2 + 3 = 5", "as x is 4."]),
        # The wrong step's text goes on: it is another text.
        ("ok", critique(steps=("2 + 3 = 5", "5 * 3 = 165")), ATTEMPT),
        ("ok", critique(steps=("2 + 3 = 5", "5 * 3 = 16.5")), ATTEMPT),
        ("ok", critique(steps=("2 + 3 = 5", "25 * 3 = 16")), ATTEMPT),
        # A right step that was wrong to repeat is no quotation.
        ("ok", critique(), ["2 + 3 = 5", "2 + 3 = 5"]),
        ("ok", critique("right", "", ATTEMPT), ATTEMPT),
        ("prefix_changed", critique("right", "", ATTEMPT), ATTEMPT[:2]),
        ("prefix_changed", critique("right", "", ATTEMPT[:2]), ATTEMPT),
        ("ok", critique("thin", "", ("2 + 3 = 5", "x", "5 * 3 = 15")), ATTEMPT),
        ("ok", critique("unfinished", "", ("5",)), ATTEMPT),
    ],
)
def test_critiques_against_the_attempt(status, text, attempt):
    reply = replies.read_critique(text)
    assert reply.status == "ok"
    verified = replies.verify_critique(reply, attempt)
    assert verified.status == status
    assert verified.trace == reply.trace
    unread = replies.Reply("no_case")
    assert replies.verify_critique(unread, attempt) == unread


def test_the_place_behind_the_right_steps():
    assert replies.find_end(["x", "a", "b", "x", "a", "y"], ["a", "b", "a"]) == 5
    assert replies.find_end(["a", "b"], ["a", "b", "a"]) is None
    assert replies.find_end(["a"], []) == 0


def test_an_answer_that_is_stated_first():
    text = "The answer is 16. 2 + 3 = 5. 5 * 3 = 16."
    row = problem_row.Row("r", "p", "2 + 3 = 5 and 5 * 3 = 15.", "15", "en", "p")
    written = rule_author.write_reflection(replies.Attempt(row, text, False), "16")
    assert read(written) == ("ok", "The step should be 5 * 3 = 15.", "5 * 3 = 16")


def test_which_statuses_are_usable():
    usable = {name for name, status in replies.STATUSES.items() if status.usable}
    assert usable == {"ok", "no_quote", "thought"}


def test_replies_that_do_as_the_requests_say_are_ok():
    """Takes the form from the request itself: its tags, in its order, with contents of ours."""

    def filled(request: str, contents: dict[str, str]) -> str:
        tags = re.findall(r"<(\w+)>[^<]*</\1>", request)
        assert set(tags) == contents.keys()
        return "\n".join(f"<{tag}>{contents[tag]}</{tag}>" for tag in tags)

    quote = {"error_quote": "5 * 3 = 16", "explanation": "5 * 3 is 15."}
    assert read(filled(replies.DIAGNOSE, quote)) == GOOD
    explained = filled(replies.EXPLAIN, {"explanation": "5 * 3 is 15."})
    assert read(explained, correct=True) == ("ok", "5 * 3 is 15.", "")
    whole = {"case": "wrong", "first_wrong": "2", "step_1": "2 + 3 = 5", "step_2": "5 * 3 = 15"}
    reply = replies.read_critique(filled(replies.CRITIQUE, whole | {"answer": "15"}))
    assert (reply.status, reply.step, reply.trace) == ("ok", 2, TRACE)
    named = re.findall(r"^(\w+):", replies.CRITIQUE, re.MULTILINE)
    assert tuple(named) == tuple(step_checker.CASES)
    # The requests themselves, copied instead of followed, are no replies.
    assert replies.read_critique(replies.CRITIQUE).status != "ok"


LEAKS = [
    # answer, text with each leak in « », which is what is masked
    ("13", "8 + 5 = «13»."),
    ("13", "130, 1.13, 13.5, 213, 1,300, 0.13 and 13,000"),
    ("13", "«13»/2 has a «13»; «\\frac{169}{13}»"),
    ("13", "x = «13», then «13.0» or «13,0» and «013»."),
    ("13", "«13»kg, €«13», «13»%, page-«13», (8+5=«13»)"),
    ("13", "x = -13"),
    ("-13", "x = «-13» and x = «−13» and x is «- 13», but 20 - 13, 20-13, 20 -13 and 13"),
    ("13", "20 - «13», (7)-«13», 10–«13»"),
    ("1234", "«1,234» «1 234» «1234» «1'234» «1{,}234» «1\\,234» 12345 0.1234"),
    ("1,234", "«1234» and 1 2345"),
    ("3.5", "«3.5» «3,5» «3.50» 3.51 13.5"),
    ("13", "Jibu ni «13»; der Preis «१३», «১৩», «٠١٣», «๑๓», «１３», «፲፫» «፲፫»."),
    ("১৩", "so it is «13», not ৩১"),
    ("1/2", "«1/2», «1 / 2», «\\frac{1}{2}» is half; 11/2, 1/21"),
    ("\\frac{3}{4}", "«3/4» and «\\frac{3}{4}», 3.75"),
    ("13 keys", "has «13», that is «13 keys»"),
    ("Paris", "in «paris», not Parisian or comparison; «Paris»."),
    ("New York", "«New  York», «new\nyork»; New Yorker"),
    ("B", "«B» is right, b or AB is not; («B»)"),
    ("A", "a choice: «A»"),
    ("o\u0323\u0300na\u0300", "«ọ̀nà», «o\u0323\u0300na\u0300», ọ̀nàa; ọnà"),  # in either composition
    ("কলা", "একটি «কলা», কলাম"),
    ("ọ̀nà", "«ọ̀nà», «o\u0323\u0300na\u0300»"),
    ("红色", "是«红色»的, abc«红色»def"),
    ("abc", "红«abc»色, abcd"),
    ("สีแดง", "คือ«สีแดง»ครับ"),
    ("x + 1", "«x + 1», x + 12, «X + 1»"),
    ("", "nothing is known 13"),
    (" ", "nothing is known 13"),
    ("13", ""),
]


@pytest.mark.parametrize(("answer", "marked"), LEAKS)
def test_leaks(answer, marked):
    text = marked.replace("«", "").replace("»", "")
    masked = re.sub("«[^»]*»", "[...]", marked)
    assert answer_leaks.mask_leak(text, answer) == masked
    assert answer_leaks.has_leak(text, answer) == ("«" in marked)


SCRIPTS = [
    "0123456789",
    "०१२३४५६७८९",
    "০১২৩৪৫৬৭৮৯",
    "٠١٢٣٤٥٦٧٨٩",
    "๐๑๒๓๔๕๖๗๘๙",
    "０１２３４５６７８９",
]


@hypothesis.settings(deadline=None, derandomize=True, max_examples=150)
@hypothesis.given(
    st.lists(st.integers(0, 400), min_size=1, max_size=8),
    st.integers(0, 400), st.sampled_from(SCRIPTS), st.sampled_from([" + ", ", ", "; ", " na "]),
)  # fmt: skip
def test_a_number_leaks_exactly_where_it_is_in_a_list_of_numbers(numbers, answer, script, mark):
    digits = str.maketrans("0123456789", script)
    text = mark.join(map(str, numbers)).translate(digits) + "."
    shown = ["[...]" if n == answer else str(n).translate(digits) for n in numbers]
    assert answer_leaks.has_leak(text, str(answer)) == (answer in numbers)
    assert answer_leaks.mask_leak(text, str(answer)) == mark.join(shown) + "."


@hypothesis.settings(deadline=None, derandomize=True, max_examples=200)
@hypothesis.given(
    st.text("130.,-/ a\\{}fracxé፲३", max_size=25),
    st.sampled_from(["13", "-1", "1.3", "1/3", "a", "é x", "0"]),
)
def test_nothing_leaks_from_what_was_masked(text, answer):
    masked = answer_leaks.mask_leak(text, answer)
    assert not answer_leaks.has_leak(masked, answer)
    assert answer_leaks.has_leak(text, answer) == (masked != text)


def test_long_hostile_texts_take_no_time():
    start = time.process_time()
    for text in ("1" * 60_000, "1 " * 9_000, "\\frac{" * 5_000, "<step_1>" * 4_000, "-" * 30_000):
        answer_leaks.has_leak(text, "13")
        answer_leaks.has_leak(text, "a b")
        replies.read_critique(text)
        replies.read_reflection(text, correct=False)
    assert time.process_time() - start < 5


def write(tmp_path, *records: object):
    path = tmp_path / "replies.jsonl"
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_replies_from_a_file(tmp_path):
    path = write(
        tmp_path,
        {"id": "a", "reply": "one\u2028line"},
        {"id": "a", "sample": 1, "reply": ""},
        "",
        {"reply": "ọ̀nà", "sample": 0, "id": "b"},
    )
    assert replies.load_reply_file(path) == {
        ("a", 0): "one\u2028line",
        ("a", 1): "",
        ("b", 0): "ọ̀nà",
    }


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "a", "reply": "x"}, "line 2: id 'a' with sample 0 occurs twice"),
        ({"id": "b"}, "line 2: reply is None: it must be a text"),
        ({"reply": "x"}, "line 2: id is None: it must be a text"),
        ({"id": "", "reply": "x"}, "line 2: id is ''"),
        ({"id": 3, "reply": "x"}, "line 2: id is 3: it must be a text"),
        ({"id": "b", "reply": ["x"]}, "line 2: reply is"),
        ({"id": "b", "reply": "x", "sample": "1"}, "line 2: sample is '1'"),
        ({"id": "b", "reply": "x", "sample": True}, "line 2: sample is True"),
        ({"id": "b", "reply": "x", "sample": -1}, "line 2: sample is -1"),
        ({"id": "b", "reply": "x", "sample": None}, "line 2: sample is None"),
        ({"id": "b", "reply": "x", "step": 1}, "line 2: unknown field 'step'"),
        ({"id": "b", "reply": "\ud800"}, "line 2: reply has half of a surrogate pair"),
        ("{", "line 2: broken JSON"),
        ("[]", "line 2: expected a JSON object"),
    ],
)
def test_files_that_are_refused(tmp_path, record, message):
    path = write(tmp_path, {"id": "a", "reply": "x"}, record)
    with pytest.raises(ValueError) as raised:
        replies.load_reply_file(path)
    assert str(raised.value).startswith(f"{path}, {message}")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"author\.path is .*none\.jsonl"):
        replies.load_reply_file(str(tmp_path / "none.jsonl"))


# What a student may make of a bundled solution: text and answer.
PERTURBED = {
    "whole": lambda parts, gold: (" ".join(parts) + f" The answer is {gold}.", gold),
    "a wrong step": lambda parts, gold: (
        " ".join([*parts[:-1], parts[-1].replace(f"= {gold}", f"= {gold}7")])
        + f" The answer is {gold}7.",
        f"{gold}7",
    ),
    "a wrong first step": lambda parts, gold: (
        " ".join([parts[0].replace("= ", "= 3"), *parts[1:]]) + " The answer is 9999.",
        "9999",
    ),
    "a wrong answer": lambda parts, gold: (" ".join(parts) + " The answer is 9999.", "9999"),
    "a step left out": lambda parts, gold: (" ".join(parts[1:]) + f" The answer is {gold}.", gold),
    "no first step and a wrong answer": lambda parts, gold: (
        " ".join(parts[1:]) + " The answer is 9999.", "9999",
    ),
    "no answer": lambda parts, gold: (parts[0], None),
}  # fmt: skip


SAID = {
    "a wrong step": "The step should be {last}",
    "a wrong first step": "The step should be {first}",
    "a wrong answer": "The last step is: {last}",
    "no first step and a wrong answer": "The last step is: {last}",
}


@pytest.mark.parametrize("tags", [False, True])
@pytest.mark.parametrize("how", PERTURBED)
def test_what_the_rule_writes_is_read_back(how, tags):
    rows = [record.fields for record in record_files.read_records("bundled:train")][:120]
    assert sum(row["steps"] > 1 for row in rows) > 20
    for row in rows:
        gold = row["answer"]
        plain = parts = [part.strip(" .") + "." for part in row["solution"].split(" and ")]
        if tags:
            shift = 0 if "left out" in how or "no first" in how else 1
            parts = [f"<step_{k}>{part}</step_{k}>" for k, part in enumerate(parts, start=shift)]
        text, found = PERTURBED[how](parts, gold)
        correct = found == gold
        verdict = step_checker.check_attempt(text, row["solution"], gold, found, correct)
        problem = problem_row.Row("r", "p", row["solution"], gold, "en", "p")
        attempt = replies.Attempt(problem, text, correct)
        written = rule_author.write_reflection(attempt, found)
        reply = replies.read_reflection(written, correct)
        assert reply.status == ("ok" if correct or verdict.wrong else "no_quote"), (text, written)
        if verdict.wrong:
            start, end = verdict.wrong
            assert reply.quote == text[start:end]
            assert reply.quote not in reply.text
            one = len(plain) == 1 and how.startswith("no first")  # so nothing is left of it
            said = SAID["a wrong step" if one else how]
            assert reply.text == said.format(first=plain[0], last=plain[-1])
        own = [step.text for step in solution_steps.split_steps(text) if not step.final]
        written = rule_author.write_critique(attempt, found)
        reply = replies.verify_critique(replies.read_critique(written), own)
        assert (reply.status, reply.case) == ("ok", verdict.case), (text, written)
        assert reply.step == verdict.wrong_step
        assert reply.trace.endswith(f"\n<answer>{gold}</answer>")
        if how == "whole":
            assert reply.case == "right"
        elif how.startswith(("a wrong", "no first")):
            assert reply.case == "wrong"
