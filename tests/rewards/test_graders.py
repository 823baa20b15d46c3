"""Oracles: tables of strings, an encoder of Ge'ez numerals, Unicode's own tables, /proc."""

import os
import pathlib
import shutil
import sys
import time
import unicodedata

import hypothesis
import pytest
from conftest import mostly_slow
from hypothesis import strategies

from copsd_jax.rewards import graders

FEW = hypothesis.settings(max_examples=60, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module")
def grader():
    with graders.Grader("boxed", "last_after_think", seconds=10.0) as it:
        yield it


@pytest.fixture(scope="module")
def hasty():
    """Short of time and memory, for hostile strings."""
    with graders.Grader("boxed", "last_anywhere", 1.0, workers=1, memory=1 << 30) as it:
        yield it


# ---- digits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, folded",
    [
        ("٤٢", "42"),  # Arabic-Indic
        ("۴۲", "42"),  # Persian
        ("৪২", "42"),  # Bengali
        ("४२", "42"),  # Devanagari
        ("๔๒", "42"),  # Thai
        ("౪౨", "42"),  # Telugu
        ("꘤꘢", "42"),  # Vai
        ("߄߂", "42"),  # N'Ko
        ("４２", "42"),  # full-width
        ("𝟒𝟚", "42"),  # mathematical
        ("١٢٬٣٤٥٫٦", "12,345.6"),
        ("١٢،٣٤٥", "12,345"),
        ("س، ص", "س، ص"),  # a comma between words stays
        ("－１２．５", "-12.5"),
        ("−7", "-7"),
        ("x²", "x²"),
        ("½", "½"),
        ("፵፪", "42"),
        ("፲፱፻፹፫ ዓ.ም.", "1983 ዓ.ም."),
        ("፩፪", "፩፪"),  # two ones make no Ge'ez number
        ("፼" * 40, "፼" * 40),
    ],
)
def test_digits_of_many_scripts(text, folded):
    assert graders.fold_digits(text) == folded


def test_every_decimal_digit_of_unicode():
    digits = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) == "Nd"]
    assert len(digits) > 600
    for digit in digits:
        assert graders.fold_digits(digit) == str(int(digit))


def geez(number: int) -> str:
    """Ge'ez numeral, built from the right in pairs of digits with ፻ and ፼ in turn."""
    text = ""
    pairs = []
    while number:
        number, pair = divmod(number, 100)
        pairs.append(pair)
    for place, pair in enumerate(pairs):
        tens, ones = divmod(pair, 10)
        name = "፲፳፴፵፶፷፸፹፺"[tens - 1 : tens] + "፩፪፫፬፭፮፯፰፱"[ones - 1 : ones]
        mark = "" if place == 0 else "፻" if place % 2 else "፼"
        if not pair and mark == "፻":
            mark = ""
        leads = place == len(pairs) - 1
        if name == "፩" and (mark == "፻" or (mark and leads)):
            name = ""  # one hundred is ፻, and a leading ten thousand ፼
        text = name + mark + text
    return text


@FEW
@hypothesis.given(strategies.integers(1, 10**11))
def test_geez_numbers_are_read_as_written(number):
    assert graders.fold_digits(geez(number)) == str(number)


def test_geez_encoder_of_this_test():
    table = {100: "፻", 1000: "፲፻", 10**4: "፼", 10**6: "፻፼", 10**8: "፼፼", 100010000: "፼፩፼"}
    assert {number: geez(number) for number in table} == table
    assert graders.fold_digits("፼፲፩፻፲፩") == "11111"


# ---- extraction ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),  # bug 29: the last box, not the first
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x}", r"\left\{x"),
        (r"\boxed{a\\}b}", r"a\\"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {7}", "7"),
        (r"$\boxed 7$.", "7"),
        (r"it is \boxed 3.5.", "3.5"),
        (r"\boxed{5", None),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"\boxedfoo{5}", None),
        (r"\boxed", None),
        ("42", None),
        ("", None),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> none", None),
        (r"\boxed{1}</think>\boxed{2}</think>\boxed{3}", "3"),
        (r"<think>\boxed{1}", None),  # the block is still open
        (r"\boxed{1}</think>\boxed{2}<think>\boxed{3}", None),
        (r"\boxed{४२}", "४२"),
        # bug 45: a long answer, and text behind it, are no obstacle
        (r"\boxed{" + "1+" * 200 + "1}" + " so" * 200, "1+" * 200 + "1"),
    ],
)
def test_bug_29_boxed_after_think(text, answer):
    assert graders.extract_answer(text, "boxed", "last_after_think") == answer


