"""Oracles: classes, sums and shares worked out by hand; tokenizers of the package."""

import collections

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from copsd_jax.metrics import token_stats as stats
from copsd_jax.weights import hub, tokenizer

# ---- classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, pieces",
    [
        (
            "number",
            ["7", " 42", "3,5", "(3", "1.", "٤٢", "২৪", "๑๒", "፲፪", "½", "x²"[1:], "+", " -", "*",
             "/", "=", " =", "^", "×", "÷", "−", "√", "%", ")=", "=(", "<=", ">="],
        ),
        (
            "word",
            ["a", " apples", "\\frac", "’s", "'t", "ọmọ", "苹果", "ልጆች", "ꕉꕜ", "ি", "x2", "1st",
             "Answer:", b" \xe1\x88", b"\x88", b",\xf0\x9f"],
        ),
        (
            "mark",
            ["<think>", "</think>", "\n</think>", "</answer>", "<step_", "</", "<", ">", "\\boxed",
             "boxed", "\\boxed{", "{", "}", " }", "}.", "}$", "{}", "}}"],
        ),
        (
            "other",
            ["", " ", "\n\n", "\t", ",", ".", "...", "$", "\\", "(", ")", "`", "**", "--", "---",
             "//", "😀", "।", "。", "\x00"],
        ),
    ],
)  # fmt: skip
def test_classes_of_pieces(name, pieces):
    for piece in pieces:
        raw = piece if isinstance(piece, bytes) else piece.encode()
        assert stats.token_class(raw) == name, piece


def test_what_a_tokenizer_says_of_a_token_goes_first():
    assert stats.token_class(b"word", special=True) == "mark"
    assert stats.token_class(b"word", end=True) == "end"
    assert stats.token_class(b"<|im_end|>", special=True, end=True) == "end"


def test_the_table_of_a_vocabulary():
    tok = tokenizer.load(hub.resolve_model_path("tiny"))
    pieces = tokenizer.list_token_bytes(tok)
    stops = tokenizer.find_stop_ids(tok, hub.resolve_model_path("tiny"))
    table_V = stats.classify_vocabulary(pieces, stops, tok.all_special_ids)
    assert (table_V.dtype, table_V.shape) == (np.int8, (len(pieces),))
    text = "<think>\nAmina has 12 + 3 apples.</think>\\boxed{15}<|im_end|>"
    ids = tok.encode(text, add_special_tokens=False)
    found = collections.defaultdict(str)
    for i in ids:
        found[list(stats.CLASSES)[table_V[i]]] += pieces[i].decode().strip()
    assert found == {
        "mark": "<think></think>boxed{}",
        "word": "Aminahasapples",
        "number": "12+315",
        "other": ".\\",
        "end": "<|im_end|>",
    }


# ids 0..4 are of the classes number, word, mark, end, other, in this order
TABLE = np.arange(5, dtype=np.int8)


def test_sums_by_class():
    sums = stats.by_class([1.0, 2.0, 4.0, 8.0], [1, 0, 1, 3], TABLE)
    assert sums == {"number": (2.0, 1), "word": (5.0, 2), "end": (8.0, 1)}
    assert stats.by_class([], [], TABLE) == {}
    with pytest.raises(ValueError, match="3 values for 2 tokens"):
        stats.by_class([1, 2, 3], [0, 1], TABLE)


def test_sums_by_position():
    values = [2.0**-i for i in range(8)]
    assert stats.by_position(values, [1] * 8) == {"0_7": (2 - 2**-7, 8)}
    longer = stats.by_position([*values, 5, 6], [1] * 10)
    assert longer == {"0_7": (2 - 2**-7, 8), "8_31": (11, 2)}
    ones = stats.by_position([1.0] * 600, [1] * 600)
    assert ones == {"0_7": (8, 8), "8_31": (24, 24), "32_127": (96, 96), "128_511": (384, 384),
                    "512_up": (88, 88)}  # fmt: skip
    assert stats.by_position([], []) == {}
    found = stats.by_position([1.0, *[2.0] * 30, 4.0, 8.0], [0, 1, *[0] * 30, 1])
    assert found == {"0_7": (2, 1), "32_127": (8, 1)}
    # The buckets follow one another from 0, and their names say from where to where.
    places = list(stats.BUCKETS.values())
    assert [one.start for one in places] == [0, *(one.stop for one in places[:-1])]
    last = [f"{one.stop - 1}" if one.stop else "up" for one in places]
    assert list(stats.BUCKETS) == [
        f"{one.start}_{end}" for one, end in zip(places, last, strict=True)
    ]


# ---- texts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids, n, share",
    [
        ([], 4, 0.0),
        ([1, 1, 1], 4, 0.0),  # no 4-gram
        ([1, 2, 3, 4, 5], 4, 0.0),
        ([1, 1, 1, 1, 1], 4, 0.5),  # the second of two
        ([7] * 13, 4, 0.9),  # ten, one of them new
        ([1, 2, 3, 4, 1, 2, 3, 4], 4, 0.2),  # 1234 2341 3412 4123 1234
        ([1, 2, 1, 2, 1], 2, 0.5),  # 12 21 12 21
        ([1, 2, 1], 1, 1 / 3),
    ],
)
def test_repetition(ids, n, share):
    assert stats.repetition(ids, n) == pytest.approx(share, abs=1e-15)


