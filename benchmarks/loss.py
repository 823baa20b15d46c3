"""Time and memory of the divergence and its gradient, compared with a floor and with other forms.

    python benchmarks/loss.py --shape=smollm2 --tokens=512,2048 [--head] [--dtype=float32]

The floor is the time of the matmuls that every exact form needs, measured in the same run: the
logits of student and teacher, and the gradient of the hidden states. With --head, the gradient of
the head is added. The forms take turns, so other load on the machine affects all forms alike. The
script prints one line of JSON for each form:

  chunked, dense, pallas   `divergence_loss.divergence` (pallas if the platform has kernels)
  remat_chunked            blocks under jax.checkpoint with automatic differentiation
  liger, trl               public torch losses, on a GPU if they can be imported

  seconds           minimum over the repetitions; `seconds_median` is the median
  cpu_seconds       minimum processor time of all threads
  temporary_bytes   memory besides the arguments and the gradients, as reported by XLA; for torch,
                    the peak minus the memory in use after the call
  matmuls           number of matmuls, in units of 2 T D V FLOP

If a form fails, for example because memory is exhausted, its line has `failed`. The other forms
still run, and the exit code is 1.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

# Otherwise JAX would reserve most of a GPU's memory, and too little would be left for torch. The
# variable must be set before jax is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from copsd_jax.losses import dense, divergence_loss, divergences, precision, token_blocks

# Width and vocabulary of the head.
SHAPES = {
    "smollm2": (576, 49152),
    "qwen3-0.6b": (1024, 151936),
    "qwen3-1.7b": (2048, 151936),
    "qwen3-4b": (2560, 151936),
    "qwen3-8b": (4096, 151936),
}
FORMS = ("floor", "chunked", "remat_chunked", "dense", "pallas", "liger", "trl")


def arrays(tokens: int, width: int, vocabulary: int, live: float) -> tuple[np.ndarray, ...]:
    """Returns float32 hidden states of student and teacher, a shared head, tokens and weights."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    weight_T = (rng.random(tokens) < live).astype(np.float32) / tokens
    head = draw(vocabulary, width) * np.float32(2 / width**0.5)
    sampled_T = rng.integers(0, vocabulary, tokens).astype(np.int32)
    return draw(tokens, width), draw(tokens, width), head, sampled_T, weight_T


