"""Answers of a server of our own on 127.0.0.1, which behaves as the question asks it to."""

import collections
import contextlib
import dataclasses
import hashlib
import http.server
import json
import pathlib
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time

import pytest

from copsd_jax.servers import chat, client

KEY = "sk-stub-0123456789"
VARIABLE = "STUB_CRITIC_KEY"


def reply(text: object, finish: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    return json.dumps({"id": "x", "choices": [{**choice, "finish_reason": finish}]}).encode()


def thought(thinking, text, field="reasoning_content", finish="stop") -> bytes:
    """A reply of a server that puts the thinking into a field of its own."""
    message = {"role": "assistant", "content": text, field: thinking}
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}]}).encode()


class _Critic(http.server.BaseHTTPRequestHandler):
    """The question's first word names a behaviour of the table; its n-th sending has number n."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.seen[question] += 1
            self.server.requests.append((self.path, dict(self.headers), body))
            number = self.server.seen[question]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has given up
            BEHAVIOURS[question.split()[0]](self, question, number)

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def trickle(self, body: bytes) -> None:
        for k in range(len(body)):
            self.wfile.write(body[k : k + 1])
            self.wfile.flush()
            if self.server.ending.wait(0.1):
                return

    def log_message(self, format: str, *args: object) -> None:
        pass


def _right(to: _Critic, question: str, number: int) -> None:
    to.answer(200, reply(f"about {question}"))


def _slow(to: _Critic, question: str, number: int) -> None:
    """The more slowly, the smaller the number behind the word; counts how many are under way."""
    with to.server.lock:
        to.server.under_way += 1
        to.server.most = max(to.server.most, to.server.under_way)
    to.server.ending.wait(0.02 * (4 - int(question.split()[1]) % 4))
    with to.server.lock:  # before the client can know
        to.server.under_way -= 1
    _right(to, question, number)


def _late(to: _Critic, question: str, number: int) -> None:
    if not to.server.ending.wait(20):
        _right(to, question, number)


def _half(to: _Critic, question: str, number: int) -> None:
    body = reply("cut in the middle")
    to.send_response(200)
    to.send_header("Content-Length", str(len(body)))
    to.end_headers()
    to.wfile.write(body[: len(body) // 2])
    to.close_connection = True


def _half_chunk(to: _Critic, question: str, number: int) -> None:
    to.send_response(200)
    to.send_header("Transfer-Encoding", "chunked")
    to.end_headers()
    to.wfile.write(b"400\r\n" + reply("less than 0x400 bytes"))
    to.close_connection = True


def _reset(to: _Critic, question: str, number: int) -> None:
    # With a linger time of 0 the connection ends in a reset, not in an orderly end.
    to.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    to.close_connection = True
    to.rfile.close(), to.wfile.close(), to.connection.close()


def _trickle(to: _Critic, question: str, number: int) -> None:
    to.trickle(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + b" " * 900)


def _trickle_body(to: _Critic, question: str, number: int) -> None:
    to.send_response(200)
    to.send_header("Content-Length", "900")
    to.end_headers()
    to.trickle(b" " * 900)


def _recovering(to: _Critic, question: str, number: int) -> None:
    if number <= 2:
        return to.answer(500, b"overloaded")
    _right(to, question, number)


def _limited(to: _Critic, question: str, number: int) -> None:
    if number == 1:
        return to.answer(429, b"{}", Retry_After="1")
    _right(to, question, number)


def _old_http(to: _Critic, question: str, number: int) -> None:
    to.protocol_version = "HTTP/1.0"  # the end of the body is the end of the connection
    to.send_response(200)
    to.end_headers()
    to.wfile.write(reply(f"about {question}"))
    to.close_connection = True


def _echo(to: _Critic, question: str, number: int) -> None:
    """Shows the key where clients are apt to repeat it: around the place where messages are cut."""
    status = {"echo_ok": 200}.get(question.split()[0], 401)
    said = f"{'x' * int(question.split()[1])} {to.headers['Authorization']}"
    body = reply(said).replace(b"sk-", b"\\u0073k-")  # as JSON may write it
    to.answer(status, body if status == 200 else said.encode())


def _newer(to: _Critic, question: str, number: int) -> None:
    """Takes the token limit only under its newer name, like OpenAI's reasoning models."""
    if "max_tokens" in to.server.requests[-1][2]:
        said = b"Unsupported parameter: 'max_tokens'; use 'max_completion_tokens' instead."
        return to.answer(400, said)
    _right(to, question, number)


