"""The Python API: a model, its samples and scores, the divergence, and a training step.

`docs/python.md` shows the whole API in ten lines. No function changes its arguments: `train_step`
returns a new model, and the old model stays usable. The functions use the same code as
`copsd_jax.main`, with the same settings as on the command line. `load_model` places the model on
JAX's first device. A wrong argument raises a ValueError, or a TypeError if the argument is not a
`Model` or not `Scores`; the message names the argument.
"""

import contextlib
import dataclasses
import numbers
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from copsd_jax import token_comparison
from copsd_jax.config import settings as config_lib
from copsd_jax.losses import divergences, token_values
from copsd_jax.problems import languages, problem_row
from copsd_jax.runtime import sharding
from copsd_jax.sampler import loop, request
from copsd_jax.teaching import contexts, text_encoding
from copsd_jax.teaching import prompts as prompts_lib
from copsd_jax.training import builders, layout, loaded_run, run_plan, table_rules
from copsd_jax.training import train_step as step_lib
from copsd_jax.weights import hub

Prompt = str | Sequence[int]  # token ids, or a text that is encoded without a chat template
Completion = loop.Completion

# Settings for the path "tiny"; the chat template of the tiny model has a thinking switch.
TINY: dict[str, Any] = {
    "model.init": "random", "model.shape": "tiny", "prompt.thinking": "off"
}  # fmt: skip

# Sections and settings that only a run reads.
_UNREAD = frozenset(
    "author compile data eval guards log mesh policy tokens description rollout.per_prompt "
    "prompt.max_tokens teacher.max_tokens train.batch train.save_every train.save_minutes "
    "train.keep train.grace train.profile train.log_rollouts".split()
)

# Maps Python's types of numbers to types that include NumPy's numbers.
_KINDS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with its tokenizer, settings and training state.

    Attributes:
      run: the weights that do not change, the compiled functions, the tokenizer and the plan.
      state: the step number, the trained parameters and the optimizer state.
    """

    run: loaded_run.LoadedRun
    state: step_lib.State

    def __repr__(self) -> str:
        """Returns one line, because the arrays would fill a notebook."""
        trained = sum(leaf.size for leaf in jax.tree.leaves(self.state.trained))
        path, step = self.run.plan.config.model.path, int(self.state.step)
        return f"Model({path!r}, step {step}, {trained:,} trained parameters)"

    @property
    def tokenizer(self) -> text_encoding.Tokenizer:
        """The model's tokenizer."""
        return self.run.plan.tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes token ids to text, leaving out the tokens that end a text.

        >>> import copsd_jax
        >>> model = copsd_jax.load_model("tiny")
        >>> model.decode(model.tokenizer.encode("3 + 4 = 7"))
        '3 + 4 = 7'
        """
        known = _read_api_ids(self, ids, "ids", "a list of token ids", least=0)
        return loaded_run.decode_completion(self.run, known)


class Scores(NamedTuple):
    """A model's predictions for a completion of C tokens.

    Attributes:
      ids_C: token ids of the completion, int32.
      logp_CV: log-probabilities of the whole vocabulary at temperature 1, in nats, float32.
    """

    ids_C: np.ndarray
    logp_CV: jax.Array

    @property
    def logp_C(self) -> jax.Array:
        """Log-probabilities of the completion's own tokens, float32 [C]."""
        return jnp.take_along_axis(self.logp_CV, self.ids_C[:, None], axis=1)[:, 0]


