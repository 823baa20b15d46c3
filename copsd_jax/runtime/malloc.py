"""Setting of glibc's malloc with which a CPU run keeps freed memory instead of returning it.

XLA allocates the temporary memory of a program again at each call. By default, glibc takes blocks
of such sizes from the system, and returns them when they are freed. So the system has to clear
every page again at each call. This takes 10 to 20 % of the processor time of a training step that
is one micro-batch on a CPU (benchmarks/results/step.md). The setting does not change the peak of
resident memory.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def may_have_accelerator() -> bool:
    """Returns whether JAX may find a device other than a CPU; does not start JAX."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None


def keep_freed_memory() -> bool:
    """Tells malloc to keep freed memory, in one arena for all threads; returns whether it will.

    Call it before JAX starts its threads. Otherwise each thread may get its own arena. The call
    changes only speed. With an accelerator, or with a C library other than glibc, it does nothing
    and returns False.
    """
    if may_have_accelerator() or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*pair) for pair in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)))
