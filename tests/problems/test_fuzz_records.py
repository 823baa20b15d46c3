"""Random records and language files; the oracle of accepted rows reads the values apart."""

import decimal
import json
import pathlib
import random
from typing import Any

import fuzz
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from copsd_jax.problems import languages, record_files, sources

REGISTRY = languages.load_languages()
NAMES = (
    *("problem", "solution", "answer", "Answer", "problem_sw", "problem_swa", "problem_sw_ok"),
    *("id", "group", "extra", "problem_en", "choices", "question"),
)
SHIPPED = json.loads(languages.BUILT_IN.read_text(encoding="utf-8"))


def make_record(r: random.Random) -> dict[str, Any]:
    names = [name for name in NAMES if r.random() < 0.45]
    record = {name: fuzz.make_value(r) for name in names}
    if r.random() < 0.7:  # a good record, so that something is accepted
        record |= {"problem": "Q" + fuzz.make_text(r), "answer": "5" + fuzz.make_text(r, 2)}
    return record


def make_options(r: random.Random) -> tuple[tuple[str, ...], dict[str, Any]]:
    langs = r.choice((("en",), ("sw",), ("en", "sw")))
    needs = tuple(n for n in ("answer", "solution", "problem_en", "options") if r.random() < 0.4)
    options = {"missing": r.choice(("error", "drop")), "needs": needs, "registry": REGISTRY}
    return langs, options


