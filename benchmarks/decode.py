"""Sampling of texts of mixed lengths: slots with refills, fixed batches, transformers and tunix.

    python benchmarks/decode.py [--shape=smollm2_135m] [--pieces=4] [--floor] [--tunix=DIR]

The work is 64 prompts with 4 samples each. Each text has its own limit, drawn from a long-tailed
distribution (lognormal, sigma 1.2, clipped). No token ends a text, so every text has exactly as
many tokens as its limit. All systems use the same weights, prompts, limits and order, and sample at
temperature 1. All systems are warmed up before they are timed, and `seconds` does not include
`compile_seconds`. The script prints one line of JSON for each system:

  ours         our engine with slots: when the text of a slot ends, the slot gets the next text
  fixed        our engine, called once for each batch of `slots` texts. A batch runs until its
               longest text ends, and its cache is as long as this text needs.
  fixed_dense  fixed, with attention over the whole capacity of the cache
  torch        transformers' `generate` with the same batches, padded on the left. max_new_tokens is
               the longest limit of the batch.
  tunix        tunix's sampler in a separate environment (benchmarks/tunix_env.sh) with the same
               batches. As in tunix's trainers, one cache fits the longest prompt and limit.

Only tokens within a text's own limit are counted; other tokens that a batch draws are wasted.

  steps                 decode steps that the order of the texts needs
  occupancy             share of slots that draw a counted token; for `ours` while texts wait
  occupancy_to_the_end  the same share over all steps
  prompt_tokens         tokens of prompts that ran through the model, including padding
  logp_difference       largest difference from our log-probabilities of the first prompt

With --pieces=N the work is divided into N consecutive pieces, and the systems take turns piece by
piece. So other load on the machine affects all systems alike. `ours` must then drain its slots N
times; `drain` is the share of additional steps compared with a single queue.

--floor measures the memory bandwidth in the same run, by the product of a vector and a matrix as
large as the weights. --bandwidth gives the bandwidth in GB/s instead. `floor_fraction` is then the
ratio of the least possible time to the time taken. The least possible time is needed to read the
weights once per step at full occupancy, and each text's live cache once per token.

--context=N adds a line `step` with decode steps of all slots, at contexts of N/2 to 3N/2 tokens.
Their time is compared with the time to read the weights and the live cache. --context also adds a
line `step_stacked`, where the layers are always scanned. (On one CPU device, a run reads the layers
separately.)
"""

import argparse
import dataclasses
import heapq
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import decode_floor
import jax
import jax.numpy as jnp
import numpy as np

from copsd_jax.attention import decode_attention
from copsd_jax.model import policy as policy_lib
from copsd_jax.model import transformer
from copsd_jax.problems import bundled
from copsd_jax.runtime import sharding
from copsd_jax.sampler import loop, program_cache, request
from copsd_jax.weights import hf, hf_config, hub, tokenizer

HERE = pathlib.Path(__file__).parent
SIGMA = 1.2
SYSTEMS = ("ours", "fixed", "fixed_dense", "torch", "tunix")
FILES = {"smollm2_135m": hub.SMOLLM2}  # shapes with trained weights; other shapes have random ones
WARM_LIMIT = 4  # tokens of a text in the warm-up

Batch = list[int]  # indices of texts


class Model(NamedTuple):
    decoder: transformer.Decoder
    params: Any
    source: pathlib.Path  # path of the tokenizer, and of the weights if they are not random
    tokenizer: Any
    random: bool


class Work(NamedTuple):
    prompts: list[tuple[int, ...]]  # the prompt of each text
    limits: list[int]
    pieces: list[list[Batch]]


class Measured(NamedTuple):
    """Measurements of one piece."""

    seconds: float
    prompt_tokens: int
    occupancy: float | None = None  # while texts waited; None if no text waited


class Runner(NamedTuple):
    """A system that is warmed up."""

    piece: Callable[[int], Measured]  # runs the piece of this number
    known: dict  # fields of the system's line that are known before the first piece
    close: Callable[[], None]


# --- the work ---------------------------------------------------------------------------------