def _newer_broken(to: _Critic, question: str, number: int) -> None:
    """Names the newer name, and then refuses the request for another reason."""
    old = "max_tokens" in to.server.requests[-1][2]
    to.answer(400, b"use 'max_completion_tokens'" if old else b"temperature must be 1")


def _too_long(to: _Critic, question: str, number: int) -> None:
    name = next(name for name in to.server.requests[-1][2] if name.startswith("max_"))
    to.answer(400, f"{name} is too large: at most 32".encode())


def _always(status: int, body: bytes, **headers: str):
    return lambda to, question, number: to.answer(status, body, **headers)


BEHAVIOURS = {
    "ok": _right, "slow": _slow, "late": _late, "half": _half, "half_chunk": _half_chunk,
    "reset": _reset, "trickle": _trickle, "trickle_body": _trickle_body,
    "recovering": _recovering, "limited": _limited, "old_http": _old_http, "echo": _echo,
    "echo_ok": _echo,
    "patience": _always(429, b"{}", Retry_After="3600"),
    "broken": _always(500, b"no luck"), "forbidden": _always(403, b"not\x07 you"),
    "conflict": _always(409, b""), "moved": _always(302, b"", Location="/elsewhere"),
    "html": _always(200, b"<html>Sign in</html>"), "not_utf8": _always(200, b'{"a": "\xff"}'),
    "no_choices": _always(200, b'{"choices": []}'), "a_list": _always(200, b"[1, 2]"),
    "null": _always(200, reply(None)), "number": _always(200, reply(7)),
    "blank": _always(200, reply("")), "deep": _always(200, b"[" * 200_000),
    "cut": _always(200, reply("so far", "length")), "cut_null": _always(200, reply(None, "length")),
    "content_filter": _always(200, reply(None, "content_filter")),
    "thinks": _always(200, thought("2 + 2", "four")),
    "thinks_new": _always(200, thought("2 + 2", "four", "reasoning")),
    "only_thinks": _always(200, thought("2 + 2", None)),
    "cut_thought": _always(200, thought("2 +", "", "reasoning", "length")),
    "newer": _newer, "newer_broken": _newer_broken, "too_long": _too_long,
    "neither": _always(400, b"temperature must be 1"),
    "gateway": _always(502, b"no upstream"),
    "not_implemented": _always(501, b"no"),
    "surrogate": _always(200, b'{"choices": [{"message": {"content": "a\\ud800b"}}]}'),
}  # fmt: skip


@pytest.fixture
def critic(monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Critic) as stub:
        stub.lock, stub.ending = threading.Lock(), threading.Event()
        stub.seen, stub.requests = collections.Counter(), []
        stub.under_way = stub.most = 0
        threading.Thread(target=stub.serve_forever, args=(0.02,), daemon=True).start()
        yield stub
        stub.ending.set()
        stub.shutdown()


def at(port: int, **changes: object) -> client.Server:
    server = client.Server(
        f"http://127.0.0.1:{port}/v1", "critic-32b", VARIABLE,
        timeout=20.0, retries=2, backoff=0.01, concurrency=4, cache="",
    )  # fmt: skip
    return dataclasses.replace(server, **changes)


def server_of(critic, **changes: object) -> client.Server:
    return at(critic.server_address[1], **changes)


def ask(text: str, **changes: object) -> chat.ChatRequest:
    messages = [{"role": "system", "content": "Be strict."}, {"role": "user", "content": text}]
    settings = dict(temperature=0.0, top_p=1.0, max_tokens=64, seed=1)
    return chat.ChatRequest(messages, **{**settings, **changes})


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


