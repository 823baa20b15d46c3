"""Oracle: the system's count of pages that a process had cleared for it."""

import os
import pathlib
import platform
import subprocess
import sys

import conftest
import pytest

from copsd_jax.runtime import malloc

# Blocks as large as XLA's, in a thread as XLA's, written three times; pages of the last two.
SCRIPT = """
import ctypes, resource, sys, threading
from copsd_jax.runtime import malloc
if sys.argv[1] == "keep":
    assert malloc.keep_freed_memory()
libc, size = ctypes.CDLL(None), ctypes.c_size_t(200 << 20)
libc.malloc.restype = ctypes.c_void_p
def block():
    pointer = ctypes.c_void_p(libc.malloc(size))
    libc.memset(pointer, 1, size)
    libc.free(pointer)
def work():
    block()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block()
    block()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def cleared(mode: str) -> int:
    env = {**os.environ, "PYTHONPATH": str(conftest.ROOT), "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode], env=env, check=True, capture_output=True, text=True
    )
    return int(out.stdout)


def large_pages() -> bool:
    """Whether the system clears 2 MiB at a time for everyone."""
    path = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.is_file() and "[always]" in path.read_text()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.skipif(large_pages(), reason="counts pages of 4 KiB, the system has larger ones")
def test_pages_of_a_freed_block_are_used_again():
    assert cleared("as it is") > 50_000  # 200 MiB twice, pages of 4 KiB
    assert cleared("keep") < 500


@pytest.mark.parametrize(
    "platforms, found, wanted",
    [("cpu", ["cuda"], False), ("cuda,cpu", [], True), ("", ["cuda"], True), ("", [], False)],
)
def test_only_without_an_accelerator(monkeypatch, platforms, found, wanted):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(malloc.importlib.metadata, "entry_points", lambda group: found)
    monkeypatch.setattr(malloc.importlib.util, "find_spec", lambda name: None)
    assert malloc.may_have_accelerator() is wanted
    if wanted:
        assert malloc.keep_freed_memory() is False


def test_libtpu_is_an_accelerator(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(malloc.importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(malloc.importlib.util, "find_spec", lambda name: object())
    assert malloc.may_have_accelerator() is True
