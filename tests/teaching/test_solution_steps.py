"""Oracles: tables by hand, values known from how an expression was made, perturbed solutions."""

import fractions
import json
import re
import time

import hypothesis
import pytest
from hypothesis import strategies

from copsd_jax.problems import bundled
from copsd_jax.rewards import comparison, extraction
from copsd_jax.teaching import equations, solution_steps, step_checker

SOME = hypothesis.settings(max_examples=200, derandomize=True, deadline=None, database=None)
ROWS = [
    json.loads(line)
    for name in bundled.NAMES
    for line in bundled.find_file(name).read_text(encoding="utf-8").splitlines()
]


# ---- steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, status, expected",
    [
        ("", "untagged", []),
        (" \n", "untagged", []),
        ("8 + 5 = 13.", "untagged", ["8 + 5 = 13."]),
        ("5 * 3 = 15. (15)", "untagged", ["5 * 3 = 15.", "(15)"]),
        ("12 / 2 = 6. The answer is 6.", "untagged", ["12 / 2 = 6.", "!The answer is 6."]),
        ("It is 3.5 km. Then 2.", "untagged", ["It is 3.5 km.", "Then 2."]),
        ("So 3.\nThen 4\n\n5", "untagged", ["So 3.", "Then 4", "5"]),
        ("1. Add.\n12. Go on. 3. No", "untagged", ["1. Add.", "12. Go on.", "3.", "No"]),
        ("(12 + 12 = 24.) Yes!! No?", "untagged", ["(12 + 12 = 24.)", "Yes!!", "No?"]),
        ("共有12个。答案是12。", "untagged", ["共有12个。", "答案是12。"]),
        ("፰ ነው። ፫ ነው", "untagged", ["፰ ነው።", "፫ ነው"]),
        ("আছে। নেই।", "untagged", ["আছে।", "নেই।"]),
        ("8 + 5 = 13 and 13 - 4 = 9.", "untagged", ["8 + 5 = 13 and", "13 - 4 = 9."]),
        ("So 8 + 5 = 13 (13 - 4 = 9)", "untagged", ["So 8 + 5 = 13", "(13 - 4 = 9)"]),
        ("1 + 1 = 2, so \\boxed{2}.", "untagged", ["1 + 1 = 2, so", "!\\boxed{2}."]),
        ("1 + 1 = 2, $\\boxed{2}$", "untagged", ["1 + 1 = 2,", "!$\\boxed{2}$"]),
        ("The answer is 1 + 1 = 2.", "untagged", ["!The answer is 1 + 1 = 2."]),
        ("\\boxed{1 + 1 = 2}, 3 + 3 = 6", "untagged", ["!\\boxed{1 + 1 = 2}, 3 + 3 = 6"]),
        ("\\boxedfoo", "untagged", ["\\boxedfoo"]),
        ("the FINAL answer  is: 4. So", "untagged", ["!the FINAL answer  is: 4.", "So"]),
        ("Hm. So. <answer> 11. Or 12.</answer> Bye", "untagged", None),
        ("<answer>11", "untagged", ["!11"]),
        ("<step_1>a. b</step_1>", "tagged", ["a. b"]),
        ("\n<step_1> a </step_1>\n <step_2>b</step_2>\n", "tagged", ["a", "b"]),
        ("<step_1>a</step_1><answer>11</answer>", "tagged", ["a", "!11"]),
        ("<step_1>a</step_1> <answer>11", "tagged", ["a", "!11"]),
        ("<step_1>a</step_1> The answer is 11.", "tagged", ["a", "!The answer is 11."]),
        ("<step_1>a</step_1><step_2>b. c", "cut", ["a", "b. c"]),
        ("<step_1>a</step_1><step_2>", "cut", ["a"]),
        ("<step_2>a</step_2>", "malformed", ["a"]),
        ("<step_1>a. b</step_2>", "malformed", ["a.", "b"]),
        ("<step_1>a</step_1><step_3>b</step_3>", "malformed", ["a", "b"]),
        ("<step_1>a</step_1><step_3>b", "malformed", ["a", "b"]),
        ("<step_1>a<step_2>b</step_2></step_1>", "malformed", ["a", "b"]),
        ("<step_1>a</step_1>x<step_2>b</step_2>", "malformed", ["a", "x", "b"]),
        ("Sure: <step_1>a</step_1>", "malformed", ["Sure:", "a"]),
        ("</step_1>a<step_1>", "malformed", ["a"]),
        ("<step_1>a</step_1><step_1>b</step_1>", "malformed", ["a", "b"]),
        ("<step_1>a</step_1></step_1><answer>3</answer>", "malformed", ["a", "!3"]),
    ],
)
def test_split(text, status, expected):
    if expected is None:
        expected = ["Hm.", "So.", "!11. Or 12.", "Bye"]
    found = solution_steps.split_steps(text)
    tags = [tag for tag in solution_steps._TAG.finditer(text) if tag[2]]
    by_tags = solution_steps._split_at_tags(text, tags) is not None
    assert by_tags == (status in ("tagged", "cut"))
    assert ["!" * s.final + text[s.start : s.end] for s in found] == expected
    assert [s.number for s in found] == list(range(1, len(expected) + 1))


