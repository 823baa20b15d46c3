"""Prompts: conversations as token ids, for training, baselines and evaluation.

The student's conversation is `conversations.STUDENT`; `contexts` builds the teacher's conversation.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import re
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jinja2

from copsd_jax.config import setting_list
from copsd_jax.problems.problem_row import Row
from copsd_jax.teaching import conversations, text_encoding
from copsd_jax.teaching.conversations import Conversation, PromptFormat
from copsd_jax.teaching.text_encoding import Tokenizer

TEMPLATE_SECONDS = 10.0  # maximum CPU time of a chat template for one short conversation
# A chat template may write this number of characters, plus ten times the messages' length.
TEMPLATE_CHARACTERS = 100_000


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as token ids: `prefix_ids + ids`.

    Attributes:
      prefix_ids: the token ids of the exemplars; they are equal in all prompts with the same format
        and context.
      ids: the token ids after the exemplars; never empty.
      text: the whole prompt as readable text.
      state: the template state in which the completion starts: "closed" (after an empty think
        block), "unopened" (no think block is open yet), "open" (inside a think block) or "plain"
        (the template has no thinking).
      shortened: the kinds of the sections that were truncated to context.section_tokens.
    """

    prefix_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    state: str
    shortened: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """The number of tokens, including the exemplars."""
        return len(self.prefix_ids) + len(self.ids)


# ------------------------------------------------------------------------------- chat template


@functools.lru_cache(maxsize=4)
def has_thinking(tokenizer: Tokenizer) -> bool:
    """Tells whether the chat template has a thinking switch (the variable `enable_thinking`).

    Raises:
      ValueError: the tokenizer has no chat template, or the template fails.
    """
    message = [{"role": "user", "content": "x"}]
    _check_template_powers(tokenizer)
    with _limit_time(TEMPLATE_SECONDS):
        on, off = (_render_chat_template(tokenizer, message, value) for value in ("on", "off"))
    return on != off


def shows_date(tokenizer: Tokenizer) -> bool:
    """Tells whether the chat template can show today's date (the function `strftime_now`)."""
    return "strftime_now" in tokenizer.get_chat_template()


def _render_chat_template(
    tokenizer: Tokenizer, messages: list[dict], thinking: str, date: str = "", prompt: bool = True
) -> str:
    """Renders messages with the chat template.

    With `prompt`, the text ends where the assistant's turn starts.
    """
    if not tokenizer.chat_template:
        raise ValueError("prompt.template is 'chat', but the tokenizer has no chat template")
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt}
    if thinking != "none":
        options["enable_thinking"] = thinking != "off"
    # A chat template is a program, which can raise exceptions of any kind.
    try:
        if date and shows_date(tokenizer):
            options["chat_template"] = (
                _write_prompt_date_macro(date) + tokenizer.get_chat_template()
            )
        text = tokenizer.apply_chat_template(messages, **options)
    except Exception as error:
        raise ValueError(_explain_template(tokenizer, error)) from error
    assert isinstance(text, str)  # tokenize=False gives a str; the annotation allows other types
    shown = sum(len(message["content"]) for message in messages)
    if len(text) > TEMPLATE_CHARACTERS + 10 * shown:
        said = f"it writes {len(text):,} characters for messages of {shown:,}"
        raise ValueError(_explain_template(tokenizer, said))
    return text


def _explain_template(tokenizer: Tokenizer, reason: Any) -> str:
    """Returns the error message for a chat template that cannot be used."""
    said = " ".join(str(reason).split()) or type(reason).__name__
    return (
        f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} cannot be used: {said}; "
        "set prompt.template=plain, or set model.tokenizer to a folder with another template"
    )


def _check_template_powers(tokenizer: Tokenizer) -> None:
    """Refuses a chat template that computes a power.

    A power such as 9**9**9 is a single operation of Python, so no time limit can interrupt it. The
    template engine computes the power while it compiles the template. `f(**options)` is no power.
    """
    found = tokenizer.chat_template
    for template in found.values() if isinstance(found, dict) else (found,):
        if not isinstance(template, str) or "**" not in template:
            continue
        try:
            tokens = list(jinja2.Environment().lex(template))
        except jinja2.TemplateSyntaxError:
            continue  # transformers' template engine will refuse the template
        marks = [(kind, text) for _, kind, text in tokens if kind != "whitespace"]
        for before, mark in itertools.pairwise(marks):
            if mark == ("operator", "**") and before not in (("operator", "("), ("operator", ",")):
                raise ValueError(_explain_template(tokenizer, "it computes a power (**)"))


