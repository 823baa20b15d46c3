"""Settings that are refused, those that nothing would read, and what answers are asked for.

Oracles: tables written by hand, of each refused value and of a neighbour that is fine; prompts and
rewards written out.
"""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
import runs
from test_methods import one_device, right, row_with, script
from test_token_selection import TEXT, chosen, tiny

from copsd_jax.config import settings as config_lib
from copsd_jax.methods import table
from copsd_jax.problems import languages, problem_row
from copsd_jax.rewards import extraction, graders
from copsd_jax.runtime import workdir
from copsd_jax.teaching import contexts, conversations, prompts, replies
from copsd_jax.training import loaded_run, run_plan, table_rules

assert one_device
assert tiny
optax_promotes = runs.optax_promotes


def config(**settings):
    made = config_lib.default()
    made.update_from_flattened_dict({k.replace("__", "."): v for k, v in settings.items()})
    return made


def refusal(settings, **how):
    """What is said about settings; "" if they are fine."""
    try:
        table_rules.check_choices(config(**settings), **how)
    except ValueError as error:
        return str(error)
    return ""


GROUP = {"rollout__per_prompt": 4}
GRPO = {"method": "grpo", **GROUP}
SFT = {"method": "sft"}
MIXED = {"policy__weight": 0.5, **GROUP}
REFLECTION = {"context__kind": "reflection", "author__kind": "student", **GROUP}
RULE = {"context__kind": "critique", "author__kind": "grader"}
TEACHER = REFLECTION | {"author__kind": "teacher"}
ENGINE = {"sampler__engine": "server", "sampler__url": "http://h:1/v1", "sampler__model": "m"}
SERVER = REFLECTION | {"author__kind": "server", "author__url": "http://localhost:8000/v1"}
FUNCTION = {"reward__kind": "os.path:join"}
CHOICE = {"reward__kind": "choice", "prompt__answer": "choice"}
NONE = {"prompt__answer": "none"}
ROWS = "rows.jsonl"
SHOWN = {"prompt__exemplars": 2}
TOOLS = {"reward__kind": "tool_call", **NONE}

