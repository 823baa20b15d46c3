"""Adapters in PEFT's layout: names and shapes written out, an exact round trip, and torch."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft_reader
import pytest
import safetensors.numpy

from copsd_jax.model import lora, transformer
from copsd_jax.weights import hf, hf_config, hub, peft, tokenizer

CONFIG = dataclasses.replace(
    transformer.SHAPES["tiny"],
    vocab_size=40,
    d_model=12,
    d_ff=20,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
)
RANK, ALPHA = 3, 5.0
# Projection: module, and its (in, out).
MODULES = {
    "q": ("self_attn.q_proj", 12, 24),
    "k": ("self_attn.k_proj", 12, 12),
    "v": ("self_attn.v_proj", 12, 12),
    "o": ("self_attn.o_proj", 24, 12),
    "gate": ("mlp.gate_proj", 12, 20),
    "up": ("mlp.up_proj", 12, 20),
    "down": ("mlp.down_proj", 20, 12),
}


def adapter_of(targets=lora.TARGETS, seed=0):
    """Random in both factors."""
    tree = lora.init_adapter(CONFIG, RANK, targets, jax.random.key(seed))
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def stored(folder):
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def test_what_is_written(tmp_path):
    targets = ("up", "o", "q")
    folder = peft.write(tmp_path / "a", adapter_of(targets), CONFIG, alpha=ALPHA, base="x/y")
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    config = json.loads((folder / "adapter_config.json").read_text())
    wanted = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5,
        "lora_dropout": 0.0, "bias": "none", "base_model_name_or_path": "x/y", "revision": None,
    }  # fmt: skip
    assert {name: config[name] for name in wanted} == wanted
    assert sorted(config["target_modules"]) == ["o_proj", "q_proj", "up_proj"]
    values, tree = stored(folder), adapter_of(targets)
    assert len(values) == 3 * 2 * CONFIG.n_layers
    for target in targets:
        _, width, out = MODULES[target]
        for layer in range(CONFIG.n_layers):
            a, b = (values[peft_reader.name_of(target, layer, part)] for part in "AB")
            assert (a.shape, b.shape) == ((RANK, width), (out, RANK))
            np.testing.assert_array_equal(a, np.asarray(tree[target]["a"])[layer].T)
            np.testing.assert_array_equal(b, np.asarray(tree[target]["b"])[layer].T)


@pytest.mark.parametrize("targets", [lora.TARGETS, ("down",), ("v", "q")])
def test_the_round_trip_is_exact(tmp_path, targets):
    tree = adapter_of(targets)
    peft.write(tmp_path / "a", tree, CONFIG, alpha=2.5, base="")
    found, alpha = peft_reader.read(tmp_path / "a")
    assert alpha == 2.5
    assert set(found) == set(targets)
    jax.tree.map(np.testing.assert_array_equal, found, tree)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    peft.write(tmp_path / "b", jax.tree.map(jnp.asarray, found), CONFIG, alpha=2.5, base="")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_is_not_written(tmp_path):
    tree = adapter_of()
    wrong = tree | {"k": tree["k"] | {"b": tree["k"]["b"][..., :-1]}}
    with pytest.raises(ValueError, match=r"adapter k\.b is float32 \(2, 3, 11\), .*\(2, 3, 12\)"):
        peft.write(tmp_path / "a", wrong, CONFIG, alpha=1.0, base="")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    with pytest.raises(ValueError, match=r"adapter q\.a is bfloat16 \(2, 12, 3\)"):
        peft.write(tmp_path / "a", rounded, CONFIG, alpha=1.0, base="")
    with pytest.raises(
        ValueError, match=r"the adapter has projections \['embed'\] \(allowed: q, k, v, o, "
    ):
        peft.write(tmp_path / "a", {"embed": tree["q"]}, CONFIG, alpha=1.0, base="")
    with pytest.raises(TypeError, match="JSON"):  # when the weights are already written
        peft.write(tmp_path / "a", tree, CONFIG, alpha=0.5, base=object())  # type: ignore
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").touch()
    with pytest.raises(FileExistsError, match="b exists and is not empty"):
        peft.write(tmp_path / "b", tree, CONFIG, alpha=1.0, base="")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


FAMILIES = {
    "qwen3": CONFIG,
    "qwen2": dataclasses.replace(CONFIG, family="qwen2", qk_norm=False, qkv_bias=True),
    "llama": dataclasses.replace(CONFIG, family="llama", qk_norm=False, n_layers=3),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [lora.TARGETS, ("down", "q")])
def test_what_is_exported_is_imported_bit_equal(tmp_path, family, targets):
    config = FAMILIES[family]
    tree = lora.init_adapter(config, RANK, targets, jax.random.key(0))
    tree = jax.tree.map(lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), tree)
    folder = peft.write(tmp_path / "a", tree, config, alpha=ALPHA, base="")
    found = peft.open_adapter(folder, config)
    assert found[:3] == (tuple(t for t in lora.TARGETS if t in targets), RANK, ALPHA)
    read = found.read()
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype(np.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), read,
                 jax.device_get(tree))  # fmt: skip


def as_peft_saves_it(folder, **fields):
    """adapter_config.json with every field that PEFT 0.18 writes, and some of them changed."""
    known = {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
        "auto_mapping": None, "base_model_name_or_path": "a/b", "bias": "none",
        "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
        "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
        "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 5, "lora_bias": False,
        "lora_dropout": 0.05, "megatron_config": None, "megatron_core": "megatron.core",
        "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.18.0",
        "qalora_group_size": 16, "r": 3, "rank_pattern": {}, "revision": None,
        "target_modules": ["q_proj", "down_proj"], "target_parameters": None,
        "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False,
        "use_qalora": False, "use_rslora": False,
    }  # fmt: skip
    text = json.dumps(known | fields)
    (folder / "adapter_config.json").write_text(text)
    return folder


@pytest.fixture
def plain(tmp_path):
    return peft.write(tmp_path / "a", adapter_of(("q", "down")), CONFIG, alpha=ALPHA, base="")


def test_what_changes_nothing_is_accepted(plain):
    for fields in (
        {}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": False}, {"lora_dropout": 0.5},
        {"modules_to_save": []}, {"target_modules": "all-linear"}, {"added_since": None},
    ):  # fmt: skip
        assert peft.open_adapter(as_peft_saves_it(plain, **fields), CONFIG).alpha == 5
    # alpha / sqrt(r) of PEFT's rank-stabilised LoRA is alpha / r of another alpha.
    found = peft.open_adapter(as_peft_saves_it(plain, use_rslora=True), CONFIG)
    assert found.alpha / RANK == pytest.approx(5 / RANK**0.5)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("use_dora", True, "which has None or False here"),
        ("init_lora_weights", "pissa", "this initialisation changes the base weights"),
        ("init_lora_weights", "pissa_niter_4", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "olora", "this initialisation changes the base weights"),
        ("init_lora_weights", "corda", "this initialisation changes the base weights"),
        ("init_lora_weights", "loftq", "this initialisation changes the base weights"),
        ("alora_invocation_tokens", [5, 6], "only plain LoRA is supported"),
        ("rank_pattern", {"q_proj": 8}, "only plain LoRA is supported"),
        ("alpha_pattern", {"q_proj": 8}, "only plain LoRA is supported"),
        ("modules_to_save", ["lm_head"], "only plain LoRA is supported"),
        ("bias", "lora_only", "which has 'none' here"),
        ("lora_bias", True, "only plain LoRA is supported"),
        ("layers_to_transform", [0], "only plain LoRA is supported"),
        ("layers_to_transform", 0, "only plain LoRA is supported"),
        ("layer_replication", [[0, 2]], "only plain LoRA is supported"),
        ("target_parameters", ["experts"], "only plain LoRA is supported"),
        ("fan_in_fan_out", True, "only plain LoRA is supported"),
        ("trainable_token_indices", [1], "only plain LoRA is supported"),
        ("loftq_config", {"loftq_bits": 4}, "which has None or {} here"),
        ("use_qalora", True, "only plain LoRA is supported"),
        ("added_since", 1, "only plain LoRA is supported"),
        ("peft_type", "ADALORA", "only 'LORA' is supported"),
        ("r", 0, "it must be a positive number"),
        ("lora_alpha", "16", "it must be a positive number"),
    ],
)
def test_what_is_not_plain_is_refused_by_name(plain, field, value, said):
    with pytest.raises(ValueError) as raised:
        peft.open_adapter(as_peft_saves_it(plain, **{field: value}), CONFIG)
    assert str(raised.value).startswith(f"{plain / 'adapter_config.json'}: {field} is {value!r}: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_tensors_that_do_not_fit_are_refused(plain):
    file, values = plain / "adapter_model.safetensors", stored(plain)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for change, said in (
        (
            {name.replace("lora_A", "lora_magnitude_vector"): values[name]},
            "is not a tensor of a pl",
        ),
        ({name.replace("self_attn.q_proj", "lm_head"): values[name]}, "is not a tensor of a plain"),
        (
            {name: values[name][:-1].copy()},
            r"q_proj.lora_A.weight has shape \(2, 12\), not \(3, 12\)",
        ),
        ({name: None}, "has tensors for only some of the model's 2 layers"),
        ({name.replace("layers.0", "layers.7"): values[name]}, "has tensors for only some of"),
    ):
        changed = {k: v for k, v in (values | change).items() if v is not None}
        safetensors.numpy.save_file(changed, file)
        with pytest.raises(ValueError, match=said):
            peft.open_adapter(plain, CONFIG)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors does not exist"):
        peft.open_adapter(plain, CONFIG)


@pytest.mark.parity
def test_torch_gives_the_logits_of_base_and_adapter(tmp_path):
    """The base in transformers, to whose weights B A alpha / r of the folder is added."""
    torch = pytest.importorskip("torch", reason="needs torch (extra `parity`)")
    transformers = pytest.importorskip("transformers")
    params = transformer.init_params(CONFIG, jax.random.key(3), jnp.float32)
    config = hf_config.to_config_json(CONFIG, "float32", {})
    kind = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}[CONFIG.family]
    theirs = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**config)
    ).eval()
    weights = {
        name: torch.tensor(np.array(tensor.read()))
        for name, tensor in hf.export_tensors(params, CONFIG).items()
    }
    folder = peft.write(tmp_path / "a", adapter_of(), CONFIG, alpha=ALPHA, base="")
    ids = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)

    def logits():
        missing, unknown = theirs.load_state_dict(weights, strict=False)
        assert not unknown
        assert set(missing) <= {"lm_head.weight"}
        with torch.no_grad():
            return theirs(torch.tensor(ids.astype(np.int64))).logits.numpy()

    bare = logits()
    tensors = {name: torch.tensor(x) for name, x in stored(folder).items()}
    for name, low in tensors.items():
        if ".lora_A." in name:
            kernel = name.removeprefix("base_model.model.").replace(".lora_A", "")
            high = tensors[name.replace("lora_A", "lora_B")]
            weights[kernel] = weights[kernel] + high @ low * ALPHA / RANK
    stream = transformer.Stream(
        jnp.asarray(ids),
        jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), ids.shape),
        jnp.ones_like(ids),
        adapter_of(),
        ALPHA / RANK,
    )
    decoder = transformer.Decoder(CONFIG, jnp.float32)
    hidden = decoder.apply({"params": params}, (stream,))[0].hidden_BLD
    ours = np.asarray(transformer.compute_model_logits(hidden, transformer.get_head(params)))
    found = logits()
    assert np.abs(found - bare).max() > 0.1
    np.testing.assert_allclose(ours, found, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_itself(tmp_path, family):
    """The package peft loads what was written: same logits, same text; and what it writes is read
    again bit for bit."""
    torch = pytest.importorskip("torch", reason="needs torch (extra `parity`)")
    library = pytest.importorskip("peft", reason="needs peft (extra `parity`)")
    import transformers

    tok = tokenizer.load(hub.resolve_model_path("tiny"))
    config = dataclasses.replace(FAMILIES[family], vocab_size=len(tok))
    params = transformer.init_params(config, jax.random.key(3), jnp.float32)
    source = hub.resolve_model_path("tiny")
    base = hf.save(tmp_path / "base", params, config, source_path=source, tokenizer=tok)
    tree = lora.init_adapter(config, RANK, lora.TARGETS, jax.random.key(0))
    draw = np.random.default_rng(1)
    tree = jax.tree.map(lambda x: x + draw.normal(0, 0.2, x.shape).astype(np.float32), tree)
    folder = peft.write(tmp_path / "a", tree, config, alpha=ALPHA, base=str(base))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = library.PeftModel.from_pretrained(theirs, folder).eval()
    theirs.generation_config.eos_token_id = None
    prompt = torch.from_numpy(draw.integers(0, len(tok), (2, 9)))
    text = theirs.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24
    )
    with torch.no_grad():
        expected = theirs(input_ids=text).logits.numpy()
    ids = jnp.asarray(text.numpy(), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    stream = transformer.Stream(ids, positions, jnp.ones_like(ids), tree, ALPHA / RANK)
    hidden = transformer.Decoder(config, jnp.float32).apply({"params": params}, (stream,))[0]
    head = transformer.get_head(params)
    ours = np.asarray(transformer.compute_model_logits(hidden.hidden_BLD, head))
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(ours.argmax(-1)[:, 8:-1], text[:, 9:].numpy())
    theirs.save_pretrained(tmp_path / "again")
    found = peft.open_adapter(tmp_path / "again", config)
    assert found[:3] == (lora.TARGETS, RANK, ALPHA)
    jax.tree.map(np.testing.assert_array_equal, found.read(), jax.device_get(tree))
