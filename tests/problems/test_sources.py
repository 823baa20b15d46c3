"""Rows: files written here and read back; the order against Grain's own iterator and counting."""

import collections
import itertools
import json
import sys

import build_tfds
import hypothesis
import pyarrow
import pyarrow.parquet
import pytest
import runs
from hypothesis import strategies as st

from copsd_jax.problems import batches, bundled, problem_row, sources

RECORDS = [
    {
        "id": f"r{i}",
        "problem": f"What is {i} + {i}?",
        "solution": f"{i} + {i} = {2 * i}",
        "Answer": 2 * i,
        "problem_sw": f"{i} + {i} ni ngapi?",
        "problem_yor": f"Kí ni {i} + {i}? ẹ̀kọ́",
        "problem_amh": f"{i} + {i} ስንት ነው?",
        "problem_sw_ok": True,
    }
    for i in range(5)
]


def write(path, records, kind):
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), "utf-8")
    elif kind == "json":
        path.write_text(json.dumps(records, indent=1), "utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return str(path)


def changed(k, **fields):
    """The records with fields of the k-th replaced; None removes."""
    out = [dict(record) for record in RECORDS]
    for name, value in fields.items():
        out[k].pop(name, None)
        if value is not None:
            out[k][name] = value
    return out


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("lang", ["sw", "yor", "amh", "en"])
def test_formats_give_the_same_rows(tmp_path, kind, lang):
    path = write(tmp_path / f"d.{kind}", RECORDS, kind)
    rows, dropped = sources.load_rows(path, (lang,), needs=("solution", "answer", "problem_en"))
    source = "problem" if lang == "en" else f"problem_{lang}"
    expected = [(r["id"], r[source], r["solution"], str(r["Answer"])) for r in RECORDS]
    assert [(r.id, r.problem, r.solution, r.answer) for r in rows] == expected
    assert [r.problem_en for r in rows] == [r["problem"] for r in RECORDS]
    assert {r.lang.lower() for r in rows} == {lang}
    assert not dropped


def test_several_languages_have_ids_of_their_own(tmp_path):
    path = write(tmp_path / "d.jsonl", RECORDS, "jsonl")
    rows, _ = sources.load_rows(path, ("sw", "en"))
    assert len({row.id for row in rows}) == 10
    assert [row.id for row in rows if row.lang == "en"] == [f"r{i}/en" for i in range(5)]


@pytest.mark.parametrize("code", ["swa", "SWA", "SW"])
def test_bug_26_sw_and_swa_are_one_language(tmp_path, code):
    records = [{"problem": "Two?", "problem_swa": "Mbili?", "answer": "2"}]
    path = write(tmp_path / "d.jsonl", records, "jsonl")
    (row,), _ = sources.load_rows(path, (code,))
    (same,), _ = sources.load_rows(path, ("sw",))
    assert row.problem == "Mbili?"
    assert row == same
    with pytest.raises(ValueError, match=r"^data\.lang is 'sw, swa': .*none twice"):
        sources.load_rows(path, ("sw", "swa"))
    with pytest.raises(ValueError, match=r"^eval\.lang is 'sw, swa': .*none twice"):
        sources.load_rows(path, ("sw", "swa"), setting="eval.path")


def test_bug_20_missing_translation_is_never_the_english_problem(tmp_path):
    records = changed(2, problem_sw=None)
    path = write(tmp_path / "d.jsonl", records, "jsonl")
    said = r"d\.jsonl, line 3: problem_sw is missing.*among 5 rows.*: 1"
    with pytest.raises(ValueError, match=said):
        sources.load_rows(path, ("sw",))
    rows, dropped = sources.load_rows(path, ("sw",), missing="drop")
    assert [row.id for row in rows] == ["r0", "r1", "r3", "r4"]
    assert dropped == {"problem_sw is missing": 1}
    assert not {row.problem for row in rows} & {r["problem"] for r in RECORDS}


def test_bug_20_unknown_language_is_refused(tmp_path):
    path = write(tmp_path / "d.jsonl", RECORDS, "jsonl")
    with pytest.raises(ValueError, match="tlh"):
        sources.load_rows(path, ("tlh",))


def test_bug_21_any_language_of_the_registry_is_read_alike(tmp_path):
    records = [{"problem": "Two?", f"problem_{c}": f"2 {c}", "answer": "2"} for c in ("vai", "ja")]
    path = write(tmp_path / "d.jsonl", records, "jsonl")
    for code in ("vai", "ja"):
        rows, dropped = sources.load_rows(path, (code,), missing="drop")
        assert [row.problem for row in rows] == [f"2 {code}"]
        assert dropped == {f"problem_{code} is missing": 1}


@pytest.mark.parametrize(
    "fields, needs, reason",
    [
        ({"problem_sw": "  "}, (), "problem_sw is empty"),
        ({"problem_sw_ok": False}, (), "problem_sw_ok is not true"),
        ({"problem_sw_ok": "yes"}, (), "problem_sw_ok is not true"),
        ({"problem_sw": ["a"]}, (), r"problem_sw is not text (list)"),
        ({"solution": ""}, ("solution",), "solution is empty"),
        ({"Answer": None}, ("answer",), "answer is missing"),
        ({"problem": None}, ("problem_en",), "problem is missing"),
        ({"Answer": float("nan")}, ("answer",), "Answer is missing"),
    ],
)
def test_each_reason_is_named_and_counted(tmp_path, fields, needs, reason):
    path = write(tmp_path / "d.jsonl", changed(1, **fields), "jsonl")
    rows, dropped = sources.load_rows(path, ("sw",), needs=needs, missing="drop")
    assert dropped == {reason: 1}
    assert len(rows) == 4
    with pytest.raises(ValueError, match="line 2"):
        sources.load_rows(path, ("sw",), needs=needs)


def test_what_is_not_needed_may_be_absent(tmp_path):
    records = [{"problem": "Two?", "answer": 2.0}]
    (row,), _ = sources.load_rows(write(tmp_path / "d.json", records, "json"), ("en",))
    assert (row.solution, row.answer, row.id) == ("", "2", "row1")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"problem": "a", "answer": "1"}\n{"problem": }\n', "line 2: broken JSON"),
        ('[{"problem": "a"},\n\n {"problem": "b",}]', "line 3: broken JSON"),
        ('{"problem": "a", "answer": "1"}\n17\n', "line 2: expected a JSON object"),
        ("", "has no rows"),
        ('{"id": "x", "problem": "a"}\n{"id": "x", "problem": "b"}\n', "'x' is in line 1 and"),
    ],
)
def test_broken_files_are_refused_with_the_line(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.json.*{message}"):
        sources.load_rows(str(path), ("en",), needs=())


def test_other_bad_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"eval\.path is .*gone.jsonl.*no such file"):
        sources.load_rows(str(tmp_path / "gone.jsonl"), ("en",), setting="eval.path")
    with pytest.raises(ValueError, match=r"bundled:exemplars"):
        sources.load_rows("bundled:trian", ("en",))
    with pytest.raises(ValueError, match="must end in"):
        sources.load_rows("x.xlsx", ("en",))
    (tmp_path / "l.jsonl").write_bytes(b'{"a": 1}\n{"problem": "\xff"}')
    with pytest.raises(ValueError, match=r"line 2: .*UTF-8"):
        sources.load_rows(str(tmp_path / "l.jsonl"), ("en",))
    (tmp_path / "p.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="not a parquet file"):
        sources.load_rows(str(tmp_path / "p.parquet"), ("en",))


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"problem": "a\u2028b", "answer": "1"}\r\n\r\n{"problem": "c", "answer": 2}\n')
    rows, _ = sources.load_rows(str(path), ("en",))
    assert [row.problem for row in rows] == ["a\u2028b", "c"]


