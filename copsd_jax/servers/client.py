"""HTTP client for servers: requests with retries, deadlines and limited concurrency.

`servers/chat.py` uses this client to request chat completions, and `servers/remote_engine.py` uses
it to request completions of token ids.

The client uses the standard library's `http.client`. Common clients, such as httpx, have no overall
deadline: their timeouts start again after every byte received. In this client, a read may take only
the time that is left for the whole request. Therefore, a server that only rarely sends a byte
cannot block a run. Redirects are not followed, because the key would be sent to the new address.
Proxy settings in the environment are ignored.

If the server fails, the result is an outcome with a status, not an exception. The server's key is
read from the environment when a request is sent. The key never appears in messages or files. If a
server's reply contains the key, the key is removed from the reply.
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
import queue
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple, TypeVar, cast

from copsd_jax.runtime import workdir

STATUSES = {
    "ok": "a complete answer",
    "cut": "an answer that ended at max_tokens (finish_reason length)",
    "timeout": "no complete reply within the time",
    "refused": "the server refuses the request (HTTP 4xx)",
    "server_error": "the server failed (HTTP 5xx)",
    "bad_reply": "an invalid reply: incomplete, not JSON, or without content",
    "unreachable": "no connection, or a gateway without a server behind it (HTTP 502, 503)",
}

_AGAIN = frozenset({408, 409, 425, 429})  # 4xx statuses after which another attempt may succeed
_LARGEST = 1 << 24  # maximum number of bytes in a reply
_DETAIL = 300  # maximum number of characters in a server's message about a failure
_tls = functools.cache(ssl.create_default_context)
_LOOK = 0.25  # seconds between two checks whether the event `stop` is set
_LONGEST_PAUSE = 30.0  # seconds; limits how late a restarted server is noticed

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
      timeout: maximum number of seconds for one attempt, from the look-up of the host until the
        last byte arrives. If the server sends no Retry-After header, a pause between two attempts
        is at most min(`timeout`, max(30 s, `backoff`)).
      retries: maximum number of attempts after the first.
      backoff: pause in seconds before the second attempt; the pause doubles before each later
        attempt.
      concurrency: maximum number of requests in flight.
      cache: folder with one file per answered request; "" for no cache.
      section: the section of the settings that describe the server; messages name its settings.
    """

    url: str
    model: str
    key_env: str
    timeout: float
    retries: int
    backoff: float
    concurrency: int
    cache: str = ""
    section: str = "server"


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


def server_from_settings(settings: Mapping[str, Any], section: str, cache: str = "") -> Server:
    """Builds a `Server` from a section of settings that have the names of the fields.

    The folder `cache` is a separate argument, because the name `cache` has another meaning in the
    section `sampler`: `sampler.cache` is the dtype of keys and values.
    """
    own = ("cache", "section")
    names = (field.name for field in dataclasses.fields(Server) if field.name not in own)
    named = {name: settings[name] for name in names}
    return Server(**named, cache=os.path.expanduser(cache), section=section)


def check_server(server: Server) -> None:
    """Checks the fields of a server, without sending a request.

    Raises:
      ValueError: the URL is malformed, the model is empty, the key is missing or unusable, or a
        number is out of range.
      OSError: the cache folder cannot be written.
    """
    check_url(server)
    if not server.model:
        raise ValueError(f"{server.section}.model is '': name the model that the server serves")
    read_key(server)
    for name, least in (("timeout", 0.001), ("retries", 0), ("backoff", 0), ("concurrency", 1)):
        if not least <= (value := getattr(server, name)) < threading.TIMEOUT_MAX:
            raise ValueError(f"{server.section}.{name} is {value}: it must be at least {least}")
    if server.cache:
        workdir.check_writable(pathlib.Path(server.cache), f"{server.section}.cache")


def check_url(server: Server) -> None:
    """Checks the URL of a server.

    Raises:
      ValueError: the URL is malformed, or contains a user, a query or a fragment.
    """
    url, problem = server.url, ""
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
    if problem:  # the parts that may hold a password or a key are hidden
        shown = re.sub(r"[?#].*", "?...", re.sub("//[^/]*@", "//...@", url), flags=re.DOTALL)
        raise ValueError(f"{server.section}.url is {shown!r}: {problem}")


def read_key(server: Server) -> str:
    """Returns the server's key, or "" if the server needs none.

    Raises:
      ValueError: the environment variable named by key_env is not set, or its value is not valid in
        a header. The message contains the variable's name but not the value. If the name may
        itself be a key, the message does not contain the name either.
    """
    if not (name := server.key_env):
        return ""
    key = os.environ.get(name, "")
    if re.fullmatch(r"[!-~]+", key):
        return key
    if not re.fullmatch("[A-Z_][A-Z0-9_]*|[a-z_]+", name):  # keys have both cases, or digits
        raise ValueError(
            f"{server.section}.key_env is not the name of an environment variable that is set (its "
            "value is not shown, because it may be a key): put the key into an environment "
            "variable with a name in capitals, and set key_env to this name"
        )
    problem = "holds blanks, line breaks or characters beyond ASCII" if key else "is not set"
    raise ValueError(
        f"{server.section}.key_env is {name!r}: the environment variable {name} {problem}; put the "
        "server's key there, or set key_env to '' if no key is needed"
    )


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
    server: Server, key: str, what: HttpCall, name: str, stop: threading.Event,
    patience: float = 0.0,
) -> tuple[Outcome, int]:  # fmt: skip
    """Sends a request, with retries; returns the last outcome and the number of attempts.

    Args:
      server: the server; its timeout, retries and backoff are described in `Server`.
      key: the server's key; "" if the server needs none.
      what: the request.
      name: seed of the jitter; requests that fail at the same time need different names, so that
        their pauses differ.
      stop: event that ends the request when it is set.
      patience: see `repeat_call`.
    """
    once = lambda attempt: attempt_call(server, key, what, stop)  # noqa: E731
    return repeat_call(server, once, name, stop, patience)


