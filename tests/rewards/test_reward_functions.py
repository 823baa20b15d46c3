r"""Oracles: verdicts worked out by hand; the published regular expression beside ours."""

import json
import re
import signal
import sys

import hypothesis
import pytest
from hypothesis import strategies

from copsd_jax.rewards import graders, reward_functions
from copsd_jax.runtime import signals

NONE = r'There is no final answer of the form "\boxed{...}".'
BOXED, ANSWER_IS = r"\boxed{{{}}}", "The answer is {}."  # as in conversations.ANSWER_FORMS


@pytest.fixture(scope="module")
def grader():
    with graders.Grader("boxed", "last_after_think", seconds=10.0, workers=1) as it:
        yield it


@pytest.fixture
def score(grader):
    def one(kind, gold, text):
        return reward_functions.build_rewarder(kind, grader, BOXED).score([gold], [text])[0]

    return one


# ---- final answers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, verdict",
    [
        (r"so \boxed{42}.", (1.0, True, "42", "plain", "The answer is right.")),
        (r"so \boxed{12}.", (0.0, False, "12", "plain", "The answer 12 is wrong.")),
        ("so 42.", (0.0, False, None, "no_answer", NONE)),
        (
            r"<think>\boxed{42}",
            (0.0, False, None, "no_answer", NONE),
        ),
        (
            r"\boxed{" + "x+" * 600 + "1}",
            (0.0, False, "x+" * 600 + "1", "too_long",
             "The answer " + "x+" * 100 + "… could not be checked."),
        ),
    ],
)  # fmt: skip
def test_final_answers(score, text, verdict):
    assert score("answer", "42", text) == reward_functions.Verdict(*verdict)


def test_the_form_that_was_asked_for(grader):
    said = {
        form: reward_functions.build_rewarder("answer", grader, form).score(["1"], [""])[0].feedback
        for form in ("", ANSWER_IS)
    }
    assert list(said.values()) == [
        "There is no final answer of the form that was asked for.",
        'There is no final answer of the form "The answer is ...".',
    ]


def test_verdicts_keep_the_order_of_the_texts(grader):
    texts = [rf"\boxed{{{n}}}" for n in (3, 1, 2, 3)]
    verdicts = reward_functions.build_rewarder("answer", grader).score(["3", "2", "2", "1"], texts)
    assert [v.reward for v in verdicts] == [1.0, 0.0, 1.0, 0.0]
    assert [v.answer for v in verdicts] == ["3", "1", "2", "3"]
    with pytest.raises(ValueError, match="1 gold answers but 4 texts"):
        reward_functions.build_rewarder("answer", grader).score(["3"], texts)


# ---- multiple choice -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, letter",
    [
        ("B", "B"), (" \nB\n", "B"), ("b", "B"), ("(B)", "B"), ("(B).", "B"), ("B.", "B"),
        ("B)", "B"), ("B:", "B"), ("B) a red one", "B"), ("(B) a red one", "B"),
        ("B. 12.5 kg,\nor so", "B"),
        ("", None), ("AB", None), ("A cat", None), ("A.M.", None), ("(B", None), ("1", None),
        ("(B)lue", None), ("Б", None), ("B or C", None),
    ],
)  # fmt: skip
def test_letters(score, content, letter):
    verdict = score("choice", "B", f"It is clear. <answer>{content}</answer>")
    assert verdict.answer == letter
    assert verdict.correct == (letter == "B")
    assert verdict.status == ("plain" if letter else "not_a_choice")


@pytest.mark.parametrize(
    "text, reward, status, feedback",
    [
        ("<answer>A</answer> no: <answer>C</answer>.", 1.0, "plain", "The answer is right."),
        ("<answer>C</answer> no: <answer>A</answer>.", 0.0, "plain", "The answer A is wrong."),
        ("C", 0.0, "no_answer", "There is no <answer>."),
        ("<answer>C", 0.0, "unclosed", "The <answer> is never closed."),
        ("<answer>C</answer> or <answer>", 0.0, "unclosed", "The <answer> is never closed."),
        ("<think><answer>C</answer>", 0.0, "no_answer", "There is no <answer>."),
        (
            "<think><answer>C</answer></think><answer>A</answer>",
            0.0, "plain", "The answer A is wrong.",
        ),
        ("<think>A?</think><answer>C</answer>", 1.0, "plain", "The answer is right."),
        (
            "<answer>all of\nthem</answer>",
            0.0, "not_a_choice",
            "The answer is 'all of them': it is not the letter of a choice.",
        ),
    ],
)  # fmt: skip
def test_choices(score, text, reward, status, feedback):
    verdict = score("choice", "(C)", text)
    assert (verdict.reward, verdict.status, verdict.feedback) == (reward, status, feedback)
    assert verdict.correct is (reward == 1.0)


