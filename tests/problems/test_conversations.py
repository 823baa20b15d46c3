"""Conversations as problems, fields inside objects, joined fields, and data sets of the hub.

Oracles: rows written out; a hub data set against the same records in a JSONL file.
"""

import importlib.util
import json
import sys

import pytest

from copsd_jax.problems import hub_datasets, record_fields, record_files, sources

USER = {"role": "user", "content": "1+1?"}
REPLY = {"role": "assistant", "content": r"It is \boxed{2}."}
SYSTEM = {"role": "system", "content": "Be brief."}


def load(tmp_path, record, **options):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(record))
    return sources.load_rows(str(path), ("en",), **options)


@pytest.mark.parametrize(
    "turns, problem, solution",
    [
        ([USER], "1+1?", ""),
        ([USER, REPLY], "1+1?", REPLY["content"]),
        ([SYSTEM, USER, REPLY], "Be brief.\n\n1+1?", REPLY["content"]),
        ([{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}], "1+1?", "2"),
        ([{"role": "user", "content": [{"type": "text", "text": "1"},
                                       {"type": "text", "text": "+1?"}]}], "1+1?", ""),
    ],
)  # fmt: skip
def test_conversations(tmp_path, turns, problem, solution):
    (row,), _ = load(tmp_path, {"messages": turns, "answer": "2"})
    assert (row.problem, row.solution, row.answer) == (problem, solution, "2")
    mapped = "problem=chat,solution=chat"
    assert load(tmp_path, {"chat": turns, "answer": "2"}, fields=mapped)[0] == [row]
    (own,), _ = load(tmp_path, {"messages": turns, "problem": "p", "answer": "2"})
    assert (own.problem, own.solution) == ("p", "")


@pytest.mark.parametrize(
    "turns, said",
    [
        ([USER, REPLY, USER, REPLY], "has 2 user turns instead of one"),
        ([SYSTEM], "has 0 user turns instead of one"),
        ([REPLY, USER], "is not: system, user, assistant"),
        ([USER, REPLY, {"role": "tool", "content": "x"}], "is not: system, user, assistant"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has a message that is not text"),
        ([], r"problem is not text \(list\)"),
        ("text", ""),
    ],
)
def test_conversations_that_are_no_problem(tmp_path, turns, said):
    if not said:  # a text in the field `messages` is a problem like any other
        assert load(tmp_path, {"messages": turns, "answer": "2"})[0][0].problem == "text"
        return
    with pytest.raises(ValueError, match=rf"d\.jsonl, line 1: .*{said}"):
        load(tmp_path, {"messages": turns, "answer": "2"})


def test_fields_inside_objects_and_joined_fields(tmp_path):
    record = {"a": {"b": {"c": "4"}}, "q": "Q", "o": ["x", "y"], "n": 7, "a+b": "plus"}
    (row,), _ = load(tmp_path, record, fields="problem=q+o+n,answer=a.b.c,solution=a+b")
    assert (row.problem, row.answer, row.solution) == ("Q\n\nA) x\nB) y\n\n7", "4", "plus")
    letters = {"q": "Q", "o": {"A": "x", "B": "y"}, "answer": "B"}
    assert load(tmp_path, letters, fields="problem=q+o")[0][0].problem == "Q\n\nA) x\nB) y"
    with pytest.raises(ValueError, match=r"has no 'a\.b\.d'; it has a, q, o, n, a\+b$"):
        load(tmp_path, record, fields="problem=q,answer=a.b.d")
    with pytest.raises(ValueError, match=r"has no 'oo'; .*; did you mean 'o'\?$"):
        load(tmp_path, record, fields="problem=q+oo")
    with pytest.raises(ValueError, match=r"line 1: a is not text \(dict\)"):
        load(tmp_path, record, fields="problem=q+a,answer=n")
    records = [record_files.Record("line 1", record)]
    unread = record_fields.list_unread_fields(records, "problem=q+o,answer=a.b.c")
    assert unread == ("n", "a+b")


# ------------------------------------------------------------------------------------ hub data sets


@pytest.mark.parametrize(
    "path, said",
    [
        ("hf:gsm8k:test", "write hf:OWNER/NAME:SPLIT"),
        ("hf:openai/gsm8k", "write hf:OWNER/NAME:SPLIT"),
        ("hf:openai/gsm8k:", "write hf:OWNER/NAME:SPLIT"),
        ("hf:", "write hf:OWNER/NAME:SPLIT"),
        ("hf:a/b/c/d:train", "write hf:OWNER/NAME:SPLIT"),
        ("hf:./gone:train", "there is no folder './gone'"),
    ],
)
def test_wrong_names(path, said):
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^eval\.path is '{path}': {said}"):
        hub_datasets.read(path, "eval.path")


def test_the_package_datasets_is_named_if_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    said = r"^data\.path is 'hf:o/n:test': it needs the package datasets; .*copsd_jax\[datasets\]"
    with pytest.raises(ValueError, match=said):
        sources.load_rows("hf:o/n:test", ("en",))


needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the package datasets is not installed"
)


@needs_datasets
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_folder_of_the_hubs_layout(tmp_path, monkeypatch, kind):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    records = [{"question": f"{k}+1?", "answer": str(k + 1), "chat": [USER]} for k in range(5)]
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for split, rows in (("train", records[:3]), ("test", records[3:])):
        if kind == "parquet":
            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
        else:
            text = "\n".join(map(json.dumps, rows))
            (folder / f"{split}-00000-of-00001.jsonl").write_text(text)
    plain = tmp_path / "plain.jsonl"
    plain.write_text("\n".join(map(json.dumps, records[3:])))
    for fields in ("problem=question", "problem=chat"):
        expected = sources.load_rows(str(plain), ("en",), fields=fields)
        found = sources.load_rows(f"hf:{tmp_path}/set:test", ("en",), fields=fields)
        assert found == expected
    (tmp_path / "empty").mkdir()
    for path in (f"hf:{tmp_path}/set:dev", f"hf:{tmp_path}/empty:train", "hf:o/n:train"):
        said = rf"^data\.path is '{path}': datasets cannot load it \("
        with pytest.raises(ValueError, match=said) as e:
            sources.load_rows(path, ("en",))
        assert "\n" not in str(e.value)
