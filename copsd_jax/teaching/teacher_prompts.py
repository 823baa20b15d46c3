"""Prompts of the teacher and of authors: a context's conversation as token ids."""

import dataclasses
from collections.abc import Sequence

from copsd_jax.teaching import contexts, conversations, prompts, replies, text_encoding

Exemplar = tuple[contexts.Attempt, replies.Reply]
# Sections that context.section_tokens may truncate: only texts that models or graders wrote.
TRUNCATED_SECTIONS = ("attempt", "sibling", "feedback", "reflection", "critique", "analysis")


def build_exemplars(
    prompt_format: conversations.PromptFormat, settings: contexts.Settings
) -> tuple[Exemplar, ...]:
    """Builds the teacher's exemplars: attempts that are right, and the replies about them.

    Raises:
      ValueError: a rule writes the replies, and it cannot check an exemplar's solution.
    """
    author = contexts.get_context(settings).author
    write = author.write_exemplar if author else None
    exemplars = []
    for row in prompt_format.exemplars:
        completion = conversations.write_worked_completion(prompt_format, row)
        attempt = contexts.build_exemplar_attempt(row, completion)
        exemplars.append((attempt, write(attempt) if write else replies.NONE))
    return tuple(exemplars)


def build_author_prompt(
    tokenizer: text_encoding.Tokenizer,
    prompt_format: conversations.PromptFormat,
    settings: contexts.Settings,
    attempt: contexts.Attempt,
) -> prompts.Prompt | None:
    """Builds the prompt that an author completes, or None if there is nothing to ask.

    It has no exemplars, since no data holds a reply to show.
    """
    conversation = contexts.get_author(settings).build_conversation(settings, attempt)
    if conversation is None:
        return None
    conversation, shortened = truncate_sections(tokenizer, settings, conversation)
    prompt = prompts.build_prompt(tokenizer, prompt_format, attempt.row, conversation)
    return dataclasses.replace(prompt, shortened=shortened)


def build_teacher_prompt(
    tokenizer: text_encoding.Tokenizer,
    prompt_format: conversations.PromptFormat,
    settings: contexts.Settings,
    attempt: contexts.Attempt,
    reply: replies.Reply = replies.NONE,
    exemplars: Sequence[Exemplar] = (),
) -> prompts.Prompt | None:
    """Builds the prompt under which the teacher scores the student's tokens.

    Args:
      tokenizer: the model's tokenizer.
      prompt_format: the teacher's prompt format.
      settings: the context.
      attempt: the student's attempt.
      reply: the author's reply about it.
      exemplars: the exemplars' attempts and replies (`build_exemplars`).

    Returns:
      The prompt, or None if the context has nothing to teach about this attempt.

    Raises:
      ValueError: an exemplar gives no context.
    """
    build = contexts.get_context(settings).build_conversation
    conversation = build(settings, attempt, reply)
    if conversation is None:
        return None
    conversation, shortened = truncate_sections(tokenizer, settings, conversation)
    shown = []
    for example, example_reply in exemplars:
        example_conversation = build(settings, example, example_reply)
        if example_conversation is None:
            raise ValueError(f"exemplar {example.row.id!r} gives no context {settings.kind!r}")
        shown.append((example.row, example_conversation))
    prompt = prompts.build_prompt(tokenizer, prompt_format, attempt.row, conversation, shown)
    return dataclasses.replace(prompt, shortened=shortened)


def truncate_sections(
    tokenizer: text_encoding.Tokenizer,
    settings: contexts.Settings,
    conversation: conversations.Conversation,
) -> tuple[conversations.Conversation, tuple[str, ...]]:
    """Truncates each of `TRUNCATED_SECTIONS` to context.section_tokens tokens (0: no limit).

    Returns:
      The conversation, and the kinds of the sections that were truncated.
    """
    if not settings.section_tokens:
        return conversation, ()
    shortened = []

    def truncate(part: conversations.Section) -> conversations.Section:
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