# (name, what is refused, what changes it into something that is not, words of the refusal)
REFUSED = {
    "rule and function": (RULE | FUNCTION, {"author__kind": "student"}, "author.kind is 'grader'"),
    "rule and choice": (RULE | CHOICE, {"author__kind": "student"}, "reward.kind=answer"),
    "rule and answers in thoughts": (
        RULE | {"eval__extract": "last_anywhere"}, {"author__kind": "student"},
        "eval.extract=last_after_think; eval.extract is last_anywhere",
    ),
    "choice in a box": (
        {"reward__kind": "choice"}, {"prompt__answer": "choice"},
        "prompt.answer is 'boxed': with reward.kind=choice the choices are choice, none",
    ),
    "choice in the data's words": ({"reward__kind": "choice", "prompt__answer": "answer_is"}, NONE,
                                   "the choices are choice, none"),
    "call in a box": ({"reward__kind": "tool_call"}, NONE, "with reward.kind=tool_call"),
    "call in tags": (TOOLS | {"prompt__answer": "choice"}, NONE, "it must be none"),
    "answer in tags": ({"prompt__answer": "choice"}, CHOICE, "the choices are boxed, answer_is"),
    "answer unasked": (NONE, FUNCTION, "the choices are boxed, answer_is"),
    "choice worked without form": (
        CHOICE | NONE | {"prompt__exemplars": 2}, {"prompt__answer": "choice"},
        "prompt.answer is 'none': method=sft and prompt.exemplars",
    ),
    "choice trained without form": (CHOICE | NONE | SFT, {"prompt__answer": "choice"}, "is 'none'"),
    "mismatch twice": (
        GRPO | {"policy__old": "sampler", "policy__rollout_clip": 2.0}, {"policy__old": "trainer"},
        "policy.rollout_clip is 2.0: policy.old=sampler",
    ),
    "tail of all": ({"loss__tail": True}, {"loss__top_k": 9}, "loss.tail is True: loss.top_k is 0"),
    "ratio below 0": (GRPO | {"policy__clip_low": 1.0}, {"policy__clip_low": 0.99}, "below 1"),
    "dual clip": (GRPO | {"policy__dual_clip": 1.0}, {"policy__dual_clip": 1.01}, "above 1 (0 is"),
    "nan": (FUNCTION | {"reward__threshold": float("nan")}, {"reward__threshold": -3.0}, "finite"),
    "lone reflection": (
        REFLECTION | {"rollout__per_prompt": 1}, {"rollout__per_prompt": 2},
        "rollout.per_prompt is 1: context.kind=reflection with author.kind=student needs at least",
    ),
    "lone reflection of a server": (
        SERVER | {"rollout__per_prompt": 1}, {"rollout__per_prompt": 2}, "needs at least 2",
    ),
    "engine without address": (
        ENGINE | {"sampler__url": ""}, ENGINE, "sampler.url is '': sampler.engine=server needs",
    ),
    "engine without model": (ENGINE | {"sampler__model": ""}, ENGINE, "sampler.model is ''"),
    "averaged teacher at an engine": (
        ENGINE | TEACHER | {"teacher__weights": "ema"}, {"teacher__weights": "trust_region"},
        "author.kind is 'teacher': a server (sampler.engine) holds only the student, not a teacher"
        " with teacher.weights=ema and train.trainable=lora",
    ),
    "initial teacher at an engine": (
        ENGINE | TEACHER | {"train__trainable": "full"}, {"teacher__weights": "live"},
        "teacher.weights=fixed and train.trainable=full",
    ),
    "constant": (
        SFT | {"policy__norm": "constant"}, {"policy__norm": "token"},
        "policy.norm is 'constant': method=sft needs sequence or token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals_and_their_neighbours(name):
    refused, instead, words = REFUSED[name]
    assert words in refusal(refused)
    assert refusal(refused | instead) == ""


def test_a_lone_reflection_by_a_rule_or_a_file_is_fine():
    lone = REFLECTION | {"rollout__per_prompt": 1}
    assert refusal(lone | {"author__kind": "grader"}) == ""
    assert refusal(lone | {"author__kind": "file", "author__path": "replies.jsonl"}) == ""


# A value, where nothing reads it, and where something does.
DEAD = {
    "data.weights": ((1.0,), [{}, {"data__lang": ("sw",)}],
                     {"data__lang": ("en", "sw"), "data__weights": (1.0, 2.0)}),
    "data.fields": ("problem=q", [{}, GRPO, SHOWN],
                    {"data__path": ROWS}),
    "eval.fields": ("problem=q", [{}, {"data__path": ROWS}, {"eval__path": ""}],
                    {"eval__path": ROWS}),
    "data.answer": ("boxed", [{}, GRPO, SHOWN], {"data__path": ROWS}),
    "eval.answer": ("boxed", [{}, {"data__path": ROWS}], {"eval__path": ROWS}),
    "teacher.weights": ("ema", [GRPO, SFT], {}),
    "teacher.thinking": ("off", [GRPO, SFT], {}),
    "teacher.max_tokens": (99, [GRPO, SFT], {}),
    "teacher.rho": (0.3, [{}, {"teacher__weights": "ema"}], {"teacher__weights": "trust_region"}),
    "teacher.ema_decay": (0.3, [{}, {"teacher__weights": "live"}], {"teacher__weights": "ema"}),
    "context.kind": ("crosslingual", [GRPO, SFT], {}),
    "context.correct": ("skip", [GRPO, SFT], {}),
    "context.filter_groups": (True, [SFT], GRPO),
    "context.problem_en": (False, [{}, GRPO], {"context__kind": "crosslingual"}),
    "context.solution": (False, [{}, GRPO], {"context__kind": "crosslingual"}),
    "context.sibling": ("sampled", [{}, RULE], GROUP | {"context__kind": "sibling"}),
    "context.feedback": ("always", [{}, REFLECTION], GROUP | {"context__kind": "sibling"}),
    "context.section_tokens": (9, [{}, GRPO, {"context__kind": "other_problem"}], REFLECTION),
    "context.leak": ("mask", [{}, RULE, GRPO], REFLECTION),
    "author.max_tokens": (9, [{}, GRPO], REFLECTION),
    "author.temperature": (0.5, [{}, RULE], SERVER),
    "author.top_p": (0.5, [{}, RULE], SERVER),
    "author.top_k": (9, [{}, RULE, SERVER], REFLECTION),
    "author.min_p": (0.5, [{}, RULE, SERVER], REFLECTION),
    "author.slots": (9, [{}, RULE, SERVER], REFLECTION),
    "author.thinking": ("off", [{}, RULE, SERVER], REFLECTION),
    "author.path": ("replies.jsonl", [{}, SERVER], REFLECTION | {"author__kind": "file"}),
    "author.url": ("http://h:2/v1", [{}, REFLECTION], SERVER),
    "author.model": ("m", [{}, REFLECTION], SERVER),
    "author.key_env": ("KEY", [{}, REFLECTION], SERVER),
    "author.timeout": (9.0, [{}, REFLECTION], SERVER),
    "author.retries": (9, [{}, REFLECTION], SERVER),
    "author.backoff": (9.0, [{}, REFLECTION], SERVER),
    "author.concurrency": (9, [{}, REFLECTION], SERVER),
    "author.cache": ("folder", [{}, REFLECTION], SERVER),
    "tokens.select": ("os.path:join", [GRPO, SFT], {}),
    "tokens.on_failure": ("full", [{}, REFLECTION], RULE | {"tokens__select": "from_error"}),
    "tokens.occurrence": ("last", [{}, REFLECTION], RULE | {"tokens__select": "error_step"}),
    "tokens.fuzzy": (
        0.5, [REFLECTION, {"tokens__select": "os.path:join"}],
        REFLECTION | {"tokens__select": "error_step"},
    ),
    "reward.threshold": (0.9, [{}, CHOICE, TOOLS, GRPO], FUNCTION),
    "eval.extract": ("last_anywhere", [CHOICE, TOOLS, FUNCTION], GRPO),
    "eval.grader": ("published", [CHOICE, TOOLS, FUNCTION], GRPO),
    "eval.units": ("same", [CHOICE, TOOLS, FUNCTION], GRPO),
    "parity.template_mismatch": (True, [GRPO, SFT], {}),
    "parity.reflection_tags": (True, [{}, RULE], REFLECTION),
    "parity.reflection_fallback": (True, [{}, RULE], REFLECTION),
    "loss.divergence": ("jsd", [GRPO, SFT], {}),
    "loss.beta": (0.3, [{}, GRPO, {"loss__divergence": "rkl"}], {"loss__divergence": "jsd"}),
    "loss.normalize_beta": (True, [{}, {"loss__divergence": "rkl"}], {"loss__divergence": "jsd"}),
    "loss.temperature": (0.5, [GRPO, SFT], {}),
    "loss.top_k": (9, [GRPO, SFT], MIXED),
    "loss.top_k_of": ("union", [{}, SFT], {"loss__top_k": 9}),
    "loss.rollout_clip": (2.0, [GRPO, SFT], {}),
    "loss.clip_mode": ("token", [GRPO, SFT], {}),
    "loss.clip": (0.5, [{}, GRPO], {"loss__clip_mode": "element"}),
    "loss.norm": ("seq_mean", [GRPO, SFT], {}),
    "loss.group": (1, [GRPO, SFT, {}], {"loss__norm": "micro_token_mean"}),
    "policy.scale": ("none", [{}, SFT], GRPO),
    "policy.clip_low": (0.3, [{}, SFT], GRPO),
    "policy.clip_high": (0.3, [{}, SFT], MIXED),
    "policy.dual_clip": (3.0, [{}, SFT], GRPO),
    "policy.kl": (0.1, [{}, SFT], MIXED),
    "policy.old": ("sampler", [{}, SFT], GRPO),
    "policy.rollout_clip": (2.0, [{}, SFT], MIXED),
    "policy.norm": ("token", [{}], SFT),
    "prompt.exemplars_path": (ROWS, [{}, GRPO], SHOWN),
    "prompt.exemplars_lang": ("sw", [{}, SFT], SHOWN),
    "train.micro_tokens": (9, [{}, {"train__pack": "rows", "train__micro_batch": 8}],
                           {"train__pack": "rows"}),
    "train.row_tokens": (9, [{}, GRPO], {"train__pack": "shared"}),
    "lora.rank": (9, [{"train__trainable": "full"}], {}),
    "lora.alpha": (9.0, [{"train__trainable": "full"}], GRPO),
    "lora.targets": (("q",), [{"train__trainable": "full"}], SFT),
    "sampler.merge": (True, [{"train__trainable": "full"}, ENGINE], {}),
    "sampler.steps": (9, [ENGINE], {}),
    "sampler.pack": (9, [ENGINE], {}),
    "sampler.cache": ("int8", [ENGINE], {}),
    "sampler.attention": ("dense", [ENGINE], {}),
    "sampler.int8": (True, [ENGINE], {}),
    "sampler.gather": (False, [ENGINE], {}),
    "sampler.warmup": ("always", [ENGINE], {}),
    "guards.logp_gap": (0.5, [{}], ENGINE),
    "sampler.url": ("http://h:2/v1", [{}], ENGINE),
    "sampler.model": ("n", [{}], ENGINE),
    "sampler.key_env": ("KEY", [{}], ENGINE),
    "sampler.timeout": (9.0, [{}], ENGINE),
    "sampler.retries": (9, [{}], ENGINE),
    "sampler.backoff": (9.0, [{}], ENGINE),
    "sampler.concurrency": (9, [{}], ENGINE),
    "sampler.dialect": ("sglang", [{}], ENGINE),
    "sampler.logprobs": ("processed", [{}], ENGINE),
    "sampler.max_model_len": (99, [{}], ENGINE),
    "sampler.folder": ("folder", [{}], ENGINE),
}  # fmt: skip


@pytest.mark.parametrize("name", list(DEAD))
def test_a_value_that_nothing_reads_is_refused(name):
    value, dead, live = DEAD[name]
    setting = {name.replace(".", "__"): value}
    for others in dead:
        assert refusal(others) == ""
        assert refusal(others | setting).startswith(f"{name} is {value!r}: nothing reads it, beca")
        assert refusal(others | setting, train=False) == ""
    assert refusal(setting | live) == ""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss__temperature": 1e-5}, "loss.temperature is 1e-05: it must be between 0.0001 and"),
        ({"loss__temperature": 2e4}, "loss.temperature is 20000.0: it must be between"),
        ({"loss__temperature": float("nan")}, "loss.temperature is nan: it must be between"),
        ({"loss__clip_mode": "huber", "loss__clip": 1e-300}, "loss.clip is 1e-300: it must be"),
        (
            {"rollout__temperature": 1e-5},
            "rollout.temperature is 1e-05: it must be 0 (greedy) or at",
        ),
        ({"eval__temperature": 1e-300}, "eval.temperature is 1e-300: it must be 0 (greedy) or at"),
        ({"loss__top_k": 1}, "loss.top_k is 1: a single entry renormalises to 1"),
        ({"loss__beta": 1e-9, "loss__divergence": "jsd"}, "loss.beta is 1e-09: it must be betw"),
        ({"loss__temperature": 1e-4}, ""),
        ({"loss__clip_mode": "huber", "loss__clip": 1e-9}, ""),
        ({"rollout__temperature": 1e-4, "eval__temperature": 0.0}, ""),
        ({"loss__top_k": 1, "loss__tail": True}, ""),
        ({"loss__top_k": 1, "loss__top_k_of": "union"}, ""),
    ],
)
def test_numbers_with_which_nothing_would_be_trained(settings, said):
    assert refusal(settings).startswith(said)
    assert bool(refusal(settings)) == bool(said)


