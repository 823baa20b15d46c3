"""Client for OpenAI-compatible servers, with concurrent requests and a cache of answers.

`ask_all` requests chat completions and caches the answers. `ask_all` is built on `send_call` and
`run_concurrently`, which can also be used for other HTTP requests.

The client uses the standard library's `http.client`. Common clients, such as httpx, have no overall
deadline: their timeouts start again after every byte received. In this client, a read may take only
the time that is left for the whole request. Therefore, a server that only rarely sends a byte
cannot block a run. Redirects are not followed, because the key would be sent to the new address.
Proxy settings in the environment are ignored.

If the server fails, the result is an answer with a status, not an exception. The server's key is
read from the environment when a request is sent. The key never appears in messages or cache files.
If a server's reply contains the key, the key is removed from the reply.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import http.client
import io
import json
import os
import pathlib
import re
import socket
import ssl
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

from copsd_jax.runtime import workdir

STATUSES = {
    "ok": "a complete answer",
    "cut": "an answer that ended at max_tokens (finish_reason length)",
    "timeout": "no complete reply within the time",
    "refused": "the server refuses the request (HTTP 4xx)",
    "server_error": "the server failed (HTTP 5xx)",
    "bad_reply": "an invalid reply: incomplete, not JSON, or without content",
    "unreachable": "no connection",
}
USABLE = ("ok", "cut")  # answers with these statuses have a text, and are cached

_AGAIN = frozenset({408, 409, 425, 429})  # 4xx statuses after which another attempt may succeed
_LARGEST = 1 << 24  # maximum number of bytes in a reply
_DETAIL = 300  # maximum number of characters in a server's message about a failure
_tls = functools.cache(ssl.create_default_context)
_LOOK = 0.25  # seconds between two checks of whether the caller has stopped

Name = TypeVar("Name")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Server:
    """Address of a server, and the limits for its use.

    Attributes:
      url: the base URL, for example "http://localhost:8000/v1"; the client appends
        "/chat/completions".
      model: the model's name on the server.
      key_env: name of the environment variable that holds the key; "" if the server needs no key.
      timeout: maximum number of seconds for one attempt, from connecting until the last byte
        arrives. The DNS look-up does not count towards `timeout`. `timeout` is also the longest
        pause between two attempts.
      retries: maximum number of attempts after the first.
      backoff: pause in seconds before the second attempt; the pause doubles before each later
        attempt.
      concurrency: maximum number of requests in flight.
      cache: folder with one file per answered request; "" for no cache.
    """

    url: str
    model: str
    key_env: str
    timeout: float
    retries: int
    backoff: float
    concurrency: int
    cache: str = ""


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """One chat request; equal requests are sent only once, so each sample needs its own seed."""

    messages: Sequence[Mapping[str, str]]  # each message has "role" and "content"
    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None


@dataclasses.dataclass(frozen=True)
class ChatAnswer:
    """Result of a request; `text` is "" unless the status is in USABLE."""

    text: str
    status: str  # a key of STATUSES
    attempts: int  # number of attempts; 0 if the answer is from the cache
    detail: str = ""  # one readable line about a failure


class Outcome(NamedTuple):
    """Result of one attempt to send a request."""

    status: str  # a key of STATUSES
    value: Any = ""  # the result of HttpCall.read
    detail: str = ""  # one readable line about a failure
    again: bool = False  # whether another attempt may succeed
    after: float = 0.0  # seconds to wait before the next attempt, from the Retry-After header


class HttpCall(NamedTuple):
    """One HTTP request, and the function that reads its reply.

    Attributes:
      url: the complete URL.
      body: content to send as JSON with POST; None means a GET request without a body.
      read: function that turns the bytes of a reply with HTTP status 2xx into an Outcome. If `read`
        raises ValueError, LookupError, TypeError or AttributeError, the status of the outcome is
        bad_reply.
    """

    url: str
    body: Mapping[str, Any] | None
    read: Callable[[bytes], Outcome]


def server_from_settings(settings: Mapping[str, Any], cache: str = "") -> Server:
    """Builds a `Server` from a section of settings, which are named like the fields of `Server`.

    The folder `cache` is a separate argument, because the name `cache` has another meaning in the
    section `sampler`: `sampler.cache` is the dtype of keys and values.
    """
    names = (field.name for field in dataclasses.fields(Server) if field.name != "cache")
    return Server(**{name: settings[name] for name in names}, cache=cache)


def check_server(server: Server, prefix: str = "server.") -> None:
    """Checks the fields of a server, without sending a request.

    Args:
      server: the server to check.
      prefix: text before the settings' names in messages.

    Raises:
      ValueError: the URL is malformed, the model is empty, the key is missing or unusable, or a
        number is out of range.
      OSError: the cache folder cannot be written.
    """
    _check_url(server.url, f"{prefix}url")
    if not server.model:
        raise ValueError(f"{prefix}model is '': name the model that the server serves")
    read_key(server, prefix)
    for name, least in (("timeout", 0.001), ("retries", 0), ("backoff", 0), ("concurrency", 1)):
        if not least <= getattr(server, name) < threading.TIMEOUT_MAX:
            raise ValueError(
                f"{prefix}{name} is {getattr(server, name)}: it must be at least {least}"
            )
    if server.cache:
        workdir.check_writable(pathlib.Path(server.cache), f"{prefix}cache")


def _check_url(url: str, setting: str) -> None:
    problem = ""
    try:
        parts = urllib.parse.urlsplit(url)
        if not re.fullmatch(r"https?://[!-~]+", url) or not parts.hostname or parts.port == 0:
            problem = "write http://HOST[:PORT]/v1 or https://HOST/v1"
        elif parts.username is not None or parts.query or parts.fragment:
            problem = "no user, ?query or #fragment; a key is read from the environment"
        elif parts.path.rstrip("/").endswith("/completions"):
            problem = "give the base, without /chat/completions or /completions"
        (parts.hostname or "").encode("idna")
    except ValueError as error:  # the port, the brackets or the host name is malformed
        problem = str(error)
    if problem:  # the part before an @ is hidden, because it may be a password
        raise ValueError(f"{setting} is {re.sub('//[^/]*@', '//...@', url)!r}: {problem}")


def read_key(server: Server, prefix: str = "server.") -> str:
    """Returns the server's key, or "" if the server needs none.

    Raises:
      ValueError: the environment variable named by key_env is not set, or its value is not valid in
        a header. The message contains the variable's name but not the value.
    """
    if not server.key_env:
        return ""
    key = os.environ.get(server.key_env, "")
    if re.fullmatch(r"[!-~]+", key):
        return key
    problem = "holds blanks, line breaks or characters beyond ASCII" if key else "is not set"
    raise ValueError(
        f"{prefix}key_env is {server.key_env!r}: the environment variable {server.key_env} "
        f"{problem}; put the server's key there, or set key_env to '' if no key is needed"
    )


def ask_all(
    server: Server, requests: Sequence[ChatRequest],
    progress: Callable[[int, int], None] | None = None,
) -> list[ChatAnswer]:  # fmt: skip
    """Returns answers in the order of the requests; cached requests are not sent again.

    The pause between attempts grows exponentially. The jitter of the pause depends only on the
    request and the attempt. The pause is never shorter than the time in the server's Retry-After
    header. If Retry-After exceeds `server.timeout`, there is no further attempt.

    Args:
      server: the server to send the requests to.
      requests: the requests; equal requests are sent once.
      progress: called in the caller's thread with (number of answers so far, number of requests).

    Raises:
      ValueError: the URL or the key is unusable, and at least one request is not cached.
    """
    digests = [_digest(server, request) for request in requests]
    answers = {digest: _read_cached_answer(server, digest) for digest in dict.fromkeys(digests)}
    missing = {d: (d, r) for d, r in zip(digests, requests, strict=True) if answers[d] is None}
    if missing:
        _check_url(server.url, "server.url")
        ask = functools.partial(_send_chat_request, server, read_key(server))
        with contextlib.closing(run_concurrently(server.concurrency, ask, missing)) as done:
            for digest, answer in done:
                answers[digest] = answer
                if progress is not None:
                    progress(sum(answers[d] is not None for d in digests), len(digests))
    return [answer for digest in digests if (answer := answers[digest]) is not None]


def _send_chat_request(
    server: Server, key: str, item: tuple[str, ChatRequest], stop: threading.Event
) -> ChatAnswer:
    digest, request = item
    body = {"model": server.model, **_build_chat_body(request)}
    url = server.url.rstrip("/") + "/chat/completions"
    outcome, attempts = send_call(server, key, HttpCall(url, body, _content), digest, stop)
    answer = ChatAnswer(redact_key(outcome.value, key), outcome.status, attempts, outcome.detail)
    _cache_chat_answer(server, digest, answer)
    return answer


def _build_chat_body(request: ChatRequest) -> dict[str, Any]:
    """Returns the fields of a request's body; numbers such as 1 and 1.0 give the same body."""
    fields: dict[str, Any] = {
        "messages": [dict(message) for message in request.messages],
        "temperature": float(request.temperature),
        "top_p": float(request.top_p),
        "max_tokens": int(request.max_tokens),
    }
    return fields if request.seed is None else {**fields, "seed": int(request.seed)}


