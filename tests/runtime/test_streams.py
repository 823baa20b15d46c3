r"""Text for a terminal: control characters are spelled, and messages have no tokens.

Oracle: spellings by hand, and the Unicode database's names of what is kept.
"""

import unicodedata

import pytest

from copsd_jax import summary
from copsd_jax.metrics import terminal
from copsd_jax.runtime import streams

HOSTILE = {
    "\x1b[2J\x1b[31mred": r"\x1b[2J\x1b[31mred",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "right\rwrong": r"right\rwrong",
    "a\x08b\x7fc\x00": r"a\x08b\x7fc\x00",
    "\x9b31m": r"\x9b31m",  # the escape of 8 bits
    "1\u202e2\u2066": r"1\u202e2\u2066",  # the other direction
    "x\u2028y\u2029": r"x\u2028y\u2029",
    "half \ud800": r"half \ud800",
    "\U000e0041": r"\U000e0041",  # a tag that nobody sees
}
KEPT = "漢字 é e\u0301 में\u200d फ़ فارسی\u200cها שלום\u200f 👩\u200d👧 \u00ad\u00a0\ufeff \t\n"


@pytest.mark.parametrize("text", HOSTILE)
def test_control_characters_are_spelled(text):
    assert streams.escape_stream_text(text) == HOSTILE[text]
    assert streams.escape_stream_text(f"{KEPT}{text}") == KEPT + HOSTILE[text]


def test_a_terminal_gets_no_control_characters():
    """From any place of a record that a run prints."""
    every = "".join(HOSTILE) + "".join(map(chr, range(0xA0)))
    record = {
        "correct": False, "lang": every, "gold": every, "problem": every, "completion": every,
        "finish": "failed", "finish_detail": every, "grade_detail": every,
        "reply_detail": every, "reply_status": "refused",
    }  # fmt: skip
    shown = [
        summary.summarize_sample(1, [record]),
        *summary.summarize_failures(1, [record]),
        terminal.table([every, "n"], [[every, 1]]),
    ]
    assert len(shown) == 5
    for text in shown:
        kinds = {unicodedata.category(char) for char in text if char not in "\n\t"}
        assert not kinds & {"Cc", "Cs", "Zl", "Zp"}
        assert r"\x1b[2J" in text
    assert shown[-1].count("\n") == 2


def test_messages_have_no_tokens_of_the_hub(monkeypatch):
    """Such as that of an HTTP client that refuses a token with a line break."""
    token = "hf_AbCdEfGh0123\nhf_second456"
    monkeypatch.setenv("HF_TOKEN", token)
    error = ValueError(f"Illegal header value {f'Bearer {token}'.encode()!r}")
    said = streams.spell_error(error)
    assert said == r"Illegal header value b'Bearer [HF_TOKEN]\n[HF_TOKEN]'"
    monkeypatch.setenv("HF_TOKEN", "short")
    assert streams.spell_error(ValueError("short \x1b")) == r"short \x1b"


def test_errors_of_the_system_have_no_number(tmp_path):
    name = tmp_path / ("a" * 300)
    with pytest.raises(OSError, match="Errno 36") as caught:
        name.read_text()
    assert streams.spell_error(caught.value) == f"{name}: File name too long"
    assert streams.spell_error(OSError("the disk is gone")) == "the disk is gone"
