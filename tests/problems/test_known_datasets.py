"""Rows with the fields of known data sets, read with the settings that docs/data.md lists.

Each entry names the data card or loader from which its field names are taken. The rows are written
by hand; the expected values are written beside them.
"""

import json
import re

import conftest
import pytest

from copsd_jax.problems import sources

CHAT = [
    {"from": "user", "value": "Find 2+2."},
    {"from": "assistant", "value": r"<|begin_of_solution|>\boxed{4}<|end_of_solution|>"},
]
# name: (record, language, settings, (problem, solution, answer), what the fields are taken from)
SHAPES = {
    # huggingface.co/datasets/openai/gsm8k
    "GSM8K": (
        {"question": "6 x 7?", "answer": "It is 6*7=<<6*7=42>>42.\n#### 42"}, "en",
        "data.fields=problem=question", ("6 x 7?", "It is 6*7=42.", "42"),
    ),
    # huggingface.co/datasets/HuggingFaceH4/MATH-500
    "MATH-500": (
        {"problem": "p", "solution": r"So \boxed{\frac12}.", "answer": r"\frac12",
         "subject": "Algebra", "level": 2, "unique_id": "test/algebra/1.json"}, "en", "",
        ("p", r"So \boxed{\frac12}.", r"\frac12"),
    ),
    # huggingface.co/datasets/HuggingFaceH4/aime_2024
    "AIME (HuggingFaceH4/aime_2024)": (
        {"id": 60, "problem": "p", "solution": "s", "answer": "204", "url": "u", "year": "2024"},
        "en", "", ("p", "s", "204"),
    ),
    # huggingface.co/datasets/Maxwell-Jia/AIME_2024
    "AIME (Maxwell-Jia/AIME_2024)": (
        {"ID": "2024-I-1", "Problem": "p", "Solution": "s", "Answer": 33}, "en",
        "data.fields=problem=Problem,solution=Solution", ("p", "s", "33"),
    ),
    # huggingface.co/datasets/opencompass/AIME2025
    "AIME (opencompass/AIME2025)": (
        {"question": "p", "answer": "70"}, "en", "data.fields=problem=question", ("p", "", "70"),
    ),
    # huggingface.co/datasets/math-ai/aime24
    "AIME (math-ai/aime24)": (
        {"id": 60, "problem": "p", "solution": r"\boxed{204}", "url": "u"}, "en",
        "data.answer=boxed", ("p", r"\boxed{204}", "204"),
    ),
    # huggingface.co/datasets/juletxara/mgsm
    "MGSM": (
        {"question": "Mbili?", "answer": None, "answer_number": 2, "equation_solution": None},
        "sw", "data.fields=problem_sw=question,answer=answer_number", ("Mbili?", "", "2"),
    ),
    # huggingface.co/datasets/masakhane/afrimgsm
    "AfriMGSM": (
        {"question": "Meji?", "answer": None, "answer_number": 2, "equation_solution": None},
        "yor", "data.fields=problem_yor=question,answer=answer_number", ("Meji?", "", "2"),
    ),
    # huggingface.co/datasets/Qwen/PolyMath
    "PolyMath": (
        {"id": "low-ko-0", "question": "1+1?", "answer": "2"}, "ko",
        "data.fields=problem_ko=question", ("1+1?", "", "2"),
    ),
    # huggingface.co/datasets/Mathoctopus/MSVAMP
    "MSVAMP": (
        {"query": "two?", "equation": "- a b", "response": "8.0", "m_query": "mbili?"}, "sw",
        "data.fields=problem=query,problem_sw=m_query,answer=response", ("mbili?", "", "8.0"),
    ),
    # huggingface.co/datasets/hicai-zju/SciKnowEval
    "SciKnowEval": (
        {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answer": "",
         "answerKey": "B", "type": "mcq-4-choices", "prompt": {"default": "Choose."}}, "en",
        "data.fields=problem=question+choices,answer=answerKey", ("Which?\n\nA) x\nB) y", "", "B"),
    ),
    # huggingface.co/datasets/open-thoughts/OpenThoughts-114k, configuration default
    "OpenThoughts": (
        {"system": "Think.", "conversations": CHAT}, "en",
        "data.fields=problem=conversations,solution=conversations data.answer=boxed",
        ("Find 2+2.", CHAT[1]["value"], "4"),
    ),
    # huggingface.co/datasets/BytedTsinghua-SIA/DAPO-Math-17k
    "DAPO": (
        {"data_source": "math_dapo", "prompt": [{"content": "1+1?", "role": "user"}],
         "ability": "MATH", "reward_model": {"ground_truth": "34", "style": "rule"},
         "extra_info": {"index": "9a"}}, "en",
        "data.fields=problem=prompt,answer=reward_model.ground_truth", ("1+1?", "", "34"),
    ),
    # The data of COPSD
    "COPSD": (
        {"problem": "two?", "solution": "s", "Answer": "2", "problem_sw": "mbili?"}, "sw", "",
        ("mbili?", "s", "2"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_row_of_each_known_shape(tmp_path, name):
    record, lang, settings, expected = SHAPES[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record))
    found = dict(part.removeprefix("data.").split("=", 1) for part in settings.split())
    (row,), _ = sources.load_rows(str(path), (lang,), needs=("answer",), **found)
    assert (row.problem, row.solution, row.answer) == expected


def test_the_table_of_the_documentation_lists_these_settings():
    text = (conftest.ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table = text.partition("## Known data sets")[2].partition("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    listed = {row[0]: " ".join(re.findall(r"`(data\.[^`]*)`", row[2])) for row in rows[2:]}
    assert listed == {name: shape[2] for name, shape in SHAPES.items()}
