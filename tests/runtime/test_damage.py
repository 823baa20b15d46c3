"""Damaged files of a work directory: kind of file x kind of damage.

Oracle: the states before saving; the whole file. The same table with whole runs is in
test_damage_runs.
"""

import contextlib
import json
import re
import shutil

import damage
import pytest
from test_checkpoint import assert_same, make_state, save

from copsd_jax.config import settings as config_lib
from copsd_jax.metrics import metric_files
from copsd_jax.runtime import checkpoint, continuation, workdir

SETTINGS = config_lib.flat(config_lib.default())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A work directory with the checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("saved") / "w"
    save(folder / "checkpoints", 1, 2)
    return folder


@pytest.mark.parametrize("how", damage.FILE)
@pytest.mark.parametrize("name", damage.CHECKPOINT_FILES)
def test_the_checkpoint_before_a_damaged_one_is_used(saved, tmp_path, capsys, name, how):
    folder = shutil.copytree(saved, tmp_path / "w")
    path = damage.find(folder / "checkpoints/2", name)
    damage.FILE[how](path)
    with checkpoint.Checkpoints(folder / "checkpoints", writer=True) as checkpoints:
        assert_same(checkpoints.load_newest(make_state(0)), make_state(1))
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 1
        assert re.fullmatch(
            rf"checkpoint 2 in {folder}/checkpoints is damaged \(.+\): checkpoint 1 is used",
            said[0],
        )
        short = str(path.relative_to(folder / "checkpoints/2"))
        assert f"file {short} " in said[0] or "its manifest.json is " in said[0]
        # There is room for the step, and a second damaged one does not replace the first.
        checkpoints.save(2, make_state(2))
        checkpoints.wait()
        assert_same(checkpoints.load_newest(make_state(0)), make_state(2))
        damage.FILE[how](damage.find(folder / "checkpoints/2", name))
        checkpoints.load_newest(make_state(0))
    assert {p.name for p in (folder / "damaged").iterdir()} == {"checkpoint_2", "checkpoint_2_2"}


def test_empty_folders_and_no_whole_checkpoint(saved, tmp_path, capsys):
    folder = shutil.copytree(saved, tmp_path / "w")
    for step in (1, 2):
        damage.empty_folder(folder / f"checkpoints/{step}")
    state = make_state(0)
    with checkpoint.Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.load_newest(state) is state
        assert checkpoints.steps() == [1, 2]  # a reader moves nothing
        with pytest.raises(checkpoint.DamagedCheckpoint, match=r"2 in .* \(the folder is empty\)"):
            checkpoints.load(2, state)
    with checkpoint.Checkpoints(folder / "checkpoints", writer=True) as checkpoints:
        assert checkpoints.load_newest(state) is state
        assert checkpoints.steps() == []
    end = "is damaged (the folder is empty): it is skipped"
    *said, last = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    assert all(line.endswith(end) for line in said)
    assert last == "no checkpoint is whole, so step 0 is used"  # said only by the writer


def test_every_bit_of_a_manifest_counts(saved, tmp_path):
    """A bit anywhere in the manifest: in names, sizes, checksums, blanks."""
    folder = shutil.copytree(saved / "checkpoints/1", tmp_path / "1")
    whole = (folder / "manifest.json").read_bytes()
    assert not checkpoint.manifest.find_damage(folder)
    for place in range(0, len(whole), 29):
        for bit in (0, 3, 7):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            (folder / "manifest.json").write_bytes(data)
            assert checkpoint.manifest.find_damage(folder) == "its manifest.json is unreadable"


# ------------------------------------------------------------------------------ files of text


