"""Rows of a run's files, and the languages that the settings name."""

import json

import pytest
import runs

from copsd_jax import config as config_lib
from copsd_jax.problems import languages, problem_row
from copsd_jax.teaching import problem_selection


@pytest.mark.parametrize("weights", [(), (0.5, 0.5), (1.0, 0.0)])
def test_a_language_with_a_share_needs_a_row(weights):
    config = config_lib.default()
    config.data.lang, config.data.weights = ("en", "swa"), weights
    rows = [problem_row.Row("1/en", "p", "s", "a", "en", "p")]
    registry = languages.load_languages("")
    if weights and not weights[1]:
        problem_selection.check_language_shares(config, rows, registry)
        return
    with pytest.raises(ValueError, match=r"is 'swa': this language has no row; set its data"):
        problem_selection.check_language_shares(config, rows, registry)
    # The code of a setting and that of a row may be two names of one language.
    swahili = problem_row.Row("1/sw", "p", "s", "a", "sw", "p")
    problem_selection.check_language_shares(config, [*rows, swahili], registry)


def test_fields_of_the_training_file_are_those_of_the_evaluation_file(tmp_path):
    """Without eval.fields, data.fields names the fields of both files."""
    rows = [{"q": f"{i} + 1?", "a": str(i + 1), "s": f"{i} + 1 = {i + 1}"} for i in range(2)]
    for name, row in zip(("train", "test"), rows, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    (tmp_path / "own.jsonl").write_text('{"problem": "5?", "answer": "5"}')
    own = {"data__path": tmp_path / "train.jsonl", "data__fields": "problem=q,answer=a,solution=s"}

    def load(name, **settings):
        config = runs.config("opsd", **own, eval__path=tmp_path / f"{name}.jsonl", **settings)
        registry = languages.load_languages("")
        return problem_selection.load_eval_rows(config, registry)[0]

    assert [(row.problem, row.answer) for row in load("test")] == [("1 + 1?", "2")]
    said = (
        r"^data\.fields \(eval\.fields is ''\) is 'problem=q,.* has no 'q'; it has problem, answer"
    )
    with pytest.raises(ValueError, match=said):
        load("own")
    found = load("own", eval__fields="problem=problem")
    assert [(row.problem, row.answer) for row in found] == [("5?", "5")]
