"""Records as people have them: each is read right, or refused in one sentence; values by hand."""

import datetime
import decimal
import json

import build_tfds
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from copsd_jax.problems import field_values, record_files, sources

GSM8K = "He sells 48/2 = <<48/2=24>>24 clips.\nThat is 48+24 = <<48+24=72>>72 clips.\n#### 1,072"
STEPS = "He sells 48/2 = 24 clips.\nThat is 48+24 = 72 clips."


def lines(tmp_path, *records, name="d.jsonl") -> str:
    path = tmp_path / name
    texts = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(texts), encoding="utf-8", newline="")
    return str(path)


def load(path, **options):
    return sources.load_rows(path, ("en",), **options)[0]


def refuse(path, match, error=ValueError, **options) -> str:
    with pytest.raises(error, match=match) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "more", "expected"),
    [
        ("problem=question", {}, (STEPS, "1,072")),
        ("problem=question,solution=answer", {}, (STEPS, "1,072")),
        ("problem=question", {"solution": "Own way."}, ("Own way.", "1,072")),
        ("problem=question", {"solution": None}, (STEPS, "1,072")),
        ("problem=question", {"answer": "####  7 "}, ("", "7")),
        ("problem=question", {"answer": "#### 1\r\n#### 7\r\n"}, ("#### 1", "7")),
        ("problem=question", {"answer": "####"}, ("", "####")),
        ("problem=question", {"answer": "#### 7\nDone."}, ("", "#### 7\nDone.")),
        ("problem=question", {"answer": "a ####7"}, ("", "a ####7")),
        ("problem=question", {"answer": "a\n#### 7 km \n"}, ("a", "7 km")),
        ("problem=question", {"answer": "a\n####$7"}, ("a", "$7")),
        # Headings of Markdown.
        *(
            ("problem=question", {"answer": f"a\n{line}"}, ("", f"a\n{line}"))
            for line in ("##### Conclusion 5", "#### Final answer: $5$", "#### Conclusion")
        ),
        ("problem=question", {"answer": "a <<b\nc>> d\n#### 7"}, ("a <<b\nc>> d", "7")),
    ],
)
def test_answers_of_gsm8k_are_split(tmp_path, fields, more, expected):
    path = lines(tmp_path, {"question": "How many?", "answer": GSM8K} | more)
    (row,) = load(path, fields=fields)
    assert (row.problem, row.solution, row.answer) == ("How many?", *expected)


def test_a_solution_in_gsm8ks_answer_is_enough(tmp_path):
    path = lines(tmp_path, {"problem": "How many?", "answer": GSM8K})
    assert load(path, needs=("solution", "answer"))[0].solution == STEPS
    refuse(
        lines(tmp_path, {"problem": "a", "answer": "#### 7"}),
        "solution is missing",
        needs=("solution",),
    )


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"answer": None, "Answer": "5"}, "5"),
        ({"answer": " ", "Answer": 5}, "5"),
        ('{"problem": "1+1?", "answer": NaN, "Answer": "5"}', "5"),
        ({"answer": "5", "Answer": "6"}, "5"),
        ({"answer": 2.50}, "2.5"),
        ({"answer": -0.0}, "0"),
        ({"answer": 10**40}, "1" + "0" * 40),
        ({"answer": 1e22}, "1" + "0" * 22),
        ({"answer": 1e23}, "1" + "0" * 23),
        ({"answer": 1e-7}, "1e-07"),
        ('{"problem": "1+1?", "answer": 0.12345678901234567890}', "0.12345678901234567890"),
        ('{"problem": "1+1?", "answer": 1234567890123456789.5}', "1234567890123456789.5"),
        ('{"problem": "1+1?", "answer": 1E5}', "100000"),
        ({"answer": 5, "solution": ["1+1"], "group": {"a": 1}, "problem_sw": 3}, "5"),
        ({"answer": "e\u0301"}, "\u00e9"),
    ],
)
def test_answers_that_are_read(tmp_path, record, answer):
    text = record if isinstance(record, str) else json.dumps({"problem": "1+1?"} | record)
    (row,) = load(lines(tmp_path, text))
    assert (row.problem, row.answer, row.solution) == ("1+1?", answer, "")


def test_calls_in_a_list_are_kept_as_json(tmp_path):
    calls = [{"Action": "f", "Action_Input": {"a": 1.5, "b": "é"}}]
    (row,) = load(lines(tmp_path, {"problem": "q", "answer": calls}))
    assert json.loads(row.answer) == calls