FRAGMENTS = [
    "3.5",
    ". ",
    "\n",
    " and ",
    "1 + 2 = 3",
    "(4 * 5 = 20)",
    "The answer is 7",
    "\\boxed{8}",
]
FRAGMENTS += [
    "<step_1>",
    "</step_1>",
    "<step_2>",
    "</step_2>",
    "<answer>",
    "</answer>",
    "。",
    " x ",
]


@SOME
@hypothesis.given(strategies.lists(strategies.sampled_from(FRAGMENTS), max_size=12))
def test_steps_hold_all_of_the_text_but_tags_and_blanks(parts):
    text = "".join(parts)
    found = solution_steps.split_steps(text)
    at, rest = 0, ""
    for step in found:
        assert at <= step.start < step.end
        rest += text[at : step.start]
        assert text[step.start : step.end].strip() == text[step.start : step.end]
        at = step.end
    rest += text[at:]
    rest = re.sub(r"</?(step_\d|answer)>", "", rest)
    assert not rest.strip()
    for equation in equations.find_equations(text):
        assert sum(s.start <= equation.start and equation.end <= s.end for s in found) == 1


# ---- equations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("8 + 5 = 13.", ["8 + 5 = 13 -> 13"]),
        ("3 * 5 = 15. 15 - 4 = 11.", ["3 * 5 = 15 -> 15", "15 - 4 = 11 -> 11"]),
        ("10 + 3 = 13 and 13 - 4 = 8.", ["10 + 3 = 13 -> 13", "13 - 4 = 8 -> 8 false"]),
        ("2 * 3 = 6. (12 + 12 = 24)", ["2 * 3 = 6 -> 6", "12 + 12 = 24 -> 24"]),
        ("2 + 3 * 4 = 14", ["2 + 3 * 4 = 14 -> 14"]),
        ("20 - 5 - 3 = 12", ["20 - 5 - 3 = 12 -> 12"]),
        ("24 / 4 / 2 = 3", ["24 / 4 / 2 = 3 -> 3"]),
        ("(2 + 3) * 4 = 20", ["(2 + 3) * 4 = 20 -> 20"]),
        ("2 * (3 + 4) = 14", ["2 * (3 + 4) = 14 -> 14"]),
        ("2 * (3 + 4 = 7)", ["3 + 4 = 7 -> 7"]),
        ("1.5 * 2 = 3.0.", ["1.5 * 2 = 3.0 -> 3"]),
        ("3,5 + 1 = 4,5.", ["3,5 + 1 = 4,5 -> 9/2"]),
        ("1,234 + 1 = 1,235.", ["1,234 + 1 = 1,235 -> 1235"]),
        ("7 / 2 = 3.5", ["7 / 2 = 3.5 -> 7/2"]),
        ("10 / 3 = 3.33", ["10 / 3 = 3.33 -> 333/100 false"]),
        ("3 x 5 = 15, 3x5=16", ["3 x 5 = 15 -> 15", "3x5=16 -> 16 false"]),
        ("3 × 5 = 15; 15 ÷ 3 = 5", ["3 × 5 = 15 -> 15", "15 ÷ 3 = 5 -> 5"]),
        (r"$3 \times 5 = 15$", [r"3 \times 5 = 15 -> 15"]),
        (r"6 \div 2 \cdot 3 = 9", [r"6 \div 2 \cdot 3 = 9 -> 9"]),
        ("9 − 4 = 5", ["9 − 4 = 5 -> 5"]),
        ("４ ＋ ５ ＝ ９", ["４ ＋ ５ ＝ ９ -> 9"]),
        ("৮ + ৩ = ১১", ["৮ + ৩ = ১১ -> 11"]),
        ("፰ + ፫ = ፲፪", ["፰ + ፫ = ፲፪ -> 12 false"]),
        ("所以8 + 3 = 11个", ["8 + 3 = 11 -> 11"]),
        ("$3 + $4 = $7 for €1 + €1 = €2", ["3 + $4 = $7 -> 7", "1 + €1 = €2 -> 2"]),
        ("**8 + 5 = 13**", ["8 + 5 = 13 -> 13"]),
        ("4 - 9 = -5", ["4 - 9 = -5 -> -5"]),
        ("-5 + 3 = -2", ["-5 + 3 = -2 -> -2"]),
        ("- 5 + 3 = 8\n* 1 + 1 = 2", ["5 + 3 = 8 -> 8", "1 + 1 = 2 -> 2"]),
        ("15 = 3 * 5", ["15 = 3 * 5 -> 15"]),
        ("3 * 5 = 15 - 4 = 11", ["3 * 5 = 15 - 4 = 11 -> 11 false"]),
        ("2 + 3 = 5 = 1 + 4", ["2 + 3 = 5 = 1 + 4 -> 5"]),
        ("3 * 5 = 15 - so 15", ["3 * 5 = 15 -> 15"]),
        ("3 * 5 = 15 = ?", ["3 * 5 = 15 -> 15"]),
        ("8 / 0 = 0 and 1 = 8 / 0", ["8 / 0 = 0 -> 0 false", "1 = 8 / 0 -> None false"]),
        ("Total = 3 + 4 = 7", ["3 + 4 = 7 -> 7"]),
        ("<step_1>3 + 4 = 7</step_1>", ["3 + 4 = 7 -> 7"]),
        ("x + 3 + 4 = 9", []),
        ("2x + 3 = 7", []),
        ("2^3 + 1 = 9", []),
        ("2**3 = 8", []),
        (r"\frac{1}{2}3 + 4 = 7", []),
        ("f(3 + 4) = 7", []),
        ("a3 + 4 = 7", []),
        ("1 1/2 + 3 = 4", []),
        ("5% + 3 = 4", []),
        ("5 = 5 = 5", []),
        ("x = 5", []),
        ("5 + 3 => 8, 5 + 3 <= 9, 5 + 3 != 9", []),
        ("5 +\n3 = 8", []),
        ("3 + - 4 = 7", []),
        ("3 xylophones = 3", []),
        ("In 1 box 5 + 3 = 8", ["5 + 3 = 8 -> 8"]),
        ("2 + 3 = 6 = 5", ["2 + 3 = 6 = 5 -> 5 false"]),
        ("8 / 0 = 8 / 0", ["8 / 0 = 8 / 0 -> None false"]),
        ("5 = 5 - (1 + 1", []),
        ("5 = 5 = (1 + 1", []),
        ("3 + 4", []),
        ("፩፪ + ፫ = ፬", []),
        ("1" * 21 + " + 1 = 2", []),
        ("__import__('os') + 1 = 2", []),
    ],
)
def test_equations(text, expected):
    found = [
        f"{text[e.start : e.end]} -> {e.value}{'' if e.true else ' false'}"
        for e in equations.find_equations(text)
    ]
    assert found == expected