def test_every_condition_has_a_case():
    assert set(DEAD) == {name for name, s in config_lib.SETTINGS.items() if s.read_when}


def test_fields_feedback_and_norm_have_a_second_place():
    assert refusal(SHOWN | {"prompt__exemplars_path": ROWS, "data__fields": "problem=q"}) == ""
    fallback = REFLECTION | {"parity__reflection_fallback": True, "context__feedback": "always"}
    assert refusal(fallback) == ""
    for method in (GRPO, MIXED):
        assert refusal(method | {"policy__norm": "token"}) == ""
    assert refusal(MIXED | {"context__filter_groups": True}) == ""


def test_a_saved_run_is_read_with_values_that_nothing_read(tmp_path):
    """As one of the cards had them: it can be evaluated and exported, but not trained anew."""
    saved = runs.config("grpo")
    saved.teacher.thinking = "off"
    saved.lora.targets = ("q", "v")
    workdir.create(tmp_path, config_lib.flat(saved), {})
    found = workdir.load_run_config(tmp_path)
    assert config_lib.flat(found) == config_lib.flat(saved)
    plan = run_plan.make_plan(found, train=False)
    assert plan.config.teacher.thinking == "off"
    with pytest.raises(ValueError, match=r"teacher\.thinking is 'off': nothing reads it"):
        run_plan.make_plan(found)


