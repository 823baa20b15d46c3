"""The probabilities that student and teacher give to each token of a completion."""

import dataclasses
import functools
import html
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from copsd_jax.metrics import terminal
from copsd_jax.model import policy as policy_lib
from copsd_jax.model import transformer
from copsd_jax.runtime import streams
from copsd_jax.teaching import text_encoding
from copsd_jax.training import layout, loaded_run, train_step

# Policies whose logits are mixed, each with its share of the mixture.
Mixture = tuple[tuple[float, policy_lib.Policy], ...]


@dataclasses.dataclass(frozen=True)
class TokenView:
    """A token, as predicted by student and teacher; log-probabilities are in nats at temperature 1.

    Attributes:
      text: the token, decoded by itself.
      advantage: `logp_teacher - logp_student`. If the advantage is above 0, the teacher gives the
        token a higher probability than the student does.
      logp_student: log-probability that the student gives to the token.
      logp_teacher: log-probability that the teacher gives to the token.
      student: the student's most probable tokens at this position, with their probabilities.
      teacher: the teacher's most probable tokens at this position, with their probabilities.
    """

    text: str
    advantage: float
    logp_student: float
    logp_teacher: float
    student: list[tuple[str, float]]
    teacher: list[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The tokens of a completion, as predicted by student and teacher.

    `print` shows a table with one line per token. A notebook shows the completion's text with
    colours: green for tokens to which the teacher gives a higher probability than the student, red
    for tokens to which it gives a lower one. A pointer on a token shows the numbers.

    Attributes:
      views: the tokens in order.
    """

    views: tuple[TokenView, ...]

    def __str__(self) -> str:
        """Returns the table."""
        return format_table(self.views)

    def _repr_html_(self) -> str:
        """Returns the coloured text as HTML."""
        legend = "green: the teacher gives the token a higher probability; red: a lower one"
        spans = "".join(map(_colour_token, self.views))
        return (
            f'<div style="font-family: monospace; white-space: pre-wrap">{spans}</div>'
            f"<small>{legend}</small>"
        )


def _colour_token(view: TokenView) -> str:
    """Returns a token as HTML; an advantage of 2 nats or more has the strongest colour."""
    colour = "44, 160, 44" if view.advantage > 0 else "214, 39, 40"
    strength = 0.7 * min(abs(view.advantage) / 2, 1.0)
    spell = lambda best: ", ".join(f"{text!r} {p:.0%}" for text, p in best)  # noqa: E731
    note = (
        f"ln q - ln p = {view.advantage:+.2f}; student {np.exp(view.logp_student):.1%}, teacher "
        f"{np.exp(view.logp_teacher):.1%}; student's best: {spell(view.student)}; teacher's best: "
        f"{spell(view.teacher)}"
    )
    # A line break is also shown as a sign, because it may be the token that is coloured.
    text = streams.escape_stream_text(view.text).replace("\n", "\u21b5\n")
    return (
        f'<span title="{html.escape(streams.escape_stream_text(note))}" '
        f'style="background: rgba({colour}, {strength:.2f})">{html.escape(text)}</span>'
    )


def compare_tokens(
    r: loaded_run.LoadedRun, state: train_step.State, record: dict, best: int = 3
) -> Comparison:
    """Compares student and teacher on a record of W/rollouts, under the weights of `state`.

    Student and teacher run separately, each on its own prompt followed by the completion.

    Args:
      r: the loaded run.
      state: the state with the weights of both sides.
      record: a record that has student_prompt_ids, teacher_prompt_ids and completion_ids.
      best: number of most probable tokens that a view lists for each side.

    Returns:
      The comparison, with one view per completion token.
    """
    completion = record["completion_ids"]
    student = ((1.0, loaded_run.derive_run_policies(r, state)[0]),)
    teacher = loaded_run.list_run_teacher_mixture(r, state)
    sides_CV = [
        score_side_for_comparison(r.decoder, mix, record[f"{side}_prompt_ids"], completion)
        for side, mix in (("student", student), ("teacher", teacher))
    ]
    return compare_scores(r.plan.tokenizer, completion, *sides_CV, best=best)


def compare_scores(
    tokenizer: text_encoding.Tokenizer, completion: Sequence[int], student_CV: jax.Array,
    teacher_CV: jax.Array, best: int = 3,
) -> Comparison:  # fmt: skip
    """Compares the log-probabilities that student and teacher give to a completion.

    Args:
      tokenizer: the tokenizer, which decodes single tokens.
      completion: C token ids.
      student_CV: the student's log-probabilities, float32 [C, V].
      teacher_CV: the teacher's log-probabilities, float32 [C, V].
      best: number of most probable tokens that a view lists for each side.

    Returns:
      The comparison, with one view per completion token.
    """
    sides_CV = [np.asarray(student_CV), np.asarray(teacher_CV)]
    spell = lambda i: str(tokenizer.decode([int(i)]))  # noqa: E731
    out = []
    for t, token in enumerate(completion):
        favourites = [
            [(spell(i), float(np.exp(logp_CV[t, i]))) for i in np.argsort(-logp_CV[t])[:best]]
            for logp_CV in sides_CV
        ]
        p, q = (float(logp_CV[t, token]) for logp_CV in sides_CV)
        out.append(TokenView(spell(token), q - p, p, q, *favourites))
    return Comparison(tuple(out))


def score_side_for_comparison(
    decoder: transformer.Decoder, mix: Mixture, prompt: Sequence[int], completion: Sequence[int]
) -> jax.Array:
    """Scores the whole vocabulary at each position of a completion that follows a prompt.

    Args:
      decoder: the model.
      mix: policies whose logits are mixed, each with its share of the mixture; see
        `train_step.list_teacher_mixture`.
      prompt: the token ids of the prompt, not empty.
      completion: C token ids.

    Returns:
      Log-probabilities, float32 [C, V].

    Raises:
      ValueError: the prompt is empty.
    """
    side = layout.build_batch([prompt], None, [completion]).student
    return _compute_comparison_logps(decoder, mix, side)[: len(completion)]


@functools.partial(jax.jit, static_argnums=0)
def _compute_comparison_logps(
    decoder: transformer.Decoder, mix: Mixture, side: layout.Side
) -> jax.Array:
    """Returns the log-probabilities [C, V] for a side that has one sample; padding is included."""
    total = jnp.zeros((), jnp.float32)
    for share, policy in mix:
        stream = transformer.Stream(
            side.tokens_BL, side.positions_BL, side.segments_BL, policy.adapter, policy.scale
        )
        output: Any = decoder.apply({"params": policy.params}, (stream,))
        hidden_CD = output[0].hidden_BLD[0][side.gather_BC[0]]
        head_VD = transformer.get_head(policy.params)
        total = total + share * transformer.compute_model_logits(hidden_CD, head_VD)
    return jax.nn.log_softmax(total)


def format_table(views: Sequence[TokenView]) -> str:
    """Renders a table with one line per token: text, advantage, and each side's best tokens.

    The columns `student` and `teacher` show the probability that each side gives to the token.
    """
    show = lambda favourites: " ".join(f"{text!r} {p:.0%}" for text, p in favourites)  # noqa: E731
    rows = [
        [repr(v.text), f"{v.advantage:+.2f}", f"{np.exp(v.logp_student):.0%}",
         f"{np.exp(v.logp_teacher):.0%}", show(v.student[:2]), show(v.teacher[:2])]
        for v in views
    ]  # fmt: skip
    headers = ["token", "ln q - ln p", "student", "teacher", "student's best", "teacher's best"]
    return terminal.table(headers, rows)


if __name__ == "__main__":
    raise SystemExit(
        "error: copsd_jax.token_comparison is no command: use python -m copsd_jax.main"
    )
