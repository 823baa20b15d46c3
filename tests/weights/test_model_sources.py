"""Files of a model that contradict each other, or that other libraries refuse, in small folders."""

import dataclasses
import json
import shutil

import gguf_writer
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import test_tokenizer
import tokenizers
import transformers

from copsd_jax import summary
from copsd_jax.model import transformer
from copsd_jax.runtime import sharding
from copsd_jax.training import run_plan
from copsd_jax.weights import gguf_files, hf, hf_config, hub, peft, tensor_files, tokenizer

TINY = hub.resolve_model_path("tiny")
OFF = {f"{side}__thinking": "none" for side in ("prompt", "teacher", "eval")}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder, **config):
    shutil.copy(TINY / "tokenizer.json", folder)
    raw = {"eos_token": "<|im_end|>", "chat_template": CHATML} | config
    tensor_files.write_json(folder / "tokenizer_config.json", raw)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model with random weights."""
    folder = write_tokenizer(tmp_path_factory.mktemp("model")) / "model"
    tok = tokenizer.load(folder.parent)
    shape = dataclasses.replace(transformer.SHAPES["tiny"], vocab_size=1472, tie_embeddings=False)
    draw = np.random.default_rng(0)
    leaves = transformer.abstract_params(shape, jnp.float32)
    params = jax.tree.map(lambda x: draw.standard_normal(x.shape).astype(x.dtype), leaves)
    return hf.save(folder, params, shape, source_path=folder.parent, tokenizer=tok)


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def plan(folder, **settings):
    own = {"model__path": folder, "model__init": "pretrained", "model__shape": "", **OFF}
    return run_plan.make_plan(runs.config("opsd", **own, **settings))


def change(file, **values):
    tensor_files.write_json(file, tensor_files.read_json(file) | values)


def test_the_end_of_a_turn_ends_completions_and_is_exported(tmp_path):
    write_tokenizer(tmp_path, eos_token="<|endoftext|>")
    found = run_plan.make_plan(runs.config("opsd", model__tokenizer=tmp_path, **OFF))
    assert found.vocabulary.stop_ids == (1400, 1402)  # <|endoftext|>, <|im_end|>
    said = summary.summarize_plan(found, tmp_path, False)
    assert "note        the chat template ends a turn with '<|im_end|>', but the" in said
    plain = {"model__tokenizer": tmp_path, "prompt__template": "plain", **OFF}
    assert run_plan.make_plan(runs.config("opsd", **plain)).vocabulary.stop_ids == (1400,)
    ids = {"bos_token_id": None, "eos_token_id": 1400, "pad_token_id": None}
    assert hf_config.to_generation_json(tmp_path, ids, (1402,))["eos_token_id"] == [1400, 1402]


def test_an_export_keeps_the_end_of_a_turn(model):
    settings = tensor_files.read_json(model / "generation_config.json")
    assert settings["eos_token_id"] == [1402]
    assert plan(model).vocabulary.stop_ids == (1402,)


@pytest.mark.parametrize(
    "value, part",
    [
        ([1402, 99999], "contains 99999, but the model has only the ids 0 to 1471"),
        (-1, "contains -1, which is not a token id"),
        ("<|im_end|>", "contains '<|im_end|>', which is not a token id"),
        ([[1402]], r"contains \[1402\], which is not a token id"),
        (True, "contains True, which is not a token id"),
        (1402.0, "contains 1402.0, which is not a token id"),
    ],
)
@pytest.mark.parametrize("file", hub.CONFIG_FILES)
def test_end_tokens_that_the_model_lacks_are_refused(copy, file, value, part):
    change(copy / file, eos_token_id=value)
    with pytest.raises(ValueError, match=f"{file}: eos_token_id {part}"):
        plan(copy) if value == -1 else hf_config.read_stop_ids(copy, 1472)


def test_both_an_index_and_a_single_file_are_refused(copy):
    names = list(tensor_files.open_folder(copy))
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    shutil.copy(copy / "model.safetensors", copy / "model-00001-of-00001.safetensors")
    tensor_files.write_json(copy / tensor_files.INDEX, index)
    with pytest.raises(ValueError, match=r"both model\.safetensors, which transformers reads, and"):
        plan(copy)
    (copy / "model.safetensors").unlink()
    plan(copy)
    (copy / "model-00001-of-00001.safetensors").rename(copy / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    tensor_files.write_json(copy / tensor_files.INDEX, index)
    plan(copy)  # the index names the single file
    for wrong in (7, "../copy/model.safetensors"):
        change(copy / tensor_files.INDEX, weight_map=dict.fromkeys(names, wrong))
        with pytest.raises(ValueError, match=r"index\.json: the file of .* is .*, not a file name"):
            plan(copy)


def test_a_head_that_differs_from_tied_embeddings_is_refused_in_the_plan(copy):
    change(copy / "config.json", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"embeddings are tied, but lm_head\.weight differs from"):
        plan(copy)


def test_two_templates_are_named(copy):
    """transformers is the oracle of which one is used."""
    (copy / "chat_template.jinja").write_text(CHATML + " ", encoding="utf-8")
    change(copy / "tokenizer_config.json", chat_template=CHATML)
    found = plan(copy)
    theirs = transformers.AutoTokenizer.from_pretrained(copy)
    assert found.tokenizer.chat_template == theirs.chat_template == CHATML + " "
    said = tokenizer.describe_contradictions(found.tokenizer, 1402)
    assert said == [f"{copy / 'chat_template.jinja'} is used, as in transformers, although "
                    "tokenizer_config.json has another template"]  # fmt: skip
    change(copy / "tokenizer_config.json", chat_template=CHATML + " ")
    assert tokenizer.describe_contradictions(tokenizer.load(copy), 1402) == []


ABSENT = ("head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "rope")


@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama"])
def test_values_absent_from_a_config_are_those_of_transformers(tmp_path, family, absent):
    raw = {
        "architectures": [f"{family}ForCausalLM"], "model_type": family.lower(), "vocab_size": 64,
        "hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32,
        "num_attention_heads": 64, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 7e4, "rope": None,
    }  # fmt: skip
    raw = {key: value for key, value in raw.items() if not key.startswith(absent)}
    tensor_files.write_json(tmp_path / "config.json", raw)
    theirs, ours = (
        transformers.AutoConfig.from_pretrained(tmp_path),
        hf_config.load_config(tmp_path),
    )
    heads = theirs.num_attention_heads
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // heads
    assert ours.head_dim == head_dim
    assert ours.n_kv_heads == theirs.num_key_value_heads
    assert ours.rms_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    "values",
    [
        *({"hidden_size": "64"}, {"num_attention_heads": 0}, {"rope_parameters": [1]}),
        *({"rope_theta": {}}, {"tie_word_embeddings": "false"}, {"architectures": 3}),
        *({"max_position_embeddings": "x"}, {"layer_types": 5}, {"rms_norm_eps": "1e-6"}),
        {"num_key_value_heads": 1.5},
    ],
)
def test_values_of_a_wrong_kind_are_refused_with_the_file(copy, values):
    change(copy / "config.json", **values)
    if "rope_theta" in values:
        change(copy / "config.json", rope_parameters=None)
    with pytest.raises(ValueError, match=str(copy)):
        hf_config.load_config(copy)


# Errors of other libraries.


def test_a_tokenizer_of_a_newer_library_is_refused(tmp_path):
    raw = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    raw["pre_tokenizer"] = {"type": "FutureSplit"}
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(Exception, match="did not match") as theirs:  # no ValueError
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert type(theirs.value) is Exception
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} cannot be read: .*did not"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("error", [
    huggingface_hub.errors.HFValidationError("bad name"), TimeoutError("late"),
    Exception("the errors of the HTTP client have no other class"), RuntimeError("it is closed"),
])  # fmt: skip
def test_errors_of_the_hub_and_its_client_name_the_repository(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"model\.path is 'a/b' .*the download from https"):
        hub.resolve_model_path("a/b")


@pytest.mark.parametrize("address", ["hf-mirror.example", "", "ftp://x", "https://"])
def test_an_address_of_the_hub_without_scheme_is_refused(monkeypatch, address):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    with pytest.raises(ValueError, match=f"HF_ENDPOINT is '{address}': it must begin with https"):
        hub.resolve_model_path("a/b")


def test_a_password_in_the_address_is_not_shown(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to https://me:secret@mirror.example/a/b")

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://me:secret@mirror.example")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"https://mirror\.example") as caught:
        hub.resolve_model_path("a/b")
    assert "secret" not in str(caught.value)


def test_64_bits_are_refused():
    jax.config.update("jax_enable_x64", True)
    try:
        with pytest.raises(ValueError, match="JAX_ENABLE_X64 is set"):
            sharding.make_mesh(1, 1, -1)
    finally:
        jax.config.update("jax_enable_x64", False)


# GGUF.


@pytest.mark.parametrize("pre, begins", [
    ("llama-bpe", True), ("gpt-2", False), ("qwen2", False), ("smollm", False),
])  # fmt: skip
def test_start_token_of_a_gguf_that_does_not_say(tmp_path, pre, begins):
    """llama.cpp adds it only for Llama 3's splitter."""
    test_tokenizer.write(tmp_path / "m.gguf", pre, add_bos=None)
    tok = tokenizer.load(tmp_path / "m.gguf")
    assert (tok("3 apples")["input_ids"][0] == tok.bos_token_id) is begins


