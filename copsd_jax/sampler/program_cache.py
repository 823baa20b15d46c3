"""Cache of the sampler's compiled programs.

A program is a function with its static arguments, shapes, shardings, mesh and precision of
products, and is compiled once. Compiling ahead of the call gives the number of compilations, their
time and their memory as plain numbers.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Program(NamedTuple):
    """A compiled program and its costs."""

    name: str
    call: Callable
    seconds: float  # of compilation
    temporary: int  # bytes on each device besides arguments and results
    held: int  # bytes of arguments and results on each device


_PROGRAMS: dict[Any, Program] = {}


def get_program(
    name: str, function: Callable, static: tuple, args: tuple, donate: tuple, shardings: Any
) -> Program:
    """Returns `function(*static, *args)` compiled for these arguments.

    Args:
      name: for reports.
      function: the function to compile.
      static: its first arguments, hashable.
      args: its other arguments, which may be jax.ShapeDtypeStructs with shardings.
      donate: indices among all arguments of those whose buffers become results.
      shardings: of the results; None leaves them to the compiler.
    """
    leaves, tree = jax.tree.flatten((args, shardings))
    shapes = tuple((x.shape, x.dtype, x.sharding) if hasattr(x, "shape") else x for x in leaves)
    scope = jax.sharding.get_mesh(), jax.config.values["jax_default_matmul_precision"]
    key = (function, static, tree, shapes, donate, scope)
    if key not in _PROGRAMS:
        started = time.perf_counter()
        jitted = jax.jit(
            function, static_argnums=tuple(range(len(static))), donate_argnums=donate,
            out_shardings=shardings,
        )  # fmt: skip
        compiled = jitted.lower(*static, *args).compile()
        memory: Any = compiled.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        _PROGRAMS[key] = Program(
            name, compiled, time.perf_counter() - started,
            memory.temp_size_in_bytes, held - memory.alias_size_in_bytes,
        )  # fmt: skip
    return _PROGRAMS[key]


def list_programs() -> tuple[Program, ...]:
    """Returns all programs so far, in the order of their compilation."""
    return tuple(_PROGRAMS.values())