def test_a_run_trained_with_kernels_of_other_devices_can_be_evaluated_here(tmp_path):
    saved = runs.config("opsd")
    saved.model.attention, saved.sampler.attention = "splash", "pallas"
    workdir.create(tmp_path, config_lib.flat(saved), {})
    plan = run_plan.make_plan(workdir.load_run_config(tmp_path), train=False)
    assert plan.config.model.attention == plan.config.sampler.attention == "auto"


# ------------------------------------------------------------------------------------ the data


@pytest.mark.parametrize(
    "settings, missing",
    [
        ({"context__correct": "skip"}, "answer"),
        ({"context__kind": "other_problem"}, "answer"),
        ({"context__kind": "other_problem"}, "solution"),
        ({"rollout__per_prompt": 2, "context__filter_groups": True}, "answer"),
    ],
)
def test_fields_that_a_row_needs(tmp_path, settings, missing):
    row = {"problem": "p", "solution": "1 + 1 = 2.", "answer": "2"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row | {missing: ""}) + "\n")
    asked = {"data__path": path, "train__batch": 1, "eval__path": ""}
    with pytest.raises(ValueError, match=f"{missing} is empty"):
        run_plan.make_plan(runs.config("opsd", **asked, **settings))
    if missing == "answer":  # which reference does without
        assert run_plan.make_plan(runs.config("opsd", **asked)).rows
    other = {"problem": "q", "solution": "1 + 2 = 3.", "answer": "3"}
    path.write_text(json.dumps(row) + "\n" + json.dumps(other) + "\n")
    assert run_plan.make_plan(runs.config("opsd", **asked, **settings)).rows