def load_model(path: str = "tiny", settings: Mapping[str, Any] | None = None) -> Model:
    """Loads a model, and makes a new adapter for the model.

    >>> import copsd_jax
    >>> model = copsd_jax.load_model("tiny", {"lora.rank": 4, "train.lr": 1e-3})
    >>> model.run.plan.model_config.n_layers, int(model.state.step)
    (2, 0)

    Args:
      path: the value of `model.path`, which is a Hugging Face folder or repository id, a .gguf
        file, or "tiny". The path "tiny" gives a model of two layers with random weights, for trying
        out the API.
      settings: other settings by name, as on the command line, such as `{"lora.rank": 4}`. By
        default the learning rate is constant, and `teacher.thinking` equals `prompt.thinking`.

    Returns:
      The model at step 0. The adapter has no effect yet, so student and teacher are equal.

    Raises:
      ValueError: a setting is unknown or wrong, or the files do not contain a supported model.
      FileNotFoundError: no model exists at `path`.
    """
    path = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(settings, Mapping | None):
        raise ValueError(f"settings is {settings!r}: it must be a dict such as {{'lora.rank': 4}}")
    chosen: dict[str, Any] = {"model.path": path, "train.schedule": "constant"}
    chosen |= (TINY if path == hub.TINY else {}) | dict(settings or {})
    config = config_lib.default()
    # By default, teacher and evaluation get the student's thinking setting. `make_plan` checks the
    # evaluation's setting, although this file runs no evaluation.
    thinking = chosen.get("prompt.thinking", config.prompt.thinking)
    config_lib.assign(config, {"teacher.thinking": thinking, "eval.thinking": thinking} | chosen)
    if config.method != "distill" or config.policy.weight or config.loss.rollout_clip:
        raise ValueError(
            "method must be 'distill', and policy.weight and loss.rollout_clip must be 0, because "
            "train_step gets neither rewards nor sampler log-probabilities; use copsd_jax.main"
        )
    _refuse_unread_by_api(config, settings or {})
    plan = run_plan.make_plan(config, train=False, evaluate=False)
    # One device accepts batches of any size. On several devices, the size of a batch must be a
    # multiple of the number of devices.
    plan = dataclasses.replace(plan, mesh=sharding.make_mesh(1, 1, 1, jax.devices()[:1]))
    with loaded_run.set_mesh_and_precision(plan):
        return Model(*loaded_run.load_run(plan, config.train.steps))


def _refuse_unread_by_api(config: config_lib.Config, given: Mapping[str, Any]) -> None:
    """Refuses settings that a run reads but the Python API does not read."""
    for name, value in given.items():
        unread = name in _UNREAD or name.partition(".")[0] in _UNREAD
        if unread and value != config_lib.SETTINGS[name].default:
            raise ValueError(
                f"{name} is {value!r}: no function of the Python API reads it; use copsd_jax.main"
            )
    table_rules.check_choices(config, data=False)


def _check_api_arguments(what: str, given: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Checks and returns the arguments of a dataclass; lists become tuples.

    Raises:
      ValueError: an argument is not a field of the dataclass, or has a wrong type.
    """
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    types = {name: typing.get_origin(of) or of for name, of in fields.items()}
    out = {}
    for name, value in given.items():
        if name not in types:
            raise ValueError(f"{what} has no setting {name!r}: the choices are {', '.join(types)}")
        value = tuple(value) if types[name] is tuple and isinstance(value, list) else value
        kinds = _KINDS.get(types[name], types[name])
        if not isinstance(value, kinds) or (isinstance(value, bool) and types[name] is not bool):
            wanted = types[name].__name__
            raise ValueError(f"{name} is {value!r}: it must have the type {wanted}")
        if isinstance(value, tuple):
            item = typing.get_args(fields[name])[0]
            if not all(isinstance(one, _KINDS.get(item, item)) for one in value):
                raise ValueError(
                    f"{name} is {value!r}: each item must have the type {item.__name__}"
                )
        out[name] = value
    return out


def build_prompts(
    model: Model, problem: str, *, solution: str, answer: str = "", lang: str = "en"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Builds the student's and the teacher's prompt for one problem, in the same way as a run.

    >>> import copsd_jax
    >>> model = copsd_jax.load_model("tiny")
    >>> student, teacher = copsd_jax.build_prompts(model, "What is 3 + 4?", solution="3 + 4 = 7")
    >>> "3 + 4 = 7" in model.decode(student), "3 + 4 = 7" in model.decode(teacher)
    (False, True)

    Args:
      model: the model; its settings `prompt`, `teacher` and `context` determine the wording.
      problem: the text of the problem.
      solution: the reference solution, which only the teacher sees.
      answer: the final answer, which plain prompts show after the solution.
      lang: code of the problem's language.

    Returns:
      The student's prompt and the teacher's prompt, each as token ids.

    Raises:
      ValueError: a text is invalid, the language is unknown, the context needs more than problem
        and solution, or the two prompts end in different states of the chat template.
    """
    plan = _check_model(model).run.plan
    for name, text in {"problem": problem, "solution": solution, "answer": answer}.items():
        _check_text(text, name)
    lang = languages.resolve_code(str(lang), plan.student.languages)
    row = problem_row.Row("", problem, solution, answer, lang, problem if lang == "en" else "")
    student = prompts_lib.build_student_prompt(plan.tokenizer, plan.student, row)
    teacher = plan.teacher.build(contexts.Attempt(row))
    if teacher is None:
        raise ValueError(f"context.kind={plan.context.kind!r} needs more than a solution")
    prompts_lib.check_template_states(student, teacher, plan.config.parity.template_mismatch)
    return (*student.prefix_ids, *student.ids), (*teacher.prefix_ids, *teacher.ids)


def _check_model(model: Any) -> Model:
    if not isinstance(model, Model):
        shown = config_lib.show(model)
        raise TypeError(f"model is {shown}: it must be a Model, which copsd_jax.load_model returns")
    return model


def _check_text(text: Any, name: str) -> None:
    if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{name} is {text!r}: it must be text")


def _read_list(values: Any, name: str, item: str) -> list[Any]:
    """Returns the items of a list, tuple or array; refuses other values, and an empty list."""
    several = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)
    found = list(values) if several else []
    if not found:
        shown = config_lib.show(values)
        raise ValueError(f"{name} is {shown}: it must be a list of at least one {item}")
    return found


