"""Small runs for tests: the cards' tiny presets with a few settings changed."""

import contextlib
import json
import pathlib
import zlib

import conftest
import jax
import pytest

from copsd_jax import main
from copsd_jax.problems import batches
from copsd_jax.sampler import loop
from copsd_jax.training import loaded_run, run_plan


def config(card: str, **settings):
    """The parsed config of `configs/<card>.py:tiny`; `train__steps=3` is --config.train.steps=3."""
    return main.parse_command(["main", *_flags(card, settings)])[0]


def argv(card: str, workdir: pathlib.Path, **settings) -> list[str]:
    """The command line of the same run on one of the eight devices' worth of work."""
    return ["main", f"--workdir={workdir}", *_flags(card, settings)]


def _flags(card: str, settings: dict) -> list[str]:
    """Few problems, because a plan encodes the prompts of all of them; no self-test, for time."""
    settings = {"data__limit": 64, "check__self_test": False} | settings
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in settings.items()]
    return [f"--config={conftest.ROOT / 'configs' / card}.py:tiny", *flags]


@pytest.fixture(scope="module", autouse=True)
def optax_promotes():
    """For modules that run AdamW, which relies on promotion; `test_train_step` is strict."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@contextlib.contextmanager
def loaded(card: str, **settings):
    """(run, state at step 0) of a tiny run, with its mesh set."""
    plan = run_plan.make_plan(config(card, **settings))
    with jax.set_mesh(plan.mesh):
        r, state = loaded_run.load_run(plan, plan.config.train.steps)
        with r.grader:
            yield r, state


def batch_at(rows, langs, weights, batch: int, seed: int, step: int) -> list:
    """The rows of one step."""
    return next(batches.iterate_batches(rows, langs, weights, batch, seed, step))


def steps_of(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl that are of training steps; evaluations have their own lines."""
    file = workdir / "metrics.jsonl"
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines() if file.exists() else [])
    return [row for row in rows if not any(name.startswith("eval/") for name in row)]


def sampled(completions) -> loop.Result:
    """What `loaded_run.sample` returns, of completions that a test made."""
    return loop.Result(completions, loop.Stats(len(completions), len(completions), 0, 0, 0.5, 0.0))


def by_text(gold: str, text: str) -> float:
    """A reward for reward.kind=runs:by_text: one of eight numbers that the text decides."""
    return zlib.crc32(text.encode()) % 8 / 7
