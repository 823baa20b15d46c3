"""Valid JSON with values of wrong types in a work directory: read as before, or one sentence.

No oracle for what a wrong value means: a start must end before it writes anything, with a sentence
that names the work directory, or the value must not matter to it.
"""

import contextlib
import copy
import json
import os
import random
import shutil

import conftest
import fuzz
import pytest
import runs

from copsd_jax import evaluation, main, summary, train
from copsd_jax.config import settings as config_lib
from copsd_jax.metrics import eval_tables, metric_files
from copsd_jax.problems import problem_row
from copsd_jax.runtime import bad_steps, continuation, failures, run_lock, tries, workdir
from copsd_jax.training import guards, run_facts, table_rules
from copsd_jax.weights import initial_weights

optax_promotes = runs.optax_promotes

OLD_RUN = conftest.ROOT / "tests" / "data" / "old_run" / "w"
VALUES = (
    *(None, True, -1, 3, 10**400, 0.5, float("inf"), float("nan"), "", "x", "a\nb"),
    *([], [1], [[]], ["x"], {}, {"a": 1}),
)  # fmt: skip
ABSENT = object()
RULES = guards.parse_rules(["loss>0:warn", "tokens>1:warn"])
EVENT = {"step": 1, "action": "warn", "text": "high"}
PLACE = {"host": "h", "pid": 7, "time": 1.5, "token": "x", "beat": 3}
FILES = ("config.json", "run.json", "lock", "lease.json", "tries.json", "events.jsonl",
         "metrics.jsonl", "eval/step_000000.json", "eval/step_000003.partial.jsonl")  # fmt: skip
ROW = problem_row.Row("7", "Two?", "", "2", "en", "")


class Run:
    """A work directory, and what the same command would compare with it."""

    def __init__(self, folder, settings, facts):
        self.folder, self.settings, self.facts = folder, settings, facts
        workdir.write_json(folder / "lock", PLACE)
        workdir.write_json(folder / "lease.json", PLACE)
        tries.count_try(folder, 0)
        workdir.write_jsonl(folder / "events.jsonl", [EVENT, EVENT | {"step": 2}])
        lines = [self.describe(), {"index": 0, "id": "7", "ids": [5, 9], "finish": "stop"}]
        workdir.write_jsonl(folder / "eval/step_000003.partial.jsonl", lines)

    def describe(self):
        return {"prompts": 1, "sha256": "", "policy": [1, 2], "seed": 0}


@pytest.fixture
def built(tmp_path):
    """The work directory of an old program, and a start of today's."""
    ignored = shutil.ignore_patterns("state", "tensorboard")
    folder = shutil.copytree(OLD_RUN, tmp_path / "built", ignore=ignored)
    config = workdir.load_run_config(folder)
    settings = config_lib.flat(config)
    kinds = ("tokenizer", "prompt", "languages", "functions", "served")
    words = {kind: {"a": "b"} for kind in kinds}
    facts = {
        **continuation.collect_run_environment(),
        "identity": {**words, "jax": continuation.read_jax_options()},
    }
    first = workdir.read_starts(folder / "run.json")[0]
    facts |= {name: first[name] for name in first if name.endswith("fingerprint")}
    workdir.create(folder, settings, facts)
    return Run(folder, settings, facts)