@pytest.mark.parametrize("key, value, part", [
    ("tokenizer.ggml.merges", None, ": the metadata entry tokenizer.ggml.merges is missing"),
    ("tokenizer.ggml.tokens", None, ": the metadata entry tokenizer.ggml.tokens is missing"),
    ("tokenizer.ggml.tokens", [1, 2], ": .*tokens is missing, or is not a list of str"),
    ("tokenizer.ggml.token_type", [1, 1], " has [0-9]+ tokens, but 2 token types"),
    ("tokenizer.ggml.merges", ["a b c"], ": the merge 'a b c' does not consist of two parts"),
    ("tokenizer.ggml.merges", ["a ☃"], None),
    ("tokenizer.ggml.eos_token_id", 1 << 31, ": .*eos_token_id is 2147483648, but the file has"),
    ("tokenizer.ggml.bos_token_id", None, ": plain text begins .*bos_token_id is missing"),
    ("tokenizer.ggml.pre", "new", ": tokenizer.ggml.pre must be one of smollm, .* not 'new'"),
    ("tokenizer.ggml.model", "spm", r": the tokenizer must be gpt2 \(byte-level BPE\), not 'spm'"),
    ("qwen3.context_length", None, " has no metadata entry qwen3.context_length"),
    ("qwen3.context_length", "x", ": qwen3.context_length is 'x'; it must be one number"),
    ("general.architecture", None, " has no metadata entry general.architecture"),
])  # fmt: skip
def test_metadata_of_a_gguf_that_are_missing_or_wrong(tmp_path, monkeypatch, key, value, part):
    """The project's own sentences come out as they are; errors of libraries are explained."""
    path = tmp_path / "m.gguf"
    test_tokenizer.write(path, add_bos=True)
    header = gguf_files.read_header(path)
    metadata = header.metadata | {key: value}
    changed = {name: entry for name, entry in metadata.items() if entry is not None}
    monkeypatch.setattr(gguf_files, "read_header", lambda _: header._replace(metadata=changed))
    own = f"^{path}{part}"
    foreign = f"^the tokenizer in {path} cannot be read: .*out of vocabulary; update the packages"
    with pytest.raises(ValueError, match=foreign if part is None else own) as caught:
        tokenizer.load(path)
    assert str(caught.value).count(str(path)) == 1


