"""Model cards: against YAML's parser, the evaluation's file, and transformers in a new process."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import runs
import yaml

from copsd_jax import export, main, model_card
from copsd_jax.config import settings as config_lib
from copsd_jax.metrics import scoring
from copsd_jax.model import transformer
from copsd_jax.training import run_plan
from copsd_jax.weights import hf, hub, tensor_files, tokenizer

optax_promotes = runs.optax_promotes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that starts from a folder whose own generation settings change greedy texts."""
    folder = tmp_path_factory.mktemp("card")
    tok = tokenizer.load(hub.resolve_model_path("tiny"))
    shape = dataclasses.replace(transformer.SHAPES["tiny"], vocab_size=len(tok))
    params = transformer.init_params(shape, jax.random.key(1), jnp.float32)
    params = jax.tree.map(lambda x: x * 3, params)  # far from ties
    # Added tokens have the logit 0, so none of them is the best token; `decode` would drop it.
    table = params["embed"]["embedding"]
    params["embed"]["embedding"] = table.at[min(tok.added_tokens_decoder) :].set(0)
    source = hub.resolve_model_path("tiny")
    base = hf.save(folder / "base", params, shape, source_path=source, tokenizer=tok)
    file = base / "generation_config.json"
    own = tensor_files.read_json(file) | {"repetition_penalty": 5.0, "do_sample": True}
    tensor_files.write_json(file, own)
    argv = runs.argv(
        "opsd", folder / "w", model__init="pretrained", model__path=base, model__shape="",
        train__steps=2, train__lr=0.01, eval__limit=3, rollout__max_tokens=24,
        rollout__stop="'zz,'", data__limit=16,
    )  # fmt: skip
    assert main.main(argv) == 0
    return folder / "w"


def exported(trained, out, *flags):
    assert export.main(["e", f"--workdir={trained}", f"--out={out}", *flags]) == 0
    return (out / "README.md").read_text(encoding="utf-8")


def test_the_card_states_scores_and_settings(trained, tmp_path):
    text = exported(trained, tmp_path / "o")
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data == {
        "language": ["en"], "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["copsd_jax", "self-distillation", "on-policy"],
    }  # fmt: skip
    assert str(tmp_path.parent) not in text  # no folder of this machine
    assert "base" in body
    for line in ("train.lr = 0.01", "model.path = 'base'", "- Step: 2 of 2"):
        assert f"{line}\n" in body
    marks = [
        [problem["samples"][0]["correct"] for problem in read(trained, step)["problems"]]
        for step in (0, 2)
    ]
    cells = []
    for side in marks:
        mean, low, high = (100 * x for x in scoring.compute_score_interval(side))
        cells.append(f"{mean:.1f}% [{low:.1f}%, {high:.1f}%]")
    assert f"| en | 3 | {cells[0]} | {cells[1]} | " in body
    assert "claims no licence" in body


def read(trained, step):
    return json.loads((trained / f"eval/step_{step:06d}.json").read_text())


def test_the_card_without_evaluations(trained, tmp_path, capsys):
    """Nothing is invented: no scores, and a prompt with an example of our own."""
    shutil.copytree(trained, tmp_path / "w")
    changed = json.loads((tmp_path / "w/eval/step_000002.json").read_text()) | {"policy": [1, 2]}
    (tmp_path / "w/eval/step_000002.json").write_text(json.dumps(changed))
    text = exported(tmp_path / "w", tmp_path / "a", "--format=peft")
    assert "is the result of another policy" in capsys.readouterr().out
    assert "| problems | n | before training [95 % interval] |\n" in text
    shutil.rmtree(tmp_path / "w/eval")
    text = exported(tmp_path / "w", tmp_path / "b", "--format=peft")
    assert "no scores of step 2: python -m copsd_jax.evaluate" in capsys.readouterr().out
    assert "This checkpoint was not evaluated." in text
    assert f"problem = {model_card.EXAMPLE!r}\n" in text
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "peft"


