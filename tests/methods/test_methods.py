"""Methods: what each side sees, which tokens carry loss, what is rewarded.

Oracles: renderings written down in `golden/methods.txt`, rollouts that the test scripts, and
counts by hand.
"""

import json

import conftest
import jax
import numpy as np
import pytest
import runs

from copsd_jax import main
from copsd_jax.methods import table
from copsd_jax.problems import problem_row
from copsd_jax.runtime import sharding
from copsd_jax.sampler import loop
from copsd_jax.teaching import (
    contexts,
    conversations,
    prompts,
    replies,
    rule_author,
    step_checker,
    teacher_prompts,
)
from copsd_jax.training import loaded_run, run_plan

optax_promotes = runs.optax_promotes


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Steps of a few completions, which eight devices do not divide."""
    make = sharding.make_mesh
    monkeypatch.setattr(
        sharding, "make_mesh", lambda *sizes: make(*sizes, devices=jax.devices()[:1])
    )  # fmt: skip


GOLDEN = conftest.ROOT / "tests" / "golden" / "methods.txt"


def completion(r, text, finish="stop"):
    """A completion of the sampler's kind, whose text is given."""
    ids = (*r.plan.tokenizer.encode(text, add_special_tokens=False), r.plan.tokenizer.eos_token_id)
    logps = np.full(len(ids), -1.0, np.float32)
    return loop.Completion(ids, logps, logps, finish)


def script(monkeypatch, *calls):
    """Lets `loaded_run.sample` return these texts, call by call; returns the prompts asked."""
    waiting, asked_for = list(calls), []

    def sample(r, policy, asked, section, keys):
        asked_for.append([prompt.text for prompt in asked])
        texts = waiting.pop(0)
        assert len(texts) == len(asked)
        return runs.sampled([completion(r, text) for text in texts])

    monkeypatch.setattr(loaded_run, "sample", sample)
    return asked_for


def row_with(r, steps):
    """A bundled row whose solution has so many steps."""
    return next(row for row in r.plan.rows if row.solution.count(" and ") == steps - 1)


def spoiled(row):
    """An attempt whose second step is wrong, and its first, right part."""
    first, second = row.solution.rstrip(".").split(" and ")
    left, result = second.split(" = ")
    wrong = int(result) + 1
    return f"{first}. {left} = {wrong}. \\boxed{{{wrong}}}", f"{first}. "


def right(row):
    return f"{row.solution} \\boxed{{{row.answer}}}"


def lossy(r, work, b):
    """The completion's text with loss, and without."""
    ids = np.asarray(work.records[b]["completion_ids"])
    mask = np.asarray(work.batch.loss_BC[b, : len(ids)])
    decode = lambda kept: r.plan.tokenizer.decode(ids[kept].tolist())  # noqa: E731
    return decode(mask), decode(~mask)


ROSD = {"rollout__per_prompt": 4, "train__batch": 2, "context__filter_groups": True}


@pytest.mark.slow
def test_rosd_distils_from_the_first_error_on(monkeypatch):
    """A mixed group: the right prefix has no loss; an all-right group costs no reflection."""
    with runs.loaded("rosd", **ROSD) as (r, state):
        one, two = row_with(r, 2), row_with(r, 1)
        wrong, prefix = spoiled(one)
        script(monkeypatch, [right(one), wrong, wrong, right(one)] + [right(two)] * 4)
        written = []
        rule = step_checker.check_attempt
        monkeypatch.setattr(
            step_checker, "check_attempt", lambda *given: written.append(given) or rule(*given)
        )
        work = table.METHODS["distill"].make_batch(r, state, [one, two], 0)
        assert len(written) == 4
        end = r.plan.tokenizer.eos_token
        for b in (0, 3):
            assert lossy(r, work, b) == (right(one) + end, "")
            assert work.records[b]["located"] == "right"
        for b in (1, 2):
            taught, kept = lossy(r, work, b)
            assert taught.strip() == wrong[len(prefix) :] + end
            assert kept.strip() == prefix.strip()
            assert work.records[b]["located"] == "exact"
            assert "\\boxed" not in work.records[b]["reply"]
        assert not work.batch.loss_BC[4:].any()
        assert [record["reply_status"] for record in work.records[4:]] == ["filtered"] * 4
        assert work.metrics["filtered"] == 4
        assert work.metrics["taught"] == 4
        batch = jax.device_put(work.batch)
        _, aux = r.step(state, r.frozen, batch, work.student_prefix, work.teacher_kv)
        assert aux.metrics["loss_tokens"] == work.batch.loss_BC.sum()