def test_a_gold_answer_that_is_no_letter_is_refused(grader):
    with pytest.raises(ValueError, match="'choice': the gold answer 'blue' of pair 1 cannot"):
        reward_functions.build_rewarder("choice", grader).score(["A", "blue"], ["", ""])


# ---- tool calls ------------------------------------------------------------------------------


def call(name, **arguments):
    return f"Action: {name}\nAction Input: {json.dumps(arguments)}\n"


NESTED = call("find", filter={"city": "Oslo", "near": {"km": 5}}, note='a } in "text" {')


def test_bug_46_nested_arguments_are_rewarded(score):
    published = re.findall(r"Action Input:\s*({.*?})", NESTED, re.DOTALL)
    with pytest.raises(json.JSONDecodeError):
        json.loads(published[0])
    text = "Thought: search.\n" + NESTED + "Done }."
    verdict = score("tool_call", NESTED, text)
    assert verdict == reward_functions.Verdict(
        1.0,
        True,
        'find {"filter": {"city": "Oslo", "near": {"km": 5}}, "note": "a } in \\"text\\" {"}',
        "plain",
        "The calls are right.",
    )


@pytest.mark.parametrize(
    "gold, text, right",
    [
        (call("f", a=1) + call("g", b=2), call("g", b=2) + call("f", a=1), True),
        # Arguments of all calls are merged, as published: whose they are is not compared.
        (call("f", a=1) + call("g", b=2), call("f", b=2) + call("g", a=1), True),
        (call("f", a=1) * 2, call("f", a=1), False),  # a multiset
        (call("f", a=1), call("f", a=1) * 2, False),
        (call("f", a=1), call("f", a=2) + call("f", a=1), False),
        (call("f", a=1), call("f", a=1, b=2), False),
        (call("f", a=1, b=2), call("f", b=2, a=1), True),
        (call("f", a={"x": 1, "y": 2}), call("f", a={"y": 2, "x": 1}), True),
        (call("f", a=[1, 2]), call("f", a=[2, 1]), False),
        (call("f", a=1), call("f", a=1.0), True),
        (call("f", a=1), call("f", a=True), False),  # which Python has equal
        (call("f", a=[0, {"b": 1}]), call("f", a=[False, {"b": 1}]), False),
        (call("f", a="1"), call("f", a=1), False),
        (call("f", a=None), call("f"), False),
        (call("f", a="Malmö"), "Action: f\nAction Input: {\"a\": \"Malm\\u00f6\"}", True),
        (call("f"), call("f"), True),
        (call("f"), "Action: f", True),
        (call("f"), call("g"), False),
        (call("f", a=1), "Action: `f` Action Input:\n\n {\"a\": 1}", True),
        (call("f", a=1), "<think>" + call("g", b=1) + "</think>" + call("f", a=1), True),
    ],
)  # fmt: skip
def test_calls(score, gold, text, right):
    verdict = score("tool_call", gold, text)
    assert (verdict.correct, verdict.reward, verdict.status) == (right, float(right), "plain")


def test_the_gold_list_of_toolalpaca(score):
    gold = json.dumps(
        [
            {"Action": "f", "Action_Input": json.dumps({"a": {"b": [1]}})},
            {"Action": "g", "Action_Input": {"c": 2}},
        ]
    )
    assert score("tool_call", gold, call("f", a={"b": [1]}) + call("g", c=2)).correct
    assert not score("tool_call", gold, call("f", a={"b": [2]}) + call("g", c=2)).correct


@pytest.mark.parametrize(
    "text, answer",
    [
        (call("f", a=1) + call("f", a=2), 'f, f {"a": 2}'),  # of equal arguments the last counts
        (call("g", b=1) + call("f", a=[1.0]), 'f, g {"a": [1], "b": 1}'),
        (call("f", a="Action: g\n"), 'f {"a": "Action: g\\n"}'),  # in a string it is no call
        (call("f", a="Malmö"), 'f {"a": "Malmö"}'),
        (call("f", a="Action Input: {"), 'f {"a": "Action Input: {"}'),
    ],
)  # fmt: skip
def test_the_answer_of_calls(score, text, answer):
    assert score("tool_call", call("h"), text).answer == answer