def expected_text(value: Any) -> str | None:
    """The text of a value, or None if it is no text and no finite number."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    if isinstance(value, str):
        return fuzz.spell(value) or None
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        return None
    return str(value) if np.isfinite(float(value)) else None


def same_text(kept: str, value: Any) -> bool:
    if isinstance(value, str | bytes):
        return kept == expected_text(value)
    return decimal.Decimal(kept) == decimal.Decimal(expected_text(value) or "NaN")


def check_rows(rows, records) -> None:
    """Each row has the values of its record; `records` has the position of each record."""
    for row in rows:
        record, codes = records[row.id.split("/")[0]], (row.lang, *REGISTRY[row.lang].aliases)
        names = [*(f"problem_{code}" for code in codes), *(["problem"] if row.lang == "en" else [])]
        values = [v for name in names if expected_text(v := record.get(name)) is not None]
        assert same_text(row.problem, values[0]), (row, record)
        given = [record.get(name) for name in ("answer", "Answer")]
        answers = [v for v in given if expected_text(v) is not None]
        text = (expected_text(answers[0]) or "") if answers else ""
        *_, last = text.split("\n")
        marked = last[4:].strip() if last.startswith("####") else ""
        digits = any(char.isdecimal() for char in marked)
        if digits and len(marked.split()) <= 2 and not marked.startswith("#"):
            assert row.answer == marked
            assert not row.solution or "<<6*7=42>>" not in row.solution or record.get("solution")
        elif row.answer:
            assert same_text(row.answer, answers[0])
            if row.solution:
                assert same_text(row.solution, record["solution"])


@fuzz.sizes(300)
def test_jsonl(cases, tmp_path):
    r, accepted = random.Random(16), 0
    for _ in range(cases):
        records = [make_record(r) for _ in range(r.randrange(1, 4))]
        lines = [json.dumps(record, ensure_ascii=r.random() < 0.5) for record in records]
        raw = r.choice(("\n", "\r\n", "\n\n")).join(lines).encode("utf-8", "surrogatepass")
        listed = r.random() < 0.2
        raw = b"[" + b",\n".join(line.encode() for line in lines) + b"]" if listed else raw
        damaged = r.random() < 0.4
        path = tmp_path / "d.jsonl"
        path.write_bytes(fuzz.damage(r, raw) if damaged else raw)
        langs, options = make_options(r)
        found = fuzz.attempt(
            lambda p=path, x=langs, o=options: sources.load_rows(str(p), x, **o), "d.jsonl"
        )
        if found and not damaged:
            ids = {str(i.get("id") or ""): i for i in records}
            known = {f"row{k}": i for k, i in enumerate(records, 1)} | {
                fuzz.spell(key): i for key, i in ids.items()
            }
            rows = [row for row in found[0] if row.id.split("/")[0] in known]
            check_rows([row for row in rows if row.id.count("/") < 2], known)
            accepted += bool(rows)
    assert accepted > cases / 8


def make_column(r: random.Random, rows: int) -> pyarrow.Array:
    match r.randrange(8):
        case 0:
            return pyarrow.array([r.choice((1, 2, None)) for _ in range(rows)])
        case 1:
            return pyarrow.array([r.choice((1.5, 2.0, None, float("nan"))) for _ in range(rows)])
        case 2:
            return pyarrow.array([r.choice((True, False, None)) for _ in range(rows)])
        case 3:
            return pyarrow.array([decimal.Decimal("1.50")] * rows)
        case 4:
            return pyarrow.array([r.choice((["a"], None, [])) for _ in range(rows)])
        case 5:
            times = [r.choice((0, 253402300800000, 10**14)) for _ in range(rows)]
            return pyarrow.array(times, pyarrow.timestamp(r.choice(("ms", "us", "ns"))))
        case 6:
            return pyarrow.array([{"a": 1, "text": ["x"]}] * rows)
        case _:
            return pyarrow.array([r.randbytes(r.randrange(4)) for _ in range(rows)])


@fuzz.sizes(200)
def test_parquet(cases, tmp_path):
    r, accepted = random.Random(16), 0
    path = tmp_path / "d.parquet"
    for _ in range(cases):
        rows = r.randrange(1, 4)
        columns = {name: make_column(r, rows) for name in NAMES[1:] if r.random() < 0.3}
        columns.pop("problem_en", None)  # it would come before the problem
        texts = ["Q" + fuzz.make_text(r) for _ in range(rows)]
        columns |= {"problem": pyarrow.array(texts), "id": pyarrow.array(map(str, range(rows)))}
        codec = r.choice(("snappy", "gzip", "zstd", "none"))
        pyarrow.parquet.write_table(pyarrow.table(columns), path, compression=codec)
        damaged = r.random() < 0.5
        if damaged:
            path.write_bytes(fuzz.damage(r, path.read_bytes()))
        langs, options = make_options(r)
        found = fuzz.attempt(
            lambda x=langs, o=options: sources.load_rows(str(path), x, **o), "d.parquet"
        )
        if found and not damaged:
            english = [row for row in found[0] if row.lang == "en"]
            for row in english:
                assert row.problem == fuzz.spell(texts[int(row.id.split("/")[0])])
            accepted += bool(english)
    assert accepted > cases / 40


def make_feature(r: random.Random) -> Any:
    values: tuple[Any, ...] = (
        fuzz.make_text(r).encode("utf-8", "surrogatepass"), b"true", b"false", r.randbytes(3), b"",
        np.int64(r.randrange(99)), np.uint8(7), np.float32(0.5), np.float32("nan"), np.float64(2.0),
        np.bool_(True), np.bool_(False), np.array([1, 2]), np.array([b"a"], object), np.array(5),
        {"text": [b"a"]}, [b"a"], None, np.float16("inf"), np.array([], np.float32),
    )  # fmt: skip
    return r.choice(values)


@fuzz.sizes(300)
def test_rows_of_tfds(cases, monkeypatch):
    r, accepted = random.Random(16), 0
    for _ in range(cases):
        examples = [
            {name: make_feature(r) for name in NAMES if r.random() < 0.5}
            | ({"problem": b"Q" + fuzz.make_text(r).encode(), "id": str(k).encode()})
            for k in range(r.randrange(1, 4))
        ]
        records = [record_files.read_example(k, x) for k, x in enumerate(examples, 1)]
        monkeypatch.setattr(record_files, "read_records", lambda *_, found=records, **__: found)
        langs, options = make_options(r)
        found = fuzz.attempt(
            lambda x=langs, o=options: sources.load_rows("tfds:a/train", x, **o), "tfds:a/train"
        )
        if found:
            check_rows(found[0], {str(k): example for k, example in enumerate(examples)})
            accepted += 1
    assert accepted > cases / 8


@fuzz.sizes(150)
def test_language_files(cases, tmp_path):
    r, accepted = random.Random(16), 0
    path = pathlib.Path(tmp_path / "mine.json")
    for _ in range(cases):
        entry: dict[str, Any] = SHIPPED["de"] | {"aliases": []}
        for name in r.sample(languages.FIELDS, r.randrange(3)):
            entry[name] = fuzz.make_value(r)
        if r.random() < 0.1:
            del entry[r.choice(list(entry))]
        code = r.choice(("nya", "nya", "nya", "fr", "swa", fuzz.make_text(r, 1)))
        raw = json.dumps({code: entry}, ensure_ascii=r.random() < 0.5).encode()
        damaged = r.random() < 0.3
        path.write_bytes(fuzz.damage(r, raw) if damaged else raw)
        found = fuzz.attempt(lambda: languages.load_languages(str(path)), "mine.json")
        if found and not damaged:
            for name in languages.FIELDS:
                kept = getattr(found[code], name)
                assert (list(kept) if name == "aliases" else kept) == entry[name]
            accepted += 1
    assert accepted > cases / 20


@pytest.mark.parametrize("depth", [10, 200, 900, 990, 995, 5000])
def test_nested_values_are_refused(tmp_path, depth):
    """Python's limit on nesting is reached while reading, or while a message is written."""
    nested = "[" * depth + "]" * depth
    files = {
        "mine.json": json.dumps({"nya": SHIPPED["de"] | {"name": 0}}).replace(
            "0,", nested + ",", 1
        ),
        "d.jsonl": f'{{"problem": "p", "answer": {nested}, "choices": {nested}}}',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        read = languages.load_languages if name == "mine.json" else None
        found = fuzz.attempt(
            lambda p=str(tmp_path / name), f=read: (
                f(p) if f else sources.load_rows(p, ("en",), needs=("answer", "options"))
            ),
            name,
        )
        assert found is None
