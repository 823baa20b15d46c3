"""Numbers that are not finite: the checks of trees of arrays, and the error that ends a run."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

SHOWN = 3  # number of arrays that a message names


class NonFinite(Exception):
    """Numbers that are NaN or infinite where all must be finite, described in one sentence."""


def is_finite(tree: Any) -> jax.Array:
    """Returns a bool scalar, which is True if all numbers in a tree of arrays are finite."""
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, finite, jnp.bool_(True))


@jax.jit
def _check_arrays(arrays: list[jax.Array]) -> list[jax.Array]:
    return [is_finite(x) for x in arrays]


def find_nonfinite(tree: Any) -> list[str]:
    """Finds the arrays of a tree that contain NaN or an infinity; returns their paths."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    finite = jax.device_get(_check_arrays([x for _, x in named]))
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, _), good in zip(named, finite, strict=True)
        if not good
    ]


def check_finite(tree: Any, owner: str) -> None:
    """Checks that all numbers of a tree of arrays are finite.

    Raises:
      NonFinite: a number is not finite; the message names the owner and the arrays.
    """
    if found := find_nonfinite(tree):
        more = f" and {len(found) - SHOWN} more arrays" if len(found) > SHOWN else ""
        raise NonFinite(f"{owner}: not all numbers are finite in {', '.join(found[:SHOWN])}{more}")


def spell_numbers(value: Any) -> Any:
    """Replaces NaN and infinite numbers in a JSON value by the texts "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {name: spell_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [spell_numbers(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
