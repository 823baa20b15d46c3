"""Stops runs of tiny models at random moments, continues them, and compares what they leave.

    python tools/drill.py kill [--kills=60] [--processes=2] [--runs=copsd,sft] [--out=DIR]
    python tools/drill.py stop [--signals=TERM,INT] [--runs=copsd] [--out=DIR]
    python tools/drill.py endure [--steps=500] [--runs=copsd] [--out=DIR]

`kill` kills runs by SIGKILL and starts them again by the same command, until they end. There are
three kinds of kills, in turn:

    time    after a random share of the time that an undisturbed run takes
    phase   during a random call of one part of the program, such as a rollout or a save
    file    right before a random operation on a file of the work directory

With --processes=2, one of the two processes of launch/local.py is killed.

`stop` sends a signal during each part of the program. The run must save its last completed step,
and end with the exit code of the signal within five seconds after the end of its step.

`endure` runs many steps. From step 50 on, memory and open files may not grow, and no process may be
left at the end.

In the end, each run of `kill` and `stop` must leave the same as an undisturbed run: every array of
the last checkpoint, every metric, record and evaluation, and every point in TensorBoard once. The
exit code is 1 if anything differs.
"""

import argparse
import collections
import contextlib
import importlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import compare_runs

TREE = pathlib.Path(__file__).resolve().parents[1]
SHORT = ("train.steps=8", "train.batch=4", "eval.every=4", "train.save_every=3", "data.limit=64")
RUNS = {
    "copsd": ("copsd", ()),
    "copsd_full": (
        "copsd",
        ("train.trainable=full", "teacher.weights=ema", "teacher.ema_decay=0.9"),
    ),
    **{name: (name, ()) for name in ("opsd", "rosd", "critique", "sdpo", "grpo", "sft")},
}
# The parts of the program during which a run is disturbed, each as (module, function).
PHASES = {
    "weights": ("training.loaded_run", "load_run"),
    "load": ("runtime.checkpoint", "Checkpoints.load"),
    "resume": ("metrics.metric_files", "Writer.__init__"),
    "rollout": ("training.rollouts", "sample_rollouts"),
    "context": ("methods.authors", "write_replies"),
    "step": ("training.layout", "place_batch"),  # right before the compiled step
    "metrics": ("metrics.metric_files", "Writer.write"),
    "records": ("runtime.workdir", "write_jsonl"),
    "save": ("runtime.checkpoint", "Checkpoints.save"),
    "evaluation": ("evaluation", "evaluate"),
    "ending": ("summary", "summarize_ending"),
}
ONCE = ("weights", "load", "resume", "ending")  # phases that a start runs once
# How long a phase may last before it is disturbed, in seconds.
LONGEST = {"weights": 2.0, "rollout": 0.1, "step": 0.12, "save": 0.4, "evaluation": 0.3}
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
GROWTH = 0.03  # share by which resident memory may grow after step 50
LATEST = 5.0  # seconds from the end of a step to the end of the process


# ------------------------------------------------------------------------------- in the run itself


def arm_phase(spec: dict[str, Any]) -> None:
    """Sends a signal to this process during the n-th call of a phase."""
    module, attribute = PHASES[spec["phase"]]
    *path, name = attribute.split(".")
    owner = importlib.import_module(f"copsd_jax.{module}")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), [0]

    def disturb() -> None:
        time.sleep(spec["after"])
        if "note" in spec:
            pathlib.Path(spec["note"]).write_text(str(time.time()))
        os.kill(os.getpid(), spec["signal"])

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == spec["nth"]:
            threading.Thread(target=disturb, daemon=True).start()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def arm_file(spec: dict[str, Any]) -> None:
    """Kills this process right before its n-th operation that changes the work directory."""
    seen = [0]

    def hook(event: str, args: tuple) -> None:
        if event not in FILE_EVENTS or not isinstance(args[0], str | os.PathLike):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        if os.fspath(args[0]).startswith(spec["workdir"]):
            seen[0] += 1
            if seen[0] == spec["nth"]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run_disturbed(spec: dict[str, Any], argv: list[str]) -> int:
    """Runs the program in this process, prepared to be disturbed; returns the exit code."""
    from copsd_jax import main
    from copsd_jax.runtime import malloc, startup

    startup.begin()
    malloc.keep_freed_memory()  # before JAX is imported
    if spec["kind"] == "phase":
        importlib.import_module("copsd_jax.train")  # all modules, before they are changed
        arm_phase(spec)
    else:
        arm_file(spec)
    return main.main(["copsd_jax.main", *argv])