def matmuls(jaxpr: Any, trips: int, times: int = 1) -> int:
    """Counts the FLOP of all matmuls in a jaxpr; `trips` is the trip count of while loops."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = int(np.prod([eqn.invars[0].aval.shape[axis] for axis in contract]))
            total += times * 2 * inner * eqn.outvars[0].aval.size
        length = eqn.params.get("length", trips if eqn.primitive.name == "while" else 1)
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            total += matmuls(sub, trips, times * length)
    return total


def floor(hidden_s, hidden_t, head, tokens_T, weight_T, *, train_head: bool) -> tuple:
    """Computes only the needed matmuls, with results in the dtype of the hidden states."""
    del tokens_T, weight_T
    dot = lambda a, b, *axes: precision.dot(a, b, *axes).astype(a.dtype)  # noqa: E731
    dz_TV, teacher_TV = dot(hidden_s, head, 1, 1), dot(hidden_t, head, 1, 1)
    grad_hidden_TD = dot(dz_TV, head, 1, 0)
    return grad_hidden_TD, dot(dz_TV, hidden_s, 0, 0) if train_head else None, teacher_TV


def ours(hidden_s, hidden_t, head, tokens_T, weight_T, *, train_head, name, settings, chunk, chip):
    """Computes loss and gradient of `divergence_loss.divergence`, as in training on this chip."""

    def loss(hidden_s, head_s):
        shared = head if not train_head else jax.lax.stop_gradient(head)
        return divergence_loss.divergence(
            hidden_s, hidden_t, head_s if train_head else shared, shared, tokens_T, weight_T,
            settings, implementation=name, chunk=chunk, train_head=train_head,
            kernel=divergence_loss.KernelOptions(chip=chip),
        )  # fmt: skip

    grad = jax.value_and_grad(loss, (0, 1) if train_head else 0, has_aux=True)
    return grad(hidden_s, head)


def remat(hidden_s, hidden_t, head, tokens_T, weight_T, *, train_head, settings, chunk):
    """Computes loss and gradient in blocks whose logits are recomputed in the backward pass.

    The last block is padded with rows of weight zero.
    """
    step = min(chunk, len(weight_T))

    def loss(hidden_s, head_s):
        fixed = jax.lax.stop_gradient(head)

        @jax.checkpoint
        def block(total, rows):
            hidden_s, hidden_t, tokens_T, weight_T = rows
            z_s, z_t = precision.dot(hidden_s, head_s, 1, 1), precision.dot(hidden_t, fixed, 1, 1)
            value_T, _ = dense.compute_values(z_s, jax.lax.stop_gradient(z_t), tokens_T, settings)
            return total + jnp.sum(value_T * weight_T), None

        rows = (hidden_s, hidden_t, tokens_T, weight_T)
        rows = jax.tree.map(lambda x: token_blocks.pad(x, step), rows)
        blocks = jax.tree.map(lambda x: x.reshape(-1, step, *x.shape[1:]), rows)
        return jax.lax.scan(block, jnp.zeros((), jnp.float32), blocks)[0]

    return jax.value_and_grad(loss, (0, 1) if train_head else 0)(hidden_s, head)


def jax_forms(args: argparse.Namespace, settings: divergence_loss.Divergence, device: Any) -> dict:
    """Returns {form: function of the arrays}."""
    common = {"train_head": args.head, "settings": settings, "chunk": args.chunk}
    mine = common | {"chip": device.device_kind}
    forms: dict[str, Callable] = {"floor": functools.partial(floor, train_head=args.head)}
    for name in ("chunked", "dense"):
        forms[name] = functools.partial(ours, name=name, **mine)
    forms["remat_chunked"] = functools.partial(remat, **common)
    if device.platform != "cpu":
        name = divergence_loss.resolve_implementation("pallas", settings, device.platform)
        forms["pallas"] = functools.partial(ours, name=name, **mine)
    return forms


def torch_forms(args: argparse.Namespace, data: tuple) -> tuple[dict, dict]:
    """Returns {form: call without arguments}, {form: reason why it is left out}."""
    try:
        import torch
    except ImportError as error:
        return {}, dict.fromkeys(("liger", "trl"), str(error))
    if not torch.cuda.is_available():
        return {}, dict.fromkeys(("liger", "trl"), "torch sees no GPU")
    if args.divergence != "jsd":
        return {}, dict.fromkeys(("liger", "trl"), "only --divergence=jsd is supported")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    hidden_s, hidden_t, head = (torch.tensor(x, device="cuda", dtype=dtype) for x in data[:3])
    labels = torch.tensor(data[3], device="cuda", dtype=torch.int64)
    hidden_s.requires_grad_(True)
    head_s = head.clone().requires_grad_(True) if args.head else head

    def graded(loss: Callable) -> Callable:
        def call() -> None:
            hidden_s.grad = head_s.grad = None
            loss().backward()
            torch.cuda.synchronize()

        return call

    forms, left_out = {}, {}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=args.beta)
        forms["liger"] = graded(lambda: liger(hidden_s, head_s, hidden_t, head, labels))
    except (ImportError, TypeError) as error:
        left_out["liger"] = str(error)
    try:
        from trl.experimental.gkd import GKDTrainer

        plain = functools.partial(GKDTrainer.generalized_jsd_loss, beta=args.beta)
        forms["trl"] = graded(
            lambda: plain((hidden_s @ head_s.T)[None], (hidden_t @ head.T)[None], labels[None])
        )
    except ImportError as error:
        left_out["trl"] = str(error)
    return forms, left_out


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Returns the wall and processor seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - wall, time.process_time() - cpu


FAILURES = (RuntimeError, ValueError, MemoryError)  # errors of jax and torch are RuntimeErrors


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:400]


def compile_form(args: argparse.Namespace, name: str, form: Callable, placed: list) -> tuple:
    """Compiles a form; returns a call without arguments, and fields of the form's line."""
    width, vocabulary = SHAPES[args.shape]
    tokens = len(placed[0])
    traced = jax.jit(form).trace(*placed)
    compiled = traced.lower().compile()
    flop = matmuls(traced.jaxpr.jaxpr, -(-tokens // args.chunk))
    memory: Any = compiled.memory_analysis()
    return functools.partial(compiled, *placed), {
        "matmuls": None if name == "pallas" else flop / (2 * tokens * width * vocabulary),
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def prepare(args: argparse.Namespace, tokens: int) -> tuple[dict, dict, dict, dict]:
    """Compiles the forms.

    Returns:
      {form: call without arguments}, {form: fields of its line}, {form: reason why it is left out},
      {form: error}.
    """
    width, vocabulary = SHAPES[args.shape]
    device = jax.devices()[0]
    settings = divergence_loss.Divergence(
        args.divergence, beta=args.beta, clip_mode=args.clip_mode, temperature=1.1
    )
    data = arrays(tokens, width, vocabulary, args.live)
    dtype = jnp.dtype(args.dtype)
    placed = [jax.device_put(jnp.asarray(x, dtype), device) for x in data[:3]]
    placed += [jax.device_put(x, device) for x in data[3:]]
    forms = jax_forms(args, settings, device)
    calls, known, failed = {}, {}, {}
    for name in [name for name in FORMS if name in forms and name in args.forms]:
        try:
            calls[name], known[name] = compile_form(args, name, forms[name], placed)
        except FAILURES as error:
            failed[name] = reason(error)
    torches, left_out = {}, {}
    if device.platform == "gpu":
        try:
            torches, left_out = torch_forms(args, data)
        except RuntimeError as error:  # not enough memory for the arrays
            failed |= dict.fromkeys(("liger", "trl"), reason(error))
    for name in [name for name in torches if name in args.forms]:
        calls[name], known[name] = torches[name], {"matmuls": None}
    return calls, known, left_out, failed


def torch_peak(call: Callable) -> int:
    """Returns the peak bytes of a call, minus the bytes still allocated when it has returned."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()


def repeat(calls: dict, known: dict, failed: dict, repetitions: int) -> dict[str, list]:
    """Returns {form: (wall, processor) seconds of each turn} for the forms that do not fail.

    The first call of each form is a warm-up. A form that fails is moved from `calls` to `failed`.
    """
    times: dict[str, list] = {}
    for turn in range(repetitions + 1):
        for name, call in list(calls.items()):
            try:
                took = timed(call)
                if turn:
                    times.setdefault(name, []).append(took)
                elif name in ("liger", "trl"):
                    known[name]["temporary_bytes"] = torch_peak(call)
            except FAILURES as error:
                failed[name] = reason(error)
                del calls[name]
                times.pop(name, None)
    return times


def measure(args: argparse.Namespace, tokens: int) -> bool:
    """Prints a line for each form; returns whether no form failed."""
    calls, known, left_out, failed = prepare(args, tokens)
    times = repeat(calls, known, failed, args.repetitions)
    common = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "shape": args.shape,
        "tokens": tokens, "dtype": args.dtype, "head": args.head, "live": args.live,
        "divergence": args.divergence, "clip_mode": args.clip_mode, "chunk": args.chunk,
    }  # fmt: skip
    least = {name: min(wall for wall, _ in pairs) for name, pairs in times.items()}
    for name, pairs in times.items():
        line = common | {
            "form": name,
            "seconds": least[name],
            "seconds_median": statistics.median(wall for wall, _ in pairs),
            "cpu_seconds": min(cpu for _, cpu in pairs),
            "floor_fraction": least["floor"] / least[name] if "floor" in least else None,
            **known[name],
        }
        print(json.dumps(line), flush=True)
    for word, names in (("skipped", left_out), ("failed", failed)):
        for name, why in names.items():
            print(json.dumps(common | {"form": name, word: why}), flush=True)
    return not failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    platform = jax.devices()[0].platform
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--tokens", default="512,2048")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"),
        default="float32" if platform == "cpu" else "bfloat16",
    )  # fmt: skip
    parser.add_argument("--head", action="store_true", help="the student's head is trained too")
    parser.add_argument("--divergence", choices=("fkl", "rkl", "jsd"), default="jsd")
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--clip_mode", choices=divergences.CLIP_MODES, default="none")
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--live", type=float, default=1.0, help="share of rows with nonzero weight")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    args.forms = args.forms.split(",")
    fine = [measure(args, tokens) for tokens in map(int, args.tokens.split(","))]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