@contextlib.contextmanager
def _limit_time(seconds: float) -> Iterator[None]:
    """Raises a TimeoutError if Python code in the `with` block uses too much CPU time."""
    former, end = sys.gettrace(), time.thread_time() + seconds

    def trace(frame: types.FrameType, *_: Any) -> Any:
        if time.thread_time() > end:
            raise TimeoutError(f"rendering one short conversation takes more than {seconds:g} s")
        # In templates, every line is traced; elsewhere, only function calls are traced.
        return trace if frame.f_code.co_filename == "<template>" else None

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(former)


@functools.lru_cache(maxsize=4)
def find_turn_end(tokenizer: Tokenizer) -> int | None:
    """Returns the id of the token with which the chat template ends a turn of the assistant.

    Args:
      tokenizer: the model's tokenizer, which must have a chat template.

    Returns:
      The id of the added token that follows the content of an assistant's message; None if no added
      token follows.

    Raises:
      ValueError: the template fails, or it does not start the assistant's turn in a prompt.
    """
    question, answer = {"role": "user", "content": "3 + 4?"}, "assistant's content."
    turns = [question, {"role": "assistant", "content": answer}]
    _check_template_powers(tokenizer)
    with _limit_time(TEMPLATE_SECONDS):
        prompt, bare, whole = (
            _render_chat_template(tokenizer, messages, "none", "2000-01-01", start)
            for messages, start in ((turns[:1], True), (turns[:1], False), (turns, False))
        )
    before, found, _ = whole.rpartition(answer)
    if not found:
        raise ValueError(
            _explain_template(tokenizer, "it does not show the content of an assistant's message")
        )
    # Some templates need no generation prompt, because the answer follows the user's turn directly.
    shared = prompt.rstrip()
    opening = before.removeprefix(shared).strip()
    if prompt == bare and before.startswith(shared) and opening:
        raise ValueError(
            _explain_template(
                tokenizer, "it ignores add_generation_prompt, so prompts would end before "
                f"{opening!r}, and the model would not answer")
        )  # fmt: skip
    end = len(before) + len(answer)
    after = (span for span in text_encoding.find_token_spans(tokenizer, whole) if span[1] > end)
    start, _, token = next(after, (0, 0, None))
    return token if not whole[end:start].strip() else None


@functools.cache
def _write_prompt_date_macro(date: str) -> str:
    """Returns a macro that replaces a chat template's `strftime_now` and gives a fixed date.

    The time of the fixed date is midnight. transformers passes only plain data to a template, so
    the function that reads the clock can be replaced only by a macro in front of the template. The
    template engine removes the newline after the macro.
    """
    day = datetime.datetime.fromisoformat(date)
    codes = [sign + letter for letter in "aAbBcdeHIjmMpSUwWxXyY" for sign in ("%-", "%")]
    filters = "".join(f" | replace('{code}', '{day.strftime(code)}')" for code in codes)
    return f"{{% macro strftime_now(form) %}}{{{{ form{filters} }}}}{{% endmacro %}}\n"


def check_thinking(tokenizer: Tokenizer, template: str, thinking: str, setting: str) -> None:
    """Refuses a thinking mode that the template does not support.

    Args:
      tokenizer: the model's tokenizer.
      template: "chat" or "plain".
      thinking: one of `setting_list.THINKING`.
      setting: the name of the setting that gives `thinking`, for the error message.

    Raises:
      ValueError: the mode is not supported; the message names the setting and the choices.
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

    The special tokens in the messages must be hidden by `text_encoding.Guard`, so that think blocks
    quoted in the messages are ignored.
    """
    if re.search(r"<think>\s*</think>\s*$", text):
        return "closed"
    if re.search(r"<think>\s*$", text):
        return "open"
    return "plain" if thinking == "none" else "unopened"


