"""Asks an OpenAI-compatible server for chat completions, many at once, each question once.

`send_call` and `run_concurrently` below are the transport alone: any request to such a server, and
many at once.

The standard library's `http.client` is enough, and leaves the socket to us: every single read gets
no more than what is left of the request's time, so that a server that sends a byte now and then
cannot hold a run. (Timeouts of the usual clients start anew with every byte.) Redirects are not
followed, since the key would go along, and proxies of the environment are not used.

What a server does is an answer with a status, never an exception. The key is read from the
environment when something is asked; it is in no message or cache file, and blotted out where a
server echoes it.
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
    "ok": "a whole answer",
    "cut": "an answer that ended at max_tokens (finish_reason length)",
    "timeout": "no whole reply within the time",
    "refused": "the server refuses the request (HTTP 4xx)",
    "server_error": "the server failed (HTTP 5xx)",
    "bad_reply": "no reply of the expected form: broken off, no JSON, or no content in it",
    "unreachable": "no connection",
}
USABLE = ("ok", "cut")  # has a text, and is kept in the cache

_AGAIN = frozenset({408, 409, 425, 429})  # of the 4xx: what another attempt can mend
_LARGEST = 1 << 24  # bytes of a reply
_DETAIL = 300  # characters of what a server says of a failure
_LOOK = 0.25  # seconds between two looks at whether the caller is stopped

Name = TypeVar("Name")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Server:
    """Where and how to ask.

    Attributes:
      url: the base, for example "http://localhost:8000/v1"; "/chat/completions" is appended.
      model: the model's name there.
      key_env: the environment variable that holds the key, "" for a server without keys.
      timeout: seconds of one attempt, from the connection to the last byte (looking up the host's
        name comes on top), and the longest pause between two.
      retries: further attempts after the first.
      backoff: seconds before the second attempt; doubled for each further one.
      concurrency: requests under way at once.
      cache: folder with one file per answered request, "" for none.
    """

    url: str
    model: str
    key_env: str
    timeout: float
    retries: int
    backoff: float
    concurrency: int
    cache: str = ""


# The fields that every server has, as the settings `author.*` and `sampler.*` name them.
FIELDS = tuple(field.name for field in dataclasses.fields(Server) if field.name != "cache")


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """One question. Equal requests of a call are asked once: other samples need other seeds."""

    messages: Sequence[Mapping[str, str]]  # each with "role" and "content"
    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None


@dataclasses.dataclass(frozen=True)
class ChatAnswer:
    """What became of a request; `text` is "" unless the status is in USABLE."""

    text: str
    status: str  # a key of STATUSES
    attempts: int  # 0: from the cache
    detail: str = ""  # of a failure, one line for people


class Outcome(NamedTuple):
    """What became of an attempt, or of the last one."""

    status: str  # a key of STATUSES
    value: Any = ""  # what Call.read found
    detail: str = ""  # of a failure, one line for people
    again: bool = False  # whether another attempt may end better
    after: float = 0.0  # seconds that the server asks to wait


class HttpCall(NamedTuple):
    """One HTTP request, and what its reply means.

    Attributes:
      body: sent as JSON; None for none.
      read: the bytes of a reply with status 2xx -> Outcome. It may raise what reading JSON of
        another form raises (ValueError, LookupError, TypeError, AttributeError): a bad_reply.
    """

    method: str
    url: str
    body: Mapping[str, Any] | None
    read: Callable[[bytes], Outcome]


def check_server(server: Server, prefix: str = "server.") -> None:
    """Refuses what could not work, without asking anything; `prefix` is the settings' in messages.

    Raises:
      ValueError: a malformed URL, an empty model, a missing or unusable key, a number out of range.
      OSError: the cache folder cannot be written.
    """
    _check_url(server.url, f"{prefix}url")
    if not server.model:
        raise ValueError(f"{prefix}model is '': name the model that the server serves")
    read_key(server, prefix)
    for name, least in (("timeout", 0.001), ("retries", 0), ("backoff", 0), ("concurrency", 1)):
        if not least <= getattr(server, name) < threading.TIMEOUT_MAX:
            raise ValueError(f"{prefix}{name} is {getattr(server, name)}: at least {least}")
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
    except ValueError as error:  # of port, brackets, or a name that is none
        problem = str(error)
    if problem:  # what stands before an @ may be a password
        raise ValueError(f"{setting} is {re.sub('//[^/]*@', '//...@', url)!r}: {problem}")


def read_key(server: Server, prefix: str = "server.") -> str:
    """The key, "" where none is needed. Messages show the variable's name, not its value.

    Raises:
      ValueError: the variable of key_env is not set, or its value can be in no header.
    """
    if not server.key_env:
        return ""
    key = os.environ.get(server.key_env, "")
    if re.fullmatch(r"[!-~]+", key):
        return key
    problem = "holds blanks, line breaks or characters beyond ASCII" if key else "is not set"
    raise ValueError(
        f"{prefix}key_env is {server.key_env!r}: the environment variable {server.key_env} "
        f"{problem}; put the server's key there, or set '' for a server without keys"
    )


def ask_all(
    server: Server,
    requests: Sequence[ChatRequest],
    progress: Callable[[int, int], None] | None = None,
) -> list[ChatAnswer]:
    """Answers in the order of the requests; what the cache holds is not asked again.

    A pause grows exponentially with a jitter that depends on request and attempt alone, and is at
    least what Retry-After asks for. Where that is more than `server.timeout`, the request ends.

    `progress` is called in this thread with (answers there, of how many).

    Raises:
      ValueError: as `check_server` does of URL and key, where something is to be asked.
    """
    digests = [_digest(server, request) for request in requests]
    answers = {digest: _cached(server, digest) for digest in dict.fromkeys(digests)}
    if missing := {d: r for d, r in zip(digests, requests, strict=True) if answers[d] is None}:
        _check_url(server.url, "server.url")
        _ask_missing(server, read_key(server), missing, digests, answers, progress)
    return [answer for digest in digests if (answer := answers[digest]) is not None]


def _ask_missing(server, key, missing, digests, answers, progress) -> None:
    """Fills in `answers`."""

    def ask(item: tuple[str, ChatRequest], stop: threading.Event) -> ChatAnswer:
        return _ask(server, key, *item, stop)

    items = {digest: (digest, request) for digest, request in missing.items()}
    with contextlib.closing(run_concurrently(server.concurrency, ask, items)) as done:
        for digest, answer in done:
            answers[digest] = answer
            if progress is not None:
                progress(sum(answers[d] is not None for d in digests), len(digests))


def _ask(
    server: Server, key: str, digest: str, request: ChatRequest, stop: threading.Event
) -> ChatAnswer:
    body = {"model": server.model, **_fields(request)}
    url = server.url.rstrip("/") + "/chat/completions"
    outcome, attempts = send_call(server, key, HttpCall("POST", url, body, _content), digest, stop)
    answer = ChatAnswer(redact_key(outcome.value, key), outcome.status, attempts, outcome.detail)
    _keep(server, digest, answer)
    return answer


def _fields(request: ChatRequest) -> dict[str, Any]:
    """The part of the body that is the request's; numbers in one form, so that 1 is 1.0."""
    fields: dict[str, Any] = {
        "messages": [dict(message) for message in request.messages],
        "temperature": float(request.temperature),
        "top_p": float(request.top_p),
        "max_tokens": int(request.max_tokens),
    }
    return fields if request.seed is None else {**fields, "seed": int(request.seed)}


