"""Times block sizes of the divergence kernels on this machine's device and prints the fastest.

    python benchmarks/tune_loss.py --width=2048 --vocabulary=151936 [--head] [--dtype=float32]

The search starts from the sizes chosen by `losses/pallas/block_sizes.py`. One size at a time is
changed, as long as the time falls and a block's temporaries stay below --memory bytes. The search
is done with one head for student and teacher, and again with two heads. The script prints a line of
JSON for each candidate. For each search, it also prints the best sizes and the initial sizes.

--width is the width of the model. On a TPU, the kernels pad the width; the padded width is measured
and printed. --vocabulary is the number of rows of the head on one device. This number is smaller
than the model's vocabulary if the mesh axis `tensor` splits the head.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from copsd_jax.losses import divergences, split_vocabulary, token_values
from copsd_jax.losses.pallas import block_sizes, dispatch

CHOICES = {
    "tpu": {
        "tokens": (512, 1024, 1536, 2048, 3072, 4096),
        "vocab": (256, 512, 1024, 2048),
        "rows": (128, 256, 512),
    },
    "gpu": {
        "tokens": (256, 512, 1024, 2048, 4096),
        "vocab": (1024, 2048, 4096, 8192),
        "warps": (4, 8, 16),
    },
}


def neighbours(
    sizes: block_sizes.Blocks, choices: dict[str, tuple[int, ...]]
) -> list[block_sizes.Blocks]:
    """Returns the sizes in which one size is one step larger or smaller."""
    found = []
    for name, values in choices.items():
        now = getattr(sizes, name)
        below, above = [x for x in values if x < now], [x for x in values if x > now]
        found += [dataclasses.replace(sizes, **{name: x}) for x in below[-1:] + above[:1]]
    return [x for x in found if x.tokens % min(x.rows, x.tokens) == 0]


def inputs(args: argparse.Namespace, width: int, tied: bool) -> tuple:
    """Returns hidden states, heads, tokens and weights; columns beyond args.width are zero."""
    rng = np.random.default_rng(0)
    beside = ((0, 0), (0, width - args.width))

    def draw(rows: int) -> jax.Array:
        drawn = rng.standard_normal((rows, args.width), np.float32)
        return jnp.asarray(np.pad(drawn, beside), args.dtype)

    arrays = draw(args.tokens), draw(args.tokens), draw(args.vocabulary)
    head_t = None if tied else draw(args.vocabulary)
    ids = rng.integers(0, args.vocabulary, args.tokens).astype(np.int32)
    weight_T = jnp.full((args.tokens,), 1 / args.tokens, jnp.float32)
    return (*arrays, head_t, jnp.asarray(ids), weight_T)


def seconds(
    args: argparse.Namespace, sweep: Any, sizes: block_sizes.Blocks, arrays: tuple
) -> float:
    """Returns the median time in seconds, or infinity if the program fails."""
    settings = divergences.Divergence(args.divergence, clip_mode=args.clip_mode)

    @jax.jit
    def run(*arrays):
        hidden_s, hidden_t, head_s, head_t, tokens, weight = arrays
        heads = (head_s,) if head_t is None else (head_s, head_t)
        shard = split_vocabulary.VocabularyShard(None, None)
        constants = split_vocabulary.Sweep(settings, heads, shard, train_head=args.head)
        rows = (hidden_s, hidden_t), token_values.TokenInputs(tokens, weight, None, None)
        return sweep(constants, rows, sizes, bool(args.interpret))

    times = []
    try:
        for _ in range(args.repetitions + 1):
            start = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            times.append(time.perf_counter() - start)
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # mostly lack of memory
        print(json.dumps({"sizes": dataclasses.asdict(sizes), "error": str(error)[:200]}))
        return float("inf")
    return statistics.median(times[1:])


def search(start: block_sizes.Blocks, choices: dict[str, tuple[int, ...]], measure: Any) -> tuple:
    """Moves to the fastest neighbour until none is faster; returns (sizes, seconds)."""
    known = {start: measure(start)}
    best = start
    while True:
        for sizes in neighbours(best, choices):
            if sizes not in known:
                known[sizes] = measure(sizes)
        fastest = min(known, key=lambda sizes: known[sizes])
        if fastest == best:
            return best, known[best]
        best = fastest


def tune(
    parser: argparse.ArgumentParser, args: argparse.Namespace, platform: str, tied: bool
) -> None:
    """Searches and prints the fastest sizes, with one head (`tied`) or two heads."""
    kernel = dispatch.KERNELS[f"pallas_{platform}"]
    width = args.width + -args.width % kernel.lanes
    rule: Any = {"tpu": block_sizes.choose_tpu, "gpu": block_sizes.choose_gpu}[platform]
    shape = jax.devices()[0].device_kind, width, args.vocabulary, jnp.dtype(args.dtype)
    arrays = inputs(args, width, tied)
    most = args.memory / (
        args.vocabulary * block_sizes.entry_bytes(platform, jnp.dtype(args.dtype))
    )

    def measure(sizes: block_sizes.Blocks) -> float:
        if sizes.tokens > most:
            return float("inf")
        took = seconds(args, kernel.sweep, sizes, arrays)
        line = {"tied": tied, "sizes": dataclasses.asdict(sizes), "seconds": took}
        print(json.dumps(line), flush=True)
        return took

    fits = [x for x in CHOICES[platform]["tokens"] if x <= most]
    if not fits:
        parser.error(f"--memory is {args.memory:.3g}: only {most:.0f} tokens of a block fit")
    start = rule(*shape, tied=tied, train_head=args.head)
    start = dataclasses.replace(start, tokens=min(start.tokens, fits[-1]))
    best, took = search(start, CHOICES[platform], measure)
    if took == float("inf"):
        parser.error("no candidate ran: the errors are in the lines above")
    line = {
        "device": shape[0], "width": width, "vocabulary": args.vocabulary, "dtype": args.dtype,
        "head": args.head, "tied": tied, "rule": dataclasses.asdict(start),
        "best": dataclasses.asdict(best), "best_seconds": took,
    }  # fmt: skip
    print(json.dumps(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--head", action="store_true", help="the student's head is trained too")
    parser.add_argument("--divergence", choices=dispatch.DIVERGENCES, default="jsd")
    parser.add_argument("--clip_mode", choices=divergences.CLIP_MODES, default="none")
    parser.add_argument("--memory", type=float, default=2e9, help="bytes of a block's temporaries")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--interpret", choices=("tpu", "gpu"), default="",
        help="test this script without such a device; its times are not meaningful",
    )  # fmt: skip
    args = parser.parse_args()
    device = jax.devices()[0]
    platform = args.interpret or device.platform
    if platform not in CHOICES:
        parser.error(f"the device is {device.platform}: the kernels run on tpu and gpu")
    for tied in (True, False):
        tune(parser, args, platform, tied)
    return 0


if __name__ == "__main__":
    sys.exit(main())
