"""The compiled programs of the sampler: each is built once for its shapes, and kept.

A program is a function with its static arguments, shapes, shardings, mesh and precision of
products. Compiling ahead of the call gives the number of compilations, their time and their memory
as plain numbers.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Program(NamedTuple):
    """A compiled program, and what it costs."""

    name: str
    call: Callable
    seconds: float  # of compilation
    temporary: int  # bytes on each device, besides arguments and results
    held: int  # bytes of arguments and results on each device


_BUILT: dict[Any, Program] = {}


def get_program(
    name: str, function: Callable, static: tuple, args: tuple, donate: int | None, places: Any
) -> Program:
    """`function(*static, *args)` compiled for these arguments, which may be ShapeDtypeStructs.

    Args:
      name: for reports.
      static: hashable.
      donate: the argument, of all, whose buffers become results; None for none.
      places: shardings of the results; None leaves them to the compiler.
    """
    leaves, tree = jax.tree.flatten((args, places))
    shapes = tuple((x.shape, x.dtype, x.sharding) if hasattr(x, "shape") else x for x in leaves)
    scope = jax.sharding.get_mesh(), jax.config.values["jax_default_matmul_precision"]
    key = (function, static, tree, shapes, donate, scope)
    if key not in _BUILT:
        begun = time.perf_counter()
        numbers = tuple(range(len(static)))
        jitted = jax.jit(
            function, static_argnums=numbers, donate_argnums=() if donate is None else donate,
            out_shardings=places,
        )  # fmt: skip
        compiled = jitted.lower(*static, *args).compile()
        memory: Any = compiled.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        _BUILT[key] = Program(
            name, compiled, time.perf_counter() - begun,
            memory.temp_size_in_bytes, held - memory.alias_size_in_bytes,
        )  # fmt: skip
    return _BUILT[key]


def list_programs() -> tuple[Program, ...]:
    """All programs so far, in the order in which they were compiled."""
    return tuple(_BUILT.values())
