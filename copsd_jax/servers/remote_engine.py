"""The sampler's interface to an engine in another process, a server that completes token ids.

Token ids are sent and come back; no text is read. Every prompt is a request of its own, with a seed
that follows from its key. If the server is deterministic (SGLang with
--enable-deterministic-inference, vLLM in its batch-invariant mode), the same keys give the same
texts. Other servers round products of another batch differently, so a text may change with the
texts beside it, and a stopped run does not continue bit for bit. `sampler.loop` has no such limit.

The server decides which distribution its log-probabilities are of, and no reply says it:
  raw: the model's own distribution, at temperature 1 (vLLM's default; SGLang's with
    SGLANG_RETURN_ORIGINAL_LOGPROB).
  tempered: at the sampling temperature, nothing truncated (SGLang's default).
  processed: tempered, and truncated by top-k, top-p, min-p (vLLM's --logprobs-mode
    processed_logprobs).
A Completion has NaN for log-probabilities that do not follow from them (`reports_log_probs`); the
trainer computes its own. If several of top-k, top-p and min-p are on, a server may apply them in
another order than `truncation`, and then draws from that distribution.

A server serves one run, since `hand_over` changes its weights.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from copsd_jax.sampler import loop, request
from copsd_jax.servers import client, dialects

LOGPROBS = ("raw", "tempered", "processed")


@dataclasses.dataclass(frozen=True)
class EngineServer:
    """The address of an engine, and how to use it.

    Attributes:
      api: the server. `api.url` is the base with /v1 for either dialect; `api.timeout` has to cover
        the longest completion, its time in the queue included, and loading weights.
      dialect: a key of `dialects.DIALECTS`.
      logprobs: one of LOGPROBS.
      max_model_len: most tokens of a prompt and its completion; None takes the server's number.
      adapter: the name on the server of the adapter from `hand_over`; "" for the base model.
    """

    api: client.Server
    dialect: str
    logprobs: str
    max_model_len: int | None = None
    adapter: str = ""


# ------------------------------------------------------------------------------------ generate


def generate(
    server: EngineServer, prompts: Sequence[Sequence[int]],
    sampling: request.Sampling | Sequence[request.Sampling], *, keys: Any,
    vocabulary: request.Vocabulary, limits: Sequence[int] | None = None,
    progress: loop.Progress = None, done: loop.Done = None,
) -> loop.Result:  # fmt: skip
    """Samples one completion for each prompt on a server.

    Args:
      server: with its weights and adapter.
      prompts: token ids with the shared prefix, for which the server has a cache of its own.
      sampling: settings of all prompts, or one for each.
      keys: uint32 [n, 2] from `request.derive_keys`, one per prompt.
      vocabulary: of the model. The server does not know its valid ids, so a completion with another
        id, which a trained model hardly ever draws, is an error.
      limits: most tokens of each completion; None takes its max_tokens.
      progress: called with the statistics after each completion.
      done: called with (index of the prompt, completion) as soon as it is complete.

    Returns:
      The result as of `loop.generate`. `logps` and `logps_truncated` are NaN if they do not follow
      from the server's numbers; see `reports_log_probs`. In the statistics, prompt_tokens counts
      the tokens sent, whatever the server's cache saves, and occupancy is NaN.

    Raises:
      ValueError: settings or prompts cannot be served; nothing is sent.
      OSError: the server did not complete a row; the message has its last reply. At the first
        failure all other requests end.
      RuntimeError: a reply does not fit its request; the message has the address and the row.
    """
    check_server(server)
    texts = request.list_texts(prompts, sampling, keys, limits, vocabulary)
    _check_texts(server, texts)
    ask = functools.partial(_ask, server, client.read_key(server.api, "sampler."), vocabulary)
    found: dict[int, loop.Completion] = {}
    tokens, begun = 0, time.monotonic()
    sent = sum(len(text.prompt) for text in texts)
    stats = loop.Stats(0, len(texts), 0, sent, float("nan"), 0.0)
    rows = {number: (number, text) for number, text in enumerate(texts)}
    with contextlib.closing(client.run_concurrently(server.api.concurrency, ask, rows)) as answers:
        for number, completion in answers:
            found[number] = completion
            tokens += len(completion.ids)
            seconds = time.monotonic() - begun
            stats = stats._replace(done=len(found), tokens=tokens, seconds=seconds)
            if done is not None:
                done(number, completion)
            if progress is not None:
                progress(stats)
    return loop.Result([found[number] for number in rows], stats)


def reports_log_probs(logprobs: str, sampling: request.Sampling) -> tuple[bool, bool]:
    """Returns whether (logps, logps_truncated) of these settings follow from a server's numbers.

    Greedy rows are reported at temperature 1, and their truncated distribution is certain. Without
    top-k, top-p and min-p both distributions are the same.

    Args:
      logprobs: one of LOGPROBS.
      sampling: the settings.
    """
    whole = not sampling.top_k and sampling.top_p == 1 and not sampling.min_p
    if sampling.temperature == 0:
        return True, True
    if logprobs == "raw":
        return sampling.temperature == 1, sampling.temperature == 1 and whole
    return logprobs == "tempered" or whole, logprobs == "processed" or whole


def _check_texts(server: EngineServer, texts: Sequence[request.Text]) -> None:
    """Refuses a text that the server would draw otherwise or cut."""
    longest, coldest = server.max_model_len, dialects.DIALECTS[server.dialect].coldest
    if longest:
        room = f"{server.api.url} holds {longest} (sampler.max_model_len)"
        request.check_lengths(texts, longest, room)
    for degree in {text.sampling.temperature for text in texts}:
        if 0 < degree < coldest:
            rule = f"takes 0 or at least {coldest}, and changes a value between them"
            raise ValueError(f"temperature is {degree}: a {server.dialect} server {rule}")


def _ask(
    server: EngineServer, key: str, vocabulary: request.Vocabulary, row: tuple[int, request.Text],
    stop: threading.Event,
) -> loop.Completion:  # fmt: skip
    number, text = row
    dialect = dialects.DIALECTS[server.dialect]
    url = _address(server, dialect.generate)
    what = client.HttpCall(url, dialect.body(server.api.model, server.adapter, text), _json)
    name = f"{server.adapter}:{dialects.seed_of(text)}"
    outcome, attempts = client.send_call(server.api, key, what, name, stop)
    if outcome.status != "ok":
        raise OSError(
            f"{url} gave no completion of row {number} in {attempts} attempts "
            f"({outcome.status}): {outcome.detail}"
        )
    try:
        reply = dialect.read(outcome.value, text)
        return _completion(server.logprobs, text, reply, vocabulary)
    except ValueError as error:
        raise RuntimeError(f"{url}: the completion of row {number} {error}") from None


def _json(body: bytes) -> client.Outcome:
    return client.Outcome("ok", json.loads(body))


# ---------------------------------------------------------------------- checks of a reply
#
# They raise ValueError with the end of the sentence that `_ask` begins.


def _completion(
    logprobs: str, text: request.Text, reply: dialects.RawCompletion,
    vocabulary: request.Vocabulary,
) -> loop.Completion:  # fmt: skip
    ids, logps = _ids(text, reply.ids, vocabulary), _logps(reply)
    end = _end(text.sampling, ids, vocabulary.token_bytes)
    if end is not None and end < len(ids) and (last := ids[end - 1]) in text.sampling.stop_ids:
        raise ValueError(f"goes on behind the id {last}, which is one of its stop_token_ids")
    if end is None and reply.finish == "stop":
        raise ValueError(
            f"was stopped at the id {ids[-1]}, which is none of {sorted(text.sampling.stop_ids)} "
            f"and ends none of {text.sampling.stop}: the server has stop ids of its own"
        )
    if end is None and len(ids) < text.limit:
        raise ValueError(
            f"ended after {len(ids)} of {text.limit} tokens (finish_reason {reply.finish!r}): the "
            "server has a limit of its own"
        )
    if reply.finish not in ("stop", "length"):
        raise ValueError(f"has the finish_reason {reply.finish!r}: it must be stop or length")
    # A server checks for stop strings after some tokens; here a text ends at the token that
    # completes one.
    given = np.asarray(logps[:end], np.float32)
    absent = np.full_like(given, np.nan)
    tempered, truncated = reports_log_probs(logprobs, text.sampling)
    certain = text.sampling.temperature == 0
    return loop.Completion(
        ids=tuple(ids[:end]),
        logps=given if tempered else absent,
        logps_truncated=np.zeros_like(given) if certain else given if truncated else absent,
        finish="length" if end is None else "stop",
    )


def _ids(text: request.Text, ids: list, vocabulary: request.Vocabulary) -> list[int]:
    if not isinstance(ids, list) or not ids or any(type(token) is not int for token in ids):
        raise ValueError("has no list of token ids, or an empty one")
    if len(ids) > text.limit:
        raise ValueError(f"has {len(ids)} tokens: at most {text.limit} were asked for")
    size = len(vocabulary.valid_V)
    for token in ids:
        if not 0 <= token < size or not vocabulary.valid_V[token]:
            raise ValueError(
                f"has the id {token}: the tokenizer has {int(vocabulary.valid_V.sum())} of the "
                f"ids 0 to {size - 1}"
            )
    return ids


def _logps(reply: dialects.RawCompletion) -> list[float]:
    logps = reply.logps
    if not isinstance(logps, list) or len(logps) != len(reply.ids):
        found = f"{len(logps)}" if isinstance(logps, list) else "no list of"
        raise ValueError(f"has {found} log-probabilities for {len(reply.ids)} tokens")
    for value in logps:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not -1e9 <= value <= 1e-3:  # NaN fails this too; rounding may exceed 0
            raise ValueError(f"has the log-probability {value!r}: it must be a number up to 0")
    return logps


def _end(
    sampling: request.Sampling, ids: Sequence[int], token_bytes: Sequence[bytes]
) -> int | None:
    """Counts the tokens up to the first that ends the text; returns None if none does."""
    stops = [text.encode() for text in sampling.stop]
    by_string, _ = request.find_stop(b"", ids, stops, token_bytes)
    by_id = next((i for i, token in enumerate(ids, 1) if token in sampling.stop_ids), None)
    return min((end for end in (by_string, by_id) if end is not None), default=None)


# ------------------------------------------------------------------------- checks and weights


def _address(server: EngineServer, of: str) -> str:
    base = server.api.url.rstrip("/")
    return of.format(base=base, root=base.removesuffix("/v1"))


def check_server(server: EngineServer) -> None:
    """Checks the settings sampler.* of a server, without sending anything.

    Raises:
      ValueError: a setting cannot work; the message has its value and the choices.
    """
    client.check_server(server.api, "sampler.")
    for name, choices in (("dialect", tuple(dialects.DIALECTS)), ("logprobs", LOGPROBS)):
        if (value := getattr(server, name)) not in choices:
            raise ValueError(f"sampler.{name} is {value!r}: the choices are {', '.join(choices)}")
    if server.max_model_len is not None and server.max_model_len < 2:
        raise ValueError(f"sampler.max_model_len is {server.max_model_len}: at least 2")


def connect(server: EngineServer) -> EngineServer:
    """Returns the server with max_model_len filled in, after asking for its models.

    Raises:
      ValueError: as of `check_server`; or it does not serve `model`, or not max_model_len tokens.
      OSError: it gives no reply of the expected form.
    """
    check_server(server)
    api, served = server.api, list_models(server)
    if api.model not in served:
        names = ", ".join(map(repr, served)) or "nothing"
        raise ValueError(f"sampler.model is {api.model!r}: {api.url} serves {names}")
    asked, length = server.max_model_len, served[api.model]
    if asked and length and asked > length:
        raise ValueError(f"sampler.max_model_len is {asked}: {api.url} holds {length}")
    return dataclasses.replace(server, max_model_len=asked or length)


def list_models(server: EngineServer) -> dict[str, int | None]:
    """Returns the server's models and adapters by name, with the most tokens each takes, or None.

    Raises:
      OSError: it gives no reply of the expected form.
    """

    def read(body: bytes) -> client.Outcome:
        entries = json.loads(body)["data"]
        return client.Outcome("ok", {e["id"]: e.get("max_model_len") for e in entries})

    what = client.HttpCall(_address(server, "{base}/models"), None, read)
    return _call(server, what, "tell its models")


def hand_over(server: EngineServer, folder: str | pathlib.Path) -> EngineServer:
    """Loads a folder of weights on the server; returns the server to ask from then on.

    An adapter gets a name that follows from its contents. Servers cache the keys and values of
    prompts by the adapter's name, so new weights under an old name would meet stale entries. It
    also makes an interrupted call repeatable. The former adapter is unloaded.

    Args:
      server: with the former weights.
      folder: an adapter as PEFT writes it (adapter_config.json), or a model with all weights in
        Hugging Face's layout (config.json). The server has to see it under the same path.

    Raises:
      ValueError: the folder is neither.
      OSError: the server did not load it; the message has its reply and the options it needs.
    """
    path = pathlib.Path(folder).resolve()
    if (path / "adapter_config.json").is_file():
        return _hand_adapter(server, path)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has neither adapter_config.json nor config.json")
    dialect = dialects.DIALECTS[server.dialect]
    for address, body in dialect.swap(str(path)):
        what = _command(server, address, body)
        _call(server, what, f"read the weights in {path}", dialect.needs_swap)
    return dataclasses.replace(server, adapter="")


def _hand_adapter(server: EngineServer, path: pathlib.Path) -> EngineServer:
    name, served = _name(path), list_models(server)
    if server.adapter not in ("", name) and server.adapter in served:
        _change(server, "unload", {"lora_name": server.adapter})
    if name not in served:
        _change(server, "load", {"lora_name": name, "lora_path": str(path)})
    return dataclasses.replace(server, adapter=name)


def _change(server: EngineServer, verb: str, body: dict[str, str]) -> None:
    """Loads or unloads an adapter; a refusal counts only if the change did not happen.

    A second attempt is refused if the first one succeeded and its reply was lost.
    """
    dialect, name = dialects.DIALECTS[server.dialect], body["lora_name"]
    what = _command(server, f"{dialect.adapters}/{verb}_lora_adapter", body)
    task = f"{verb} the adapter {body.get('lora_path', name)}"
    try:
        _call(server, what, task, dialect.needs_adapters)
    except OSError:
        if (name in list_models(server)) != (verb == "load"):
            raise


def _name(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.glob("adapter_*")):
        digest.update(f"{file.name}\0".encode())
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)  # adds to the one digest of all files
    return f"copsd-{digest.hexdigest()[:16]}"


def _command(server: EngineServer, address: str, body: Mapping[str, Any]) -> client.HttpCall:
    return client.HttpCall(_address(server, address), body, _accepted)


def _accepted(body: bytes) -> client.Outcome:
    """Reads a reply of status 2xx as success, unless it says otherwise."""
    text = body.decode(errors="replace")
    try:
        said = json.loads(text)
    except ValueError:
        return client.Outcome("ok", text)  # vLLM answers in words
    if isinstance(said, dict) and said.get("success") is False:
        return client.Outcome("refused", detail=client.to_one_line(text))
    return client.Outcome("ok", text)


def _call(server: EngineServer, what: client.HttpCall, task: str, needs: str = "") -> Any:
    """Returns the value of the reply, or raises OSError with the server's message and `needs`."""
    key = client.read_key(server.api, "sampler.")
    outcome, attempts = client.send_call(server.api, key, what, what.url, threading.Event())
    if outcome.status == "ok":
        return outcome.value
    problem = f"did not {task} in {attempts} attempts ({outcome.status})"
    hint = f" ({needs})" if needs else ""
    raise OSError(f"{what.url} {problem}: {outcome.detail}{hint}")