# ----------------------------------------------------------------------------------- what is left


def read_points(folder: pathlib.Path) -> collections.Counter[tuple[str, int, float]]:
    """Counts how often TensorBoard's files contain each (tag, step, value), without times.

    A file is a sequence of records: length (8 bytes), checksum (4), event, checksum (4).
    """
    event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")
    points: collections.Counter[tuple[str, int, float]] = collections.Counter()
    for file in folder.iterdir():
        raw, at = file.read_bytes(), 0
        while at < len(raw):
            end = at + 12 + int.from_bytes(raw[at : at + 8], "little")
            event = event_pb2.Event.FromString(raw[at + 12 : end])
            at = end + 4
            points.update(
                (value.tag, event.step, value.simple_value)
                for value in event.summary.value
                if not value.tag.startswith("seconds/")
            )
    return points


def list_problems(reference: pathlib.Path, disturbed: pathlib.Path) -> list[str]:
    """Returns the differences between the two work directories, in words."""
    _, wrong = compare_runs.list_differences(reference, disturbed)
    problems = [f"{len(wrong)} values differ, such as {wrong[0]}"] if wrong else []
    for kind in ("rollouts", "eval"):
        names = [
            {path.name for path in (folder / kind).iterdir()} for folder in (reference, disturbed)
        ]
        if names[0] != names[1]:
            problems.append(f"other files in {kind}: {sorted(names[0] ^ names[1])}")
    left = [
        str(path.relative_to(disturbed))
        for path in disturbed.rglob("*")
        if path.name.endswith(".part")
        or (path.parent.name == "checkpoints" and not path.name.isdigit())
    ]
    problems += [f"left over: {', '.join(left)}"] if left else []
    points = [read_points(folder / "tensorboard") for folder in (reference, disturbed)]
    if points[0] != points[1]:
        lost, more = points[0] - points[1], points[1] - points[0]
        problems.append(f"TensorBoard lacks {lost.total()} points and has {more.total()} others")
    return problems


# ----------------------------------------------------------------------------------------- drills


