"""Strict switches for all tests: a silent broadcast or promotion is an error."""

import importlib.metadata
import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's threads: with as many threads as devices, devices that wait for one another in a collective
# hold all of them, and on a machine with few cores the program now and then waits for ever.
os.environ.setdefault("NPROC", "32")
# Compiling is most of the suite's time: the first halves it. The second takes two fifths off what
# is left; later releases do not know it, and would end at it.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
# Small programs compile faster in one piece: a sixth less time.
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "copsd_jax_xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def mostly_slow(values, quick: int = 1, several: bool = False) -> list:
    """Parameters of which `quick` run in `make test`, evenly spaced; the others are slow.

    Args:
      values: the values of one argument, or tuples with a value for each of `several` arguments.
    """
    values = list(values)
    kept = {i * len(values) // quick for i in range(quick)}
    return [
        pytest.param(*(value if several else [value]), marks=() if i in kept else pytest.mark.slow)
        for i, value in enumerate(values)
    ]


OLD_JAX = jax.__version__.startswith("0.10.")
# `compiler_options` that undo the second flag, for zeros that are exact only with users' fusions.
FUSED = {"xla_cpu_use_fusion_emitters": True} if OLD_JAX else {}
ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of large development files; a test that needs it skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the development data folder ../shared")
    return SHARED


@pytest.fixture(scope="module", autouse=True)
def _programs_end_with_their_file():
    """Each compiled program takes pages of its own, and Linux gives a process 65,530 ranges of
    them. A worker that kept those of all files had 38,000 when another ended by a segmentation
    fault, most likely for want of them."""
    yield
    jax.clear_caches()


# Files of few and long tests. pytest-xdist hands out whole files in this order.
LONGEST = (
    "sampler methods train divergence_loss api proposals train_step packed_rows records authors "
    "remote_run known_bugs truncation dry_run divergence_loss_topk transformer graders "
    "decode_attention_kernels row_attention policy_step export main sharded_step remat loss_matrix "
    "solution_steps launch handover token_spans setting_rules loss_compiled remote_engine "
    "row_packing step_compiled evaluate hf"
).split()


def pytest_collection_modifyitems(items: list) -> None:
    """The longest files first, so that no worker begins one when the others are done."""
    rank = {f"test_{name}.py": k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
