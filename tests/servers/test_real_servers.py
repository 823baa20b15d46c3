"""Runs with real servers: vLLM draws the completions, and `transformers serve` writes the replies.

`make servers` installs the servers and sets COPSD_SERVERS to their Python. The oracle of a run is
the same run without a server: at temperature 0, both must give the same texts and losses.
"""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import conftest
import pytest
import runs

PYTHON = os.environ.get("COPSD_SERVERS", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON, reason="COPSD_SERVERS does not name the servers' Python"),
]
RANK = 8
START = 300  # seconds in which a server must be ready
SHORT = {
    "model.dtype": "float32", "rollout.temperature": 0, "train.batch": 4, "eval.path": "",
    "lora.rank": RANK, "train.warmup": 0,
}  # fmt: skip


def command(module, *flags, **settings):
    """The command line of one of the program's modules; `settings` become --config flags."""
    changed = [f"--config.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", f"copsd_jax.{module}", *map(str, flags), *changed]


def run(*args, **settings):
    """(exit code, output) of a command in a process without the tests' options of XLA."""
    ended = subprocess.run(
        command(*args, **settings), cwd=conftest.ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    print(ended.stdout)
    return ended.returncode, ended.stdout


def environment(**more):
    return {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | more


def train(card, directory, **settings):
    flags = (f"--config={conftest.ROOT / 'configs' / card}.py", f"--workdir={directory}")
    return run("main", *flags, **SHORT | settings)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The model of the demo, which `export --format=base` writes for a server."""
    folder = tmp_path_factory.mktemp("base")
    assert train("opsd", folder / "w", **{"train.steps": 0})[0] == 0
    flags = (f"--workdir={folder / 'w'}", f"--out={folder / 'model'}", "--format=base")
    assert run("export", *flags)[0] == 0
    return folder / "model"


class Server:
    """A server in a process group of its own, on a free port."""

    def __init__(self, log: pathlib.Path, command: list[str], **variables: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._log, self._variables = log, variables
        self._command = [PYTHON, *command, f"--port={self.port}", "--host=127.0.0.1"]

    def start(self):
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, start_new_session=True,
                env=environment(HF_HUB_OFFLINE="1", **self._variables),
            )  # fmt: skip

    def wait(self):
        ready = time.monotonic() + START
        while time.monotonic() < ready and self._process.poll() is None:
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{self.url}/models", timeout=5).close()
                return
            time.sleep(1)
        pytest.fail(f"the server is not ready:\n{self._log.read_text()[-3000:]}")

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def serving(*args, **variables):
    server = Server(*args, **variables)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def vllm(base, tmp_path_factory):
    """vLLM with the flags that docs/sampling.md names; its OpenMP library must be loaded first."""
    openmp = pathlib.Path(PYTHON).parents[1] / "lib" / "libiomp5.so"
    flags = [
        "-m", "vllm.entrypoints.openai.api_server", f"--model={base}", "--served-model-name=base",
        "--enable-lora", f"--max-lora-rank={RANK}", "--logprobs-mode=processed_logprobs",
        "--no-enable-chunked-prefill", "--dtype=float32", "--max-model-len=1024", "--enforce-eager",
    ]  # fmt: skip
    variables = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1", "LD_PRELOAD": str(openmp) if openmp.exists() else "",
    }  # fmt: skip
    with serving(tmp_path_factory.mktemp("vllm") / "log", flags, **variables) as server:
        yield server


def sampled_by(server):
    return {
        "sampler.engine": "server", "sampler.url": server.url, "sampler.model": "base",
        "sampler.logprobs": "processed",
    }  # fmt: skip


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same run with the local engine."""
    directory = tmp_path_factory.mktemp("local") / "w"
    assert train("opsd", directory, **{"train.steps": 4})[0] == 0
    return directory


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read(directory):
    """(ids of the completions of all steps, metrics of all steps)."""
    records = [lines(path) for path in sorted((directory / "rollouts").glob("step_*.jsonl"))]
    texts = [[record["completion_ids"] for record in step] for step in records]
    return texts, runs.steps_of(directory)


def compare(found, expected):
    """Each step has the same texts and loss; the server has computed with the step's policy."""
    (texts, metrics), (own_texts, own_metrics) = read(found), read(expected)
    assert texts == own_texts
    assert len({str(step) for step in texts}) == len(texts) == len(metrics)
    for step, own in zip(metrics, own_metrics, strict=True):
        assert step["loss"] == pytest.approx(own["loss"], rel=1e-5)
        print(f"step {step['step']}: logp_gap_max {step['logp_gap_max']}")
        assert step["logp_gap_max"] < 1e-4


def test_vllm_draws_the_texts_of_the_local_engine(vllm, local, tmp_path):
    assert train("opsd", tmp_path / "w", **{"train.steps": 4}, **sampled_by(vllm))[0] == 0
    compare(tmp_path / "w", local)


def test_a_run_outlives_its_vllm(vllm, local, tmp_path):
    """The server is killed after the first step, and restarted; it has lost the adapter then."""
    flags = (f"--config={conftest.ROOT / 'configs' / 'opsd.py'}", f"--workdir={tmp_path / 'w'}")
    asked = command("main", *flags, **SHORT | {"train.steps": 4} | sampled_by(vllm))
    process = subprocess.Popen(asked, cwd=conftest.ROOT, env=environment())
    metrics = tmp_path / "w" / "metrics.jsonl"
    try:
        while process.poll() is None and not (metrics.is_file() and metrics.read_text()):
            time.sleep(0.05)
        vllm.kill()
        assert process.poll() is None
        vllm.start()
        vllm.wait()
        assert process.wait() == 0
    finally:
        process.kill()
    compare(tmp_path / "w", local)


def test_a_run_says_that_vllm_does_not_load_full_weights(vllm, tmp_path):
    """vLLM 0.32.0 keeps the old output matrix of a model with tied embeddings."""
    full = {"train.steps": 3, "train.trainable": "full", "train.lr": 1e-4, "lora.rank": 64,
            "lora.alpha": 128.0}  # fmt: skip
    code, said = train("opsd", tmp_path / "w", **full, **sampled_by(vllm))
    assert code == 0
    gaps = [step["logp_gap_max"] for step in read(tmp_path / "w")[1]]
    print("gaps of full weights", gaps)
    assert gaps[0] < 1e-4
    assert min(gaps[1:]) > 0.01
    assert "guards.logp_gap" in said


def test_transformers_serve_writes_the_replies_of_the_fixed_teacher(base, tmp_path):
    """Before the first update, the fixed teacher is the model that the server has."""
    asked = {
        "train.steps": 1, "author.max_tokens": 64, "prompt.template": "chat", "prompt.exemplars": 0,
    }  # fmt: skip
    (tmp_path / "hub").mkdir()
    flags = ["-m", "transformers.cli.transformers", "serve", str(base), "--device=cpu",
             "--dtype=float32"]  # fmt: skip
    with serving(tmp_path / "log", flags, HF_HUB_CACHE=str(tmp_path / "hub")) as server:
        critic = {"author.kind": "server", "author.url": server.url, "author.model": str(base)}
        # A model of 135M parameters writes no usable critique, so the step is skipped.
        assert train("critique", tmp_path / "served", **asked, **critic)[0] == 4
    assert train("critique", tmp_path / "own", **asked, **{"author.kind": "teacher"})[0] == 0
    records = [
        lines(tmp_path / name / "rollouts" / "step_000001.jsonl") for name in ("served", "own")
    ]
    served, own = [[record["reply"] for record in step] for step in records]
    print("replies", served)
    assert served == own
    assert all(served)
