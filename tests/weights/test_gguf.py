"""GGUF files written here, block by block, and read back; blocks are decoded again by hand."""

import dataclasses
import math
import pathlib

import gguf as format
import numpy as np
import pytest

from copsd_jax.model import transformer
from copsd_jax.weights import gguf_files, hf, hf_config

CONFIG = transformer.ModelConfig(
    family="llama", vocab_size=96, d_model=64, d_ff=96, n_layers=2, n_heads=4, n_kv_heads=2,
    head_dim=16, rope_theta=1e5, rope_scaling=None, rms_eps=1e-5, tie_embeddings=False,
    qkv_bias=False, qk_norm=False, max_position=128,
)  # fmt: skip
FAMILIES = {
    "llama": CONFIG,
    "qwen2": dataclasses.replace(CONFIG, family="qwen2", qkv_bias=True, tie_embeddings=True),
    "qwen3": dataclasses.replace(CONFIG, family="qwen3", qk_norm=True, head_dim=32),
}
GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def _stored_name(name: str) -> str:
    parts = name.split(".")
    block = f"blk.{parts[2]}." if "layers" in parts else ""
    return f"{block}{GGUF_NAMES[parts[-2]]}.{parts[-1]}"


def _interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp keeps them: row 2i of a head is row i, row 2i + 1 is row i + size / 2."""
    out, size = np.empty_like(w), len(w) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = w[head * size + i]
            out[head * size + 2 * i + 1] = w[head * size + i + size // 2]
    return out


def _decoded(raw: np.ndarray, kind: str) -> np.ndarray:
    """Values of encoded rows, written from the format's description."""
    rows = np.ascontiguousarray(raw).view(np.uint8).reshape(len(raw), -1)
    if kind in ("F32", "F16"):
        return rows.view({"F32": np.float32, "F16": np.float16}[kind]).astype(np.float32)
    if kind == "BF16":
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind]
    blocks = rows.reshape(len(raw), -1, size)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        values = blocks[..., 2:].view(np.int8) * scale
    else:
        packed = blocks[..., -16:]
        nibbles = np.concatenate([packed & 15, packed >> 4], -1).astype(np.float32)
        if kind == "Q4_0":
            values = (nibbles - 8) * scale
        else:
            values = nibbles * scale + np.ascontiguousarray(blocks[..., 2:4]).view(
                np.float16
            ).astype(np.float32)
    return values.reshape(len(raw), -1)


def write(
    path: pathlib.Path, config: transformer.ModelConfig, kind: str = "F32", *, extra=(), meta=()
):
    """A GGUF of random weights; returns Hugging Face name -> the values that it holds."""
    arch, rng = config.family, np.random.default_rng(0)
    writer = format.GGUFWriter(path, arch)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    for key, value in meta:
        if isinstance(value, list):
            writer.add_array(key, value)
        elif key == "general.alignment":
            writer.add_custom_alignment(value)
        else:
            writer.add_key_value(key, value, format.GGUFValueType.get_type(value))
    values = {}
    for name, slot in hf.build_weight_table(config).items():
        w = rng.normal(size=slot.shape).astype(np.float32)
        one = len(slot.shape) == 1
        used = "F32" if one else kind
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2])
        swap = arch == "llama" and heads
        stored = _interleaved(w, heads) if swap else w
        code = format.GGMLQuantizationType[used]
        raw = format.quantize(stored, code)
        writer.add_tensor(_stored_name(name), raw, raw_dtype=code)
        values[name] = w if used == "F32" else _decoded(format.quantize(w, code), used)
    for name, array in extra:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_every_tensor_type(tmp_path, kind):
    path = tmp_path / "m.gguf"
    expected = write(path, CONFIG, kind)
    found = gguf_files.open_tensors(path)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape, name
        values = tensor.read()
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path, family):
    path, config = tmp_path / "m.gguf", FAMILIES[family]
    expected = write(path, config)
    assert gguf_files.load_config(path) == config
    for name, tensor in gguf_files.open_tensors(path).items():
        np.testing.assert_array_equal(tensor.read(), expected[name], err_msg=name)
    hf.check_weights(path, config)


