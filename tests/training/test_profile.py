"""The trace of some steps: its files, and the steps that it names."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
import runs
from runs import optax_promotes  # noqa: F401

from copsd_jax import main
from copsd_jax.runtime import profiling


def find_steps(folder):
    """The numbers of the steps that the trace names, from the JSON file that Perfetto reads."""
    (file,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    named = [e["args"] for e in events if e.get("name") == "train" and "args" in e]
    return sorted({int(args["step_num"]) for args in named if "step_num" in args})


def test_the_trace_has_the_steps_that_are_asked_for(tmp_path):
    trace = profiling.StepTrace("2:3", tmp_path / "profile")
    for number in range(1, 5):
        assert (tmp_path / "profile").exists() == (number > 3)
        with trace.record(number):
            jax.block_until_ready(jnp.arange(3) + number)
    assert find_steps(tmp_path / "profile") == [2, 3]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_an_error_ends_the_trace(tmp_path):
    trace = profiling.StepTrace("1:9", tmp_path / "profile")
    with pytest.raises(KeyError), trace.record(2):
        raise KeyError
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with profiling.StepTrace("1:1", tmp_path / "other").record(1):  # another trace can begin
        pass
    assert find_steps(tmp_path / "other") == [1]


@pytest.mark.slow
def test_a_traced_run_has_the_same_numbers(tmp_path):
    found = []
    for name, steps in (("plain", ""), ("traced", "2:2")):
        workdir = tmp_path / name
        argv = runs.argv("opsd", workdir, train__steps=3, eval__path="", train__profile=steps)
        assert main.main(argv) == 0
        rows = runs.steps_of(workdir)
        found.append([{k: v for k, v in x.items() if "seconds" not in k} for x in rows])
    assert found[0] == found[1]
    assert find_steps(tmp_path / "traced" / "profile") == [2]
    assert not (tmp_path / "plain" / "profile").exists()