def test_a_right_answer_by_a_wrong_step_is_explained():
    row = problem_row.Row("r", "p", "17 - 10 = 7.", "7", "en", "p")
    attempt = contexts.Attempt(row, "17 + 3 = 7. \\boxed{7}", True)
    text = rule_author.write_reflection(attempt, "7")
    assert replies.read_reflection(text, correct=True).status == "ok"
    assert "17 - 10 = 7." in text


@pytest.mark.parametrize(
    "text, status",
    [
        ("She brings 1 stone. The answer is 1. The answer is 1.", "ok"),
        ("17 - 9 = 8. The answer is 8.", "ok"),
        ("17 - 10 = 7. The answer is 8.", "ok"),
        ("17 - 10", "ok"),
    ],
)
def test_the_rules_critiques_are_read_as_any_critics(text, status):
    row = problem_row.Row("r", "p", "17 - 10 = 7.", "7", "en", "p")
    attempt = contexts.Attempt(row, text, False)
    found = "8" if "8." in text else "1" if "1." in text else None
    written = rule_author.write_critique(attempt, found)
    reply = contexts.read_reply(contexts.Settings("critique"), attempt, written)
    assert reply.status == status
    assert "<step_" in reply.trace
    assert "17 - 10 = 7" in reply.trace


def test_all_wrong_groups_cost_no_reflection(monkeypatch):
    with runs.loaded("rosd", **ROSD, author__kind="student", author__max_tokens=4) as (r, state):
        one, two = row_with(r, 2), row_with(r, 1)
        wrong = spoiled(one)[0]
        note = "<explanation>Check it.</explanation>"
        asked = script(
            monkeypatch,
            [wrong] * 4 + [right(two), right(two), "\\boxed{1}", "\\boxed{1}"],
            [note, note, f"<error_quote>\\boxed{{1}}</error_quote>{note}", note],
        )
        work = table.METHODS["distill"].make_batch(r, state, [one, two], 0)
    assert [len(prompts) for prompts in asked] == [8, 4]  # nothing is asked about group one
    assert [record["reply_status"] for record in work.records] == (
        ["filtered"] * 4 + ["ok", "ok", "ok", "no_quote"]
    )
    for text, own in zip(asked[1], [right(two)] * 2 + ["\\boxed{1}"] * 2, strict=True):
        assert own in text
        assert two.problem in text
    assert all(replies.DIAGNOSE in text and right(two) in text for text in asked[1][2:])
    assert all(replies.EXPLAIN in text for text in asked[1][:2])
    # on_failure=full in the tiny preset: without a quote the whole completion is distilled.
    assert work.batch.loss_BC[7].sum() == len(work.records[7]["completion_ids"])
    assert work.metrics["reply_ok"] == 3
    assert work.metrics["located_no_quote"] == 1


def test_a_reflection_that_cannot_be_read_teaches_nothing_or_as_published(monkeypatch):
    calls = (["\\boxed{1}", "RIGHT"], ["nothing of the sort", "<explanation>ok</explanation>"])
    for fallback in (False, True):
        with runs.loaded(
            "rosd", train__batch=1, author__kind="student", parity__reflection_fallback=fallback
        ) as (r, state), monkeypatch.context() as patch:  # fmt: skip
            row = row_with(r, 1)
            texts = [text.replace("RIGHT", right(row)) for text in calls[0]]
            script(patch, texts, calls[1])
            work = table.METHODS["distill"].make_batch(r, state, [row], 0)
        assert work.records[0]["reply_status"] == "no_explanation"
        assert work.records[0]["taught"] is fallback
        assert work.batch.loss_BC[0].any() == fallback
        if fallback:
            assert right(row) in work.records[0]["teacher_prompt"]


