"""Oracles: tables of texts, and texts built around an answer."""

import hypothesis
import pytest
from hypothesis import strategies

from copsd_jax.rewards import comparison, extraction, graders

FEW = hypothesis.settings(max_examples=60, derandomize=True, deadline=None, database=None)


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
    assert extraction.extract_answer(text, "boxed", "last_after_think") == answer


def test_boxed_anywhere_is_the_references_rule():
    assert (
        extraction.extract_answer(r"<think>\boxed{1}</think> none", "boxed", "last_anywhere") == "1"
    )
    assert extraction.extract_answer(r"<think>\boxed{1}", "boxed", "last_anywhere") == "1"


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
    assert extraction.extract_answer(text, "answer_is", "last_after_think") == answer


@FEW
@hypothesis.given(strategies.text(alphabet="ab\\{}", max_size=12), strategies.text(max_size=20))
def test_a_balanced_box_comes_back_whole(body, tail):
    escaped = body.replace("\\", "").replace("{", r"\{").replace("}", r"\}")
    hypothesis.assume(escaped and "\\boxed" not in tail)
    text = f"{tail}\\boxed{{x{{{escaped}}}}}{tail}"
    assert extraction.extract_answer(text, "boxed", "last_anywhere") == f"x{{{escaped}}}"


@FEW
@hypothesis.given(strategies.text(max_size=80), strategies.sampled_from(extraction.PATTERNS))
def test_any_text_has_an_answer_or_none(text, pattern):
    answer = extraction.extract_answer("The answer is" + text, pattern, "last_after_think")
    assert answer is None or answer
    comparison.compare_plainly(text, answer or "")


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="'box': the choices are boxed, answer_is"):
        extraction.extract_answer("", "box", "last_anywhere")
    with pytest.raises(ValueError, match="'first': the choices are last_after_think"):
        graders.Grader("boxed", "first", 1.0)