class Drill:
    """The runs of one entry of `RUNS`: an undisturbed one, and disturbed ones.

    Args:
      name: a key of `RUNS`.
      out: the folder for the work directories and the log.
      processes: number of processes of a run.
      rng: the source of all random choices.
    """

    def __init__(self, name: str, out: pathlib.Path, processes: int, rng: random.Random):
        self._name, self._out, self._processes, self._rng = name, out / name, processes, rng
        self._out.mkdir(parents=True)
        self._log = (self._out / "drill.log").open("w", encoding="utf-8")
        self._phases: list[str] = []
        self.reference = self._out / "reference"
        self.undisturbed(self._out / "warm")  # fills the cache of compiled programs
        self.seconds = self.undisturbed(self.reference)

    def start(
        self, workdir: pathlib.Path, spec: dict[str, Any] | None = None, more: Sequence[str] = ()
    ) -> subprocess.Popen:
        """Starts the run in a work directory.

        Args:
          workdir: the work directory.
          spec: how the run is disturbed from within, if at all.
          more: further settings.
        """
        card, settings = RUNS[self._name]
        flags = [f"--config=configs/{card}.py:tiny", f"--workdir={workdir}"]
        flags += [f"--config.{setting}" for setting in (*SHORT, *settings, *more)]
        program = [sys.executable, "-m", "copsd_jax.main"]
        if self._processes > 1:
            program = [sys.executable, "launch/local.py", f"--processes={self._processes}"]
        elif spec and spec["kind"] != "time":
            program = [sys.executable, __file__, "run", json.dumps(spec)]
        cache = str(self._out.parent / "cache")
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(TREE),
            MARK: str(workdir),
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        print(f"$ {' '.join([*program, *flags])}", file=self._log, flush=True)
        return subprocess.Popen(
            [*program, *flags], cwd=TREE, env=environment, stdout=self._log, stderr=self._log
        )

    def undisturbed(self, workdir: pathlib.Path) -> float:
        """Runs to the end; returns the duration in seconds."""
        begun = time.monotonic()
        if code := self.start(workdir).wait():
            raise SystemExit(f"{self._name}: exit code {code}: see {self._log.name}")
        return time.monotonic() - begun

    def draw_kill(self, number: int, workdir: pathlib.Path) -> dict[str, Any]:
        """Draws a kill of the kind that is next in turn."""
        kind = "time" if self._processes > 1 else ("time", "phase", "file")[number % 3]
        if kind == "time":
            return {"kind": kind, "after": self._rng.uniform(0.2, 1.0) * self.seconds}
        if kind == "file":
            return {"kind": kind, "nth": self._rng.randint(1, 60), "workdir": str(workdir)}
        if not self._phases:  # all phases in turn, each time in another order
            self._phases = self._rng.sample(list(PHASES), len(PHASES))
        phase = self._phases.pop()
        nth = 1 if phase in ONCE else self._rng.randint(1, 3)
        after = self._rng.uniform(0, LONGEST.get(phase, 0.01))
        return {
            "kind": kind, "phase": phase, "nth": nth, "after": after, "signal": int(signal.SIGKILL)
        }  # fmt: skip

    def kill(self, workdir: pathlib.Path, spec: dict[str, Any]) -> int:
        """Starts the run and kills it; returns the exit code."""
        process = self.start(workdir, spec)
        if spec["kind"] != "time":
            return process.wait()
        try:
            return process.wait(spec["after"])
        except subprocess.TimeoutExpired:
            pass
        if self._processes == 1:
            process.kill()
            return process.wait()
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        spec["process"] = self._rng.randrange(len(children.split()))
        os.kill(int(children.split()[spec["process"]]), signal.SIGKILL)
        return process.wait(120)


MARK = "COPSD_DRILL"  # variable in the environment of every process of a run


def find_processes(workdir: pathlib.Path) -> list[int]:
    """Returns the ids of all processes of the run in a work directory."""
    mark, found = f"{MARK}={workdir}".encode(), []
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # a process that has ended, or of another user
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def measure_process(pid: int) -> tuple[int, int]:
    """Returns the resident memory in bytes and the number of open files of a process."""
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


class Outcome(NamedTuple):
    """What a drill of one entry of `RUNS` has found."""

    disturbed: int  # number of kills, or of signals
    runs: int  # number of runs that were compared with the undisturbed one
    problems: list[str]


def kill_runs(drill: Drill, kills: int, out: pathlib.Path) -> Outcome:
    """Kills runs until `kills` kills have hit a process; compares each run when it has ended."""
    hit, runs, starts, problems = 0, 0, 0, []
    while hit < kills or starts:
        workdir = out / f"killed_{runs}"
        spec = drill.draw_kill(hit, workdir) if hit < kills else None
        code = drill.kill(workdir, spec) if spec else drill.start(workdir).wait()
        starts += 1
        print(f"  {json.dumps(spec)} -> {code}", flush=True)
        if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
            hit += 1
            continue
        found = [f"exit code {code}"] if code else list_problems(drill.reference, workdir)
        print(f"  run {runs}, {starts} starts: {'; '.join(found) or 'identical'}", flush=True)
        problems += found
        runs, starts = runs + 1, 0
    return Outcome(hit, runs, problems)


def stop_runs(drill: Drill, numbers: Sequence[signal.Signals], out: pathlib.Path) -> Outcome:
    """Sends each signal in each phase, and continues the run; compares each run at its end."""
    runs, problems = 0, []
    for number in numbers:
        for phase in PHASES:
            workdir = out / f"stopped_{number.name}_{phase}"
            if phase in ("load", "resume"):  # phases of continued runs alone
                killed = {"kind": "phase", "phase": "records", "nth": 5, "after": 0, "signal": 9}
                drill.start(workdir, killed).wait()
            said, found = stop_run(drill, workdir, number, phase)
            again = drill.start(workdir).wait()
            problem = [f"exit code {again} of the next start"] if again else []
            found += problem or list_problems(drill.reference, workdir)
            result = "; ".join(found) or "identical"
            print(f"  {number.name} in {phase}: {said}: {result}", flush=True)
            problems += found
            runs += 1
    return Outcome(runs, runs, problems)