# What becomes of each behaviour with two retries: status, times sent, text.
OUTCOMES = {
    "ok": ("ok", 1, "about ok"), "old_http": ("ok", 1, "about old_http"),
    "recovering": ("ok", 3, "about recovering"), "broken": ("server_error", 3, ""),
    "html": ("bad_reply", 3, ""), "half": ("bad_reply", 3, ""), "reset": ("bad_reply", 3, ""),
    "half_chunk": ("bad_reply", 3, ""), "not_utf8": ("bad_reply", 3, ""),
    "no_choices": ("bad_reply", 3, ""), "a_list": ("bad_reply", 3, ""),
    # At temperature 0, the same reply without a content would come again.
    "null": ("bad_reply", 1, ""), "number": ("bad_reply", 1, ""), "blank": ("bad_reply", 1, ""),
    "deep": ("bad_reply", 3, ""), "moved": ("bad_reply", 1, ""),
    "cut": ("cut", 1, "so far"), "cut_null": ("cut", 1, ""), "surrogate": ("ok", 1, "a\ufffdb"),
    "forbidden": ("refused", 1, ""), "conflict": ("refused", 3, ""),
    "patience": ("refused", 1, ""), "content_filter": ("bad_reply", 1, ""),
    "thinks": ("ok", 1, "<think>2 + 2</think>four"), "only_thinks": ("bad_reply", 1, ""),
    "thinks_new": ("ok", 1, "<think>2 + 2</think>four"), "cut_thought": ("cut", 1, "<think>2 +"),
    "neither": ("refused", 1, ""), "too_long": ("refused", 1, ""),
    "gateway": ("unreachable", 3, ""), "not_implemented": ("server_error", 1, ""),
}  # fmt: skip


def test_statuses_of_a_server_that_misbehaves_and_a_rerun(critic, tmp_path, capfd):
    server = server_of(critic, cache=str(tmp_path / "cache"))
    names = sorted(OUTCOMES)
    requests = [ask(name) for name in names]
    answers = chat.ask_all(server, requests)
    for name, answer in zip(names, answers, strict=True):
        found = (answer.status, answer.attempts, answer.text)
        assert found == OUTCOMES[name], (name, answer)
        assert critic.seen[name] == OUTCOMES[name][1], name
        assert bool(answer.detail) == (answer.status not in chat.USABLE), name
        assert answer.detail.isprintable()
    by_status = collections.Counter(answer.status for answer in answers)
    assert by_status.keys() <= client.STATUSES.keys()
    assert sum(by_status.values()) == len(requests)

    critic.seen.clear()
    again = chat.ask_all(server, requests)
    usable = {name for name in names if OUTCOMES[name][0] in chat.USABLE}
    assert not usable & critic.seen.keys()
    assert [a.text for a in again] == [a.text for a in answers]
    assert {n for n, a in zip(names, again, strict=True) if a.attempts == 0} == usable

    written = [path.read_bytes() for path in (tmp_path / "cache").iterdir()]
    assert len(written) == len(usable)
    shown = "".join(capfd.readouterr()) + repr(server) + repr(answers)
    assert not any(KEY in text for text in [shown, *map(bytes.decode, written)])
    assert {h["Authorization"] for _, h, _ in critic.requests} == {f"Bearer {KEY}"}


