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
from copsd_jax.weights import hf, hf_config, peft

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
        "lora_dropout": 0.0, "bias": "none", "base_model_name_or_path": "x/y",
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
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").touch()
    with pytest.raises(FileExistsError, match="b exists and is not empty"):
        peft.write(tmp_path / "b", tree, CONFIG, alpha=1.0, base="")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


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
        for name, tensor in hf._export_tensors(params, CONFIG).items()
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
    ours = np.asarray(transformer.compute_logits(hidden, transformer.get_head(params)))
    found = logits()
    assert np.abs(found - bare).max() > 0.1
    np.testing.assert_allclose(ours, found, atol=1e-4)