def test_boxed_anywhere_is_the_references_rule():
    assert graders.extract_answer(r"<think>\boxed{1}</think> none", "boxed", "last_anywhere") == "1"
    assert graders.extract_answer(r"<think>\boxed{1}", "boxed", "last_anywhere") == "1"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("The answer is 42.", "42"),
        ("the ANSWER is: 42", "42"),
        ("The final answer is 42!", "42"),
        ("The answer is 1. No. The answer is 2. Done.", "2"),
        ("The answer is 3.5.", "3.5"),
        ("The answer is 3.5. It follows.", "3.5"),
        ("The answer is 1,234.", "1,234"),
        ("The answer is -5.", "-5"),
        ("The answer is .5.", ".5"),
        ("The answer is 3/4.", "3/4"),
        ("The answer is $\\frac{3}{4}$.", r"\frac{3}{4}"),
        ("The answer is $18.", "18"),
        ("The answer is **$18$**.", "18"),
        ("The answer is 18 apples.\nQuestion: next", "18 apples"),
        ("The answer is \\boxed{18}.", "18"),
        ("The answer is ४२।", "४२"),
        ("The answer is ٤٢؟", "٤٢"),
        ("The answer is ", None),
        ("The answer is\n", None),
        ("The answer isn't 5", None),
        ("Breathe answer is 5", None),
        ("<think>The answer is 1.</think>The answer is 2.", "2"),
        ("<think>The answer is 1.", None),
    ],
)
def test_answer_is(text, answer):
    assert graders.extract_answer(text, "answer_is", "last_after_think") == answer


@FEW
@hypothesis.given(strategies.text(alphabet="ab\\{}", max_size=12), strategies.text(max_size=20))
def test_a_balanced_box_comes_back_whole(body, tail):
    escaped = body.replace("\\", "").replace("{", r"\{").replace("}", r"\}")
    hypothesis.assume(escaped and "\\boxed" not in tail)
    text = f"{tail}\\boxed{{x{{{escaped}}}}}{tail}"
    assert graders.extract_answer(text, "boxed", "last_anywhere") == f"x{{{escaped}}}"


@FEW
@hypothesis.given(strategies.text(max_size=80), strategies.sampled_from(graders.PATTERNS))
def test_any_text_has_an_answer_or_none(text, pattern):
    answer = graders.extract_answer("The answer is" + text, pattern, "last_after_think")
    assert answer is None or answer
    graders.compare_plainly(text, answer or "")


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="'box': the choices are boxed, answer_is"):
        graders.extract_answer("", "box", "last_anywhere")
    with pytest.raises(ValueError, match="'first': the choices are last_after_think"):
        graders.Grader("boxed", "first", 1.0)


# ---- plain comparison ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("12", "12.0"), ("12", "012"), ("0", "-0.00"), (".5", "0.50"), ("5", "5."),
        ("1234", "1,234"), ("1234567", "1,234,567.0"), ("1234", "1 234"), ("1234", "1{,}234"),
        ("1234", r"1\,234"), ("1234.5", "1.234,5"), ("1234567", "1.234.567"),
        ("1234.5", "1\u202f234,5"), ("1234567", "12,34,567"), ("3.5", "3,5"), ("0.125", "0,125"),
        ("-3", "−3"), ("18", "$18$"), ("18", r"\$18.00"), ("-18", r"-\$18"), ("18", "€18"),
        ("18", r"\text{18}"), ("18", r"18\text{ apples}"), ("18", "18 apples."),
        ("18", "18 pommes vertes"), ("1/2", r"\frac12"), ("1/2", r"\dfrac{1}{2}"),
        ("0.5", r"\frac{1}{2}"), ("3/2", "1 1/2"), ("-1.5", "-1 1/2"), ("2", "4/2"),
        ("x", " X "), (r"\left(1, 2\right)", "(1,2)"), ("Monday", r"\text{monday}"),
        ("42", "४२"), ("42", "\u200f٤٢\u200f"), ("1234.5", "١٬٢٣٤٫٥"), ("42", "፵፪"),
        ("café", "cafe\u0301"), ("9" * 5000, "9" * 5000 + ".0"),
    ],
)  # fmt: skip
def test_plainly_equal(gold, answer):
    assert graders.compare_plainly(gold, answer) is True
    assert graders.compare_plainly(answer, gold) is True