REFUSED = {
    '{"id": ["a"], "problem": "p", "answer": "2"}': r"line 1: id is not text \(list\)",
    '{"id": {"a": 1}, "problem": "p", "answer": "2"}': r"line 1: id is not text \(dict\)",
    '{"id": true, "problem": "p", "answer": "2"}': r"line 1: id is not text \(bool\)",
    '{"id": Infinity, "problem": "p", "answer": "2"}': "line 1: id is inf",
    '{"id": "\\ud800", "problem": "p", "answer": "2"}': "line 1: id contains half a character",
    '{"problem": "p", "answer": ' + "9" * 5000 + "}": "line 1: an integer has more than 4,300",
    '{"problem": "p", "answer": 1e-999999999}': "line 1: answer has more than 4,300 digits",
    '{"problem": "p", "answer": 1e-99999999999999999999}': "line 1: a number has too large an exp",
    '{"problem": "p", "answer": 1e999}': "line 1: answer is inf",
    '{"problem": "p", "answer": "2", "answer": "3"}': "line 1: the key 'answer' occurs twice",
    '{"problem": "p", "x": {"a": 1, "a": 1}}': "line 1: the key 'a' occurs twice",
    '[{"problem": "p", "answer": "2", "answer": "3"}]': r"d\.jsonl: the key 'answer' occurs twice",
    '{"problem": "p", "answer": ' + "[" * 100_000: "line 1: the JSON is nested too deeply",
    '{\n "data": [\n  {"problem": "1+1?"}\n ]\n}': "the file is one JSON object over several lines",
    '{"question": "1+1?", "answer": "2"}': (
        "the record has question, answer, and data.fields can map names: --config.data.fields=p"
    ),
    '{"a\\nb": "1+1?", "answer": "2"}': r"the record has 'a\\nb', answer,",
    '{"problem": "p", "answer": [1]}': r"line 1: answer is not text \(list\)",
    '{"problem": "p", "answer": false}': r"line 1: answer is not text \(bool\)",
    '{"problem": "p"} {"problem": "q"}': "line 1: broken JSON",
    '{"problem": "p"}\r{"problem": "q"}': "line 1: broken JSON",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:40])
def test_records_that_are_refused(tmp_path, text):
    said = refuse(lines(tmp_path, text), REFUSED[text])
    assert "d.jsonl" in said
    assert len(said) < 500


@pytest.mark.parametrize("value", [["42"], True, {"a": 1}, "\ud800"])
def test_an_answer_that_is_no_text_is_refused_even_if_none_is_needed(tmp_path, value):
    path = lines(tmp_path, json.dumps({"problem": "p", "answer": value}))
    refuse(path, "line 1: answer (is not text|contains half)", needs=())
    path = lines(tmp_path, json.dumps({"problem": "p", "answer": "", "Answer": value}))
    refuse(path, "line 1: Answer (is not text|contains half)", needs=())
    for blank in ({}, {"answer": None}, {"answer": " ", "Answer": ""}):
        assert load(lines(tmp_path, {"problem": "p"} | blank), needs=())[0].answer == ""


def test_a_named_translation_comes_before_the_problem(tmp_path):
    path = lines(tmp_path, {"problem": "Mbili?", "problem_en": "Two?", "answer": "2"})
    assert load(path)[0].problem == "Two?"
    path = lines(tmp_path, {"problem": "Two?", "problem_en": " ", "answer": "2"})
    assert load(path)[0].problem == "Two?"
    refuse(lines(tmp_path, {"problem_en": None, "answer": "2"}), "line 1: problem is missing")


@pytest.mark.parametrize(
    ("flag", "used"),
    [(True, 1), (1, 1), (1.0, 1), ("true", 1), (None, 1), ("", 1), (False, 0), (0, 0), ("yes", 0),
     ([True], 0), (2, 0)],
)  # fmt: skip
def test_quality_flags(tmp_path, flag, used):
    good = {"problem_sw": "Mbili?", "answer": "2"}
    path = lines(tmp_path, good, {"problem_sw": "Moja?", "answer": "1", "problem_sw_ok": flag})
    rows, dropped = sources.load_rows(path, ("sw",), missing="drop")
    assert len(rows) == 1 + used
    assert dropped == ({} if used else {"problem_sw_ok is not true": 1})