def test_a_damaged_gguf_is_refused_once(tmp_path):
    test_tokenizer.write(path := tmp_path / "m.gguf", add_bos=True)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(
        ValueError, match=f"^{path} is not a complete GGUF file; it may be"
    ) as caught:
        tokenizer.load(path)
    assert str(caught.value).count(str(path)) == 1


@pytest.mark.parametrize("text, part", [("[]", "is not a JSON object"), ("{", "is not valid JSON")])
def test_settings_of_a_tokenizer_that_are_no_object(tmp_path, text, part):
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"^{file} {part}"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("values, part", [
    ({"rope_theta": "10000"}, "rope_theta is '10000', but must be a positive number"),
    ({"rope_theta": -1}, "rope_theta is -1, but must be"), ({"factor": 0}, "factor is 0, but"),
    ({"factor": "x"}, "factor is 'x', but must be"), ({"factor": float("nan")}, "factor is nan"),
    ({"original_max_position_embeddings": float("inf")}, "embeddings is inf, but"),
    ({"low_freq_factor": 4.0}, "low_freq_factor is 4.0, which is not below 4.0"),
])  # fmt: skip
def test_rope_parameters_that_are_no_numbers_name_the_file(copy, values, part):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8, "low_freq_factor": 1,
            "high_freq_factor": 4, "original_max_position_embeddings": 64}  # fmt: skip
    change(copy / "config.json", rope_parameters=rope)
    hf_config.load_config(copy)
    change(copy / "config.json", rope_parameters=rope | values)
    with pytest.raises(ValueError, match=f"^{copy}/config.json: .*{part}"):
        hf_config.load_config(copy)


@pytest.mark.parametrize("options, part", [
    ({"vocab": 9}, "llama.vocab_size is 9, but token_embd.weight has 64 rows"),
    ({"alignment": 0}, "general.alignment is 0"),
    ({"name": "rope_freqs.weight", "shape": (3,)}, "is not Llama 3's RoPE scaling"),
])  # fmt: skip
def test_headers_of_a_gguf_that_contradict_themselves(tmp_path, options, part):
    path = tmp_path / "m.gguf"
    writer = gguf_writer.open_llama(path)
    writer.add_vocab_size(options.get("vocab", 64))
    if "alignment" in options:
        writer.add_uint32("general.alignment", options["alignment"])
    writer.add_tensor("token_embd.weight", np.zeros((64, 32), np.float32))
    if "name" in options:
        writer.add_tensor(options["name"], np.zeros(options["shape"], np.float32))
    gguf_writer.finish(writer)
    with pytest.raises(ValueError, match=part):
        hf_config.load_config(path)


# PEFT.


@pytest.mark.parametrize("values", [
    {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"use_qalora": True},
    {"alora_invocation_tokens": [5, 6]}, {"use_bdlora": {"x": 1}}, {"arrow_config": {"top_k": 2}},
    {"a_field_of_a_later_version": 1}, {"r": 4.5}, {"lora_alpha": float("inf")},
])  # fmt: skip
def test_adapters_that_are_not_plain_are_refused(tmp_path, values):
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    tensor_files.write_json(tmp_path / peft.CONFIG, raw | values)
    with pytest.raises(ValueError, match=next(iter(values))):
        peft.open_adapter(tmp_path, transformer.SHAPES["tiny"])