@pytest.mark.parametrize(
    "gold, answer",
    [("12", "13"), ("12", "-12"), ("1.234", "1234"), ("1234", "1.235"), ("18", "17 apples"),
     ("18", "Monday"), ("saw it", "was it"), ("9" * 5000, "9" * 4999 + "8"), ("12", "120")],
)  # fmt: skip
def test_plainly_unequal(gold, answer):
    assert graders.compare_plainly(gold, answer) is False
    assert graders.compare_plainly(answer, gold) is False


@pytest.mark.parametrize(
    "gold, answer",
    [("11/2", "1 1/2"), ("18", "1 8"), ("18", "18 million"), ("3", "3 x"), ("3", "3xy"),
     ("1/3", "0.333333"), ("0.5", "50%"), ("1/0", "2/0"), ("x+1", "1+x"), ("1,2", "2,1")],
)  # fmt: skip
def test_strings_do_not_tell(gold, answer):
    assert graders.compare_plainly(gold, answer) is None


@FEW
@hypothesis.given(strategies.integers(-(10**9), 10**9), strategies.integers(0, 3))
def test_spellings_of_a_number(number, zeros):
    spellings = [f"{number:,}", f"{number:_}".replace("_", " "), f"${number}.{'0' * zeros}$"]
    spellings.append(f"{number}".translate(str.maketrans("0123456789", "०१२३४५६७८९")))
    for text in spellings:
        assert graders.compare_plainly(str(number), text)
        assert not graders.compare_plainly(str(number + 1), text)


@FEW
@hypothesis.given(strategies.text(max_size=40))
def test_a_text_equals_itself_and_normal_forms_stay(text):
    assert graders.compare_plainly(text, text) is True
    assert graders.compare_plainly(text, f" ${text}$ ") is True


# ---- workers ---------------------------------------------------------------------------------


def test_plain_answers_start_no_worker():
    with graders.Grader("boxed", "last_after_think", 5.0) as grader:
        start = time.monotonic()
        grades = grader.grade_all([(str(i % 50), rf"\boxed{{{i}}}") for i in range(1000)])
        assert sum(grade.correct for grade in grades) == 50
        assert time.monotonic() - start < 5
        assert all(worker._process is None for worker in grader._workers)


@pytest.mark.parametrize(
    "gold, answer, verdict",
    [
        ("x^2-1", "(x-1)(x+1)", (True, "symbolic")),
        (r"2\sqrt{2}", r"\sqrt{8}", (True, "symbolic")),
        (r"\{1,2\}", r"\{2, 1\}", (True, "symbolic")),
        (r"\frac{\pi}{2}", r"0.5\pi", (True, "symbolic")),
        ("x=5", "5", (True, "symbolic")),
        ("0.5", r"50\%", (True, "symbolic")),
        ("18", "18 million", (False, "symbolic")),
        ("x^2", "x^3", (False, "symbolic")),
        ("(1,2)", "(2,1)", (False, "symbolic")),
        ("5", r"\frac{", (False, "unparsed")),
    ],
)
def test_math_verify_decides(grader, gold, answer, verdict):
    assert grader.compare(gold, answer) == verdict


def test_grades_keep_their_order(grader):
    grades = grader.grade_all(
        [("4", r"\boxed{2^2}"), ("4", "4"), ("4", r"\boxed{5}"), ("4", r"\boxed{2^2}")]
    )
    assert grades[0] == graders.Grade("2^2", True, "symbolic")
    assert grades[1] == graders.Grade(None, False, "no_answer")
    assert grades[2] == graders.Grade("5", False, "plain")
    assert grades[3] == grades[0]
    assert {grade.status for grade in grades} <= set(graders.STATUSES)
    assert grader.grade_all([("4", r"\boxed{4}")])[0].correct
    with pytest.raises(ValueError, match="pair 1 is empty"):
        grader.grade_all([("1", ""), (" ", "")])


def test_bug_28_classes_of_equal_answers(grader):
    """Bug 28: votes go to values, not to raw strings."""
    answers = ["0.5", None, "1/2", "7", r"\frac{2}{4}", "50\\%", "7.0", "8"]
    assert grader.same_class(answers) == [0, -1, 0, 1, 0, 0, 1, 2]


def test_an_answer_is_compared_once(monkeypatch):
    asked = []

    def ask(worker, gold, answer, seconds):
        asked.append((gold, answer, seconds))
        return "equal"

    monkeypatch.setattr(graders._Worker, "ask", ask)
    grader = graders.Grader("boxed", "last_anywhere", 3.0)
    grades = grader.grade_all([("y^2", r"\boxed{y y}")] * 3 + [("y^2", r"\boxed{yyy}")])
    assert [grade.status for grade in grades] == ["symbolic"] * 4
    assert grader.compare("y^2", "$y y$") == (True, "symbolic")
    assert sorted(asked) == [("y^2", "y y", 3.0), ("y^2", "yyy", 3.0)]


