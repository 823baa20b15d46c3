"""Gold answers inside longer texts: rows written out, and GSM8K's own format read in two ways."""

import json

import pytest

from copsd_jax.problems import gold_answers, sources


def write(tmp_path, *records):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


GSM8K = [
    {"question": "How many?", "answer": "He has 48/2 = <<48/2=24>>24.\n48+24=72 clips.\n#### 72"},
    {"question": "How much?", "answer": "It is $1,250 in all.\n#### 1,250"},
]


def test_gsm8k_is_read_alike_with_and_without_the_mark(tmp_path):
    """The fields of openai/gsm8k (data card): question, answer."""
    path = write(tmp_path, *GSM8K)
    needs = ("solution", "answer")
    plain, _ = sources.load_rows(path, ("en",), fields="problem=question", needs=needs)
    marked, _ = sources.load_rows(
        path, ("en",), fields="problem=question", needs=needs, answer="after:####"
    )
    assert plain == marked
    assert [(row.solution, row.answer) for row in marked] == [
        ("He has 48/2 = 24.\n48+24=72 clips.", "72"),
        ("It is $1,250 in all.", "1,250"),
    ]


@pytest.mark.parametrize(
    "rule, record, solution, gold",
    [
        ("after:Answer:", {"answer": "Answer: 1\nAnswer: x + 2 "}, "Answer: 1", "x + 2"),
        ("after:=", {"answer": "a = b = c", "solution": "mine"}, "mine", "c"),
        (r"pattern:is (\d+)", {"answer": "It is 7, is 8."}, "It is 7, is 8.", "7"),
        (r"pattern:(?s).*is (\d+)", {"answer": "It is 7,\nis 8."}, "It is 7,\nis 8.", "8"),
        ("boxed", {"solution": r"\boxed{1}, so \boxed{\frac{1}{2}}."}, None, r"\frac{1}{2}"),
        ("boxed", {"answer": r"\boxed{\{1\}}", "solution": "mine"}, "mine", r"\{1\}"),
    ],
)
def test_rules(tmp_path, rule, record, solution, gold):
    path = write(tmp_path, {"problem": "p"} | record)
    (row,), _ = sources.load_rows(path, ("en",), needs=("solution", "answer"), answer=rule)
    assert (row.solution, row.answer) == (solution or record["solution"], gold)


@pytest.mark.parametrize("rule", ["after:####", r"pattern:#### (.+)", "boxed", "pattern:(x)?"])
def test_a_text_in_which_a_rule_finds_nothing(tmp_path, rule):
    good = {"problem": "p", "answer": r"x \boxed{2} #### 2"}
    path = write(tmp_path, good, {"problem": "q", "answer": "#### "}, good)
    said = r"d\.jsonl, line 2: eval\.answer finds nothing in the field 'answer' .*among 3 rows"
    with pytest.raises(ValueError, match=said):
        sources.load_rows(path, ("en",), answer=rule, setting="eval.path")
    rows, dropped = sources.load_rows(path, ("en",), answer=rule, missing="drop")
    assert [row.id for row in rows] == ["row1", "row3"]
    assert dropped == {"data.answer finds nothing in the field 'answer'": 1}


@pytest.mark.parametrize(
    "rule, said",
    [
        ("####", "'####': it must be '', boxed, after:MARK or pattern:REGEX"),
        ("after:", "it must be ''"),
        ("after: ", "it must be ''"),
        ("boxed:", "it must be ''"),
        ("pattern:", "it must be ''"),
        ("pattern:(", r"not a regular expression \(missing \) at position 1\)"),
        ("pattern:a", "in parentheses, as a group"),
        ("pattern:(a{99999999999})", "not a regular expression"),
    ],
)
def test_wrong_rules_are_refused_before_the_file_is_read(tmp_path, rule, said):
    with pytest.raises(ValueError, match=rf"^data\.answer is .*{said}"):
        sources.load_rows(str(tmp_path / "gone.jsonl"), ("en",), answer=rule)


def test_a_search_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    """Without the limit, this search takes about 2**60 steps."""
    monkeypatch.setattr(gold_answers, "SEARCH_SECONDS", 0.05)
    path = write(tmp_path, {"problem": "p", "answer": "a" * 60 + "b"})
    said = r"line 1: data\.answer is 'pattern:\(a\|aa\)\+\$': the search takes more than 0\.05 s"
    with pytest.raises(ValueError, match=said):
        sources.load_rows(path, ("en",), answer="pattern:(a|aa)+$", missing="drop")
    monkeypatch.setattr(gold_answers, "SEARCH_SECONDS", 1.0)
    rule = gold_answers.parse_rule("pattern:(b)", "data.answer")
    rule.left = 0.0
    with pytest.raises(ValueError, match=r"60 s in the whole file"):
        gold_answers.extract_gold(rule, "answer", "b")
