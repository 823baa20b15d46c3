"""Dialects: the request and reply formats of servers that complete sequences of token ids.

The formats follow the servers' documentation and source code as of 2026.
  `vllm` uses POST /v1/completions, where `prompt` is a list of ids. With `return_token_ids` (vLLM
    0.10.2 or later), the reply gives the drawn ids as numbers. With `return_tokens_as_token_ids`,
    the reply gives the ids as strings such as "token_id:7". Every request sets both options. If a
    reply has ids in both forms, the forms must agree. Use `vllm` for any other server that accepts
    requests in vLLM's format.
  `sglang` uses POST /generate with `input_ids`. An SGLang reply has one pair (log-probability, id)
    per drawn token.

In addresses, {base} is the server's URL with /v1, and {root} is the URL without /v1.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from copsd_jax.sampler import request


class RawCompletion(NamedTuple):
    """An unchecked completion from a server's reply."""

    ids: Any
    logps: Any
    finish: object


class Dialect(NamedTuple):
    """Addresses, requests and replies of one kind of server.

    Attributes:
      generate: address to which requests for completions are sent.
      body: maps (model, adapter or "", text to draw) to the body of the request.
      read: maps (parsed reply, text to draw) to the completion. If the reply is invalid, `read`
        raises ValueError; the message continues a sentence such as "the completion of row 3 ...".
      coldest: the lowest temperature above 0 that the server does not change.
      adapters: address to which /load_lora_adapter and /unload_lora_adapter are appended.
      swap: maps a model's folder to the ordered requests (address, body) that load the model.
      needs_adapters: part of an error message that says what a server needs before it can load
        adapters.
      needs_swap: part of an error message that says what a server needs before it can load a model.
    """

    generate: str
    body: Callable[[str, str, request.Text], dict[str, Any]]
    read: Callable[[Any, request.Text], RawCompletion]
    coldest: float
    adapters: str
    swap: Callable[[str], list[tuple[str, dict]]]
    needs_adapters: str
    needs_swap: str


def derive_seed(text: request.Text) -> int:
    """Returns the first 53 bits of the text's key; every JSON reader represents 53 bits exactly."""
    high, low = map(int, text.key_2)
    return (high << 21) | (low >> 11)