def test_field_map(tmp_path):
    records = [{"question": "Two?", "m_query": "Mbili?", "final": 2, "idx": 9}]
    path = write(tmp_path / "d.jsonl", records, "jsonl")
    fields = "problem=question,problem_sw=m_query,answer=final,id=idx"
    (row,), _ = sources.load_rows(path, ("sw",), fields=fields)
    assert (row.id, row.problem, row.problem_en, row.answer) == ("9", "Mbili?", "Two?", "2")
    with pytest.raises(ValueError, match=r"data\.fields.*no 'frage'; it has question"):
        sources.load_rows(path, ("en",), fields="problem=frage")
    with pytest.raises(ValueError, match="'probelm' is none of"):
        sources.load_rows(path, ("en",), fields="probelm=question")
    with pytest.raises(ValueError, match="pairs such as problem=question"):
        sources.load_rows(path, ("en",), fields="problem:question")


def test_tsv_has_one_language_and_no_solution(tmp_path):
    path = tmp_path / "mgsm.tsv"
    path.write_text("Mbili na mbili?\t4\nTatu?\t1,000\n")
    rows, _ = sources.load_rows(str(path), ("sw",))
    assert [(r.problem, r.answer, r.problem_en) for r in rows] == [
        ("Mbili na mbili?", "4", ""),
        ("Tatu?", "1,000", ""),
    ]
    with pytest.raises(ValueError, match="problem is missing"):
        sources.load_rows(str(path), ("sw",), needs=("problem_en",))
    with pytest.raises(ValueError, match="one language"):
        sources.load_rows(str(path), ("sw", "en"))
    path.write_text("a\t1\nb\n")
    with pytest.raises(ValueError, match=r"line 2: .* found 1 cells"):
        sources.load_rows(str(path), ("sw",))