@hypothesis.settings(max_examples=60, derandomize=True, deadline=None, database=None)
@hypothesis.given(strategies.lists(strategies.integers(0, 2), max_size=20))
def test_repetition_counts_what_came_before(ids):
    grams = ["".join(map(str, ids[i : i + 3])) for i in range(len(ids) - 2)]
    again = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert stats.repetition(ids, 3) == pytest.approx(again / max(1, len(grams)), abs=1e-15)


@pytest.mark.parametrize(
    "completion, privileged, share",
    [
        ("She has 3 apples.", "Now she has 3 apples, not 4.", 1.0),  # she-has-3, has-3-apples
        ("She has 3 pears.", "Now she has 3 apples.", 0.5),
        ("She has three pears.", "Now she has 3 apples.", 0.0),
        ("she, HAS (3)", "She has 3", 1.0),
        ("has she 3", "She has 3", 0.0),
        ("She has", "She has", 0.0),  # no 3-gram
        ("", "She has 3", 0.0),
        ("She has 3", "", 0.0),
        ("苹果一共", "有苹果一共三个", 1.0),  # 苹果一, 果一共
        ("苹果二共", "有苹果一共三个", 0.0),
        ("o\u0323mo\u0323 ni ile", "ọmọ ni ile", 1.0),  # composed and not
        ("ልጆች ሦስት ብርቱካን", "ልጆች ሦስት ብርቱካን አላቸው", 1.0),
    ],
)
def test_overlap(completion, privileged, share):
    assert stats.overlap(completion, privileged) == share


def test_overlap_of_other_lengths():
    assert stats.overlap("a b c d", "a b x c d", n=2) == 2 / 3  # ab, cd of ab, bc, cd
    assert stats.overlap("a b c d", "d c b a", n=1) == 1.0


def test_advantage_by_step():
    advantage_C = [0.5, -1.0, 0.0, 4.0, 2.0]
    ranges = [(0, 2), (2, 2), (2, 5), (4, 5)]
    assert stats.advantage_by_step(advantage_C, ranges) == [-0.25, None, 2.0, 2.0]
    for bad in ((-1, 2), (3, 2), (4, 6)):
        with pytest.raises(ValueError, match=f"range {bad[0]}:{bad[1]} is not within the 5 tokens"):
            stats.advantage_by_step(advantage_C, [bad])


# ---- records ---------------------------------------------------------------------------------


def record(ids, **fields):
    return {"completion_ids": ids, **fields}


def test_the_summary_by_hand():
    records = [
        record(
            [0, 1, 1, 3],
            divergence=[1.0, 2.0, 3.0, 0.5],
            loss_mask=[0, 1, 1, 1],  # a right prefix: no loss, but an advantage
            logp_student=[-1.0, -2.0, -1.0, -0.5],
            logp_teacher=[-2.0, -1.0, -1.5, -0.5],  # advantage -1, 1, -0.5, 0
            completion="one two three four",
            privileged_text="one two three",
        ),
        record(
            [4] * 9,
            divergence=[0.25] * 8 + [7.0],
            loss_mask=[1, 0, 1, 1, 1, 1, 1, 1, 1],
            logp_student=[-1.0] * 9,
            logp_teacher=[-3.0] * 9,  # advantage -2
            completion="",
            privileged_text="",
        ),
    ]
    got = stats.summary(records, TABLE)
    want = {
        "divergence_word": 2.5,
        "divergence_end": 0.5,
        "divergence_other": (7 * 0.25 + 7) / 8,
        "divergence_at_0_7": (5.5 + 7 * 0.25) / 10,
        "divergence_at_8_31": 7.0,
        "advantage": (-0.5 - 18) / 13,
        "advantage_negative": 11 / 13,
        "advantage_number": -1.0,
        "advantage_word": 0.25,
        "advantage_end": 0.0,
        "advantage_other": -2.0,
        "repetition": (0 + 5 / 6) / 2,
        "overlap": 0.5,  # of the one record with a privileged text
    }
    assert got == pytest.approx(want, abs=1e-12)


def test_what_is_missing_is_left_out():
    """Without a teacher (grpo) nothing is said about one, rather than 0."""
    alone = record([0, 1], logp_student=[-1.0, -2.0], logp_teacher=None)
    assert stats.summary([alone], TABLE) == {"repetition": 0.0}
    assert stats.summary([record([0, 1])], TABLE) == {"repetition": 0.0}
    assert stats.summary([], TABLE) == {}
    # A record that carries no loss has empty lists, and does not dilute the others.
    masked = record([0, 0, 0], divergence=[], logp_student=[], logp_teacher=[])
    live = record([0], divergence=[2.0], loss_mask=[1], logp_student=[-1.0], logp_teacher=[-2.0])
    got = stats.summary([masked, live], TABLE)
    assert (got["divergence_number"], got["advantage"], got["repetition"]) == (2.0, -1.0, 0.0)


@pytest.mark.parametrize("name", ["divergence", "loss_mask", "logp_student", "logp_teacher"])
def test_a_list_of_another_length_is_an_error(name):
    fields = {"divergence": [1.0] * 3, "loss_mask": [1] * 3}
    fields |= {"logp_student": [1.0] * 3, "logp_teacher": [1.0] * 3}
    broken = record([0, 1, 2], **fields | {name: [1.0, 2.0]})
    with pytest.raises(ValueError, match="2 values for 3 tokens"):
        stats.summary([broken], TABLE)