def test_a_header_of_a_tsv_is_refused(tmp_path):
    more = ("question\tfinal_answer", "Problem text\tAnswer", "en\tanswer", "id\tgold answer")
    for header in ("question\tanswer", "\ufeffProblem_sw\tAnswer\r", *more):
        path = lines(tmp_path, header, "1+1?\t2", name="d.tsv")
        refuse(path, r"d\.tsv, line 1: .* is a header; remove this line")
    (row,) = load(lines(tmp_path, "\ufeffQuestion 1?\t2\r", name="d.tsv"))
    assert (row.problem, row.answer) == ("Question 1?", "2")
    (row,) = load(lines(tmp_path, "Find x\ttext", name="d.tsv"))
    assert (row.problem, row.answer) == ("Find x", "text")


def test_marks_and_line_ends(tmp_path):
    path = lines(tmp_path, '\ufeff{"problem": "a", "answer": 1}\r\n\r\n{"problem": "b\\r\\n", '
                 '"answer": 2}\r\n')  # fmt: skip
    assert [(row.problem, row.answer) for row in load(path)] == [("a", "1"), ("b", "2")]


def test_field_maps_name_their_own_setting(tmp_path):
    path = lines(tmp_path, {"q": "a", "answer": "1"})
    refuse(path, r"^eval\.fields is 'problem=x'", fields="problem=x", setting="eval.path")
    refuse(path, r"^data\.fields .*'problem' occurs twice", fields="problem=q,problem=answer")
    refuse(path, r"and eval\.fields can map", setting="eval.path")


def test_a_home_that_does_not_exist_and_a_folder_are_no_files(tmp_path):
    refuse("~nobody-here/d.jsonl", "there is no such file", FileNotFoundError)
    for name in ("folder", "folder.jsonl"):
        (tmp_path / name).mkdir()
        refuse(str(tmp_path / name), "a folder must contain the files itself", OSError)
    refuse("/" + "a" * 300 + ".jsonl", "File name too long", OSError)


@pytest.mark.parametrize(
    ("options", "problem", "used"),
    [
        ({"choices": {"text": ["3", "4"], "label": ["A", "B"]}}, "Which? (A) 3 (B) 4", 1),
        ({"choices": {"text": ["3", "4"], "label": ["A", "B"]}}, "Which is even?", 0),
        ({"options": {"A": "3", "B": "4"}}, "Which is even?", 0),
        ({"options": ["3", "4"]}, "Which is even, 3 or 4?", 1),
        ({"options": None}, "Which?", 1),
        ({"options": ["one  half", "a\tb"]}, "One\nhalf, or a b?", 1),
        ({"options": [True, False]}, "True or false?", 1),
        ({"options": [True, False]}, "Is it true?", 0),
        ({"options": ["3", "4"], "problem_sw": "3 au 4?"}, "Which?", 0),
        ({"options": ["3", "4"], "solution": ["3"], "problem_sw": ["3"]}, "3 or 4?", 1),
    ],
)
def test_options_are_shown(tmp_path, options, problem, used):
    good = {"problem": "1?", "answer": "A"}
    path = lines(tmp_path, good, {"problem": problem, "answer": "B"} | options)
    rows, _ = sources.load_rows(path, ("en",), missing="drop", needs=("answer", "options"))
    assert len(rows) == 1 + used
    assert len(load(path)) == 2  # other rewards need no options


# ------------------------------------------------------------------------------- parquet and TFDS


def write_parquet(tmp_path, table, **options) -> str:
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(table, path, **options)
    return str(path)


def test_types_of_parquet(tmp_path):
    answers = {
        "1.50": pyarrow.array([decimal.Decimal("1.50")]),
        "7": pyarrow.array([7.0], pyarrow.float32()),
        "8": pyarrow.array([8], pyarrow.uint8()),
        "é": pyarrow.array(["e\u0301".encode()]),
        "b": pyarrow.array(["b"]).dictionary_encode(),
    }
    for expected, column in answers.items():
        table = pyarrow.table({"problem": ["p"], "answer": column})
        assert load(write_parquet(tmp_path, table))[0].answer == expected
    late = pyarrow.array([253402300800000], pyarrow.timestamp("ms"))  # the year 10000
    refused = {
        r"timestamp\[ms\]": late,
        "datetime": pyarrow.array([datetime.datetime(2026, 1, 1)]),
        "list": pyarrow.array([["a"]]),
        "dict": pyarrow.array([{"a": 1}]),
        "answer is not UTF-8": pyarrow.array([b"\xff"]),
        "answer is missing": pyarrow.array([None], pyarrow.string()),
    }
    for words, column in refused.items():
        path = write_parquet(tmp_path, pyarrow.table({"problem": ["p"], "answer": column}))
        refuse(path, rf"d\.parquet, row 1: answer is .*{words.removeprefix('answer is ')}")
    # A column that nothing reads may have any type.
    path = write_parquet(tmp_path, pyarrow.table({"problem": ["p"], "answer": ["1"], "x": late}))
    assert load(path)[0].answer == "1"


