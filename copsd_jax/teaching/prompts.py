"""Prompts: conversations as token ids, for training, baselines and evaluation alike.

The student's conversation is `conversations.STUDENT`; the teacher's come from `contexts`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from copsd_jax.config import setting_list
from copsd_jax.problems.problem_row import Row
from copsd_jax.teaching import conversations, text_encoding
from copsd_jax.teaching.conversations import Conversation, PromptFormat
from copsd_jax.teaching.text_encoding import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as token ids: `prefix_ids + ids`.

    Attributes:
      prefix_ids: the exemplars; equal in all prompts of one prompt format and context.
      ids: the rest, not empty.
      text: the whole prompt for people.
      state: the template state in which the completion starts: "closed" (after an empty think
        block), "unopened" (before the template's think block), "open" (inside one) or "plain"
        (the template has no thinking).
      shortened: kinds of the sections that context.section_tokens truncated.
    """

    prefix_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    state: str
    shortened: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """The number of tokens, exemplars included."""
        return len(self.prefix_ids) + len(self.ids)


# ------------------------------------------------------------------------------- chat template


@functools.lru_cache(maxsize=4)
def has_thinking(tokenizer: Tokenizer) -> bool:
    """Tells whether the chat template has a thinking switch: `enable_thinking` changes its text.

    Raises:
      ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError("prompt.template is 'chat', but the tokenizer has no chat template")
    message = [{"role": "user", "content": "x"}]
    return _render(tokenizer, message, "on") != _render(tokenizer, message, "off")


def _render(tokenizer: Tokenizer, messages: list[dict], thinking: str) -> str:
    """Renders messages by the chat template, up to the start of the assistant's turn."""
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    if thinking != "none":
        options["enable_thinking"] = thinking != "off"
    text = tokenizer.apply_chat_template(messages, **options)
    assert isinstance(text, str)  # tokenize=False; the annotation has other types too
    return text


def check_thinking(tokenizer: Tokenizer, template: str, thinking: str, setting: str) -> None:
    """Refuses a kind of thinking that the template does not have.

    Args:
      tokenizer: the model's tokenizer.
      template: "chat" or "plain".
      thinking: one of `setting_list.THINKING`.
      setting: the name of the setting that `thinking` comes from, for the message.

    Raises:
      ValueError: names the setting and the choices.
    """
    if template == "plain":
        choices, why = ("none",), "prompt.template is 'plain'"
    elif has_thinking(tokenizer):
        choices = setting_list.THINKING[1:]
        why = "the tokenizer's chat template has a thinking switch"
    else:
        choices, why = ("none",), "the tokenizer's chat template has no thinking switch"
    if thinking not in choices:
        raise ValueError(f"{setting} is {thinking!r}: {why}, so the choices are {choices}")


def _find_state(text: str, thinking: str) -> str:
    """Returns the template state at the end of a rendered prompt (`Prompt.state`).

    Contents must be guarded: a think block that one of them quotes does not count.
    """
    if re.search(r"<think>\s*</think>\s*$", text):
        return "closed"
    if re.search(r"<think>\s*$", text):
        return "open"
    return "plain" if thinking == "none" else "unopened"


def _build_chat_prompt(
    tokenizer: Tokenizer, thinking: str, messages: list[dict], start: int, opening: str
) -> Prompt:
    """Renders messages by the chat template and encodes them.

    Messages before `start` become the prefix; `opening` is the text of an open think block.
    """
    guard = text_encoding.Guard(tokenizer, [message["content"] for message in messages] + [opening])
    guarded = [{**message, "content": guard(message["content"])} for message in messages]
    guarded[start]["content"] = guard.mark + guarded[start]["content"]
    text = _render(tokenizer, guarded, thinking)
    if text.count(guard.mark) != 1:
        raise ValueError("the chat template does not show each message exactly once")
    state = _find_state(text, thinking)
    if thinking == "prefix":
        # As in COPSD: the template allows thinking, and the block is opened here if it is not.
        text += guard(opening) if state == "open" else "<think>\n" + guard(opening)
        state = "open"
    cut = _find_shared_end(tokenizer, text, text.index(guard.mark)) if start else 0
    text = text.replace(guard.mark, "")
    encode = functools.partial(text_encoding.encode_templated, tokenizer, literal=guard.literal)
    shown = text_encoding.restore_tokens(text, guard.literal)
    return Prompt(encode(text[:cut]), encode(text[cut:]), shown, state)


def _find_shared_end(tokenizer: Tokenizer, text: str, end: int) -> int:
    """Returns the start of the last special token before `end`, which no token crosses."""
    _, pattern = text_encoding.find_added_tokens(tokenizer)
    starts = [match.start() for match in pattern.finditer(text, 0, end)]
    if not starts:
        raise ValueError(
            "prompt.exemplars needs a chat template that starts turns with a special token"
        )
    return starts[-1]


# ---------------------------------------------------------------------------------- plain text


