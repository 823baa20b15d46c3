"""What the teacher sees besides the problem: a table of small functions.

A context is `teach`, the conversation under which the teacher scores the student's tokens, made
from the student's `Attempt` and from what a writer replied; None where it has nothing to teach
(such a completion carries no loss). Where something must be written first, `ask` is the
conversation that the writer completes. `needs` names the fields that a row must have, `reads` what
besides the row the context is made of.
"""

import dataclasses
from collections.abc import Callable, Sequence

from copsd_jax.problems import problem_row
from copsd_jax.teaching import prompts, replies
from copsd_jax.teaching.prompts import Conversation, Section, Turn

# What a context may read besides the row; a step provides it (`methods.distill`).
READS = ("reply", "attempt", "siblings", "feedback", "other")
# Sections that `Settings.section_tokens` may shorten; the question and the template never are.
BUDGETED = ("attempt", "sibling", "feedback", "reflection", "critique", "analysis")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which context, and how much of it is shown; the settings `context.*`."""

    kind: str
    problem_en: bool = True
    solution: bool = True
    feedback: str = "never"
    section_tokens: int = 0
    fallback: bool = False  # parity.reflection_fallback


@dataclasses.dataclass(frozen=True)
class Attempt:
    """The student's answer to a problem, and what the step knows of it.

    Attributes:
      text: the completion without its thinking.
      correct: None where nothing is graded.
      feedback: the grader's words.
      sibling: a successful completion of the same group, without its thinking, or "".
      other: another problem of the data, for the control.
    """

    row: problem_row.Row
    text: str = ""
    correct: bool | None = None
    feedback: str = ""
    sibling: str = ""
    other: problem_row.Row | None = None


def _never(settings: Settings, attempt: Attempt) -> None:
    del settings, attempt


@dataclasses.dataclass(frozen=True)
class Context:
    """An entry of the table; only `teach` has no default.

    Attributes:
      teach: the conversation under which the teacher scores; None where there is nothing to teach.
      ask: the conversation that an author completes; None where there is nothing to ask about.
      needs: the fields that a row must have.
      reads: which of `READS` the context is made of, besides the row.
      authors: the choices of author.kind; "none" where nobody has to write anything.
      locates_error: whether a reply names an error, which tokens.select=from_error needs.
      settings: the settings that this context reads and others do not, such as context.sibling.
    """

    teach: Callable[[Settings, Attempt, replies.Reply], Conversation | None]
    ask: Callable[[Settings, Attempt], Conversation | None] = _never
    needs: Callable[[Settings], tuple[str, ...]] = lambda settings: ()
    reads: Callable[[Settings], tuple[str, ...]] = lambda settings: ()
    authors: tuple[str, ...] = ("none",)
    locates_error: bool = False
    settings: tuple[str, ...] = ()


def _user(*parts: str | Section) -> Turn:
    return Turn("user", tuple(Section(p) if isinstance(p, str) else p for p in parts))


# ------------------------------------------------------------------------- written by the data


def _reference(settings: Settings, attempt: Attempt, reply: replies.Reply) -> Conversation:
    del settings, attempt, reply
    return (_user("problem", "solution", "transition", "instruction"),)


def _crosslingual(settings: Settings, attempt: Attempt, reply: replies.Reply) -> Conversation:
    """COPSD's teacher; without the solution there is nothing to make a transition from."""
    del attempt, reply
    english = ("problem_en",) if settings.problem_en else ()
    if settings.solution:
        return (_user("problem", *english, "solution", "transition", "instruction"),)
    return (_user("problem", *english, "instruction"),)


def _crosslingual_needs(settings: Settings) -> tuple[str, ...]:
    wanted = (("problem_en", settings.problem_en), ("solution", settings.solution))
    return tuple(name for name, shown in wanted if shown)


def _other_problem(
    settings: Settings, attempt: Attempt, reply: replies.Reply
) -> Conversation | None:
    """`reference` with another problem's solution: what a gain without the right one is."""
    del settings, reply
    if attempt.other is None:
        return None
    solution = Section("solution", row=attempt.other)
    return (_user("problem", solution, "transition", "instruction"),)


def _none(settings: Settings, attempt: Attempt, reply: replies.Reply) -> Conversation:
    del settings, attempt, reply
    return prompts.STUDENT


# ------------------------------------------------------------------------ found in the group


