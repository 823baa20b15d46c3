"""Prompts of the teacher and of authors: the conversations of a context as token ids."""

import dataclasses
from collections.abc import Sequence

from copsd_jax.teaching import contexts, conversations, prompts, replies, text_encoding
from copsd_jax.teaching.contexts import Settings
from copsd_jax.teaching.conversations import Conversation, PromptFormat, Section
from copsd_jax.teaching.replies import Attempt, Reply
from copsd_jax.teaching.text_encoding import Tokenizer

Exemplar = tuple[Attempt, Reply]
# Kinds of sections that context.section_tokens may truncate: texts written by models or graders.
TRUNCATED_SECTIONS = ("attempt", "sibling", "feedback", "reflection", "critique", "analysis")


def build_exemplars(prompt_format: PromptFormat, settings: Settings) -> tuple[Exemplar, ...]:
    """Returns an (attempt, reply) pair per exemplar; the attempt is the exemplar's own solution.

    Raises:
      ValueError: a rule writes the replies, but cannot check an exemplar's solution.
    """
    author = contexts.get_context(settings).author
    write = author.write_exemplar if author else None
    exemplars = []
    for row in prompt_format.exemplars:
        completion = conversations.write_worked_completion(prompt_format, row)
        attempt = Attempt(row, completion, True, "The answer is right.", completion, row)
        exemplars.append((attempt, write(attempt) if write else replies.NONE))
    return tuple(exemplars)


def build_author_prompt(
    tokenizer: Tokenizer, prompt_format: PromptFormat, settings: Settings, attempt: Attempt
) -> prompts.Prompt | None:
    """Builds the prompt that an author completes; returns None if there is nothing to ask.

    The prompt has no exemplars, because the data contain no replies that exemplars could show.
    """
    conversation, shortened = build_author_conversation(tokenizer, settings, attempt)
    if conversation is None:
        return None
    prompt = prompts.build_prompt(tokenizer, prompt_format, attempt.row, conversation)
    return dataclasses.replace(prompt, shortened=shortened)


def build_author_conversation(
    tokenizer: Tokenizer, settings: Settings, attempt: Attempt
) -> tuple[Conversation | None, tuple[str, ...]]:
    """Builds the conversation that an author completes, with long sections truncated.

    Args:
      tokenizer: the tokenizer that counts the tokens of a section.
      settings: the settings of the context; they limit the number of tokens per section.
      attempt: the attempt that the author writes about.

    Returns:
      The conversation, or None if there is nothing to ask. The second value lists the kinds of the
      truncated sections.
    """
    conversation = contexts.get_author(settings).build_conversation(settings, attempt)
    return _truncate_sections(tokenizer, settings, conversation)


def build_teacher_prompt(
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    settings: Settings,
    attempt: Attempt,
    reply: Reply = replies.NONE,
    exemplars: Sequence[Exemplar] = (),
) -> prompts.Prompt | None:
    """Builds the prompt under which the teacher scores the student's tokens.

    Args:
      tokenizer: the model's tokenizer.
      prompt_format: the teacher's prompt format.
      settings: the settings of the context.
      attempt: the student's attempt.
      reply: the author's reply about the attempt.
      exemplars: the attempts and replies of the exemplars, from `build_exemplars`.

    Returns:
      The prompt, or None if the context has nothing to teach about the attempt.

    Raises:
      ValueError: the context has no conversation for an exemplar.
    """
    build = contexts.get_context(settings).build_conversation
    whole = build(settings, attempt, reply)
    conversation, shortened = _truncate_sections(tokenizer, settings, whole)
    if conversation is None:
        return None
    shown = []
    for example, example_reply in exemplars:
        example_conversation = build(settings, example, example_reply)
        if example_conversation is None:
            raise ValueError(
                f"context.kind {settings.kind!r}: there is no conversation for exemplar "
                f"{example.row.id!r}"
            )
        shown.append((example.row, example_conversation))
    prompt = prompts.build_prompt(tokenizer, prompt_format, attempt.row, conversation, shown)
    return dataclasses.replace(prompt, shortened=shortened)


def _truncate_sections(
    tokenizer: Tokenizer, settings: Settings, conversation: Conversation | None
) -> tuple[Conversation | None, tuple[str, ...]]:
    """Truncates sections of the kinds in `TRUNCATED_SECTIONS` to context.section_tokens tokens.

    Returns:
      The conversation, and the kinds of the truncated sections. If context.section_tokens is 0, no
      section is truncated.
    """
    if conversation is None or not settings.section_tokens:
        return conversation, ()
    shortened = []

    def truncate(part: Section) -> Section:
        if part.kind not in TRUNCATED_SECTIONS:
            return part
        text = text_encoding.truncate_text(tokenizer, part.text, settings.section_tokens)
        if text != part.text:
            shortened.append(part.kind)
        return part._replace(text=text)

    turns = tuple(
        turn._replace(sections=tuple(map(truncate, turn.sections))) for turn in conversation
    )
    return turns, tuple(shortened)