def _read_api_prompts(model: Model, prompts: Sequence[Prompt], name: str) -> list[tuple[int, ...]]:
    """Checks prompts and returns their token ids; a text is encoded without special tokens."""
    listed = _read_list(prompts, name, "prompt")
    return [_read_api_prompt(model, one, f"{name}[{i}]") for i, one in enumerate(listed)]


def _read_api_prompt(model: Model, prompt: Prompt, name: str) -> tuple[int, ...]:
    if isinstance(prompt, str):
        _check_text(prompt, name)
        prompt = text_encoding.encode_text(model.tokenizer, prompt).ids
    return _read_api_ids(model, prompt, name, "text, or one or more token ids")


def _read_api_ids(
    model: Model, ids: Sequence[int], name: str, wanted: str = "one or more token ids",
    least: int = 1,
) -> tuple[int, ...]:  # fmt: skip
    """Returns token ids as integers; refuses other values, and ids outside the vocabulary."""
    size = model.run.decoder.config.vocab_size
    ids_C: np.ndarray = np.zeros(())
    with contextlib.suppress(ValueError):  # NumPy refuses lists of unequal lengths
        ids_C = np.asarray(ids)
    if ids_C.shape == (0,) and not least:
        return ()
    if ids_C.ndim != 1 or not ids_C.size or ids_C.dtype.kind not in "iu":
        raise ValueError(f"{name} is {config_lib.show(ids)}: it must be {wanted}")
    if ids_C.min() < 0 or ids_C.max() >= size:
        raise ValueError(
            f"{name} has the ids {ids_C.min()} to {ids_C.max()}: the model has ids 0 to {size - 1}"
        )
    return tuple(ids_C.tolist())


def sample(
    model: Model, prompts: Sequence[Prompt], *, seed: int = 0, **sampling: Any
) -> list[Completion]:
    """Samples one completion from the student for each prompt.

    >>> import copsd_jax
    >>> model = copsd_jax.load_model("tiny")
    >>> one, other = copsd_jax.sample(model, ["3 + 4 =", "3 + 4 ="], max_tokens=5)
    >>> len(one.ids), one.finish, one.logps.shape
    (5, 'length', (5,))

    Args:
      model: the model; its `rollout` settings determine every field that `sampling` does not name.
      prompts: texts or token ids. Repeat a prompt n times to get n completions of it.
      seed: seed of the random streams; equal calls with equal seeds give equal completions.
      **sampling: fields of `sampler.request.Sampling`: max_tokens, temperature, top_k, top_p,
        min_p, stop, stop_ids.

    Returns:
      One completion per prompt. `ids` contains the C token ids. `logps` contains the
      log-probability of each token at the sampling temperature, in nats (float32 [C]). `finish` is
      "stop" or "length". If there are no ids, `finish` is "nonfinite" (the logits were not finite)
      or "failed" (a server gave no usable completion; `detail` has the reason).

    Raises:
      ValueError: `prompts` or one of its prompts is empty; a prompt is too long or has ids outside
        the model's vocabulary; or a field of `sampling` is wrong.
    """
    run, plan = _check_model(model).run, model.run.plan
    asked = _read_api_prompts(model, prompts, "prompts")
    if not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed!r}: it must be a whole number from 0 to 2**32 - 1")
    sampling = _check_api_arguments("sample", sampling, request.Sampling)
    chosen = dataclasses.replace(loaded_run.build_sampling(run, "rollout"), **sampling)
    with loaded_run.set_mesh_and_precision(plan):
        policy = run.hand_over(loaded_run.derive_run_policies(run, model.state)[0])
        return loop.generate(
            run.decoder, policy, asked, chosen,
            keys=request.derive_sampling_keys(
                seed, "rollout", 0, [""] * len(asked), range(len(asked))
            ),
            settings=builders.build_sampler_settings(plan.config, "rollout", 0),
            vocabulary=plan.vocabulary,
        ).completions  # fmt: skip