def test_sdpo_shows_a_sibling_and_never_its_own(monkeypatch):
    with runs.loaded("sdpo", train__batch=2, rollout__per_prompt=3) as (r, state):
        one, two = row_with(r, 2), row_with(r, 1)
        texts = ["\\boxed{1}", right(one), "<think>\nsecret\n</think>\n\n" + right(one)]
        script(monkeypatch, [*texts, right(two), "\\boxed{1}", "no answer"])
        work = table.METHODS["distill"].make_batch(r, state, [one, two], 0)
    shown = [record["sibling"] for record in work.records]
    assert shown == [right(one), right(one), right(one), None, right(two), right(two)]
    assert "secret" not in work.records[1]["teacher_prompt"]
    # A lone success has no sibling; feedback stands in for it (without_sibling).
    assert "The answer is right." in work.records[3]["teacher_prompt"]
    assert [record["taught"] for record in work.records] == [True] * 6


def test_a_lone_success_without_feedback_carries_no_loss(monkeypatch):
    settings = {"train__batch": 1, "context__feedback": "never"}
    with runs.loaded("sdpo", **settings) as (r, state):
        row = row_with(r, 1)
        script(monkeypatch, [right(row), "\\boxed{1}"])
        work = table.METHODS["distill"].make_batch(r, state, [row], 0)
    assert [record["taught"] for record in work.records] == [False, True]
    assert work.batch.loss_BC.any(axis=1).tolist() == [False, True]
    assert work.batch.mask_BC.any(axis=1).tolist() == [True, True]


def test_routing_sends_successes_to_the_policy_gradient(monkeypatch):
    settings = {"train__batch": 1, "policy__weight": 0.5, "policy__route": "successes"}
    with runs.loaded("sdpo", **settings) as (r, state):
        row = row_with(r, 1)
        script(monkeypatch, ["\\boxed{1}", right(row)])
        work = table.METHODS["distill"].make_batch(r, state, [row], 0)
    assert work.batch.loss_BC.any(axis=1).tolist() == [True, False]
    assert work.batch.policy_BC.any(axis=1).tolist() == [False, True]
    np.testing.assert_array_equal(work.batch.policy_BC[1], work.batch.mask_BC[1])
    scale = 0.5 / (np.sqrt(0.5) + 1e-4)  # rewards 0 and 1: mean .5, deviation (n - 1) sqrt(.5)
    np.testing.assert_allclose(work.batch.advantage_BC[:, 0], [-scale, scale], rtol=1e-6)


def test_grpo_advantages_of_a_step(monkeypatch):
    with runs.loaded("grpo", train__batch=2, rollout__per_prompt=4, policy__scale="none") as (
        r,
        state,
    ):
        one, two = row_with(r, 1), row_with(r, 2)
        script(monkeypatch, [right(one)] * 3 + ["\\boxed{1}"] + ["\\boxed{1}"] * 4)
        work = table.METHODS["grpo"].make_batch(r, state, [one, two], 0)
        _, aux = r.step(state, r.frozen, work.batch, work.student_prefix, work.teacher_kv)
    np.testing.assert_allclose(work.batch.advantage_BC[:, 0], [0.25] * 3 + [-0.75] + [0.0] * 4)
    assert work.metrics["informative"] == 0.5
    # With ratio 1 the value is -A, and the sequence mean of all eight is 0: advantages add to 0.
    np.testing.assert_allclose(aux.metrics["loss"], 0.0, atol=1e-6)
    assert float(aux.metrics["grad_norm"]) > 1e-4
    assert work.batch.teacher is None


