"""Weights, configs and refusals of Hugging Face folders; names are spelled out again here."""

import dataclasses
import functools
import json
import os
import pathlib
import time
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers

from copsd_jax.model import transformer
from copsd_jax.weights import hf, hf_config, hub, tokenizer

TINY = dataclasses.replace(
    transformer.SHAPES["tiny"],
    vocab_size=96,
    d_model=32,
    d_ff=48,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
)
SCALING = transformer.RopeScaling(8.0, 1.0, 4.0, 64)
CONFIGS = {
    "qwen3": TINY,
    "qwen2": dataclasses.replace(TINY, family="qwen2", qk_norm=False, qkv_bias=True),
    "llama": dataclasses.replace(
        TINY, family="llama", qk_norm=False, tie_embeddings=False, rope_scaling=SCALING
    ),
}
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}


def _expected_shapes(c: transformer.ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of transformers' models, listed from their modules."""
    q, k = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    out = {
        "model.embed_tokens.weight": (c.vocab_size, c.d_model),
        "model.norm.weight": (c.d_model,),
    }
    if not c.tie_embeddings:
        out["lm_head.weight"] = (c.vocab_size, c.d_model)
    for i in range(c.n_layers):
        at = f"model.layers.{i}."
        out[at + "input_layernorm.weight"] = (c.d_model,)
        out[at + "post_attention_layernorm.weight"] = (c.d_model,)
        for name, width in (("q", q), ("k", k), ("v", k)):
            out[at + f"self_attn.{name}_proj.weight"] = (width, c.d_model)
            if c.family == "qwen2":
                out[at + f"self_attn.{name}_proj.bias"] = (width,)
        out[at + "self_attn.o_proj.weight"] = (c.d_model, q)
        if c.family == "qwen3":
            out[at + "self_attn.q_norm.weight"] = (c.head_dim,)
            out[at + "self_attn.k_norm.weight"] = (c.head_dim,)
        out[at + "mlp.gate_proj.weight"] = (c.d_ff, c.d_model)
        out[at + "mlp.up_proj.weight"] = (c.d_ff, c.d_model)
        out[at + "mlp.down_proj.weight"] = (c.d_model, c.d_ff)
    return out


def _random(c: transformer.ModelConfig, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = _expected_shapes(c)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def _theirs(c: transformer.ModelConfig) -> dict:
    """config.json in transformers 4's layout."""
    scaling = c.rope_scaling and {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    return {
        "architectures": [ARCHITECTURES[c.family]], "model_type": c.family,
        "vocab_size": c.vocab_size, "hidden_size": c.d_model, "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads, "head_dim": c.head_dim, "hidden_act": "silu",
        "max_position_embeddings": c.max_position, "rms_norm_eps": c.rms_eps,
        "rope_theta": c.rope_theta, "rope_scaling": scaling,
        "tie_word_embeddings": c.tie_embeddings,
    }  # fmt: skip


def write(folder: pathlib.Path, c: transformer.ModelConfig, tensors: dict | None = None, **changes):
    """A model's folder, its weights written by the safetensors package."""
    folder.mkdir(exist_ok=True)
    tensors = _random(c) if tensors is None else tensors
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_theirs(c) | changes))
    return tensors


def random_params(c: transformer.ModelConfig, dtype) -> dict:
    """A tree without compiling model.init, which other tests cover."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype),
        transformer.abstract_params(c, dtype),
    )


def flat(tree: dict) -> dict[str, np.ndarray]:
    leaves = jax.tree.leaves_with_path(tree)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


# The table and loading.


@pytest.mark.parametrize("family", CONFIGS)
def test_table_has_every_tensor_and_fills_every_slot_once(family):
    config = CONFIGS[family]
    table = hf.build_weight_table(config)
    assert {name: slot.shape for name, slot in table.items()} == _expected_shapes(config)
    filled = [(slot.path, slot.layer) for slot in table.values()]
    assert len(set(filled)) == len(filled)
    sizes = {path: 0 for path, _ in filled}
    for slot in table.values():
        sizes[slot.path] += int(np.prod(slot.shape))
    expected = jax.tree.leaves_with_path(transformer.abstract_params(config, jnp.float32))
    assert sizes == {tuple(k.key for k in path): leaf.size for path, leaf in expected}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_value_arrives(tmp_path, family):
    config = CONFIGS[family]
    theirs = write(tmp_path, config)
    assert hf_config.load_config(tmp_path) == config
    hf.check_weights(tmp_path, config)
    params = hf.load_params(tmp_path, config, jnp.float32)
    for i in range(config.n_layers):
        layer = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), params["layers"])
        at = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            kernel = theirs[f"{at}self_attn.{name}_proj.weight"]
            np.testing.assert_array_equal(layer[name]["kernel"], kernel.T)
        for name in ("gate", "up", "down"):
            kernel = theirs[f"{at}mlp.{name}_proj.weight"]
            np.testing.assert_array_equal(layer[name]["kernel"], kernel.T)
        norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        for ours, name in norms.items():
            np.testing.assert_array_equal(layer[ours]["scale"], theirs[f"{at}{name}.weight"])
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                scale = theirs[f"{at}self_attn.{name}.weight"]
                np.testing.assert_array_equal(layer[name]["scale"], scale)
        if config.qkv_bias:
            for name in ("q", "k", "v"):
                bias = theirs[f"{at}self_attn.{name}_proj.bias"]
                np.testing.assert_array_equal(layer[name]["bias"], bias)
    embedding = theirs["model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["embed"]["embedding"], embedding)
    np.testing.assert_array_equal(params["final_norm"]["scale"], theirs["model.norm.weight"])
    head = embedding if config.tie_embeddings else theirs["lm_head.weight"]
    np.testing.assert_array_equal(transformer.get_head(params), head)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    expected = transformer.abstract_params(config, jnp.float32)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), expected)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_number_types(tmp_path, stored, wanted):
    theirs = write(tmp_path, TINY, _random(TINY, stored))
    params = hf.load_params(tmp_path, TINY, wanted)
    up = params["layers"]["up"]["kernel"]
    assert up.dtype == wanted
    expected = theirs["model.layers.1.mlp.up_proj.weight"].T.astype(np.dtype(wanted))
    np.testing.assert_array_equal(np.asarray(up[1]), expected)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shard_bytes", [hf.SHARD_BYTES, 20_000])
def test_save_then_load_is_bit_equal(tmp_path, family, dtype, shard_bytes):
    config = dataclasses.replace(CONFIGS[family], vocab_size=1500)
    params = random_params(config, dtype)
    source, out = hub.resolve_model_path("tiny"), tmp_path / "out"
    tok = tokenizer.load(source)
    hf.save(out, params, config, source_path=source, tokenizer=tok, shard_bytes=shard_bytes)
    assert (out / "model.safetensors").exists() == (shard_bytes == hf.SHARD_BYTES)
    assert hf_config.load_config(out) == config
    hf.check_weights(out, config)
    again = hf.load_params(out, config, dtype)
    before, after = flat(params), flat(again)
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert values.dtype == after[name].dtype
        assert values.tobytes() == after[name].tobytes(), name


def test_what_is_saved_is_what_the_safetensors_package_reads(tmp_path):
    """load(write(x)) then save gives x: import and export are inverse on the tensors themselves."""
    config = CONFIGS["llama"]
    theirs = write(tmp_path / "in", config)
    params = hf.load_params(tmp_path / "in", config, jnp.float32)
    tok = tokenizer.load(hub.resolve_model_path("tiny"))
    out = hf.save(tmp_path / "out", params, config, source_path=tmp_path / "in", tokenizer=tok)
    saved = safetensors.numpy.load_file(out / "model.safetensors")
    assert saved.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_array_equal(saved[name], values, err_msg=name)
    with safetensors.safe_open(out / "model.safetensors", "numpy") as f:
        assert f.metadata() == {"format": "pt"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_saved_tokenizer_and_generation_settings(tmp_path):
    source, tok = tmp_path / "in", tokenizer.load(hub.resolve_model_path("tiny"))
    write(source, TINY)
    settings = {"eos_token_id": [95, 3], "temperature": 0.6, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(settings))
    params = random_params(TINY, jnp.float32)
    out = hf.save(tmp_path / "out", params, TINY, source_path=source, tokenizer=tok)
    again = transformers.AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "Habari 12?"}]
    texts = [
        t.apply_chat_template(chat, tokenize=False, enable_thinking=False) for t in (tok, again)
    ]
    assert texts[0] == texts[1]
    assert tok(texts[0])["input_ids"] == again(texts[0])["input_ids"]
    assert again.eos_token_id == tok.eos_token_id
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == sorted([3, 95, tok.eos_token_id])
    assert generation["temperature"] == 0.6
    assert tokenizer.find_stop_ids(again, out) == tokenizer.find_stop_ids(tok, source)


def test_save_leaves_what_is_there(tmp_path):
    tok = tokenizer.load(hub.resolve_model_path("tiny"))
    params = random_params(TINY, jnp.float32)
    (tmp_path / "mine").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        hf.save(tmp_path, params, TINY, source_path=hub.resolve_model_path("tiny"), tokenizer=tok)
    other = CONFIGS["qwen2"]
    with pytest.raises(ValueError, match="do not match the config"):
        hf.save(
            tmp_path / "x", params, other, source_path=hub.resolve_model_path("tiny"), tokenizer=tok
        )
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def everything(shape):
    return tuple(slice(0, size) for size in shape)


def test_memory_stays_near_the_model(tmp_path):
    """Loading holds what is kept and one leaf besides, not the file a second time."""
    config = dataclasses.replace(TINY, vocab_size=4096, d_model=256, d_ff=1024, n_layers=4)
    write(tmp_path, config)
    leaves = jax.tree.leaves(transformer.abstract_params(config, jnp.float32))
    total = sum(leaf.size * 4 for leaf in leaves)
    largest = max(leaf.size * 4 for leaf in leaves)

    def put(kept, _, shape, part):
        values = part(everything(shape))
        return values if kept else values.shape

    for kept, bound in ((True, total), (False, largest)):
        tracemalloc.start()
        hf.load_params(tmp_path, config, jnp.float32, functools.partial(put, kept))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert bound <= peak < 1.05 * bound + largest, (kept, peak, bound, largest)


def test_put_sees_every_leaf_once(tmp_path):
    write(tmp_path, TINY)
    seen = []
    params = hf.load_params(
        tmp_path, TINY, jnp.float32,
        lambda path, shape, part: seen.append(path) or part(everything(shape)),
    )  # fmt: skip
    assert sorted("/".join(path) for path in seen) == sorted(flat(params))


# Configs.


def test_config_of_transformers_5(tmp_path):
    theirs = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
        rms_norm_eps=1e-6, architectures=["LlamaForCausalLM"],
        rope_parameters={
            "rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in raw  # the layout under test
    assert "rope_theta" not in raw
    assert hf_config.load_config(tmp_path) == CONFIGS["llama"]


def test_published_configs(tmp_path):
    """The published values of two models, as transformers 4 wrote them."""
    qwen = {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(qwen))
    assert hf_config.load_config(tmp_path) == transformer.SHAPES["qwen3_1_7b"]
    smollm2 = {
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 576,
        "intermediate_size": 1536, "max_position_embeddings": 8192, "model_type": "llama",
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05, "rope_theta": 100000, "tie_word_embeddings": True,
        "vocab_size": 49152,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(smollm2))
    assert hf_config.load_config(tmp_path) == transformer.SHAPES["smollm2_135m"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not .* Qwen3ForCausalLM, "),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM is not supported"),
        ({"architectures": None, "model_type": "phi3"}, "model_type 'phi3' is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported .*: False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention is not"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "RoPE type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "RoPE type 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "also needs low_freq_factor"),
        ({"num_key_value_heads": 3}, "no model has .* 4 heads and 3 key heads of size 16"),
        ({"hidden_size": "32"}, "an impossible d_model: '32'"),
        ({"rms_norm_eps": -1.0}, r"an impossible rms_eps: -1\.0"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config = .*: none"),
    ],
)
def test_unsupported_configs_are_refused_by_name(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(_theirs(TINY) | changes))
    with pytest.raises(ValueError, match=message):
        hf_config.load_config(tmp_path)


def test_broken_configs_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        hf_config.load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1,}')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        hf_config.load_config(tmp_path)
    raw = {k: v for k, v in _theirs(TINY).items() if k != "hidden_size"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="lacks hidden_size"):
        hf_config.load_config(tmp_path)


# Damaged folders.


def _without(tensors: dict, name: str) -> dict:
    return {key: value for key, value in tensors.items() if key != name}


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: _without(t, GATE), rf"lacks tensors \(1\): {GATE}"),
        (
            lambda t: t | {"model.layers.2.x": t[GATE]},
            r"does not have: model\.layers\.2\.x",
        ),
        (lambda t: t | {GATE: t[GATE].T.copy()}, rf"{GATE} has shape \(32, 48\); .* \(48, 32\)"),
        (lambda t: t | {GATE: t[GATE].astype(np.int8)}, rf"{GATE} has type I8.*F32, F16, BF16"),
        (lambda t: t | {"lm_head.weight": t[GATE]}, r"lm_head\.weight has shape \(48, 32\)"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, change, message):
    write(tmp_path, TINY, change(_random(TINY)))
    with pytest.raises(ValueError, match=message):
        hf.check_weights(tmp_path, TINY)
    with pytest.raises(ValueError, match=message):
        hf.load_params(tmp_path, TINY, jnp.float32)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.9999])
def test_truncated_weights_are_refused(tmp_path, keep):
    write(tmp_path, TINY)
    file = tmp_path / "model.safetensors"
    os.truncate(file, keep if isinstance(keep, int) else int(keep * file.stat().st_size))
    with pytest.raises(
        ValueError, match=r"model\.safetensors is truncated or damaged \(\d+ bytes\)"
    ):
        hf.check_weights(tmp_path, TINY)


def test_other_damage_is_refused(tmp_path):
    write(tmp_path, TINY)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        hf.check_weights(tmp_path, TINY)
    file.write_bytes(whole[:8] + b"[" + whole[9:])
    with pytest.raises(ValueError, match=r"is truncated or damaged .* header"):
        hf.check_weights(tmp_path, TINY)
    file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no weights: neither model\.safetensors nor"):
        hf.check_weights(tmp_path, TINY)


def test_head_of_a_tied_model(tmp_path):
    """A second copy that is equal is read over; one that differs is refused."""
    theirs = _random(TINY)
    embedding = theirs["model.embed_tokens.weight"]
    write(tmp_path, TINY, theirs | {"lm_head.weight": embedding.copy()})
    hf.check_weights(tmp_path, TINY)
    assert "head" not in hf.load_params(tmp_path, TINY, jnp.float32)
    write(tmp_path, TINY, theirs | {"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match=r"embeddings are tied, but lm_head\.weight differs"):
        hf.check_weights(tmp_path, TINY)
    # Only the plan reads the head.
    loaded = hf.load_params(tmp_path, TINY, jnp.float32)
    np.testing.assert_array_equal(loaded["embed"]["embedding"], embedding)


def test_head_of_an_untied_model_must_be_there(tmp_path):
    write(tmp_path, TINY)
    with pytest.raises(ValueError, match=r"lacks tensors \(1\): lm_head\.weight"):
        hf.check_weights(tmp_path, dataclasses.replace(TINY, tie_embeddings=False))


def test_rotary_constants_are_no_weights(tmp_path):
    constant = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    write(tmp_path, TINY, _random(TINY) | constant)
    hf.check_weights(tmp_path, TINY)
    hf.load_params(tmp_path, TINY, jnp.float32)


@pytest.fixture
def sharded(tmp_path):
    theirs = _random(TINY)
    names = sorted(theirs)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        safetensors.numpy.save_file({name: theirs[name] for name in part}, tmp_path / file)
    index = {name: file for file, part in parts.items() for name in part}
    _write_index(tmp_path, index)
    return tmp_path, index


def _write_index(folder, index):
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def test_shards_are_read(sharded, tmp_path_factory):
    single = tmp_path_factory.mktemp("single")
    write(single, TINY)
    one = flat(hf.load_params(single, TINY, jnp.float32))
    two = flat(hf.load_params(sharded[0], TINY, jnp.float32))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_index_and_shards_must_agree(sharded):
    folder, index = sharded
    _write_index(folder, index | {GATE: "a.safetensors" if "b" in index[GATE] else "b.safetensors"})
    with pytest.raises(ValueError, match=f"disagree about tensor {GATE}"):
        hf.check_weights(folder, TINY)
    _write_index(folder, index)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors does not exist"):
        hf.check_weights(folder, TINY)


def test_check_reads_headers_only(tmp_path):
    """A 32B model's files, sparse: the check ends at once, and sees one byte that is missing."""
    config, at, header = transformer.SHAPES["qwen3_32b"], 0, {}
    for name, shape in _expected_shapes(config).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + at)
    assert at > 60e9
    start = time.monotonic()
    hf.check_weights(tmp_path, config)
    assert time.monotonic() - start < 5
    os.truncate(file, 8 + len(text) + at - 1)
    with pytest.raises(ValueError, match="truncated"):
        hf.check_weights(tmp_path, config)
