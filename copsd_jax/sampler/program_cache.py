"""Cache of the sampler's compiled programs.

A program is identified by its function, static arguments, shapes, shardings, mesh and matmul
precision. Each program is compiled once, explicitly, before its first call. Reports can therefore
state the number of compiled programs, and each program's compilation time and memory.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Program(NamedTuple):
    """A compiled program and its costs."""

    name: str
    call: Callable
    seconds: float  # compilation time
    temporary: int  # number of bytes of temporary memory per device
    held: int  # number of bytes of arguments and results per device


_PROGRAMS: dict[Any, Program] = {}


def get_program(
    name: str, function: Callable, static: tuple, args: tuple, donate: tuple, shardings: Any
) -> Program:
    """Returns the program of `function(*static, *args)` for the shapes and shardings of `args`.

    Args:
      name: the program's name in reports.
      function: the function to compile.
      static: the first arguments of `function`, which are static and hashable.
      args: the other arguments of `function`, which may be jax.ShapeDtypeStructs with shardings.
      donate: indices of the donated arguments, counted over `static` and `args` together.
      shardings: shardings of the results; None lets the compiler choose.
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
    """Returns all programs compiled so far, in the order of their compilation."""
    return tuple(_PROGRAMS.values())
