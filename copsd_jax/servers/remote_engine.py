"""The sampler's face for an engine in another process: a completions server over token ids.

Token ids go there and come back; no text is read. Every prompt is a request of its own, with a
seed that follows from its key: where the server is deterministic (SGLang with
--enable-deterministic-inference, vLLM in its batch-invariant mode), the same keys give the same
texts. Elsewhere they do not: products of another batch round otherwise, so a text may change with
its neighbours, and a stopped run does not continue bit for bit. `sampler.host` has no such limit.

What a server's log-probabilities are of is the server's choice, and nothing in a reply says it:
  raw: the model's own distribution, at temperature 1 (vLLM's default; SGLang's with
    SGLANG_RETURN_ORIGINAL_LOGPROB).
  tempered: at the sampling temperature, nothing truncated (SGLang's default).
  processed: tempered, and truncated by top-k, top-p, min-p (vLLM's --logprobs-mode
    processed_logprobs).
What does not follow from them is NaN in a Completion (`reports_log_probs`): the trainer has its
own. Where several of top-k, top-p and min-p are on, a server may apply them in another order than
`truncate`; what is drawn from is then its distribution.

A server serves one run: its weights are changed by `hand_over`.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from copsd_jax.sampler import loop, request, truncation
from copsd_jax.servers import client, dialects

LOGPROBS = ("raw", "tempered", "processed")


@dataclasses.dataclass(frozen=True)
class EngineServer:
    """Where the engine is, and how it is spoken to.

    Attributes:
      url: the base with /v1, as "http://localhost:8000/v1", of either dialect.
      model: its name there (`GET /v1/models`).
      key_env, timeout, retries, backoff, concurrency: as of `client.Server`; `timeout` has to
        hold for the longest completion, queue included, and for loading weights.
      dialect: a key of `dialects.DIALECTS`.
      logprobs: one of LOGPROBS.
      max_model_len: most tokens of a prompt and its completion; None for what the server says.
      adapter: the adapter's name there, of `hand_over`; "" for the model as it is.
    """

    url: str
    model: str
    key_env: str
    timeout: float
    retries: int
    backoff: float
    concurrency: int
    dialect: str
    logprobs: str
    max_model_len: int | None = None
    adapter: str = ""


# ------------------------------------------------------------------------------------ generate


def generate(
    server: EngineServer,
    prompts: Sequence[Sequence[int]],
    sampling: request.Sampling | Sequence[request.Sampling],
    *,
    keys: Any,
    vocabulary: request.Vocabulary,
    limits: Sequence[int] | None = None,
    progress: Callable[[loop.Stats], None] | None = None,
    done: Callable[[int, loop.Completion], None] | None = None,
) -> loop.Result:
    """A completion for each prompt, in their order.

    Args:
      prompts: token ids, whole: a shared prefix included (the server has its own prefix cache).
      sampling: one for all prompts, or one each.
      keys: uint32 [n, 2] from `request.derive_keys`, one per prompt.
      vocabulary: of the model. The server does not know of its valid ids: another one, which a
        trained model hardly ever draws, is an error.
      limits: most tokens of each completion; None for sampling.max_tokens each.
      progress: called with what was reached after each completion.
      done: called with (index of the prompt, completion) as soon as it is there.

    Returns:
      As `loop.generate` does. `logps` and `logps_truncated` are NaN where the server's numbers do
      not give them; see `reports_log_probs`. Of the stats, prompt_tokens are those sent, whatever
      the server's cache saves, and occupancy is NaN.

    Raises:
      ValueError: in one sentence, for settings or prompts that cannot be served; nothing is asked.
      OSError: the server gave no reply to a row, with what it said after the last attempt.
      RuntimeError: a reply that is not what was asked for, with the server's address and the row.
        At the first failure all other requests end.
    """
    rows = _rows(prompts, sampling, keys, limits)
    check_server(server)
    for row in rows:
        _check_row(server, row, vocabulary)
    key = client.read_key(_api(server), "sampler.")

    def ask(row: dialects.CompletionRequest, stop: threading.Event) -> loop.Completion:
        return _ask(server, key, row, vocabulary, stop)

    found: dict[int, loop.Completion] = {}
    tokens, begun = 0, time.monotonic()
    sent = sum(len(row.prompt) for row in rows)
    stats = loop.Stats(0, len(rows), 0, sent, float("nan"), 0.0)
    items = {row.number: row for row in rows}
    with contextlib.closing(client.run_concurrently(server.concurrency, ask, items)) as answers:
        for number, completion in answers:
            found[number] = completion
            tokens += len(completion.ids)
            seconds = time.monotonic() - begun
            stats = stats._replace(done=len(found), tokens=tokens, seconds=seconds)
            if done is not None:
                done(number, completion)
            if progress is not None:
                progress(stats)
    return loop.Result([found[number] for number in range(len(rows))], stats)


def reports_log_probs(logprobs: str, sampling: request.Sampling) -> tuple[bool, bool]:
    """Whether a server's numbers give (logps, logps_truncated) of these settings.

    Greedy is reported at temperature 1, and its truncated distribution is certain. Without top-k,
    top-p and min-p both distributions are one.
    """
    whole = not sampling.top_k and sampling.top_p == 1 and not sampling.min_p
    if sampling.temperature == 0:
        return True, True
    if logprobs == "raw":
        return sampling.temperature == 1, sampling.temperature == 1 and whole
    return logprobs == "tempered" or whole, logprobs == "processed" or whole


def _rows(prompts, sampling, keys, limits) -> list[dialects.CompletionRequest]:
    """Everything by row; the seed has the first 53 bits of the key, which any JSON reader keeps."""
    n = len(prompts)
    settings = [sampling] * n if isinstance(sampling, request.Sampling) else list(sampling)
    limits = [each.max_tokens for each in settings] if limits is None else list(limits)
    keys_n2 = np.asarray(jax.device_get(keys))
    if keys_n2.shape != (n, 2) or keys_n2.dtype != np.uint32:
        raise ValueError(
            f"keys are {keys_n2.dtype} {keys_n2.shape}: they must be uint32 ({n}, 2), one for "
            "each prompt"
        )
    for name, found in (("sampling", settings), ("limits", limits)):
        if len(found) != n:
            raise ValueError(f"{name} has {len(found)} entries for {n} prompts")
    seeds = [(int(high) << 21) | (int(low) >> 11) for high, low in keys_n2]
    return [
        dialects.CompletionRequest(
            i, tuple(map(int, prompts[i])), settings[i], int(limits[i]), seeds[i]
        )
        for i in range(n)
    ]


def _check_row(
    server: EngineServer, row: dialects.CompletionRequest, vocabulary: request.Vocabulary
) -> None:
    s, number, vocab_size = row.sampling, row.number, len(vocabulary.valid_V)
    truncation.check_settings(s.temperature, s.top_k, s.top_p, s.min_p, vocab_size=vocab_size)
    coldest = dialects.DIALECTS[server.dialect].coldest
    if 0 < s.temperature < coldest:
        raise ValueError(
            f"temperature is {s.temperature}: a {server.dialect} server takes 0 or at least "
            f"{coldest}, and changes what lies between"
        )
    for token in s.stop_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"stop_ids has {token}: the model has the ids 0 to {vocab_size - 1}")
    if "" in s.stop:
        raise ValueError(f"stop is {s.stop!r}: a stop string must not be empty")
    count = len(vocabulary.token_bytes)
    if s.stop and vocabulary.valid_V[count:].any():
        raise ValueError(
            f"stop is {s.stop!r}: stop strings need token_bytes of every valid id, and there are "
            f"{count}"
        )
    if row.limit < 1:
        raise ValueError(f"limits[{number}] is {row.limit}: a completion has at least 1 token")
    if not row.prompt:
        raise ValueError(f"prompt {number} is empty: it must have at least one token")
    if min(row.prompt) < 0 or max(row.prompt) >= vocab_size:
        raise ValueError(
            f"prompt {number} has ids {min(row.prompt)} to {max(row.prompt)}: the model has the "
            f"ids 0 to {vocab_size - 1}"
        )
    if server.max_model_len and len(row.prompt) + row.limit > server.max_model_len:
        raise ValueError(
            f"prompt {number} has {len(row.prompt)} tokens and may get {row.limit} more: "
            f"{server.url} holds {server.max_model_len} (sampler.max_model_len)"
        )


def _ask(
    server: EngineServer,
    key: str,
    row: dialects.CompletionRequest,
    vocabulary: request.Vocabulary,
    stop: threading.Event,
) -> loop.Completion:
    dialect = dialects.DIALECTS[server.dialect]
    url = _address(server, dialect.generate)
    body = dialect.body(server.model, server.adapter, row)
    what = client.HttpCall("POST", url, body, _json)
    name = f"{server.adapter}:{row.seed}"
    outcome, attempts = client.send_call(_api(server), key, what, name, stop)
    if outcome.status != "ok":
        raise OSError(
            f"{url} gave no completion of row {row.number} in {attempts} attempts "
            f"({outcome.status}): {outcome.detail}"
        )
    try:
        reply = dialect.read(outcome.value, row)
        return _completion(server.logprobs, row, reply, vocabulary)
    except ValueError as error:
        raise RuntimeError(f"{url}: the completion of row {row.number} {error}") from None


def _json(body: bytes) -> client.Outcome:
    return client.Outcome("ok", json.loads(body))


# ------------------------------------------------------------------- what a reply has to hold
#
# These raise ValueError with the end of the sentence that `_ask` begins.


def _completion(
    logprobs: str,
    row: dialects.CompletionRequest,
    reply: dialects.RawCompletion,
    vocabulary: request.Vocabulary,
) -> loop.Completion:
    ids, logps = _ids(row, reply.ids, vocabulary), _logps(reply)
    end = _end(row.sampling, ids, vocabulary.token_bytes)
    if end is not None and end < len(ids) and ids[end - 1] in row.sampling.stop_ids:
        raise ValueError(
            f"goes on behind the id {ids[end - 1]}, which is one of its stop_token_ids"
        )
    if end is None and reply.finish == "stop":
        raise ValueError(
            f"was stopped at the id {ids[-1]}, which is none of {sorted(row.sampling.stop_ids)} "
            f"and ends none of {row.sampling.stop}: the server has stop ids of its own"
        )
    if end is None and len(ids) < row.limit:
        raise ValueError(
            f"ended after {len(ids)} of {row.limit} tokens (finish_reason {reply.finish!r}): the "
            "server has a limit of its own"
        )
    if reply.finish not in ("stop", "length"):
        raise ValueError(f"has the finish_reason {reply.finish!r}: it must be stop or length")
    # A server looks for stop strings after some tokens; ours end with the one that completes it.
    given = np.asarray(logps[:end], np.float32)
    absent = np.full_like(given, np.nan)
    tempered, truncated = reports_log_probs(logprobs, row.sampling)
    certain = row.sampling.temperature == 0
    return loop.Completion(
        ids=tuple(ids[:end]),
        logps=given if tempered else absent,
        logps_truncated=np.zeros_like(given) if certain else given if truncated else absent,
        finish="length" if end is None else "stop",
    )


def _ids(row: dialects.CompletionRequest, ids: list, vocabulary: request.Vocabulary) -> list[int]:
    if not isinstance(ids, list) or not ids or any(type(token) is not int for token in ids):
        raise ValueError("has no list of token ids, or an empty one")
    if len(ids) > row.limit:
        raise ValueError(f"has {len(ids)} tokens: at most {row.limit} were asked for")
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
        if not number or not -1e9 <= value <= 1e-3:  # no NaN; rounding may pass 0
            raise ValueError(f"has the log-probability {value!r}: it must be a number up to 0")
    return logps


def _end(
    sampling: request.Sampling, ids: Sequence[int], token_bytes: Sequence[bytes]
) -> int | None:
    """How many tokens there are up to the first that ends the text; None where none does."""
    stops = [text.encode() for text in sampling.stop]
    reach = max(map(len, stops), default=1) - 1
    tail = b""
    for count, token in enumerate(ids, 1):
        if token in sampling.stop_ids:
            return count
        if stops:
            tail += token_bytes[token]
            if any(stop in tail for stop in stops):
                return count
            tail = tail[max(0, len(tail) - reach) :]
    return None


# ------------------------------------------------------------------------- checks and weights


def _address(server: EngineServer, of: str) -> str:
    base = server.url.rstrip("/")
    return of.format(base=base, root=base.removesuffix("/v1"))


def _api(server: EngineServer) -> client.Server:
    """The part of it that the transport knows."""
    return client.Server(**{name: getattr(server, name) for name in client.FIELDS})


def check_server(server: EngineServer, prefix: str = "sampler.") -> None:
    """Refuses settings that could not work, without asking anything.

    Raises:
      ValueError: in one sentence with the setting, its value and the choices.
    """
    client.check_server(_api(server), prefix)
    for name, choices in (("dialect", tuple(dialects.DIALECTS)), ("logprobs", LOGPROBS)):
        if getattr(server, name) not in choices:
            value = getattr(server, name)
            raise ValueError(f"{prefix}{name} is {value!r}: the choices are {', '.join(choices)}")
    if server.max_model_len is not None and server.max_model_len < 2:
        raise ValueError(f"{prefix}max_model_len is {server.max_model_len}: at least 2")


def connect(server: EngineServer, prefix: str = "sampler.") -> EngineServer:
    """Asks the server for its models; the server with max_model_len filled in, if it tells.

    Raises:
      ValueError: as `check_server`; or it does not serve `model` (the names are listed), or less
        than max_model_len tokens.
      OSError: it does not answer, or not in the expected form.
    """
    check_server(server, prefix)
    served = list_models(server)
    if server.model not in served:
        raise ValueError(
            f"{prefix}model is {server.model!r}: {server.url} serves "
            f"{', '.join(map(repr, served)) or 'nothing'}"
        )
    length = served[server.model]
    if server.max_model_len and length and server.max_model_len > length:
        raise ValueError(
            f"{prefix}max_model_len is {server.max_model_len}: {server.url} holds {length}"
        )
    return dataclasses.replace(server, max_model_len=server.max_model_len or length)


def list_models(server: EngineServer) -> dict[str, int | None]:
    """The names that the server knows, adapters included, and how many tokens each holds.

    Raises:
      OSError: it does not answer, or not in the expected form.
    """

    def read(body: bytes) -> client.Outcome:
        entries = json.loads(body)["data"]
        return client.Outcome("ok", {e["id"]: e.get("max_model_len") for e in entries})

    what = client.HttpCall("GET", _address(server, "{base}/models"), None, read)
    return _call(server, what, "tell its models")


def hand_over(server: EngineServer, folder: str | pathlib.Path) -> EngineServer:
    """Has the server load a folder of weights; the server to ask from then on.

    The folder, which the server has to see under the same path, is an adapter's as PEFT writes it
    (adapter_config.json), or a model's as Hugging Face has it (config.json) with all weights.

    An adapter gets a name that follows from its contents. Servers keep the keys and values of
    prompts by the adapter's name, so that new weights under an old name would read stale ones;
    and an interrupted call can be repeated. The server's former adapter is unloaded.

    Raises:
      ValueError: the folder is neither.
      OSError: the server did not take it, with what it said and what it needs.
    """
    path = pathlib.Path(folder).resolve()
    if (path / "adapter_config.json").is_file():
        return _hand_adapter(server, path)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has neither adapter_config.json nor config.json")
    dialect = dialects.DIALECTS[server.dialect]
    for address, body in dialect.swap(str(path)):
        what = _command(_address(server, address), body)
        _call(server, what, f"read the weights in {path}", dialect.needs_swap)
    return dataclasses.replace(server, adapter="")


def _hand_adapter(server: EngineServer, path: pathlib.Path) -> EngineServer:
    dialect, name = dialects.DIALECTS[server.dialect], _name(path)
    served = list_models(server)
    if server.adapter not in ("", name) and server.adapter in served:
        what = _command(_address(server, dialect.unload), {"lora_name": server.adapter})
        _change(server, what, f"unload the adapter {server.adapter}", server.adapter, False)
    if name not in served:
        what = _command(_address(server, dialect.load), {"lora_name": name, "lora_path": str(path)})
        _change(server, what, f"load the adapter in {path}", name, True)
    return dataclasses.replace(server, adapter=name)


def _change(server: EngineServer, what: client.HttpCall, task: str, name: str, there: bool) -> None:
    """Calls; a refusal stands unless the adapter is there, or not there, all the same: a second
    attempt is refused where the first was heard and its reply got lost."""
    try:
        _call(server, what, task, dialects.DIALECTS[server.dialect].needs_adapters)
    except OSError:
        if (name in list_models(server)) != there:
            raise


def _name(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.glob("adapter_*")):
        digest.update(f"{file.name}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return f"copsd-{digest.hexdigest()[:16]}"


def _command(url: str, body: Mapping[str, Any]) -> client.HttpCall:
    return client.HttpCall("POST", url, body, _accepted)


def _accepted(body: bytes) -> client.Outcome:
    """Status 2xx is success, unless the reply says otherwise."""
    text = body.decode(errors="replace")
    try:
        said = json.loads(text)
    except ValueError:
        return client.Outcome("ok", text)  # vLLM answers in words
    if isinstance(said, dict) and said.get("success") is False:
        return client.Outcome("refused", detail=client.to_one_line(text))
    return client.Outcome("ok", text)


def _call(server: EngineServer, what: client.HttpCall, task: str, needs: str = "") -> Any:
    """What the reply holds; OSError with what the server said, and what it may need."""
    api = _api(server)
    key = client.read_key(api, "sampler.")
    outcome, attempts = client.send_call(api, key, what, what.url, threading.Event())
    if outcome.status == "ok":
        return outcome.value
    hint = f" ({needs})" if needs else ""
    raise OSError(
        f"{what.url} did not {task} in {attempts} attempts ({outcome.status}): "
        f"{outcome.detail}{hint}"
    )