def test_a_worker_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with (
        graders.Grader("boxed", "last_anywhere", 3.0) as grader,
        pytest.raises(RuntimeError, match=r"did not start .died.*import math_verify"),
    ):
        grader.grade_all([("4", r"\boxed{2^2}")])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_worker_holds_no_jax_and_a_memory_limit(hasty):
    hasty.compare("2", r"\sqrt{4}")
    pid = hasty._workers[0]._process.pid
    assert os.getpgid(pid) != os.getpgid(0)  # Ctrl-C does not reach it
    assert "jaxlib" not in pathlib.Path(f"/proc/{pid}/maps").read_text()
    limits = pathlib.Path(f"/proc/{pid}/limits").read_text()
    line = next(line for line in limits.splitlines() if line.startswith("Max address space"))
    assert line.split()[3] == str(1 << 30)


HOSTILE = {
    "power tower": r"9^{9^{9^9}}",
    "factorial": "(10^9)!",
    "nested braces": "{" * 400 + "}" * 400,
    "nested fractions": r"\frac{1}{" * 60 + "x" + "}" * 60,
    "sum": r"\sum_{n=1}^{10^{12}} \frac{1}{n^{n}}",
    "python": "__import__('os').system('touch owned')",
    "null bytes": "4\0\0 2\0x",
    "surrogate": "\ud800x",
    "newlines": "4\n\n2\r\n]\n",
    "dollars": "$$$$x$$",
    "quotes": '"]\n["5", "5", 1]',
}


@pytest.mark.parametrize("name", mostly_slow(HOSTILE, 8))
def test_hostile_answers_end_in_a_status(hasty, name):
    hasty.compare("4", f"2^2 + {name[0]}")  # a worker is running
    start = time.monotonic()
    same, status = hasty.compare("4 x", HOSTILE[name])
    assert not same
    assert status in graders.STATUSES
    assert time.monotonic() - start < 5
    assert not os.path.exists("owned")
    # The next question gets its own answer, not a late one.
    number = list(HOSTILE).index(name)
    assert hasty.compare(f"y+{number}", f"{number}+y") == (True, "symbolic")


def test_time_out_is_a_status_and_the_worker_is_replaced():
    with graders.Grader("boxed", "last_anywhere", 0.5, workers=1) as grader:
        assert grader.grade_all([("5", r"\boxed{9^{9^{9^9}}}")])[0].status == "timeout"
        assert grader._workers[0]._process is None
        assert grader.compare("4", "2^2") == (True, "symbolic")
        process = grader._workers[0]._process
        process.kill()
        process.wait()
        assert grader.compare("9", "3^2") == (True, "symbolic")
    assert grader._workers[0]._process is None


def test_a_worker_that_dies_in_the_middle_is_a_status(monkeypatch):
    with graders.Grader("boxed", "last_anywhere", 5.0, workers=1) as grader:
        grader.compare("4", "2^2")
        worker = grader._workers[0]
        send = worker._send

        def kill_then_send(question):
            worker._process.kill()
            send(question)

        monkeypatch.setattr(worker, "_send", kill_then_send)
        assert grader.compare("9", "3^2") == (False, "died")
        assert "died" in graders.UNRESOLVED


@pytest.mark.parametrize(
    "text",
    [
        "{" * 100_000 + "}" * 100_000,
        r"\boxed{" * 100_000,
        r"\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
        r"\boxed{" + "9" * 1_000_000 + "}",
        r"\boxed{" + "1," * 500_000 + "}",
        r"\boxed{1 " + "a " * 500_000 + "1}",
        r"\boxed{" + "፼" * 500_000 + "}",
        "the" + " " * 1_000_000,
        "The answer is " * 70_000,
        "The answer is " + "1 " * 500_000,
        "The answer is " + "$" * 1_000_000,
        "<think>" * 140_000,
        "\\" * 1_000_000,
    ],
    ids=lambda text: f"{text[:12]}*{len(text)}",
)
def test_long_texts_take_linear_time(hasty, text):
    start = time.monotonic()
    for pattern in graders.PATTERNS:
        answer = graders.extract_answer(text, pattern, "last_anywhere")
        if answer:
            assert hasty.compare("5", answer) in [(False, "plain"), (False, "too_long")]
    assert time.monotonic() - start < 10