def score(
    model: Model, prompt: Prompt, completion: Sequence[int], *, side: str = "student"
) -> Scores:
    """Scores the tokens of a completion that follows a prompt.

    >>> import copsd_jax
    >>> model = copsd_jax.load_model("tiny")
    >>> scores = copsd_jax.score(model, "3 + 4 =", model.tokenizer.encode(" 7"))
    >>> scores.logp_CV.shape == (len(scores.ids_C), model.run.decoder.config.vocab_size)
    True

    Args:
      model: the model.
      prompt: a text or a list of token ids, not empty.
      completion: C token ids, such as `Completion.ids`.
      side: "student" for the trained weights, or "teacher" for the weights that `teacher.weights`
        chooses. By default, the teacher has the initial weights.

    Returns:
      The scores: log-probabilities [C, V] and the ids [C].

    Raises:
      ValueError: the prompt or the completion is empty, or has ids outside the model's vocabulary;
        or `side` is unknown.
    """
    if side not in ("student", "teacher"):
        raise ValueError(f"side is {side!r}: the choices are student, teacher")
    run, ids = _check_model(model).run, _read_api_ids(model, completion, "completion")
    asked = _read_api_prompt(model, prompt, "prompt")
    with loaded_run.set_mesh_and_precision(run.plan):
        mix = ((1.0, loaded_run.derive_run_policies(run, model.state)[0]),)
        if side == "teacher":
            mix = loaded_run.list_run_teacher_mixture(run, model.state)
        logp_CV = token_comparison.score_side_for_comparison(run.decoder, mix, asked, ids)
    return Scores(np.asarray(ids, np.int32), logp_CV)


def _check_api_scores(scores: Scores, name: str) -> Scores:
    """Converts scores to arrays; refuses other types, and ids without a log-probability."""
    if not isinstance(scores, Scores):
        kind = type(scores).__name__
        raise TypeError(
            f"{name} has the type {kind}: it must be Scores, as copsd_jax.score returns"
        )
    ids_C, logp_CV = np.asarray(scores.ids_C), jnp.asarray(scores.logp_CV)
    if logp_CV.ndim != 2 or ids_C.shape != logp_CV.shape[:1]:
        shapes = f"ids_C of shape {ids_C.shape} and logp_CV of shape {logp_CV.shape}"
        raise ValueError(f"{name} has {shapes}: the shapes must be [C] and [C, V]")
    size = logp_CV.shape[1]
    if ids_C.dtype.kind not in "iu" or not np.all((ids_C >= 0) & (ids_C < size)):
        raise ValueError(f"{name} has ids_C that are not integers from 0 to {size - 1}")
    return Scores(ids_C, logp_CV)


def compare(
    model: Model, student: Scores, teacher: Scores, *, best: int = 3
) -> token_comparison.Comparison:
    """Compares the student's and the teacher's predictions of a completion, token by token.

    `print` shows the comparison as a table. A notebook shows the text with coloured tokens.

    >>> import copsd_jax
    >>> model = copsd_jax.load_model("tiny")
    >>> sides = [copsd_jax.score(model, p, model.tokenizer.encode(" 7")) for p in ("3 + 4 =", "3")]
    >>> table = str(copsd_jax.compare(model, *sides))
    >>> table.split()[:5]
    ['token', 'ln', 'q', '-', 'ln']

    Args:
      model: the model, whose tokenizer decodes the tokens.
      student: the student's scores.
      teacher: the teacher's scores of the same tokens.
      best: number of most probable tokens to show for each side.

    Returns:
      The comparison; its attribute `views` has the numbers of each token.

    Raises:
      ValueError: `student` and `teacher` are scores of different tokens, have different shapes, or
        have another vocabulary than the model; or `best` is not a positive whole number.
    """
    student, teacher = _check_api_pair(student, teacher)
    size, known = student.logp_CV.shape[1], _check_model(model).run.decoder.config.vocab_size
    if size != known:
        raise ValueError(f"the scores are for {size} tokens, but the vocabulary has {known}")
    if not isinstance(best, numbers.Integral) or best < 1:
        raise ValueError(f"best is {best!r}: it must be a whole number of at least 1")
    return token_comparison.compare_scores(
        model.tokenizer, student.ids_C.tolist(), student.logp_CV, teacher.logp_CV, int(best)
    )


