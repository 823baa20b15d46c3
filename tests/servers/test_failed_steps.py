"""Runs whose sampler, critic or reward fails in rows or in whole steps, with stub servers.

Oracle: what the stub was told to do, counted by hand; and the state before a skipped step.
"""

import contextlib
import http.server
import json
import random
import threading

import numpy as np
import pytest
import runs

from copsd_jax import main, train
from copsd_jax.methods import failed_steps
from copsd_jax.runtime import bad_steps, checkpoint, failures
from copsd_jax.servers import sampler_server
from copsd_jax.training import layout, run_plan

optax_promotes = runs.optax_promotes

TINY = {
    "train__steps": 3, "train__batch": 8, "train__save_every": 1, "train__keep": 0,
    "eval__path": "", "rollout__max_tokens": 8,
}  # fmt: skip
REFUSED = (400, {"error": {"message": "Unsupported value: 'temperature'"}})


class Stub(http.server.ThreadingHTTPServer):
    """A sampler that draws ids from the seed, and a critic that says what it is told."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.lock = threading.Lock()
        self.adapters, self.drawn, self.asked, self.keys = set(), [], [], []
        self.listed = 0
        self.spoil = lambda number, seed: None  # by the number of the completion and its seed
        self.critic = lambda number: (200, "I would rather not.")
        self.limit = ""  # the only name of the token limit that the critic takes; "" for all names
        self.models: tuple[int, object] = (200, [{"id": "tiny", "max_model_len": 4096}])

    def complete(self, body):
        with self.lock:
            number = len(self.drawn)
            self.drawn.append(body["seed"])
        draw, n = random.Random(body["seed"]), body["max_tokens"]
        ids = [draw.randrange(300, 1300) for _ in range(n)]
        said = self.spoil(number, body["seed"])
        if isinstance(said, tuple):
            return said
        ids = ids if said is None else said(ids)
        tokens = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [-7.0] * len(ids)}
        choice = {"token_ids": ids, "finish_reason": "length", "logprobs": tokens}
        return 200, {"choices": [choice], "model": body["model"]}

    def chat(self, body):
        with self.lock:
            self.asked.append(number := len(self.asked))
        status, text = self.critic(number)
        if self.limit and self.limit not in body:
            status, text = 400, f"Unsupported parameter; use '{self.limit}'"
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        return status, {"choices": [choice]} if status == 200 else text


class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stub

    def do_GET(self):
        status, entries = self.server.models
        self.server.listed += 1
        if isinstance(entries, list):
            entries = {"data": [*entries, *({"id": name} for name in self.server.adapters)]}
        self.answer(status, entries)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.append(self.headers["Authorization"])
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if self.path.endswith("/load_lora_adapter"):
                self.server.adapters.add(body["lora_name"])
                return self.answer(200, "done")
            if self.path.endswith("/unload_lora_adapter"):
                self.server.adapters.discard(body["lora_name"])
                return self.answer(200, "done")
            chat = self.path.endswith("/chat/completions")
            return self.answer(*(self.server.chat(body) if chat else self.server.complete(body)))

    def answer(self, status, said):
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def stub():
    with Stub() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def url(stub):
    return f"http://127.0.0.1:{stub.server_port}/v1"


def sampled(stub, **changes):
    return {
        **TINY, "sampler__engine": "server", "sampler__url": url(stub), "sampler__model": "tiny",
        "sampler__retries": 0, "sampler__timeout": 20.0, "sampler__logprobs": "tempered", **changes,
    }  # fmt: skip


def criticized(stub, **changes):
    return {
        **TINY, "author__kind": "server", "author__url": url(stub), "author__model": "tiny",
        "author__retries": 0, "prompt__form": "plain", **changes,
    }  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def column(workdir, name):
    return [line.get(name, 0) for line in runs.steps_of(workdir)]


def steps(workdir):
    """The number of steps that a run has done."""
    return len(runs.steps_of(workdir))


def beyond(ids):
    return [*ids[:-1], 1450]


# ------------------------------------------------------------------------------------ sampler


@pytest.mark.long
def test_ids_beyond_the_vocabulary_cost_their_rows(stub, tmp_path, capsys, monkeypatch):
    """One in three completions, also in evaluations. No file has the key."""
    monkeypatch.setenv("STUB_KEY", "sk-secret-0123456789")
    monkeypatch.setenv("HF_TOKEN", "hf_secret0123456789")
    stub.spoil = lambda number, seed: beyond if seed % 3 == 0 else None
    settings = sampled(stub, train__steps=2, eval__path="bundled:held_out", eval__limit=6)
    settings |= {"sampler__key_env": "STUB_KEY"}
    assert main.main(runs.argv("opsd", tmp_path, **settings)) == 0
    spoiled = [seed % 3 == 0 for seed in stub.drawn]
    assert len(spoiled) == 6 + 8 + 8 + 6
    expected = [float(sum(spoiled[6:14])), float(sum(spoiled[14:22]))]
    assert sum(expected) > 0
    assert column(tmp_path, "rollout_failed") == expected
    assert column(tmp_path, "failed") == column(tmp_path, "bad") == [0, 0]
    assert all(np.isfinite(column(tmp_path, "loss")))
    records = lines(tmp_path / "rollouts" / "step_000001.jsonl")
    for record in records:
        failed = record["finish"] == "failed"
        assert ("has the invalid id 1450" in record["finish_detail"]) == failed
        assert (record["completion_ids"] == []) == failed
        assert record["taught"] != failed
        assert record["correct"] is None or not failed
    assert sum(record["finish"] == "failed" for record in records) == expected[0]
    said, err = capsys.readouterr()
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"secret0123" in text for text in [*files, said.encode(), err.encode()])
    assert not any(b"sk-secret" in text for text in [*files, said.encode(), err.encode()])
    assert set(stub.keys) == {"Bearer sk-secret-0123456789"}
    first = json.loads((tmp_path / "eval" / "step_000000.json").read_text())
    assert first["scores"]["en"]["failed"] == sum(spoiled[:6]) / 6
    assert f"{sum(spoiled[:6])} of 6 samples failed, the first: " in said
    assert "completions failed, the first: the completion has the invalid id 1450" in said


@pytest.mark.long
def test_each_fault_of_a_server_costs_its_row(stub, tmp_path):
    """An invalid id, an early end, a refusal, and a reply that never comes: 4 of 8 completions."""
    ending, known = threading.Event(), {}

    def spoil(number, seed):
        kind = known.setdefault(seed, len(known))  # an attempt after the first has the same fault
        if kind == 3:
            ending.wait(20)
        return {0: beyond, 1: lambda ids: ids[:-3], 2: REFUSED}.get(kind)

    stub.spoil = spoil
    settings = sampled(stub, train__steps=1, sampler__timeout=2.0, sampler__concurrency=1)
    assert main.main(runs.argv("opsd", tmp_path, **settings)) == 0
    ending.set()
    assert column(tmp_path, "rollout_failed") == [4]
    assert column(tmp_path, "failed") == [0]
    assert column(tmp_path, "taught") == [4]
    records = lines(tmp_path / "rollouts" / "step_000001.jsonl")
    details = [record["finish_detail"] for record in records if record["finish"] == "failed"]
    words = ["has the invalid id 1450", "ended after 5 of 8 tokens", "(refused): HTTP 400"]
    words += ["(timeout): no complete reply within 2 s (sampler.timeout)"]
    for word in words:
        assert sum(word in detail for detail in details) == 1, (word, details)


@pytest.mark.long
def test_a_step_without_any_completion_is_skipped(stub, tmp_path, capsys):
    """Weights and optimizer stay, and the run ends with an exit code of its own."""
    stub.spoil = lambda number, seed: REFUSED if steps(tmp_path) == 1 else None
    assert main.main(runs.argv("opsd", tmp_path, **sampled(stub))) == 4
    assert column(tmp_path, "failed") == column(tmp_path, "no_loss") == [0, 1, 0]
    assert column(tmp_path, "rollout_failed") == [0, 8, 0]
    assert column(tmp_path, "update_norm")[1] == 0
    rates = column(tmp_path, "learning_rate")
    assert rates[1] == rates[2]  # the schedule waits
    out = capsys.readouterr().out
    assert "step 2 is skipped: 8 of 8 completions failed, the first: " in out
    assert "step 2 is not saved, because it was skipped" in out
    assert "skipped 1 step, because too few completions, replies or rewards were usable" in out
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").steps() == [1, 3]
    # The same command again adds nothing, and ends as before.
    assert main.main(runs.argv("opsd", tmp_path, **sampled(stub))) == 4


@pytest.mark.long
def test_several_steps_without_completions_stop_the_run(stub, tmp_path, capsys):
    stub.spoil = lambda number, seed: REFUSED if steps(tmp_path) else None
    argv = runs.argv("opsd", tmp_path, **sampled(stub, train__steps=6))
    with pytest.raises(SystemExit) as ended:
        main.main(argv)
    said = str(ended.value)
    assert said.startswith("error: step 4: 8 of 8 completions failed, the first: ")
    assert "HTTP 400" in said
    assert "Unsupported value" in said
    assert "(3 failed steps in a row, and guards.bad_steps is 3)" in said
    assert said.endswith(f"; the same command continues {tmp_path}")
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").steps() == [1]
    stub.spoil = lambda number, seed: None
    assert main.main(argv) == 0
    assert column(tmp_path, "failed") == [0] * 6
    assert "(continued)" in capsys.readouterr().out


@pytest.mark.long
def test_an_evaluation_without_most_samples_ends_and_goes_on(stub, tmp_path):
    settings = sampled(stub, train__steps=0, eval__path="bundled:held_out", eval__limit=4)
    stub.spoil = lambda number, seed: REFUSED if number else None
    argv = runs.argv("opsd", tmp_path, **settings, sampler__concurrency=1)
    with pytest.raises(SystemExit, match="3 of 4 samples of an evaluation failed, the first: "):
        main.main(argv)
    kept = lines(tmp_path / "eval" / "step_000000.partial.jsonl")[1:]
    assert [line["index"] for line in kept] == [0]
    stub.spoil = lambda number, seed: None
    assert main.main(argv) == 0
    result = json.loads((tmp_path / "eval" / "step_000000.json").read_text())
    assert result["scores"]["en"]["failed"] == 0


@pytest.mark.long
def test_samples_that_were_given_up_are_requested_again(stub, tmp_path):
    """Three of the last four fail; the fourth was only not waited for, so it is not wrong."""
    settings = sampled(stub, train__steps=0, eval__path="bundled:held_out", eval__limit=6)
    argv = runs.argv("opsd", tmp_path, **settings, sampler__concurrency=1)
    stub.spoil = lambda number, seed: REFUSED if number > 1 else None
    with pytest.raises(SystemExit, match="4 of 6 samples of an evaluation failed, the first: "):
        main.main(argv)
    first = len(stub.drawn)
    stub.spoil = lambda number, seed: REFUSED if number - first < 3 else None
    assert main.main(argv) == 0
    result = json.loads((tmp_path / "eval" / "step_000000.json").read_text())
    assert result["scores"]["en"]["failed"] == 3 / 6


# ------------------------------------------------------------------------------------- critic


@pytest.mark.long
def test_a_critic_that_refuses_every_request_stops_the_run_at_once(stub, tmp_path):
    stub.critic = lambda number: REFUSED
    argv = runs.argv("critique", tmp_path, **criticized(stub, guards__bad_steps=1))
    with pytest.raises(SystemExit) as ended:
        main.main(runs.argv("critique", tmp_path, **criticized(stub)))
    said = str(ended.value)
    assert said.startswith(f"error: step 1: none of the 8 replies of {url(stub)} (author.url) co")
    assert "the first is refused: HTTP 400" in said
    assert "Unsupported value" in said
    assert len(runs.steps_of(tmp_path)) == 1
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").steps() == []
    # Replies that cannot be read are no settings: the limit decides.
    stub.critic = lambda number: (200, "ok")
    with pytest.raises(SystemExit, match="the first is no_case: the case is missing"):
        main.main(argv)
    assert column(tmp_path, "failed") == [1]


@pytest.mark.long
def test_a_refusal_at_first_counts_if_no_later_reply_is_usable(stub, tmp_path):
    """As in ../shared/cases/reports/stub_400.py, which gives the reply `ok`."""
    stub.limit, stub.critic = "max_completion_tokens", lambda number: (200, "ok")
    with pytest.raises(SystemExit) as ended:
        main.main(runs.argv("critique", tmp_path, **criticized(stub)))
    said = str(ended.value)
    assert said.startswith(f"error: step 1: none of the 8 replies of {url(stub)} (author.url) co")
    assert "the first is no_case: the case is missing, or not one of the four; sent again" in said
    assert "refused max_tokens: HTTP 400" in said
    assert "\n" not in said
    assert len(runs.steps_of(tmp_path)) == 1
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").steps() == []


@pytest.mark.parametrize(
    "models, changes, words",
    [
        ((200, [{"id": "critic-32b"}, {"id": "b"}]), {"author__model": "critic"},
         "author.model is 'critic': {url} serves 'critic-32b'"),
        ((200, [{"id": "tiny", "max_model_len": 512}]), {"author__max_tokens": 512},
         "author.max_tokens is 512: with a prompt, this exceeds the 512 tokens that {url} allows"),
        ((401, "no key"), {}, "{url}/models did not list its models in 1 attempt (refused): HTTP"),
        ((500, "down"), {}, "(server_error): HTTP 500"),
        (None, {}, "did not list its models in 1 attempt (unreachable)"),
    ],
)  # fmt: skip
def test_a_critic_is_asked_before_training(stub, tmp_path, capsys, models, changes, words):
    settings = criticized(stub, **changes)
    if models is None:
        stub.server_close()
        stub.shutdown()
    else:
        stub.models = models
    assert main.main(runs.argv("critique", tmp_path / "w", **settings)) == 2
    said = capsys.readouterr().err
    assert words.format(url=url(stub)) in said
    assert said.count("\n") == 1
    assert not (tmp_path / "w").exists()
    assert stub.asked == []


@pytest.mark.parametrize(
    "models, words",
    [
        ((404, "nothing here"), "author.model and author.max_tokens are not checked"),
        ((200, "welcome"), "author.model and author.max_tokens are not checked"),
        ((200, []), "models lists no models: author.model and author.max_tokens are not checked"),
        ((200, [{"id": "tiny", "max_model_len": 800}]), "server will refuse the longest attempts"),
        ((200, [{"id": "tiny", "max_model_len": 257}]), "server will refuse the longest attempts"),
        ((200, [{"id": "tiny"}]), ""),
    ],
)
def test_a_critic_that_tells_less_is_taken(stub, tmp_path, capsys, models, words):
    stub.models = models
    changes = {"author__max_tokens": 256, "rollout__max_tokens": 500}
    config = runs.config("critique", **criticized(stub, **changes))
    run_plan.make_plan(config)  # as for a replay, which asks no author
    assert stub.listed == 0
    train.prepare(config, tmp_path / "w")
    assert stub.listed == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == bool(words)


def test_a_step_without_replies_keeps_its_policy_loss():
    """A model on the sampler's server that fails as an author counts like an author's server."""
    ones = np.ones((2, 3), bool)
    zeros = np.zeros_like(ones)
    batch = layout.Batch(
        **dict.fromkeys(layout.Batch._fields),
    )._replace(loss_BC=ones)
    lost = {"finish": "stop", "grade_status": "computed", "correct": True, "reply_detail": "away"}
    records = [lost | {"reply_status": "filtered"}, lost | {"reply_status": "timeout"}]
    served = {"author__kind": "server", "author__url": "http://h/v1", "author__model": "m"}
    config = runs.config("critique", **served)

    def drop(records, policy_BC=None):
        found, failure = failed_steps.drop_failed_loss(
            config, records, batch._replace(policy_BC=policy_BC)
        )
        kept = found.policy_BC is not None and bool(found.policy_BC.any())
        return bool(found.loss_BC.any()), kept, failure and failure.reason

    assert drop(records, ones) == (False, True, None)
    reason = "none of the 1 replies of http://h/v1 (author.url) could be used; the first is timeout"
    assert drop(records) == drop(records, zeros) == (False, False, f"{reason}: away")
    raised = [x | {"grade_detail": "OSError: away", "correct": None} for x in records]
    assert drop(raised, ones)[:2] == (False, False)
    reason = "2 of 2 completions got no reward from the function of reward.kind, the first: OSError"
    assert str(drop(raised, ones)[2]) == f"{reason}: away"
    # More than half count, as for a server; a completion without a gold answer does not count.
    ungraded = records[0] | {"correct": None}
    for lost, others, skipped in (
        (1, [], True),
        (1, [records[0]], False),
        (2, [records[0]], True),
        (1, [ungraded], True),
        (2, [ungraded, *records[:1] * 2], False),
    ):
        some = [*raised[:1] * lost, *others]
        assert (drop(some, ones)[2] is not None) == skipped
    # Without most of the logits, a step is bad instead.
    blank = records[0] | {"finish": "nonfinite", "correct": None}
    assert drop([blank, blank, records[0]], ones) == (False, False, None)
    assert drop([blank, records[0]], ones)[:2] == (True, True)
    # A refusal before an unusable reply counts as a refusal, whatever the policy loss.
    again = "sent again with max_completion_tokens, because the server refused max_tokens: no"
    refused = [records[0], records[1] | {"reply_status": "no_case", "reply_detail": again}]
    assert drop(refused, ones)[:2] == (False, False)
    assert str(drop(refused, ones)[2]).endswith(f"or not one of the four; {again}")
    found = failed_steps.drop_failed_loss(config, refused, batch)[1]
    assert found is not None
    assert found.refused
    assert drop([records[0], refused[1] | {"reply_status": "ok"}])[2] is None
    config.author.kind, config.sampler.url = "student", "http://s/v1"
    assert drop(records) == (True, False, None)
    records[1]["reply_status"] = "failed"
    assert "http://s/v1 (sampler.url)" in str(drop(records)[2])


# -------------------------------------------------------------------------------------- reward


class Reward:
    """A reward function that fails in the completions of some calls."""

    calls, fails = 0, staticmethod(lambda number: False)


def reward(gold, text):
    Reward.calls += 1
    if Reward.fails(Reward.calls - 1):
        raise ConnectionError("the judge is away")
    return len(text) % 2


@pytest.mark.long
def test_a_step_in_which_every_reward_raised_is_skipped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Reward, "calls", 0)
    monkeypatch.setattr(Reward, "fails", lambda number: number in (0, *range(8, 16)))
    settings = TINY | {"train__batch": 4, "rollout__per_prompt": 2}
    kind = {"reward__kind": "test_failed_steps:reward"}
    assert main.main(runs.argv("grpo", tmp_path, **settings, **kind)) == 4
    assert column(tmp_path, "failed") == [0, 1, 0]
    assert column(tmp_path, "grade_raised") == [1, 8, 0]
    assert column(tmp_path, "update_norm")[1] == 0
    assert column(tmp_path, "graded") == [7, 0, 8]
    records = lines(tmp_path / "rollouts" / "step_000001.jsonl")
    given = [len(x["completion"]) % 2 for x in records if not x["grade_status"].startswith("rai")]
    assert column(tmp_path, "reward")[0] == pytest.approx(sum(given) / 7)
    [alone] = [x for x in records if x["correct"] is None]
    sibling = next(x for x in records if x["id"] == alone["id"] and x is not alone)
    assert alone["advantage"] == sibling["advantage"] == 0  # both are alone in their groups
    out = capsys.readouterr().out
    why = "of 8 completions got no reward from the function of reward.kind, the first: "
    why += "ConnectionError: the judge is away"
    assert f"warning: step 1: 1 {why}\n" in out
    assert f"step 2 is skipped: 8 {why}\n" in out
    assert alone["grade_status"] == "raised:ConnectionError"
    assert alone["grade_detail"] == "ConnectionError: the judge is away"


# ----------------------------------------------------------------------------- the gap of logps


def test_the_bound_of_the_gap(capsys):
    """It warns, or stops the run if a loss reads the numbers."""
    served = {"sampler__engine": "server", "sampler__url": "http://h/v1", "sampler__model": "m"}
    config = runs.config("opsd", **served)
    config.model.dtype = "float32"
    check = lambda gap: sampler_server.check_sampler_server_gap(config, 7, {"logp_gap_max": gap})  # noqa: E731
    assert check(float("nan")) == []  # of a bad step, which has its own message
    assert check(0.01) == sampler_server.check_sampler_server_gap(config, 7, {}) == []
    [line] = check(0.06)  # the gap of a server that kept its old head
    assert line.startswith("warning: step 7: logp_gap_max is 0.06, above 0.01 (guards.logp_gap): ")
    config.model.dtype = "bfloat16"
    assert check(2.9) == []
    assert len(check(3.1)) == 1
    config.loss.rollout_clip = 2.0
    with pytest.raises(failures.EngineError, match=r"loss\.rollout_clip would use these numbers"):
        check(3.1)
    config.guards.logp_gap = 4.0
    assert check(3.1) == []
    config.sampler.engine = "local"
    assert check(5.0) == []


@pytest.mark.long
def test_a_gap_stops_a_run_whose_loss_reads_it(stub, tmp_path, capsys):
    """The step is not saved. The stub's log-probabilities are those of no model."""
    settings = sampled(stub, train__steps=1)
    assert main.main(runs.argv("opsd", tmp_path / "a", **settings)) == 0
    assert "warning: step 1: logp_gap_max is " in capsys.readouterr().out
    settings |= {"loss__rollout_clip": 2.0}
    with pytest.raises(SystemExit, match=r"error: step 1: logp_gap_max is .*above 0\.01"):
        main.main(runs.argv("opsd", tmp_path / "b", **settings))
    assert checkpoint.Checkpoints(tmp_path / "b" / "checkpoints").steps() == []


