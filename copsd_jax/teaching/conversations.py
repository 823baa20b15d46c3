"""Conversations and their wording, for the student, the teacher and authors.

A conversation is a tuple of turns, and a turn has a role and a tuple of sections. Each section has
a kind ("problem", "solution", ...), which names the content of the section. Two tables hold the
wording of each kind of section: `CHAT` for the chat template, and `PLAIN` for plain text.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from copsd_jax.problems import languages, problem_row
from copsd_jax.teaching import solution_steps


class Section(NamedTuple):
    """A part of a turn."""

    kind: str  # a key of `PLAIN`
    text: str = ""  # the text to show; "" if a row or the wording provides the text
    row: problem_row.Row | None = None  # the row to show; None for the prompt's own row


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str  # user or assistant
    sections: tuple[Section, ...]


Conversation = tuple[Turn, ...]

STUDENT: Conversation = (Turn("user", (Section("problem"), Section("instruction"))),)


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """The form of all prompts for the student, the teacher, an evaluation or an author.

    Attributes:
      template: "chat" (the tokenizer's chat template) or "plain" (text with the labels of `PLAIN`).
      thinking: "none" if the template has no thinking switch. A template with a thinking switch
        allows "off" (an empty think block), "on" (the model may open a think block) and "prefix"
        (the prompt opens a think block and writes the first words of the thinking in the problem's
        language).
      answer: a key of `ANSWER_FORMS`; it sets how a final answer is requested and written.
      languages: the languages by code.
      exemplars: the worked examples before every prompt.
      form: "plain", or "step_tags" if each step of an answer is written in `<step_k>` tags.
      date: the date that the chat template may show as today's date, such as "2026-01-31"; "" for
        the current date.
    """

    template: str
    thinking: str
    answer: str
    languages: Mapping[str, languages.Language]
    exemplars: tuple[problem_row.Row, ...] = ()
    form: str = "plain"
    date: str = ""


def join_prompt_lines(text: str) -> str:
    """Joins the lines of a text; in plain text, a line break would end a block or a completion."""
    return " ".join(text.split())


def _plain_solution(row: problem_row.Row) -> str:
    return join_prompt_lines(row.solution) + (f" ({row.answer})" if row.answer else "")


# The plain wording. The line break before a block is part of the block. All prompts of the student
# and of the teacher end in "Answer:", so the first completion token follows the same text on both
# sides.
PLAIN: dict[str, Callable[[problem_row.Row, Section], str]] = {
    "problem": lambda row, part: f"Question: {join_prompt_lines(row.problem)}",
    "problem_en": lambda row, part: f"\nEnglish question: {join_prompt_lines(row.problem_en)}",
    "solution": lambda row, part: f"\nReference solution: {_plain_solution(part.row or row)}",
    "reason": lambda row, part: "\nAnalysis:",
    "analysis": lambda row, part: f" {join_prompt_lines(part.text)}",
    "transition": lambda row, part: "",
    "tutor": lambda row, part: "",
    "attempt": lambda row, part: f"\nAttempt: {join_prompt_lines(part.text)}",
    "gold": lambda row, part: f"\nFinal answer: {join_prompt_lines(row.answer)}",
    "request": lambda row, part: f"\n{join_prompt_lines(part.text)}\nReply:",
    "sibling": lambda row, part: f"\nA correct answer: {join_prompt_lines(part.text)}",
    "feedback": lambda row, part: f"\nFeedback: {join_prompt_lines(part.text)}",
    "reflection": lambda row, part: f"\nHint: {join_prompt_lines(part.text)}",
    "critique": lambda row, part: f"\nCorrected steps: {join_prompt_lines(part.text)}",
    "again": lambda row, part: "",
    "note": lambda row, part: f"\n{join_prompt_lines(part.text)}",
    "instruction": lambda row, part: "\nAnswer:",
}

PLAIN_START = "Question:"  # the text that every plain conversation starts with

PLAIN_GAP = "\n\n"  # follows each exemplar


# The chat wording: the blocks of a turn, separated by a blank line, in the order of the sections.
# An instruction after a transition starts on the next line, without a blank line in between.
CHAT: dict[str, Callable[[languages.Language, problem_row.Row, Section], str]] = {
    "problem": lambda lang, row, part: f"{lang.label_problem}: {row.problem}",
    "problem_en": lambda lang, row, part: f"{lang.label_problem_en}: {row.problem_en}",
    "solution": lambda lang, row, part: (
        f"{lang.label_solution}:\n{lang.begin_reference}\n{(part.row or row).solution}\n"
        f"{lang.end_reference}"
    ),
    "reason": lambda lang, row, part: lang.reason_first,
    "analysis": lambda lang, row, part: part.text,
    "transition": lambda lang, row, part: lang.transition,
    # As in the papers, the entries below are in English, whatever the language of the problem.
    "tutor": lambda lang, row, part: TUTOR,
    "attempt": lambda lang, row, part: f"An attempt:\n{_fence('Attempt', part.text)}",
    "gold": lambda lang, row, part: f"The final answer is known: {row.answer}",
    "request": lambda lang, row, part: part.text,
    "sibling": lambda lang, row, part: (
        f"A correct answer from another attempt:\n{_fence('Answer', part.text)}"
    ),
    "feedback": lambda lang, row, part: f"Feedback on an earlier attempt:\n{part.text}",
    "reflection": lambda lang, row, part: (
        f"The key idea, found by reflecting on an earlier attempt:\n{part.text}"
    ),
    "critique": lambda lang, row, part: (
        f"The steps of an earlier attempt, corrected:\n{_fence('Trace', part.text)}"
    ),
    "again": lambda lang, row, part: AGAIN,
    "note": lambda lang, row, part: part.text,  # for contexts whose text is in no field of a row
}

TUTOR = "You are a careful tutor. You keep exactly to the format that is asked for."

AGAIN = "Now solve the problem above correctly."

STEP_TAGS = (
    "Put each step in tags of its own, <step_1>...</step_1>, <step_2>...</step_2> and so on, and "
    "the final answer behind the last step."
)

CHOICE = "Reason step by step, and give the letter of the right choice as <answer>letter</answer>."

ANSWER_FORMS = {
    "boxed": r"\boxed{{{}}}",
    "answer_is": "The answer is {}.",
    "choice": "<answer>{}</answer>",
    "none": "{}",
}

INSTRUCTIONS: dict[str, Callable[[languages.Language], str]] = {
    "boxed": lambda lang: lang.instruction,
    "answer_is": lambda lang: lang.instruction_answer_is,
    "choice": lambda lang: CHOICE,  # in English for every language, like STEP_TAGS
    "none": lambda lang: "",  # the problem itself says how to answer
}


def _fence(name: str, text: str) -> str:
    return f"--- {name} begins ---\n{text}\n--- {name} ends ---"


def _tag_steps(solution: str) -> str:
    steps = solution_steps.split_steps(solution)
    return " ".join(f"<step_{s.number}>{s.text}</step_{s.number}>" for s in steps)


def write_worked_completion(prompt_format: PromptFormat, row: problem_row.Row) -> str:
    """Writes a completion from a row's solution and answer.

    This function writes the completions of exemplars and the targets of SFT.

    Raises:
      ValueError: the row has no solution or no answer.
    """
    if not row.solution or not row.answer:
        raise ValueError(
            f"row {row.id!r} needs a solution and an answer: it is an exemplar or a target of SFT"
        )
    solution = _tag_steps(row.solution) if prompt_format.form == "step_tags" else row.solution
    return f"{solution} {ANSWER_FORMS[prompt_format.answer].format(row.answer)}"


def _render_chat_turn(prompt_format: PromptFormat, row: problem_row.Row, turn: Turn) -> str:
    """Returns the content of a message: the sections of the turn, separated by blank lines."""
    lang = prompt_format.languages[row.lang]
    text = ""
    for k, part in enumerate(turn.sections):
        gap = "" if not k else "\n" if turn.sections[k - 1].kind == "transition" else "\n\n"
        if part.kind != "instruction":
            text += gap + CHAT[part.kind](lang, row, part)
            continue
        tags = STEP_TAGS * (prompt_format.form == "step_tags")
        instructions = [INSTRUCTIONS[prompt_format.answer](lang), tags]
        text += gap * any(instructions) + " ".join(filter(None, instructions))
    return text


def check_sections(row: problem_row.Row, conversation: Conversation) -> None:
    """Checks that no field shown in the conversation is empty.

    Raises:
      ValueError: a field is empty; the message names the row and the field.
    """
    for part in (part for turn in conversation for part in turn.sections):
        shown = part.row or row
        field = "answer" if part.kind == "gold" else part.kind
        if field in ("problem", "problem_en", "solution", "answer") and not getattr(shown, field):
            raise ValueError(f"row {shown.id!r} has no {field}, but its prompt shows this field")


def render_plain_text(row: problem_row.Row, conversation: Conversation) -> str:
    """Renders a conversation as plain text with labels."""
    return "".join(PLAIN[s.kind](row, s) for turn in conversation for s in turn.sections)


def render_messages(
    prompt_format: PromptFormat, row: problem_row.Row, conversation: Conversation
) -> list[dict[str, str]]:
    """Renders a conversation as messages with `role` and `content`, for a chat template."""
    return [
        {"role": turn.role, "content": _render_chat_turn(prompt_format, row, turn)}
        for turn in conversation
    ]