def _build_chat_prompt(
    tokenizer: Tokenizer, prompt_format: PromptFormat, messages: list[dict], start: int,
    opening: str,
) -> Prompt:  # fmt: skip
    """Renders messages with the chat template and encodes them.

    The messages before index `start` become the prefix. `opening` is the text inside the think
    block that `thinking="prefix"` opens.
    """
    thinking = prompt_format.thinking
    guard = text_encoding.Guard(tokenizer, [message["content"] for message in messages] + [opening])
    guarded = [{**message, "content": guard(message["content"])} for message in messages]
    plain = _render_chat_template(tokenizer, guarded, thinking, prompt_format.date)
    guarded[start]["content"] = guard.mark + guarded[start]["content"]
    text = _render_chat_template(tokenizer, guarded, thinking, prompt_format.date)
    if text.count(guard.mark) != 1:
        raise ValueError("the chat template does not show each message exactly once")
    # If the template repeats a message or writes its length, the mark changes more of the text.
    if text.replace(guard.mark, "") != plain:
        said = "it writes more about messages than their contents, for example their length"
        raise ValueError(_explain_template(tokenizer, said))
    state = _find_state(text, thinking)
    if thinking == "prefix":
        # As in COPSD, the template enables thinking. If the template has not opened a think block,
        # the block is opened here.
        text += guard(opening) if state == "open" else "<think>\n" + guard(opening)
        state = "open"
    own = text.index(guard.mark)
    text = text.replace(guard.mark, "")
    cut = _find_shared_end(tokenizer, text, own) if start else 0
    encode = functools.partial(text_encoding.encode_templated, tokenizer, literal=guard.literal)
    shown = text_encoding.restore_tokens(text, guard.literal)
    return Prompt(encode(text[:cut]), encode(text[cut:]), shown, state)


def _find_shared_end(tokenizer: Tokenizer, text: str, end: int) -> int:
    """Returns the start of the last special token before `end`; no token crosses this position."""
    spans = text_encoding.find_token_spans(tokenizer, text)
    starts = [start for start, _, _ in spans if start < end]
    if not starts:
        raise ValueError(
            "prompt.exemplars needs a chat template that starts turns with a special token"
        )
    return starts[-1]


# ---------------------------------------------------------------------------------- plain text