@functools.lru_cache(maxsize=64)
def _encode_plain_prefix(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Encodes the exemplars as they are encoded if another block follows."""
    encoding = text_encoding.encode_text(tokenizer, text + conversations.PLAIN_START)
    count = sum(end <= len(text) for _, end in encoding.offsets)
    return tuple(encoding.ids[:count])


def _build_plain_prompt(tokenizer: Tokenizer, shared: str, own: str) -> Prompt:
    """Encodes plain text, behind the start token if the tokenizer puts one in front of texts."""
    start = tuple(tokenizer.encode("", add_special_tokens=True))
    start = start[:1] if start[:1] == (tokenizer.bos_token_id,) else ()
    prefix = _encode_plain_prefix(tokenizer, shared) if shared else ()
    ids = tuple(text_encoding.encode_text(tokenizer, shared + own).ids)
    if ids[: len(prefix)] != prefix:
        raise ValueError(
            f"the tokenizer merges the exemplars of prompt.exemplars with the text behind them, "
            f"{own[:40]!r}: set prompt.exemplars=0 or prompt.template=chat"
        )
    if not shared:
        return Prompt((), start + ids, own, "plain")
    return Prompt(start + prefix, ids[len(prefix) :], shared + own, "plain")


# ---------------------------------------------------------------------------------- prompts


def build_prompt(
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    row: Row,
    conversation: Conversation,
    exemplars: Sequence[tuple[Row, Conversation]] = (),
) -> Prompt:
    """Builds the prompt whose completion answers `conversation` about `row`.

    Args:
      tokenizer: the model's tokenizer.
      prompt_format: the form of the prompt; its own exemplars are not used.
      row: the problem.
      conversation: the conversation; it ends with a user's turn.
      exemplars: rows with their conversations, each of which is answered with its solution.

    Raises:
      ValueError: the template does not have `prompt_format.thinking`, or an exemplar has no
        solution.
    """
    check_thinking(tokenizer, prompt_format.template, prompt_format.thinking, "a side's thinking")
    for shown, turns in (*exemplars, (row, conversation)):
        conversations.check_sections(shown, turns)
    worked = [conversations.write_worked_completion(prompt_format, shot) for shot, _ in exemplars]
    if prompt_format.template == "plain":
        shared = ""
        for (shot, turns), text in zip(exemplars, worked, strict=True):
            block = conversations.render_plain_text(shot, turns)
            shared += f"{block} {conversations.join_lines(text)}{conversations.PLAIN_GAP}"
        own = conversations.render_plain_text(row, conversation)
        return _build_plain_prompt(tokenizer, shared, own)
    messages = []
    for (shot, turns), text in zip(exemplars, worked, strict=True):
        messages += conversations.render_messages(prompt_format, shot, turns)
        messages.append({"role": "assistant", "content": text})
    start = len(messages)
    messages += conversations.render_messages(prompt_format, row, conversation)
    opening = prompt_format.languages[row.lang].think_prefix.strip()
    return _build_chat_prompt(tokenizer, prompt_format.thinking, messages, start, opening)


def encode_target(
    tokenizer: Tokenizer, prompt_format: PromptFormat, row: Row, stop: Sequence[str], state: str
) -> tuple[int, ...]:
    """Encodes the completion that SFT trains: the row's solution and answer, and an end.

    Args:
      tokenizer: the model's tokenizer.
      prompt_format: the form of the student's prompts.
      row: the problem.
      stop: rollout.stop. In plain text the first of these strings ends the completion; without one,
        and in the chat template, the tokenizer's end token does.
      state: the state of the prompt. If it is "open", the think block is closed first, since an
        answer inside it does not count.

    Raises:
      ValueError: the row has no solution or answer, or the tokenizer no end token.
    """
    completion = conversations.write_worked_completion(prompt_format, row)
    if prompt_format.template == "plain":
        completion = f" {conversations.join_lines(completion)}"
        if stop:
            return tuple(text_encoding.encode_text(tokenizer, completion + stop[0]).ids)
    end: Any = tokenizer.eos_token_id
    if end is None:
        raise ValueError("method=sft needs a tokenizer with an end token; this one has none")
    closing = "\n</think>\n\n" if state == "open" else ""
    closed = text_encoding.encode_templated(tokenizer, closing, {})
    return (*closed, *text_encoding.encode_text(tokenizer, completion).ids, end)


def build_student_prompt(tokenizer: Tokenizer, prompt_format: PromptFormat, row: Row) -> Prompt:
    """Builds the student's prompt, with the exemplars of its format."""
    student = conversations.STUDENT
    shots = [(shot, student) for shot in prompt_format.exemplars]
    return build_prompt(tokenizer, prompt_format, row, student, shots)


def check_template_states(student: Prompt, teacher: Prompt, allow: bool) -> None:
    """Refuses prompts after which student and teacher start in different template states.

    Args:
      student: a student's prompt.
      teacher: the teacher's prompt of the same completion.
      allow: parity.template_mismatch, which accepts them.

    Raises:
      ValueError: the states differ.
    """
    if student.state != teacher.state and not allow:
        raise ValueError(
            f"the student's completion starts in state {student.state!r} and the teacher's in "
            f"{teacher.state!r}: set prompt.thinking and teacher.thinking alike, or "
            "parity.template_mismatch=True where a published recipe has it"
        )


def keep_fitting_rows(
    rows: Sequence[Row], build: Callable[[Row], Prompt], limit: int, *, setting: str, overlong: str
) -> tuple[list[Row], int]:
    """Keeps the rows whose prompt has at most `limit` tokens; no prompt is truncated.

    Args:
      rows: the rows.
      build: builds a row's prompt.
      limit: tokens that a prompt may have.
      setting: the setting that `limit` comes from, for the message.
      overlong: data.overlong: "drop", or "error" to raise at the first longer prompt.

    Returns:
      The rows that are kept, and the number of the others.

    Raises:
      ValueError: a prompt is longer and `overlong` is "error".
    """
    kept = []
    for row in rows:
        length = build(row).length
        if length > limit and overlong == "error":
            raise ValueError(
                f"row {row.id!r} has a prompt of {length} tokens, {setting} is {limit}; "
                "data.overlong=drop leaves such rows out"
            )
        if length <= limit:
            kept.append(row)
    return kept, len(rows) - len(kept)
