"""The user's function log.callback, which sees the metrics of each step and may stop the run."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from copsd_jax.runtime import processes

Callback = Callable[[int, dict[str, float]], object]


def import_callback(name: str) -> Callback | None:
    """Imports the function that log.callback names, as "module:function"; returns None for "".

    Raises:
      ValueError: the function cannot be imported, or cannot be called with two arguments.
    """
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        if not function:
            raise ValueError("the name has no colon")
        found: Any = getattr(importlib.import_module(module), function)
        inspect.signature(found).bind(1, {})
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"log.callback is {name!r}: it must be module:function, which names an importable "
            f"function of (step, metrics); {type(error).__name__}: {error}"
        ) from error
    return found


def ask_callback(callback: Callback | None, step: int, values: Mapping[str, Any]) -> bool:
    """Calls the function on the leading process; returns whether it asks the run to stop.

    The function gets the number of the step, and the metrics as floats. It asks the run to stop by
    returning True; every other value means that the run goes on.
    """
    if callback is None:
        return False
    metrics = {name: float(value) for name, value in values.items()}
    return processes.run_on_leader(lambda: callback(step, metrics) is True)