def _content(body: bytes) -> Outcome:
    """Reads the text of the first choice in a reply."""
    choice = json.loads(body)["choices"][0]
    text, finish = choice["message"].get("content"), choice.get("finish_reason")
    cut = finish == "length"  # hidden thinking may have used up all max_tokens
    if not isinstance(text := text or ("" if cut else None), str):
        return Outcome("bad_reply", detail="no content in choices[0].message", again=True)
    # JSON may contain half of a surrogate pair, which tokenizers and files do not accept.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Outcome("cut" if cut else "ok", text)


def _digest(server: Server, request: ChatRequest) -> str:
    """Returns the SHA-256 of the fields that affect an answer; key and retries are left out."""
    asked = {"url": server.url.rstrip("/"), "model": server.model, **_build_chat_body(request)}
    canonical = json.dumps(asked, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read_cached_answer(server: Server, digest: str) -> ChatAnswer | None:
    """Returns the cached answer or None; a malformed answer is ignored, with a warning."""
    path = pathlib.Path(server.cache) / f"{digest}.json"
    if not server.cache or not path.exists():
        return None
    try:
        found = workdir.read_json(path)
        text, status = found["text"], found["status"]
        if isinstance(text, str) and status in USABLE:
            return ChatAnswer(text, status, attempts=0)
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        pass  # an unreadable file is handled below, like a malformed answer
    _warn(f"{path} is not a cached answer: the request is sent again")
    return None


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _cache_chat_answer(server: Server, digest: str, answer: ChatAnswer) -> None:
    """Writes a usable answer to the cache atomically; other runs may write the same file."""
    if not server.cache or answer.status not in USABLE:
        return
    path = pathlib.Path(server.cache) / f"{digest}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f"{digest}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "w") as file:  # ASCII
            json.dump({"model": server.model, "status": answer.status, "text": answer.text}, file)
        os.replace(part, path)
    except OSError as error:  # for example, the disk is full; the answer is still returned
        _warn(f"{path} cannot be written ({error.strerror})")