def test_results_on_the_way():
    (equation,) = equations.find_equations("3 * 5 - (2 + 2) = 11")
    assert [int(value) for value in equation.results if value is not None] == [15, 4, 11]


NUMBERS = strategies.builds(
    lambda n, places: (
        (str(fractions.Fraction(n)), fractions.Fraction(n))
        if not places
        else (f"{n / 10**places:.{places}f}", fractions.Fraction(n, 10**places))
    ),
    strategies.integers(0, 999),
    strategies.integers(0, 2),
)
LEVEL = {"+": 1, "-": 1, "*": 2, "/": 2}


def combine(left, sign: str, right):
    """Text, value and level of an operation; brackets where the levels ask for them."""
    (a, x, la), (b, y, lb) = left, right
    a = f"({a})" if la < LEVEL[sign] else a
    b = f"({b})" if lb <= LEVEL[sign] else b
    if x is None or y is None or (sign == "/" and y == 0):
        return f"{a} {sign} {b}", None, LEVEL[sign]
    value = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else None}[sign]
    return f"{a} {sign} {b}", value, LEVEL[sign]


TREES = strategies.recursive(
    strategies.builds(lambda it: (*it, 3), NUMBERS),
    lambda inner: strategies.builds(combine, inner, strategies.sampled_from("+-*/"), inner),
    max_leaves=6,
)


