"""A sampler engine, with the interface of `sampler.loop`, that draws completions on a server.

Requests and replies contain token ids; the text of tokens is not used. Each prompt is sent as one
request, whose seed is derived from the prompt's key. With a deterministic server, the same keys
give the same texts. SGLang is deterministic with --enable-deterministic-inference, and vLLM is
deterministic in its batch-invariant mode. On other servers, rounding depends on the batch, so a
text may depend on the other texts in the batch. If the server is not deterministic, a stopped and
continued run may give other numbers than an uninterrupted run. With `sampler.loop`, both runs give
the same numbers, bit for bit.

The server determines the distribution to which its log-probabilities refer. Replies do not name the
distribution, so the setting `sampler.logprobs` names it. `sampler.logprobs` has three values.
  `raw` means the model's distribution at temperature 1. `raw` is vLLM's default. SGLang uses
    `raw` if SGLANG_RETURN_ORIGINAL_LOGPROB is set.
  `tempered` means the untruncated distribution at the sampling temperature. SGLang uses `tempered`
    by default.
  `processed` means the tempered distribution, truncated by top-k, top-p and min-p. A vLLM server
    uses `processed` with --logprobs-mode processed_logprobs.
In a `Completion`, log-probabilities that cannot be derived from the server's numbers are NaN (see
`reports_log_probs`). If the server itself reports NaN for a drawn token, the completion's tokens
are dropped, as in `sampler.loop`. The trainer computes its own log-probabilities. If several of
top-k, top-p and min-p are on, a server may apply them in another order than the module `truncation`
does. Truncations in another order give another distribution.

If the server fails for one prompt, or the reply does not match the request, only the completion of
this prompt is dropped. If the server cannot be reached, the engine repeats the request for
`EngineServer.patience` seconds. A restarted server has lost the policy. The engine hands over the
policy again, so that no completion is drawn from the base weights instead.

Each run needs its own server, because `hand_over` changes the server's weights.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import failures
from copsd_jax.sampler import loop, request
from copsd_jax.servers import client, dialects

LOGPROBS = ("raw", "tempered", "processed")
_GIVEN_UP = "given up"  # start of `detail` if `generate` gave up on a completion


@dataclasses.dataclass(frozen=True)
class EngineServer:
    """The address of a server, and its settings as a sampler engine.

    Attributes:
      api: the server's address and limits. In both dialects, `api.url` is the base URL with /v1.
        `api.timeout` must allow for the longest completion, including its time in the queue, and
        for the loading of weights.
      dialect: a key of `dialects.DIALECTS`.
      logprobs: one of LOGPROBS.
      max_model_len: maximum number of tokens of a prompt and its completion together; None means
        the server's limit.
      adapter: the adapter's name on the server, set by `hand_over`; "" means the base model.
      root: the file or repository of the model, as the server reports it; "" if the server does not
        report it.
      patience: number of seconds for which requests to an unreachable server are repeated.
        `connect_server` sets the value to `api.timeout` after the server has answered. Before
        that, the value is 0.
      folder: the folder of the weights that `hand_over` loaded last; "" before the first call.
    """

    api: client.Server
    dialect: str
    logprobs: str
    max_model_len: int | None = None
    adapter: str = ""
    root: str = ""
    patience: float = 0.0
    folder: str = ""


# ------------------------------------------------------------------------------------ generate


def generate(
    server: EngineServer, prompts: Sequence[Sequence[int]],
    sampling: request.Sampling | Sequence[request.Sampling], *, keys: Any,
    vocabulary: request.Vocabulary, limits: Sequence[int] | None = None,
    progress: loop.Progress = None, done: loop.Done = None,
) -> loop.Result:  # fmt: skip
    """Samples one completion for each prompt on a server.

    Args:
      server: the server, after `hand_over` of the policy.
      prompts: token ids, including the shared prefix; servers cache common prefixes themselves.
      sampling: one `Sampling` for all prompts, or a list with one per prompt.
      keys: uint32 [n, 2] from `request.derive_sampling_keys`, one key per prompt.
      vocabulary: the ids of the model. The server does not know which ids are valid. A trained
        model hardly ever draws an invalid id; a completion with an invalid id is dropped.
      limits: maximum number of tokens of each completion; None means `Sampling.max_tokens`.
      progress: called with the statistics after each completion.
      done: called with (index of the prompt, completion) as soon as the completion has ended.

    Returns:
      A result like that of `loop.generate`. A completion whose request failed, or whose reply does
      not match its request, has the finish 'failed' and a detail. After more than half of the
      completions have failed, all unfinished completions get the finish 'failed', too. `logps` and
      `logps_truncated` are NaN if they cannot be derived from the server's numbers; see
      `reports_log_probs`. In the statistics, `prompt_tokens` counts all prompt tokens sent, even if
      the server has them in its cache. `occupancy` is NaN.

    Raises:
      ValueError: the server does not support the settings or prompts; no request is sent.
      OSError: the server could not be reached, or it drew from the base model instead of the
        adapter. The first such failure ends all other requests.
    """
    check_server(server)
    texts = request.list_texts(prompts, sampling, keys, limits, vocabulary)
    _check_served_texts(server, texts)
    key, keeper = client.read_key(server.api), _PolicyKeeper(server)
    ask = functools.partial(_request_completion, server, key, vocabulary, keeper)
    found: dict[int, loop.Completion] = {}
    tokens, failed, last, begun = 0, 0, "", time.monotonic()
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
            if completion.finish == "failed":
                failed, last = failed + 1, completion.detail
            if 2 * failed > len(rows):
                break
    for number in rows.keys() - found.keys():
        reason = f"{_GIVEN_UP} after {failed} of {len(rows)} had failed, the last: {last}"
        found[number] = loop.drop_tokens("failed", reason)
        if done is not None:
            done(number, found[number])
    return loop.Result([found[number] for number in rows], stats._replace(done=len(rows)))


def is_given_up(completion: loop.Completion) -> bool:
    """Returns whether `generate` gave up on a completion because most others had failed."""
    return completion.finish == "failed" and completion.detail.startswith(_GIVEN_UP)


def reports_log_probs(logprobs: str, sampling: request.Sampling) -> tuple[bool, bool]:
    """Returns whether `logps` and `logps_truncated` can be derived from a server's numbers.

    For greedy rows, servers report log-probabilities at temperature 1, and the truncated
    distribution puts all mass on the drawn token. Without top-k, top-p and min-p, the tempered and
    the truncated distribution are equal.

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