@pytest.mark.long
def test_groups_of_equal_rewards_are_filtered_as_in_dapo(monkeypatch):
    found = {}
    for kept in (False, True):
        settings = {"train__batch": 2, "policy__norm": "token", "context__filter_groups": kept}
        with runs.loaded("grpo", **settings) as (r, state), monkeypatch.context() as patch:
            one, two = row_with(r, 1), row_with(r, 2)
            script(patch, [right(one), "\\boxed{1}", "\\boxed{1}", "\\boxed{1}"])
            work = table.METHODS["grpo"].make_batch(r, state, [one, two], 0)
            _, aux = r.step(state, r.frozen, work.batch, work.student_prefix, work.teacher_kv)
        assert work.batch.policy_BC.any(axis=1).tolist() == [True, True, not kept, not kept]
        np.testing.assert_array_equal(work.batch.policy_BC[:2], work.batch.mask_BC[:2])
        found[kept] = float(aux.metrics["loss"])
        lengths = work.batch.mask_BC.sum(axis=1)
    # Both have the same sum over tokens and differ in how many share it.
    assert found[False] != 0
    share = lengths[:2].sum() / lengths.sum()
    np.testing.assert_allclose(found[False], found[True] * share, rtol=1e-5)


# ---------------------------------------------------------------------------------- the answers


def lines(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data__path": path, "eval__path": path, "train__batch": 1}


CALL = 'Action: add\nAction Input: {"a": 1}'
ASKED = "Reason step by step, and give the letter of the right choice as <answer>letter</answer>."


@pytest.mark.parametrize(
    "kind, form, answer, said, asked",
    [
        ("choice", "choice", "B", ["<answer>B</answer>", "<answer>A</answer>"], f"\n\n{ASKED}"),
        ("choice", "none", "(B)", ["<answer>(b)</answer>", "\\boxed{B}"], ""),
        ("tool_call", "none", CALL, [CALL, CALL.replace("1", "2")], ""),
    ],
)
def test_what_is_asked_for_is_rewarded(tmp_path, monkeypatch, kind, form, answer, said, asked):
    """One answer as asked and right, and one that is not; the same in training and evaluation."""
    rows = lines(tmp_path, {"problem": "Which?", "solution": "So.", "answer": answer})
    with runs.loaded("grpo", **rows, reward__kind=kind, prompt__answer=form) as (r, state):
        script(monkeypatch, said)
        work = table.METHODS["grpo"].make_batch(r, state, r.plan.rows, 0)
        prompt = prompts.build_student_prompt(
            r.plan.tokenizer, r.plan.evaluation, r.plan.eval_rows[0]
        )
        graded = loaded_run.grade_completions(r, [answer] * 2, [prompt] * 2, said)
        assert r.grader.same_class(["B", "A", "B"]) == [0, 1, 0]
    assert [record["reward"] for record in work.records] == [1.0, 0.0]
    assert [verdict.correct for verdict in graded] == [True, False]
    for text in (prompt.text, work.records[0]["student_prompt"]):
        assert text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0] == (
            f"Problem: Which?{asked}"
        )


