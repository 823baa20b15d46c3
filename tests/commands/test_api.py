"""The Python API against the model's own logits, NumPy in float64, and a step made by hand."""

import doctest
import html.parser
import inspect
import subprocess
import sys

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import optax_promotes  # noqa: F401

import copsd_jax
from copsd_jax import api, token_comparison
from copsd_jax.model import lora, transformer
from copsd_jax.model import policy as policy_lib
from copsd_jax.training import layout, train_step

SETTINGS = {"lora.rank": 4, "train.lr": 3e-4, "rollout.max_tokens": 6}
PROBLEMS = (("What is 3 + 4?", "3 + 4 = 7"), ("What is 20 - 12, in words?", "20 - 12 = 8, eight"))


@pytest.fixture(scope="module")
def model() -> api.Model:
    return copsd_jax.load_model("tiny", SETTINGS)


@pytest.fixture(scope="module")
def work(model) -> tuple[list, list, list]:
    """Prompts of both sides, and completions of unequal lengths; an odd number of them."""
    sides = [copsd_jax.build_prompts(model, p, solution=s) for p, s in (*PROBLEMS, PROBLEMS[0])]
    students, teachers = ([*side] for side in zip(*sides, strict=True))
    completions = [c.ids for c in copsd_jax.sample(model, students, seed=3)]
    return students, teachers, [completions[0], completions[1][:4], completions[2][:1]]


@pytest.fixture(scope="module")
def trained(model, work) -> api.Model:
    """A model whose adapter does something."""
    return copsd_jax.train_step(model, *work)[0]


def examples() -> list:
    found = doctest.DocTestFinder().find(api, "copsd_jax.api")
    return [pytest.param(test, id=test.name) for test in found if test.examples]


@pytest.mark.slow
@pytest.mark.parametrize("test", examples())
def test_examples_of_docstrings(test):
    assert doctest.DocTestRunner().run(test).failed == 0


def test_every_function_has_an_example():
    with_example = {param.id for param in examples()}
    for name in copsd_jax.__all__:
        if inspect.isfunction(getattr(copsd_jax, name)):
            assert f"copsd_jax.api.{name}" in with_example


