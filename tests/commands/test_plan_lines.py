"""What the plan says about data that may not be what the user wants."""

import json
import pathlib
import shutil

import pytest
import runs

from copsd_jax import evaluate, summary, train
from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import workdir
from copsd_jax.training import run_plan
from copsd_jax.weights import hub, tokenizer


@pytest.fixture
def rows(tmp_path) -> pathlib.Path:
    records = [
        {"problem": f"What is {k} + 1?", "solution": f"{k} + 1 = {k + 1}", "answer": str(k + 1)}
        for k in range(5)
    ]
    records[3]["answer"] = "It is four.\nNo, it is five."
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def lines_of(card: str = "opsd", **settings) -> list[str]:
    plan = run_plan.make_plan(runs.config(card, **settings))
    return summary.summarize_plan(plan, pathlib.Path("w"), False).split("\n")


def test_lines_about_data(rows):
    lines = lines_of(data__path=rows)
    (problems,) = [line for line in lines if line.startswith("  problems ")]
    assert problems.endswith("cannot read: 1, such as 'It is four. No, it is five.' of row 'row4'")
    assert "  a step takes 8 en problems, but the data have 5: some are repeated" in lines
    assert "  the evaluation uses bundled problems, because eval.path is the default" in lines
    (step,) = [line for line in lines if line.startswith("  a step  ")]
    assert step.startswith("  a step      8 problems x 1 completion of at most ")
    said = "\n".join(lines_of(train__steps=1))
    assert " tokens; 1 step\n" in said
    (step,) = [line for line in lines_of(train__warmup=2) if line.startswith("  a step  ")]
    assert step.endswith("; 2 steps, all within the warm-up (2)")
    assert "the warm-up" not in "".join(lines_of(train__warmup=1))
    for words in ("cannot read", "are repeated", "bundled problems, because"):
        assert words not in said


PLAIN = {f"{side}__thinking": "none" for side in ("prompt", "teacher", "eval")}
CHOICE = {"reward__kind": "choice", "prompt__answer": "choice"}


@pytest.mark.parametrize(
    "card, settings, gold, said",
    [
        ("opsd", {}, "18", "dropped: none"),
        ("opsd", {}, "", "; rows without a gold answer, which are not graded: 8"),
        ("sft", {}, "???", ", ".join(f"'???' of row 'row{k}'" for k in (1, 2, 3))),
        ("sft", CHOICE, "the second", ", 'the second' of row 'row2', 'the second' of row 'row3'"),
    ],
)
def test_files_without_a_readable_gold_answer(tmp_path, card, settings, gold, said):
    record = {"problem": "What is 9 + 9?", "solution": "9 + 9 = 18", "answer": gold}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(record)] * 8))
    lines = lines_of(card, data__path=path, eval__path="", **settings)
    (problems,) = [line for line in lines if line.startswith("  problems ")]
    assert problems.endswith(said)


def test_a_run_that_grades_needs_a_gold_answer_that_can_be_read(tmp_path):
    record = {"problem": "What is 9 + 9?", "solution": "9 + 9 = 18", "answer": "???"}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(record)] * 8))
    ends = {"opsd": "or be blank if the row is not to be graded", "grpo": "only the final answer"}
    for card, end in ends.items():
        with pytest.raises(ValueError, match=rf"^data\.path: the grader cannot read any .*{end}$"):
            lines_of(card, data__path=path, eval__path="")


@pytest.mark.parametrize(
    "settings, opening, noted",
    [
        ({"prompt__date": "2026-01-31"}, "", True),
        ({}, "", False),
        ({"prompt__date": "2026-01-31"}, "{{ strftime_now('%d %b %Y') }}", False),
        (
            {"prompt__date": "2026-01-31", "prompt__template": "plain"} | PLAIN,
            "{{ strftime_now('%d %b %Y') }}", True,
        ),
    ],
)  # fmt: skip
def test_a_date_that_no_prompt_shows(tmp_path, capsys, settings, opening, noted):
    folder = shutil.copytree(hub.resolve_model_path("tiny"), tmp_path / "tok")
    template = tokenizer.load(folder).chat_template
    (folder / "chat_template.jinja").write_text(opening + template)
    own = {"model__tokenizer": folder, "data__limit": 8, "eval__path": ""} | settings
    train.prepare(runs.config("opsd", **own), tmp_path / "w")
    note = "prompt.date is '2026-01-31': it has no effect, because no prompt shows a date\n"
    assert (note in capsys.readouterr().out) == noted


def test_evaluation_without_checkpoints(tmp_path, capsys):
    workdir.create(tmp_path / "w", config_lib.flat(runs.config("opsd")), {})
    before = sorted(path.name for path in (tmp_path / "w").rglob("*"))
    assert evaluate.main(["evaluate", f"--workdir={tmp_path / 'w'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: {tmp_path / 'w' / 'checkpoints'} has no checkpoint; use --steps=0"
    )
    assert said.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "w").rglob("*")) == before


def test_limits_of_the_records_are_named():
    lines = lines_of("opsd", data__limit=8, eval__limit=1)
    assert "  only the first 8 records: data.limit" in lines
    assert "  only the first 1 record: eval.limit" in lines
    lines = lines_of("opsd", data__limit=0, eval__limit=4, eval__path="")
    assert not [line for line in lines if "only the first" in line]


def test_evaluation_on_training_problems(rows, tmp_path):
    held = tmp_path / "held.jsonl"
    first, second, *_ = rows.read_text().splitlines()
    changed = json.loads(second) | {"problem": "What is 7 + 1?"}
    held.write_text(f"{first}\n{json.dumps(changed)}")
    shared = "  1 of 2 evaluation problems are training problems too"
    assert shared in lines_of(data__path=rows, eval__path=held, eval__limit=0)
    own = [line for line in lines_of() if "training problems" in line]
    assert not own


def test_fields_that_nothing_reads(tmp_path, rows):
    records = [json.loads(line) for line in rows.read_text().splitlines()]
    named = [{f"u{k}": k for k in range(25)} | x for x in records]
    mapped = [{"frage": x.pop("problem"), "problem_fr": "?", "hint": {"a": 1}} | x for x in records]
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(map(json.dumps, mapped)))
    wide = tmp_path / "wide.jsonl"
    wide.write_text("\n".join(map(json.dumps, named)))
    lines = lines_of(
        data__path=own, data__fields="problem=frage", eval__path=wide,
        eval__fields="problem=problem",
    )  # fmt: skip
    said = [line.strip() for line in lines if "nothing reads" in line]
    assert said == [
        "fields of data.path that nothing reads: hint (data.fields can map them)",
        f"fields of eval.path that nothing reads: {', '.join(f'u{k}' for k in range(20))}, … "
        "(eval.fields can map them)",
    ]
    assert not [line for line in lines_of() if "nothing reads" in line]
