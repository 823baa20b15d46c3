"""Checks of the author's server (author.kind=server) before training."""

import difflib
import pathlib
import threading

from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import streams
from copsd_jax.servers import client

# The beginnings of error messages from servers that have no list of models.
_WITHOUT_LIST = ("HTTP 404", "HTTP 405", "HTTP 501")


def check_author_server(config: config_lib.Config, longest: int | None) -> None:
    """Checks that the author's server serves the model, and has room for the replies.

    If the server's list of models is missing or empty, a warning says that the model and the room
    are not checked. If author.cache has replies, an unreachable server also causes only this
    warning.

    Args:
      config: the run's settings.
      longest: the number of tokens of the longest author prompt, counted with the model's tokenizer
        and with the shortest possible attempts; None if the author is not a server.

    Raises:
      ValueError: the server does not serve the model, or allows too few tokens.
      OSError: the server cannot be reached, refuses the key, or fails.
    """
    if longest is None:
        return
    author = config.author
    server = client.server_from_settings(author, "author", author.cache)
    what = client.list_models_call(server.url)
    outcome, attempts = client.send_call(
        server, client.read_key(server), what, what.url, threading.Event()
    )
    if outcome.status != "ok" or not outcome.value:
        count = config_lib.spell_count(attempts, "attempt")
        problem = f"{what.url} did not list its models in {count} ({outcome.status})"
        problem = f"{what.url} lists no models" if outcome.status == "ok" else problem
        cached = server.cache and any(pathlib.Path(server.cache).glob("*.json"))
        # If `transformers serve` serves a folder, its list of models is empty.
        empty = outcome.status in ("ok", "bad_reply")
        listless = empty or outcome.detail.startswith(_WITHOUT_LIST)
        if not (listless or (cached and outcome.status in ("unreachable", "timeout"))):
            raise OSError(f"{problem}: {outcome.detail} (author.url)")
        streams.warn(f"{problem}: author.model and author.max_tokens are not checked")
        return
    served = outcome.value
    if server.model not in served:
        near = difflib.get_close_matches(server.model, map(str, served), n=3, cutoff=0.5)
        names = ", ".join(map(repr, near or list(served)[:10]))
        raise ValueError(f"author.model is {server.model!r}: {server.url} serves {names}")
    entry = served[server.model]
    room = entry.get("max_model_len") or entry.get("context_length")
    if not isinstance(room, int):
        return
    place = f"the {room} tokens that {server.url} allows for {server.model}"
    if author.max_tokens >= room:
        raise ValueError(
            f"author.max_tokens is {author.max_tokens}: with a prompt, this exceeds {place}"
        )
    # The server's tokenizer is not known, so the estimate of the longest prompt is no reason to
    # refuse the run.
    if longest + config.rollout.max_tokens + author.max_tokens > room:
        streams.warn(
            f"author.max_tokens={author.max_tokens}, a prompt of about {longest} tokens and an "
            f"attempt of rollout.max_tokens={config.rollout.max_tokens} exceed {place}: the "
            "server will refuse the longest attempts, unless context.section_tokens shortens them"
        )
