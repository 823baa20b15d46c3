"""Strict switches for all tests: a silent broadcast or promotion is an error."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's threads: with as many threads as devices, devices that wait for one another in a collective
# hold all of them, and on a machine with few cores the program now and then waits for ever.
os.environ.setdefault("NPROC", "32")
# Halves the time of compilation, which is most of the suite's time.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "copsd_jax_xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of large development files; a test that needs it skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the development data folder ../shared")
    return SHARED


# Files of few and long tests. pytest-xdist hands out whole files in this order.
LONGEST = (
    "methods bugs train policy_step export remote_run loss_matrix loss_sharded sampler settings "
    "divergence_kernels records train_step authors model sampler_weights sampler_processes "
    "losses main hf gguf losses_topk steps localise openai_api"
).split()


def pytest_collection_modifyitems(items: list) -> None:
    """The longest files first, so that no worker begins one when the others are done."""
    rank = {f"test_{name}.py": k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
