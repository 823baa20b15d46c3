"""Data sets of the Hugging Face hub, and local folders with the hub's layout, through `datasets`.

The package `datasets` is optional. It runs no code of a data set: it refuses loading scripts since
version 4.
"""

import importlib
import os
import re
from collections.abc import Iterable
from typing import Any


def read(path: str, setting: str) -> Iterable[dict[str, Any]]:
    """Returns the records of `hf:OWNER/NAME[/CONFIG][@REVISION]:SPLIT` or `hf:FOLDER:SPLIT`.

    A name that begins with `/`, `.` or `~` is a local folder.

    Args:
      path: the data set.
      setting: the name of the setting that gives `path`, for error messages.

    Raises:
      ValueError: the package `datasets` is absent, or the data set cannot be loaded; the message is
        one sentence that names the setting.
    """
    name, colon, split = path.removeprefix("hf:").rpartition(":")
    folder = os.path.expanduser(name)
    local = name.startswith(("/", ".", "~"))
    named: Any = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@([\w./-]+))?", name)
    if not colon or not split or not (local or named):
        raise ValueError(
            f"{setting} is {path!r}: write hf:OWNER/NAME:SPLIT, hf:OWNER/NAME/CONFIG:SPLIT or "
            "hf:./FOLDER:SPLIT"
        )
    if local and not os.path.isdir(folder):
        raise FileNotFoundError(f"{setting} is {path!r}: there is no folder {name!r}")
    try:
        # An optional package, imported lazily for its import time.
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"{setting} is {path!r}: it needs the package datasets; install it with "
            "pip install 'copsd_jax[datasets]'"
        ) from error
    place, config, revision = (folder, None, None) if local else named.groups()
    try:
        found = datasets.load_dataset(place, config, split=split, revision=revision)
    # datasets, huggingface_hub, pyarrow and fsspec raise errors of many types.
    except Exception as error:
        first = " ".join(str(error).split())[:300] or "no reason is given"
        raise ValueError(
            f"{setting} is {path!r}: datasets cannot load it ({type(error).__name__}: {first})"
        ) from error
    return found