def _check_served_texts(server: EngineServer, texts: Sequence[request.Text]) -> None:
    """Checks that the server allows the length and the temperature of each text."""
    longest, coldest = server.max_model_len, dialects.DIALECTS[server.dialect].coldest
    if longest:
        room = f"{server.api.url} allows at most {longest} (sampler.max_model_len)"
        request.check_lengths(texts, longest, room)
    for degree in {text.sampling.temperature for text in texts}:
        if 0 < degree < coldest:
            rule = f"takes 0 or at least {coldest}, and changes all other values"
            raise ValueError(f"temperature is {degree}: a {server.dialect} server {rule}")


def _request_completion(
    server: EngineServer, key: str, vocabulary: request.Vocabulary, keeper: "_PolicyKeeper",
    row: tuple[int, request.Text], stop: threading.Event,
) -> loop.Completion:  # fmt: skip
    _, text = row
    dialect = dialects.DIALECTS[server.dialect]
    url = _address(server, dialect.generate)
    what = client.HttpCall(url, dialect.body(server.api.model, server.adapter, text), _json)
    name = f"{server.adapter}:{dialects.derive_seed(text)}"
    once = keeper.build_attempt(lambda: client.attempt_call(server.api, key, what, stop), stop)
    outcome, attempts = client.repeat_call(server.api, once, name, stop, server.patience)
    if outcome.status != "ok":
        count = config_lib.spell_count(attempts, "attempt")
        problem = f"no completion in {count} ({outcome.status}): {outcome.detail}"
        if outcome.status == "unreachable":
            raise OSError(f"{url} gave {problem}")
        return loop.drop_tokens("failed", problem)
    try:
        reply = dialect.read(outcome.value, text)
        completion = _check_served_completion(server.logprobs, text, reply, vocabulary)
    except ValueError as error:
        return loop.drop_tokens("failed", client.to_one_line(f"the completion {error}"))
    if server.adapter and outcome.value.get("model") == server.api.model:
        raise OSError(
            f"{url} drew a completion from {server.api.model} instead of {server.adapter}: the "
            "server must sample from the adapter that the field `model` of a request names"
        )
    return completion