def test_forms_of_answers_in_every_language_and_in_worked_examples():
    registry = languages.load_languages("")
    for lang, form, steps in itertools.product(
        ("en", "sw", "amh"), ("choice", "none"), ("plain", "step_tags")
    ):
        code = languages.resolve_code(lang, registry)
        row = problem_row.Row("r", "Which?", "So it is.", "B", code, "x")
        spec = conversations.PromptFormat("chat", "off", form, registry, (), steps)
        (turn,) = conversations.render_messages(spec, row, conversations.STUDENT)
        label, *instruction = turn["content"].split("\n\n", 1)
        assert label == f"{registry[code].label_problem}: Which?"
        wanted = [ASKED] * (form == "choice") + [conversations.STEP_TAGS] * (steps == "step_tags")
        assert instruction == ([" ".join(wanted)] if wanted else [])
        written = {"choice": "So it is. <answer>B</answer>", "none": "So it is. B"}[form]
        assert (
            conversations.write_worked_completion(dataclasses.replace(spec, form="plain"), row)
            == written
        )


def test_nothing_follows_a_transition_where_the_data_ask():
    registry = languages.load_languages("")
    row = problem_row.Row("r", "Which?", "So it is.", "B", "en", "x")
    for form, end in (("choice", f"\n{ASKED}"), ("none", "")):
        spec = conversations.PromptFormat("chat", "off", form, registry)
        attempt = contexts.Attempt(row)
        shown = contexts.CONTEXTS["reference"].build_conversation(
            contexts.Settings("reference"), attempt, replies.NONE
        )
        assert shown is not None
        (turn,) = conversations.render_messages(spec, row, shown)
        assert turn["content"].endswith(registry["en"].transition + end)


def test_a_grader_of_other_forms_compares_and_never_extracts():
    for form in ("choice", "none"):
        with graders.Grader(form, "last_after_think", 5.0, workers=1) as grader:
            assert grader.compare("B", "B") == (True, "plain")
            with pytest.raises(ValueError, match=f"pattern is '{form}'"):
                grader.grade_all([("B", "<answer>B</answer>")])
    with pytest.raises(ValueError, match="pattern is 'prose'"):
        graders.Grader("prose", "last_after_think", 5.0)
    assert set(extraction.PATTERNS) | set(graders.OTHERS) == set(conversations.ANSWER_FORMS)
    assert set(conversations.ANSWER_FORMS) == set(conversations.INSTRUCTIONS)


# --------------------------------------------------------------------------------- the user's own

MODULE = """
seen = []
def spans(problem, answer, reply):
    seen.append((problem, answer, reply))
    return [(0, 1)]
def two(problem, answer): return []
def beyond(problem, answer, reply): return [(0, 2), (3, len(answer) + 1)]
def before(problem, answer, reply): return [(-1, 2)]
def backwards(problem, answer, reply): return [(3, 2)]
def single(problem, answer, reply): return [3]
def broken(problem, answer, reply): return [(0.5, 2)]
thing = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    name = f"spans_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize("name", ["two", "thing", "nothing"])
def test_functions_of_tokens_are_refused_before_a_run(module, name):
    select = f"{module}:{name}"
    with pytest.raises(ValueError, match=rf"tokens\.select is '{select}': it is not .*function of"):
        run_plan.make_plan(runs.config("opsd", tokens__select=select))


@pytest.mark.parametrize(
    "name, span",
    [
        ("beyond", f"(3, {len(TEXT) + 1})"),
        ("before", "(-1, 2)"),
        ("backwards", "(3, 2)"),
        ("single", "3"),
        ("broken", "(0.5, 2)"),
    ],
)
def test_a_span_that_is_none_is_named(tiny, module, name, span):
    words = rf"tokens\.select is '{module}:{name}': it returned {re.escape(span)}, .* 42 characters"
    with pytest.raises(ValueError, match=words):
        chosen(tiny, TEXT, replies.NONE, before="thoughts", select=f"{module}:{name}")


def test_a_function_gets_what_the_teacher_is_shown(tiny, module):
    select = f"{module}:spans"
    for reply in (replies.Reply("ok", "because"), replies.Reply("ok", trace="<step_1>x</step_1>")):
        assert chosen(tiny, TEXT, reply, select=select) == ("3", False, "spans")
    imported = __import__(module)
    assert imported.seen == [("p", TEXT, "because"), ("p", TEXT, "<step_1>x</step_1>")]
