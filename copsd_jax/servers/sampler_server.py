"""Construction and checks of the server for sampler.engine=server."""

import pathlib

import jax

from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import workdir
from copsd_jax.sampler import request
from copsd_jax.servers import client, dialects, remote_engine


def plan_server(config: config_lib.Config, train: bool) -> remote_engine.EngineServer | None:
    """Returns the server that the sampler.* settings describe; None if the engine is not a server.

    No request is sent.

    Args:
      config: the run's settings.
      train: whether the run trains; if True, the losses may need the server's log-probabilities.

    Raises:
      ValueError: a setting is invalid, or cannot be used with a server.
    """
    s = config.sampler
    if s.engine != "server":
        return None
    server = remote_engine.EngineServer(
        client.server_from_settings(s), s.dialect, s.logprobs, s.max_model_len or None
    )
    remote_engine.check_server(server)
    if (count := jax.process_count()) > 1:
        raise ValueError(f"sampler.engine is 'server': it needs one process, but there are {count}")
    if s.folder:
        workdir.check_writable(pathlib.Path(s.folder), "--config.sampler.folder")
    coldest = dialects.DIALECTS[s.dialect].coldest
    for section in ("rollout", "eval", "author"):
        if 0 < (degree := config[section].temperature) < coldest:
            rule = f"with sampler.dialect={s.dialect} it must be 0 or at least {coldest}"
            raise ValueError(f"{section}.temperature is {degree}: {rule}")
    if train:
        _check_logprobs(config)
    return server


def _check_logprobs(config: config_lib.Config) -> None:
    """Checks that the server returns the log-probabilities that the losses need."""
    c, r = config, config.rollout
    drawn = request.Sampling(r.max_tokens, r.temperature, r.top_k, r.top_p, r.min_p)
    given = remote_engine.reports_log_probs(c.sampler.logprobs, drawn)[0]
    for section, key, off in (
        ("policy", "old", "trainer"), ("policy", "rollout_clip", 0), ("loss", "rollout_clip", 0),
    ):  # fmt: skip
        if not given and c[section][key] != off:
            raise ValueError(
                f"{section}.{key} is {c[section][key]!r}: it needs untruncated log-probabilities "
                f"at rollout.temperature={r.temperature}, and sampler.logprobs="
                f"{c.sampler.logprobs} does not give them with these rollout.* settings"
            )
