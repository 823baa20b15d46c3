"""What a continued run has in common with its first start. Oracle: the rules, written as cases."""

import hashlib
import json
import sys

import jax
import pytest

from copsd_jax.config import settings as config_lib
from copsd_jax.runtime import continuation, workdir

DEFAULTS = config_lib.flat(config_lib.default())
SETTINGS = DEFAULTS | {"train.steps": 3, "data.lang": ("en", "sw")}


def made(path, settings=SETTINGS, **facts):
    workdir.create(path, settings, {"seed": 0} | facts)
    return path


def compare(path, **changes):
    """The comparison after `train__steps=4` and the like; {} is the same command again."""
    names = {name.replace("__", "."): value for name, value in changes.items()}
    return continuation.compare_settings(path, SETTINGS | names)


def rewrite(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_the_same_settings_continue_and_free_ones_may_change(tmp_path):
    path = tmp_path / "w"
    assert compare(path) == (False, {}, {}, [])
    assert not path.exists()  # checking writes nothing
    made(path)
    assert compare(path) == (True, {}, {}, [])
    changes = {"mesh__data": 8, "train__save_every": 2, "model__remat": "layer", "eval__limit": 9}
    found = compare(path, **changes)
    assert found.changed == {
        "mesh.data": (-1, 8), "train.save_every": (25, 2), "model.remat": ("none", "layer"),
        "eval.limit": (0, 9),
    }  # fmt: skip
    assert not found.taken


def test_another_config_is_refused_with_the_difference(tmp_path):
    path = made(tmp_path / "w")
    with pytest.raises(ValueError, match=r"\(train\.lr was 5e-06, now 0\.1; x\.new was None, now"):
        compare(path, train__lr=0.1, x__new=1)


def test_steps_may_change_but_not_below_those_done(tmp_path):
    path = made(tmp_path / "w")
    for name in ("2", "3", "5.orbax-checkpoint-tmp"):
        (path / "checkpoints" / name).mkdir()
    assert compare(path, train__steps=30).changed == {"train.steps": (3, 30)}
    rewrite(path / "config.json", lambda saved: saved.update({"train.steps": 40}))
    assert compare(path, train__steps=3).changed == {"train.steps": (40, 3)}
    with pytest.raises(ValueError, match=r"train\.steps is 2: .* a checkpoint of step 3, so it mu"):
        compare(path, train__steps=2)


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({"loss.norm": "micro_token_mean"}, False),
        ({"loss.norm": "micro_token_mean", "loss.group": 8}, True),
        ({"loss.norm": "global_token_mean"}, True),
        ({"loss.norm": "seq_mean"}, True),
        ({"method": "grpo"}, True),  # its norms know no micro-batches
    ],
)
def test_a_micro_batch_may_change_where_the_objective_stays(tmp_path, changes, free):
    path = made(tmp_path / "w", SETTINGS | changes)
    other = SETTINGS | changes | {"train.micro_batch": 8}
    if free:
        assert continuation.compare_settings(path, other).changed == {"train.micro_batch": (0, 8)}
    else:
        with pytest.raises(ValueError, match=r"train\.micro_batch was 0, now 8"):
            continuation.compare_settings(path, other)


def test_a_run_keeps_the_defaults_with_which_it_began(tmp_path, monkeypatch):
    path = made(tmp_path / "w")
    scale = config_lib.SETTINGS["policy.scale"]._replace(default="none")
    monkeypatch.setitem(config_lib.SETTINGS, "policy.scale", scale)
    found = compare(path, policy__scale="none")
    assert found.taken == {"policy.scale": "std"}
    assert found.notes == ["policy.scale stays 'std', the default when the run began (now 'none')"]
    # A value that was no default is compared as ever.
    with pytest.raises(ValueError, match=r"train\.lr was 5e-06, now 0\.1"):
        compare(path, policy__scale="none", train__lr=0.1)
    made(tmp_path / "set", SETTINGS | {"policy.scale": "none"})
    with pytest.raises(ValueError, match=r"policy\.scale was 'none', now 'std'"):
        continuation.compare_settings(tmp_path / "set", SETTINGS)


def test_a_run_of_before_defaults_were_recorded(tmp_path):
    path = made(tmp_path / "w", SETTINGS | {"loss.norm": "micro_token_mean"})
    rewrite(path / "run.json", lambda run: run["starts"][0].pop("defaults"))
    assert compare(path).taken == {"loss.norm": "micro_token_mean"}  # today's is another
    older = {name: value for name, value in SETTINGS.items() if name != "loss.beta"}
    made(tmp_path / "old", older)
    assert compare(tmp_path / "old").known  # beta had its default
    with pytest.raises(ValueError, match=r"loss\.beta was 0\.5, now 0\.1"):
        compare(tmp_path / "old", loss__beta=0.1)


def test_values_that_the_first_start_chose(tmp_path):
    chosen = {"prompt.date": "2026-01-31", "model.init_from": "a/w/checkpoints/12"}
    path = made(tmp_path / "w", SETTINGS | chosen)
    assert compare(path, model__init_from="a/w").taken == chosen
    assert compare(path, model__init_from="a/w/").taken == chosen
    for start in ("", "a/w2", "a"):
        with pytest.raises(ValueError, match=r"model\.init_from was 'a/w/checkpoints/12', now"):
            compare(path, model__init_from=start)
    with pytest.raises(ValueError, match=r"prompt\.date was '2026-01-31', now '2026-02-01'"):
        compare(path, model__init_from="a/w", prompt__date="2026-02-01")
    # An old run did not record its date: it is that of the first start.
    assert (
        continuation.choose_date(tmp_path / "new")
        == __import__("datetime").date.today().isoformat()
    )
    rewrite(
        path / "run.json", lambda run: run["starts"][0].update(time="2025-03-04T23:00:00+00:00")
    )
    assert continuation.choose_date(path) == "2025-03-04"


