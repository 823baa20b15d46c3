"""An engine behind HTTP: a server of our own on 127.0.0.1 that speaks both dialects.

Oracles: a table of next-token probabilities that the stub draws from (NumPy, float64), the full
forward of a tiny model, and what the stub was told to do with each prompt.
"""

import collections
import contextlib
import dataclasses
import functools
import http.server
import io
import json
import socket
import struct
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copsd_jax.model import transformer
from copsd_jax.sampler import request
from copsd_jax.servers import client, remote_engine

V = 24
KEY, VARIABLE = "sk-stub-0123456789", "STUB_ENGINE_KEY"
TABLE = np.random.default_rng(3).normal(0.0, 1.5, (V, V))  # logits of the next id, by the last
PLAIN = request.Sampling(max_tokens=6)
CONFIG = dataclasses.replace(transformer.SHAPES["tiny"], vocab_size=V, tie_embeddings=False)
DECODER = transformer.Decoder(CONFIG, jnp.float32)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def truncated(logits, temperature, top_k, top_p, min_p):
    """Log-probabilities of what is drawn from, the plain way: sorted, cut, renormalised."""
    logp = log_softmax(np.asarray(logits, np.float64) / temperature)
    order = np.argsort(-logp, kind="stable")
    if top_k > 0:
        order = order[:top_k]
    p = np.exp(log_softmax(logp[order]))
    order = order[: 1 + np.searchsorted(np.cumsum(p), top_p - 1e-12)] if top_p < 1 else order
    order = order[np.exp(logp[order]) >= min_p * np.exp(logp[order[0]])]
    out = np.full(len(logp), -np.inf)
    out[order] = log_softmax(logp[order])
    return out


def by_table(ids):
    return TABLE[ids[-1]]


# ------------------------------------------------------------------------------------ the stub


def drawn(stub, body, params, prompt, limit, seed):
    """(ids, their log-probabilities of the stub's kind, finish) as a server samples them."""
    rng = np.random.default_rng(seed)
    ids, logps = [], []
    while len(ids) < limit:
        logits = stub.logits([*prompt, *ids])
        cold = params["temperature"] == 0
        temperature = params["temperature"] or 1.0
        kept = truncated(logits, temperature, params["top_k"], params["top_p"], params["min_p"])
        token = int(np.argmax(logits)) if cold else int(rng.choice(V, p=np.exp(kept)))
        kinds = {
            "raw": log_softmax(logits),
            "tempered": log_softmax(np.asarray(logits, np.float64) / temperature),
            "processed": log_softmax(logits) if cold else kept,
        }
        ids.append(token)
        logps.append(float(kinds[stub.logprobs][token]))
        if token in params["stop_token_ids"]:
            return ids, logps, "stop"
    return ids, logps, "length"