@functools.lru_cache(maxsize=64)
def _encode_plain_prefix(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Returns the token ids of the exemplars, encoded as if another problem followed."""
    encoding = text_encoding.encode_text(tokenizer, text + conversations.PLAIN_START)
    count = sum(end <= len(text) for _, end in encoding.offsets)
    return tuple(encoding.ids[:count])


def _build_plain_prompt(tokenizer: Tokenizer, shared: str, own: str) -> Prompt:
    """Encodes plain text; the prompt begins with the start token if the tokenizer has one."""
    start = tuple(tokenizer.encode("", add_special_tokens=True))
    start = start[:1] if start[:1] == (tokenizer.bos_token_id,) else ()
    prefix = _encode_plain_prefix(tokenizer, shared) if shared else ()
    ids = tuple(text_encoding.encode_text(tokenizer, shared + own).ids)
    if ids[: len(prefix)] != prefix:
        raise ValueError(
            f"the tokenizer merges the exemplars of prompt.exemplars with the text after them, "
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
    """Builds a prompt that contains the exemplars and, after them, the conversation about `row`.

    Args:
      tokenizer: the model's tokenizer.
      prompt_format: the form of the prompt; the field `exemplars` of this form is ignored.
      row: the problem.
      conversation: the conversation, which ends with a user's turn.
      exemplars: pairs of a row and its conversation; the row's solution answers the conversation.

    Raises:
      ValueError: the template does not support `prompt_format.thinking`, or a row lacks a field
        that the prompt shows.
    """
    check_thinking(tokenizer, prompt_format.template, prompt_format.thinking, "a side's thinking")
    for shown, turns in (*exemplars, (row, conversation)):
        conversations.check_sections(shown, turns)
    worked = [conversations.write_worked_completion(prompt_format, shot) for shot, _ in exemplars]
    if prompt_format.template == "plain":
        shared = ""
        for (shot, turns), text in zip(exemplars, worked, strict=True):
            block = conversations.render_plain_text(shot, turns)
            shared += f"{block} {conversations.join_prompt_lines(text)}{conversations.PLAIN_GAP}"
        own = conversations.render_plain_text(row, conversation)
        return _build_plain_prompt(tokenizer, shared, own)
    messages = []
    for (shot, turns), text in zip(exemplars, worked, strict=True):
        messages += conversations.render_messages(prompt_format, shot, turns)
        messages.append({"role": "assistant", "content": text})
    start = len(messages)
    messages += conversations.render_messages(prompt_format, row, conversation)
    opening = prompt_format.languages[row.lang].think_prefix.strip()
    return _build_chat_prompt(tokenizer, prompt_format, messages, start, opening)


def encode_target(
    tokenizer: Tokenizer, prompt_format: PromptFormat, row: Row, stop: Sequence[str], state: str
) -> tuple[int, ...]:
    """Encodes the target of SFT: the row's solution and answer, then an end token or stop string.

    Args:
      tokenizer: the model's tokenizer.
      prompt_format: the form of the student's prompts.
      row: the problem.
      stop: the stop strings (rollout.stop). In plain text, the first stop string ends the
        completion. With a chat template, the token that ends a turn in the template ends the
        completion. If there is no such string or token, the tokenizer's end token is used.
      state: the state of the prompt. In the state "open", the target first closes the think block,
        because an answer inside a think block does not count.

    Raises:
      ValueError: the row has no solution or no answer, or the tokenizer has no end token.
    """
    completion = conversations.write_worked_completion(prompt_format, row)
    if prompt_format.template == "plain":
        completion = f" {conversations.join_prompt_lines(completion)}"
        if stop:
            return tuple(text_encoding.encode_text(tokenizer, completion + stop[0]).ids)
    end: Any = find_turn_end(tokenizer) if prompt_format.template == "chat" else None
    end = tokenizer.eos_token_id if end is None else end
    if end is None:
        raise ValueError("method=sft needs an end token, but the tokenizer has none")
    closing = "\n</think>\n\n" if state == "open" else ""
    closed = text_encoding.encode_templated(tokenizer, closing, {})
    return (*closed, *text_encoding.encode_text(tokenizer, completion).ids, end)


def build_student_prompt(tokenizer: Tokenizer, prompt_format: PromptFormat, row: Row) -> Prompt:
    """Builds the student's prompt, with the exemplars of `prompt_format`."""
    student = conversations.STUDENT
    shots = [(shot, student) for shot in prompt_format.exemplars]
    return build_prompt(tokenizer, prompt_format, row, student, shots)


def check_template_states(student: Prompt, teacher: Prompt, allow: bool) -> None:
    """Refuses prompts whose completions start in different template states.

    Args:
      student: a student's prompt.
      teacher: the teacher's prompt for the same completion.
      allow: whether different states are accepted (parity.template_mismatch).

    Raises:
      ValueError: the states differ and `allow` is False.
    """
    if student.state != teacher.state and not allow:
        raise ValueError(
            f"the student's completion starts in state {student.state!r} and the teacher's in "
            f"{teacher.state!r}: set prompt.thinking and teacher.thinking to the same value, or "
            "set parity.template_mismatch=True if a published recipe has different states"
        )


def keep_fitting_rows(
    rows: Sequence[Row], build: Callable[[Row], Prompt], limit: int, *, setting: str, overlong: str
) -> tuple[list[Row], int]:
    """Keeps the rows whose prompts have at most `limit` tokens; no prompt is truncated.

    Args:
      rows: the rows.
      build: builds a row's prompt.
      limit: maximum number of tokens of a prompt.
      setting: the name of the setting that gives `limit`, for the error message.
      overlong: the value of data.overlong: "drop" drops rows with longer prompts, and "error"
        raises an error at the first such row.

    Returns:
      The kept rows, and the number of dropped rows.

    Raises:
      ValueError: a prompt is longer than `limit`, and `overlong` is "error".
    """
    kept = []
    for row in rows:
        length = build(row).length
        if length > limit and overlong == "error":
            raise ValueError(
                f"row {row.id!r} has a prompt of {length} tokens, but {setting} is {limit}; "
                "data.overlong=drop leaves such rows out"
            )
        if length <= limit:
            kept.append(row)
    return kept, len(rows) - len(kept)


def restore_think_tag(prompt: Prompt, text: str) -> str:
    """Returns a completion, with a think tag in front if the prompt opened a think block.

    Because of this opening tag, a completion that never closes the block is read as thinking
    without an answer.
    """
    return ("<think>\n" if prompt.state == "open" else "") + text


def find_answer_start(prompt: Prompt, text: str) -> int:
    """Returns the index at which the answer begins, after the last </think>.

    The index is 0 for a text without thinking. The index is the length of the text if the thinking
    is not closed.

    Args:
      prompt: the prompt; `prompt.state` says whether the prompt opened the thinking.
      text: the completion.
    """
    closed = text.rfind("</think>")
    opened = text.rfind("<think>")
    if opened > closed or (closed < 0 and prompt.state == "open"):
        return len(text)
    return closed + len("</think>") if closed >= 0 else 0