@pytest.mark.parametrize("name", bundled.NAMES)
def test_bundled_problems_have_every_field_in_every_language(name):
    needs = ("solution", "answer", "problem_en", "group")
    rows, dropped = sources.load_rows(f"bundled:{name}", ("en", "sw", "fr", "es"), needs=needs)
    counts = collections.Counter(row.lang for row in rows)
    assert len(set(counts.values())) == 1
    assert len(counts) == 4
    assert not dropped
    assert len(sources.load_rows(f"bundled:{name}", ("en", "sw"), limit=3)[0]) == 6


def test_fingerprint_tells_rows_and_order_apart():
    rows, _ = sources.load_rows("bundled:exemplars", ("en",))
    prints = {problem_row.compute_fingerprint(r) for r in (rows, rows[::-1], rows[1:], list(rows))}
    assert len(prints) == 3


def test_tfds_round_trip_without_tensorflow(tmp_path, monkeypatch):
    from tensorflow_datasets.core import constants

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    records = [*changed(3, problem_sw_ok=None, problem_yor=None), {"problem": "x", "extra": [1]}]
    path = write(tmp_path / "d.jsonl", records, "jsonl")
    folder = build_tfds.build_tfds(path, "my_math", str(tmp_path / "tfds"))
    assert folder.name == "1.0.0"
    for source in ("tfds:my_math/train", "tfds:my_math:1.0.0/train"):
        for lang in ("sw", "yor", "amh"):
            kwargs = {"missing": "drop", "needs": ("solution", "answer")}
            expected = sources.load_rows(path, (lang,), **kwargs)
            assert sources.load_rows(source, (lang,), **kwargs) == expected
    with pytest.raises(ValueError, match="no split 'test'; the choices are train"):
        sources.load_rows("tfds:my_math/test", ("sw",))
    with pytest.raises(FileNotFoundError, match=r"2\.0\.0"):
        sources.load_rows("tfds:my_math:2.0.0/train", ("sw",))
    with pytest.raises(FileExistsError, match="another version"):
        build_tfds.build_tfds(path, "my_math", str(tmp_path / "tfds"))
    build_tfds.build_tfds(path, "my_math", str(tmp_path / "tfds"), version="10.0.0")
    with pytest.raises(ValueError, match=r"write tfds:NAME/SPLIT"):
        sources.load_rows("tfds:my_math", ("sw",))
    # A folder without the data set's description is no version: a copy that was cut short.
    (tmp_path / "tfds" / "my_math" / "11.0.0").mkdir()
    assert sources.load_rows("tfds:my_math/train", ("sw",), **kwargs)
    with pytest.raises(FileNotFoundError, match=r"11\.0\.0 in .*: it has 1\.0\.0, 10\.0\.0$"):
        sources.load_rows("tfds:my_math:11.0.0/train", ("sw",), **kwargs)
    assert "tensorflow" not in sys.modules