def test_sft_targets_are_solution_and_end(monkeypatch):
    with runs.loaded("sft") as (r, state):
        rows = runs.batch_at(r.plan.rows, ["en"], (), 8, 0, 0)
        work = table.METHODS["sft"].make_batch(r, state, rows, 0)
        for row, record in zip(rows, work.records, strict=True):
            assert record["completion"] == right(row)
            assert record["completion_ids"][-1] == r.plan.tokenizer.eos_token_id
            question = record["student_prompt"].split("user\n")[1].split("<|im_end|>")[0]
            turns = [("user", question), ("assistant", right(row))]
            whole = r.plan.tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in turns],
                tokenize=False,
                enable_thinking=False,
            )
            said = r.plan.tokenizer.decode(record["student_prompt_ids"] + record["completion_ids"])
            assert said.strip() == whole.strip()


def test_other_problem_shows_another_problems_solution(monkeypatch):
    with runs.loaded("opsd", context__kind="other_problem") as (r, state):
        rows = runs.batch_at(r.plan.rows, ["en"], (), 8, 0, 0)
        script(monkeypatch, ["\\boxed{1}"] * 8, ["\\boxed{1}"] * 8)
        work = table.METHODS["distill"].make_batch(r, state, rows, 0)
        again = table.METHODS["distill"].make_batch(r, state, rows, 0)
        solutions = {row.solution for row in r.plan.rows}
    for row, record, same in zip(rows, work.records, again.records, strict=True):
        shown = {s for s in solutions if f"\n{s}\n" in record["teacher_prompt"]}
        assert shown
        assert row.solution not in shown
        assert row.problem in record["teacher_prompt"]
        assert record["teacher_prompt"] == same["teacher_prompt"]


@pytest.mark.parametrize(
    "policy, status, text",
    [
        ("keep", "ok", "so 15 is right"),
        ("mask", "ok", "so [...] is right"),
        ("drop", "leak_dropped", ""),
    ],
)
def test_a_leaked_answer(policy, status, text):
    config = runs.config("rosd", context__leak=policy)
    row = problem_row.Row("r", "p", "3 * 5 = 15.", "15", "en", "p")
    reply = replies.read_reflection("<explanation>so 15 is right</explanation>", True)
    kept = replies.apply_leak_policy(reply, row, config.context.leak)
    assert (kept.status, kept.text) == (status, text)
    assert kept.leaked is (policy != "drop")


REFUSED = [
    ("opsd", {"context__kind": "reflection"}, "author.kind"),
    ("rosd", {"author__kind": "none"}, "author.kind"),
    ("opsd", {"author__kind": "student"}, "author.kind"),
    ("opsd", {"tokens__select": "from_error"}, "tokens.select"),
    ("opsd", {"tokens__select": "somewhere"}, "tokens.select"),
    ("opsd", {"tokens__select": "no.such:thing"}, "tokens.select"),
    ("rosd", {"author__kind": "file"}, "author.path"),
    ("rosd", {"author__kind": "file", "author__path": "missing.jsonl"}, "author.path"),
    ("rosd", {"author__kind": "server"}, "author.url"),
    ("rosd", {"author__kind": "server", "author__url": "host"}, "author.url"),
    ("opsd", {"context__kind": "sibling"}, "rollout.per_prompt"),
    ("grpo", {"rollout__per_prompt": 1}, "rollout.per_prompt"),
    ("sft", {"rollout__per_prompt": 2}, "rollout.per_prompt"),
    ("grpo", {"policy__weight": 0.5}, "policy.weight"),
    ("opsd", {"policy__route": "successes"}, "policy.route"),
    ("opsd", {"policy__weight": 1.5}, "policy.weight"),
    ("sdpo", {"policy__weight": 1.0}, "policy.weight"),
    ("opsd", {"teacher__rho": -0.1}, "teacher.rho"),
    ("opsd", {"reward__kind": "prose"}, "reward.kind"),
    ("opsd", {"guards__rules": "loss>>3:stop"}, "guards.rules"),
    (
        "rosd",
        {"author__kind": "student", "author__max_tokens": 9, "author__thinking": "none"},
        "author.thinking",
    ),
]