@pytest.fixture
def directory(tmp_path):
    """The files of a run with three steps."""
    workdir.create(tmp_path, SETTINGS, {"data_fingerprint": "1"})
    with metric_files.Writer(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": step / 7})
    event = {"action": "warn", "text": "high"}
    events = [{"step": 1, **event}, {"step": 2, **event, "text": "too high"}]
    workdir.write_jsonl(tmp_path / "events.jsonl", events)
    result = {"step": 0, "scores": {}, "problems": []}
    workdir.write_json(tmp_path / "eval/step_000000.json", result)
    workdir.write_jsonl(
        tmp_path / "eval/step_000003.partial.jsonl",
        [{"seed": 0}, {"index": 0, "id": "7", "ids": [5], "finish": "stop"}],
    )
    return tmp_path


def examine(directory):
    """What a start says about the files: the sentence of a refusal, or lines about repairs."""
    try:
        assert continuation.compare_settings(directory, SETTINGS).known
        continuation.compare_facts(directory, {"data_fingerprint": "1"}, ())
        workdir.check_files(directory)
        metric_files.check_file(directory)
    except (ValueError, OSError) as error:
        return str(error)
    with metric_files.Writer(directory, resume=4) as writer:
        return "\n".join(writer.repairs)


# kind of file -> kind of damage -> what is said
SAID = {
    "config.json": {
        **dict.fromkeys(("truncated", "zeroed", "one bit flipped", "emptied"),
                        r"config\.json is not valid JSON: .*: the settings of the last start are"),
        "deleted": r"has no config\.json: the settings of the last start are taken from run\.json",
        "garbage line": r"config\.json is not valid JSON: byte 2 is not valid UTF-8 \(line 2\):",
        "torn line": r"config\.json is not valid JSON: Extra data: line \d+ .*",
    },
    "run.json": {
        **dict.fromkeys(("truncated", "zeroed", "one bit flipped", "emptied", "garbage line"),
                        r"run\.json is not valid JSON: .*: remove this file"),
        "torn line": r"run\.json is not valid JSON: Extra data: line \d+ .*",
    },
    "metrics.jsonl": {
        "truncated": r"ended in an incomplete line of \d+ bytes.*\n.*has no line for steps 2 to 3",
        "zeroed": r"ended in an incomplete line of \d+ bytes.*\n.*has no line for steps 1 to 3",
        "one bit flipped": r"metrics\.jsonl line 2 is not JSON: byte \d+ is not valid UTF-8",
        "deleted": r"metrics\.jsonl has no line for steps 1 to 3",
        "emptied": r"metrics\.jsonl has no line for steps 1 to 3",
        "garbage line": r"metrics\.jsonl line 2 is not JSON: byte \d+ is not valid UTF-8",
        "torn line": r"metrics\.jsonl ended in an incomplete line of 15 bytes: it is dropped",
    },
    "events.jsonl": {
        "truncated": r"events\.jsonl line 2 is incomplete",
        "zeroed": r"events\.jsonl line 1 is incomplete",
        "one bit flipped": r"events\.jsonl line [12] is not JSON",
        "garbage line": r"events\.jsonl line 2 is not JSON: byte \d+ is not valid UTF-8",
        "torn line": r"events\.jsonl line 3 is incomplete",
    },
    "eval/step_000000.json": dict.fromkeys(
        ("truncated", "zeroed", "one bit flipped", "emptied", "garbage line", "torn line"),
        r"step_000000\.json is not valid JSON: .*: remove this file, to evaluate again",
    ),
    "eval/step_000003.partial.jsonl": dict.fromkeys(
        ("one bit flipped", "garbage line"),
        r"partial\.jsonl line [12] is not JSON: .*: remove this file; its completions are drawn",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "how"), [(name, how) for name in SAID for how in SAID[name]])
def test_damage_to_text_is_one_sentence(directory, capsys, name, how):
    damage.LINES[how](directory / name)
    said = examine(directory) + capsys.readouterr().out
    assert re.search(SAID[name][how], said), said
    assert len(said.splitlines()) <= 2
    if "metrics.jsonl ended" in said or "has no line" in said:  # what is left is whole
        text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
        assert all(json.loads(line)["step"] for line in text.splitlines())
        assert not text or text.endswith("\n")


@pytest.mark.parametrize("how", damage.LINES)
def test_a_damaged_config_is_restored_from_run_json(directory, how):
    """Also after a start with other settings, and after starts that changed nothing."""
    changed = SETTINGS | {"eval.limit": 7}
    for settings in (changed, changed):
        workdir.create(directory, settings, {})
    path = directory / "config.json"
    whole = path.read_bytes()
    assert path.stat().st_size < (directory / "run.json").stat().st_size < 5 * path.stat().st_size
    damage.LINES[how](path)
    found = continuation.compare_settings(directory, SETTINGS)
    assert found.changed == {"eval.limit": (7, SETTINGS["eval.limit"])}
    workdir.create(directory, workdir.read_settings(directory), {})
    assert path.read_bytes() == whole


@pytest.mark.parametrize("how", damage.LINES)
def test_an_old_run_has_its_settings_in_config_json_alone(directory, how):
    run = json.loads((directory / "run.json").read_text())
    del run["starts"][0]["settings"]
    (directory / "run.json").write_text(json.dumps(run))
    damage.LINES[how](directory / "config.json")
    said = "has no config.json: no run began" if how == "deleted" else ": restore this file from a "
    assert said in examine(directory)


@pytest.mark.parametrize("left", [{}, {"train.steps": 3}])
def test_a_config_that_lacks_settings_is_damaged(directory, capsys, left):
    (directory / "config.json").write_text(json.dumps(left))
    assert workdir.read_settings(directory) == workdir.convert_to_json(SETTINGS)
    name = min(SETTINGS.keys() - left.keys())
    said = f"config.json has no '{name}': the settings of the last start are taken from run.json"
    assert said in capsys.readouterr().out
    (directory / "run.json").unlink()
    said = "config.json has no 'model.path': restore this file from a copy"
    assert examine(directory).endswith(said)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("writes", range(3))
def test_a_kill_between_the_files_of_a_start(tmp_path, monkeypatch, capsys, first, writes):
    """The same command continues, although its eval.limit and its problems are new."""
    if not first:
        workdir.create(tmp_path, SETTINGS, {"eval_fingerprint": "old"})
    write, count = workdir.write_json, [0]

    def killed(path, value):
        if count[0] == writes:
            raise KeyboardInterrupt
        count[0] += 1
        write(path, value)

    monkeypatch.setattr(workdir, "write_json", killed)
    new, facts = SETTINGS | {"eval.limit": 9}, {"eval_fingerprint": "new"}
    with pytest.raises(KeyboardInterrupt) if writes < 2 else contextlib.nullcontext():
        workdir.create(tmp_path, new, facts)
    monkeypatch.undo()
    found = continuation.compare_settings(tmp_path, new)
    assert found.known == (not first or writes > 0)
    continuation.compare_facts(tmp_path, facts, found.changed)
    workdir.create(tmp_path, new, facts)
    assert workdir.read_settings(tmp_path) == workdir.convert_to_json(new)


@pytest.mark.parametrize(
    ("step", "advice"),
    [
        (0, "remove this file, to evaluate again"),
        (2, "remove this file; without checkpoint 2, the step cannot be evaluated again"),
        (4, "to evaluate again: python -m copsd_jax.evaluate --workdir={} --steps=4"),
        (6, "to evaluate again: python -m copsd_jax.evaluate --workdir={} --steps=6"),
        (8, "remove this file, to evaluate again"),
    ],
)
def test_the_advice_about_an_evaluation(directory, step, advice):
    """A run evaluates step 0 and the steps from its newest checkpoint on."""
    for saved in (4, 6):
        (directory / "checkpoints" / str(saved)).mkdir()
    (directory / f"eval/step_{step:06d}.json").write_text("{")
    assert examine(directory).endswith(": " + advice.format(directory))


def test_whole_files_are_not_mentioned(directory):
    assert examine(directory) == ""


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["[1]"], "line 1 is not a JSON object"),
        (['{"a": 1}'], "line 1 has no 'step'"),
        (['{"step": 1}', '{"step": 1}'], "line 2 is the second line of step 1: remove this line"),
        (['{"step": 2}', '{"step": 1}'], "line 2 has step 1, although .* step 2: .* must ascend"),
        (['{"step": "1"}'], "line 1 has step = '1': it must be a whole number: remove this line"),
        (['{"step": 1, "loss": "high"}'], "line 1 has loss = 'high': it must be a number: remove"),
        (['{"step": 1, "loss": [1]}'], r"line 1 has loss = \[1\]: it must be a number: remove"),
        ([f'{{"step": 1, "loss": {10**400}}}'], r"line 1 has loss = 10*\.\.\.0*: it must be a num"),
        (["[" * 100_000], "line 1 is not JSON"),
    ],
)
def test_lines_that_are_not_metrics(directory, lines, said):
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert re.search(rf"metrics\.jsonl {said}", examine(directory))