class _PolicyKeeper:
    """Hands the policy to the server again after the server was restarted."""

    def __init__(self, server: EngineServer):
        # If a request of the keeper fails, `client.repeat_call` makes another attempt. Therefore
        # the keeper itself does not repeat requests.
        api = dataclasses.replace(server.api, retries=0)
        self._server = dataclasses.replace(server, api=api, patience=0.0)
        self._lock, self._times = threading.Lock(), 0
        self._tries, self._error = 0, ""  # number of restores so far; error of the last failed one

    def build_attempt(
        self, send: Callable[[], client.Outcome], stop: threading.Event
    ) -> Callable[[int], client.Outcome]:
        """Returns a function for `client.repeat_call` that restores a lost policy before it sends.

        After a request without an answer, the server may have been restarted. A restarted server
        does not know the adapter, or has the base weights again. If `stop` is set, a restore ends.
        """
        suspect, known = False, 0

        def once(attempt: int) -> client.Outcome:
            nonlocal suspect, known
            if suspect:
                try:
                    self._restore(known, stop)
                except OSError as error:
                    kind = "unreachable" if "(unreachable)" in str(error) else "server_error"
                    return client.Outcome(kind, detail=str(error), again=True)
            known = self._times
            outcome = send()
            suspect = outcome.status not in ("ok", "refused")
            if outcome.status == "refused" and self._is_adapter_lost(known, stop):
                suspect = True
                return outcome._replace(again=True)
            return outcome

        return once

    def _restore(self, known: int, stop: threading.Event) -> None:
        """Hands over the policy, unless another row has handed it over since `known` was read.

        Raises:
          OSError: the restore failed, or `stop` is set. If this row waited for the restore of
            another row, the error is that of the other restore.
        """
        tries = self._tries
        with self._lock:
            if stop.is_set():
                raise OSError("given up")
            if self._times != known or not self._server.folder:
                return
            if self._tries != tries:  # the restore that this row waited for has failed
                raise OSError(self._error)
            try:
                hand_over(self._server, self._server.folder, stop)
                self._times += 1
            except OSError as error:
                self._error = str(error)
                raise
            finally:
                self._tries += 1

    def _is_adapter_lost(self, known: int, stop: threading.Event) -> bool:
        """Returns whether the server lacks the adapter, or lacked it since `known` was read."""
        if not (name := self._server.adapter):
            return False
        try:
            lost = self._times != known or name not in list_models(self._server, stop)
        except OSError:
            return False  # the request counts as refused
        with self._lock:  # waits for a restore in progress, which may have loaded the adapter
            return lost or self._times != known


def _json(body: bytes) -> client.Outcome:
    return client.Outcome("ok", json.loads(body))


# ---------------------------------------------------------------------- checks of a reply
#
# The checks raise ValueError with the second part of a sentence; `_request_completion` adds the
# first part.


def _check_served_completion(
    logprobs: str, text: request.Text, reply: dialects.RawCompletion,
    vocabulary: request.Vocabulary,
) -> loop.Completion:  # fmt: skip
    ids, logps = _check_served_ids(text, reply.ids, vocabulary), _check_served_logps(reply)
    if np.isnan(np.asarray(logps, np.float64)).any():
        return loop.drop_tokens()
    end = _find_served_end(text.sampling, ids, vocabulary.token_bytes)
    if end is not None and end < len(ids) and (last := ids[end - 1]) in text.sampling.stop_ids:
        raise ValueError(f"goes on after the id {last}, although stop_token_ids contains {last}")
    if end is None and reply.finish == "stop":
        raise ValueError(
            f"was stopped at the id {ids[-1]}, which is not in {sorted(text.sampling.stop_ids)} "
            f"and completes no string of {text.sampling.stop}: the server uses additional stop ids"
        )
    if end is None and len(ids) < text.limit:
        raise ValueError(
            f"ended after {len(ids)} of {text.limit} tokens (finish_reason {reply.finish!r}): the "
            "server has a limit of its own"
        )
    if reply.finish not in ("stop", "length"):
        raise ValueError(f"has the finish_reason {reply.finish!r}: it must be stop or length")
    # A server may find a stop string a few tokens late. If a completion continues past a stop
    # string, it is cut after the token that completes the string, as in `sampler.loop`.
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


