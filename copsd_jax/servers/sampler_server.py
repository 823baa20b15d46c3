"""Construction and checks of the server for sampler.engine=server."""

from collections.abc import Mapping

import jax

from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import failures, processes, storage, workdir
from copsd_jax.sampler import request
from copsd_jax.servers import client, dialects, remote_engine

# Bounds of logp_gap_max in nats, by model.dtype; see `check_sampler_server_gap`.
GAPS = {"float32": 0.01, "bfloat16": 3.0}


def plan_sampler_server(
    config: config_lib.Config, train: bool
) -> remote_engine.EngineServer | None:
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
        client.server_from_settings(s, "sampler"), s.dialect, s.logprobs, s.max_model_len or None
    )
    remote_engine.check_server(server)
    processes.list_devices()  # refuses a platform that JAX cannot start
    if (count := jax.process_count()) > 1:
        raise ValueError(f"sampler.engine is 'server': it needs one process, but there are {count}")
    if s.folder:
        workdir.check_writable(storage.parse_path(s.folder), "--config.sampler.folder")
    coldest = dialects.DIALECTS[s.dialect].coldest
    for section in ("rollout", "eval", "author"):
        if 0 < (degree := config[section].temperature) < coldest:
            rule = f"with sampler.dialect={s.dialect} it must be 0 or at least {coldest}"
            raise ValueError(f"{section}.temperature is {degree}: {rule}")
    if train:
        _check_server_logprobs(config)
    return server


def _list_server_logp_readers(config: config_lib.Config) -> dict[str, object]:
    """Returns {name: value} of the settings that make a loss read the sampler's log p."""
    off = {"policy.old": "trainer", "policy.rollout_clip": 0, "loss.rollout_clip": 0}
    values = config_lib.flat(config)
    return {name: values[name] for name, value in off.items() if values[name] != value}


def check_sampler_server_gap(
    config: config_lib.Config, step: int, metrics: Mapping[str, float]
) -> list[str]:
    """Checks that the server's log-probabilities are those of the trainer's policy.

    If only rounding differs, all gaps are below 1e-4 in float32. Among 1e5 tokens in bfloat16, some
    tokens have gaps of 1 nat or more. Therefore the bound in float32 is 100 times 1e-4, where an
    importance weight is wrong by 1 %. The bound in bfloat16 is 3 nats, which is a factor of 20
    between two probabilities.

    Args:
      config: the run's settings; model.dtype is the dtype of the trainer.
      step: the number of the step, for the message.
      metrics: the metrics of the step.

    Returns:
      A list with one warning if the gap is above the bound; an empty list if it is not.

    Raises:
      EngineError: the gap is above the bound, and a loss reads the server's log-probabilities.
    """
    bound = config.guards.logp_gap or GAPS[config.model.dtype]
    gap = metrics.get("logp_gap_max", 0.0)
    if config.sampler.engine != "server" or not gap > bound:  # NaN counts as no gap
        return []
    text = (
        f"step {step}: logp_gap_max is {gap:.3g}, above {bound:g} (guards.logp_gap): the server at "
        f"{config.sampler.url} does not have the weights or the dtype of the trainer, or "
        f"sampler.logprobs={config.sampler.logprobs} is not what it reports"
    )
    if readers := _list_server_logp_readers(config):
        raise failures.EngineError(f"{text}; {' and '.join(readers)} would use these numbers")
    return [f"warning: {text}"]


def _check_server_logprobs(config: config_lib.Config) -> None:
    """Checks that the server returns the log-probabilities that the losses need."""
    c, r = config, config.rollout
    drawn = request.Sampling(r.max_tokens, r.temperature, r.top_k, r.top_p, r.min_p)
    given = remote_engine.reports_log_probs(c.sampler.logprobs, drawn)[0]
    for name, value in _list_server_logp_readers(c).items():
        if not given:
            raise ValueError(
                f"{name} is {value!r}: it needs untruncated log-probabilities "
                f"at rollout.temperature={r.temperature}, and sampler.logprobs="
                f"{c.sampler.logprobs} does not give them with these rollout.* settings"
            )