def test_directories_that_are_not_ours_or_damaged(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no run began there"):
        compare(tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        compare(tmp_path / "file" / "w")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        workdir.read_settings(tmp_path / "absent")
    path = made(tmp_path / "w")
    rewrite(path / "run.json", lambda run: run["starts"][0].pop("settings"))
    (path / "config.json").write_text('{"a":')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        compare(path)
    (path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object: restore"):
        compare(path)


def test_a_run_with_a_retired_setting_goes_on_if_it_had_no_effect(tmp_path):
    made(tmp_path, SETTINGS | {"loss.skip_below": 0.0})
    assert compare(tmp_path).known
    assert "loss.skip_below" not in workdir.read_settings(tmp_path)
    made(tmp_path, SETTINGS | {"loss.skip_below": 0.5})
    for read in (compare, workdir.read_settings):
        with pytest.raises(ValueError, match=r"has loss\.skip_below=0\.5: .*_below=0\.0 can be"):
            read(tmp_path)


OLD, NEW = (hashlib.sha256(text).hexdigest() for text in (b"old", b"new"))
FACTS = {
    "data_fingerprint": OLD,
    "eval_fingerprint": OLD,
    "identity": {
        "tokenizer": {"tokenizer.json": OLD},
        "jax": {"jax_default_prng_impl": "threefry2x32", "jax_gone": 1},
        "served": {"root of m": "/models/m"},
    },
}


def facts(kind, **changes):
    return FACTS | {"identity": FACTS["identity"] | {kind: changes}}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (FACTS, None),
        (FACTS | {"data_fingerprint": NEW}, rf"data_fingerprint was {OLD[:12]}, now {NEW[:12]}\)"),
        (FACTS | {"eval_fingerprint": NEW}, rf"eval_fingerprint was {OLD[:12]}, now {NEW[:12]}\)"),
        (FACTS | {"new_fingerprint": NEW}, None),
        (facts("tokenizer", **{"tokenizer.json": NEW}), rf"json was {OLD[:12]}, now {NEW[:12]}\)"),
        (facts("tokenizer"), rf"tokenizer\.json was {OLD[:12]}, now absent"),
        (
            facts("tokenizer", **{"tokenizer.json": OLD, "chat_template.jinja": NEW}),
            rf"chat_template\.jinja was absent, now {NEW[:12]}",
        ),
        (facts("jax", jax_default_prng_impl="rbg"), r"prng_impl was threefry2x32, now rbg\)"),
        (facts("jax", jax_default_prng_impl="threefry2x32", jax_added=2), None),
        (facts("served", **{"root of m": "/other"}), r"root of m was /models/m, now /other\)"),
        (facts("unknown", x="y"), None),
    ],
)
def test_facts(tmp_path, now, said):
    path = made(tmp_path / "w", **FACTS)
    if said is None:
        assert continuation.compare_facts(path, now, ()) == []
        return
    with pytest.raises(ValueError, match=said) as raised:
        continuation.compare_facts(path, now, ())
    assert "\n" not in str(raised.value)


def test_more_problems_of_the_evaluation(tmp_path):
    path = made(tmp_path / "w", **FACTS)
    more = FACTS | {"eval_fingerprint": NEW}
    assert continuation.compare_facts(path, more, ["eval.limit"]) == []
    made(path, **more)
    assert continuation.compare_facts(path, more, ()) == []
    with pytest.raises(ValueError, match="eval_fingerprint was"):
        continuation.compare_facts(path, FACTS, ())


def test_versions_are_reported(tmp_path):
    before = {"versions": {"jax": "0.10.2", "numpy": "2.0"}, "commit": "abc", "xla": "--a"}
    path = made(tmp_path / "w", **before)
    assert continuation.compare_facts(path, before, ()) == []
    after = {"versions": {"jax": "0.11.2", "numpy": "2.0"}, "commit": "abd", "xla": ""}
    assert continuation.compare_facts(path, after, ()) == [
        "different from the last start: jax was 0.10.2, now 0.11.2; the code was abc, now abd; "
        "XLA_FLAGS was --a, now empty"
    ]
    # A run that recorded nothing.
    (path / "run.json").unlink()
    assert continuation.compare_facts(path, after, ()) == []
    (path / "checkpoints" / "2").mkdir(parents=True)
    (line,) = continuation.compare_facts(path, after, ())
    assert line.startswith(f"{path / 'run.json'} is missing: the settings are compared with config")
    with pytest.raises(ValueError, match=r"\(data\.path was 'bundled:train', now 'other'\)"):
        compare(path, data__path="other")
    rewrite(made(path) / "run.json", lambda run: run["starts"].__setitem__(0, {}))
    assert continuation.compare_facts(path, after | FACTS, ()) == []


def test_options_and_functions(tmp_path, monkeypatch):
    before = continuation.read_jax_options()
    assert {"jax_threefry_partitionable", "jax_enable_x64"} <= before.keys()
    with jax.default_prng_impl("rbg"), jax.default_matmul_precision("highest"):
        after = continuation.read_jax_options()
    assert {name for name in before if before[name] != after[name]} == {
        "jax_default_prng_impl", "jax_default_matmul_precision",
    }  # fmt: skip
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    source = tmp_path / "graded_here.py"
    source.write_text("def f(gold, text):\n    return 1.0\n")
    settings = {"reward.kind": "graded_here:f", "tokens.select": "all"}
    found = continuation.fingerprint_functions(settings)
    assert found == {"reward.kind=graded_here:f": hashlib.sha256(source.read_bytes()).hexdigest()}