# ----------------------------------------------------------------------------------- transport


def run_concurrently(
    concurrency: int, work: Callable[[Item, threading.Event], Result], items: Mapping[Name, Item]
) -> Generator[tuple[Name, Result], None, None]:
    """Runs `work` on the items in threads; yields (name, work(item, stop)) as each item finishes.

    The caller must close the iterator (contextlib.closing). If the iterator is closed early, no
    further item starts. Closing also sets the event `stop`, so that `send_call` ends the requests
    in flight.

    Args:
      concurrency: maximum number of items in flight.
      work: called with an item and the event `stop`.
      items: the items by name.
    """
    stop = threading.Event()
    pool = concurrent.futures.ThreadPoolExecutor(concurrency)
    try:
        asked = {pool.submit(work, item, stop): name for name, item in items.items()}
        for future in concurrent.futures.as_completed(asked):
            yield asked[future], future.result()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def send_call(
    server: Server, key: str, what: HttpCall, name: str, stop: threading.Event
) -> tuple[Outcome, int]:
    """Sends a request, with retries; returns the last outcome and the number of attempts.

    Args:
      server: the server; its timeout, retries and backoff are used as in `ask_all`.
      key: the server's key; "" if the server needs none.
      what: the request.
      name: seed of the jitter; requests that fail at the same time need different names, so that
        their pauses differ.
      stop: event that ends the request when it is set.
    """
    attempt, outcome = 0, Outcome("unreachable", again=True)
    while outcome.again and attempt <= server.retries and outcome.after <= server.timeout:
        if attempt and stop.wait(_pause(server, name, attempt, outcome.after)):
            break
        attempt += 1
        outcome = _attempt_http_call(server, key, what, stop)
    return outcome, attempt


def redact_key(text: str, key: str) -> str:
    """Returns the text with [key] in place of the key; does not replace keys under 8 characters."""
    return text.replace(key, "[key]") if len(key) >= 8 else text


def _pause(server: Server, name: str, attempt: int, after: float) -> float:
    """Returns the seconds to wait before the next attempt; the jitter is a factor from 1/2 to 1."""
    draw = hashlib.sha256(f"{name}:{attempt}".encode()).digest()
    factor = 0.5 + int.from_bytes(draw[:4]) / 2**33
    grown = server.backoff * 2.0 ** min(attempt - 1, 60)
    return max(min(grown, server.timeout) * factor, after)