@pytest.mark.parametrize("card, settings, named", REFUSED)
def test_refusals_name_the_setting(card, settings, named):
    with pytest.raises((ValueError, OSError), match=named.replace(".", r"\.")):
        run_plan.make_plan(runs.config(card, **settings))


@pytest.mark.parametrize(
    "card, settings, said",
    [
        ("opsd", {"reward__kind": "choice", "prompt__answer": "choice"}, "reward.kind.*data.path"),
        ("opsd", {"reward__kind": "tool_call", "prompt__answer": "none"}, "kind.*needs an Action"),
        ("opsd", {"context__kind": "other_problem", "data__limit": 1}, "context.kind.*data.path"),
        ("opsd", {"tokens__select": "broken_module:f"}, "tokens.select.*out of luck"),
        ("opsd", {"reward__kind": "broken_module:f"}, "reward.kind.*out of luck"),
        ("critique", {"author__kind": "file", "author__path": "EMPTY"}, "author.path.*no replies"),
    ],
)
def test_what_data_and_modules_lack_is_refused_before_the_run(
    card, settings, said, tmp_path, monkeypatch
):
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('out of luck')\n")
    (tmp_path / "empty.jsonl").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    values = {k: tmp_path / "empty.jsonl" if v == "EMPTY" else v for k, v in settings.items()}
    with pytest.raises(ValueError, match=said):
        run_plan.make_plan(runs.config(card, **values))


def raising(problem, answer, reply):
    """A user's function."""
    raise KeyError("no such step")


def test_a_selection_that_raises_names_itself_and_the_row(monkeypatch):
    monkeypatch.syspath_prepend(str(conftest.ROOT / "tests"))
    with runs.loaded("opsd", tokens__select="test_methods:raising", train__batch=1) as (r, state):
        row = row_with(r, 1)
        script(monkeypatch, [right(row)])
        with pytest.raises(ValueError, match=f"tokens.select.*{row.id}.*KeyError.*no such step"):
            table.METHODS["distill"].make_batch(r, state, [row], 0)


def test_the_rule_is_refused_where_solutions_are_no_equations(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "p", "solution": "By symmetry.", "answer": "3"}) + "\n")
    with pytest.raises(ValueError, match=r"author\.kind is 'grader'.*By symmetry"):
        run_plan.make_plan(runs.config("rosd", data__path=str(path)))


def test_a_new_context_is_one_function_and_one_entry(monkeypatch):
    """The example of DESIGN.md runs as it stands there."""
    text = (conftest.ROOT / "DESIGN.md").read_text(encoding="utf-8")
    code = text.split("**A context**")[1].split("```python\n")[1].split("```")[0]
    scope = {}
    monkeypatch.setattr(contexts, "CONTEXTS", dict(contexts.CONTEXTS))
    exec(code, scope)
    settings = contexts.Settings("answer_only")
    with runs.loaded("opsd", context__kind="answer_only") as (r, _):
        row = r.plan.rows[0]
        made = teacher_prompts.build_teacher_prompt(
            r.plan.tokenizer, r.plan.teacher.spec, settings, contexts.Attempt(row)
        )
        assert row.answer in made.text
        assert row.solution not in made.text
        assert contexts.list_row_fields(settings) == ("answer",)