def test_metadata_equal_the_package_s_reader(tmp_path):
    """Every kind of number, text with other scripts, lists, empty ones; odd alignment."""
    path = tmp_path / "m.gguf"
    meta = [("a.text", "ሰላም \U0001f600"), ("a.empty", ""), ("a.yes", True), ("a.minus", -3)]
    meta += [("a.list", ["x", "", "é"]), ("a.numbers", [1, -2, 3]), ("a.floats", [0.5, 1e-5])]
    write(path, CONFIG, "Q4_0", meta=[*meta, ("general.alignment", 64)])
    theirs = format.GGUFReader(path)
    expected = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert gguf_files.read_header(path).metadata == expected
    for ours, stored in zip(gguf_files.read_header(path).tensors, theirs.tensors, strict=True):
        assert ours.name == stored.name
        assert (ours.offset, ours.size) == (stored.data_offset, stored.n_bytes)
        assert ours.shape == tuple(reversed(stored.shape.tolist()))


def test_damaged_file_is_refused_or_read(tmp_path):
    """A changed byte anywhere in front of the values never ends in another error."""
    path = tmp_path / "m.gguf"
    write(path, CONFIG, meta=[("a.list", ["x", "y"])])
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    front = gguf_files.read_header(path).tensors[0].offset
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(front)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            hf.check_weights(path, hf_config.load_config(path))
        except ValueError:
            refused += 1
    assert refused > 50


def test_rows_of_a_head():
    original = np.arange(8)[:, None]  # two heads of four rows
    stored = np.array([0, 2, 1, 3, 4, 6, 5, 7])[:, None]
    np.testing.assert_array_equal(gguf_files.unpermute(stored, 2), original)


def _llama3_divisors(factor, low, high, positions, head_dim, theta):
    out = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < positions / high:
            out.append(1.0)
        elif wavelength > positions / low:
            out.append(factor)
        else:
            smooth = (positions / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised(tmp_path, factor):
    divisors = _llama3_divisors(factor, 1.0, 4.0, 8192, 16, 5e5)
    assert 1 < sorted(set(divisors.tolist()))[1] < factor  # the blend occurs
    path, config = tmp_path / "m.gguf", dataclasses.replace(CONFIG, rope_theta=5e5)
    write(path, config, extra=[("rope_freqs.weight", divisors)])
    scaling = transformer.RopeScaling(factor, 1.0, 4.0, 8192)
    assert gguf_files.load_config(path) == dataclasses.replace(config, rope_scaling=scaling)
    hf.check_weights(path, gguf_files.load_config(path))


def test_other_scaling_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, CONFIG, extra=[("rope_freqs.weight", np.full(8, 3.0, np.float32))])
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not Llama 3's"):
        gguf_files.load_config(path)


@pytest.mark.parametrize(
    "meta, message",
    [
        (("llama.expert_count", 8), r"llama\.expert_count = 8"),
        (("llama.rope.scaling.type", "yarn"), r"rope\.scaling\.type = 'yarn'"),
        (("llama.rope.dimension_count", 8), r"dimension_count = 8, but heads have size 16"),
        (("split.count", 2), r"split\.count = 2"),
    ],
)
def test_options_are_refused(tmp_path, meta, message):
    path = tmp_path / "m.gguf"
    write(path, CONFIG, meta=[meta])
    with pytest.raises(ValueError, match=message):
        gguf_files.load_config(path)


def test_architecture_is_refused_by_name(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, dataclasses.replace(CONFIG, family="gemma3"))
    with pytest.raises(ValueError, match=r"'gemma3' is not supported .* llama, qwen2, qwen3"):
        gguf_files.load_config(path)


def test_tensor_type_is_refused_by_name(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, CONFIG, extra=[("blk.2.attn_q.weight", np.zeros((4, 4), np.float64))])
    with pytest.raises(ValueError, match=r"blk\.2\.attn_q\.weight has type F64"):
        gguf_files.open_tensors(path)


def test_tensor_name_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, CONFIG, extra=[("blk.0.ffn_gate_inp.weight", np.zeros((4, 4), np.float32))])
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_gate_inp\.weight"):
        gguf_files.open_tensors(path)


def test_missing_and_extra_tensors_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, CONFIG, extra=[("blk.2.attn_q.weight", np.zeros((64, 64), np.float32))])
    with pytest.raises(
        ValueError, match=r"tensors \(1\) that .*: model\.layers\.2\.self_attn\.q_proj"
    ):
        hf.check_weights(path, gguf_files.load_config(path))
    with pytest.raises(ValueError, match=r"lacks tensors \(8\): model\.layers\.2\.input_layernorm"):
        hf.check_weights(path, dataclasses.replace(CONFIG, n_layers=3))


@pytest.mark.parametrize("keep", [0.0001, 0.01, 0.5, 0.999])
def test_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "m.gguf"
    write(path, CONFIG)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(1, int(keep * len(whole)))])
    with pytest.raises(ValueError, match="not a complete GGUF file"):
        gguf_files.load_config(path)