@pytest.mark.slow
def test_the_lines_of_the_document_run(capsys):
    text = (conftest.ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 13
    exec(compile(code, "docs/python.md", "exec"), {})
    *lines, loss = capsys.readouterr().out.splitlines()
    tokens, table = lines[:8], lines[8:]
    assert len(table) == 2 + 8
    assert table[0].startswith("token")
    assert len(tokens) == 8
    values = [float(line.split()[-1]) for line in tokens]
    np.testing.assert_allclose(float(loss.split()[-1]), np.mean(values), atol=1e-5)


def logp_by_hand(model: api.Model, policy, prompt, completion) -> np.ndarray:
    """float64 log-probabilities [C, V] of the unpadded sample."""
    ids_1L = jnp.asarray([[*prompt, *completion]], jnp.int32)
    positions_1L = jnp.arange(ids_1L.shape[1], dtype=jnp.int32)[None]
    ones_1L = jnp.ones_like(ids_1L)
    stream = transformer.Stream(ids_1L, positions_1L, ones_1L, policy.adapter, policy.scale)
    hidden_LD = model.run.decoder.apply({"params": policy.params}, (stream,))[0].hidden_BLD[0]
    logits_LV = transformer.compute_model_logits(hidden_LD, transformer.get_head(policy.params))
    z_CV = np.asarray(logits_LV, np.float64)[len(prompt) - 1 : -1]
    z_CV = z_CV - z_CV.max(axis=-1, keepdims=True)
    return z_CV - np.log(np.exp(z_CV).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_scores_are_the_log_softmax_of_the_logits(trained, work, side):
    prompt, completion = work[1][0], work[2][0]
    adapter = trained.state.trained if side == "student" else None
    policy = policy_lib.Policy(trained.run.frozen, adapter, trained.run.options.adapter_scale)
    expected_CV = logp_by_hand(trained, policy, prompt, completion)
    scores = copsd_jax.score(trained, prompt, completion, side=side)
    np.testing.assert_allclose(scores.logp_CV, expected_CV, atol=2e-5)
    own_C = expected_CV[np.arange(len(completion)), list(completion)]
    np.testing.assert_allclose(scores.logp_C, own_C, atol=2e-5)


def test_the_sides_differ_after_a_step(trained, work):
    prompt, completion = work[0][0], work[2][0]
    sides = [copsd_jax.score(trained, prompt, completion, side=s) for s in ("student", "teacher")]
    assert np.abs(sides[0].logp_CV - sides[1].logp_CV).max() > 1e-3


def test_sampled_log_probabilities_are_those_of_the_scores(trained, work):
    (one,) = copsd_jax.sample(trained, [work[0][0]], max_tokens=5, temperature=1.0)
    scores = copsd_jax.score(trained, work[0][0], one.ids)
    np.testing.assert_allclose(one.logps, scores.logp_C, atol=2e-5)


def test_samples_depend_on_the_seed_alone(model):
    texts = ["3 + 4 =", "3 + 4 ="]
    one, again = copsd_jax.sample(model, texts, seed=1), copsd_jax.sample(model, texts, seed=1)
    assert [c.ids for c in one] == [c.ids for c in again]
    assert one[0].ids != one[1].ids
    assert one[0].ids != copsd_jax.sample(model, texts, seed=2)[0].ids


KINDS = {
    "fkl": lambda p, q: q * np.log(q / p),
    "rkl": lambda p, q: p * np.log(p / q),
    "jsd": lambda p, q: (
        0.5 * q * np.log(q / (0.5 * p + 0.5 * q)) + 0.5 * p * np.log(p / (0.5 * p + 0.5 * q))
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_divergence_equals_numpy(kind, temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 37)) * 2
    ids_C = rng.integers(0, 37, 5).astype(np.int32)
    found_C = copsd_jax.divergence(
        *(api.Scores(ids_C, jax.nn.log_softmax(jnp.asarray(z, jnp.float32))) for z in logits),
        kind,
        temperature=temperature,
    )
    mass = np.exp(logits / temperature)
    p, q = mass / mass.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found_C, KINDS[kind](p, q).sum(axis=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*KINDS, "sampled"])
def test_equal_prompts_give_exactly_zero(model, work, kind):
    """At step 0, where the adapter has no effect, on both sides' own weights."""
    prompt, completion = work[0][1], work[2][1]
    p, q = (copsd_jax.score(model, prompt, completion, side=s) for s in ("student", "teacher"))
    assert not np.any(copsd_jax.divergence(p, q, kind))
    other = copsd_jax.score(model, work[1][1], completion, side="teacher")
    assert np.any(copsd_jax.divergence(p, other, kind))  # the test can fail


@pytest.mark.long
def test_a_step_is_that_of_make_step(model, work):
    """From a state, optimizer and batch made by hand; the former model stays as it was."""
    before = jax.tree.map(np.asarray, model.state.trained)
    after, metrics = copsd_jax.train_step(model, *work)
    c = model.run.plan.config.train
    names = "lr schedule warmup weight_decay b1 b2 eps max_grad_norm".split()
    tx, _ = train_step.make_optimizer(steps=10, **{name: c[name] for name in names})
    state = train_step.init_train_state(jax.tree.map(jnp.asarray, before), tx, "fixed")
    step = jax.jit(train_step.make_step(model.run.decoder, tx, model.run.options))
    expected, aux = step(state, model.run.frozen, layout.build_batch(*work), None, None)
    np.testing.assert_allclose(metrics["loss"], aux.metrics["loss"], rtol=1e-6)
    assert metrics["tokens"] == 11
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        after.state.trained, expected.trained,
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, model.state.trained, before)
    assert (int(model.state.step), int(after.state.step)) == (0, 1)


def test_the_loss_is_the_mean_divergence_and_falls(model, work):
    values, losses = [], []
    for student, teacher, completion in zip(*work, strict=True):
        p = copsd_jax.score(model, student, completion)
        q = copsd_jax.score(model, teacher, completion, side="teacher")
        values += copsd_jax.divergence(p, q).tolist()
    for _ in range(5):
        model, metrics = copsd_jax.train_step(model, *work)
        losses.append(metrics["loss"])
    np.testing.assert_allclose(losses[0], np.mean(values), rtol=1e-3)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_the_weights_of_a_run_on_eight_devices():
    """A model of a run's own parts, whose settings are of eight completions on eight devices."""
    with runs.loaded("opsd") as (run, state):
        model = copsd_jax.Model(run, state)
    assert model.run.plan.mesh.size == 8
    prompts = copsd_jax.build_prompts(model, "What is 3 + 4?", solution="3 + 4 = 7")
    (one,) = copsd_jax.sample(model, prompts[:1], max_tokens=4)
    p, q = (
        copsd_jax.score(model, prompt, one.ids, side=side)
        for prompt, side in zip(prompts, ("student", "teacher"), strict=True)
    )
    values_C = copsd_jax.divergence(p, q)
    after, metrics = copsd_jax.train_step(model, *([side] * 8 for side in prompts), [one.ids] * 8)
    np.testing.assert_allclose(metrics["loss"], np.mean(values_C), rtol=1e-3)
    assert (int(model.state.step), int(after.state.step)) == (0, 1)


def test_the_adapter_begins_without_effect(model):
    adapter = lora.init_adapter(model.run.decoder.config, 4, lora.TARGETS, jax.random.key(0))
    assert jax.tree.map(jnp.shape, model.state.trained) == jax.tree.map(jnp.shape, adapter)
    assert not any(np.any(leaf["b"]) for leaf in model.state.trained.values())


def test_refusals(model):
    with pytest.raises(ValueError, match=r"train\.learning_rate is not a setting: did you mean"):
        copsd_jax.load_model("tiny", {"train.learning_rate": 1.0})
    with pytest.raises(ValueError, match="method must be 'distill'"):
        copsd_jax.load_model("tiny", {"method": "grpo"})
    with pytest.raises(FileNotFoundError, match=r"model\.path is 'nothing here'"):
        copsd_jax.load_model("nothing here")
    with pytest.raises(ValueError, match="the choices are student, teacher"):
        copsd_jax.score(model, "a", [1], side="reader")
    for wrong in ([], [10**6], [-1], [1.5], "7", [[1]]):
        with pytest.raises(ValueError, match=r"^completion (is|has)"):
            copsd_jax.score(model, "a", wrong)
        with pytest.raises(ValueError, match=r"^completions\[1\] (is|has)"):
            copsd_jax.train_step(model, ["a", "b"], ["c", "d"], [[1], wrong])
    for wrong in ("", [], [10**6], [-1], [1.5]):
        with pytest.raises(ValueError, match=r"^prompt (is|has)"):
            copsd_jax.score(model, wrong, [1])
        with pytest.raises(ValueError, match=r"^prompts\[1\] (is|has)"):
            copsd_jax.sample(model, ["a", wrong])
    for wrong in ("ab", [], 5, None):
        with pytest.raises(ValueError, match=r"^prompts is .*: it must be a list of at least one"):
            copsd_jax.sample(model, wrong)
    with pytest.raises(ValueError, match=r"^student_prompts is \[\]"):
        copsd_jax.train_step(model, [], [], [])
    with pytest.raises(ValueError, match=r"^teacher_prompts is 'ab'"):
        copsd_jax.train_step(model, ["a", "b"], "ab", [[1], [2]])
    p, q = (copsd_jax.score(model, "a", [token]) for token in (1, 2))
    with pytest.raises(ValueError, match="different tokens"):
        copsd_jax.divergence(p, q)
    shorter = copsd_jax.Scores(p.ids_C, p.logp_CV[:, :10])
    outside = copsd_jax.Scores(np.array([10]), shorter.logp_CV)
    with pytest.raises(ValueError, match=r"teacher has ids_C that are not integers from 0 to 9$"):
        copsd_jax.divergence(p, outside)
    flat = copsd_jax.Scores(p.ids_C, p.logp_CV[0])
    with pytest.raises(ValueError, match=r"student has ids_C of shape \(1,\) and logp_CV of shape"):
        copsd_jax.divergence(flat, flat)
    with pytest.raises(ValueError, match=r"the scores have the shapes \(1, \d+\) and \(1, 10\)"):
        copsd_jax.divergence(p, shorter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora.rank": "4"}, r"lora\.rank is '4': it must be a whole number"),
        ({"lora.rank": True}, r"lora\.rank is True: it must be a whole number"),
        ({"train.lr": None}, r"train\.lr is None: it must be a number"),
        ({"loss.beta": 0.3}, r"loss\.beta is 0\.3: nothing reads it, because it needs"),
        ({"data.limit": 5}, r"data\.limit is 5: no function of the Python API reads it"),
        ({"train.batch": 4}, r"train\.batch is 4: no function of the Python API reads it"),
        ({"eval.samples": 3}, "no function of the Python API reads it"),
        (
            {"model.revision": "v2"},
            r"model\.revision is 'v2': nothing reads it, because model\.path",
        ),
        ({3: 4}, "--config.3 is not a setting"),
        ("lora.rank=4", "settings is 'lora.rank=4': it must be a dict"),
    ],
)
def test_settings_that_load_model_refuses(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        copsd_jax.load_model("tiny", settings)
    assert "\n" not in str(caught.value)


def test_arguments_that_are_refused(model):
    with pytest.raises(ValueError, match=r"unknown language 'xx': the choices are .*sw \(swa\)"):
        copsd_jax.build_prompts(model, "1 + 1?", solution="2", lang="xx")
    same = [copsd_jax.build_prompts(model, "1 + 1?", solution="2", lang=x) for x in ("sw", "SWA")]
    assert same[0] == same[1]
    for wrong in (None, 3, "\ud800"):
        with pytest.raises(ValueError, match=r"^problem is .*: it must be text"):
            copsd_jax.build_prompts(model, wrong, solution="2")
    with pytest.raises(ValueError, match="sample has no setting 'tokens': the choices are max_tok"):
        copsd_jax.sample(model, ["a"], tokens=3)
    for wrong in ("5", 5.0, True, None):
        with pytest.raises(ValueError, match=r"^max_tokens is .*: it must have the type int"):
            copsd_jax.sample(model, ["a"], max_tokens=wrong)
    listed, same = (
        copsd_jax.sample(model, ["a"], max_tokens=3, stop_ids=kind(range(200)))
        for kind in (list, tuple)
    )
    assert [x.ids for x in listed] == [x.ids for x in same]
    p = copsd_jax.score(model, "a", [1])
    with pytest.raises(ValueError, match="divergence has no setting 'gamma': the choices are div"):
        copsd_jax.divergence(p, p, gamma=1)
    with pytest.raises(ValueError, match=r"beta is '\.5': it must have the type float"):
        copsd_jax.divergence(p, p, "jsd", beta=".5")


def test_objects_that_are_refused(model):
    for call in (
        lambda wrong: copsd_jax.sample(wrong, ["a"]),
        lambda wrong: copsd_jax.score(wrong, "a", [1]),
        lambda wrong: copsd_jax.train_step(wrong, ["a"], ["b"], [[1]]),
        lambda wrong: copsd_jax.build_prompts(wrong, "1 + 1?", solution="2"),
    ):
        with pytest.raises(
            TypeError, match=r"^model is 'tiny': it must be a Model, which copsd_jax"
        ):
            call("tiny")
    p = copsd_jax.score(model, "a", [1])
    for student, teacher, name in ((p.logp_CV, p, "student"), (p, tuple(p), "teacher")):
        with pytest.raises(TypeError, match=f"^{name} has the type .*: it must be Scores, as cop"):
            copsd_jax.divergence(student, teacher)
    for wrong in ([-5], [10**6], 5, None, "7", [1.5], [[1], [2, 3]]):
        with pytest.raises(ValueError, match=r"^ids (is|has)"):
            model.decode(wrong)
    assert model.decode([]) == model.decode(np.array([])) == ""
    for wrong in ("x", None, 1.5, -1, 2**32):
        with pytest.raises(ValueError, match=r"^seed is .*: it must be a whole number from 0 to 2"):
            copsd_jax.sample(model, ["a"], seed=wrong)
    for name, wrong in (("stop", [3]), ("stop_ids", ["a"])):
        with pytest.raises(ValueError, match=f"^{name} is .*: each item must have the type"):
            copsd_jax.sample(model, ["a"], **{name: wrong})


def test_the_package_does_not_import_jax():
    code = """
import sys, copsd_jax
assert set(copsd_jax.__all__) <= set(dir(copsd_jax))
assert not hasattr(copsd_jax, "nothing")
print({"jax", "transformers"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert copsd_jax.load_model is api.load_model


class Spans(html.parser.HTMLParser):
    """The text, the style and the note of each span of a page."""

    def __init__(self, text):
        super().__init__()
        self.found, self.other = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "span":
            self.found.append([*map(dict(attrs).get, ("style", "title")), ""])
        else:
            self.other.append(tag)

    def handle_data(self, data):
        if self.found and len(self.other) == 1:
            self.found[-1][2] += data


def test_the_comparison_has_the_numbers_of_both_sides(model, work):
    students, teachers, completions = work
    ids = completions[0]
    p, q = (copsd_jax.score(model, side[0], ids) for side in (students, teachers))
    found = copsd_jax.compare(model, p, q, best=2)
    rows = str(found).splitlines()[2:]
    spans = Spans(found._repr_html_()).found
    assert len(found.views) == len(rows) == len(spans) == len(ids)
    for t, (view, (style, note, text)) in enumerate(zip(found.views, spans, strict=True)):
        ours, theirs = (np.asarray(side.logp_CV, np.float64)[t] for side in (p, q))
        apart = theirs[ids[t]] - ours[ids[t]]
        assert view.advantage == pytest.approx(apart, abs=1e-6)
        assert f"ln q - ln p = {apart:+.2f}; student {np.exp(ours[ids[t]]):.1%}" in note
        best = [model.tokenizer.decode([i]) for i in np.argsort(-theirs)[:2]]
        assert [name for name, _ in view.teacher] == best
        assert style == (
            f"background: rgba({'44, 160, 44' if apart > 0 else '214, 39, 40'}, "
            f"{0.7 * min(abs(apart) / 2, 1):.2f})"
        )
        assert text.replace("\u21b5", "")[:1] == view.text[:1] or not view.text.isprintable()


def test_a_token_cannot_write_into_the_page():
    views = [
        token_comparison.TokenView(text, -0.5, -1.0, -1.5, [(text, 0.5)], [(text, 0.5)])
        for text in ("<script>alert(1)</script>", '"><b>', "\x1b[31m", "a\nb", "\u202e")
    ]
    spans = Spans(token_comparison.Comparison(tuple(views))._repr_html_())
    assert spans.other == ["div", "small"]
    shown = [text for _, _, text in spans.found]
    assert shown[:2] == ["<script>alert(1)</script>", '"><b>']
    assert shown[2:4] == [r"\x1b[31m", "a\u21b5\nb"]
    assert "\u202e" not in shown[4]
    assert not any("\x1b" in note or "\u202e" in note for _, note, _ in spans.found)


def test_a_comparison_refuses_other_scores(model, work):
    students, _, completions = work
    p, q = (copsd_jax.score(model, students[0], ids) for ids in completions[:2])
    with pytest.raises(ValueError, match="scored different tokens"):
        copsd_jax.compare(model, p, q)
    short = copsd_jax.Scores(p.ids_C, p.logp_CV[:, : max(p.ids_C) + 1])
    with pytest.raises(ValueError, match=r"the scores are for \d+ tokens, but the vocabulary has"):
        copsd_jax.compare(model, short, short)
    with pytest.raises(ValueError, match="best is 0"):
        copsd_jax.compare(model, p, p, best=0)


def test_a_model_is_shown_in_one_line(model):
    shown = repr(model)
    trained = sum(np.size(leaf) for leaf in jax.tree.leaves(model.state.trained))
    assert shown == f"Model('tiny', step 0, {trained:,} trained parameters)"