def draw_limits(count: int, median: float, maximum: int, seed: int) -> list[int]:
    """Draws the number of tokens of each text: lognormal, clipped to 1 to `maximum`."""
    normal = np.random.default_rng(seed).standard_normal(count)
    return np.clip(np.rint(median * np.exp(SIGMA * normal)), 1, maximum).astype(int).tolist()


def cut(count: int, slots: int, pieces: int) -> list[list[Batch]]:
    """Divides texts into consecutive batches of `slots` texts, and the batches into pieces.

    The numbers of batches in two pieces differ by at most one. For example, 6 texts, 2 slots and
    2 pieces give [[0, 1], [2, 3]], [[4, 5]].

    Raises:
      ValueError: if a batch would not be full, or a piece would have no batch.
    """
    if slots < 1 or count % slots:
        raise ValueError(f"--slots={slots} must divide the {count} texts (--prompts x --samples)")
    if not 1 <= pieces <= count // slots:
        raise ValueError(f"--pieces={pieces}: there are only {count // slots} batches to divide")
    parts = np.array_split(np.arange(count).reshape(-1, slots), pieces)
    return [part.tolist() for part in parts]


def flat(lists: Sequence[list]) -> list:
    return list(itertools.chain.from_iterable(lists))


def refilled_steps(limits: Sequence[int], slots: int) -> int:
    """Counts the decode steps until all texts have ended, if slots are refilled in order.

    For example, limits 5, 2, 3 with 2 slots need max(5, 2 + 3) = 5 steps.
    """
    busy = [0] * slots
    for limit in limits:
        heapq.heapreplace(busy, busy[0] + limit)
    return max(busy)


def batch_steps(limits: Sequence[int], batches: Sequence[Batch]) -> int:
    """Counts the decode steps of batches that run until their longest text ends.

    For example, limits 5, 2 in one batch and 3, 3 in the next need 5 + 3 steps.
    """
    return sum(max(limits[i] for i in batch) for batch in batches)


def make_work(args: argparse.Namespace, m: Model) -> Work:
    """Builds the work: samples of a prompt are consecutive, and each sample has its own limit."""
    rng = np.random.default_rng(args.seed + 1)
    if m.random:
        sizes = rng.integers(args.prompt_tokens // 2, args.prompt_tokens * 3 // 2, args.prompts)
        vocab = m.decoder.config.vocab_size
        prompts = [tuple(rng.integers(0, vocab, max(1, size)).tolist()) for size in sizes]
    else:
        lines = bundled.find_file("train").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line)["problem"] for line in lines]
        prompts = [_chat(m.tokenizer, rows[i % len(rows)]) for i in range(args.prompts)]
    count = args.prompts * args.samples
    return Work(
        [prompt for prompt in prompts for _ in range(args.samples)],
        draw_limits(count, args.median, args.max, args.seed),
        cut(count, args.slots, args.pieces),
    )


def _chat(tok: Any, text: str) -> tuple[int, ...]:
    messages = [{"role": "user", "content": text}]
    chat = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tok(chat, add_special_tokens=False)["input_ids"])


def load(args: argparse.Namespace) -> Model:
    """Loads trained weights, or makes random weights with the package's own tokenizer."""
    file = FILES.get(args.shape)
    source = hub.resolve_model_path(file or hub.TINY, setting="--shape")
    config, dtype, tok = (
        transformer.SHAPES[args.shape],
        jnp.dtype(args.dtype),
        tokenizer.load(source),
    )
    name = decode_attention.PLATFORM_IMPLEMENTATIONS[sharding.platform(sharding.current_mesh())]
    if file is not None:
        config = hf_config.load_config(source)
        params = hf.load_params(source, config, dtype)
    else:
        config = dataclasses.replace(config, vocab_size=max(config.vocab_size, len(tok)))
        params = transformer.init_params(config, jax.random.key(args.seed), dtype)
    decoder = transformer.Decoder(config, dtype, decode=name)
    return Model(decoder, params, source, tok, file is None)


# --- our engine -------------------------------------------------------------------------------


def _settings(
    args: argparse.Namespace, work: Work, texts: Sequence[int]
) -> request.SamplerSettings:
    need = max(len(work.prompts[i]) + work.limits[i] for i in texts)
    return request.SamplerSettings(
        slots=args.slots, length=request.round_up_slot_length(need), steps=args.steps,
        pack=args.pack, cache=jnp.dtype(args.cache or args.dtype),
    )  # fmt: skip


