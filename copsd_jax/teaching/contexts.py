"""Contexts: the texts that the teacher sees besides the problem.

Each context is an entry of `CONTEXTS`. The entry of a context builds the conversation under which
the teacher scores a completion. The conversation is built from the row, the student's `Attempt`
and, if an author writes for the context, the author's `Reply`. Contexts differ only in the fields
of their entries, so a new context needs only one new entry.

This module imports neither jax nor transformers, because settings are checked against `CONTEXTS`
before jax and transformers are imported.
"""

import dataclasses
from collections.abc import Callable

from copsd_jax.teaching import conversations, replies, rule_author, solution_steps
from copsd_jax.teaching.conversations import Conversation, Section, Turn
from copsd_jax.teaching.replies import Attempt, Reply

# The inputs that a context may read in addition to the row. `methods.distill` provides them.
INPUTS = ("reply", "attempt", "siblings", "feedback", "other")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that contexts read, from the sections `context` and `parity`."""

    kind: str
    problem_en: bool = True
    solution: bool = True
    feedback: str = "never"
    section_tokens: int = 0
    fallback: bool = False  # parity.reflection_fallback
    published_tags: bool = False  # parity.reflection_tags


@dataclasses.dataclass(frozen=True)
class Author:
    """Describes how a context requests a text from an author, and how the author's reply is read.

    Attributes:
      build_conversation: returns the conversation that the author completes, or None if the author
        is not asked about an attempt.
      read: reads the author's text about an attempt. The author may have seen a shortened attempt;
        the function then gets the shortened attempt.
      kinds: the allowed values of author.kind.
      reads_cut: tells whether a reply that was cut off at author.max_tokens is still read.
      write_by_rule: writes the text by a rule (author.kind=grader). The rule reads an attempt, and
        the answer that the grader found in the attempt. `write_by_rule` is None if no rule can
        write the text.
      write_exemplar: returns the reply that is shown for an exemplar. `write_exemplar` is None if
        exemplars have no reply.
    """

    build_conversation: Callable[[Settings, Attempt], Conversation | None]
    read: Callable[[Settings, Attempt, str], Reply]
    kinds: tuple[str, ...] = ("student", "teacher", "server", "file")
    reads_cut: Callable[[Settings], bool] = lambda settings: False
    write_by_rule: Callable[[Attempt, str | None], str] | None = None
    write_exemplar: Callable[[Attempt], Reply] | None = None


@dataclasses.dataclass(frozen=True)
class Context:
    """An entry of `CONTEXTS`; every field except `build_conversation` has a default.

    Attributes:
      build_conversation: returns the teacher's conversation, or None if the context has nothing to
        teach about an attempt. A completion without a conversation carries no loss.
      row_fields: returns the names of the fields that a row must have.
      inputs: returns the members of `INPUTS` that the context reads.
      author: describes the text that an author writes; None if the context needs no author.
      settings: the names of the settings that this context reads, except the settings that all
        contexts read.
      locates_error: whether a reply can say where the attempt has an error. The values from_error
        and error_step of tokens.select need such replies.
    """

    build_conversation: Callable[[Settings, Attempt, Reply], Conversation | None]
    row_fields: Callable[[Settings], tuple[str, ...]] = lambda settings: ()
    inputs: Callable[[Settings], tuple[str, ...]] = lambda settings: ()
    author: Author | None = None
    settings: tuple[str, ...] = ()
    locates_error: bool = False

    @property
    def author_kinds(self) -> tuple[str, ...]:
        """The values of author.kind that the context allows."""
        return self.author.kinds if self.author else ("none",)


def _user(*parts: str | Section) -> Turn:
    return Turn("user", tuple(Section(p) if isinstance(p, str) else p for p in parts))


def _ask_again(*parts: Section) -> Conversation | None:
    """Builds a re-prompt from the parts that have a text; returns None if no part has a text."""
    shown = [part for part in parts if part.text]
    return (_user("problem", *shown, "again", "instruction"),) if shown else None


# ------------------------------------------------------------------------- from the data alone


def _show_reference(settings: Settings, attempt: Attempt, reply: Reply) -> Conversation:
    return (_user("problem", "solution", "transition", "instruction"),)


def _show_crosslingual(settings: Settings, attempt: Attempt, reply: Reply) -> Conversation:
    """Builds COPSD's conversation; the transition is shown only if the solution is shown."""
    english = ("problem_en",) if settings.problem_en else ()
    solution = ("solution", "transition") if settings.solution else ()
    return (_user("problem", *english, *solution, "instruction"),)