def test_the_name_of_the_token_limit_is_found_and_remembered(critic):
    """A server that refuses max_tokens is asked for max_completion_tokens, from then on only so."""
    server = server_of(critic, concurrency=1, model="o-model")
    answers = chat.ask_all(server, [ask("newer 1"), ask("newer 2")])
    assert [(a.status, a.attempts) for a in answers] == [("ok", 2), ("ok", 1)]
    assert [chat.was_refused_at_first(a.detail) for a in answers] == [True, False]
    said = "sent again with max_completion_tokens, because the server refused max_tokens: HTTP 400"
    assert answers[0].detail.startswith(said)
    assert chat.ask_all(server, [ask("newer 3")])[0].attempts == 1
    sent = [{n: v for n, v in body.items() if "max" in n} for _, _, body in critic.requests]
    assert sent == [{"max_tokens": 64}, *[{"max_completion_tokens": 64}] * 3]
    # Other models, and a refusal for another reason, keep the usual name.
    critic.requests.clear()
    chat.ask_all(server_of(critic, concurrency=1), [ask("too_long"), ask("ok")])
    names = [next(n for n in body if "max" in n) for _, _, body in critic.requests]
    assert names == ["max_tokens"] * 2
    # A name is remembered only if a request with it has succeeded.
    critic.requests.clear()
    other = server_of(critic, concurrency=1, model="another")
    assert chat.ask_all(other, [ask("newer_broken")])[0].status == "refused"
    chat.ask_all(other, [ask("ok")])
    names = [next(n for n in body if "max" in n) for _, _, body in critic.requests]
    assert names == ["max_tokens", "max_completion_tokens", "max_tokens"]


def test_a_reply_without_content_may_come_with_one_at_a_temperature(critic):
    [answer] = chat.ask_all(server_of(critic), [ask("only_thinks", temperature=0.5)])
    assert (answer.status, answer.attempts) == ("bad_reply", 3)
    assert "no content in choices[0].message, only thinking (finish_reason 'stop')" in answer.detail


def test_the_limit_of_a_wait_is_named(critic):
    server = server_of(critic, timeout=0.3, retries=0, section="author")
    [answer] = chat.ask_all(server, [ask("late")])
    assert answer.detail == "no complete reply within 0.3 s (author.timeout)"


def test_an_unreachable_server_is_asked_for_as_long_as_the_patience(critic):
    """Beyond the retries, which count only if the server answers."""
    stop, answers = threading.Event(), iter(["unreachable"] * 7 + ["ok"])
    server = at(1, retries=1, timeout=9.0, section="sampler")
    once = lambda attempt: client.Outcome(next(answers), again=True)  # noqa: E731
    assert client.repeat_call(server, once, "x", stop)[1] == 2
    outcome, attempts = client.repeat_call(server, once, "x", stop, patience=30.0)
    assert (outcome.status, attempts) == ("ok", 6)
    begun = time.monotonic()
    down = lambda attempt: client.Outcome("unreachable", detail="no", again=True)  # noqa: E731
    outcome, attempts = client.repeat_call(server, down, "x", stop, patience=0.2)
    assert 0.2 <= time.monotonic() - begun < 5
    assert attempts > 2
    assert outcome.detail == "no; attempts went on for 0.2 s (sampler.timeout)"
    # The patience is for a server that cannot be reached, and is named only if it has ended.
    broken = lambda attempt: client.Outcome("server_error", again=True)  # noqa: E731
    assert client.repeat_call(server, broken, "x", stop, patience=30.0)[1] == 2
    stop.set()
    outcome, attempts = client.repeat_call(server, down, "x", stop, patience=30.0)
    assert (outcome.detail, attempts) == ("no", 1)


def test_one_deadline_for_a_whole_attempt(critic):
    names = ["late", "trickle", "trickle_body"]
    server = server_of(critic, timeout=0.6, retries=1)
    start = time.monotonic()
    answers = chat.ask_all(server, [ask(name) for name in names])
    took = time.monotonic() - start
    assert [(a.status, a.attempts) for a in answers] == [("timeout", 2)] * 3
    # Two attempts, and a machine with better things to do; the trickling takes 90 s.
    assert 1.2 <= took < 8


