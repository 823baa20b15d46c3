"""Oracles: tables of answers, written by hand; `tests/data/answers_34.json` was written before the
words of `units.json`, which knows nothing of it.
"""

import concurrent.futures
import json
import pathlib
import random
import re

import pytest
from conftest import ROOT

from copsd_jax.rewards import comparison, extraction, graders, numerals, units

DATA = ROOT / "tests/data"
CASES = ROOT.parent / "shared/cases"
LANGUAGES = json.loads((DATA / "answers_34.json").read_text(encoding="utf-8"))


def read_table(path: pathlib.Path) -> list[tuple[str, str, bool]]:
    """Reads lines of gold, answer, equal (1/0) and kind; # begins a comment."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            gold, answer, equal = line.split("\t")[:3]
            rows.append((gold, answer, equal == "1"))
    return rows


def find_wrong(grader: graders.Grader, rows: list[tuple[str, str, bool]]) -> list:
    return [row for row in rows if grader.compare(row[0], row[1])[0] != row[2]]


@pytest.fixture(scope="module")
def grader():
    with graders.Grader("boxed", "last_after_think", 10.0) as it:
        yield it


@pytest.fixture(scope="module")
def shared():
    if not CASES.is_dir():
        pytest.skip("../shared/cases is not beside the repository")
    return CASES


def test_every_kind_is_decided_strictly(grader):
    rows = read_table(DATA / "answer_kinds.tsv")
    assert len(rows) > 130
    assert find_wrong(grader, rows) == []


def test_rows_of_answers_tsv(grader, shared):
    assert find_wrong(grader, read_table(shared / "reports/answers.tsv")) == []


def test_rows_of_answers_jsonl(grader, shared):
    """The rows with a pattern; the others are about readers, replies and votes."""
    lines = (shared / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row.get("pattern") in extraction.PATTERNS]
    assert len(rows) == 60
    for row in rows:
        answer = extraction.extract_answer(row["input"], row["pattern"], "last_after_think")
        same = answer is not None and grader.compare(row["gold"], answer)[0]
        assert same == row["expected"], row


def test_34_languages_have_20_forms_and_10_near_misses():
    assert len(LANGUAGES) == 34
    for code, forms in LANGUAGES.items():
        assert (len(forms["right"]), len(forms["wrong"])) == (20, 10), code
        for pairs in forms.values():
            assert len({tuple(pair) for pair in pairs}) == len(pairs), code


@pytest.mark.parametrize("code", LANGUAGES)
def test_forms_of_a_language(grader, code):
    rows = [(*pair, key == "right") for key, pairs in LANGUAGES[code].items() for pair in pairs]
    assert find_wrong(grader, rows) == []


# ---- changed pairs ---------------------------------------------------------------------------


def change_digit(text: str, chance: random.Random) -> str:
    places = [k for k, c in enumerate(text) if c.isdecimal()]
    at = chance.choice(places)
    zero = ord(text[at]) - int(text[at])
    digit = chance.choice([d for d in range(1, 10) if d != int(text[at])])
    return text[:at] + chr(zero + digit) + text[at + 1 :]


def test_a_changed_digit_is_refused(grader):
    """Each right form of 34 languages, with one digit changed."""
    chance = random.Random(3)
    rows = []
    for forms in LANGUAGES.values():
        for gold, answer in forms["right"]:
            if any(c.isdecimal() for c in answer):
                rows.append((gold, change_digit(answer, chance), False))
    assert len(rows) > 600
    assert find_wrong(grader, rows) == []


UNITS = [
    "km",
    "m",
    "cm",
    "kg",
    "g",
    "hours",
    "minutes",
    "litres",
    "€",
    "£",
    "rupees",
    "km/h",
    "m/s",
]


@pytest.mark.parametrize("unit", UNITS)
def test_a_changed_unit_is_refused(grader, unit):
    for other in UNITS:
        same = grader.compare(f"17 {unit}", f"17 {other}")[0]
        assert same == (unit == other), (unit, other)


@pytest.mark.parametrize(
    "form",
    ["({})", r"\begin{{pmatrix}} {} \end{{pmatrix}}", r"\langle {} \rangle", "{}"],
)
def test_a_changed_order_is_refused(grader, form):
    """Lists without brackets and sets have no order; the others have."""
    between = r" \\ " if "pmatrix" in form else ", "
    gold = form.format(between.join("358"))
    for order in ("385", "538", "583", "835", "853"):
        assert grader.compare(gold, form.format(between.join(order)))[0] == (form == "{}"), order


def test_accepted_pairs_of_the_tables_refuse_a_changed_digit(grader):
    """Changes a digit of each accepted pair of the table of kinds, outside of exponents."""
    chance = random.Random(5)
    rows = []
    for gold, answer, equal in read_table(DATA / "answer_kinds.tsv"):
        plain = re.fullmatch(r"[^\\^_{}%]*\d[^\\^_{}%]*", answer)
        if (
            equal
            and plain
            and any(c.isdigit() for c in gold)
            and not answer.startswith("0.333")
            and answer[:1] not in "(C"
        ):
            rows.append((gold, change_digit(answer, chance), False))
    assert len(rows) > 25
    assert find_wrong(grader, rows) == []


# ---- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy, accepted",
    [
        ("words", ["17", "17 km", "17 apples", "17 km/h", "vitabu 17"]),
        ("listed", ["17", "17 km", "17 km/h"]),
        ("same", ["17"]),
    ],
)
def test_the_policy_says_what_may_be_left_out(policy, accepted):
    answers = ["17", "17 km", "17 apples", "17 km/h", "vitabu 17", "17 thousand", "17 xy"]
    with graders.Grader("boxed", "last_anywhere", 20.0, policy=policy) as grader:
        assert [a for a in answers if grader.compare("17", a)[0]] == accepted
        assert grader.compare("17 km", "17 kilometres")[0]
        assert not grader.compare("17 km", "17 m")[0]
    assert policy in units.POLICIES


@pytest.mark.long
def test_published_also_accepts_what_math_verify_accepts():
    pairs = [
        (r"\frac{1}{5^{50}}", r"\frac{1}{5^{51}}"), (r"\frac{V}{v}", r"\frac{v}{V}"),
        ("312_7", "312_9"), ("(5,8)", r"\{5,8\}"), ("on", "no"), ("3,5", "3.5"),
    ]  # fmt: skip
    with (
        graders.Grader("boxed", "last_anywhere", 20.0, "strict") as strict,
        graders.Grader("boxed", "last_anywhere", 20.0, "published") as published,
    ):
        for pair in pairs:
            assert not strict.compare(*pair)[0], pair
        accepted = [pair for pair in pairs if published.compare(*pair)[0]]
        assert len(accepted) >= 4, accepted
        for pair in [("17", "17 km"), ("26", "26元"), (r"x+1", "1+x")]:
            assert published.compare(*pair)[0], pair  # all that the strict grader accepts
        assert not published.compare("17", "18")[0]


def test_unknown_settings_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="kind is 'lax': the choices are strict, published"):
        graders.Grader("boxed", "last_anywhere", 1.0, "lax")
    with pytest.raises(ValueError, match="policy is 'any': the choices are words, listed, same"):
        graders.Grader("boxed", "last_anywhere", 1.0, policy="any")


# ---- the words -------------------------------------------------------------------------------


def test_entries_of_units_json():
    path = pathlib.Path(units.__file__).with_name("units.json")
    entries = json.loads(path.read_text(encoding="utf-8"))
    assert {entry["lang"] for entry in entries} == {*LANGUAGES, "und"}
    for entry in entries:
        assert entry["kind"] in ("unit", "currency", "scale", "value", "power", "join"), entry
        assert entry["words"], entry
        assert entry["checked"] is False, entry
        if entry["kind"] == "scale":
            assert int(entry["meaning"]) > 1, entry


# ---- fuzzing ---------------------------------------------------------------------------------

PIECES = [
    *"0123456789+-*/^_=<>(){}[],.;:!|%°√∞½²π$\\ \n", "\\frac", "\\sqrt", "{", "}", "\\boxed{",
    "\\begin{pmatrix}", "\\end{pmatrix}", "\\\\", "&", "\\text{", "\\left(", "\\right)", "\\pm",
    "\\cup", "\\overline{", "The answer is", "10^", "e5", "km", "KSh", "万", "৬", "টাকা", "٣", "፻",
    "elfu", "тысяч", "squared", "(A)", "x", "y", "and", "\ud800", "\0", "\u200f", "**",
]  # fmt: skip


def make_text(chance: random.Random) -> str:
    return "".join(chance.choice(PIECES) for _ in range(chance.randint(1, 14)))


def test_fuzzed_texts_end_in_an_answer_or_none():
    """Extraction, folding and plain comparison of 4,000 texts raise nothing."""
    chance = random.Random(11)
    for _ in range(4000):
        text, other = make_text(chance), make_text(chance)
        for pattern in extraction.PATTERNS:
            extraction.extract_answer("The answer is \\boxed{" + text, pattern, "last_after_think")
        comparison.compare_plainly(text, other)
        comparison.prepare_formula(text, "words")
        assert comparison.compare_plainly(text, text) is True


@pytest.mark.slow
def test_20000_fuzzed_pairs_end_in_a_status():
    """Pairs of formulas, half of them alike, go to the workers; none hangs or raises."""
    chance = random.Random(12)
    pairs = []
    for _ in range(20_000):
        text = make_text(chance)
        pairs.append((make_text(chance) if chance.random() < 0.5 else text + "+0", text))
    with (
        graders.Grader("boxed", "last_anywhere", 1.0, workers=2) as grader,
        concurrent.futures.ThreadPoolExecutor(2) as threads,
    ):
        verdicts = list(threads.map(lambda pair: grader.compare(*pair), pairs))
    assert len(verdicts) == 20_000
    assert {status for _, status in verdicts} <= set(graders.STATUSES)
    assert max(len(text) for pair in pairs for text in pair) < numerals.LONGEST