def make_rows(counts):
    return [
        problem_row.Row(f"{i}/{lang}", "p", "s", "a", lang, "p")
        for lang, n in counts.items()
        for i in range(n)
    ]


def test_step_k_from_scratch_is_the_kth_of_a_running_iterator():
    rows, langs, weights = make_rows({"en": 7, "sw": 5}), ("en", "sw"), (0.75, 0.25)
    running = iter(
        batches.build_row_order(rows, langs, weights, 3).to_iter_dataset()
    )  # Grain's own
    ours = batches.iterate_batches(rows, langs, weights, 4, 3)
    for step in range(5):
        expected = list(itertools.islice(running, 4))
        assert runs.batch_at(rows, langs, weights, 4, 3, step) == expected
        assert next(ours) == expected
    assert next(batches.iterate_batches(rows, langs, weights, 4, 3, step=5)) == next(ours)


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(n=st.integers(1, 12), batch=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_every_row_once_per_epoch(n, batch, seed):
    rows = make_rows({"en": n})
    stream = itertools.chain.from_iterable(batches.iterate_batches(rows, ("en",), (), batch, seed))
    for _ in range(3):
        epoch = list(itertools.islice(stream, n))
        assert sorted(epoch, key=lambda r: r.id) == sorted(rows, key=lambda r: r.id)


def test_epochs_and_seeds_have_different_orders():
    rows = make_rows({"en": 50})
    first, second = (runs.batch_at(rows, ("en",), (), 50, 0, epoch) for epoch in (0, 1))
    assert first != second
    assert first != rows
    assert first != runs.batch_at(rows, ("en",), (), 50, 1, 0)


@pytest.mark.parametrize("weights", [(1, 3), (0.2, 0.6), (0, 2.0), ()])
def test_weights_hold(weights):
    rows = make_rows({"en": 10, "sw": 10})
    picked = runs.batch_at(rows, ("en", "sw"), weights, 40, 0, 5)
    share = (weights or (1, 1))[1] / sum(weights or (1, 1))
    assert abs(sum(row.lang == "sw" for row in picked) - 40 * share) <= 1


def test_parallel_languages_are_not_in_step():
    rows = make_rows({"en": 40, "sw": 40})
    picked = runs.batch_at(rows, ("en", "sw"), (), 40, 0, 0)
    english, swahili = ([r.id.split("/")[0] for r in picked if r.lang == c] for c in ("en", "sw"))
    assert english != swahili


@pytest.mark.parametrize(
    "record, lang, fields, advice",
    [
        ({"question": "1+1?", "answer": "2"}, "en", "", "--config.data.fields=problem=question"),
        ({"Query": "1+1?", "answer": "2"}, "en", "", "--config.data.fields=problem=Query"),
        ({"probelm": "1+1?", "answer": "2"}, "en", "", "--config.data.fields=problem=probelm"),
        ({"problem": "1+1?", "final": "2"}, "en", "", "--config.data.fields=answer=final"),
        ({"question": "1+1?", "gold": "2"}, "en", "problem=question",
         "--config.data.fields=problem=question,answer=gold"),
        ({"problem": "1+1?", "question_sw": "1+1 ni?", "answer": "2"}, "sw", "",
         "--config.data.fields=problem_sw=question_sw"),
        ({"problem": "1+1?", "problem_fr": "1+1 ?", "answer": "2"}, "sw", "", "can map names)"),
        ({"problem": "1+1?", "zzz": "2"}, "en", "", "can map names)"),
    ],
)  # fmt: skip
def test_a_missing_field_is_looked_for_under_other_names(tmp_path, record, lang, fields, advice):
    """The advice, once followed, loads the row; where no field fits, there is no advice."""
    path = write(tmp_path / "d.jsonl", [record], "jsonl")
    with pytest.raises(ValueError, match="is missing") as caught:
        sources.load_rows(path, (lang,), fields=fields)
    assert str(caught.value).rstrip(")").endswith(advice.rstrip(")"))
    if "=" in advice:
        followed = advice.removeprefix("--config.data.fields=")
        (row,), _ = sources.load_rows(path, (lang,), fields=followed)
        assert "1+1" in row.problem
        assert row.answer == "2"
