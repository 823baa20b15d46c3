"""What the teacher sees besides the problem: a table of small functions.

A context has three: `ask` is the conversation that a writer completes before the teacher can
teach (None where the data set has written all), `teach` the conversation under which the teacher
scores the student's tokens, and `needs` names the fields that a row must have.
"""

import dataclasses
from collections.abc import Callable

from copsd_jax import data, prompts
from copsd_jax.prompts import Conversation, Section, Turn


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which context, and what `crosslingual` shows of the English side."""

    kind: str
    problem_en: bool = True
    solution: bool = True


@dataclasses.dataclass(frozen=True)
class Context:
    ask: Callable[[Settings], Conversation | None]
    teach: Callable[[Settings, str], Conversation]
    needs: Callable[[Settings], tuple[str, ...]]


def _user(*kinds: str) -> Turn:
    return Turn("user", tuple(Section(kind) for kind in kinds))


def _reference(settings: Settings, reply: str) -> Conversation:
    del settings, reply
    return (_user("problem", "solution", "transition", "instruction"),)


def _crosslingual(settings: Settings, reply: str) -> Conversation:
    """COPSD's teacher; without the solution there is nothing to make a transition from."""
    del reply
    english = ("problem_en",) if settings.problem_en else ()
    if settings.solution:
        return (_user("problem", *english, "solution", "transition", "instruction"),)
    return (_user("problem", *english, "instruction"),)


def _crosslingual_needs(settings: Settings) -> tuple[str, ...]:
    wanted = (("problem_en", settings.problem_en), ("solution", settings.solution))
    return tuple(name for name, shown in wanted if shown)


def _reason_ask(settings: Settings) -> Conversation:
    del settings
    return (_user("problem", "solution", "reason"),)


def _reason_teach(settings: Settings, reply: str) -> Conversation:
    """The analysis is the assistant's turn of a proper conversation, then the user goes on.

    Without a reply (exemplars, or an empty analysis) it is `reference`.
    """
    text, _ = analysis(reply)
    if not text:
        return _reference(settings, reply)
    written = Turn("assistant", (Section("analysis", text),))
    return (*_reason_ask(settings), written, _user("transition", "instruction"))


def analysis(reply: str) -> tuple[str, str]:
    """What an analysis says after its thinking, and how it ended.

    Returns:
      The text, and "ok", "unclosed" (the think block never ended, so what was thought is the
      text) or "empty".
    """
    before, closed, after = reply.rpartition("</think>")
    text = after if closed else reply.replace("<think>", "")
    status = "unclosed" if "<think>" in reply and not closed else "ok"
    del before
    return (text.strip(), status) if text.strip() else ("", "empty")


CONTEXTS: dict[str, Context] = {
    "reference": Context(lambda s: None, _reference, lambda s: ("solution",)),
    "crosslingual": Context(lambda s: None, _crosslingual, _crosslingual_needs),
    "reason_first": Context(_reason_ask, _reason_teach, lambda s: ("solution",)),
    "none": Context(lambda s: None, lambda s, reply: prompts.STUDENT, lambda s: ()),
}


def _context(settings: Settings) -> Context:
    if settings.kind not in CONTEXTS:
        choices = ", ".join(CONTEXTS)
        raise ValueError(f"context.kind is {settings.kind!r}: the choices are {choices}")
    return CONTEXTS[settings.kind]


def needs(settings: Settings) -> tuple[str, ...]:
    """The fields of a row that the teacher's prompt is made of."""
    return _context(settings).needs(settings)


def asks(settings: Settings) -> bool:
    """Whether a writer completes `ask` first."""
    return _context(settings).ask(settings) is not None


def ask(
    tokenizer: prompts.Tokenizer, spec: prompts.Spec, settings: Settings, row: data.Row
) -> prompts.Prompt:
    """The prompt of the writer, without exemplars: no data holds an analysis to show.

    Raises:
      ValueError: the context has no writer.
    """
    conversation = _context(settings).ask(settings)
    if conversation is None:
        raise ValueError(f"context.kind is {settings.kind!r}: nothing is written for it")
    return prompts.build(tokenizer, spec, row, conversation)


def teach(
    tokenizer: prompts.Tokenizer,
    spec: prompts.Spec,
    settings: Settings,
    row: data.Row,
    reply: str = "",
) -> prompts.Prompt:
    """The prompt under which the teacher scores the student's tokens.

    Args:
      spec: the teacher's settings; its exemplars are shown in the context's own format.
      reply: what the writer's completion of `ask` says, as text.
    """
    context = _context(settings)
    shots = [(shot, context.teach(settings, "")) for shot in spec.exemplars]
    return prompts.build(tokenizer, spec, row, context.teach(settings, reply), shots)
