"""Worker processes, which compare formulas by math-verify under limits on time and memory.

Limits are needed, because a short formula can make sympy compute for hours or fill the memory.
Sympy's own limits use signals, which cannot interrupt C code. A worker that exceeds a limit is
killed and replaced.

A worker is a process `python -m copsd_jax.rewards.worker_process` with two pipes. Each question and
each reply is one line of JSON. A worker is started when it is first needed. Workers are not forked,
because JAX has threads, and a forked copy of a process with threads may hang. Text written by a
model is never executed, so only the LaTeX parser of math-verify is used. The plain-expression
parser of math-verify is not used, because it calls sympy's `parse_expr`, which evaluates Python.
"""

import contextlib
import json
import os
import pathlib
import select
import subprocess
import sys
import time
from typing import Any

_START_SECONDS = 120.0  # time limit for a worker to import sympy on a busy machine


class Worker:
    """A process that compares answers by math-verify; `ask` starts the process when needed."""

    def __init__(self, memory: int):
        self._memory = memory
        self._process: Any = None  # the subprocess.Popen of a running process, or None
        self._unread = b""

    def ask(self, gold: str, answer: str, seconds: float, strict: bool = True) -> str:
        """Compares two formulas; returns `equal`, `unequal`, `unparsed`, `timeout` or `died`.

        Args:
          gold: the gold answer.
          answer: the answer of the model.
          seconds: the time limit.
          strict: whether a pair that math-verify accepts must also pass `check_strictly`.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        self._send([gold, answer, seconds, strict])
        reply = self._receive(seconds)
        if reply in ("timeout", "died"):
            self.close()
        return reply

    def _start(self) -> None:
        self.close()
        package = pathlib.Path(__file__).resolve().parents[2]
        path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
        # The worker has its own session, so Ctrl-C reaches only the run, which closes its workers.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "copsd_jax.rewards.worker_process", str(self._memory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
        reply = self._receive(_START_SECONDS)
        if reply != "ready":
            self.close()
            raise RuntimeError(
                f"the grader's worker did not start ({reply}): `{sys.executable} -c 'import "
                "math_verify'` shows why"
            )

    def _send(self, question: list) -> None:
        with contextlib.suppress(BrokenPipeError):  # if the worker ended, `_receive` returns `died`
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()

    def _receive(self, seconds: float) -> str:
        pipe = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return "timeout"
            chunk = os.read(pipe, 4096)
            if not chunk:
                return "died"
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        """Ends the process; a later question starts a new process."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # part of a question may be unsent
                pipe.close()
        self._process, self._unread = None, b""


def _run_grader_worker(memory: int) -> None:
    """Runs a worker, which answers each line of JSON with one line until the input ends."""
    import logging
    import resource
    import signal

    # If a machine shuts down, all its processes get SIGTERM, but the run still completes its step.
    # Without workers, the step would be graded differently. The run ends its workers itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":  # macOS refuses a limit on the address space
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the replies
    from copsd_jax.rewards import algebra

    compare = algebra.build_comparison()
    compare("x+1", r"\frac{x}{2}", True)  # builds tables, while no time limit is set
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):  # a worker writes no files
        resource.setrlimit(limit, (0, 0))
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        gold, answer, seconds, strict = json.loads(line)
        # If the parent process is gone, the alarm ends this process, even while C code runs.
        signal.alarm(int(seconds) + 5)
        print(json.dumps(compare(gold, answer, strict)), file=replies, flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    _run_grader_worker(int(sys.argv[1]))