def test_a_host_without_address_and_one_whose_first_address_is_dead(critic, monkeypatch):
    port, system = critic.server_address[1], socket.getaddrinfo

    def resolve(host, *more, **named):
        if host == "nowhere":
            raise socket.gaierror(-2, "Name or service not known")
        addresses = ("::1", "127.0.0.1") if host == "two" else (host,)
        return [found for each in addresses for found in system(each, *more, **named)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    [answer] = chat.ask_all(at(1, url="http://nowhere/v1"), [ask("ok")])
    assert (answer.status, answer.attempts) == ("unreachable", 3)
    [answer] = chat.ask_all(at(1, url=f"http://two:{port}/v1"), [ask("ok")])
    assert (answer.status, answer.attempts) == ("ok", 1)


def test_a_look_up_of_a_host_counts_towards_the_time(critic, monkeypatch):
    """The system's own look-up may wait for minutes."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: critic.ending.wait(20))
    start = time.monotonic()
    [answer] = chat.ask_all(at(1, url="http://far/v1", timeout=0.3, retries=1), [ask("ok")])
    assert (answer.status, answer.attempts) == ("timeout", 2)
    assert 0.6 <= time.monotonic() - start < 5


def test_a_server_that_is_not_there(critic):
    [answer] = chat.ask_all(at(closed_port()), [ask("ok")])
    assert (answer.status, answer.attempts, answer.text) == ("unreachable", 3, "")
    # It speaks HTTP, and TLS is asked for.
    url = f"https://127.0.0.1:{critic.server_address[1]}/v1"
    [answer] = chat.ask_all(at(1, url=url, retries=0), [ask("ok")])
    assert answer.status == "unreachable"


def test_over_tls(critic, tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {key} -out {certificate}"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    critic.socket = context.wrap_socket(critic.socket, server_side=True)
    url = f"https://localhost:{critic.server_address[1]}/v1"
    server = at(1, url=url, retries=0, timeout=5.0)
    requests = [ask("ok"), ask("half"), ask("old_http")]

    assert {a.status for a in chat.ask_all(server, requests)} == {"unreachable"}
    assert not critic.requests  # nothing was sent to whom we do not know
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(client, "_tls", lambda: trusting)
    answers = chat.ask_all(server, requests)
    assert [a.status for a in answers] == ["ok", "bad_reply", "ok"]
    [answer] = chat.ask_all(dataclasses.replace(server, timeout=0.6), [ask("trickle_body")])
    assert answer.status == "timeout"


def test_retry_after_is_honoured(critic):
    start = time.monotonic()
    [answer] = chat.ask_all(server_of(critic), [ask("limited")])
    assert (answer.status, answer.attempts) == ("ok", 2)
    assert time.monotonic() - start >= 1
    # Longer than the timeout: not asked again before that, so not at all (OUTCOMES, patience).
    [answer] = chat.ask_all(server_of(critic), [ask("patience")])
    assert "Retry-After 3600" in answer.detail


def test_pauses_grow_and_have_a_reproducible_jitter():
    server = at(1, backoff=2.0, timeout=30.0)
    pauses = [client._pause(server, "digest", attempt, 0.0) for attempt in range(1, 8)]
    for pause, bound in zip(pauses, [2, 4, 8, 16, 30, 30, 30], strict=True):
        assert bound / 2 <= pause <= bound
    assert pauses == [client._pause(server, "digest", a, 0.0) for a in range(1, 8)]
    assert len({client._pause(server, str(k), 1, 0.0) for k in range(50)}) == 50
    assert client._pause(server, "digest", 1, 25.0) == 25.0


def test_order_is_kept_and_concurrency_is_a_limit(critic):
    requests = [ask(f"slow {k}") for k in range(40)]
    calls = []
    answers = chat.ask_all(
        server_of(critic, concurrency=5), requests, lambda *seen: calls.append(seen)
    )
    assert [a.text for a in answers] == [f"about {r.messages[-1]['content']}" for r in requests]
    assert calls == [(k, 40) for k in range(1, 41)]
    assert 2 <= critic.most <= 5
    assert chat.ask_all(server_of(critic), []) == []


def test_what_is_sent(critic):
    chat.ask_all(server_of(critic), [ask("ok 1", temperature=0.5, top_p=0.9)])
    keyless = server_of(critic, key_env="")
    chat.ask_all(dataclasses.replace(keyless, url=keyless.url + "/"), [ask("ok 2", seed=None)])
    (path, headers, body), (slash, plain, unseeded) = critic.requests
    assert path == slash == "/v1/chat/completions"
    assert body == {
        "model": "critic-32b", "temperature": 0.5, "top_p": 0.9, "max_tokens": 64, "seed": 1,
        "messages": [
            {"role": "system", "content": "Be strict."}, {"role": "user", "content": "ok 1"},
        ],
    }  # fmt: skip
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in plain
    assert "seed" not in unseeded


def test_equal_requests_are_asked_once(critic, tmp_path):
    requests = [ask("ok"), ask("ok", seed=2), ask("ok"), ask("ok", temperature=0)]
    seen = []
    answers = chat.ask_all(server_of(critic), requests, lambda *done: seen.append(done))
    assert critic.seen["ok"] == 2
    assert len(answers) == 4
    assert seen[-1] == (4, 4)


def test_cache_names_files_by_content(critic, tmp_path):
    server = server_of(critic, cache=str(tmp_path / "new" / "cache"))
    chat.ask_all(server, [ask("ok")])
    asked = {
        "url": server.url, "model": "critic-32b", "temperature": 0.0, "top_p": 1.0,
        "max_tokens": 64, "seed": 1,
        "messages": [
            {"role": "system", "content": "Be strict."}, {"role": "user", "content": "ok"},
        ],
    }  # fmt: skip
    canonical = json.dumps(asked, sort_keys=True, separators=(",", ":"))
    name = hashlib.sha256(canonical.encode()).hexdigest() + ".json"
    assert [path.name for path in pathlib.Path(server.cache).iterdir()] == [name]

    def sent(server: client.Server, request: chat.ChatRequest) -> bool:
        critic.requests.clear()
        chat.ask_all(server, [request])
        return bool(critic.requests)

    # How one tries is no part of the question; the rest is.
    patient = dataclasses.replace(
        server, url=server.url + "/", timeout=9.0, retries=0, backoff=3.0, concurrency=1
    )
    assert not sent(patient, ask("ok"))
    assert sent(dataclasses.replace(server, model="another"), ask("ok"))
    assert sent(server, ask("ok", seed=2))
    assert sent(server, ask("ok", max_tokens=65))
    assert sent(server, ask("ok", top_p=0.5))
    assert sent(server, ask("ok", temperature=0.5))
    assert sent(dataclasses.replace(server, cache=""), ask("ok"))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"text": 1, "status": "ok"}', b'{"text": "x", "status": "timeout"}',
     b'{"status": "ok"}', b"\xff", b"[" * 200_000, None],
)  # fmt: skip
def test_a_broken_cache_file_is_asked_again(critic, tmp_path, capfd, content):
    server = server_of(critic, cache=str(tmp_path))
    chat.ask_all(server, [ask("ok")])
    [path] = tmp_path.iterdir()
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    [answer] = chat.ask_all(server, [ask("ok")])
    assert (answer.text, answer.attempts) == ("about ok", 1)
    warnings = capfd.readouterr().err.splitlines()
    assert str(path) in warnings[0]
    assert len(warnings) == (2 if content is None else 1)  # a folder cannot be replaced either
    if content is not None:
        assert chat.ask_all(server, [ask("ok")])[0].attempts == 0


def test_a_full_cache_is_used_without_server_and_key(critic, tmp_path, monkeypatch):
    server = server_of(critic, cache=str(tmp_path))
    chat.ask_all(server, [ask("ok")])
    monkeypatch.delenv(VARIABLE)
    critic.requests.clear()
    assert chat.ask_all(server, [ask("ok")])[0].text == "about ok"
    assert not critic.requests
    with pytest.raises(ValueError, match=VARIABLE):
        chat.ask_all(server, [ask("ok"), ask("ok 2")])


def test_a_key_that_the_server_shows_is_blotted_out(critic, tmp_path, capfd):
    requests = [ask(f"echo {n}") for n in range(270, 300)] + [ask("echo_ok 4000"), ask("echo 4070")]
    server = server_of(critic, cache=str(tmp_path))
    answers = chat.ask_all(server, requests)
    assert answers[-2].text.endswith("Bearer [key]")
    kept = "".join(path.read_text() for path in tmp_path.iterdir())
    shown = "".join(capfd.readouterr()) + repr(answers) + kept
    assert KEY[:6] not in shown  # not a part of it either


def test_a_short_key_is_no_secret(critic, monkeypatch):
    monkeypatch.setenv(VARIABLE, "e")  # a server without keys, as many set it up
    [answer] = chat.ask_all(server_of(critic), [ask("ok see")])
    assert answer.text == "about ok see"


def test_a_stopped_caller_begins_nothing_more(critic):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    # One waits before its second attempt when the other stops all.
    requests = [ask("broken"), *(ask(f"slow {k}") for k in range(50))]
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        chat.ask_all(server_of(critic, concurrency=2, backoff=15.0), requests, stop)
    assert len(critic.requests) < 10
    assert critic.seen["broken"] == 1
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(url="localhost:8000/v1"), "server.url is 'localhost:8000/v1': write http"),
        (dict(url="ftp://host/v1"), "write http"),
        (dict(url="http:///v1"), "write http"),
        (dict(url="http://host/v 1"), "write http"),
        (dict(url="http://host\n/v1"), "write http"),
        (dict(url="http://höst/v1"), "write http"),
        (dict(url="http://host:0/v1"), "write http"),
        (dict(url="http://host:99999/v1"), "server.url"),
        (dict(url="http://[::1/v1"), "server.url"),
        (dict(url=f"http://{'a' * 70}.org/v1"), "server.url"),
        (dict(url="http://host/v1?key=1"), "'http://host/v1?...': no user"),
        (dict(key_env="sk-Abc123"), "server.key_env is not the name of an environment variable"),
        (dict(url="http://host/v1/chat/completions"), "give the base"),
        (dict(model=""), "server.model"),
        (dict(key_env="NO_SUCH_VARIABLE"), "environment variable NO_SUCH_VARIABLE is not set"),
        (dict(timeout=0.0), "server.timeout is 0.0"),
        (dict(timeout=float("nan")), "server.timeout"),
        (dict(timeout=float("inf")), "server.timeout"),
        (dict(retries=-1), "server.retries"),
        (dict(backoff=-0.1), "server.backoff"),
        (dict(concurrency=0), "server.concurrency"),
    ],
)
def test_check_refuses(changes, message, monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY)
    client.check_server(at(8000))
    with pytest.raises(ValueError) as raised:
        client.check_server(at(8000, **changes))
    assert message in str(raised.value)


def test_check_shows_no_secrets(monkeypatch):
    for changes in (
        dict(url=f"http://me:{KEY}@host/v1"), dict(url=f"https://host/v1?api_key={KEY}"),
        dict(url=f"https://host/v1#{KEY}"), dict(key_env=KEY), dict(key_env="hf_AbcD0123"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as raised:
            client.check_server(at(1, **changes))
        assert KEY not in str(raised.value)
        assert "hf_AbcD0123" not in str(raised.value)
    for value in (KEY + "\n", f"{KEY} {KEY}", KEY + "é"):
        monkeypatch.setenv(VARIABLE, value)
        with pytest.raises(ValueError, match=f"critic.key_env is '{VARIABLE}'") as raised:
            client.check_server(at(1, section="critic"))
        assert KEY not in str(raised.value)
        with pytest.raises(ValueError) as raised:
            chat.ask_all(at(1), [ask("ok")])
        assert KEY not in str(raised.value)


def test_check_refuses_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"server\.cache"):
        client.check_server(at(1, cache=str(tmp_path / "file" / "cache")))
    client.check_server(at(1, cache=str(tmp_path / "cache")))
    assert not (tmp_path / "cache").exists()