@pytest.mark.slow
@pytest.mark.parametrize("card", ["rosd", "grpo", "opsd", "copsd", "critique", "sdpo", "sft"])
def test_every_card_runs_five_steps_and_writes_its_diagnostics(card, tmp_path):
    argv = runs.argv(card, tmp_path / "w", train__steps=5, train__save_every=5, eval__limit=2)
    assert main.main(argv) == 0
    lines = runs.steps_of(tmp_path / "w")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    line = {name: value for one in lines for name, value in one.items()}
    teacher = card not in ("grpo", "sft")
    names = ["repetition", "completion_tokens", "grad_norm", "loss"]
    names += ["entropy_student", "taught"] if teacher else ["policy_entropy", "policy_loss"]
    names += ["logp_gap_max", "correct", "reward", "truncated"] if card != "sft" else []
    assert set(names) <= set(line)
    records = [
        json.loads(text)
        for path in sorted((tmp_path / "w" / "rollouts").iterdir())
        for text in path.read_text().splitlines()
    ]
    for record in records:
        n = len(record["completion_ids"])
        assert len(record["loss_mask"]) == n
        if teacher:
            assert ("divergence" in record) == record["taught"]
        else:
            assert len(record["policy_loss"]) == n
        for name in ("divergence", "logp_teacher", "logp_student", "entropy_teacher"):
            assert len(record.get(name, range(n))) == n
        if record.get("taught"):
            advantage = np.subtract(record["logp_teacher"], record["logp_student"])
            means = [advantage[i:j].mean() if j > i else None for i, j in record["steps"]]
            assert record["advantage_by_step"] == pytest.approx(means)


# ------------------------------------------------------------------------------------- golden

PROBLEMS = {
    "sw": ("Luc ana nyanya 10. Ananunua 3 zaidi. Ana ngapi?", "10 + 3 = 13.", "13"),
    "amh": ("ሉክ 10 ቲማቲም አለው። 3 ገዛ። ስንት አለው?", "10 + 3 = 13.", "13"),
    "en": ("Luc has 10 tomatoes and buys 3. How many?", "10 + 3 = 13.", "13"),
}
ENGLISH = PROBLEMS["en"][0]
WRONG = "10 - 3 = 7. \\boxed{7}"
METHODS = {
    "opsd": ("opsd", {}),
    "copsd": ("copsd", {}),
    "rosd": ("rosd", {}),
    "critique": ("critique", {}),
    "sdpo": ("sdpo", {}),
    "feedback": ("opsd", {"context__kind": "feedback"}),
    "other_problem": ("opsd", {"context__kind": "other_problem"}),
    "grpo": ("grpo", {}),
    "sft": ("sft", {}),
}


def rendering(name, lang, monkeypatch):
    """What one method does with one row, in words."""
    card, settings = METHODS[name]
    batch = {"rollout__per_prompt": 2} if card in ("rosd", "sdpo", "grpo") else {}
    with runs.loaded(card, **settings, train__batch=1, data__limit=8, **batch) as (
        r,
        state,
    ):
        problem, solution, answer = PROBLEMS[lang]
        row = problem_row.Row("r", problem, solution, answer, lang, ENGLISH)
        good = conversations.write_worked_completion(r.plan.student, row)
        script(monkeypatch, [WRONG, good] if batch else [WRONG])
        other = problem_row.Row("o", "Another?", "2 * 4 = 8.", "8", lang, "Another?")
        r.plan.rows[:] = [row, other]
        method = table.METHODS[r.plan.config.method]
        work = method.make_batch(r, state, [row], 0)
        record = work.records[0]
        mask = work.batch.loss_BC[0] if work.batch.teacher is not None else work.batch.policy_BC[0]
        ids = np.asarray(record["completion_ids"])
        carried = r.plan.tokenizer.decode(ids[mask[: len(ids)]].tolist())
    reward = record.get("reward")
    return "\n".join(
        [
            f"######## {name}, {lang}",
            "---- the student sees", record["student_prompt"],
            "---- the teacher sees", record.get("teacher_prompt") or "(there is no teacher)",
            "---- the completion", record["completion"],
            "---- loss on", carried,
            f"---- reward {'none' if reward is None else reward}",
        ]
    )  # fmt: skip


@pytest.mark.parametrize("name", list(METHODS))
def test_golden_renderings(name, monkeypatch):
    known = GOLDEN.read_text(encoding="utf-8") if GOLDEN.is_file() else ""
    for lang in PROBLEMS:
        made = rendering(name, lang, monkeypatch)
        assert made + "\n" in known, made