def _keys(args: argparse.Namespace, texts: Sequence[int]) -> np.ndarray:
    names = [f"prompt {i // args.samples}" for i in texts]
    samples = [i % args.samples for i in texts]
    return np.asarray(request.derive_sampling_keys(args.seed, "rollout", 0, names, samples))


def _warm(
    args, m: Model, work: Work, texts: list[int], settings: request.SamplerSettings, sampling
) -> None:
    """Compiles all programs that a call with these settings needs, and samples a few tokens."""
    prompts, keys_n2 = [work.prompts[i] for i in texts], _keys(args, texts)
    job = request.prepare_sampler_inputs(
        m.decoder, policy_lib.Policy(m.params), prompts, [sampling] * len(texts), keys_n2=keys_n2,
        settings=settings, prefix=None, vocabulary=None, limits=None,
    )  # fmt: skip
    loop.compile_programs(job)
    few = min(len(texts), 2 * args.slots)
    loop.generate(
        m.decoder, policy_lib.Policy(m.params), prompts[:few], sampling, keys=keys_n2[:few],
        settings=settings, limits=[WARM_LIMIT] * few,
    )  # fmt: skip


def engine_runner(args: argparse.Namespace, m: Model, work: Work, refill: bool) -> Runner:
    """Returns a runner that calls `loop.generate` once per piece, or once per batch."""
    begun, sampling = time.perf_counter(), request.Sampling(max_tokens=WARM_LIMIT)
    everything = list(range(len(work.limits)))
    calls = [[flat(piece)] if refill else piece for piece in work.pieces]
    sizes = [[_settings(args, work, everything if refill else t) for t in p] for p in calls]
    for settings in dict.fromkeys(size for piece in sizes for size in piece):
        _warm(args, m, work, everything, settings, sampling)
    keys = [[_keys(args, texts) for texts in piece] for piece in calls]

    def run(number: int) -> Measured:
        built, prompt_tokens, share = program_cache.list_programs(), 0, float("nan")
        started = time.perf_counter()
        for texts, size, key in zip(calls[number], sizes[number], keys[number], strict=True):
            limits = [work.limits[i] for i in texts]
            completions, stats = loop.generate(
                m.decoder, policy_lib.Policy(m.params), [work.prompts[i] for i in texts],
                sampling, keys=key, settings=size, limits=limits,
            )  # fmt: skip
            assert [len(c.ids) for c in completions] == limits
            prompt_tokens += stats.prompt_tokens
            share = stats.occupancy
        seconds = time.perf_counter() - started
        assert program_cache.list_programs() == built, "compiled while timed"
        return Measured(seconds, prompt_tokens, None if math.isnan(share) else share)

    known = {
        "compile_seconds": time.perf_counter() - begun, "calls": sum(map(len, calls)),
        "cache": sizes[0][0].cache.name, "cache_length": max(s.length for s in flat(sizes)),
    }  # fmt: skip
    return Runner(run, known, lambda: None)


def our_log_probs(m: Model, prompt: Sequence[int]) -> list[float]:
    """Returns the log-probability of each token of a prompt except the first, from one forward."""
    tokens_1L = jnp.asarray([list(prompt)], jnp.int32)
    positions_1L = jnp.arange(len(prompt), dtype=jnp.int32)[None]

    @jax.jit
    def forward(params):
        stream = transformer.Stream(tokens_1L, positions_1L, jnp.ones_like(tokens_1L))
        hidden_LD = m.decoder.apply({"params": params}, (stream,))[0].hidden_BLD[0, :-1]
        logits_LV = transformer.compute_model_logits(
            hidden_LD, transformer.get_head(params)
        ).astype(jnp.float32)
        logp_LV = jax.nn.log_softmax(logits_LV)
        return jnp.take_along_axis(logp_LV, tokens_1L[0, 1:, None], axis=1)[:, 0]

    return np.asarray(forward(m.params)).tolist()


# --- other systems, each in a separate process --------------------------------------------------


