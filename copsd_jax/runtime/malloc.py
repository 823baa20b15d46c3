"""Settings of glibc's malloc that make a CPU run keep freed memory for later allocations.

XLA allocates a program's temporary memory anew each time the program is called. By default, glibc
requests large blocks of memory from the operating system, and returns each block when XLA frees the
block. Therefore the operating system has to clear every page again for each call of a program. For
a training step of one micro-batch on a CPU, clearing pages takes 10 to 20 % of the processor time
(benchmarks/results/step.md). Keeping freed memory does not change the peak of resident memory.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def may_have_accelerator() -> bool:
    """Returns whether JAX could find a device other than a CPU; does not start JAX."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None


def keep_freed_memory() -> bool:
    """Tells malloc to keep freed memory, in one arena for all threads; returns True on success.

    Call this function before JAX starts its threads. If the threads have already started, each
    thread may get its own arena. The function affects only speed. If JAX could find an accelerator,
    or if the C library is not glibc, the function does nothing and returns False.
    """
    if may_have_accelerator() or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*pair) for pair in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)))