SAMPLE = {"answer": None, "correct": True, "truncated": False}
RECORD = dict.fromkeys(("id", "lang", "group", "gold", "problem"), "x") | {"samples": [SAMPLE]}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("config.json", {"train.steps": "x"}, ": train.steps is 'x': it must be a whole number (at "
         "least 0): the settings of the last start are taken from run.json"),
        ("config.json", {"train.steps": 10**400}, ": train.steps is 1000"),
        ("config.json", {"data.lang": [1]}, ": data.lang has 1: it must be a list of words: the s"),
        ("run.json", {"starts": []}, " has no start of a run: remove this file, to continue with"),
        ("run.json", {"starts": [3]}, " has starts[0] = 3: it must be an object: remove this file"),
        ("run.json", {"starts": [{"defaults": []}]}, " has starts[0].defaults = []: it must be an"),
        ("run.json", {"starts": [{"versions": [1]}]}, " has starts[0].versions = [1]: it must be "),
        ("run.json", {"starts": [{"settings": "x"}]}, " has starts[0].settings = 'x': it must be "),
        ("run.json", {"starts": [{"identity": {"jax": "x"}}]}, " has starts[0].identity.jax = 'x'"),
        ("run.json", {"starts": [{}, {"settings": {"seed": 0.5}}]},
         ": starts[1].settings: seed is 0.5: it must be a whole number"),
        ("eval/step_000000.json", {"problems": 3}, " has problems = 3: it must be a list: remove"),
        ("eval/step_000000.json", {"problems": [{}]}, " has no 'problems[0].id': remove this file"),
        ("eval/step_000000.json", {"problems": [RECORD | {"samples": []}]},
         " has problems[0] without samples: remove this file, to evaluate again"),
        ("eval/step_000000.json", {"problems": [RECORD | {"samples": [SAMPLE | {"answer": 3}]}]},
         " has problems[0].samples[0].answer = 3: it must be text or null: remove this file"),
    ],
)  # fmt: skip
def test_a_value_of_a_wrong_type_is_one_sentence(directory, capsys, name, change, said):
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    found = examine(directory) + capsys.readouterr().out
    assert found.startswith(f"{path}{said}"), found
    assert found.count("\n") <= 1


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("events.jsonl", {"step": 2, "action": [], "text": ""}, "action = []: it must be text: re"),
        ("eval/step_000003.partial.jsonl", {"index": 0, "id": "x", "ids": ["x"], "finish": "stop"},
         "ids[0] = 'x': it must be a whole number: remove this file; its completions are drawn ag"),
        ("eval/step_000003.partial.jsonl", {"index": 0, "id": "x", "ids": [-1], "finish": "stop"},
         "numbers in 'ids' that are no token ids: remove this file; its completions are drawn ag"),
    ],
)  # fmt: skip
def test_a_line_with_a_value_of_a_wrong_type_is_one_sentence(directory, name, line, said):
    first = (directory / name).read_text().splitlines()[0]
    (directory / name).write_text(f"{first}\n{json.dumps(line)}\n")
    assert examine(directory).startswith(f"{directory / name} line 2 has {said}")


def test_a_start_without_settings_leaves_no_trace(tmp_path):
    """A kill between the lock and config.json: the next start takes the directory for a new one."""
    for name in ("rollouts", "eval", "checkpoints"):
        (tmp_path / name).mkdir()
    for name in ("lock", "lease.json", "config.json.part"):
        (tmp_path / name).write_text("{}")
    assert not continuation.compare_settings(tmp_path, SETTINGS).known
    (tmp_path / "eval/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no run began there"):
        continuation.compare_settings(tmp_path, SETTINGS)