def _check_served_ids(text: request.Text, ids: list, vocabulary: request.Vocabulary) -> list[int]:
    if not isinstance(ids, list) or not ids or any(type(token) is not int for token in ids):
        raise ValueError("has no list of token ids, or the list is empty")
    if len(ids) > text.limit:
        raise ValueError(f"has {len(ids)} tokens: at most {text.limit} were requested")
    size = len(vocabulary.valid_V)
    for token in ids:
        if not 0 <= token < size or not vocabulary.valid_V[token]:
            raise ValueError(
                f"has the invalid id {token}: the tokenizer has {int(vocabulary.valid_V.sum())} "
                f"ids, between 0 and {size - 1}"
            )
    return ids


def _check_served_logps(reply: dialects.RawCompletion) -> list[float]:
    logps = reply.logps
    if not isinstance(logps, list) or len(logps) != len(reply.ids):
        found = f"{len(logps)}" if isinstance(logps, list) else "no list of"
        raise ValueError(f"has {found} log-probabilities for {len(reply.ids)} tokens")
    for value in logps:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # NaN passes, because its comparisons with the limits are false; `_check_served_completion`
        # drops the completion. The upper limit allows for rounding.
        if not number or value < -1e9 or value > 1e-3:
            raise ValueError(f"has the log-probability {value!r}: it must be a number <= 0")
    return logps


def _find_served_end(
    sampling: request.Sampling, ids: Sequence[int], token_bytes: Sequence[bytes]
) -> int | None:
    """Counts the ids up to and including the id that ends the text; None if no id ends it."""
    stops = [text.encode() for text in sampling.stop]
    by_string, _ = request.find_stop_string(b"", ids, stops, token_bytes)
    by_id = next((i for i, token in enumerate(ids, 1) if token in sampling.stop_ids), None)
    return min((end for end in (by_string, by_id) if end is not None), default=None)


# ------------------------------------------------------------------------- checks and weights


def _address(server: EngineServer, of: str) -> str:
    base = server.api.url.rstrip("/")
    return of.format(base=base, root=base.removesuffix("/v1"))


def check_server(server: EngineServer) -> None:
    """Checks the sampler.* settings of a server, without sending a request.

    Raises:
      ValueError: a setting is invalid; the message states the value and the valid choices.
    """
    client.check_server(server.api)
    for name, choices in (("dialect", tuple(dialects.DIALECTS)), ("logprobs", LOGPROBS)):
        if (value := getattr(server, name)) not in choices:
            raise ValueError(f"sampler.{name} is {value!r}: the choices are {', '.join(choices)}")
    if server.max_model_len is not None and server.max_model_len < 2:
        raise ValueError(f"sampler.max_model_len is {server.max_model_len}: it must be at least 2")


def connect_server(server: EngineServer) -> EngineServer:
    """Fetches the server's list of models; returns the server with max_model_len and root.

    Raises:
      ValueError: a setting is invalid, the server lacks the model `api.model`, or the server's
        limit is below max_model_len.
      OSError: the server gives no valid reply.
    """
    check_server(server)
    api, served = server.api, list_models(server)
    if api.model not in served:
        names = ", ".join(map(repr, served)) or "nothing"
        raise ValueError(f"sampler.model is {api.model!r}: {api.url} serves {names}")
    asked, length = server.max_model_len, served[api.model].get("max_model_len")
    if asked and length and asked > length:
        raise ValueError(f"sampler.max_model_len is {asked}: {api.url} allows at most {length}")
    root = str(served[api.model].get("root") or "")
    return dataclasses.replace(
        server, max_model_len=asked or length, root=root, patience=api.timeout
    )


def list_models(server: EngineServer, stop: threading.Event | None = None) -> dict[str, dict]:
    """Returns the server's description of each model and adapter, by name.

    Args:
      server: the server.
      stop: event that ends the request when it is set; None for none.

    Raises:
      OSError: the server gives no valid reply.
    """
    what = client.list_models_call(server.api.url)
    return _call_server(server, what, "list its models", stop=stop)