def _sibling(settings: Settings, attempt: Attempt, reply: replies.Reply) -> Conversation | None:
    """SDPO's re-prompt: another rollout that succeeded, and feedback where the setting says so."""
    del reply
    shown = [Section("sibling", attempt.sibling)] if attempt.sibling else []
    wanted = {"never": False, "always": True, "without_sibling": not shown}[settings.feedback]
    if wanted and attempt.feedback:
        shown.append(Section("feedback", attempt.feedback))
    return (_user("problem", *shown, "again", "instruction"),) if shown else None


def _sibling_reads(settings: Settings) -> tuple[str, ...]:
    return ("siblings", "feedback") if settings.feedback != "never" else ("siblings",)


def _feedback(settings: Settings, attempt: Attempt, reply: replies.Reply) -> Conversation | None:
    del settings, reply
    if not attempt.feedback:
        return None
    feedback = Section("feedback", attempt.feedback)
    return (_user("problem", feedback, "again", "instruction"),)


# ------------------------------------------------------------------------ written by an author


def _reason_ask(settings: Settings, attempt: Attempt) -> Conversation:
    del settings, attempt
    return (_user("problem", "solution", "reason"),)


def _reason_teach(
    settings: Settings, attempt: Attempt, reply: replies.Reply
) -> Conversation | None:
    """The analysis is the assistant's turn of a proper conversation, then the user goes on.

    Exemplars, about which nothing is ever written, are `reference`.
    """
    if reply == replies.NONE:
        return _reference(settings, attempt, reply)
    if not reply.text:
        return None
    written = Turn("assistant", (Section("analysis", reply.text),))
    return (*_reason_ask(settings, attempt), written, _user("transition", "instruction"))


def _reflection_ask(settings: Settings, attempt: Attempt) -> Conversation | None:
    """ROSD's two requests: explain an own success, or diagnose a failure beside a success."""
    del settings
    own = Section("attempt", attempt.text)
    if attempt.correct:
        return (_user("tutor", "problem", own, "gold", Section("request", replies.EXPLAIN)),)
    if not attempt.sibling:
        return None
    shown = Section("sibling", attempt.sibling)
    request = Section("request", replies.DIAGNOSE)
    return (_user("tutor", "problem", shown, own, "gold", request),)


def _reflection(settings: Settings, attempt: Attempt, reply: replies.Reply) -> Conversation | None:
    """The explanation alone: the sibling's solution is not shown, except as published on failure
    (`parity.reflection_fallback`)."""
    if reply.text:
        return (_user("problem", Section("reflection", reply.text), "again", "instruction"),)
    return _sibling(settings, attempt, reply) if settings.fallback else None


def _critique_ask(settings: Settings, attempt: Attempt) -> Conversation:
    del settings
    own, request = Section("attempt", attempt.text), Section("request", replies.CRITIQUE)
    return (_user("tutor", "problem", own, "gold", request),)


def _critique(settings: Settings, attempt: Attempt, reply: replies.Reply) -> Conversation | None:
    """The corrected trace in the attempt's own steps; the wrong step is nowhere quoted."""
    del settings, attempt
    if not reply.trace:
        return None
    return (_user("problem", Section("critique", reply.trace), "again", "instruction"),)


def _solution(settings: Settings) -> tuple[str, ...]:
    del settings
    return ("solution",)


def _answer(settings: Settings) -> tuple[str, ...]:
    del settings
    return ("answer",)


CONTEXTS: dict[str, Context] = {
    "reference": Context(_reference, needs=_solution),
    "crosslingual": Context(
        _crosslingual,
        needs=_crosslingual_needs,
        settings=("context.problem_en", "context.solution"),
    ),
    "reason_first": Context(
        _reason_teach,
        ask=_reason_ask,
        needs=_solution,
        reads=lambda settings: ("reply",),
        authors=("student", "teacher", "server", "file"),
        settings=("context.section_tokens",),
    ),
    "reflection": Context(
        _reflection,
        ask=_reflection_ask,
        needs=_answer,
        reads=lambda settings: ("reply", "attempt", "siblings"),
        authors=("student", "teacher", "grader", "server", "file"),
        locates_error=True,
        settings=(
            "context.sibling", "context.feedback", "context.section_tokens", "context.leak",
            "parity.reflection_tags", "parity.reflection_fallback",
        ),
    ),
    "critique": Context(
        _critique,
        ask=_critique_ask,
        needs=_answer,
        reads=lambda settings: ("reply", "attempt"),
        authors=("student", "teacher", "grader", "server", "file"),
        locates_error=True,
        settings=("context.section_tokens",),
    ),
    "sibling": Context(
        _sibling,
        needs=_answer,
        reads=_sibling_reads,
        settings=("context.sibling", "context.feedback", "context.section_tokens"),
    ),
    "feedback": Context(
        _feedback,
        needs=_answer,
        reads=lambda settings: ("feedback",),
        settings=("context.section_tokens",),
    ),
    "other_problem": Context(
        _other_problem,
        needs=lambda settings: ("solution", "answer"),
        reads=lambda settings: ("other",),
    ),
    "none": Context(_none),
}  # fmt: skip


