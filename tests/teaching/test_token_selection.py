"""Which tokens carry loss. Oracle: the text of the chosen tokens, written down by hand."""

import conftest
import numpy as np
import pytest
import transformers

from copsd_jax.problems import problem_row
from copsd_jax.teaching import contexts, replies, token_selection, token_spans
from copsd_jax.weights import tokenizer

ROW = problem_row.Row("r", "p", "3 * 5 = 15 and 15 - 4 = 11.", "11", "en", "p")
TEXT = "3 * 5 = 15. 15 - 4 = 12. The answer is 12."


@pytest.fixture(scope="module")
def tiny():
    folder = conftest.ROOT / "copsd_jax" / "weights" / "tiny_tokenizer"
    return transformers.AutoTokenizer.from_pretrained(str(folder))


def chosen(tiny, text, reply, correct=False, before="", **changes):
    """The chosen text, whether the end token is chosen, and the status."""
    ids = tiny.encode(before + text, add_special_tokens=False)
    settings = token_selection.Settings(
        **{"select": "from_error", "on_failure": "skip", "occurrence": "first", "fuzzy": 0.8}
        | changes
    )
    decoded = token_spans.decode_tokens(ids, tokenizer.list_token_bytes(tiny))
    mask, status = token_selection.select_tokens(
        settings, decoded, len(before), len(ids) + 1, contexts.Attempt(ROW, text, correct), reply
    )
    return tiny.decode(np.asarray(ids)[mask[:-1]].tolist()).strip(), bool(mask[-1]), status


def quoting(quote):
    return replies.Reply("ok", "because", quote)


@pytest.mark.parametrize(
    "reply, changes, expected",
    [
        (quoting("15 - 4 = 12"), {}, ("15 - 4 = 12. The answer is 12.", True, "exact")),
        (quoting("15 - 4  =  12"), {}, ("15 - 4 = 12. The answer is 12.", True, "normalised")),
        (quoting("15 - 4 = 12"), {"select": "error_step"}, ("15 - 4 = 12.", False, "exact")),
        (quoting("12"), {"occurrence": "last"}, ("12.", True, "exact")),
        (quoting("12"), {}, ("12. The answer is 12.", True, "exact")),
        (quoting("nothing alike"), {}, ("", False, "failed")),
        (quoting("nothing alike"), {"on_failure": "full"}, (TEXT, True, "failed")),
        (quoting(""), {}, ("", False, "no_quote")),
        (quoting(""), {"on_failure": "full"}, (TEXT, True, "no_quote")),
        (quoting(" "), {}, ("", False, "no_quote")),
        (
            quoting("so 4 were taken from 15, which leaves 12."),
            {"on_failure": "step"},
            ("15 - 4 = 12. The answer is 12.", True, "closest_step"),
        ),
        (quoting("nothing alike"), {"on_failure": "step"}, ("", False, "failed")),
        (replies.Reply("ok", step=2), {}, ("15 - 4 = 12. The answer is 12.", True, "step")),
        (replies.Reply("ok", step=2), {"select": "error_step"}, ("15 - 4 = 12.", False, "step")),
        (replies.Reply("ok", step=9), {}, ("", False, "failed")),
        (quoting("15"), {"select": "all"}, (TEXT, True, "all")),
    ],
)
def test_tokens_of_a_wrong_answer(tiny, reply, changes, expected):
    assert chosen(tiny, TEXT, reply, **changes) == expected


def test_a_right_answer_is_distilled_whole(tiny):
    assert chosen(tiny, TEXT, quoting("15"), correct=True) == (TEXT, True, "right")


def test_errors_are_looked_for_behind_the_thinking(tiny):
    before = "15 - 4 = 12 or not?\n</think>\n\n"
    found = chosen(tiny, TEXT, quoting("15 - 4 = 12"), before=before)
    assert found == ("15 - 4 = 12. The answer is 12.", True, "exact")


def last_word(problem, answer, reply):
    """A user's function."""
    start = answer.rindex(" ") + 1
    return [(start, len(answer))]


def test_spans_of_a_function(tiny, monkeypatch):
    monkeypatch.syspath_prepend(str(conftest.ROOT / "tests" / "teaching"))
    found = chosen(tiny, TEXT, replies.NONE, before="x\n", select="test_token_selection:last_word")
    assert found == ("12.", False, "spans")
