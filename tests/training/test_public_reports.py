"""The small inputs in ../shared/cases/reports, with the right values that its README names.

The README is a table of faults from public reports. Its other rows have tests of their own kind;
the answers of `answers.tsv` are in tests/rewards/test_answer_tables.py.
"""

import datetime

import jax.numpy as jnp
import numpy as np
import pytest
import runs
import transformers
import transformers.utils.chat_template_utils as template_utils

from copsd_jax import main
from copsd_jax.model import transformer
from copsd_jax.teaching import prompts
from copsd_jax.training import run_plan
from copsd_jax.weights import hf, hf_config, peft

OFF = {f"{side}__thinking": "none" for side in ("prompt", "teacher", "eval")}
BASE = {"model__init": "pretrained", "model__shape": ""}
# The rows' numbers, their settings, and the parts of the sentence. {} is the folder of the inputs.
REFUSED = {
    "10": (BASE | {"model__path": "{}/stale_index"}, "{}/stale_index has both model.safetensors"),
    "11": (BASE | {"model__path": "{}/tied_differs"}, "{}/tied_differs: the embeddings are tied"),
    "18 pissa": (
        BASE | {"model__path": "{}/peft/base", "model__init_from": "{}/peft/pissa"},
        "{}/peft/pissa/adapter_config.json: init_lora_weights is 'pissa'",
    ),
    "18 olora": (
        BASE | {"model__path": "{}/peft/base", "model__init_from": "{}/peft/olora"},
        "{}/peft/olora/adapter_config.json: init_lora_weights is 'olora'",
    ),
    "19": (
        BASE | {"model__path": "{}/peft/base", "model__init_from": "{}/peft/hand-alora"},
        "{}/peft/hand-alora/adapter_config.json: alora_invocation_tokens",
    ),
    "25": (
        {"model__tokenizer": "{}/gguf_no_merges.gguf"},
        "{}/gguf_no_merges.gguf: the metadata entry tokenizer.ggml.merges is missing",
    ),
    "28": (
        BASE | {"model__path": "{}/eos_beyond"},
        "{}/eos_beyond/generation_config.json: eos_token_id contains 99999",
    ),
    "30": (
        {"model__tokenizer": "{}/no_generation_prompt"},
        "{}/no_generation_prompt cannot be used: it ignores add_generation_prompt",
    ),
    "31 raises": (
        {"model__tokenizer": "{}/template_raises"},
        "{}/template_raises cannot be used: System role not supported",
    ),
    "31 syntax": (
        {"model__tokenizer": "{}/template_syntax"},
        "{}/template_syntax cannot be used: unexpected '}'",
    ),
    "33": (
        {"model__tokenizer": "{}/tokenizer_of_newer_library"},
        "{}/tokenizer_of_newer_library cannot be read: data did not match any variant",
    ),
    "59": (
        {"data__path": "{}/private_use.jsonl"},
        "no prompt of {}/private_use.jsonl (data.path) fits",
    ),
}


@pytest.fixture(scope="module")
def reports(shared):
    folder = shared / "cases/reports"
    if not folder.is_dir():
        pytest.skip("needs ../shared/cases/reports")
    return folder


def plan(reports, tokenizer, card="opsd", **settings):
    own = {"model__tokenizer": reports / tokenizer, **OFF}
    return run_plan.make_plan(runs.config(card, **own, **settings))


@pytest.mark.parametrize("row", REFUSED)
def test_rows_that_are_refused_before_anything_is_written(reports, tmp_path, capsys, row):
    settings, words = REFUSED[row]
    settings = {name: value.replace("{}", str(reports)) for name, value in settings.items()}
    assert main.main(runs.argv("opsd", tmp_path / "w", **settings)) == 2
    said = capsys.readouterr().err
    assert words.replace("{}", str(reports)) in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_row_1_the_date_of_a_template_is_fixed(reports, monkeypatch):
    """A continued run gets `prompt.date` of its first start."""
    texts = []
    for day in (27, 28):
        today = datetime.datetime(2025, 11, day)
        clock = type("Clock", (datetime.datetime,), {"now": classmethod(lambda *_, t=today: t)})
        monkeypatch.setattr(template_utils, "datetime", clock)
        found = plan(reports, "date_template", prompt__date="2025-11-20")
        made = prompts.build_student_prompt(found.tokenizer, found.student, found.rows[0])
        texts.append(made.text)
        assert "20 Nov 2025" in made.text
    assert texts[0] == texts[1]


def test_row_20_adapters_of_all_linear_layers_are_read(reports):
    """Oracle: the logits of PEFT."""
    base = reports / "peft/base"
    config = hf_config.load_config(base)
    params = hf.load_params(base, config, jnp.float32)
    ids_BL = jnp.asarray(np.load(reports / "peft/ids.npy"), jnp.int32)
    ids_BL = ids_BL.reshape(-1, ids_BL.shape[-1])
    positions_BL = jnp.broadcast_to(jnp.arange(ids_BL.shape[1], dtype=jnp.int32), ids_BL.shape)
    decoder = transformer.Decoder(config, jnp.float32)
    for name in ("plain", "alllinear"):
        found = peft.open_adapter(reports / "peft" / name, config)
        stream = transformer.Stream(
            ids_BL, positions_BL, jnp.ones_like(ids_BL), found.read(), found.alpha / found.rank
        )
        hidden_BLD = decoder.apply({"params": params}, (stream,))[0].hidden_BLD
        ours = transformer.compute_model_logits(hidden_BLD, transformer.get_head(params))
        theirs = np.load(reports / "peft" / f"{name}.npy").reshape(ours.shape)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_row_22_the_end_of_a_turn_ends_completions_and_targets(reports):
    found = plan(reports, "base_eos")
    turn, text = (found.tokenizer.convert_tokens_to_ids(x) for x in ("<|im_end|>", "<|endoftext|>"))
    assert set(found.vocabulary.stop_ids) == {turn, text}
    found = plan(reports, "base_eos", "sft")
    row = found.rows[0]
    state = prompts.build_student_prompt(found.tokenizer, found.student, row).state
    assert prompts.encode_target(found.tokenizer, found.student, row, (), state)[-1] == turn


def test_row_24_a_gguf_of_llama_3_begins_with_its_start_token(reports):
    found = plan(reports, "gguf_llama_bpe_no_add_bos.gguf", prompt__template="plain")
    made = prompts.build_student_prompt(found.tokenizer, found.student, found.rows[0])
    ids = [*made.prefix_ids, *made.ids]
    assert found.tokenizer.convert_ids_to_tokens(ids[0]) == "<|im_start|>"
    assert ids.count(ids[0]) == 1


def test_row_35_added_tokens_strip_as_in_transformers(reports):
    found = plan(reports, "strip_tokens")
    theirs = transformers.AutoTokenizer.from_pretrained(reports / "strip_tokens")
    for row in found.rows[:5]:
        made = prompts.build_student_prompt(found.tokenizer, found.student, row)
        expected = theirs(made.text, add_special_tokens=False)["input_ids"]
        assert [*made.prefix_ids, *made.ids] == expected
    assert "<|im_end|>\n" in made.text
    assert "<|im_end|>\n" not in theirs.decode(expected)


def test_row_45_a_url_is_no_work_directory(capsys):
    argv = ["main", *runs.argv("opsd", "x")[2:], "--workdir=gs://my-bucket/run"]
    assert main.main(argv) == 2
    assert "--workdir=gs://my-bucket/run is a URL" in capsys.readouterr().err