def list_paths(value, path=()):
    """The paths of all values inside a value, and of the value itself."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from list_paths(value[key], (*path, key))


def read(folder, name):
    text = (folder / name).read_text(encoding="utf-8")
    return [json.loads(x) for x in text.splitlines()] if ".jsonl" in name else json.loads(text)


def replace(folder, name, path, value):
    """Writes the file with another value, or without the value, at a path."""
    content = read(folder, name)
    if not path:
        content = value
    else:
        node = content
        for key in path[:-1]:
            node = node[key]
        if value is ABSENT:
            del node[path[-1]]
        else:
            node[path[-1]] = copy.deepcopy(value)
    rows = content if ".jsonl" in name and isinstance(content, list) else [content]
    text = "".join(json.dumps(None if row is ABSENT else row) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check(run, folder):
    """Checks the files as `train.prepare` does; returns the config of the run that goes on."""
    found = continuation.compare_settings(folder, run.settings)
    config = config_lib.default()
    config_lib.assign(config, run.settings | found.taken)
    assert continuation.choose_date(folder)
    assert isinstance(continuation.read_fact_of_first_start(folder, "model", ""), str)
    continuation.compare_facts(folder, run.facts, found.changed)
    workdir.check_files(folder)
    metric_files.check_file(folder)
    if "train.steps" in found.changed:
        updates = metric_files.count_updates(folder, 2)
        summary.summarize_new_schedule(config, found.changed["train.steps"][0], 2, updates)
    return config


def go_on(run, folder, config):
    """Reads the files as a run does that was not refused."""
    workdir.create(folder, config_lib.flat(config), run.facts)
    before = evaluation.read_evaluation(folder / "eval/step_000000.json", [])
    eval_tables.format_eval_comparison(before, before)
    workdir.remove_later(folder, 2, 4)
    with metric_files.Writer(folder, resume=3) as writer:
        assert writer.path == folder / "metrics.jsonl"
    written = metric_files.read_metric_lines(folder, 2)
    bad_steps.BadSteps(folder, 3, written)
    summary.summarize_totals(folder, 3)
    metric_files.count_failed_metric_steps(folder, 3)
    steps = (
        lambda: train._restore_guards(type("Plan", (), {"guards": RULES}), folder, 2, written),
        lambda: evaluation._read_partial_evaluation(
            folder / "eval/step_000003.partial.jsonl", run.describe(), ["7"]
        ),
    )
    for step in steps:
        with contextlib.suppress(failures.UnusableFile):
            step()


def load(folder):
    """Reads the settings as `evaluate`, `export`, `replay` and another run do."""
    config = workdir.load_run_config(folder)
    source = initial_weights.find_source(f"{folder}/checkpoints/2")
    assert source.settings.keys() >= config_lib.SETTINGS.keys()
    settings = config_lib.flat(config) | {"model.init": "random"}
    initial_weights._check_base(source, settings, folder / "none")
    return config


def examine(run, folder, capsys):
    """Returns whether a start is refused."""
    before = contents(folder)
    config = fuzz.attempt(lambda: check(run, folder), str(folder))
    assert contents(folder) == before
    loaded = fuzz.attempt(lambda: load(folder), str(folder))
    if loaded is not None:
        fuzz.attempt(lambda: table_rules.check_choices(loaded, train=False), "")
    assert contents(folder) == before
    fuzz.attempt(lambda: tries.count_try(folder, 1), str(folder))
    assert str(run_lock._refuse(folder, run_lock._read_holder(folder / "lock")))
    with run_lock.hold(folder):
        pass
    if config is not None:
        go_on(run, folder, config)
    capsys.readouterr()
    return config is None


@pytest.fixture
def at_once(monkeypatch):
    """Waits neither for a lease nor for the disk."""
    monkeypatch.setattr(run_lock, "STALE", -1.0)
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_wrong_types(built, tmp_path, capsys, at_once):
    r, refused, cases = random.Random(16), 0, 60
    places = {name: list(list_paths(read(built.folder, name))) for name in FILES}
    assert not examine(built, shutil.copytree(built.folder, tmp_path / "w"), capsys)
    for _ in range(cases):
        name = r.choice(FILES)
        folder = tmp_path / "w"
        shutil.rmtree(folder)
        shutil.copytree(built.folder, folder)
        replace(folder, name, r.choice(places[name]), r.choice((*VALUES, ABSENT)))
        refused += examine(built, folder, capsys)
    assert cases / 8 < refused < cases


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_wrong_type_in_a_run(tmp_path, capsys, at_once):
    """Every value of every file of a run of today's program."""
    settings = {"train__steps": 2, "eval__limit": 2, "rollout__max_tokens": 4, "data__limit": 16}
    argv = runs.argv("opsd", tmp_path / "run", **settings, train__save_every=1)
    assert main.main(argv) == 0
    for name in ("checkpoints/2/state", "tensorboard"):  # no reader of this test needs them
        shutil.rmtree(tmp_path / "run" / name)
    config, folder, _ = main.parse_command(argv)
    plan, _ = train.prepare(config, folder)
    run = Run(folder, config_lib.flat(config), run_facts.collect_facts(plan))
    for name in FILES:
        for path in list_paths(read(folder, name)):
            for value in (*VALUES, ABSENT):
                shutil.rmtree(tmp_path / "w", ignore_errors=True)
                shutil.copytree(folder, tmp_path / "w")
                replace(tmp_path / "w", name, path, value)
                examine(run, tmp_path / "w", capsys)