def test_parquet_files_that_are_refused(tmp_path):
    table = pyarrow.table({"problem": ["p"] * 99, "answer": [str(i) for i in range(99)]})
    path = write_parquet(tmp_path, table, compression="snappy")
    whole = (tmp_path / "d.parquet").read_bytes()
    for content in (b"", whole[:50], whole[:-9], whole[:40] + b"\xff" * 40 + whole[80:]):
        (tmp_path / "d.parquet").write_bytes(content)
        refuse(path, r"d\.parquet: not a parquet file that can be read")
    twice = pyarrow.Table.from_arrays([table["problem"], table["answer"]], ["problem", "problem"])
    refuse(write_parquet(tmp_path, twice), "the column 'problem' occurs twice")


def test_examples_of_tfds():
    vector = np.array([1, 2])
    example = {"problem": b"p", "answer": np.float32(0.5), "solution": b"", "x": vector}
    record = record_files.read_example(3, example)
    assert record.where == "row 3"
    assert "solution" not in record.fields
    assert field_values.convert_problem_field("answer", record.fields["answer"]) == "0.5"
    with pytest.raises(field_values.UnusableValue, match="x is not text"):
        field_values.convert_problem_field("x", vector)
    assert not field_values.is_true(vector)
    assert field_values.is_true(np.int64(1))
    assert field_values.is_blank(np.float32("nan"))


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """The folder of a small TFDS data set."""
    folder = tmp_path_factory.mktemp("tfds")
    path = folder / "d.jsonl"
    record = {"problem": "p", "problem_sw": "q", "problem_sw_ok": 1, "answer": 2, "group": None}
    path.write_text("\n".join(json.dumps(record | {"answer": k}) for k in range(5)))
    return build_tfds.build_tfds(str(path), "small", str(folder / "sets"))


def test_damaged_data_sets_are_refused(data_set, tmp_path, monkeypatch):
    import shutil

    from tensorflow_datasets.core import constants

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))

    def copied():
        shutil.rmtree(tmp_path / "small", ignore_errors=True)
        return shutil.copytree(data_set, tmp_path / "small" / "1.0.0")

    folder = copied()
    assert len(sources.load_rows("tfds:small/train", ("sw",))[0]) == 5
    (shard,) = folder.glob("*array_record*")
    whole = shard.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\0" * len(whole)):
        shard.write_bytes(content)
        refuse("tfds:small/train", "^data.path is 'tfds:small/train': .*cannot be read")
    shard.unlink()
    refuse("tfds:small/train", "cannot be read")
    foreign = '{"pythonClassName": "a.b.C", "featuresDict": {"features": {}}}'
    for name in ("features.json", "dataset_info.json"):
        for content in ("", "{", "[]", '{"a": 1}', foreign):
            file = copied() / name
            file.write_text(content)
            refuse("tfds:small/train", "cannot be read|no split|no prepared|reading the format")
    copied()
    for name in ("small:1.0/train", "small:latest/train", "small:x/train", "small:1.*.*/train"):
        refuse(f"tfds:{name}", "no prepared version", FileNotFoundError)
    for split in ("train[", "train[:x]", "train[:200%]"):
        refuse(f"tfds:small/{split}", "cannot be read")
    (tmp_path / "file").write_text("")
    refuse("tfds:file/train", "no prepared version", FileNotFoundError)


def test_names_of_new_data_sets(tmp_path, capsys):
    path = lines(tmp_path, {"problem": "p", "answer": "1"})
    for wrong, words in (
        (["My-Set", str(tmp_path)], "NAME is 'My-Set'"),
        (["small", str(tmp_path), "--version=1"], "--version is '1'"),
        (["small", str(tmp_path), "--split=a/b"], "--split is 'a/b'"),
        (["small", str(tmp_path), "--fields=problem=x"], "has no 'x'"),
    ):
        assert build_tfds.main([path, *wrong]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert words in said
    assert build_tfds.main([lines(tmp_path, {"q": "p"}), "small", str(tmp_path)]) == 2
    assert "no record has a field of problems" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["d.jsonl"]
