"""The self-test of a run whose completions a server draws; the server is the stub of whole runs."""

import contextlib
import threading

import pytest
import runs
from test_remote_run import Stub, served

from copsd_jax import self_test
from copsd_jax.runtime import failures
from copsd_jax.training import loaded_run, run_plan

optax_promotes = runs.optax_promotes
pytestmark = pytest.mark.long


class Stale(Stub):
    """Confirms an adapter, but goes on with the base weights."""

    def complete(self, body):
        assert body["model"] in ("tiny", *self.adapters)
        return super().complete(body | {"model": "tiny"})


class Hotter(Stub):
    """Draws at a temperature of its own, and reports the log-probabilities of this temperature."""

    def complete(self, body):
        return super().complete(body | {"temperature": body["temperature"] * 0.75})


@contextlib.contextmanager
def loaded(stub, folder, **more):
    threading.Thread(target=stub.serve_forever, args=(0.02,), daemon=True).start()
    try:
        config = runs.config("opsd", **served(stub, sampler__folder=folder, **more))
        plan = run_plan.make_plan(config)
        with loaded_run.set_mesh_and_precision(plan):
            yield loaded_run.load_run(plan, 1, folder)
    finally:
        stub.shutdown()
        stub.server_close()


@pytest.mark.parametrize("logprobs", ["tempered", "raw"])
@pytest.mark.parametrize("kind", [Stub, Stale, Hotter])
def test_a_server_with_another_policy_is_refused(tmp_path, kind, logprobs):
    """With raw log-probabilities, texts are drawn at temperature 1, which hides a temperature."""
    settings = {"sampler__logprobs": logprobs}
    words = {
        Stale: "sampler and trainer apply the adapter differently",
        Hotter: "sampler and trainer differ",
    }
    with loaded(kind(), tmp_path, **settings) as (r, state):
        if kind is Stub:
            assert "sampler and trainer differ by" in self_test.check(r, state)
            return
        with pytest.raises(failures.RefusedRun, match=words[kind]):
            self_test.check(r, state)