def _attempt_http_call(server: Server, key: str, what: HttpCall, stop: threading.Event) -> Outcome:
    """Sends the request once and returns the outcome."""
    deadline = time.monotonic() + server.timeout
    try:
        sock = _open_server_socket(what.url, deadline)
    except TimeoutError:
        return Outcome("timeout", detail="no connection within the time", again=True)
    except OSError as error:
        return Outcome("unreachable", detail=to_one_line(str(error)), again=True)
    with contextlib.closing(sock):
        try:
            reply = _exchange_http(what, key, _DeadlineSocket(sock, deadline, stop))
        except TimeoutError:
            return Outcome("timeout", detail="no complete reply within the time", again=True)
        except (http.client.HTTPException, OSError) as error:
            detail = f"the reply is incomplete or not HTTP: {type(error).__name__}"
            return Outcome("bad_reply", detail=detail, again=True)
    return _judge_http_reply(what, *reply)


def _exchange_http(
    what: HttpCall, key: str, sock: "_DeadlineSocket"
) -> tuple[int, Mapping[str, str], bytes]:
    """Returns the reply's status, its headers, and at most _LARGEST + 1 bytes of its body."""
    parts = urllib.parse.urlsplit(what.url)
    kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    connection = kind[parts.scheme](parts.hostname or "", parts.port)
    connection.sock = cast(socket.socket, sock)
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    method, body = ("GET", None) if what.body is None else ("POST", json.dumps(what.body).encode())
    connection.request(method, parts.path, body, headers)
    reply = connection.getresponse()
    text = reply.read(_LARGEST + 1).decode("latin-1")
    if reply.length and len(text) <= _LARGEST:
        raise http.client.IncompleteRead(b"", reply.length)
    # The key is removed before the text is cut, because a cut could leave a part of the key.
    return reply.status, reply.headers, redact_key(text, key).encode("latin-1")


def _judge_http_reply(
    what: HttpCall, status: int, headers: Mapping[str, str], body: bytes
) -> Outcome:
    """Returns the outcome of a complete reply."""
    if 200 <= status < 300:
        return _read_http_body(what, body)
    asked = headers.get("Retry-After", "").strip()
    after = float(asked) if re.fullmatch("[0-9]{1,9}", asked) else 0.0
    wait = f", Retry-After {asked}" if after else ""
    detail = f"HTTP {status}{wait}: {to_one_line(body.decode(errors='replace'))}"
    if status < 400:
        return Outcome("bad_reply", detail=detail)  # no retry: the server would redirect again
    kind = "refused" if status < 500 else "server_error"
    return Outcome(kind, detail=detail, again=status >= 500 or status in _AGAIN, after=after)


def _read_http_body(what: HttpCall, body: bytes) -> Outcome:
    if len(body) > _LARGEST:
        return Outcome("bad_reply", detail=f"more than {_LARGEST} bytes")
    try:
        return what.read(body)
    except (ValueError, RecursionError):
        problem = "not JSON"
    except (LookupError, TypeError, AttributeError):
        problem = "JSON of another form"
    said = to_one_line(body.decode(errors="replace"))
    return Outcome("bad_reply", detail=f"{problem}: {said}", again=True)


def to_one_line(text: str) -> str:
    """Returns a server's text as one line of printable characters."""
    text = "".join(char if char.isprintable() else " " for char in text[:4096])
    return " ".join(text.split())[:_DETAIL]


def _left(deadline: float) -> float:
    if (seconds := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return seconds


def _open_server_socket(url: str, deadline: float) -> socket.socket:
    """Returns a socket connected to the first of the host's addresses that accepts a connection."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    failure = OSError(f"no address of {host}")
    for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            sock = socket.create_connection((str(address[0]), port), timeout=_left(deadline))
        except OSError as error:
            failure = error
            continue
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        return sock if parts.scheme == "http" else _tls().wrap_socket(sock, server_hostname=host)
    raise failure


class _DeadlineSocket(io.RawIOBase):
    """Socket for `http.client` with one deadline for all sending and reading.

    Reading ends soon after `stop` is set, because the rest of a reply could take minutes.
    """

    def __init__(self, sock: socket.socket, deadline: float, stop: threading.Event):
        self._sock, self._deadline, self._stop = sock, deadline, stop

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._sock.settimeout(_left(self._deadline))
            view = view[self._sock.send(view) :]

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._stop.is_set():
            self._sock.settimeout(min(_left(self._deadline), _LOOK))
            with contextlib.suppress(TimeoutError):
                return self._sock.recv_into(buffer)
        raise TimeoutError

    def close(self) -> None:
        """Keeps the socket open, because http.client calls `close` too early."""