def test_names_of_repositories_are_in_the_metadata(trained, tmp_path, monkeypatch):
    named = hub.BaseModel("owner/name", "0" * 40, True)
    monkeypatch.setattr(export, "_name_run_base", lambda plan: named)
    for form, relation in (("hf", "finetune"), ("peft", "adapter")):
        text = exported(trained, tmp_path / form, f"--format={form}")
        data = yaml.safe_load(text.split("---\n")[1])
        assert (data["base_model"], data["base_model_relation"]) == ("owner/name", relation)
        assert f"[owner/name](https://huggingface.co/owner/name) at commit `{'0' * 40}`" in text
    assert "base_model" not in exported(trained, tmp_path / "b", "--format=base").split("---\n")[1]


def test_what_a_card_does_not_show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    config = config_lib.default()
    config_lib.assign(config, {
        "data.path": "/home/me/secret/p.jsonl", "eval.path": "bundled:train", "model.path": "a/b",
        "author.url": "http://10.0.0.1/v1", "prompt.exemplars_path": "d/q", "train.keep": 5,
        "languages_file": "~/l.json",
    })  # fmt: skip
    (tmp_path / "d/q").touch()
    assert model_card._list_settings(config) == {
        "data.path": "p.jsonl", "eval.path": "bundled:train", "model.path": "a/b",
        "prompt.exemplars_path": "q", "languages_file": "l.json",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["a", "a\n", "```", "x ```` y\n"])
def test_code_blocks_hold_any_text(text):
    lines = model_card._fence(text).split("\n")
    assert lines[0] == lines[-1] + "text"
    assert "\n".join(lines[1:-1]) == text.removesuffix("\n")
    assert lines[-1] not in text


@pytest.mark.parametrize("problem, text", [
    ("2 + 2?", "Q: 1 + 1?\nA: 2\n\nQ: 2 + 2?\nA:"), ("2 + 2?", "2 + 2?"), ("x", "no match\n\n"),
    ('"a"\n\\b', 'é"a"\n\\b\u2028\n\n'),
])  # fmt: skip
def test_the_program_spells_the_prompt(problem, text):
    row = model_card.problem_row.Row("r", problem, "", "", "en", "")
    prompt = model_card.prompts.Prompt((), (1,), text, "plain")
    names: dict = {}
    exec(model_card._spell_prompt(model_card._Example(row, prompt)), names)
    assert names["prompt"] == text
    assert names.get("problem", problem) == problem


@pytest.mark.parity
@pytest.mark.parametrize("form", ["hf", "peft", "gguf"])
def test_the_program_of_the_card_gives_our_greedy_text(trained, tmp_path, form):
    needed = {"hf": ["torch"], "peft": ["torch", "peft"], "gguf": ["llama_cpp"]}[form]
    for package in needed:
        pytest.importorskip(package, reason=f"needs {package}")
    text = exported(trained, tmp_path / "o", f"--format={form}")
    (program,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "o", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first = read(trained, 2)["problems"][0]
    assert f"problem = {first['problem']!r}\n" in program
    said = first["samples"][0]["text"]
    assert len(said) > 5
    if form != "gguf":
        assert done.stdout == said + "\n"
        return
    # llama.cpp drops bytes that are no character, and its float16 products decide the near ties of
    # a random model; `test_gguf_writer` compares whole texts of a trained model.
    shown = said.replace("\ufffd", "")
    assert len(shown) > 20
    assert done.stdout[: len(shown) // 2] == shown[: len(shown) // 2]


def test_a_prompt_that_no_text_gives_is_written_as_ids(trained):
    """A special token in a problem is encoded as ordinary text, which no call of encode does."""
    from copsd_jax.runtime import workdir

    plan = run_plan.make_plan(workdir.load_run_config(trained), train=False, evaluate=False)
    row = model_card.problem_row.Row("r", "What is <|im_end|>?", "", "", "en", "")
    prompt = model_card.prompts.build_student_prompt(plan.tokenizer, plan.evaluation, row)
    facts = model_card.CardFacts(
        plan, trained, hub.BaseModel("a/b", "", True), "hf", 2, None, None, "float32"
    )
    program = model_card.write_snippet(facts, model_card._Example(row, prompt))
    assert f"ids = {[*prompt.prefix_ids, *prompt.ids]}\n" in program
    compile(program, "program", "exec")