def _check_api_pair(student: Scores, teacher: Scores) -> tuple[Scores, Scores]:
    """Checks the scores of both sides; refuses scores of different tokens or shapes."""
    student, teacher = _check_api_scores(student, "student"), _check_api_scores(teacher, "teacher")
    if not np.array_equal(student.ids_C, teacher.ids_C):
        raise ValueError("student and teacher scored different tokens: score the same completion")
    if student.logp_CV.shape != teacher.logp_CV.shape:
        shapes = f"{student.logp_CV.shape} and {teacher.logp_CV.shape}"
        raise ValueError(f"the scores have the shapes {shapes}: the shapes must be equal")
    return student, teacher


def divergence(student: Scores, teacher: Scores, kind: str = "fkl", **settings: Any) -> jax.Array:
    """Computes the divergence between the student's and the teacher's predictions of a completion.

    If the predictions are equal, the divergence is exactly 0.

    >>> import copsd_jax
    >>> import numpy as np
    >>> even = copsd_jax.Scores(np.array([1]), np.log(np.float32([[0.5, 0.5]])))
    >>> sure = copsd_jax.Scores(np.array([1]), np.log(np.float32([[0.1, 0.9]])))
    >>> round(float(copsd_jax.divergence(even, sure)[0]), 3)  # .1 ln(.1 / .5) + .9 ln(.9 / .5)
    0.368

    Args:
      student: the student's scores; the student's distribution is p.
      teacher: the teacher's scores of the same tokens; the teacher's distribution is q.
      kind: "fkl" for KL(q ‖ p), "rkl" for KL(p ‖ q), "jsd", or "sampled".
      **settings: other fields of `losses.divergences.Divergence`, such as beta, temperature, top_k
        and clip.

    Returns:
      The divergence for each token, in nats, float32 [C].

    Raises:
      ValueError: `student` and `teacher` are scores of different tokens or have different shapes,
        or a setting is wrong.
    """
    student, teacher = _check_api_pair(student, teacher)
    settings = _check_api_arguments("divergence", settings, divergences.Divergence)
    # Log-probabilities can be used as logits, because a softmax ignores a constant offset.
    stats, _ = token_values.score_divergence_block(
        student.logp_CV, teacher.logp_CV, jnp.asarray(student.ids_C, jnp.int32),
        divergences.Divergence(kind, **settings),
    )  # fmt: skip
    return stats.value_T


def train_step(
    model: Model,
    student_prompts: Sequence[Prompt],
    teacher_prompts: Sequence[Prompt],
    completions: Sequence[Sequence[int]],
) -> tuple[Model, dict[str, float]]:
    """Takes one optimizer step on the student's divergence from the teacher.

    >>> import copsd_jax
    >>> model = copsd_jax.load_model("tiny")
    >>> completion = model.tokenizer.encode(" 7")
    >>> sides = ["3 + 4 ="], ["4 + 3 = 7. 3 + 4 ="]
    >>> trained, metrics = copsd_jax.train_step(model, *sides, [completion])
    >>> int(model.state.step), int(trained.state.step), metrics["loss"] > 0
    (0, 1, True)

    Args:
      model: the model; its settings `loss`, `train` and `teacher` apply.
      student_prompts: B texts or lists of token ids.
      teacher_prompts: B prompts under which the teacher scores the same completions.
      completions: B lists of token ids, such as `Completion.ids`.

    Returns:
      The model after the step, and metrics such as loss (nats per token), grad_norm and tokens.

    Raises:
      ValueError: the lists differ in length; or a prompt or completion is empty, or has ids outside
        the model's vocabulary.
    """
    run, plan = _check_model(model).run, model.run.plan
    student_ids = _read_api_prompts(model, student_prompts, "student_prompts")
    teacher_ids = _read_api_prompts(model, teacher_prompts, "teacher_prompts")
    listed = _read_list(completions, "completions", "list of token ids")
    sampled = [_read_api_ids(model, ids, f"completions[{i}]") for i, ids in enumerate(listed)]
    batch = layout.build_batch(student_ids, teacher_ids, sampled)
    batch = builders.pack_batch(plan, batch)
    with loaded_run.set_mesh_and_precision(plan):
        # The step overwrites its first argument, so the old model's state is copied first.
        state = jax.tree.map(jnp.copy, model.state)
        state, aux = run.step(state, run.frozen, layout.place_batch(batch, plan.mesh), None, None)
    return Model(run, state), {name: float(x) for name, x in aux.metrics.items()}


if __name__ == "__main__":
    raise SystemExit("error: copsd_jax.api is no command: use python -m copsd_jax.main")