def write_work(folder: pathlib.Path, args: argparse.Namespace, m: Model, work: Work) -> None:
    """Writes the weights as a Hugging Face folder, and work.json for the other systems."""
    hf.save(
        folder / "weights", m.params, m.decoder.config, source_path=m.source, tokenizer=m.tokenizer
    )
    asked = {
        "weights": str(folder / "weights"), "dtype": args.dtype, "threads": cpus(),
        "seed": args.seed, "warm_limit": WARM_LIMIT, **work._asdict(),
        "logps": our_log_probs(m, work.prompts[0]),
    }  # fmt: skip
    (folder / "work.json").write_text(json.dumps(asked), encoding="utf-8")


def process_runner(command: list[str], folder: pathlib.Path) -> Runner:
    """Starts a process that prints a line of JSON when it is warm, and one for each piece.

    Raises:
      RuntimeError: if the process ends early; the message has the end of its error output.
    """
    with open(folder / "errors.txt", "w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [*command, str(folder / "work.json")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, text=True,
        )  # fmt: skip

    def answer() -> dict:
        for line in process.stdout or ():
            if line.startswith("{"):
                return json.loads(line)
        told = (folder / "errors.txt").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"{command[-1]} ended with code {process.wait()}: {told[-1500:]}")

    def run(number: int) -> Measured:
        print(number, file=process.stdin, flush=True)
        return Measured(**answer())

    def close() -> None:
        process.communicate()

    return Runner(run, answer(), close)


def missing(system: str, args: argparse.Namespace) -> str | None:
    """Returns why a system cannot be measured and how to change that, or None if it can."""
    if system == "torch" and importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install torch"
    if system == "tunix" and not (args.tunix and (args.tunix / "bin" / "python").exists()):
        return (
            "tunix needs its own environment: run sh benchmarks/tunix_env.sh DIR, then use "
            f"--tunix=DIR (now it is {str(args.tunix) if args.tunix else ''!r})"
        )
    return None


def make(system: str, args, m: Model, work: Work, folder: pathlib.Path) -> Runner:
    """Returns the runner of a system, warmed up."""
    if system in ("torch", "tunix"):
        python = sys.executable if system == "torch" else str(args.tunix / "bin" / "python")
        return process_runner([python, str(HERE / f"decode_{system}.py")], folder)
    if system == "fixed_dense":
        m = m._replace(decoder=m.decoder.clone(decode="dense"))
    return engine_runner(args, m, work, refill=system == "ours")


# --- the measurement ----------------------------------------------------------------------------


def system_line(
    system: str, work: Work, slots: int, parts: Sequence[Measured], floor_seconds: float | None
) -> dict:
    """Returns the line of one system, from the measurements of its pieces."""
    seconds, tokens = sum(part.seconds for part in parts), sum(work.limits)
    if system == "ours":
        queues = [[work.limits[i] for i in flat(piece)] for piece in work.pieces]
        steps = sum(refilled_steps(queue, slots) for queue in queues)
        known = [(part.occupancy, part.seconds) for part in parts if part.occupancy is not None]
        extra = {"drain": steps / max(1, refilled_steps(work.limits, slots)) - 1}
    else:
        steps = batch_steps(work.limits, flat(work.pieces))
        known, extra = [], {}
    overall = tokens / (slots * steps)
    waiting = sum(a * b for a, b in known) / sum(b for _, b in known) if known else overall
    return {
        "system": system, "tokens": tokens, "seconds": seconds,
        "tokens_per_second": tokens / seconds, "steps": steps,
        "occupancy": waiting, "occupancy_to_the_end": overall,
        "prompt_tokens": sum(part.prompt_tokens for part in parts),
        "seconds_of_pieces": [round(part.seconds, 3) for part in parts],
        "floor_fraction": floor_seconds and floor_seconds / seconds, **extra,
    }  # fmt: skip


def cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def common_line(args: argparse.Namespace, work: Work, bandwidth: float | None) -> dict:
    """Returns the fields that all lines of a run share."""
    names = ("jax", "jaxlib", "flax")
    return {
        "command": " ".join(["python", *sys.argv]), "shape": args.shape, "dtype": args.dtype,
        "slots": args.slots, "texts": len(work.limits), "samples": args.samples,
        "median": args.median, "max": args.max, "seed": args.seed, "pieces": args.pieces,
        "gb_per_second": bandwidth, "device": jax.devices()[0].device_kind, "cpus": cpus(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }  # fmt: skip


def measure(args: argparse.Namespace, m: Model, work: Work, floor_seconds: float | None):
    """Yields a line for each system; with several pieces, the systems take turns."""
    named = [name for name in args.systems if missing(name, args) is None]
    for name in [name for name in args.systems if name not in named]:
        yield {"system": name, "skipped": missing(name, args)}
    with tempfile.TemporaryDirectory() as folder:
        if {"torch", "tunix"} & set(named):
            write_work(pathlib.Path(folder), args, m, work)
        for group in [named] if args.pieces > 1 else [[name] for name in named]:
            runners: dict[str, Runner] = {}
            parts: dict[str, list[Measured]] = {name: [] for name in group}
            failed: dict[str, str] = {}
            for number in [-1, *range(args.pieces)]:  # -1 is the warm-up
                for name in [name for name in group if name not in failed]:
                    print(f"{name}: piece {number + 1} of {args.pieces}", file=sys.stderr)
                    try:
                        if number < 0:
                            runners[name] = make(name, args, m, work, pathlib.Path(folder))
                        else:
                            parts[name].append(runners[name].piece(number))
                    except (RuntimeError, OSError) as error:
                        failed[name] = str(error)
            for runner in runners.values():
                runner.close()
            for name in group:
                if name in failed:
                    yield {"system": name, "failed": failed[name]}
                else:
                    line = system_line(name, work, args.slots, parts[name], floor_seconds)
                    yield line | runners[name].known


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=transformer.SHAPES, default="smollm2_135m")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--median", type=float, default=24, help="median of the limits")
    parser.add_argument("--max", type=int, default=256, help="maximum of the limits")
    parser.add_argument("--prompt_tokens", type=int, default=64, help="mean, for random weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--systems", default="ours,fixed,torch,tunix", help=",".join(SYSTEMS))
    parser.add_argument("--pieces", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cache", choices=("float32", "bfloat16", "int8"), help="default: dtype")
    parser.add_argument("--steps", type=int, default=request.SamplerSettings.steps)
    parser.add_argument("--pack", type=int, default=request.SamplerSettings.pack)
    parser.add_argument("--tunix", type=pathlib.Path, help="folder made by tunix_env.sh")
    parser.add_argument("--floor", action="store_true", help="measure the bandwidth")
    parser.add_argument("--bandwidth", type=float, help="GB/s, instead of measuring it")
    parser.add_argument("--context", type=int, default=0, help="mean context in the line `step`")
    args = parser.parse_args(argv)
    args.systems = [name for name in args.systems.split(",") if name]
    if unknown := set(args.systems) - set(SYSTEMS):
        parser.error(f"--systems has {', '.join(sorted(unknown))}: choices are {SYSTEMS}")
    return args


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns 0 if no system failed, else 1."""
    # Several systems share the memory of a GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    args = parse(argv)
    m = load(args)
    work = make_work(args, m)
    size, bandwidth = decode_floor.weight_bytes(m.decoder.config, m.params), args.bandwidth
    if args.floor and bandwidth is None:
        bandwidth = decode_floor.measured_bandwidth(size, jnp.dtype(args.dtype))
    entry = decode_floor.entry_bytes(m.decoder.config, args.cache or args.dtype)
    lengths = [len(prompt) for prompt in work.prompts]
    needed = decode_floor.needed_bytes(lengths, work.limits, args.slots, size, entry)
    common = common_line(args, work, bandwidth)
    good = True
    for stacked in (False, True) if args.context else ():
        line = decode_floor.step_line(
            m.decoder, m.params, slots=args.slots, steps=args.steps, context=args.context,
            cache=args.cache or args.dtype, bandwidth=bandwidth, stacked=stacked,
        )  # fmt: skip
        print(json.dumps(common | line), flush=True)
    for line in measure(args, m, work, bandwidth and needed / bandwidth / 1e9):
        good &= "failed" not in line
        versions = common["versions"] | line.pop("versions", {})
        print(json.dumps(line | common | {"versions": versions}), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