def repeat_call(
    server: Server, once: Callable[[int], Outcome], name: str, stop: threading.Event,
    patience: float = 0.0,
) -> tuple[Outcome, int]:  # fmt: skip
    """Calls `once` until it succeeds or no attempt is left; returns the same as `send_call`.

    Args:
      server: the server, as in `send_call`.
      once: function that makes an attempt. Its argument is the number of the attempt, counted
        from 1.
      name: seed of the jitter, as in `send_call`.
      stop: event that ends the pauses when it is set.
      patience: number of seconds for which an unreachable server gets further attempts, even after
        the last retry. The restart of a server takes minutes.
    """
    attempt, outcome = 0, Outcome("unreachable", again=True)
    lost = None  # time at which the server became unreachable; None if it is reachable
    while outcome.again and outcome.after <= server.timeout:
        waits = lost is not None and time.monotonic() - lost < patience
        if attempt > server.retries and not waits:
            if lost is not None and patience:
                limit = f"; attempts went on for {patience:g} s ({server.section}.timeout)"
                outcome = outcome._replace(detail=outcome.detail + limit)
            break
        if attempt and stop.wait(_pause(server, name, attempt, outcome.after)):
            break
        attempt += 1
        outcome = once(attempt)
        reached = outcome.status != "unreachable"
        lost = None if reached else time.monotonic() if lost is None else lost
    return outcome, attempt


def redact_key(text: str, key: str) -> str:
    """Returns the text with [key] in place of the key; does not replace keys under 8 characters."""
    return text.replace(key, "[key]") if len(key) >= 8 else text


def _pause(server: Server, name: str, attempt: int, after: float) -> float:
    """Returns the seconds to wait before the next attempt; the jitter is a factor from 1/2 to 1."""
    draw = hashlib.sha256(f"{name}:{attempt}".encode()).digest()
    factor = 0.5 + int.from_bytes(draw[:4]) / 2**33
    longest = min(max(server.backoff, _LONGEST_PAUSE), server.timeout)
    grown = server.backoff * 2.0 ** min(attempt - 1, 60)
    return max(min(grown, longest) * factor, after)


def attempt_call(server: Server, key: str, what: HttpCall, stop: threading.Event) -> Outcome:
    """Sends a request once and returns the outcome; see `send_call`."""
    deadline = time.monotonic() + server.timeout
    limit = f"within {server.timeout:g} s ({server.section}.timeout)"
    try:
        sock = _open_server_socket(what.url, deadline)
    except TimeoutError:
        return Outcome("timeout", detail=f"no connection {limit}", again=True)
    except OSError as error:
        return Outcome("unreachable", detail=to_one_line(str(error)), again=True)
    with contextlib.closing(sock):
        try:
            reply = _exchange_http(what, key, _DeadlineSocket(sock, deadline, stop))
        except TimeoutError:
            return Outcome("timeout", detail=f"no complete reply {limit}", again=True)
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
    kind = "unreachable" if status in (502, 503) else kind
    again = (status >= 500 and status != 501) or status in _AGAIN  # a 501 is permanent
    return Outcome(kind, detail=detail, again=again, after=after)


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


def list_models_call(url: str) -> HttpCall:
    """Returns the call that fetches a server's list of models, as {name: description}."""

    def read(body: bytes) -> Outcome:
        entries = json.loads(body)["data"]
        return Outcome("ok", {entry["id"]: dict(entry) for entry in entries})

    return HttpCall(url.rstrip("/") + "/models", None, read)


def _compute_seconds_left(deadline: float) -> float:
    if (seconds := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return seconds


def _look_up(host: str, port: int, deadline: float) -> list:
    """Returns the result of `socket.getaddrinfo`; raises TimeoutError after the deadline.

    The look-up runs in a thread, because the system's own look-up has no time limit.
    """
    found = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:  # raised again below, in the thread that waits
            found.put(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        result = found.get(timeout=_compute_seconds_left(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(result, Exception):
        raise result
    return result


def _open_server_socket(url: str, deadline: float) -> socket.socket:
    """Connects a socket to the first address of the host that accepts a connection."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    failure = OSError(f"no address of {host}")
    for *_, address in _look_up(host, port, deadline):
        try:
            sock = socket.create_connection(
                (str(address[0]), port), timeout=_compute_seconds_left(deadline)
            )
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
            self._sock.settimeout(_compute_seconds_left(self._deadline))
            view = view[self._sock.send(view) :]

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._stop.is_set():
            self._sock.settimeout(min(_compute_seconds_left(self._deadline), _LOOK))
            with contextlib.suppress(TimeoutError):
                return self._sock.recv_into(buffer)
        raise TimeoutError

    def close(self) -> None:
        """Keeps the socket open, because http.client calls `close` too early."""
