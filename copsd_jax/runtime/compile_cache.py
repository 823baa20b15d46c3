"""A folder that keeps compiled programs, so that later starts compile less.

The cache is JAX's own. A program's key contains its code, the compiler's flags and version, and the
devices. The folder's name adds the features of the CPU, because a program that was compiled on
another CPU may use instructions that this CPU lacks. The cache never changes a number.
"""

import collections
import hashlib
import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import jax

LARGEST = 4 << 30  # bytes; JAX removes the programs that were not used for the longest time
LEAST_SECONDS = 0.2  # programs that compile in less time are not kept

_counts: collections.Counter[str] = collections.Counter()


def open_compile_cache(folder: str) -> None:
    """Opens the cache, unless `folder` is empty.

    If the user has chosen a folder for JAX's cache, for example with the environment variable
    JAX_COMPILATION_CACHE_DIR, that folder is used.

    Args:
      folder: the value of the setting compile.cache.

    Raises:
      ValueError: the folder cannot be created.
    """
    if not _counts:
        jax.monitoring.register_event_listener(lambda event, **_: _counts.update([event]))
        _counts["listening"] = 1
    if not folder or _read_folder():
        return
    path = pathlib.Path(folder).expanduser() if folder != "auto" else _find_user_cache()
    path /= _name_machine()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if folder == "auto":  # a home directory may be missing, or read-only
            return
        raise ValueError(
            f"compile.cache is {folder!r}: the folder cannot be created ({error.strerror})"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def describe_compile_cache() -> str:
    """Returns a line that says how many programs were in the cache; "" if there is no cache."""
    if not (folder := _read_folder()):
        return ""
    found, added = (_counts[f"/jax/compilation_cache/cache_{name}"] for name in ("hits", "misses"))
    return f"compiled programs: {found} were in {folder}, {added} are new"


def _read_folder() -> str | None:
    options: Any = jax.config  # type checkers do not know JAX's options
    return options.jax_compilation_cache_dir


def _find_user_cache() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path("~/.cache").expanduser()
    return pathlib.Path(base) / "copsd_jax" / "compiled"


def _name_machine() -> str:
    """Returns a name for this kind of CPU, these versions, and these compiler flags."""
    features = [platform.machine(), jax.__version__, importlib.metadata.version("jaxlib")]
    features += [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kinds = ("flags", "Features", "model name")
        features += sorted({line for line in lines if line.startswith(kinds)})
    except OSError:
        features.append(platform.processor())
    return f"jax-{jax.__version__}-{hashlib.sha256(repr(features).encode()).hexdigest()[:12]}"