@pytest.mark.parametrize(
    "text, status, feedback",
    [
        ("I cannot.", "no_answer", "There is no `Action:` with a function."),
        ("", "no_answer", "There is no `Action:` with a function."),
        ("<think>" + call("f", a=1), "no_answer", "There is no `Action:` with a function."),
        ("Action: \nAction Input: {}", "malformed", "`Action:` 1 names no function."),
        (
            'Action: f\nAction Input: {"a": 1} Action Input: {"a": }',
            "malformed",
            "The JSON of `Action Input:` 2 is malformed: Expecting value: line 1 column 7 (char 6)"
            ".",
        ),
        (
            'Action: f\nAction Input: {"a": 1',
            "malformed",
            "The JSON of `Action Input:` 1 is malformed: Expecting ',' delimiter: line 1 column 8 "
            "(char 7).",
        ),
        (
            "Action: f\nAction Input: [1]",
            "malformed", "The JSON of `Action Input:` 1 is malformed: it is no object.",
        ),
        (call("g", a=1), "plain", "The functions called (g) are not the right ones."),
        (call("f", a=2), "plain", 'The functions are right, the arguments {"a": 2} are wrong.'),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_call(score, text, status, feedback):
    verdict = score("tool_call", call("f", a=1), text)
    assert (verdict.reward, verdict.correct) == (0.0, False)
    assert (verdict.status, verdict.feedback) == (status, feedback)


@pytest.mark.parametrize(
    "json_text",
    ['{"a":' * 100_000, '{"a": ' + "9" * 10_000 + "}", "[" * 100_000, '{"a": "\x00"}'],
)
def test_hostile_json_is_a_status(score, json_text):
    assert score("tool_call", call("f", a=1), f"Action: f\nAction Input: {json_text}").status == (
        "malformed"
    )


def test_half_a_character_can_be_written_to_a_file(score):
    verdict = score("tool_call", call("f", a=1), 'Action: f\nAction Input: {"a": "\\ud800"}')
    assert verdict.answer.encode() == b'f {"a": "\\ud800"}'
    assert verdict.feedback.encode()


@pytest.mark.parametrize(
    "gold, reason",
    [
        ("", "a gold answer needs an Action"),  # else two empty dictionaries would be equal
        ("[]", "a gold answer needs an Action"),
        ("Action Input: {}", "a gold answer needs an Action"),
        ("Action: f\nAction Input: {", "the JSON of `Action Input:` 1 is malformed"),
        ('[{"Action": "f"}]', "it is no object"),
        ('[{"Action_Input": "{}"}]', "a call in the list has no Action"),
    ],
)
def test_a_gold_answer_without_calls_is_refused(score, gold, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        score("tool_call", gold, "")
    named = f"reward.kind is 'tool_call': the gold answer {' '.join(gold.split())!r} of pair 0"
    assert str(error.value).startswith(named)


VALUES = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.text(),
    lambda inner: strategies.lists(inner) | strategies.dictionaries(strategies.text(), inner),
    max_leaves=6,
)


@hypothesis.settings(max_examples=80, derandomize=True, deadline=None, database=None)
@hypothesis.given(strategies.dictionaries(strategies.text(), VALUES), strategies.text())
def test_any_json_object_is_read_whole(arguments, tail):
    """The oracle is the json module over the object alone."""
    tail = tail.replace("Action", "").replace("think", "")
    names, found = reward_functions._read_calls(
        f"Action: f\nAction Input: {json.dumps(arguments)}{tail}"
    )
    assert names == {"f": 1}
    assert {key: json.loads(value) for key, value in found.items()} == arguments


# ---- functions -------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(
        "import asyncio\n"
        "LIMIT = 3\n"
        "def length(gold, text):\n    return len(text) / len(gold)\n"
        "def told(gold, text):\n    return True, f'{text} has {len(text)} letters.'\n"
        "def nothing(gold, text):\n    return None\n"
        "def endless(gold, text):\n    return float('nan')\n"
        "def absent(gold, text):\n    return open('/nonexistent/' + text)\n"
        "def leaves(gold, text):\n    raise SystemExit(0)\n"
        "def interrupts(gold, text):\n    raise KeyboardInterrupt\n"
        "async def wait():\n    asyncio.current_task().cancel(); await asyncio.sleep(1)\n"
        "def cancels(gold, text):\n    return asyncio.run(wait())\n"
        "def alone(text):\n    return 1.0\n"
        "def large(gold, text):\n    return 10**400\n"
        "def huge(gold, text):\n    return 10**5000\n"
        "def worded(gold, text):\n    return '1.0'\n"
        "def three(gold, text):\n    return 1, 'a', 2\n"
        "def swapped(gold, text):\n    return 'a', 1\n"
        "class Away(Exception):\n    pass\n"
        "def own(gold, text):\n    raise Away('two\\n lines \\udc80')\n"
        "class Mute(Exception):\n    def __str__(self):\n        raise ValueError\n"
        "def mute(gold, text):\n    raise Mute\n"
    )
    (tmp_path / "leaving_reward.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "stopping_reward.py").write_text("raise KeyboardInterrupt\n")
    (tmp_path / "failing_reward.py").write_text("raise AssertionError('no key')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with signals.handle_signals(lambda *_: None):  # as in a run, no signal raises KeyboardInterrupt
        yield "my_reward"
    sys.modules.pop("my_reward", None)


def test_a_function_of_the_users(score, module):
    assert callable(reward_functions.import_function(f"{module}:length"))
    assert not any(map(reward_functions.import_function, reward_functions.REWARDS))
    assert score(f"{module}:length", "ab", "abc") == reward_functions.Verdict(
        1.5, None, None, "computed", ""
    )
    assert score(f"{module}:told", "ab", "abc") == reward_functions.Verdict(
        1.0, None, None, "computed", "abc has 3 letters."
    )


def test_what_a_text_makes_it_raise_is_counted(grader, module):
    rewarder = reward_functions.build_rewarder(f"{module}:length", grader)
    statuses = [v.status for v in rewarder.score(["", "a"], ["abc", "abc"])]
    assert statuses == ["raised:ZeroDivisionError", "computed"]
    assert rewarder.score([""], ["abc"])[0].reward == 0.0


@pytest.mark.parametrize(
    "name, status, detail",
    [
        ("absent", "raised:FileNotFoundError",
         "FileNotFoundError: [Errno 2] No such file or directory: '/nonexistent/b'"),
        ("leaves", "raised:SystemExit", "SystemExit: 0"),
        ("interrupts", "raised:KeyboardInterrupt", "KeyboardInterrupt"),
        ("cancels", "raised:CancelledError", "asyncio.exceptions.CancelledError"),
        ("own", "raised:Away", "my_reward.Away: two lines \\udc80"),
        ("mute", "raised:Mute", "my_reward.Mute: <exception str() failed>"),
        ("nothing", "no_number", "it returned None (NoneType)"),
        ("endless", "no_number", "it returned nan (float)"),
        ("large", "no_number", "it returned 100000000000000000...0000000000000000000 (int)"),
        ("huge", "no_number", "it returned a value of the type int"),
        ("worded", "no_number", "it returned '1.0' (str)"),
        ("three", "no_number", "it returned (1, 'a', 2) (tuple)"),
        ("swapped", "no_number", "it returned ('a', 1) (tuple)"),
    ],
)  # fmt: skip
def test_no_row_ends_the_run(score, module, name, status, detail):
    """Neither an error of another kind nor a result that is no finite number."""
    verdict = score(f"{module}:{name}", "a", "b")
    if status == "no_number":
        detail += " instead of a finite number or (number, text)"
    assert verdict == reward_functions.Verdict(0.0, None, None, status, "", detail)
    assert reward_functions.lacks_reward(verdict.status)


def test_ctrl_c_outside_a_run_ends_the_grading(score, module):
    with (
        signals.handle_signals(signal.default_int_handler),
        pytest.raises(KeyboardInterrupt),
    ):
        score(f"{module}:interrupts", "a", "b")


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("boxd", "the kind is unknown"),
        ("this", "the kind is unknown"),
        ("", "the kind is unknown"),
        ("nowhere.at_all:f", "No module named 'nowhere'"),
        ("my_reward:lenght", "has no attribute 'lenght'"),
        ("my_reward:LIMIT", "3 is not a callable object"),
        ("my_reward:alone", "too many positional arguments"),
        (":f", "Empty module name"),
        ("leaving_reward:f", "SystemExit: 3"),
        ("stopping_reward:f", "KeyboardInterrupt: "),
        ("failing_reward:f", "AssertionError: no key"),
    ],
)
def test_an_unknown_kind_is_refused_with_the_choices(grader, module, kind, reason):
    sys.modules.pop("this", None)
    with pytest.raises(ValueError) as error:
        reward_functions.build_rewarder(kind, grader)
    text = str(error.value)
    with pytest.raises(ValueError, match=re.escape(text)):
        reward_functions.import_function(kind)
    assert text.startswith(
        f"reward.kind is {kind!r}: the choices are answer, choice, tool_call, or module:function"
    )
    assert reason in text
    assert "this" not in sys.modules  # a misspelt kind imports nothing


def test_every_status_is_in_the_table(grader, module):
    kinds = [*reward_functions.REWARDS, f"{module}:length", f"{module}:nothing"]
    texts = ["", r"\boxed{x+}", r"\boxed{1}", "<answer>", "<answer>xx</answer>", "Action: f",
             "Action Input: f"]  # fmt: skip
    golds = {"choice": "A", "tool_call": "Action: f", "answer": "x^2+1"}
    seen = set()
    for kind in kinds:
        gold = golds.get(kind, "")
        verdicts = reward_functions.build_rewarder(kind, grader).score([gold] * len(texts), texts)
        seen |= {verdict.status.split(":")[0] for verdict in verdicts}
    assert seen <= set(reward_functions.STATUSES)
    assert seen >= set(reward_functions.STATUSES) - {
        "timeout", "died", "too_long", "symbolic", "unparsed", "computed"
    }  # fmt: skip


def test_feedback_does_not_hold_the_gold_answer(score):
    cases = [("answer", "7919", r"\boxed{1}"), ("answer", "7919", ""), ("choice", "Q", ""),
             ("choice", "Q", "<answer>A</answer>"), ("choice", "Q", "<answer>xx</answer>"),
             ("tool_call", call("secret", key=7919), call("f", a=1)),
             ("tool_call", call("secret", key=7919), call("secret", a=1)),
             ("tool_call", call("secret", key=7919), "Action Input: {")]  # fmt: skip
    for kind, gold, text in cases:
        feedback = score(kind, gold, text).feedback
        assert feedback
        assert not any(word in feedback for word in ("7919", "Q", "secret", "key"))


def test_choices_and_calls_in_other_spellings():
    """A full-width letter, and JSON in a code block, as models write them."""
    with graders.Grader("choice", "last_anywhere", 5.0) as grader:
        choice = reward_functions.build_rewarder("choice", grader)
        texts = ["<answer>Ｂ</answer>", "<answer>（Ｂ）</answer>", "<answer>Ｃ</answer>"]
        assert [v.correct for v in choice.score(["B"] * 3, texts)] == [True, True, False]
        calls = reward_functions.build_rewarder("tool_call", grader)
        gold = 'Action: f\nAction Input: {"a": 1}'
        fenced = 'Action: f\nAction Input: ```json\n{"a": %d}\n```'
        given = [fenced % 1, fenced % 2, (fenced % 1) + "\n" + (fenced % 1)]
        assert [v.correct for v in calls.score([gold] * 3, given)] == [True, False, False]


def test_gold_answers_of_which_none_can_be_read():
    prose = "She has 48 clips.\nThat is 2 * 24."
    check = reward_functions.check_gold_answers
    with pytest.raises(
        ValueError, match=r"^data\.path: the grader cannot read any of the 2 gold"
    ) as e:
        check("answer", {"row1": prose, "row2": prose}, "data.path")
    assert "\n" not in str(e.value)
    assert str(e.value).endswith("the field 'answer' must contain only the final answer")
    with pytest.raises(ValueError, match=r"answer, or be blank if the row is not to be graded"):
        check("answer", {"row1": prose}, "data.path", needed=False)
    check("answer", {"row1": prose, "row2": "7"}, "data.path")
    golds = {"row1": prose, "row2": "7", "row3": "B", "row4": call("f", a=1)}
    unreadable = {
        "answer": ["row1", "row4"],
        "choice": ["row1", "row2", "row4"],
        "tool_call": ["row1", "row2", "row3"],
        "module:function": [],
    }
    for kind, rows in unreadable.items():
        assert reward_functions.find_unreadable(kind, golds) == rows
