"""The bundled problems: reproducible, parallel, right, and disjoint."""

import collections
import json
import re
import subprocess
import sys
import unicodedata

import conftest
import generate_problems as generate
import pytest

from copsd_jax.problems import bundled

LANG_FIELDS = ("problem", "problem_sw", "problem_fr", "problem_es")
FIELDS = {
    *("id", "problem", "solution", "answer", "problem_sw", "problem_fr", "problem_es"),
    *("wording", "steps", "kind", "template", "numbers"),
}


def read(name: str) -> list[dict]:
    lines = bundled.find_file(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def sets() -> dict[str, list[dict]]:
    return {name: read(name) for name in bundled.NAMES}


def everything(sets) -> list[dict]:
    return [row for rows in sets.values() for row in rows]


def plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def test_command_writes_the_committed_bytes(tmp_path):
    command = [
        sys.executable,
        conftest.ROOT / "tools" / "generate_problems.py",
        "--out",
        tmp_path / "out",
    ]
    subprocess.run(command, check=True, timeout=60)
    for name in bundled.NAMES:
        written = (tmp_path / "out" / f"{name}.jsonl").read_bytes()
        assert written == bundled.find_file(name).read_bytes(), name


def test_another_seed_gives_other_problems(sets):
    other = generate.generate(generate.SEED + 1)
    assert [row["problem"] for row in other["train"]] != [r["problem"] for r in sets["train"]]


def test_sizes(sets):
    assert len(sets["train"]) >= 480
    wordings = collections.Counter(row["wording"] for row in sets["held_out"])
    assert wordings == {"seen": 200, "unseen": 100}
    assert {row["wording"] for row in sets["train"] + sets["exemplars"]} == {"seen"}
    assert len(sets["exemplars"]) == 8
    first = [row["kind"] for row in sets["exemplars"][:4]]
    assert first == ["add", "subtract", "multiply", "divide"]
    for name in ("train", "held_out"):
        two = sum(row["steps"] == 2 for row in sets[name])
        assert 0.2 <= two / len(sets[name]) <= 0.3


def test_any_prefix_is_balanced(sets):
    """A run limited to the first n rows sees both wordings and every operation."""
    part = sets["held_out"][:60]
    assert collections.Counter(row["wording"] for row in part) == {"seen": 40, "unseen": 20}
    kinds = collections.Counter(row["kind"] for row in part if row["steps"] == 1)
    assert set(kinds) == {"add", "subtract", "multiply", "divide"}
    assert max(kinds.values()) - min(kinds.values()) <= 2


def test_wordings_are_varied(sets):
    templates = collections.defaultdict(set)
    for row in sets["train"]:
        templates["two" if row["steps"] == 2 else row["kind"]].add(row["template"])
    assert all(len(names) >= 8 for names in templates.values()), templates
    seen = {row["template"] for row in sets["train"]}
    held = collections.defaultdict(set)
    for row in sets["held_out"]:
        held[row["wording"]].add(row["template"])
    assert held["seen"] <= seen
    assert not held["unseen"] & seen


def test_no_problem_is_shared(sets):
    rows = everything(sets)
    assert len({row["id"] for row in rows}) == len(rows)
    for field in LANG_FIELDS:
        counts = collections.Counter(plain(row[field]) for row in rows)
        assert counts.most_common(1)[0][1] == 1
    tuples = collections.Counter((row["template"], tuple(sorted(row["numbers"]))) for row in rows)
    assert tuples.most_common(1)[0][1] == 1


def test_rows_are_complete_and_tidy(sets):
    for row in everything(sets):
        assert set(row) == FIELDS
        for field in (*LANG_FIELDS, "solution", "answer"):
            text = row[field]
            assert text, row["id"]
            assert text == unicodedata.normalize("NFC", text) == " ".join(text.split())
            assert not set(text) & set("{}\n")


def test_the_same_numerals_in_every_language(sets):
    for row in everything(sets):
        for field in LANG_FIELDS:
            found = [int(n) for n in re.findall(r"\d+", row[field])]
            assert sorted(found) == sorted(row["numbers"]), (row["id"], field)
        orders = {tuple(re.findall(r"\d+", row[field])) for field in LANG_FIELDS}
        assert len(orders) == 1, row["id"]


def test_solutions_compute_the_answer(sets):
    """Every equation of a solution holds, the last one gives the answer, it is one short line."""
    equation = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
    for row in everything(sets):
        found = equation.findall(row["solution"])
        assert len(found) == row["steps"], row["id"]
        for left, sign, right, result in found:
            a, b, c = int(left), int(right), int(result)
            assert {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": a == c * b}[sign]
        assert found[-1][3] == row["answer"] == str(int(row["answer"]))
        assert 0 <= int(row["answer"]) <= 100
        assert row["solution"] == " and ".join(" ".join((*e[:3], "=", e[3])) for e in found) + "."
        used = {int(n) for triple in found for n in (triple[0], triple[2])}
        assert set(row["numbers"]) <= used, row["id"]
        # Words, signs and single digits: SmolLM2 splits numbers digit by digit.
        pieces = re.findall(r"\d|[^\W\d]+|[^\w\s]", row["solution"])
        assert len(pieces) <= 20, row["solution"]


def test_french_elides_and_agrees(sets):
    for row in everything(sets):
        text = row["problem_fr"]
        assert not re.search(r"\b(?:de|le|la|que|je|ne) [aeiouhéèêœ]", text, re.IGNORECASE), text
        assert re.search(r" \?$", text), text


def test_spanish_question_agrees(sets):
    feminine = {spanish: female for *_, spanish, female in generate.OBJECTS}
    for row in everything(sets):
        text = row["problem_es"]
        assert text.count("¿") == text.count("?") == 1
        asked = re.search(r"¿(Cuánt[oa]s) (\w+)", text)
        if asked and asked[2] in feminine:
            assert (asked[1] == "Cuántas") == feminine[asked[2]], text


def test_swahili_noun_classes(sets):
    """ "How many" takes the prefix of the noun's class, seen from the noun's own prefix."""
    expected = {"vi": "vingapi", "ma": "mangapi", "mi": "mingapi"}
    irregular = {"mayai": "mangapi", "kalamu": "ngapi", "watoto": "wangapi"}
    for row in everything(sets):
        for noun, asked in re.findall(r"(\w+) (\w*ngapi)\b", row["problem_sw"]):
            by_prefix = expected.get(noun[:2], "ngapi")
            assert asked == irregular.get(noun, by_prefix), (noun, asked)


def test_nothing_stands_in_the_singular(sets):
    for row in everything(sets):
        assert all(n >= 2 for n in row["numbers"]), row["id"]


@pytest.mark.parametrize("kind", ["add", "subtract", "multiply", "divide", "add_divide"])
def test_numbers_fit_the_kind(kind):
    for i in range(200):
        values = generate.numbers(kind, generate.Draw(f"test/{i}"))
        if not values:
            assert kind == "add_divide"
            continue
        answer, _ = generate.solve(kind, values)
        if kind == "divide":
            assert answer * values[1] == values[0]
        if kind == "add_divide":
            assert answer * values[2] == values[0] + values[1]
        assert 1 <= answer <= 60