def _list_crosslingual_fields(settings: Settings) -> tuple[str, ...]:
    english = ("problem_en",) if settings.problem_en else ()
    return (*english, "solution") if settings.solution else english


def _show_other_problem(settings: Settings, attempt: Attempt, reply: Reply) -> Conversation | None:
    """Builds a control for the context `reference`: a prompt with another problem's solution."""
    if attempt.other is None:
        return None
    solution = Section("solution", row=attempt.other)
    return (_user("problem", solution, "transition", "instruction"),)


def _show_nothing(settings: Settings, attempt: Attempt, reply: Reply) -> Conversation:
    return conversations.STUDENT


# ------------------------------------------------------------------- from the group and the grader


def _show_sibling(settings: Settings, attempt: Attempt, reply: Reply) -> Conversation | None:
    """Builds SDPO's re-prompt from a successful sibling and the feedback that is allowed."""
    sibling = attempt.sibling
    wanted = {"never": False, "always": True, "without_sibling": not sibling}[settings.feedback]
    feedback = attempt.feedback if wanted else ""
    return _ask_again(Section("sibling", sibling), Section("feedback", feedback))


def _list_sibling_inputs(settings: Settings) -> tuple[str, ...]:
    return ("siblings", "feedback") if settings.feedback != "never" else ("siblings",)


def _show_feedback(settings: Settings, attempt: Attempt, reply: Reply) -> Conversation | None:
    return _ask_again(Section("feedback", attempt.feedback))


# ------------------------------------------------------------------------------- from an author


def _ask_analysis(settings: Settings, attempt: Attempt) -> Conversation:
    return (_user("problem", "solution", "reason"),)


def _show_analysis(settings: Settings, attempt: Attempt, reply: Reply) -> Conversation | None:
    """Builds a conversation in which the analysis is the assistant's turn.

    Authors write nothing about exemplars, so exemplars are shown as in the context `reference`.
    """
    if reply == replies.NONE:
        return _show_reference(settings, attempt, reply)
    if not reply.text:
        return None
    analysis = Turn("assistant", (Section("analysis", reply.text),))
    return (*_ask_analysis(settings, attempt), analysis, _user("transition", "instruction"))


def _read_analysis(settings: Settings, attempt: Attempt, text: str) -> Reply:
    return replies.read_analysis(text)


def _ask_reflection(settings: Settings, attempt: Attempt) -> Conversation | None:
    """Builds ROSD's request to explain a successful attempt, or to diagnose a failed attempt.

    A failed attempt is shown next to a successful sibling. Without a successful sibling, the
    function returns None for a failed attempt.
    """
    own = Section("attempt", attempt.text)
    if attempt.correct:
        return (_user("tutor", "problem", own, "gold", Section("request", replies.EXPLAIN)),)
    if not attempt.sibling:
        return None
    shown = Section("sibling", attempt.sibling)
    request = Section("request", replies.DIAGNOSE)
    return (_user("tutor", "problem", shown, own, "gold", request),)


def _show_reflection(settings: Settings, attempt: Attempt, reply: Reply) -> Conversation | None:
    """Builds a conversation that shows the explanation, but not the sibling's solution.

    If the reply is unusable and parity.reflection_fallback is set, the sibling is shown instead, as
    in ROSD's published code.
    """
    if reply.text:
        return _ask_again(Section("reflection", reply.text))
    return _show_sibling(settings, attempt, reply) if settings.fallback else None


def _read_reflection(settings: Settings, attempt: Attempt, text: str) -> Reply:
    published = settings.published_tags
    read = replies.read_published_reflection if published else replies.read_reflection
    return read(text, bool(attempt.correct))


def _ask_critique(settings: Settings, attempt: Attempt) -> Conversation:
    own, request = Section("attempt", attempt.text), Section("request", replies.CRITIQUE)
    return (_user("tutor", "problem", own, "gold", request),)


def _show_critique(settings: Settings, attempt: Attempt, reply: Reply) -> Conversation | None:
    """Builds a conversation that shows the corrected steps, but never the wrong step."""
    return _ask_again(Section("critique", reply.trace))


def _read_critique(settings: Settings, attempt: Attempt, text: str) -> Reply:
    """Reads a critique, and compares it with those steps of the attempt that state no answer."""
    own = [step.text for step in solution_steps.split_steps(attempt.text) if not step.final]
    return replies.verify_critique(replies.read_critique(text), own)


# ------------------------------------------------------------------------------------ the table