# ------------------------------------------------------------------------------- the streaks


def test_streaks_of_failed_steps_are_counted_again(tmp_path):
    """From the lines of metrics.jsonl, apart from bad steps."""
    rows = [{"step": 1, "failed": 1.0}, {"step": 2, "failed": 0.0, "bad": 1.0}]
    rows += [{"step": 3, "failed": 1.0}, {"step": 4, "failed": 1.0}]
    bad = bad_steps.BadSteps(tmp_path, 3, [json.dumps(row) for row in rows])
    assert (bad.failed, bad.streak) == (2, 0)
    good = {"bad": 0, "weights_finite": 1, "loss": np.float32(0), "grad_norm": np.float32(0)}
    bad.record(5, None, None, good, bad_steps.Failure("the server is away"))
    with pytest.raises(failures.EngineError, match=r"^step 5: the server is away \(3 failed steps"):
        bad.check(5, list)
    assert not (tmp_path / "bad").exists()
    never = bad_steps.BadSteps(tmp_path, 0)
    for step in range(1, 9):
        never.record(step, None, None, good, bad_steps.Failure("away"))
        never.check(step, list)
    [line] = never.refuses_save(8, False)
    assert line == "step 8 is not saved, because the last 8 steps were skipped"
    bad = bad_steps.BadSteps(tmp_path, 0)
    bad.record(1, None, None, good, bad_steps.Failure("away", refused=True))
    with pytest.raises(failures.EngineError, match=r"^step 1: away$"):
        bad.check(1, list)