def count_steps(metrics: pathlib.Path) -> int:
    """Returns the number of training steps in metrics.jsonl, which also has lines of scores."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return sum('"eval/' not in line for line in lines)


def stop_run(
    drill: Drill, workdir: pathlib.Path, number: signal.Signals, phase: str
) -> tuple[str, list[str]]:
    """Starts a run and stops it by a signal; returns what happened, and the problems."""
    note = workdir.with_suffix(".signal")
    nth = 1 if phase in ONCE else 2
    spec = {"kind": "phase", "phase": phase, "nth": nth, "after": 0.02, "signal": int(number)}
    code = drill.start(workdir, spec | {"note": str(note)}).wait()
    ended, metrics = time.time(), workdir / "metrics.jsonl"
    if not note.exists():
        return f"exit code {code}", [f"the phase {phase} was not reached"]
    steps = count_steps(metrics)
    step_end = metrics.stat().st_mtime if metrics.exists() else 0.0
    late = ended - max(step_end, float(note.read_text()))
    saved = [int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*")]
    found = []
    # A signal at the very end of a run changes nothing any more.
    if code != 128 + number and (code or phase != "ending"):
        found.append(f"exit code {code}")
    if steps != max(saved, default=0) and phase not in ("weights", "load"):
        found.append(f"{steps} steps, but the last checkpoint is {max(saved, default=0)}")
    if late > LATEST:
        found.append(f"more than {LATEST:g} s")
    return f"exit code {code}, {steps} steps, {late:.1f} s", found


def endure(drill: Drill, steps: int, out: pathlib.Path) -> Outcome:
    """Runs many steps, and compares memory and open files after step 50 and at the end."""
    workdir = out / "endured"
    more = (f"train.steps={steps}", "eval.every=0", "train.save_every=50")
    process, seen = drill.start(workdir, more=more), {}
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None:
        done = count_steps(metrics)
        if 50 <= done < steps:
            with contextlib.suppress(OSError):  # the process may just have ended
                seen[done] = measure_process(process.pid)
        time.sleep(0.5)
    (memory, files), (last_memory, last_files) = seen[min(seen)], seen[max(seen)]
    problems = [f"exit code {process.returncode}"] if process.returncode else []
    if last_memory > memory * (1 + GROWTH):
        problems.append(f"memory grew by more than {GROWTH:.0%}")
    if last_files > files:
        problems.append("more files are open")
    if left := find_processes(workdir):
        problems.append(f"processes are left: {left}")
    print(
        f"  step {min(seen)}: {memory / 2**20:.1f} MiB, {files} open files; step {max(seen)}: "
        f"{last_memory / 2**20:.1f} MiB, {last_files} open files; {len(left)} processes left: "
        + ("; ".join(problems) or "as it should be"),
        flush=True,
    )
    return Outcome(0, 1, problems)


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    if argv[1:2] == ["run"]:
        return run_disturbed(json.loads(argv[2]), argv[3:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("drill", choices=("kill", "stop", "endure"))
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--signals", default="TERM,INT")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/drill"))
    args = parser.parse_args(argv[1:])
    names, failed = args.runs.split(","), 0
    for index, name in enumerate(names):
        rng = random.Random(f"{args.seed} {name}")
        drill = Drill(name, args.out.resolve(), args.processes, rng)
        print(f"{name}: an undisturbed run takes {drill.seconds:.0f} s", flush=True)
        out = args.out.resolve() / name
        if args.drill == "kill":
            share = args.kills // len(names) + (index < args.kills % len(names))
            outcome = kill_runs(drill, share, out)
        elif args.drill == "endure":
            outcome = endure(drill, args.steps, out)
        else:
            numbers = [signal.Signals[f"SIG{one}"] for one in args.signals.split(",")]
            outcome = stop_runs(drill, numbers, out)
        failed += bool(outcome.problems)
        print(
            f"{name}: {outcome.disturbed} times disturbed, {outcome.runs} runs compared: "
            + (f"{len(outcome.problems)} problems" if outcome.problems else "no problem"),
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