class _Stub(http.server.ThreadingHTTPServer):
    """What an engine was asked, and what it was told to do."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Engine)
        self.lock, self.ending = threading.Lock(), threading.Event()
        self.seen, self.requests = collections.Counter(), []
        self.under_way = self.most = 0
        self.told: dict[tuple, Any] = {}  # by prompt: a fault, seconds, edits, or by its number
        self.answers: dict[str, tuple[int, object]] = {}  # by path, of commands
        self.lost: dict[str, bool] = {}  # by path: whether the next reply gets lost
        self.served: dict[str, dict] = {"tiny": {"max_model_len": 64}, "other": {}}
        self.logits, self.logprobs = by_table, "tempered"
        self.only_served = False  # whether other models and adapters are refused


class _Engine(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Stub

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.requests.append((self.path, None, dict(self.headers)))
        data = [{"id": name, **more} for name, more in self.server.served.items()]
        self.answer(200, {"object": "list", "data": data} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, body, dict(self.headers)))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if self.path in ("/v1/completions", "/generate"):
                self.complete(body)
            else:
                self.manage(body)

    def complete(self, body: dict) -> None:
        stub, native = self.server, self.path == "/generate"
        prompt = body["input_ids"] if native else body["prompt"]
        params = body["sampling_params"] if native else body
        limit = params["max_new_tokens"] if native else params["max_tokens"]
        seed = params["sampling_seed"] if native else params["seed"]
        with stub.lock:
            stub.seen[tuple(prompt)] += 1
            stub.under_way += 1
            stub.most = max(stub.most, stub.under_way)
            number = stub.seen[tuple(prompt)]
        told = stub.told.get(tuple(prompt))
        found = told(number) if callable(told) else told
        name = body.get("lora_path", "tiny") if native else body["model"]
        try:
            if stub.only_served and name not in stub.served:
                return self.answer(404, f"The model `{name}` does not exist.")
            if isinstance(found, str):
                return FAULTS[found](self)
            if isinstance(found, float):
                stub.ending.wait(found)
        finally:
            with stub.lock:
                stub.under_way -= 1
        edit = found if isinstance(found, dict) else {}
        ids, logps, finish = drawn(stub, body, params, prompt, limit, seed)
        ids, logps = edit.get("ids", ids), edit.get("logps", logps)
        finish = edit.get("finish", finish)
        made = spoken_natively(prompt, ids, logps, finish) if native else spoken(
            prompt, ids, logps, finish
        )  # fmt: skip
        self.answer(200, edit.get("change", lambda reply: reply)(made))

    def manage(self, body: dict) -> None:
        stub, name = self.server, body.get("lora_name", "")
        status, said = stub.answers.get(self.path, (200, "Success: done"))
        done = self.path not in stub.answers
        if done and self.path.endswith("/load_lora_adapter"):
            if name in stub.served:
                status, said = 400, f"The lora adapter '{name}' has already been loaded."
            stub.served[name] = {"parent": "tiny"}
        gone = done and self.path.endswith("/unload_lora_adapter")
        if gone and stub.served.pop(name, None) is None:
            status, said = 404, f"The lora adapter '{name}' cannot be found."
        if stub.lost.pop(self.path, None):
            return FAULTS["reset"](self)
        self.answer(status, said)

    def answer(self, status: int, said: object) -> None:
        body = said.encode() if isinstance(said, str) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def spoken(prompt, ids, logps, finish):
    tokens = [f"token_id:{i}" for i in ids]
    return {
        "object": "text_completion",
        "choices": [{
            "index": 0, "text": "not read", "finish_reason": finish, "token_ids": list(ids),
            "prompt_token_ids": list(prompt),
            "logprobs": {"tokens": tokens, "token_logprobs": list(logps)},
        }],
    }  # fmt: skip


def spoken_natively(prompt, ids, logps, finish):
    reason = finish if isinstance(finish, dict) else {"type": finish}
    pairs = [[logp, i, None] for logp, i in zip(logps, ids, strict=True)]
    meta = {"prompt_tokens": len(prompt), "finish_reason": reason, "output_token_logprobs": pairs}
    return {"text": "not read", "output_ids": list(ids), "meta_info": meta}


def _reset(to: _Engine) -> None:
    to.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    to.close_connection = True
    for part in (to.rfile, to.wfile, to.connection):
        part.close()
    to.wfile = io.BytesIO()  # which the handler flushes


def _half(to: _Engine) -> None:
    body = json.dumps(spoken([1], [2] * 90, [-1.0] * 90, "length")).encode()
    to.send_response(200)
    to.send_header("Content-Length", str(len(body)))
    to.end_headers()
    to.wfile.write(body[: len(body) // 2])
    to.close_connection = True


FAULTS = {
    "reset": _reset,
    "half": _half,
    "broken": lambda to: to.answer(500, "out of luck"),
    "no_json": lambda to: to.answer(200, '{"choices": [{"ind'),
    "unknown": lambda to: to.answer(404, f"no model, {to.headers['Authorization']}"),
    "silent": lambda to: to.server.ending.wait(30),
}


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY)
    with _Stub() as stub:
        threading.Thread(target=stub.serve_forever, args=(0.02,), daemon=True).start()
        yield stub
        stub.ending.set()
        stub.shutdown()


def at(port: int, **changes: object) -> remote_engine.EngineServer:
    api = client.Server(
        f"http://127.0.0.1:{port}/v1", "tiny", VARIABLE, timeout=20.0, retries=2, backoff=0.01,
        concurrency=4, section="sampler",
    )  # fmt: skip
    return change(remote_engine.EngineServer(api, dialect="vllm", logprobs="tempered"), **changes)


def change(server: remote_engine.EngineServer, **changes: Any) -> remote_engine.EngineServer:
    """The server with other values of its own fields or of its `api`."""
    own = {name: changes.pop(name) for name in list(changes) if hasattr(server, name)}
    return dataclasses.replace(server, api=dataclasses.replace(server.api, **changes), **own)


def server_of(engine, **changes: object) -> remote_engine.EngineServer:
    return at(engine.server_address[1], **changes)


def keys_of(n: int, seed: int = 0):
    return request.derive_sampling_keys(seed, "rollout", 0, [f"row {i}" for i in range(n)], [0] * n)


def generate(server, prompts, sampling: Any = PLAIN, **more):
    vocabulary = request.Vocabulary(
        more.pop("valid_V", np.ones(V, bool)), more.pop("token_bytes", ())
    )
    more = {"keys": keys_of(len(prompts)), "vocabulary": vocabulary, **more}
    return remote_engine.generate(server, prompts, sampling, **more)


BOTH = pytest.mark.parametrize("dialect", ["vllm", "sglang"])


# ----------------------------------------------------------------------------- what is sampled


# The stub answers from several threads; one at a time makes the weights and compiles: several at
# once now and then end the process, with the cache of compiled programs on disk.
ONE = threading.Lock()


@functools.cache
def params():
    tree = transformer.init_params(CONFIG, jax.random.key(1), jnp.float32)
    tree["head"]["kernel"] = tree["head"]["kernel"] * 12.0  # logits of deviation 2
    return tree


@jax.jit
def _forward(ids_1L, tree):
    positions = jnp.arange(ids_1L.shape[1], dtype=jnp.int32)[None]
    stream = transformer.Stream(ids_1L, positions, jnp.ones_like(ids_1L))
    hidden = DECODER.apply({"params": tree}, (stream,))[0].hidden_BLD[0]
    return transformer.compute_model_logits(hidden, transformer.get_head(tree))


def by_model(ids):
    """Logits of the next id under the tiny model; what stands behind the ids cannot be seen."""
    with ONE:
        padded = jnp.asarray([[*ids, *[0] * (16 - len(ids))]], jnp.int32)
        return np.asarray(_forward(padded, params()))[len(ids) - 1]


@BOTH
@pytest.mark.parametrize("logprobs", remote_engine.LOGPROBS)
def test_log_probabilities_are_the_models(engine, dialect, logprobs):
    """At every kind of setting, either equal to the model's forward or absent."""
    engine.logits, engine.logprobs = by_model, logprobs
    settings = [
        request.Sampling(max_tokens=5),
        request.Sampling(max_tokens=5, temperature=0.7),
        request.Sampling(max_tokens=5, temperature=1.3, top_k=6, top_p=0.9, min_p=0.02),
        request.Sampling(max_tokens=5, top_p=0.8),
        request.Sampling(max_tokens=5, temperature=0.0, top_k=3),
    ]
    # (logps, logps_truncated) by kind of setting: whether they are there.
    there = {
        "raw": ["tt", "ff", "ff", "tf", "tt"],
        "tempered": ["tt", "tt", "tf", "tf", "tt"],
        "processed": ["tt", "tt", "ft", "ft", "tt"],
    }[logprobs]
    prompts = [(3, 5), (7,), (1, 2, 3), (9, 9), (4,)]
    server = server_of(engine, dialect=dialect, logprobs=logprobs)
    made = generate(server, prompts, settings).completions
    for prompt, s, one, known in zip(prompts, settings, made, there, strict=True):
        whole = by_model_rows([*prompt, *one.ids])[len(prompt) - 1 : -1]
        temperature = s.temperature or 1.0
        tempered = [
            log_softmax(row / temperature)[i] for row, i in zip(whole, one.ids, strict=True)
        ]
        cut = [
            truncated(row, temperature, s.top_k, s.top_p, s.min_p)[i] if s.temperature else 0.0
            for row, i in zip(whole, one.ids, strict=True)
        ]
        for found, expected, shown in zip(
            (one.logps, one.logps_truncated), (tempered, cut), known, strict=True
        ):
            assert found.dtype == np.float32
            assert found.shape == (len(one.ids),)
            if shown == "t":
                np.testing.assert_allclose(found, expected, atol=1e-4)
            else:
                assert np.isnan(found).all()
        if s.temperature == 0:
            assert list(one.ids) == [int(np.argmax(row)) for row in whole]
        assert remote_engine.reports_log_probs(logprobs, s) == tuple(x == "t" for x in known)


