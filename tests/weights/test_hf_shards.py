"""Weights read part by part onto a mesh. Oracle: the same file read whole, and bytes by hand."""

import collections
import dataclasses
import math
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_gguf
import test_hf

from copsd_jax.model import transformer
from copsd_jax.runtime import sharding
from copsd_jax.weights import gguf_files, hf, tensor_files

QWEN2 = dataclasses.replace(test_hf.CONFIGS["qwen2"], vocab_size=97)
LARGE = dataclasses.replace(
    test_hf.TINY, vocab_size=4096, d_model=512, d_ff=2048, n_layers=4, tie_embeddings=False
)


def onto(devices, config, reading=sharding.load_shards):
    """What a run has as `put`."""

    def put(path, shape, part):
        spec = sharding.partition_spec("/".join(path), shape, devices, config.n_kv_heads)
        return reading(shape, jax.sharding.NamedSharding(devices, spec), part)

    return put


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8), (1, 8, 1)])
@pytest.mark.parametrize("config", [QWEN2, test_hf.CONFIGS["llama"]])
def test_parts_are_those_of_the_whole(tmp_path, config, sizes):
    test_hf.write(tmp_path, config)
    whole = hf.load_params(tmp_path, config, jnp.bfloat16)
    devices = sharding.make_mesh(*sizes)
    got = hf.load_params(tmp_path, config, jnp.bfloat16, onto(devices, config))
    places = sharding.shardings(got, devices, config.n_kv_heads)
    for one, other, place in zip(*map(jax.tree.leaves, (got, whole, places)), strict=True):
        assert one.dtype == jnp.bfloat16
        assert one.sharding == place
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("family, kind", [("llama", "Q4_0"), ("llama", "F32"), ("qwen2", "Q8_0")])
def test_parts_of_a_gguf(tmp_path, family, kind):
    """Rows of q and k in another order, and columns that are no whole block."""
    config = dataclasses.replace(test_gguf.FAMILIES[family], d_model=96)
    path = tmp_path / "m.gguf"
    test_gguf.write(path, config, kind)
    for tensor in gguf_files.open_tensors(path).values():
        all_of_it = tensor.read()
        for cut in (slice(0, 7), slice(8, 24), slice(33, 65)):
            part = (slice(1, 9), cut)[-len(tensor.shape) :]
            np.testing.assert_array_equal(tensor.read(part), all_of_it[part])
    whole = hf.load_params(path, config, jnp.float32)
    got = hf.load_params(path, config, jnp.float32, onto(sharding.make_mesh(1, 4, 2), config))
    for one, other in zip(*map(jax.tree.leaves, (got, whole)), strict=True):
        np.testing.assert_array_equal(one, other)


class Here:
    """A sharding as the process sees it that has some of its devices."""

    def __init__(self, sharding, devices):
        self.sharding, self.devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        found = self.sharding.addressable_devices_indices_map(shape)
        return {device: index for device, index in found.items() if device in self.devices}


@pytest.mark.parametrize("number", [0, 3])
def test_one_of_four_processes_reads_its_parts_only(tmp_path, monkeypatch, number):
    """Two of eight devices, (1, 4, 2): bytes read of the file, and what the host holds at most."""
    test_hf.write(tmp_path, LARGE)
    devices = sharding.make_mesh(1, 4, 2)
    mine = list(devices.devices[0, number])
    taken = collections.Counter()
    read = tensor_files._copy_stored_tensor

    def counted(stored, part=()):
        values = read(stored, part)
        taken["bytes"] += values.nbytes
        return values

    monkeypatch.setattr(tensor_files, "_copy_stored_tensor", counted)
    # Devices that keep nothing: what is left is the host's.
    monkeypatch.setattr(jax, "device_put", lambda values, device: None)
    assemble: Any = lambda shape, place, pieces: len(pieces)  # noqa: E731
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", assemble)

    def reading(shape, place, part):
        return sharding.load_shards(shape, Here(place, mine), part)  # pyright: ignore

    hf._leaf_shapes(LARGE)  # traced once, so that its memory is not counted
    tracemalloc.start()
    got = hf.load_params(tmp_path, LARGE, jnp.float32, onto(devices, LARGE, reading))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(jax.tree.leaves(got)) == {2}  # a piece for each of its devices
    want, largest = 0, 0
    for path, leaf in jax.tree.leaves_with_path(transformer.abstract_params(LARGE, jnp.float32)):
        cut = 1 if "norm" in str(path) else 4  # a quarter along fsdp, both parts along tensor
        want += leaf.size * 4 // cut
        largest = max(largest, leaf.size * 4 // cut // (2 if cut > 1 else 1))
    assert taken["bytes"] == want
    assert largest <= peak < 1.1 * largest + 2**19  # the table of names and the header beside it


def test_a_stored_copy_of_the_head_is_compared_strip_by_strip(tmp_path, monkeypatch):
    config = dataclasses.replace(LARGE, tie_embeddings=True)
    tensors = test_hf._random(config)
    copy = tensors[hf.EMBEDDING].copy()
    test_hf.write(tmp_path, config, tensors | {hf.HEAD: copy})
    hf.check_weights(tmp_path, config)
    copy[-1, -1] += 1
    test_hf.write(tmp_path, config, tensors | {hf.HEAD: copy})
    with pytest.raises(ValueError, match="embeddings are tied, but lm_head"):
        hf.check_weights(tmp_path, config)


def test_slices_of_layers():
    """Nothing cuts the layers' axis today; a part may."""
    slots = [(f"t{i}", hf.LeafSlice(("layers", "q", "kernel"), i, (3, 4), True)) for i in range(3)]
    values = np.arange(36, dtype=np.float32).reshape(3, 3, 4)
    found = {
        f"t{i}": tensor_files.Tensor((3, 4), lambda part, i=i: values[i][part]) for i in range(3)
    }
    cuts = (slice(1, 3), slice(0, 2), slice(1, 3))
    got = hf._read_leaf_part(found, slots, np.dtype(np.float32), cuts)
    np.testing.assert_array_equal(got, values.swapaxes(1, 2)[cuts])
    assert got.shape == (2, 2, 2)
    assert math.prod(got.shape) == 8