BUILD = prompts.build_prompt


def written_out(*args, **kwargs):
    """A prompt whose exemplars are part of it."""
    prompt = BUILD(*args, **kwargs)
    return prompts.Prompt((), prompt.prefix_ids + prompt.ids, prompt.text, prompt.state)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["trust_region", "ema", "live"])
def test_teachers_that_move_read_the_exemplars_with_their_own_weights(weights, monkeypatch):
    """With worked examples as a shared prefix, a step gives the numbers of rows written out."""
    settings = {"teacher__weights": weights, "train__batch": 2, "teacher__rho": 0.3}
    if weights != "trust_region":
        del settings["teacher__rho"]
    found = []
    for shared in (True, False):
        with runs.loaded("opsd", prompt__exemplars=2, **settings) as (r, state):
            state = state._replace(
                trained=jax.tree.map(lambda x: x + 0.02, state.trained),
                ema=None if state.ema is None else jax.tree.map(lambda x: x + 0.01, state.ema),
            )
            rows = r.plan.rows[:2]
            with monkeypatch.context() as patch:
                if not shared:
                    patch.setattr(prompts, "build_prompt", written_out)
                script(patch, ["10 + 3 = 13. \\boxed{13}", "\\boxed{2}"])
                work = table.METHODS["distill"].make_batch(r, state, rows, 0)
            assert (work.teacher_kv is not None) == shared
            _, aux = r.step(state, r.frozen, work.batch, work.student_prefix, work.teacher_kv)
            found.append(jax.device_get(aux))
    for name in ("logp_student_T", "logp_teacher_T", "value_T"):
        one, other = (getattr(aux.tokens, name) for aux in found)
        np.testing.assert_allclose(one, other, atol=3e-5)
    np.testing.assert_allclose(
        found[0].metrics["grad_norm"], found[1].metrics["grad_norm"], rtol=1e-3
    )


def test_sft_closes_a_think_block_that_its_prompt_opened():
    with runs.loaded("sft", prompt__thinking="prefix", eval__thinking="prefix") as (r, state):
        rows = r.plan.rows[:8]
        work = table.METHODS["sft"].make_batch(r, state, rows, 0)
        graded = loaded_run.grade_completions(
            r,
            [row.answer for row in rows],
            [prompts.build_student_prompt(r.plan.tokenizer, r.plan.student, row) for row in rows],
            [record["completion"] for record in work.records],
        )
    assert all(verdict.correct for verdict in graded)


def test_sft_drops_solutions_that_are_too_long(tmp_path):
    lines = [
        {"problem": f"p{i}", "solution": "3 " * 200 * i + "= 3.", "answer": "3"} for i in (0, 1)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = run_plan.make_plan(runs.config("sft", data__path=path, train__batch=1))
    assert [row.problem for row in plan.rows] == ["p0"]
    assert plan.dropped == {"solution above rollout.max_tokens=64": 1}
    with pytest.raises(ValueError, match=r"solution of \d+ tokens, but rollout\.max_tokens is 64"):
        run_plan.make_plan(
            runs.config("sft", data__path=path, train__batch=1, data__overlong="error")
        )


def test_a_dead_writer_of_reason_first_teaches_nothing(monkeypatch):
    """Not OPSD's context instead."""
    with runs.loaded(
        "opsd", context__kind="reason_first", author__kind="teacher", author__max_tokens=4,
        train__batch=2,
    ) as (r, state):  # fmt: skip
        script(monkeypatch, ["\\boxed{1}"] * 2, ["<think>\n</think>", "It adds."])
        work = table.METHODS["distill"].make_batch(r, state, r.plan.rows[:2], 0)
    assert [record["reply_status"] for record in work.records] == ["empty", "ok"]
    assert [record["taught"] for record in work.records] == [False, True]
    assert work.batch.loss_BC.any(axis=1).tolist() == [False, True]