def _context(settings: Settings) -> Context:
    if settings.kind not in CONTEXTS:
        choices = ", ".join(CONTEXTS)
        raise ValueError(f"context.kind is {settings.kind!r}: the choices are {choices}")
    return CONTEXTS[settings.kind]


def needs(settings: Settings) -> tuple[str, ...]:
    """The fields of a row that the teacher's prompt is made of."""
    return _context(settings).needs(settings)


def reads(settings: Settings) -> tuple[str, ...]:
    """Which of `READS` the teacher's prompt is made of, besides the row."""
    return _context(settings).reads(settings)


def ideal(row: problem_row.Row, worked: str) -> Attempt:
    """The attempt that a row's own solution makes: what an exemplar stands for."""
    return Attempt(row, worked, True, "The answer is right.", worked, row)


def ask(settings: Settings, attempt: Attempt) -> Conversation | None:
    """The conversation that a writer completes; None where there is nothing to ask about."""
    return _context(settings).ask(settings, attempt)


def writer_prompt(
    tokenizer: prompts.Tokenizer, spec: prompts.Spec, settings: Settings, attempt: Attempt
) -> prompts.Prompt | None:
    """`ask` as ids, without exemplars: no data holds a reply to show."""
    conversation = ask(settings, attempt)
    if conversation is None:
        return None
    conversation, shortened = fit(tokenizer, settings, conversation)
    prompt = prompts.build(tokenizer, spec, attempt.row, conversation)
    return dataclasses.replace(prompt, shortened=shortened)


def teach(
    tokenizer: prompts.Tokenizer,
    spec: prompts.Spec,
    settings: Settings,
    attempt: Attempt,
    reply: replies.Reply = replies.NONE,
    shots: Sequence[tuple[Attempt, replies.Reply]] = (),
) -> prompts.Prompt | None:
    """The prompt under which the teacher scores the student's tokens.

    Args:
      reply: what the writer wrote.
      shots: the exemplars with the replies that stand for them, in the context's own format.

    Returns:
      None where the context has nothing to teach.

    Raises:
      ValueError: an exemplar gives no context.
    """
    context = _context(settings)
    conversation = context.teach(settings, attempt, reply)
    if conversation is None:
        return None
    conversation, shortened = fit(tokenizer, settings, conversation)
    examples = []
    for shot, written in shots:
        shown = context.teach(settings, shot, written)
        if shown is None:
            raise ValueError(f"exemplar {shot.row.id!r} gives no context {settings.kind!r}")
        examples.append((shot.row, shown))
    prompt = prompts.build(tokenizer, spec, attempt.row, conversation, examples)
    return dataclasses.replace(prompt, shortened=shortened)


def privileged(settings: Settings, attempt: Attempt, reply: replies.Reply) -> str:
    """What the teacher is shown and the student is not: solutions, translations, written texts."""
    conversation = _context(settings).teach(settings, attempt, reply) or ()
    texts = []
    for part in (part for turn in conversation for part in turn.sections):
        row = part.row or attempt.row
        own = {"solution": row.solution, "problem_en": row.problem_en}.get(part.kind, "")
        texts += [text for text in (part.text, own) if text]
    return "\n".join(texts)


def fit(
    tokenizer: prompts.Tokenizer, settings: Settings, conversation: Conversation
) -> tuple[Conversation, tuple[str, ...]]:
    """Cuts the sections of `BUDGETED` to `section_tokens` tokens each (0: no budget).

    Returns:
      The conversation, and the kinds of the sections that were cut.
    """
    if not settings.section_tokens:
        return conversation, ()
    cut = []

    def fitted(part: Section) -> Section:
        if part.kind not in BUDGETED:
            return part
        text = prompts.shorten(tokenizer, part.text, settings.section_tokens)
        if text != part.text:
            cut.append(part.kind)
        return part._replace(text=text)

    turns = tuple(Turn(turn.role, tuple(map(fitted, turn.sections))) for turn in conversation)
    return turns, tuple(cut)
