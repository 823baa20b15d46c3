"""Decoders that torch transformers made and saved: the same logits, alone and packed, and the same
greedy text from our cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from copsd_jax.attention import decode_attention
from copsd_jax.model import transformer
from copsd_jax.weights import hf, hf_config

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch (extra parity)")

SIZE = {
    "vocab_size": 120, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
# 24 positions of original context: the texts below reach beyond all three ranges of frequencies.
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 24,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
FAMILIES = {
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16, "rope_parameters": PLAIN}),
    "qwen2": (transformers.Qwen2Config, {"rope_parameters": PLAIN}),
    "llama3": (transformers.LlamaConfig, {"rope_parameters": LLAMA_3}),
    "llama": (transformers.LlamaConfig, {"rope_parameters": PLAIN, "rms_norm_eps": 1e-5}),
}
CASES = [(family, tied) for family in FAMILIES for tied in (True, False)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-tied={case[1]}")
def pair(request, tmp_path_factory):
    """(torch model, our config, our params), random weights, norm scales and biases included."""
    family, tied = request.param
    kind, extra = FAMILIES[family]
    torch.manual_seed(0)
    settings = kind(**SIZE, **extra, tie_word_embeddings=tied)
    theirs = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    theirs = theirs.to(torch.float32).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            weight.copy_(mean + 0.15 * torch.randn_like(weight))
    folder = tmp_path_factory.mktemp("saved")
    theirs.save_pretrained(folder)
    config = hf_config.load_config(folder)
    assert config.tie_embeddings == tied
    assert (config.rope_scaling is not None) == (family == "llama3")
    return theirs, config, hf.load_params(folder, config, jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, stream):
    (out,) = transformer.Decoder(config, jnp.float32).apply({"params": params}, (stream,))
    return transformer.compute_model_logits(out.hidden_BLD, transformer.get_head(params)), out.cache


def _theirs(theirs, ids) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.tensor([ids])).logits[0].numpy()


def _ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, SIZE["vocab_size"], length).tolist()


def test_logits_alone_and_between_neighbours(pair):
    """One row holds padding, a text, ours, another text and padding; then ours alone in a row."""
    theirs, config, params = pair
    left, ours, right = _ids(30, 1), _ids(70, 2), _ids(20, 3)
    parts = [(0, [5, 5, 5]), (1, left), (2, ours), (3, right), (0, [5, 5])]
    packed = np.array(
        [(i, at, segment) for segment, ids in parts for at, i in enumerate(ids)], np.int32
    ).T
    alone = np.zeros_like(packed)
    alone[:, : len(ours)] = [ours, range(len(ours)), [1] * len(ours)]
    rows = np.stack([packed, alone], axis=1)
    got, _ = _logits(config, params, transformer.Stream(*map(jnp.asarray, rows)))
    got = np.asarray(got)
    expected = _theirs(theirs, ours)
    assert np.abs(expected).max() > 1
    start = 3 + len(left)
    for segment_start, row, ids in ((3, 0, left), (start, 0, ours), (0, 1, ours)):
        window = got[row, segment_start : segment_start + len(ids)]
        np.testing.assert_allclose(window, _theirs(theirs, ids), rtol=0, atol=1e-4)
    window = got[0, start + len(ours) : start + len(ours) + len(right)]
    np.testing.assert_allclose(window, _theirs(theirs, right), rtol=0, atol=1e-4)


def test_32_greedy_tokens_from_the_cache(pair):
    theirs, config, params = pair
    prompts = [_ids(9, seed) for seed in (4, 5, 6)]
    expected = theirs.generate(
        torch.tensor(prompts), attention_mask=torch.ones(3, 9, dtype=torch.long),
        do_sample=False, max_new_tokens=32, min_new_tokens=32, pad_token_id=0,
    )[:, 9:].numpy()  # fmt: skip
    cache = decode_attention.create_cache(
        config.n_layers, 3, config.n_kv_heads, 128, config.head_dim, jnp.float32
    )  # fmt: skip
    texts = np.array(prompts)
    for at in range(9 + 31):
        tokens_B1, positions_B1 = texts[:, at : at + 1], np.full((3, 1), at)
        stream = transformer.Stream(
            jnp.asarray(tokens_B1, jnp.int32), jnp.asarray(positions_B1, jnp.int32), None,
            cache=cache,
        )  # fmt: skip
        logits, cache = _logits(config, params, stream)
        if at >= 8:
            texts = np.concatenate([texts, np.asarray(logits).argmax(axis=-1)], axis=1)
    np.testing.assert_array_equal(texts[:, 9:], expected)
    assert len(np.unique(expected)) > 6  # texts that only repeat one token would prove little