def _content(body: bytes) -> Outcome:
    """The text of the first choice."""
    choice = json.loads(body)["choices"][0]
    text, finish = choice["message"].get("content"), choice.get("finish_reason")
    cut = finish == "length"  # all of max_tokens may have gone into hidden thinking
    if not isinstance(text := text or ("" if cut else None), str):
        return Outcome("bad_reply", detail="no content in choices[0].message", again=True)
    # Half of a surrogate pair is JSON but no text: neither a tokenizer nor a file takes it.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Outcome("cut" if cut else "ok", text)


def _digest(server: Server, request: ChatRequest) -> str:
    """SHA-256 of all that an answer depends on; the key and how often one tries are no part."""
    asked = {"url": server.url.rstrip("/"), "model": server.model, **_fields(request)}
    canonical = json.dumps(asked, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _cached(server: Server, digest: str) -> ChatAnswer | None:
    """The kept answer; None where there is none, or after a warning, where it cannot be read."""
    path = pathlib.Path(server.cache) / f"{digest}.json"
    if not server.cache or not path.exists():
        return None
    try:
        found = workdir.read_json(path)
        text, status = found["text"], found["status"]
        if isinstance(text, str) and status in USABLE:
            return ChatAnswer(text, status, attempts=0)
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        pass  # as a file of another form
    print(f"warning: {path} is no answer of ours: asked again", file=sys.stderr, flush=True)
    return None


def _keep(server: Server, digest: str, answer: ChatAnswer) -> None:
    """Writes a usable answer, whole or not at all, also beside other threads and runs."""
    if not server.cache or answer.status not in USABLE:
        return
    path = pathlib.Path(server.cache) / f"{digest}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f"{digest}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "w") as file:  # ASCII
            json.dump({"model": server.model, "status": answer.status, "text": answer.text}, file)
        os.replace(part, path)
    except OSError as error:  # a full disk loses the copy, not the answer
        print(f"warning: {path} cannot be written ({error.strerror})", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------- transport


def run_concurrently(
    concurrency: int, work: Callable[[Item, threading.Event], Result], items: Mapping[Name, Item]
) -> Generator[tuple[Name, Result], None, None]:
    """(name, work(item, stop)) of each item as it is done, so many at once in threads.

    Close the iterator (contextlib.closing): should its reader be stopped, nothing more is begun and
    `stop` is set, at which `send_call` ends what it is at.
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
    """Attempts until one ends the matter: (the last one's outcome, how many there were).

    `server` says how long and how often to try (see `ask_all`), and nothing else; `name` parts the
    pauses of requests that failed together.
    """
    attempt, outcome = 0, Outcome("unreachable", again=True)
    while outcome.again and attempt <= server.retries and outcome.after <= server.timeout:
        if attempt and stop.wait(_pause(server, name, attempt, outcome.after)):
            break
        attempt += 1
        outcome = _attempt(server, key, what, stop)
    return outcome, attempt


def redact_key(text: str, key: str) -> str:
    """`text` without the key; one as short as the usual "EMPTY" is no secret, and may be a word."""
    return text.replace(key, "[key]") if len(key) >= 8 else text


def _pause(server: Server, name: str, attempt: int, after: float) -> float:
    """Seconds before the next attempt; the jitter, 1/2 to 1, parts what failed together."""
    draw = hashlib.sha256(f"{name}:{attempt}".encode()).digest()
    factor = 0.5 + int.from_bytes(draw[:4]) / 2**33
    grown = server.backoff * 2.0 ** min(attempt - 1, 60)
    return max(min(grown, server.timeout) * factor, after)


def _attempt(server: Server, key: str, what: HttpCall, stop: threading.Event) -> Outcome:
    """Sends the request once."""
    deadline = time.monotonic() + server.timeout
    try:
        sock = _connect(what.url, deadline)
    except TimeoutError:
        return Outcome("timeout", detail="no connection within the time", again=True)
    except OSError as error:
        return Outcome("unreachable", detail=to_one_line(str(error)), again=True)
    with contextlib.closing(sock):
        try:
            reply = _exchange(what, key, _Limited(sock, deadline, stop))
        except TimeoutError:
            return Outcome("timeout", detail="no whole reply within the time", again=True)
        except (http.client.HTTPException, OSError) as error:
            detail = f"the reply broke off or is no HTTP: {type(error).__name__}"
            return Outcome("bad_reply", detail=detail, again=True)
    return _outcome(what, *reply)


def _exchange(what: HttpCall, key: str, sock: "_Limited") -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body (at most _LARGEST bytes and one) of the reply."""
    parts = urllib.parse.urlsplit(what.url)
    kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    connection = kind[parts.scheme](parts.hostname or "", parts.port)
    connection.sock = cast(socket.socket, sock)
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    body = None if what.body is None else json.dumps(what.body).encode()
    connection.request(what.method, parts.path, body, headers)
    reply = connection.getresponse()
    text = reply.read(_LARGEST + 1).decode("latin-1")
    if reply.length and len(text) <= _LARGEST:
        raise http.client.IncompleteRead(b"", reply.length)
    # Blotted before anything is cut out of it: half a key is a secret too.
    return reply.status, reply.headers, redact_key(text, key).encode("latin-1")


def _outcome(what: HttpCall, status: int, headers: Mapping[str, str], body: bytes) -> Outcome:
    """What a complete reply means."""
    if 200 <= status < 300:
        return _read(what, body)
    asked = headers.get("Retry-After", "").strip()
    after = float(asked) if re.fullmatch("[0-9]{1,9}", asked) else 0.0
    wait = f", Retry-After {asked}" if after else ""
    detail = f"HTTP {status}{wait}: {to_one_line(body.decode(errors='replace'))}"
    if 400 <= status < 500:
        return Outcome("refused", detail=detail, again=status in _AGAIN, after=after)
    if status >= 500:
        return Outcome("server_error", detail=detail, again=True, after=after)
    return Outcome("bad_reply", detail=detail)  # a redirect is the same the next time


def _read(what: HttpCall, body: bytes) -> Outcome:
    if len(body) > _LARGEST:
        return Outcome("bad_reply", detail=f"more than {_LARGEST} bytes")
    try:
        return what.read(body)
    except (ValueError, RecursionError):
        said = to_one_line(body.decode(errors="replace"))
        return Outcome("bad_reply", detail=f"no JSON: {said}", again=True)
    except (LookupError, TypeError, AttributeError):
        said = to_one_line(body.decode(errors="replace"))
        return Outcome("bad_reply", detail=f"JSON of another form: {said}", again=True)


def to_one_line(text: str) -> str:
    """On one line of printable characters, since a server wrote it."""
    text = "".join(char if char.isprintable() else " " for char in text[:4096])
    return " ".join(text.split())[:_DETAIL]


def _left(deadline: float) -> float:
    if (seconds := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return seconds


@functools.lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _connect(url: str, deadline: float) -> socket.socket:
    """A connection to the first of the host's addresses that takes one."""
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


class _Limited(io.RawIOBase):
    """What `http.client` needs of a socket, with one deadline for all that is sent and read.

    Reading ends soon after `stop` is set: a reply may be minutes away.
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
        """Nothing: the connection is closed as soon as a last reply begins, and by `_attempt`."""