def _build_dialect_fields(text: request.Text) -> dict[str, Any]:
    """Returns the fields that both dialects share; both dialects turn top-k off with top_k=-1."""
    s = text.sampling
    return {
        "temperature": float(s.temperature), "top_p": float(s.top_p), "top_k": s.top_k or -1,
        "min_p": float(s.min_p), "stop_token_ids": list(s.stop_ids), "stop": list(s.stop), "n": 1,
        # Special tokens are kept in the text, because stop strings may occur in special tokens.
        "skip_special_tokens": False, "spaces_between_special_tokens": False,
        # If a request lacks a field, servers take the value from generation_config.json.
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip


def _vllm_body(model: str, adapter: str, text: request.Text) -> dict[str, Any]:
    return {
        **_build_dialect_fields(text),
        "model": adapter or model, "prompt": list(text.prompt), "max_tokens": text.limit,
        "seed": derive_seed(text), "stream": False, "echo": False, "add_special_tokens": False,
        "ignore_eos": True,  # stop_token_ids already has all stop ids
        "include_stop_str_in_output": True,
        "logprobs": 0,  # asks only for the log-probability of the drawn token
        "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip


def _vllm_reply(reply: Any, text: request.Text) -> RawCompletion:
    choice = _get_from_reply(reply, "choices", 0)
    logps = _get_from_reply(choice, "logprobs", "token_logprobs")
    spelt = _read_spelt_ids(_get_from_reply(choice, "logprobs", "tokens"))
    ids = choice.get("token_ids")
    if ids is None and spelt is None:
        raise ValueError(
            "has no token ids: the server must support return_token_ids (vLLM 0.10.2 or later) or "
            "run with --return-tokens-as-token-ids"
        )
    if ids is not None and spelt is not None and ids != spelt:
        raise ValueError("has log-probabilities for tokens that differ from token_ids")
    read = choice.get("prompt_token_ids")
    if read is not None and read != list(text.prompt):
        raise ValueError("belongs to another prompt: prompt_token_ids differs from the prompt sent")
    return RawCompletion(
        spelt if ids is None else ids, logps, _get_from_reply(choice, "finish_reason")
    )


def _read_spelt_ids(tokens: Any) -> list[int] | None:
    """Parses tokens such as "token_id:7" into ids; returns None if any token has another form."""
    if not isinstance(tokens, list):
        raise ValueError("has no list in logprobs.tokens")
    found = [re.fullmatch(r"token_id:([0-9]{1,9})", str(token)) for token in tokens]
    return [int(match[1]) for match in found if match] if all(found) and found else None


def _sglang_body(_: str, adapter: str, text: request.Text) -> dict[str, Any]:
    """Returns a request without a model name, because an SGLang server has only one model."""
    params = {
        **_build_dialect_fields(text),
        "max_new_tokens": text.limit, "sampling_seed": derive_seed(text),
        # With ignore_eos, SGLang would ignore stop_token_ids as well.
        "ignore_eos": not text.sampling.stop_ids, "no_stop_trim": True,
    }  # fmt: skip
    body = {
        "input_ids": list(text.prompt), "sampling_params": params, "stream": False,
        "return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": 0,
        "return_text_in_logprobs": False,
    }  # fmt: skip
    return {**body, "lora_path": adapter} if adapter else body


def _sglang_reply(reply: Any, text: request.Text) -> RawCompletion:
    hint = ": the server has to return the tokens' log-probabilities (return_logprob)"
    pairs = _get_from_reply(reply, "meta_info", "output_token_logprobs", hint=hint)
    if not isinstance(pairs, list):
        raise ValueError("has no list in meta_info.output_token_logprobs")
    ids = [_get_from_reply(pair, 1) for pair in pairs]
    if reply.get("output_ids") not in (None, ids):
        raise ValueError("has log-probabilities for tokens that differ from output_ids")
    if reply["meta_info"].get("prompt_tokens") not in (None, len(text.prompt)):
        raise ValueError(f"belongs to another prompt: prompt_tokens is not {len(text.prompt)}")
    finish = _get_from_reply(reply, "meta_info", "finish_reason")
    matched = finish.get("matched") if isinstance(finish, dict) else None
    if isinstance(matched, str) and matched not in text.sampling.stop:
        # If logits are NaN, SGLang reports that a string stopped the text, but the string is not
        # one of the stop strings.
        raise ValueError(f"was stopped by {matched!r}, which is not a stop string")
    kind = finish.get("type") if isinstance(finish, dict) else finish
    return RawCompletion(ids, [_get_from_reply(pair, 0) for pair in pairs], kind)


def _get_from_reply(value: Any, *path: str | int, hint: str = "") -> Any:
    """Returns value[path[0]][path[1]]...; raises ValueError with the path if a part is absent."""
    found = value
    for step in path:
        try:
            found = found[step]
        except (LookupError, TypeError):
            raise ValueError(f"has no {'.'.join(map(str, path))}{hint}") from None
    return found


def _vllm_swap(folder: str) -> list[tuple[str, dict]]:
    read = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
    return [("{root}/collective_rpc", read), ("{root}/reset_prefix_cache", {})]


def _sglang_swap(folder: str) -> list[tuple[str, dict]]:
    return [("{root}/update_weights_from_disk", {"model_path": folder, "flush_cache": True})]


DIALECTS: dict[str, Dialect] = {
    "vllm": Dialect(
        "{base}/completions", _vllm_body, _vllm_reply, coldest=0.01, adapters="{base}",
        swap=_vllm_swap,
        needs_adapters="vLLM needs --enable-lora, --max-lora-rank, and the environment variable "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
        needs_swap="vLLM needs the environment variable VLLM_SERVER_DEV_MODE=1",
    ),
    "sglang": Dialect(
        "{root}/generate", _sglang_body, _sglang_reply, coldest=1e-6, adapters="{root}",
        swap=_sglang_swap,
        needs_adapters="SGLang needs --enable-lora, --max-lora-rank and --lora-target-modules",
        needs_swap="SGLang reads models of the shape that it was started with",
    ),
}  # fmt: skip