def by_model_rows(ids):
    padded = jnp.asarray([[*ids, *[0] * (16 - len(ids))]], jnp.int32)
    return np.asarray(_forward(padded, params()), np.float64)[: len(ids)]


@BOTH
def test_the_distribution_is_the_one_asked_for(engine, dialect):
    """Chi-square of 600 first tokens: settings reach the server, and seeds are independent."""
    s = request.Sampling(max_tokens=1, temperature=0.8, top_k=12, top_p=0.95, min_p=0.02)
    prompts = [(5, 11)] * 600
    server = server_of(engine, dialect=dialect, concurrency=8)
    made = generate(server, prompts, s).completions
    counts = np.bincount([one.ids[0] for one in made], minlength=V)
    p = np.exp(truncated(TABLE[11], 0.8, 12, 0.95, 0.02))
    assert counts[p == 0].sum() == 0
    expected = 600 * p[p > 0]
    statistic = ((counts[p > 0] - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    assert degrees >= 5
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)


@BOTH
def test_the_same_keys_give_the_same_texts(engine, dialect):
    prompts = [(i % V, 1) for i in range(12)]
    server = server_of(engine, dialect=dialect)
    first = generate(server, prompts).completions
    again = generate(change(server, concurrency=1), prompts).completions
    other = generate(server, prompts, keys=keys_of(12, seed=1)).completions
    assert [one.ids for one in first] == [one.ids for one in again]
    assert sum(a.ids == b.ids for a, b in zip(first, other, strict=True)) < 3
    sent = [body for _, body, _ in engine.requests]
    name = "sampling_seed" if dialect == "sglang" else "seed"
    seeds = [body.get("sampling_params", body)[name] for body in sent]
    assert len(set(seeds)) == 24  # 12 of the first two calls, 12 of the last
    high, low = np.asarray(keys_of(12)).astype(object).T
    expected = {(int(h) * 2**32 + int(w)) // 2**11 for h, w in zip(high, low, strict=True)}
    assert set(seeds[:12]) == set(seeds[12:24]) == expected
    assert max(seeds) < 2**53


# --------------------------------------------------------------------------------- what is sent


def test_what_a_vllm_is_sent(engine):
    s = request.Sampling(4, temperature=0.5, top_p=0.9, min_p=0.1, stop_ids=(7, 2), stop=("ab",))
    pieces = [bytes([97 + i]) for i in range(V)]
    server = server_of(engine)
    generate(server, [(3, 1, 4)], s, limits=[2], token_bytes=pieces)
    generate(change(server, adapter="a1", key_env=""), [(5,)],
             dataclasses.replace(s, top_k=9, stop=()))  # fmt: skip
    (path, body, headers), (_, second, plain) = engine.requests
    seed = body.pop("seed")
    assert isinstance(seed, int)
    assert path == "/v1/completions"
    assert body == {
        "model": "tiny", "prompt": [3, 1, 4], "max_tokens": 2, "n": 1, "stream": False,
        "echo": False, "add_special_tokens": False, "temperature": 0.5, "top_p": 0.9, "top_k": -1,
        "min_p": 0.1, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "stop_token_ids": [7, 2], "stop": ["ab"], "ignore_eos": True,
        "include_stop_str_in_output": True, "skip_special_tokens": False,
        "spaces_between_special_tokens": False, "logprobs": 0, "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }  # fmt: skip
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert "Authorization" not in plain
    assert (second["model"], second["top_k"], second["max_tokens"]) == ("a1", 9, 4)


def test_what_an_sglang_is_sent(engine):
    s = request.Sampling(4, temperature=0.5, top_k=9, stop_ids=(7, 2))
    server = server_of(engine, dialect="sglang")
    generate(server, [(3, 1, 4)], s)
    generate(change(server, adapter="a1"), [(5,)])
    (path, body, _), (_, second, _) = engine.requests
    assert isinstance(body["sampling_params"].pop("sampling_seed"), int)
    assert path == "/generate"
    assert body == {
        "input_ids": [3, 1, 4], "return_logprob": True, "logprob_start_len": -1,
        "top_logprobs_num": 0, "return_text_in_logprobs": False, "stream": False,
        "sampling_params": {
            "max_new_tokens": 4, "n": 1, "temperature": 0.5, "top_p": 1.0, "top_k": 9,
            "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "stop_token_ids": [7, 2], "stop": [], "ignore_eos": False,
            "no_stop_trim": True, "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        },
    }  # fmt: skip
    assert second["lora_path"] == "a1"
    assert second["sampling_params"]["ignore_eos"] is True  # nothing to stop at
    assert second["sampling_params"]["top_k"] == -1


@BOTH
def test_order_is_kept_and_concurrency_is_a_limit(engine, dialect):
    """The earlier rows are answered later."""
    prompts = [(i, V - 1 - i) for i in range(V)]
    engine.told = {p: 0.03 * (4 - i % 4) for i, p in enumerate(prompts)}
    looks, early = [], []
    server = server_of(engine, dialect=dialect, concurrency=5)
    result = generate(
        server, prompts, progress=looks.append, done=lambda i, one: early.append((i, one))
    )
    bodies = {tuple(b.get("prompt", b.get("input_ids"))): b for _, b, _ in engine.requests}
    for i, (prompt, one) in enumerate(zip(prompts, result.completions, strict=True)):
        body = bodies[prompt]
        params = body.get("sampling_params", body)
        seed = params.get("seed", params.get("sampling_seed"))
        ids, _, finish = drawn(engine, body, params, prompt, 6, seed)
        assert (one.ids, one.finish) == (tuple(ids), finish), i
    assert 2 <= engine.most <= 5
    order = [i for i, _ in early]
    assert sorted(order) == list(range(V))
    assert order != list(range(V))
    assert all(result.completions[i] is one for i, one in early)
    assert [look.done for look in looks] == list(range(1, V + 1))
    tokens = np.cumsum([len(one.ids) for _, one in early])
    assert [look.tokens for look in looks] == tokens.tolist()
    assert result.stats == looks[-1]
    assert result.stats.total == V
    assert result.stats.prompt_tokens == 2 * V
    assert result.stats.seconds > 0
    assert generate(server, []).completions == []


# -------------------------------------------------------------------------- what ends a text


@BOTH
def test_stop_ids_and_limits(engine, dialect):
    s = request.Sampling(8, stop_ids=(2, 3, 5, 7, 11, 13))
    prompts = [(i,) for i in range(V)]
    limits = [1 + i % 8 for i in range(V)]
    made = generate(server_of(engine, dialect=dialect), prompts, s, limits=limits).completions
    for one, limit in zip(made, limits, strict=True):
        stopped = one.ids[-1] in s.stop_ids
        assert not set(one.ids[:-1]) & set(s.stop_ids)
        assert one.finish == ("stop" if stopped else "length")
        assert len(one.ids) == limit or stopped
        assert len(one.logps) == len(one.ids)
    assert {one.finish for one in made} == {"stop", "length"}


@BOTH
def test_stop_strings_end_with_the_token_that_completes_one(engine, dialect):
    """Also where the server looks for them only after some more tokens, and over bytes."""
    pieces = [bytes([97 + i]) for i in range(V)]
    pieces[4], pieces[5] = "é".encode()[:1], "é".encode()[1:]
    s = request.Sampling(6, stop=("é", "bcd"), stop_ids=(9,))
    logps = [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6]
    engine.told = {
        (1,): {"ids": [0, 1, 2, 3, 6, 6], "logps": logps, "finish": "length"},
        (2,): {"ids": [8, 4, 5], "logps": logps[:3], "finish": "stop"},
        (3,): {"ids": [1, 2, 4, 8, 5, 9], "logps": logps, "finish": "length"},
        (4,): {"ids": [5, 4, 1, 2, 0, 3], "logps": logps, "finish": "length"},
    }
    server = server_of(engine, dialect=dialect)
    made = generate(server, [(1,), (2,), (3,), (4,)], s, token_bytes=pieces).completions
    assert [one.ids for one in made] == [
        (0, 1, 2, 3), (8, 4, 5), (1, 2, 4, 8, 5, 9), (5, 4, 1, 2, 0, 3),
    ]  # fmt: skip
    assert [one.finish for one in made] == ["stop", "stop", "stop", "length"]
    np.testing.assert_allclose(made[0].logps, logps[:4], rtol=1e-6)


# ------------------------------------------------------------------------------------ failures


@BOTH
def test_a_server_that_recovers(engine, dialect):
    kinds = ["broken", "reset", "half", "no_json"]
    prompts = [(i, 2) for i in range(4)]
    engine.told = {
        p: lambda n, kind=kind: kind if n <= 2 else None
        for p, kind in zip(prompts, kinds, strict=True)
    }
    server = server_of(engine, dialect=dialect)
    made = generate(server, prompts).completions
    assert set(engine.seen.values()) == {3}
    engine.told = {}
    assert [one.ids for one in made] == [one.ids for one in generate(server, prompts).completions]


@pytest.mark.parametrize(
    ("fault", "attempts", "words"),
    [
        ("broken", 3, "(server_error): HTTP 500: out of luck"),
        ("reset", 3, "(bad_reply): the reply is incomplete"),
        ("half", 3, "(bad_reply): the reply is incomplete"),
        ("no_json", 3, '(bad_reply): not JSON: {"choices": [{"ind'),
        ("unknown", 1, "(refused): HTTP 404: no model, Bearer [key]"),
        ("silent", 2, "(timeout): no complete reply within 0.5 s (sampler.timeout)"),
    ],
)
def test_a_server_that_fails_for_one_row(engine, fault, attempts, words):
    """The row is dropped with the reason; the others are those of a server that does not fail."""
    prompts = [(i, 2) for i in range(6)]
    whole = generate(server_of(engine), prompts).completions
    engine.seen.clear()
    engine.told = {(3, 2): fault}
    patience = dict(timeout=0.5, retries=1) if fault == "silent" else {}
    early = {}
    made = generate(server_of(engine, **patience), prompts, done=early.__setitem__).completions
    assert (made[3].ids, made[3].finish, made[3].dropped) == ((), "failed", True)
    count = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    assert made[3].detail.startswith(f"no completion in {count} ")
    assert words in made[3].detail
    assert KEY not in made[3].detail
    assert made[3].detail.isprintable()
    assert engine.seen[(3, 2)] == attempts
    assert early == dict(enumerate(made))
    del made[3], whole[3]
    assert [one.ids for one in made] == [one.ids for one in whole]
    assert not any(one.dropped or one.detail for one in made)


def test_a_server_that_fails_for_most_rows_is_not_asked_for_the_rest(engine):
    """Also if the other rows take long: the wait ends when more than half of them have failed."""
    prompts = [(i, 2) for i in range(V)]
    engine.told = dict.fromkeys(prompts, "unknown") | dict.fromkeys(prompts[-4:], 15.0)
    begun = time.monotonic()
    made = generate(server_of(engine, concurrency=1), prompts).completions
    assert time.monotonic() - begun < 8
    assert {one.finish for one in made} == {"failed"}
    assert V // 2 + 1 <= sum(engine.seen.values()) <= V // 2 + 2  # the next one may have begun
    said = f"given up after {V // 2 + 1} of {V} had failed, the last: no completion in 1 attempt"
    assert [one.detail.startswith(said) for one in made] == [i > V // 2 for i in range(V)]


def test_a_server_that_is_not_there(engine):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with pytest.raises(OSError, match=r"gave no completion in 3 attempts \(unreachable"):
        generate(at(port), [(1,)])
    # Within its patience, the server is asked again, and the message names this limit.
    begun = time.monotonic()
    with pytest.raises(OSError, match=r"attempts went on for 0\.3 s \(sampler\.timeout\)"):
        generate(at(port, retries=0, patience=0.3), [(1,)])
    assert time.monotonic() - begun >= 0.3
    with pytest.raises(OSError, match=r"did not list its models in 3 attempts \(unreachable"):
        remote_engine.connect_server(at(port))


def choice(**fields):
    return lambda reply: {**reply, "choices": [{**reply["choices"][0], **fields}]}


def meta(**fields):
    return lambda reply: {**reply, "meta_info": {**reply["meta_info"], **fields}}


def logprobs_of(**fields):
    def change(reply):
        return choice(logprobs={**reply["choices"][0]["logprobs"], **fields})(reply)

    return change


LONG, FOUR = [1, 2, 3, 1, 2, 3], [-1.0] * 4


def test_a_text_of_a_server_that_says_nan_is_dropped(engine):
    whole = {"ids": LONG, "logps": [-1.0] * 6, "finish": "length"}
    engine.told = {(0, 5): whole, (0, 6): {**whole, "logps": [-1.0] * 5 + [float("nan")]}}
    made = generate(server_of(engine), [(0, 5), (0, 6)], request.Sampling(6)).completions
    assert [(one.ids, one.finish) for one in made] == [(tuple(LONG), "length"), ((), "nonfinite")]
    assert made[1].logps.shape == made[1].logps_truncated.shape == (0,)


BAD = {
    # dialect, what is told, end of the sentence
    "no ids": ("vllm", {"change": lambda r: logprobs_of(tokens=list("abcdef"))(
        choice(token_ids=None)(r))}, "has no token ids: the server must support return_token_ids"),
    "no choice": ("vllm", {"change": lambda r: {"choices": []}}, "has no choices.0"),
    "error": ("vllm", {"change": lambda r: {"error": "busy"}}, "has no choices.0"),
    "list": ("sglang", {"change": lambda r: [r]}, "has no meta_info.output_token_logprobs: the"),
    "no logprobs": ("vllm", {"change": choice(logprobs=None)}, "has no logprobs.token_logprobs"),
    "text": ("sglang", {"change": lambda r: {"text": "so"}}, "(return_logprob)"),
    "other ids": ("vllm", {"change": choice(token_ids=LONG[::-1])}, "that differ from token_ids"),
    "own ids": ("sglang", {"change": lambda r: {**r, "output_ids": [1]}}, "differ from output_ids"),
    "prompt": ("vllm", {"change": choice(prompt_token_ids=[0, 5, 6])}, "belongs to another prompt"),
    "its length": ("sglang", {"change": meta(prompt_tokens=3)}, "belongs to another prompt"),
    "outside": ("vllm", {"ids": [1, V, 3, 1, 2, 3]}, f"id {V}: the tokenizer has 22 ids"),
    "invalid": ("sglang", {"ids": [1, 20, 3, 1, 2, 3]}, "has the invalid id 20: the tokenizer"),
    "negative": ("sglang", {"ids": [1, -1, 3, 1, 2, 3]}, "has the invalid id -1"),
    "half id": ("sglang", {"ids": [1, 1.5, 3, 1, 2, 3]}, "has no list of token ids"),
    "true": ("sglang", {"ids": [1, True, 3, 1, 2, 3]}, "has no list of token ids"),
    "empty": ("vllm", {"ids": [], "logps": []}, "has no list of token ids, or the list is empty"),
    "too many": ("vllm", {"ids": [1] * 7, "logps": [-1.0] * 7}, "has 7 tokens: at most 6 were"),
    "short list": ("vllm", {"change": logprobs_of(token_logprobs=FOUR)},
                   "has 4 log-probabilities for 6 tokens"),
    "no number": ("vllm", {"logps": [None, *FOUR, -1.0]}, "has the log-probability None"),
    "positive": ("sglang", {"logps": [0.5, *FOUR, -1.0]}, "has the log-probability 0.5"),
    "infinite": ("vllm", {"logps": [float("-inf"), *FOUR, -1.0]}, "has the log-probability -inf"),
    "foreign stop": ("sglang", {"ids": [1, 2], "logps": FOUR[:2], "finish": "stop"},
                     "was stopped at the id 2, which is not in [9]"),
    "cut": ("vllm", {"ids": [1, 2], "logps": FOUR[:2], "finish": "length"},
            "ended after 2 of 6 tokens"),
    "abort": ("sglang", {"finish": {"type": "abort", "message": "x"}}, "finish_reason 'abort'"),
    "nan there": ("sglang", {"ids": [1, 9], "logps": FOUR[:2],
                             "finish": {"type": "stop", "matched": "NaN happened"}},
                  "was stopped by 'NaN happened'"),
    "goes on": ("vllm", {"ids": [1, 9, 3, 1, 2, 3], "finish": "length"}, "goes on after the id 9"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_replies_that_are_not_what_was_asked_for(engine, name):
    dialect, told, words = BAD[name]
    whole = {"ids": LONG, "logps": [-1.0] * 6, "finish": "length"}
    prompts = [(0, 5), (0, 6), (0, 7)]
    engine.told = {(0, 5): whole, (0, 6): {**whole, **told}, (0, 7): whole}
    valid = np.ones(V, bool)
    valid[20:22] = False
    server = server_of(engine, dialect=dialect, concurrency=1)
    s = request.Sampling(6, stop_ids=(9,))
    made = generate(server, prompts, s, valid_V=valid).completions
    assert [one.ids for one in made] == [tuple(LONG), (), tuple(LONG)]
    assert [one.finish for one in made] == ["length", "failed", "length"]
    assert made[1].detail.startswith("the completion ")
    assert words in made[1].detail
    assert made[1].detail.isprintable()
    assert made[1].logps.shape == made[1].logps_truncated.shape == (0,)
    assert engine.seen[(0, 6)] == 1  # the same again would come of another attempt
    engine.told[0, 6] = engine.told[0, 5]
    assert [one.ids for one in generate(server, prompts, s, valid_V=valid).completions] == [
        tuple(LONG)
    ] * 3


def test_ids_that_only_the_log_probabilities_spell(engine):
    """A vLLM without return_token_ids."""
    engine.told = {(1,): {"change": choice(token_ids=None, prompt_token_ids=None)}}
    server = server_of(engine)
    without = generate(server, [(1,)]).completions[0]
    engine.told = {}
    assert without.ids == generate(server, [(1,)]).completions[0].ids
    # And one that spells tokens as text, but sends their ids.
    engine.told = {(1,): {"change": logprobs_of(tokens=list("abcdef"))}}
    assert without.ids == generate(server, [(1,)]).completions[0].ids


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(sampling=request.Sampling(6, temperature=-1.0)), "temperature is -1.0"),
        (
            dict(sampling=request.Sampling(6, temperature=0.005)),
            "a vllm server takes 0 or at least",
        ),
        (dict(sampling=request.Sampling(6, top_k=V + 1)), f"top_k is {V + 1}"),
        (dict(sampling=request.Sampling(0)), "max_tokens is 0"),
        (dict(sampling=request.Sampling(6, stop_ids=(V,))), f"stop_ids has {V}"),
        (dict(sampling=request.Sampling(6, stop=("",))), "must not be empty"),
        (dict(sampling=request.Sampling(6, stop=("a",))), "must have the bytes of every valid id"),
        (dict(sampling=[PLAIN] * 3), "sampling has 3 entries for 2 prompts"),
        (dict(limits=[1]), "limits has 1 entries for 2 prompts"),
        (dict(limits=[1, 0]), "limits[1] is 0"),
        (dict(prompts=[(1,), ()]), "prompt 1 is empty"),
        (dict(prompts=[(1,), (V,)]), f"prompt 1 has ids {V} to {V}"),
        (dict(keys=np.zeros((2, 2), np.int64)), "keys are int64 (2, 2)"),
        (dict(keys=np.zeros((1, 2), np.uint32)), "keys are uint32 (1, 2)"),
        (dict(server=dict(max_model_len=7), prompts=[(1,), (1, 2)]), "prompt 1 has 2 tokens and"),
        (dict(server=dict(dialect="tgi")), "sampler.dialect is 'tgi': the choices are vllm, sgla"),
        (dict(server=dict(logprobs="all")), "sampler.logprobs is 'all': the choices are raw, tem"),
        (dict(server=dict(max_model_len=1)), "sampler.max_model_len is 1"),
        (dict(server=dict(concurrency=0)), "sampler.concurrency is 0"),
        (dict(server=dict(key_env="NO_SUCH")), "sampler.key_env is 'NO_SUCH'"),
        (dict(server=dict(url="http://h/v1/completions")), "sampler.url"),
    ],
)
def test_what_is_refused_before_anything_is_asked(engine, changes, words):
    server = server_of(engine, **changes.pop("server", {}))
    prompts = changes.pop("prompts", [(1,), (2,)])
    sampling = changes.pop("sampling", PLAIN)
    with pytest.raises(ValueError) as raised:
        generate(server, prompts, sampling, **changes)
    assert words in str(raised.value)
    assert not engine.requests


def test_connect(engine):
    server = server_of(engine)
    assert remote_engine.connect_server(server).max_model_len == 64
    assert remote_engine.connect_server(server).patience == server.api.timeout
    assert remote_engine.connect_server(change(server, max_model_len=32)).max_model_len == 32
    assert remote_engine.connect_server(change(server, model="other")).max_model_len is None
    assert {path for path, _, _ in engine.requests} == {"/v1/models"}
    assert remote_engine.connect_server(server).root == ""
    engine.served["tiny"]["root"] = "/models/tiny"
    assert remote_engine.connect_server(server).root == "/models/tiny"
    for changes, words in (
        (dict(model="big"), "sampler.model is 'big': "),
        (dict(model="big"), "serves 'tiny', 'other'"),
        (dict(max_model_len=65), "sampler.max_model_len is 65: "),
    ):
        with pytest.raises(ValueError) as raised:
            remote_engine.connect_server(change(server, **changes))
        assert words in str(raised.value)
    with pytest.raises(OSError, match=r"did not list its models in 3 attempts \(bad_reply"):
        remote_engine.connect_server(change(server, url=server.api.url.replace("/v1", "/v2")))


# ------------------------------------------------------------------------------------- weights


def restart(engine):
    """The server forgets its adapters."""
    for name in [name for name in engine.served if name.startswith("copsd-")]:
        del engine.served[name]


@BOTH
def test_a_restarted_server_gets_the_adapter_again(engine, tmp_path, dialect):
    """It refuses the adapter's name; the rows are those of a server that was never restarted."""
    folder = adapter_in(tmp_path / "a", b"a")
    server = remote_engine.hand_over(server_of(engine, dialect=dialect, retries=1), folder)
    prompts = [(i, 2) for i in range(8)]
    whole = generate(server, prompts).completions
    engine.only_served = True
    engine.told = {(3, 2): lambda n: restart(engine) if n == 2 else None}
    loads = lambda: sum("/load_lora" in path for path, _, _ in engine.requests)  # noqa: E731
    made = generate(server, prompts).completions
    assert [one.detail for one in made if one.dropped] == []
    assert [one.ids for one in made] == [one.ids for one in whole]
    assert server.adapter in engine.served
    assert loads() == 2  # each row that was refused waited for the same request
    # A restarted server that cannot load it again: the rows fail, and the reason is shown.
    restart(engine)
    engine.answers = {f"{'/v1' if dialect == 'vllm' else ''}/load_lora_adapter": (404, "no such")}
    made = generate(server, prompts[:1]).completions
    assert (made[0].finish, "did not load the adapter" in made[0].detail) == ("failed", True)
    # A refusal for another reason is no restart.
    engine.answers = {}
    remote_engine.hand_over(server, folder)
    engine.told = {(5, 2): "unknown"}
    before = loads()
    assert [one.dropped for one in generate(server, prompts).completions].count(True) == 1
    assert loads() == before


def test_a_server_that_lost_its_connections_gets_all_weights_again(engine, tmp_path):
    """Restarted with full weights, it would draw from the base weights without an error."""
    (tmp_path / "config.json").write_text("{}")
    server = remote_engine.hand_over(server_of(engine, concurrency=1), tmp_path)
    engine.told = {(3, 2): lambda n: "reset" if n == 1 else None}
    engine.requests.clear()
    assert not any(one.dropped for one in generate(server, [(1, 2), (3, 2)]).completions)
    paths = [path.split("/")[-1] for path, _, _ in engine.requests]
    swap = ["collective_rpc", "reset_prefix_cache"]
    assert paths == ["completions"] * 2 + swap + ["completions"]


@pytest.mark.parametrize("fault", ["reset", "broken"])
def test_each_request_without_an_answer_makes_the_weights_doubtful(engine, tmp_path, fault):
    """Behind a proxy, a restart may show as an error of the server."""
    (tmp_path / "config.json").write_text("{}")
    server = remote_engine.hand_over(server_of(engine, concurrency=1), tmp_path)
    engine.told = {(3, 2): lambda n: fault if n == 1 else None}
    engine.requests.clear()
    assert not any(one.dropped for one in generate(server, [(3, 2)]).completions)
    assert [path.split("/")[-1] for path, _, _ in engine.requests].count("collective_rpc") == 1


def test_a_restore_that_fails_is_not_repeated_by_the_rows_that_waited(engine, tmp_path):
    folder = adapter_in(tmp_path / "a", b"a")
    server = remote_engine.hand_over(server_of(engine), folder)
    keeper = remote_engine._PolicyKeeper(server)
    stop, tried = threading.Event(), threading.Barrier(3)
    restart(engine)
    engine.answers = {"/v1/load_lora_adapter": (404, "no such")}
    found = []

    def row():
        tried.wait()
        with pytest.raises(OSError, match="did not load the adapter") as raised:
            keeper._restore(0, stop)
        found.append(str(raised.value))

    engine.requests.clear()
    with keeper._lock:  # both rows wait; the first one tries, and the second gets its error
        rows = [threading.Thread(target=row) for _ in range(2)]
        for one in rows:
            one.start()
        tried.wait()
        time.sleep(0.3)
    for one in rows:
        one.join()
    assert len(found) == 2
    assert len(set(found)) == 1
    assert [path for path, _, _ in engine.requests].count("/v1/load_lora_adapter") == 1
    stop.set()
    engine.requests.clear()
    with pytest.raises(OSError, match="given up"):
        keeper._restore(0, stop)
    assert engine.requests == []


def test_base_weights_are_not_taken_for_the_adapters(engine, tmp_path):
    folder = adapter_in(tmp_path / "a", b"a")
    server = remote_engine.hand_over(server_of(engine), folder)
    engine.told = {(1,): {"change": lambda reply: {**reply, "model": "tiny"}}}
    with pytest.raises(OSError, match=f"drew a completion from tiny instead of {server.adapter}"):
        generate(server, [(1,)])
    engine.told = {(1,): {"change": lambda reply: {**reply, "model": server.adapter}}}
    assert generate(server, [(1,)]).completions[0].ids
    # A server that says that it loads adapters, but does not know them afterwards.
    engine.answers = {"/v1/load_lora_adapter": (200, "Success")}
    restart(engine)
    with pytest.raises(OSError, match=f"does not list the adapter {server.adapter}"):
        remote_engine.hand_over(server, folder)


def adapter_in(folder, content: bytes):
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


@BOTH
def test_adapters_get_names_of_their_own(engine, tmp_path, dialect):
    server = server_of(engine, dialect=dialect)
    first, second = (adapter_in(tmp_path / name, name.encode()) for name in ("one", "two"))
    one = remote_engine.hand_over(server, first)
    two = remote_engine.hand_over(one, second)
    assert remote_engine.hand_over(two, second) == two
    assert (one.api.model, server.adapter) == ("tiny", "")
    assert one.adapter != two.adapter
    prefix = "/v1" if dialect == "vllm" else ""
    asked = [(path, body) for path, body, _ in engine.requests if body is not None]
    assert asked == [
        (f"{prefix}/load_lora_adapter", {"lora_name": one.adapter, "lora_path": str(first)}),
        (f"{prefix}/unload_lora_adapter", {"lora_name": one.adapter}),
        (f"{prefix}/load_lora_adapter", {"lora_name": two.adapter, "lora_path": str(second)}),
    ]
    assert set(engine.served) == {"tiny", "other", two.adapter}
    generate(two, [(1,)])
    body = engine.requests[-1][1]
    assert (body["model"] if dialect == "vllm" else body["lora_path"]) == two.adapter
    # The same weights elsewhere have the same name, and others another.
    assert (
        remote_engine.hand_over(server, adapter_in(tmp_path / "copy", b"two")).adapter
        == two.adapter
    )
    names = {one.adapter, two.adapter}
    for config, weights, suffix in (("{}o", b"ne", "safetensors"), ("{}", b"one", "bin")):
        (first / "adapter_config.json").write_text(config)
        (first / "adapter_model.safetensors").unlink(missing_ok=True)
        (first / f"adapter_model.{suffix}").write_bytes(weights)
        names.add(remote_engine.hand_over(server, first).adapter)
    assert len(names) == 4


def test_adapters_where_the_first_reply_was_lost(engine, tmp_path):
    """The server did as it was told, and says on the second attempt that it cannot."""
    engine.lost = {"/v1/load_lora_adapter": True}
    first = remote_engine.hand_over(server_of(engine), adapter_in(tmp_path / "a", b"a"))
    engine.lost = {"/v1/unload_lora_adapter": True}
    second = remote_engine.hand_over(first, adapter_in(tmp_path / "b", b"b"))
    assert set(engine.served) == {"tiny", "other", second.adapter}
    posted = [path.split("/")[-1] for path, body, _ in engine.requests if body is not None]
    assert posted == ["load_lora_adapter"] * 2 + ["unload_lora_adapter"] * 2 + ["load_lora_adapter"]


@pytest.mark.parametrize(
    ("dialect", "path", "answer", "words"),
    [
        ("vllm", "/v1/load_lora_adapter", (404, "Not Found"), "HTTP 404: Not Found (vLLM needs"),
        ("sglang", "/load_lora_adapter", (200, {"success": False, "error_message": "rank 64"}),
         "rank 64"),
        ("vllm", "/v1/load_lora_adapter", (200, {"success": False}), '{"success": false}'),
        ("vllm", "/collective_rpc", (404, "Not Found"), "VLLM_SERVER_DEV_MODE=1"),
        ("vllm", "/reset_prefix_cache", (200, {"success": False}), '{"success": false}'),
        ("sglang", "/update_weights_from_disk", (400, {"success": False, "message": "no such"}),
         "no such"),
    ],
)  # fmt: skip
def test_weights_that_a_server_does_not_take(engine, tmp_path, dialect, path, answer, words):
    engine.answers = {path: answer}
    folder = tmp_path / "w"
    if "lora" in path:
        adapter_in(folder, b"x")
    else:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    with pytest.raises(OSError) as raised:
        remote_engine.hand_over(server_of(engine, dialect=dialect), folder)
    said = str(raised.value)
    assert words in said
    assert str(folder) in said
    assert "\n" not in said
    assert path in said


@BOTH
def test_whole_models_are_read_in_place(engine, tmp_path, dialect):
    (tmp_path / "config.json").write_text("{}")
    server = server_of(engine, dialect=dialect, adapter="old")
    held = change(server, adapter="", folder=str(tmp_path))
    assert remote_engine.hand_over(server, tmp_path) == held
    asked = [(path, body) for path, body, _ in engine.requests]
    folder = str(tmp_path)
    assert (
        asked
        == {
            "vllm": [
                (
                    "/collective_rpc",
                    {"method": "reload_weights", "kwargs": {"weights_path": folder}},
                ),
                ("/reset_prefix_cache", {}),
            ],
            "sglang": [("/update_weights_from_disk", {"model_path": folder, "flush_cache": True})],
        }[dialect]
    )
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has neither adapter_config\.json nor config\.json"):
        remote_engine.hand_over(server, tmp_path)
