"""Chat completions of OpenAI-compatible servers, with a cache of answers.

If the server fails, the result is an answer with a status, not an exception.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from copsd_jax.runtime import storage, streams
from copsd_jax.servers import client

USABLE = ("ok", "cut")  # answers with these statuses have a text, and are cached
_SENT_AGAIN = "sent again with "  # `detail` begins with this text if the server first refused


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
    status: str  # a key of client.STATUSES
    attempts: int  # number of attempts; 0 if the answer is from the cache
    detail: str = ""  # one readable line about a failure, or about a refusal before the answer


def ask_all(
    server: client.Server, requests: Sequence[ChatRequest],
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
        client.check_url(server)
        ask = functools.partial(_send_chat_request, server, client.read_key(server))
        with contextlib.closing(client.run_concurrently(server.concurrency, ask, missing)) as done:
            for digest, answer in done:
                answers[digest] = answer
                if progress is not None:
                    progress(sum(answers[d] is not None for d in digests), len(digests))
    return [answer for digest in digests if (answer := answers[digest]) is not None]


def was_refused_at_first(detail: str) -> bool:
    """Returns whether an answer with this detail belongs to a request that was refused at first.

    The client then sent the request again, with another name for the token limit.
    """
    return detail.startswith(_SENT_AGAIN)


@functools.cache
def _list_limit_names(url: str, model: str) -> list[str]:
    """Returns the possible names of the token limit; the name that the server accepts is first.

    OpenAI's reasoning models refuse max_tokens, and name max_completion_tokens in the refusal.
    `_send_chat_request` reorders the list once a request with the other name has succeeded.
    """
    return ["max_tokens", "max_completion_tokens"]


def _send_chat_request(
    server: client.Server, key: str, item: tuple[str, ChatRequest], stop: threading.Event
) -> ChatAnswer:
    digest, request = item
    body, total = {"model": server.model, **_build_chat_body(request)}, 0
    limit, names = body.pop("max_tokens"), _list_limit_names(server.url, server.model)
    url = server.url.rstrip("/") + "/chat/completions"
    read = functools.partial(_read_chat_reply, request.temperature > 0)
    outcome, refusal = client.Outcome("unreachable"), ""
    for name in tuple(names):
        what = client.HttpCall(url, {**body, name: limit}, read)
        outcome, attempts = client.send_call(server, key, what, digest, stop)
        total += attempts
        others = [other for other in names if other != name]
        if outcome.status in USABLE:
            names[:] = [name, *others]
            if refusal:
                why = f"{_SENT_AGAIN}{name}, because the server refused {others[0]}: {refusal}"
                outcome = outcome._replace(detail=why)
        refusal = outcome.detail
        if outcome.status != "refused" or not any(map(outcome.detail.__contains__, others)):
            break
    answer = ChatAnswer(
        client.redact_key(outcome.value, key), outcome.status, total, outcome.detail
    )
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


def _read_chat_reply(random: bool, body: bytes) -> client.Outcome:
    """Reads the text of the first choice in a reply.

    Some servers put the thinking into a separate field. This function puts the thinking before
    the text, between the tags <think> and </think>, as in the texts of other servers.

    Args:
      random: whether the temperature is above 0, so that another attempt may give another text.
      body: the reply.
    """
    choice = json.loads(body)["choices"][0]
    message, finish = choice["message"], choice.get("finish_reason")
    text, thinking = message.get("content"), message.get("reasoning")
    thinking = thinking or message.get("reasoning_content")
    cut = finish == "length"  # hidden thinking may have used up all max_tokens
    if not isinstance(text := text or ("" if cut else None), str):
        only = ", only thinking" if thinking else ""
        detail = f"no content in choices[0].message{only} (finish_reason {finish!r})"
        return client.Outcome("bad_reply", detail=client.to_one_line(detail), again=random)
    if isinstance(thinking, str) and thinking:
        text = f"<think>{thinking}</think>{text}" if text else f"<think>{thinking}"
    # JSON may contain half of a surrogate pair, which tokenizers and files do not accept.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return client.Outcome("cut" if cut else "ok", text)


def _digest(server: client.Server, request: ChatRequest) -> str:
    """Returns the SHA-256 of the fields that affect an answer, without the key and the retries."""
    asked = {"url": server.url.rstrip("/"), "model": server.model, **_build_chat_body(request)}
    canonical = json.dumps(asked, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read_cached_answer(server: client.Server, digest: str) -> ChatAnswer | None:
    """Returns the cached answer or None; a malformed answer is ignored, with a warning."""
    path = pathlib.Path(server.cache) / f"{digest}.json"
    if not server.cache or not path.exists():
        return None
    try:
        found = storage.read_object(path)
        text, status = found["text"], found["status"]
        if isinstance(text, str) and status in USABLE:
            return ChatAnswer(text, status, attempts=0)
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        pass  # an unreadable file is handled below, like a malformed answer
    streams.warn(f"{path} is not a cached answer: the request is sent again")
    return None


def _cache_chat_answer(server: client.Server, digest: str, answer: ChatAnswer) -> None:
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
        streams.warn(f"{path} cannot be written ({error.strerror})")
