"""Runs whose completions a server draws: a stub on 127.0.0.1 that holds what it was handed.

Oracles: the stub reads the folders and samples each request with the local sampler, so that its
log-probabilities are those of the weights that it has; the trainer's forward says (`logp_gap_max`)
whether these are the policy's. And a run that nobody stopped.
"""

import contextlib
import http.server
import json
import math
import socket
import threading

import jax
import jax.numpy as jnp
import numpy as np
import peft_reader
import pytest
import runs
from test_remote_engine import FAULTS, spoken

from copsd_jax import evaluate, evaluation, main
from copsd_jax.methods import table
from copsd_jax.model import policy as policy_lib
from copsd_jax.model import transformer
from copsd_jax.runtime import checkpoint, failures
from copsd_jax.sampler import loop, request
from copsd_jax.servers import remote_engine
from copsd_jax.training import loaded_run, run_plan
from copsd_jax.weights import hf, hf_config

optax_promotes = runs.optax_promotes

SETTINGS = {
    "train__steps": 3, "train__lr": 0.05, "eval__limit": 3,
    "rollout__temperature": 0.8,
}  # fmt: skip


class Stub(http.server.ThreadingHTTPServer):
    """An engine with the tiny preset's base, and the adapters or weights that it was handed."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Engine)
        plan = run_plan.make_plan(runs.config("opsd", **SETTINGS), evaluate=False)
        self.config, self.plan = plan.model_config, plan
        key = jax.random.fold_in(jax.random.key(plan.config.seed), loaded_run.WEIGHTS_STREAM)
        self.params = transformer.init_params(self.config, key, jnp.float32)
        self.decoder = transformer.Decoder(self.config, jnp.float32)
        self.adapters, self.asked, self.loaded = {}, [], []
        self.left = math.inf  # completions until it dies
        self.restarts_at = None  # the value of `left` at which it forgets its adapters
        self.max_model_len = 512
        self.lock = threading.Lock()

    def complete(self, body):
        adapter, scale = self.adapters.get(body["model"], (None, 1.0))
        sampling = request.Sampling(
            body["max_tokens"], body["temperature"], stop_ids=tuple(body["stop_token_ids"])
        )
        key_2 = np.array([body["seed"] >> 21, body["seed"] % 2**21], np.uint32)
        made = loop.generate(
            self.decoder, policy_lib.Policy(self.params, adapter, scale), [body["prompt"]],
            sampling, keys=key_2[None],
            settings=request.SamplerSettings(1, self.max_model_len, 8, 512, None),
            vocabulary=self.plan.vocabulary,
        ).completions[0]  # fmt: skip
        logps = [float(x) for x in made.logps]
        return spoken(body["prompt"], [int(i) for i in made.ids], logps, made.finish)

    def manage(self, path, body):
        if path.endswith("/load_lora_adapter"):
            read, alpha = peft_reader.read(body["lora_path"])
            adapter = jax.tree.map(jnp.asarray, read)
            rank = adapter["q"]["a"].shape[-1]
            self.adapters[body["lora_name"]] = adapter, alpha / rank
            self.loaded.append(body["lora_name"])
        elif path.endswith("/unload_lora_adapter"):
            del self.adapters[body["lora_name"]]
        elif path == "/collective_rpc":
            folder = run_plan.pathlib.Path(body["kwargs"]["weights_path"])
            self.params = hf.load_params(folder, hf_config.load_config(folder), jnp.float32)
            self.loaded.append(folder.name)


class Engine(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stub

    def do_GET(self):
        names = {"tiny": self.server.max_model_len} | dict.fromkeys(self.server.adapters)
        self.answer(200, {"data": [{"id": n, "max_model_len": m} for n, m in names.items()]})

    def do_POST(self):
        stub = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stub.lock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if self.path != "/v1/completions":
                stub.manage(self.path, body)
                return self.answer(200, "done")
            stub.left -= 1
            if stub.left == stub.restarts_at:
                stub.adapters.clear()
            if stub.left < 0:
                stub.shutdown()
                stub.socket.close()
                return FAULTS["reset"](self)
            if body["model"] not in ("tiny", *stub.adapters):
                return self.answer(404, f"The model {body['model']} does not exist.")
            stub.asked.append(body["model"])
            return self.answer(200, stub.complete(body))

    def answer(self, status, said):
        body = (said if isinstance(said, str) else json.dumps(said)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@contextlib.contextmanager
def serving():
    with Stub() as stub:
        threading.Thread(target=stub.serve_forever, args=(0.02,), daemon=True).start()
        yield stub
        stub.shutdown()


@pytest.fixture(scope="module")
def engine():
    with serving() as stub:
        yield stub


def served(stub, **changes):
    return {
        **SETTINGS, "sampler__engine": "server", "sampler__model": "tiny",
        "sampler__url": f"http://127.0.0.1:{stub.server_address[1]}/v1",
        "sampler__logprobs": "tempered", "sampler__retries": 0, "sampler__timeout": 60.0,
        **changes,
    }  # fmt: skip


def lines(path):
    refuse = lambda name: pytest.fail(f"{path} has {name}")  # noqa: E731
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def drawn(workdir):
    """The completions of each step."""
    files = sorted((workdir / "rollouts").iterdir())
    return [[record["completion_ids"] for record in lines(file)] for file in files]


@pytest.fixture(scope="module")
def trained(engine, tmp_path_factory):
    """A run through the server, and which models it asked."""
    workdir = tmp_path_factory.mktemp("served") / "w"
    engine.asked.clear()
    assert main.main(runs.argv("opsd", workdir, **served(engine))) == 0
    return workdir, list(engine.asked), list(engine.loaded), list(engine.adapters)


@pytest.mark.slow
def test_the_server_holds_the_policy_of_each_step(trained):
    workdir, asked, loaded, left = trained
    measured = runs.steps_of(workdir)
    assert [line["step"] for line in measured] == [1, 2, 3]
    for line in measured:
        assert 0 < line["logp_gap_max"] < 1e-3, line
        assert "logp_absent" not in line
        assert "slot_occupancy" not in line
    # 3 problems evaluated and 8 rollouts from the base, then each step's policy, then the last.
    names = list(dict.fromkeys(asked))
    assert [asked.count(name) for name in names] == [11, 8, 8, 3]
    assert names == ["tiny", *loaded]
    assert left == loaded[-1:]
    assert [path.name for path in (workdir / "engine").iterdir()] == ["policy_000003"]


@pytest.mark.slow
def test_its_evaluations_are_ours(engine, trained, tmp_path):
    """Greedy texts of the first and the last policy, by the local sampler; and by the program."""
    workdir, before = trained[0], len(engine.loaded)
    flags = ["evaluate", f"--workdir={workdir}", "--steps=3", f"--out={tmp_path / 'o'}"]
    assert evaluate.main(flags) == 0
    assert len(engine.loaded) == before  # the server has that very adapter
    assert (tmp_path / "o" / "engine" / "policy_000001").is_dir()
    again, first = (
        json.loads((folder / "step_000003.json").read_text())
        for folder in (tmp_path / "o", workdir / "eval")
    )
    assert again == first
    with runs.loaded("opsd", **SETTINGS) as (r, initial):
        with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
            last = checkpoints.load(3, initial)
        for step, state in ((0, initial), (3, last)):
            ours = evaluation.evaluate(
                r, loaded_run.derive_run_policies(r, state)[0], r.plan.eval_rows
            )
            theirs = json.loads((workdir / "eval" / f"step_{step:06d}.json").read_text())
            assert theirs["problems"] == ours["problems"]
            assert theirs["scores"] == ours["scores"]


@pytest.mark.slow
def test_a_server_that_dies_ends_the_run_and_another_goes_on(trained, tmp_path, capsys):
    workdir = tmp_path / "w"
    with serving() as stub:
        stub.left = 21  # evaluation 3, steps 1 and 2 8 each; of step 3 two
        quick = {"sampler__retries": 1, "sampler__backoff": 0.01, "sampler__timeout": 20.0}
        with pytest.raises(SystemExit) as ended:
            main.main(runs.argv("opsd", workdir, **served(stub, **quick)))
        url = f"http://127.0.0.1:{stub.server_address[1]}/v1/completions"
    said = str(ended.value)
    assert said.startswith(f"error: {url} gave no completion in ")
    assert "; attempts went on for 20 s (sampler.timeout); " in said
    assert said.endswith(f"; the same command continues {workdir}")
    assert "\n" not in said
    assert len(runs.steps_of(workdir)) == 2
    with serving() as stub:  # elsewhere, and it knows the base alone
        assert main.main(runs.argv("opsd", workdir, **served(stub))) == 0
        assert len(stub.loaded) == 2
    assert all(0 < line["logp_gap_max"] < 1e-3 for line in runs.steps_of(workdir))
    assert drawn(workdir) == drawn(trained[0])
    assert "(continued)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_server_that_is_restarted_gets_the_policy_again(trained, tmp_path, capsys):
    """In the middle of step 2: the run is the one whose server was never restarted."""
    workdir = tmp_path / "w"
    with serving() as stub:
        stub.left, stub.restarts_at = 1000, 1000 - (3 + 8 + 4)
        settings = served(stub, sampler__retries=2, sampler__backoff=0.01)
        assert main.main(runs.argv("opsd", workdir, **settings)) == 0
        assert len(stub.loaded) == 4
    assert drawn(workdir) == drawn(trained[0])
    assert "warning" not in capsys.readouterr().out
    name = "eval/step_000003.json"
    assert (workdir / name).read_bytes() == (trained[0] / name).read_bytes()


@pytest.mark.slow
def test_log_probabilities_that_a_server_does_not_give(engine, tmp_path, monkeypatch):
    """Raw ones at another temperature: absent from records and metrics, and no NaN in the loss."""
    changes = {"sampler__logprobs": "raw", "train__steps": 1, "eval__path": ""}
    workdir, real, made = tmp_path / "w", table.METHODS["distill"].make_batch, []
    keep = lambda *of: made.append(real(*of)) or made[-1]  # noqa: E731
    monkeypatch.setattr(table.METHODS["distill"], "make_batch", keep)
    assert main.main(runs.argv("opsd", workdir, **served(engine, **changes))) == 0
    (measured,) = runs.steps_of(workdir)
    assert measured["logp_absent"] == 1.0
    assert not {"logp_gap_max", "logp_gap_mean"} & measured.keys()
    assert math.isfinite(measured["loss"])
    records = lines(workdir / "rollouts" / "step_000001.jsonl")
    assert all(record["logp_sampler"] == [] for record in records)
    assert all(record["logp_sampler_truncated"] == [] for record in records)
    assert all(len(record["logp_student"]) == len(record["completion_ids"]) for record in records)
    assert not made[0].batch.logp_rollout_BC.any()  # 0, and no NaN


@pytest.mark.slow
def test_all_weights_are_handed_over(tmp_path):
    changes = {"train__trainable": "full", "train__lr": 0.003, "train__steps": 2, "eval__path": ""}
    with serving() as stub:
        argv = runs.argv("opsd", tmp_path / "w", **served(stub, **changes))
        assert main.main(argv) == 0
        assert stub.loaded == ["policy_000001", "policy_000002"]
        assert set(stub.asked) == {"tiny"}
    for line in runs.steps_of(tmp_path / "w"):
        assert 0 < line["logp_gap_max"] < 1e-3


def test_what_is_handed_over_and_when(engine, tmp_path, monkeypatch):
    told = []
    real = remote_engine.hand_over
    monkeypatch.setattr(
        remote_engine,
        "hand_over",
        lambda server, folder: told.append(folder) or real(server, folder),
    )
    settings = served(engine, sampler__folder=tmp_path / "weights")
    with runs.loaded("opsd", **settings) as (r, state):
        assert r.served is not None
        loads = len(engine.loaded)
        student, teacher = loaded_run.derive_run_policies(r, state)
        base = r.plan.server
        assert base is not None
        assert base.max_model_len == 512
        assert r.served(student) == r.served(teacher) == base  # b is 0 at the start
        one = jax.tree.map(jnp.array, student.adapter)
        one["down"]["b"] = one["down"]["b"].at[-1, 0, 0].set(1e-30)
        policy = policy_lib.Policy(student.params, one)
        held = r.served(policy)
        assert held.adapter in engine.adapters
        assert r.served(teacher) == base
        assert r.served(policy_lib.Policy(student.params, dict(one))) == held
        assert len(engine.loaded) == loads + 1
        # A server that was restarted has lost it, and gets it again.
        engine.adapters.clear()
        assert r.served(policy) == held
        assert engine.loaded[loads:] == [held.adapter] * 2
        assert set(map(str, told)) == {str(told[0])}
        adapter, alpha = peft_reader.read(told[0])
        jax.tree.map(np.testing.assert_array_equal, adapter, one)
        assert alpha / r.plan.config.lora.rank == r.plan.adapter_scale
        # Other arrays are another policy; what was written for the former one goes.
        other = jax.tree.map(lambda x: x * 2, one)
        assert r.served(policy_lib.Policy(student.params, other)).adapter != held.adapter
        assert told[-1] != told[0]
        assert list((tmp_path / "weights").iterdir()) == told[-1:]
        # A server that does not take it holds the former one, and is told again.
        engine.manage, manage = lambda *_: 1 / 0, engine.manage
        with pytest.raises(failures.EngineError, match="did not unload the adapter"):
            r.served(policy)
        engine.manage = manage
        assert r.served(policy).adapter == held.adapter


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sampler__url": ""}, "sampler.url is '': sampler.engine=server needs a value here"),
        ({"sampler__model": ""}, "sampler.model is ''"),
        ({"sampler__url": "localhost"}, "sampler.url is 'localhost': write http"),
        ({"sampler__model": "big"}, "sampler.model is 'big': "),
        ({"sampler__max_model_len": 513}, "sampler.max_model_len is 513: "),
        ({"sampler__max_model_len": 40}, "exceeds the 40 tokens that http://127"),
        ({"sampler__timeout": 0.0}, "sampler.timeout is 0.0: it must be a positive"),
        ({"sampler__key_env": "NO_SUCH_KEY"}, "sampler.key_env is 'NO_SUCH_KEY'"),
        ({"sampler__folder": "/dev/null"}, "--config.sampler.folder=/dev/null"),
        ({"rollout__temperature": 0.001}, "rollout.temperature is 0.001: with sampler.dia"),
        ({"loss__rollout_clip": 2.0, "sampler__logprobs": "raw"}, "rollout_clip is 2.0: it needs"),
        ({"loss__rollout_clip": 2.0, "sampler__logprobs": "processed", "rollout__top_p": 0.9},
         "sampler.logprobs=processed does not give them"),
        ({"sampler__slots": 3}, "sampler.slots is not a setting"),
        ({"sampler__int8": True}, "sampler.int8 is True: nothing reads it, because it needs sa"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_is_loaded(engine, tmp_path, capsys, changes, words):
    argv = runs.argv("opsd", tmp_path / "w", **served(engine, **changes))
    assert main.main(argv) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_a_server_that_is_not_there(tmp_path, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        settings = {"sampler__engine": "server", "sampler__model": "m", "sampler__url": url}
        argv = runs.argv("opsd", tmp_path / "w", **settings, sampler__retries=0)
        assert main.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {url}/models did not list its models in 1 attempt (unreach")


def test_clips_that_a_servers_numbers_allow(engine):
    fine = served(engine, loss__rollout_clip=2.0)
    assert run_plan.make_plan(runs.config("opsd", **fine)).server is not None
    for changes in (dict(policy__old="sampler"), dict(policy__rollout_clip=2.0)):
        grpo = served(engine, rollout__per_prompt=2, **changes)
        assert run_plan.make_plan(runs.config("grpo", **grpo)).server is not None
        with pytest.raises(ValueError, match=rf"{next(iter(changes)).replace('__', '.')} is .*raw"):
            run_plan.make_plan(runs.config("grpo", **grpo | {"sampler__logprobs": "raw"}))


def test_without_a_directory_a_folder_is_named(engine):
    plan = run_plan.make_plan(runs.config("opsd", **served(engine)))
    with jax.set_mesh(plan.mesh), pytest.raises(ValueError, match=r"sampler\.folder is ''"):
        loaded_run.load_run(plan, 1)