def hand_over(
    server: EngineServer, folder: str | pathlib.Path, stop: threading.Event | None = None
) -> EngineServer:
    """Loads a folder of weights into the server; returns the server with the new adapter's name.

    An adapter's name is a hash of its contents, because servers cache keys and values of prompts
    under the adapter's name. If new weights had the name of old weights, the server would use
    outdated cache entries. Because an adapter's name is a hash, an interrupted `hand_over` can be
    repeated safely. The previous adapter is unloaded.

    Args:
      server: the server with the previous weights.
      folder: an adapter in PEFT's layout (adapter_config.json), or a complete model in Hugging
        Face's layout (config.json). The server must be able to read the folder under the same path.
      stop: event that ends the requests when it is set; None for none.

    Raises:
      ValueError: the folder has neither adapter_config.json nor config.json.
      OSError: the server did not load the folder, or does not list the adapter afterwards. If the
        load failed, the message contains the server's reply and the options that the server needs.
    """
    path = pathlib.Path(folder).resolve()
    if (path / "adapter_config.json").is_file():
        return _hand_adapter(server, path, stop)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has neither adapter_config.json nor config.json")
    dialect = dialects.DIALECTS[server.dialect]
    for address, body in dialect.swap(str(path)):
        what = _command(server, address, body)
        _call_server(server, what, f"read the weights in {path}", dialect.needs_swap, stop)
    return dataclasses.replace(server, adapter="", folder=str(path))


def _hand_adapter(
    server: EngineServer, path: pathlib.Path, stop: threading.Event | None
) -> EngineServer:
    name, served = _name_served_adapter(path), list_models(server, stop)
    if server.adapter not in ("", name) and server.adapter in served:
        _change_served_adapter(server, "unload", {"lora_name": server.adapter}, stop)
    if name not in served:
        _change_served_adapter(server, "load", {"lora_name": name, "lora_path": str(path)}, stop)
        if name not in list_models(server, stop):
            raise OSError(
                f"{server.api.url} does not list the adapter {name}, although it reported that the "
                "adapter is loaded: the server may sample from the base model instead"
            )
    return dataclasses.replace(server, adapter=name, folder=str(path))


def _change_served_adapter(
    server: EngineServer, verb: str, body: dict[str, str], stop: threading.Event | None
) -> None:
    """Loads or unloads an adapter; if the request fails, asks the server which adapters it has.

    If the first attempt succeeds but its reply is lost, the server refuses the second attempt.
    """
    dialect, name = dialects.DIALECTS[server.dialect], body["lora_name"]
    what = _command(server, f"{dialect.adapters}/{verb}_lora_adapter", body)
    task = f"{verb} the adapter {body.get('lora_path', name)}"
    try:
        _call_server(server, what, task, dialect.needs_adapters, stop)
    except OSError:
        if (name in list_models(server, stop)) != (verb == "load"):
            raise


def _name_served_adapter(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.glob("adapter_*")):
        digest.update(f"{file.name}\0".encode())
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)  # all files add to the same digest
    return f"copsd-{digest.hexdigest()[:16]}"


def _command(server: EngineServer, address: str, body: Mapping[str, Any]) -> client.HttpCall:
    return client.HttpCall(_address(server, address), body, _read_command_reply)


def _read_command_reply(body: bytes) -> client.Outcome:
    """Reads a reply with status 2xx; only JSON with "success": false counts as a failure."""
    text = body.decode(errors="replace")
    try:
        said = json.loads(text)
    except ValueError:
        return client.Outcome("ok", text)  # vLLM replies with plain text
    if isinstance(said, dict) and said.get("success") is False:
        return client.Outcome("refused", detail=client.to_one_line(text))
    return client.Outcome("ok", text)


def _call_server(
    server: EngineServer, what: client.HttpCall, task: str, needs: str = "",
    stop: threading.Event | None = None,
) -> Any:  # fmt: skip
    """Sends a request and returns the reply's value, or raises OSError with the hint `needs`."""
    key, stop = client.read_key(server.api), stop or threading.Event()
    outcome, attempts = client.send_call(server.api, key, what, what.url, stop, server.patience)
    if outcome.status == "ok":
        return outcome.value
    count = config_lib.spell_count(attempts, "attempt")
    problem = f"did not {task} in {count} ({outcome.status})"
    hint = f" ({needs})" if needs else ""
    raise OSError(f"{what.url} {problem}: {outcome.detail}{hint}")


@contextlib.contextmanager
def translate_server_errors() -> Iterator[None]:
    """Raises server failures as failures.EngineError, to distinguish them from file errors."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise failures.EngineError(str(error)) from error
