"""Random replies and tool calls: every reply has a status, and what is used was in the reply."""

import json
import random
import re

import fuzz
import numpy as np

from copsd_jax.problems import problem_row
from copsd_jax.rewards import graders, reward_functions
from copsd_jax.teaching import replies, solution_steps, step_checker, token_spans

TAGS = ("error_quote", "explanation", "case", "first_wrong", "step_1", "step_2", "step_3", "answer")
WORDS = ("right", "wrong", "thin", "1", "2", "0", "3 + 4 = 7.", "The answer is 7.", "\\boxed{7}")


def make_reply(r: random.Random) -> str:
    """Returns text with tags, mostly in order and closed."""
    out = []
    names = r.choice((TAGS[:2], TAGS[2:3] + TAGS[4:], TAGS[2:], TAGS))
    for name in names:
        content = r.choice((*WORDS, fuzz.make_text(r)))
        piece = f"<{name}>{content}</{name}>"
        piece = {0: "", 1: f"<{name}>", 2: f"</{name}>", 3: piece * 2}.get(r.randrange(60), piece)
        out.append(piece + ("" if r.random() < 0.8 else fuzz.make_text(r, 2)))
    if r.random() < 0.2:
        r.shuffle(out)
    text = "".join(out)
    if r.random() < 0.2:
        text = fuzz.damage(r, text.encode()).decode("utf-8", "replace")
    return text


@fuzz.sizes(300)
def test_reply_readers(cases):
    r, used = random.Random(16), 0
    for _ in range(cases):
        text = make_reply(r)
        correct = r.random() < 0.5
        steps = [step.text for step in solution_steps.split_steps(make_reply(r))]
        critique = replies.verify_critique(replies.read_critique(text), steps)
        read = (
            replies.read_reflection(text, correct), critique, replies.read_analysis(text),
            replies.read_published_reflection(text, correct),
        )  # fmt: skip
        for reply in read:
            assert reply.status in replies.STATUSES
            assert reply.raw == text
            assert reply.text in text or reply.text in text.replace("<think>", "")
            assert reply.quote in text
            if replies.STATUSES[reply.status].usable:
                assert reply.text or reply.trace
                used += 1
        if critique.status == "ok":
            assert critique.case in step_checker.CASES
            for _, content in re.findall(r"<(\w+)>(.*?)</\1>", critique.trace, re.DOTALL):
                assert content in text
        row = problem_row.Row("1", "p", "s", "7", "en", "p")
        for policy in ("keep", "mask", "drop"):
            assert replies.apply_leak_policy(read[0], row, policy).status in replies.STATUSES
    assert used > cases


@fuzz.sizes(300)
def test_steps_and_quotes(cases):
    r = random.Random(16)
    for _ in range(cases):
        text = make_reply(r) if r.random() < 0.5 else fuzz.make_text(r, 30)
        at = 0
        for number, step in enumerate(solution_steps.split_steps(text), 1):
            assert (step.number, step.text) == (number, text[step.start : step.end])
            assert at <= step.start < step.end
            at = step.end
        step_checker.can_check(text, "7")
        raw = text.encode("utf-8", "replace")
        cuts = sorted(r.randrange(len(raw) + 1) for _ in range(5))
        pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        decoded = token_spans.decode_tokens(np.arange(len(pieces)), pieces)
        assert decoded.text == raw.decode("utf-8", "replace")
        quote = r.choice((fuzz.make_text(r), text[at // 3 : at // 2], None))
        found = token_spans.find_quote(text, quote, occurrence="first", threshold=0.8)
        if quote and quote.strip() and quote in text:
            assert 0 <= found.start <= found.end <= len(text)


def make_calls(r: random.Random) -> str:
    calls = []
    for _ in range(r.randrange(3)):
        name = r.choice(("f", "get_weather", "", fuzz.make_text(r, 2)))
        given = json.dumps(fuzz.make_value(r) if r.random() < 0.4 else {"a": fuzz.make_value(r)})
        calls.append(f"Action: {name}\nAction Input: {given}\n")
    text = "".join(calls) + r.choice(("", "", fuzz.make_text(r)))
    if r.random() < 0.2:
        text = json.dumps([{"Action": "f", "Action_Input": fuzz.make_value(r)}])
    return fuzz.damage(r, text.encode()).decode("utf-8", "replace") if r.random() < 0.3 else text


@fuzz.sizes(300)
def test_tool_calls(cases):
    r, accepted = random.Random(16), 0
    with graders.Grader("none", "last_anywhere", 5.0) as grader:
        rewarder = reward_functions.build_rewarder("tool_call", grader)
        for _ in range(cases):
            gold, text = make_calls(r), make_calls(r)

            def check(gold=gold):
                reward_functions.check_gold_answers("tool_call", {"row1": gold}, "data.path")
                return True

            (verdict,) = rewarder.score(["Action: f\nAction Input: {}"], [text])
            assert verdict.status in reward_functions.STATUSES
            assert verdict.reward == float(bool(verdict.correct))
            (verdict.answer or "").encode()
            if fuzz.attempt(check, "'row1' of data.path") and gold.startswith("Action"):
                (own,) = rewarder.score([gold], [gold])
                assert own.correct is True or "<think>" in gold or "</think>" in gold
                accepted += 1
    assert accepted > cases / 16


def test_deep_calls_are_refused():
    deep = '[{"Action": "f", "Action_Input": ' + "[" * 100_000 + "]" * 100_000 + "}]"
    assert (
        fuzz.attempt(
            lambda: reward_functions.check_gold_answers("tool_call", {"row1": deep}, "data.path"),
            "row 'row1' of data.path cannot be read",
        )
        is None
    )
