"""log.callback: it sees what metrics.jsonl has, and may stop the run."""

import pytest
import runs
from runs import optax_promotes  # noqa: F401

from copsd_jax import main
from copsd_jax.metrics import callback
from copsd_jax.runtime import checkpoint

FUNCTION = """
calls = []

def watch(step, metrics):
    calls.append((step, metrics))
    return step >= 2

def count(step, metrics):
    return 1  # not True

def lonely(step):
    pass
"""


@pytest.fixture
def watching(tmp_path, monkeypatch):
    (tmp_path / "watching_steps.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(tmp_path)
    import watching_steps

    return watching_steps


@pytest.mark.slow
def test_a_callback_sees_the_metrics_and_stops_the_run(watching, tmp_path, capsys):
    settings = {"train__steps": 4, "eval__path": "", "log__callback": "watching_steps:watch"}
    assert main.main(runs.argv("opsd", tmp_path / "w", **settings)) == 0
    rows = runs.steps_of(tmp_path / "w")
    assert [step for step, _ in watching.calls] == [1, 2] == [row["step"] for row in rows]
    for (step, metrics), row in zip(watching.calls, rows, strict=True):
        assert {"step": step} | metrics == row
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "stopped by log.callback=watching_steps:watch after step 2"
    assert checkpoint.Checkpoints(tmp_path / "w/checkpoints").steps()[-1] == 2


def test_only_true_asks_for_a_stop(watching):
    assert not callback.ask_callback(None, 1, {})
    assert not callback.ask_callback(callback.import_callback("watching_steps:count"), 1, {})
    watch = callback.import_callback("watching_steps:watch")
    assert not callback.ask_callback(watch, 1, {"loss": 1})
    assert callback.ask_callback(watch, 2, {"loss": 1})


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("watching_steps", "ValueError: the name has no colon"),
        ("absent_module:f", "ModuleNotFoundError"),
        ("watching_steps:absent", "AttributeError"),
        ("watching_steps:lonely", "TypeError: too many positional arguments"),
    ],
)
def test_a_name_that_is_no_callback_is_refused(watching, name, why, tmp_path, capsys):
    argv = runs.argv("opsd", tmp_path / "w", log__callback=name)
    assert main.main(argv) == 2
    said = (
        f"error: log.callback is {name!r}: it must be module:function, which names an importable "
    )
    assert capsys.readouterr().err.startswith(f"{said}function of (step, metrics); {why}")
    assert not (tmp_path / "w").exists()
