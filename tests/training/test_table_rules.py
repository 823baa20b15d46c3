"""New entries of the tables of contexts, divergences and rewards, chosen by a run's settings.

Each test adds one entry and nothing else. Oracles: the text of the prompt, automatic
differentiation, and rewards written by hand.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from copsd_jax import main
from copsd_jax.config import settings as config_lib
from copsd_jax.config.declaration import Choices, ListedBy
from copsd_jax.dryrun import report
from copsd_jax.losses import dense, divergences, token_values
from copsd_jax.rewards import graders, reward_functions
from copsd_jax.teaching import contexts, conversations, replies
from copsd_jax.training import backends, run_plan, table_rules


def refusal(**settings) -> str:
    """The sentence with which a tiny run is refused, planned or compiled ahead of time."""
    config = runs.config("opsd", **settings)
    with pytest.raises(ValueError) as planned:
        run_plan.make_plan(config)
    with pytest.raises(ValueError) as compiled:
        report.report_dry_run(config, target=None, out="", search=False)  # type: ignore[arg-type]
    assert str(compiled.value) == str(planned.value)
    return str(planned.value)


def answer_only(settings, attempt, reply):
    section = conversations.Section("reflection", f"The answer is {attempt.row.answer}.")
    return (conversations.Turn("user", (conversations.Section("problem"), section)),)


def test_a_context_is_one_entry(monkeypatch):
    assert refusal(context__kind="answer_only").startswith(
        "context.kind is 'answer_only': the choices are reference, crosslingual"
    )
    entry = contexts.Context(answer_only, row_fields=lambda settings: ("answer",))
    monkeypatch.setitem(contexts.CONTEXTS, "answer_only", entry)
    plan = run_plan.make_plan(runs.config("opsd", context__kind="answer_only"))
    row = plan.rows[0]
    assert f"The answer is {row.answer}." in plan.teacher.build_shortest(row).text
    assert row.solution not in plan.teacher.build_shortest(row).text
    assert "other_problem, none, answer_only" in refusal(context__kind="answer")
    # What the entry does not ask for is refused as of any other.
    assert "with context.kind=answer_only it must be none" in refusal(
        context__kind="answer_only", author__kind="student"
    )
    assert "nothing reads it, because it needs context.kind=crosslingual" in refusal(
        context__kind="answer_only", context__solution=False
    )


def test_a_context_says_which_settings_and_authors_go_with_it(monkeypatch):
    author = contexts.Author(
        lambda settings, attempt: None,
        lambda settings, attempt, text: replies.read_analysis(text),
        kinds=("none", "student"),
    )
    entry = contexts.Context(
        answer_only,
        inputs=lambda settings: ("siblings",),
        author=author,
        settings=("context.solution",),
        locates_error=True,
    )
    monkeypatch.setitem(contexts.CONTEXTS, "new", entry)
    chosen = {"context__kind": "new", "context__solution": False, "tokens__select": "from_error"}
    table_rules.check_choices(runs.config("opsd", **chosen, rollout__per_prompt=2))
    assert "context.kind=new needs at least 2" in refusal(**chosen, rollout__per_prompt=1)


def hellinger(student, teacher, settings):
    """Σ (√q - √p)^2, with ∂e/∂ln p = p - √(pq)."""
    root = jnp.exp((student.log + teacher.log) / 2)
    return divergences.Entry(student.p + teacher.p - 2 * root, student.p - root, 0.0)


def hellinger_plain(student, teacher, settings):
    return student.p - 2 * jnp.exp((student.log + teacher.log) / 2)


def test_a_divergence_is_one_entry(monkeypatch):
    assert re.search(r"the choices are fkl, .*\bsampled$", refusal(loss__divergence="hellinger"))
    kind = divergences.Kind(hellinger, hellinger_plain, settings=("loss.beta",))
    monkeypatch.setitem(divergences.DIVERGENCES, "hellinger", kind)
    config = runs.config("opsd", loss__divergence="hellinger", loss__beta=0.3)
    settings = backends.build_divergence(run_plan.make_plan(config).config)
    assert settings is not None
    z_s, z_t = (jax.random.normal(jax.random.key(k), (3, 7)) for k in (0, 1))
    tokens = jnp.zeros(3, jnp.int32)
    stats, dz = token_values.score_divergence_block(z_s, z_t, tokens, settings)
    p, q = (np.asarray(jax.nn.softmax(z), np.float64) for z in (z_s, z_t))
    np.testing.assert_allclose(stats.value_T, ((p**0.5 - q**0.5) ** 2).sum(1), rtol=1e-5)
    slope = jax.grad(lambda z: dense.compute_values(z, z_t, tokens, settings)[0].sum())(z_s)
    np.testing.assert_allclose(dz, slope, atol=1e-6)


def longest(rewarder, golds, texts):
    return [reward_functions.Verdict(float(len(t)), None, None, "computed", "") for t in texts]


def test_a_reward_is_one_entry(monkeypatch):
    said = "reward.kind is 'length': the choices are answer, choice, tool_call, module:function"
    assert refusal(reward__kind="length") == said
    entry = reward_functions.Reward(longest, answer_forms=("none",))
    monkeypatch.setitem(reward_functions.REWARDS, "length", entry)
    assert "with reward.kind=length it must be none" in refusal(reward__kind="length")
    plan = run_plan.make_plan(runs.config("opsd", reward__kind="length", prompt__answer="none"))
    with graders.Grader("none", "last_after_think", 5.0, workers=1) as grader:
        rewarder = reward_functions.build_rewarder(plan.config.reward.kind, grader)
        assert [v.reward for v in rewarder.score(["2", "3"], ["four", "x"])] == [4.0, 1.0]


def test_an_unknown_entry_is_refused_by_the_command(tmp_path, capsys):
    argv = runs.argv("opsd", tmp_path / "w", loss__divergence="warp")
    assert main.main(argv) == 2
    assert not (tmp_path / "w").exists()
    said = capsys.readouterr().err
    said = said.removeprefix("error: loss.divergence is 'warp': the choices are fkl, rkl, jsd, ")
    assert re.fullmatch(r"(\w+, )*sampled\n", said)


def test_tables_and_declarations_agree():
    tables = table_rules.collect_choice_tables()
    declared = config_lib.SETTINGS
    with_table = {
        name for name, s in declared.items() if isinstance(s.allowed, Choices) and s.allowed.table
    }
    assert set(tables) == with_table
    for name, setting in declared.items():
        if name in tables:
            assert setting.default in tables[name], name
        listing = {
            table
            for table, entries in tables.items()
            if any(name in listed for listed in entries.values())
        }
        assert listing == {w.setting for w in setting.read_when if isinstance(w, ListedBy)}, name


def test_descriptions_have_the_choices_of_tables():
    found = {one.name: one for one in config_lib.describe(table_rules.collect_choice_tables())}
    assert set(found) == set(config_lib.flat(config_lib.default()))
    assert found["loss.divergence"].allowed == "fkl, rkl, jsd, sampled"
    assert found["context.sibling"].read_when == "context.kind=reflection or sibling"
    assert found["train.steps"].allowed == "at least 0"
    assert found["reward.kind"].allowed.endswith("tool_call, module:function")
