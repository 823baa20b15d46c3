"""Oracle: the fraction of a GPU's memory that JAX documents."""

from copsd_jax.runtime import hardware


def test_jax_takes_part_of_a_gpu(monkeypatch):
    h100, v5e = (hardware.CHIPS[kind] for kind in ("NVIDIA H100 80GB HBM3", "TPU v5 lite"))
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert hardware.compute_usable_memory(h100) == 0.75 * h100.usable
    assert hardware.compute_usable_memory(v5e) == 15.75 * 2**30
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert hardware.compute_usable_memory(h100) == 0.9 * h100.usable
