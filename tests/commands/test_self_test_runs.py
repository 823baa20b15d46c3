"""Runs with the self-test: what a refused run leaves, and that the test changes no number."""

import pytest
import runs

from copsd_jax import main, self_test
from copsd_jax.runtime import failures

optax_promotes = runs.optax_promotes
pytestmark = pytest.mark.long

SETTINGS = {"train__steps": 1, "eval__limit": 2, "rollout__max_tokens": 4}


def metrics(workdir):
    lines = runs.steps_of(workdir)
    return [{k: v for k, v in x.items() if not k.startswith("seconds/")} for x in lines]


def test_a_run_is_refused_once_and_then_runs_as_without_the_test(tmp_path, monkeypatch, capsys):
    tested = runs.argv("opsd", tmp_path / "tested", check__self_test=True, **SETTINGS)

    def refuse(*_):
        raise failures.RefusedRun("the self-test failed: a reason")

    with monkeypatch.context() as patch:
        patch.setattr(self_test, "_measure", refuse)
        assert main.main(tested) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: the self-test failed: a reason"
    left = {path.name for path in (tmp_path / "tested").iterdir()}
    assert left <= {"lock", "lease.json"}
    assert main.main(tested) == 0
    assert "self-test: sampler and trainer differ by" in capsys.readouterr().out
    assert main.main(tested) == 0  # which continues the run
    assert "self-test" not in capsys.readouterr().out
    assert main.main(runs.argv("opsd", tmp_path / "plain", **SETTINGS)) == 0
    assert "self-test" not in capsys.readouterr().out
    assert metrics(tmp_path / "tested") == metrics(tmp_path / "plain")