@SOME
@hypothesis.given(TREES, NUMBERS, strategies.sampled_from(["", "So ", "(", "1. "]))
def test_value_of_any_expression(tree, number, before):
    written, value, level = tree
    hypothesis.assume(level < 3)
    text, stated = number
    found = equations.find_equations(f"{before}{written} = {text}. And")
    assert len(found) == 1
    assert (found[0].start, found[0].end) == (len(before), len(before + written) + 3 + len(text))
    assert found[0].value == stated
    assert found[0].true == (value == stated)
    assert found[0].results[-1] == value
    if value is not None and value.denominator == 1 and value >= 0:
        assert equations.find_equations(f"{written} = {value}")[0].true


@pytest.mark.slow
def test_time_does_not_grow_with_the_square():
    parts = ["(", "1+", "1=", "1+1=", "(1+", "-", "1,", "1 ", "9", "x", "\n", "<step_1>", ". "]
    for part in [*parts, "1 + 1 = 2. ", "1+1=2<step_1>", "1+1=2,", "The answer is "]:
        before = time.process_time()
        step_checker.check_attempt(
            part * (40_000 // len(part)), "1 + 1 = 2.", "2", None, correct=False
        )
        assert time.process_time() - before < 4, part


# ---- the rule --------------------------------------------------------------------------------

TWO = "3 * 5 = 15 and 15 - 4 = 11."


def judged(text: str, solution: str, gold: str) -> step_checker.StepVerdict:
    for pattern in ("answer_is", "boxed"):
        found = extraction.extract_answer(text, pattern, "last_anywhere")
        if found is not None:
            break
    correct = found is not None and bool(comparison.compare_plainly(gold, found))
    return step_checker.check_attempt(text, solution, gold, found, correct)


@pytest.mark.parametrize(
    "text, case, step, wrong, corrected",
    [
        # right: every step verbatim, in another order of operands, by another way
        (
            "3 * 5 = 15. 15 - 4 = 11. The answer is 11.",
            *("right", None, None, "3 * 5 = 15.|15 - 4 = 11."),
        ),
        (
            "5 * 3 = 15 and 15 - 4 = 11. (11)\n\\boxed{11}",
            *("right", None, None, "5 * 3 = 15 and|15 - 4 = 11.|(11)"),
        ),
        ("5 + 5 + 5 = 15\n15-4=11\n\\boxed{11}", "right", None, None, "5 + 5 + 5 = 15|15-4=11"),
        ("3 * 5 - 4 = 11. The answer is 11.", "right", None, None, "3 * 5 - 4 = 11."),
        (
            "3 * 5 = 15. 15 + 0 = 15. 15 - 4 = 11. \\boxed{11}",
            *("right", None, None, "3 * 5 = 15.|15 + 0 = 15.|15 - 4 = 11."),
        ),
        (
            "1 + 1 = 2. 3 * 5 = 15. 15 - 4 = 11. \\boxed{11}",
            *("right", None, None, "1 + 1 = 2.|3 * 5 = 15.|15 - 4 = 11."),
        ),
        # thin
        ("The answer is 11.", "thin", None, None, "3 * 5 = 15.|15 - 4 = 11."),
        ("15 - 4 = 11. The answer is 11.", "thin", None, None, "3 * 5 = 15.|15 - 4 = 11."),
        ("So 3x5=15. \\boxed{11}", "thin", None, None, "So 3x5=15.|15-4=11."),
        ("20 - 9 = 11. \\boxed{11}", "thin", None, None, "3 * 5 = 15.|20 - 9 = 11."),
        ("Hm. 15 - 4 = 11. \\boxed{11}", "thin", None, None, "Hm.|3 * 5 = 15.|15 - 4 = 11."),
        # unfinished
        ("", "unfinished", None, None, "3 * 5 = 15.|15 - 4 = 11."),
        ("5 × 3 = 15. (15)", "unfinished", None, None, "5 × 3 = 15.|15 - 4 = 11."),
        ("Well, he has 3 * 5 = 15 and 15 -", "unfinished", None, None, "3 * 5 = 15.|15 - 4 = 11."),
        ("15 - 4 = 11. 15 - 4 = 11.", "unfinished", None, None, "3 * 5 = 15.|15 - 4 = 11."),
        ("<step_1>5*3=15</step_1><step_2>15", "unfinished", None, None, "5*3=15.|15-4=11."),
        # wrong: false, not needed, or only the answer
        ("3 * 5 = 16. 16 - 4 = 12.", "wrong", 1, "3 * 5 = 16", "3 * 5 = 15.|15 - 4 = 11."),
        ("3 × 5 = 16.", "wrong", 1, "3 × 5 = 16", "3 × 5 = 15.|15 - 4 = 11."),
        ("15 − 4=10. 1x3=3", "wrong", 1, "15 − 4=10", "3 x 5 = 15.|15 − 4 = 11."),
        (
            "3 * 5 = 15. The answer is 12. Ok?",
            *("wrong", 2, "The answer is 12."),
            "3 * 5 = 15.|15 - 4 = 11.",
        ),
        ("2 * 3 = 6. (12 + 12 = 24)", "wrong", 1, "2 * 3 = 6", "3 * 5 = 15.|15 - 4 = 11."),
        (
            "Ok. 3 * 5 = 15. He sells, so 15 + 4 = 19. \\boxed{19}",
            *("wrong", 3, "15 + 4 = 19", "Ok.|3 * 5 = 15.|15 - 4 = 11."),
        ),
        ("3 × 5 = 15, 15 - 4 = 12.", "wrong", 2, "15 - 4 = 12", "3 × 5 = 15,|15 - 4 = 11."),
        (
            "3 x 5 = 15. The answer is 15.",
            "wrong",
            2,
            "The answer is 15.",
            "3 x 5 = 15.|15 - 4 = 11.",
        ),
        ("The answer is 4.", "wrong", 1, "The answer is 4.", "3 * 5 = 15.|15 - 4 = 11."),
        ("4 / 2 = 2. The answer is 11.", "thin", None, None, "4 / 2 = 2.|3 * 5 = 15.|15 - 4 = 11."),
        (
            "3 * 5 = 15. 15 - 4 = 11. 11 + 1 = 13. \\boxed{11}",
            *("wrong", 3, "11 + 1 = 13", "3 * 5 = 15.|15 - 4 = 11."),
        ),
        (
            "\\boxed{11}. 3 * 5 = 15. \\boxed{15} \\boxed{16}.",
            *("wrong", 3, "\\boxed{15} \\boxed{16}.", "3 * 5 = 15.|15 - 4 = 11."),
        ),
        (
            "15 - 4 = 11. The answer is 12.",
            *("wrong", 2, "The answer is 12.", "3 * 5 = 15.|15 - 4 = 11."),
        ),
        (
            "<step_1>3x5=15</step_1><step_2>15-3=12</step_2><answer>\\boxed{12}</answer>",
            *("wrong", 2, "15-3=12", "3x5=15|15-4=11."),
        ),
        (
            "<step_1>3 * 5 = 15 and 15 - 4 = 12</step_1>",
            *("wrong", 1, "15 - 4 = 12", "3 * 5 = 15.|15 - 4 = 11."),
        ),
        ("The answer is 15 - 4 = 12.", "wrong", 1, "15 - 4 = 12", "3 * 5 = 15.|15 - 4 = 11."),
    ],
)
def test_check(text, case, step, wrong, corrected):
    verdict = judged(text, TWO, "11")
    assert (verdict.case, verdict.wrong_step) == (case, step)
    assert (verdict.wrong and text[slice(*verdict.wrong)]) == wrong
    assert "|".join(verdict.corrected) == corrected


def test_each_equation_reaches_one_of_equal_results():
    solution = "2 * 5 = 10. 20 - 10 = 10."
    assert judged("2 * 5 = 10. \\boxed{10}", solution, "10").case == "thin"
    assert judged("2 * 5 = 10. 20 - 10 = 10. \\boxed{10}", solution, "10").case == "right"


def equations_of(row: dict) -> list[str]:
    return row["solution"].removesuffix(".").split(" and ")


def traces(parts: list[str], answer: str) -> list[str]:
    """One trace in the forms that a student may write."""
    tagged = "".join(f"<step_{n}>{part}</step_{n}>" for n, part in enumerate(parts, 1))
    end = f"The answer is {answer}."
    return [
        " and ".join(parts) + f". {end}",
        ". ".join(parts) + f".\n{end}",
        "\n".join(parts).replace("*", "×") + f"\n\\boxed{{{answer}}}",
        f"{tagged}<answer>\\boxed{{{answer}}}</answer>",
    ]


def number_lists(lines) -> list[list[str]]:
    return [re.findall(r"\d+", line) for line in lines]


def perturbed(part: str) -> list[str]:
    """The equation with each of its numbers made another, one at a time."""
    return [
        f"{part[: m.start()]}{int(m[0]) + shift}{part[m.end() :]}"
        for m in re.finditer(r"\d+", part)
        for shift in (1, 7)
    ]


def test_every_bundled_solution_is_known_and_right():
    assert {len(equations_of(row)) for row in ROWS} == {1, 2}
    for row in ROWS:
        assert step_checker.can_check(row["solution"], row["answer"])
        parts = equations_of(row)
        for text in traces(parts, row["answer"]):
            verdict = judged(text, row["solution"], row["answer"])
            assert (verdict.case, verdict.wrong_step) == ("right", None), text
            assert number_lists(verdict.corrected) == number_lists(parts)


def test_a_changed_number_in_step_k_is_wrong_in_step_k():
    """The forms of a trace take turns, which are 4 against 6 changes of an equation."""
    turn = 0
    for row in ROWS:
        parts = equations_of(row)
        for k, part in enumerate(parts):
            for other in perturbed(part):
                changed = [*parts[:k], other, *parts[k + 1 :]]
                text = traces(changed, row["answer"])[turn % 4]
                turn += 1
                verdict = judged(text, row["solution"], row["answer"])
                assert (verdict.case, verdict.wrong_step) == ("wrong", k + 1), text
                assert verdict.wrong is not None
                quoted = text[slice(*verdict.wrong)]
                assert quoted.replace("×", "*") == other
                assert number_lists(verdict.corrected) == number_lists(parts)
                assert not any(quoted in line for line in verdict.corrected)
                prefix = [text[s.start : s.end] for s in solution_steps.split_steps(text)[:k]]
                assert list(verdict.corrected[:k]) == prefix
    assert turn > 4000


def test_a_true_but_unneeded_step_k_is_wrong_in_step_k():
    count = 0
    for row in ROWS:
        parts = equations_of(row)
        results = {part.split(" = ")[1] for part in parts}
        for k in range(len(parts)):
            for a, b in ((90, 7), (5, 1)):
                if str(a + b) in results:
                    continue
                changed = [*parts[:k], f"{a} + {b} = {a + b}", *parts[k + 1 :]]
                text = f"{'. '.join(changed)}. The answer is {a + b}."
                verdict = judged(text, row["solution"], row["answer"])
                assert (verdict.case, verdict.wrong_step) == ("wrong", k + 1), text
                assert number_lists(verdict.corrected) == number_lists(parts)
                count += 1
    assert count > len(ROWS)


def test_a_step_left_out_of_each_bundled_row():
    for row in ROWS:
        parts = equations_of(row)
        for k in range(len(parts)):
            rest = [*parts[:k], *parts[k + 1 :]]
            written = ". ".join(rest) + "." * bool(rest)
            thin = judged(f"{written} \\boxed{{{row['answer']}}}", row["solution"], row["answer"])
            unfinished = judged(written, row["solution"], row["answer"])
            assert (thin.case, unfinished.case) == ("thin", "unfinished")
            for verdict in (thin, unfinished):
                assert number_lists(verdict.corrected) == number_lists(parts)


def test_another_wrong_answer_is_wrong_in_its_sentence():
    for row in ROWS:
        parts = equations_of(row)
        for text in traces(parts, str(int(row["answer"]) + 1)):
            verdict = judged(text, row["solution"], row["answer"])
            assert (verdict.case, verdict.wrong_step) == ("wrong", len(parts) + 1)
            assert number_lists(verdict.corrected) == number_lists(parts)


@pytest.mark.parametrize(
    "solution, gold, reason",
    [
        ("He has eleven.", "11", "it has no equation"),
        ("3 * 5 = 16 and 15 - 4 = 11.", "11", "'3 \\* 5 = 16' is false"),
        ("3 * 5 = 15.", "11", "it ends in 15, but the answer is '11'"),
    ],
)
def test_unknown_solutions_are_refused_by_name(solution, gold, reason):
    assert not step_checker.can_check(solution, gold)
    assert step_checker.can_check(solution) == reason.startswith("it ends")
    with pytest.raises(ValueError, match=f"{re.escape(repr(solution))}: {reason}"):
        step_checker.check_attempt("", solution, gold, None, correct=False)


@pytest.mark.parametrize("solution, gold", [("7 / 2 = 3.5.", "3.5"), ("7 / 2 = 3.5", "7/2")])
def test_golds_that_are_no_integers(solution, gold):
    assert step_checker.can_check(solution, gold)


@pytest.mark.parametrize("text, found, correct", [("11", None, True), (" ", "11", False)])
def test_contradictions_are_refused(text, found, correct):
    with pytest.raises(ValueError, match="not possible for the text"):
        step_checker.check_attempt(text, TWO, "11", found, correct)