CONTEXTS: dict[str, Context] = {
    "reference": Context(_show_reference, row_fields=lambda settings: ("solution",)),
    "crosslingual": Context(
        _show_crosslingual,
        row_fields=_list_crosslingual_fields,
        settings=("context.problem_en", "context.solution"),
    ),
    "reason_first": Context(
        _show_analysis,
        row_fields=lambda settings: ("solution",),
        inputs=lambda settings: ("reply",),
        author=Author(_ask_analysis, _read_analysis, reads_cut=lambda settings: True),
        settings=("context.section_tokens",),
    ),
    "reflection": Context(
        _show_reflection,
        row_fields=lambda settings: ("answer",),
        inputs=lambda settings: ("reply", "attempt", "siblings"),
        author=Author(
            _ask_reflection,
            _read_reflection,
            kinds=("student", "teacher", "grader", "server", "file"),
            reads_cut=lambda settings: settings.published_tags,
            write_by_rule=rule_author.write_reflection,
            write_exemplar=rule_author.write_exemplar_reflection,
        ),
        locates_error=True,
        settings=(
            "context.sibling",
            "context.section_tokens",
            "context.leak",
            "context.feedback",  # read only if parity.reflection_fallback is set
            "parity.reflection_tags",
            "parity.reflection_fallback",
        ),
    ),
    "critique": Context(
        _show_critique,
        row_fields=lambda settings: ("answer",),
        inputs=lambda settings: ("reply", "attempt"),
        author=Author(
            _ask_critique,
            _read_critique,
            kinds=("student", "teacher", "grader", "server", "file"),
            write_by_rule=rule_author.write_critique,
            write_exemplar=rule_author.write_exemplar_critique,
        ),
        locates_error=True,
        settings=("context.section_tokens",),
    ),
    "sibling": Context(
        _show_sibling,
        row_fields=lambda settings: ("answer",),
        inputs=_list_sibling_inputs,
        settings=("context.sibling", "context.feedback", "context.section_tokens"),
    ),
    "feedback": Context(
        _show_feedback,
        row_fields=lambda settings: ("answer",),
        inputs=lambda settings: ("feedback",),
        settings=("context.section_tokens",),
    ),
    "other_problem": Context(
        _show_other_problem,
        row_fields=lambda settings: ("solution", "answer"),
        inputs=lambda settings: ("other",),
    ),
    "none": Context(_show_nothing),
}


def get_context(settings: Settings) -> Context:
    """Returns the entry of `CONTEXTS` that `settings.kind` names.

    Raises:
      ValueError: the kind is unknown; the message lists the choices.
    """
    if settings.kind not in CONTEXTS:
        choices = ", ".join(CONTEXTS)
        raise ValueError(f"context.kind is {settings.kind!r}: the choices are {choices}")
    return CONTEXTS[settings.kind]


def list_row_fields(settings: Settings) -> tuple[str, ...]:
    """Lists the fields that a row must have for the context's prompts."""
    return get_context(settings).row_fields(settings)


def list_inputs(settings: Settings) -> tuple[str, ...]:
    """Lists the members of `INPUTS` that the context reads."""
    return get_context(settings).inputs(settings)


def get_author(settings: Settings) -> Author:
    """Returns the `Author` of the context that `settings.kind` names.

    Raises:
      ValueError: the context has no author.
    """
    author = get_context(settings).author
    if author is None:
        raise ValueError(f"context.kind is {settings.kind!r}: no author writes for this context")
    return author


def read_reply(settings: Settings, attempt: Attempt, text: str) -> Reply:
    """Reads an author's text strictly; an unusable reply keeps only status, quote and raw text.

    Args:
      settings: the settings of a context with an author.
      attempt: the attempt as it was shown to the author.
      text: the author's text.
    """
    reply = get_author(settings).read(settings, attempt, text)
    if replies.STATUSES[reply.status].usable:
        return reply
    return Reply(reply.status, quote=reply.quote, raw=reply.raw)


def join_privileged_text(settings: Settings, attempt: Attempt, reply: Reply) -> str:
    """Joins the texts that the teacher sees and the student does not see, with line breaks.

    The joined texts are solutions, English problems, sibling completions, and texts written by
    graders or authors.
    """
    conversation = get_context(settings).build_conversation(settings, attempt, reply) or ()
    texts = []
    for part in (part for turn in conversation for part in turn.sections):
        row = part.row or attempt.row
        own = {"solution": row.solution, "problem_en": row.problem_en}.get(part.kind, "")
        texts += [text for text in (part.text, own) if text]
    return "\n".join(texts)
