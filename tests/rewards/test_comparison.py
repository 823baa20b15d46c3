"""Oracles: tables of answers, spellings of numbers."""

import hypothesis
import pytest
from hypothesis import strategies

from copsd_jax.rewards import comparison

FEW = hypothesis.settings(max_examples=60, derandomize=True, deadline=None, database=None)


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("12", "12.0"), ("12", "012"), ("0", "-0.00"), (".5", "0.50"), ("5", "5."),
        ("1234", "1,234"), ("1234567", "1,234,567.0"), ("1234", "1 234"), ("1234", "1{,}234"),
        ("1234", r"1\,234"), ("1234.5", "1.234,5"), ("1234567", "1.234.567"),
        ("1234.5", "1\u202f234,5"), ("1234567", "12,34,567"), ("Q/q", "Q / q"),
        ("-3", "−3"), ("18", "$18$"), ("18", r"\$18.00"), ("-18", r"-\$18"), ("18", "€18"),
        ("18", r"\text{18}"), ("18", r"18\text{ apples}"), ("18", "18 apples."),
        ("18", "18 pommes vertes"), ("1/2", r"\frac12"), ("1/2", r"\dfrac{1}{2}"),
        ("0.5", r"\frac{1}{2}"), ("3/2", "1 1/2"), ("-1.5", "-1 1/2"), ("2", "4/2"),
        ("x", " x "), (r"\left(1, 2\right)", "(1,2)"), ("Monday", r"\text{monday}"),
        ("42", "४२"), ("42", "\u200f٤٢\u200f"), ("1234.5", "١٬٢٣٤٫٥"), ("42", "፵፪"),
        ("café", "cafe\u0301"), ("9" * 5000, "9" * 5000 + ".0"),
    ],
)  # fmt: skip
def test_plainly_equal(gold, answer):
    assert comparison.compare_plainly(gold, answer) is True
    assert comparison.compare_plainly(answer, gold) is True


@pytest.mark.parametrize(
    "gold, answer",
    [("12", "13"), ("12", "-12"), ("1.234", "1234"), ("1234", "1.235"), ("18", "17 apples"),
     ("18", "Monday"), ("saw it", "was it"), ("9" * 5000, "9" * 4999 + "8"), ("12", "120")],
)  # fmt: skip
def test_plainly_unequal(gold, answer):
    assert comparison.compare_plainly(gold, answer) is False
    assert comparison.compare_plainly(answer, gold) is False


@pytest.mark.parametrize(
    "gold, answer",
    [("11/2", "1 1/2"), ("18", "1 8"), ("3", "3 x"), ("3", "3xy"),
     ("1/3", "0.333333"), ("1/0", "2/0"), ("x+1", "1+x"), ("1,2", "2,1")],
)  # fmt: skip
def test_strings_do_not_tell(gold, answer):
    assert comparison.compare_plainly(gold, answer) is None


@FEW
@hypothesis.given(strategies.integers(-(10**9), 10**9), strategies.integers(0, 3))
def test_spellings_of_a_number(number, zeros):
    spellings = [f"{number:,}", f"{number:_}".replace("_", " "), f"${number}.{'0' * zeros}$"]
    spellings.append(f"{number}".translate(str.maketrans("0123456789", "०१२३४५६७८९")))
    for text in spellings:
        assert comparison.compare_plainly(str(number), text)
        assert not comparison.compare_plainly(str(number + 1), text)


@FEW
@hypothesis.given(
    strategies.text(strategies.characters(exclude_characters="$\\", codec="utf-8"), max_size=40)
)
def test_a_text_equals_itself_and_normal_forms_stay(text):
    assert comparison.compare_plainly(text, text) is True
    assert comparison.compare_plainly(text, f" ${text}$ ") is True


@pytest.mark.parametrize(
    ("gold", "readable"),
    [
        ("72", True), ("1,072", True), (r"\frac{1}{2}", True), (r"\{1, 2\}", True),
        ("Monday", True),
        ("5 apples", True), ("26元", True), ("x \\in (-\\infty, 3]", True), ("∞", True),
        ("\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}", True),
        (r"\frac{1}{2", False), ("??", False), ("####", False), ("5\n6", False),
        ("9" * 1001, False),
        ("Natalia sold 48/2 = 24 clips in May, and then she sold 48 more of them.", False),
    ],
)  # fmt: skip
def test_golds_that_can_be_read(gold, readable):
    assert comparison.is_readable(gold) is readable
