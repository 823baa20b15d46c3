"""Memory that a CPU run has freed stays its own, instead of going back to the system at once.

XLA allocates the temporary memory of a program anew at each call. glibc takes blocks of such sizes
from the system and gives them back when they are freed, so each call has every page of it cleared
again: 10 to 20 % of the processor time of a training step on a CPU that is one micro-batch
(benchmarks/results/step.md).
The most that is resident at a time is the same.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

# Names of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def may_have_accelerator() -> bool:
    """Returns whether JAX may find another device than a CPU; called before JAX starts."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None


def keep_freed_memory() -> bool:
    """Tells malloc to keep freed memory, in one arena for all threads; returns whether it will.

    It must be called before JAX starts its threads, which would otherwise have arenas of their own.
    It changes speed alone. With an accelerator, or a C library other than glibc, it does nothing.
    """
    if may_have_accelerator() or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*pair) for pair in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)))
