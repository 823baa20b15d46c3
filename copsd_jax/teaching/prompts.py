"""Messages to token ids: the one prompt builder of training, baselines and evaluation.

A prompt is a conversation: turns of sections. A section names what it shows ("problem",
"solution", …); how that looks is one table per template, `CHAT` and `PLAIN`, for both sides. The
student's conversation is `STUDENT`; the teacher's come from `contexts`.

Text that comes from data never becomes a special token: template text and contents are
tokenised apart where a content holds the text of one.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
import transformers

from copsd_jax.problems import languages, problem_row
from copsd_jax.teaching import solution_steps

Tokenizer = transformers.PreTrainedTokenizerFast
THINKING = ("none", "off", "on", "prefix")


class Section(NamedTuple):
    """A part of a turn: a key of `CHAT` and `PLAIN`, and its text where no row holds it."""

    kind: str
    text: str = ""
    row: problem_row.Row | None = None  # whose solution is shown, if not the problem's own


class Turn(NamedTuple):
    role: str  # user or assistant
    sections: tuple[Section, ...]


Conversation = tuple[Turn, ...]
STUDENT: Conversation = (Turn("user", (Section("problem"), Section("instruction"))),)


@dataclasses.dataclass(frozen=True)
class Spec:
    """One side's settings.

    Attributes:
      template: "chat" (the tokenizer's own) or "plain" (text with labels, `PLAIN`).
      thinking: "none" for a template without thinking; "off" (empty think block), "on" (the
        model may open one) or "prefix" (opened, with the language's first words) for one with.
      answer: how a final answer is asked for and written, a key of `ANSWERS`.
      languages: the languages by code.
      exemplars: worked examples in front of every prompt.
      form: "plain", or "step_tags" for answers whose steps stand in `<step_k>` tags.
    """

    template: str
    thinking: str
    answer: str
    languages: Mapping[str, languages.Language]
    exemplars: tuple[problem_row.Row, ...] = ()
    form: str = "plain"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as token ids: `prefix_ids + ids`.

    Attributes:
      prefix_ids: the exemplars; equal in all prompts of a side and context.
      ids: the rest, not empty.
      text: the whole prompt for people.
      state: where the completion starts: "closed" (after an empty think block), "unopened"
        (before the template's think block), "open" (inside one), "plain" (thinking is unknown).
      shortened: kinds of the sections that a budget cut (`contexts`).
    """

    prefix_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    state: str
    shortened: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Tokens, exemplars included."""
        return len(self.prefix_ids) + len(self.ids)


# --------------------------------------------------------------------------------- wordings


def _line(text: str) -> str:
    """On one line: in plain text a line break ends a block or a completion."""
    return " ".join(text.split())


def _shown(row: problem_row.Row, part: Section) -> problem_row.Row:
    """Whose solution a section shows."""
    return part.row or row


def _solution_plain(row: problem_row.Row) -> str:
    return _line(row.solution) + (f" ({row.answer})" if row.answer else "")


# The plain wording. A block starts with its line break, and the last one ends in "Answer:" on
# both sides, so that the first completion token has the same place in both formats.
PLAIN: dict[str, Callable[[problem_row.Row, Section], str]] = {
    "problem": lambda row, part: f"Question: {_line(row.problem)}",
    "problem_en": lambda row, part: f"\nEnglish question: {_line(row.problem_en)}",
    "solution": lambda row, part: f"\nReference solution: {_solution_plain(_shown(row, part))}",
    "reason": lambda row, part: "\nAnalysis:",
    "analysis": lambda row, part: f" {_line(part.text)}",
    "transition": lambda row, part: "",
    "tutor": lambda row, part: "",
    "attempt": lambda row, part: f"\nAttempt: {_line(part.text)}",
    "gold": lambda row, part: f"\nFinal answer: {_line(row.answer)}",
    "request": lambda row, part: f"\n{_line(part.text)}\nReply:",
    "sibling": lambda row, part: f"\nA correct answer: {_line(part.text)}",
    "feedback": lambda row, part: f"\nFeedback: {_line(part.text)}",
    "reflection": lambda row, part: f"\nHint: {_line(part.text)}",
    "critique": lambda row, part: f"\nCorrected steps: {_line(part.text)}",
    "again": lambda row, part: "",
    "instruction": lambda row, part: "\nAnswer:",
}
PLAIN_START = "Question:"  # what every block of `PLAIN` starts with
PLAIN_GAP = "\n\n"  # after an exemplar

# The chat wording: blocks of a turn, apart by a blank line, in the order of the sections. The
# instruction follows a transition on the next line.
CHAT: dict[str, Callable[[languages.Language, problem_row.Row, Section], str]] = {
    "problem": lambda lang, row, part: f"{lang.label_problem}: {row.problem}",
    "problem_en": lambda lang, row, part: f"{lang.label_problem_en}: {row.problem_en}",
    "solution": lambda lang, row, part: (
        f"{lang.label_solution}:\n{lang.begin_reference}\n{_shown(row, part).solution}\n"
        f"{lang.end_reference}"
    ),
    "reason": lambda lang, row, part: lang.reason_first,
    "analysis": lambda lang, row, part: part.text,
    "transition": lambda lang, row, part: lang.transition,
    # In English for every language, as the papers have them.
    "tutor": lambda lang, row, part: TUTOR,
    "attempt": lambda lang, row, part: f"An attempt:\n{_fenced('Attempt', part.text)}",
    "gold": lambda lang, row, part: f"The final answer is known: {row.answer}",
    "request": lambda lang, row, part: part.text,
    "sibling": lambda lang, row, part: (
        f"A correct answer from another attempt:\n{_fenced('Answer', part.text)}"
    ),
    "feedback": lambda lang, row, part: f"Feedback on an earlier attempt:\n{part.text}",
    "reflection": lambda lang, row, part: (
        f"The key idea, found by reflecting on an earlier attempt:\n{part.text}"
    ),
    "critique": lambda lang, row, part: (
        f"The steps of an earlier attempt, corrected:\n{_fenced('Trace', part.text)}"
    ),
    "again": lambda lang, row, part: AGAIN,
}
TUTOR = "You are a careful tutor. You keep exactly to the format that is asked for."
AGAIN = "Now solve the problem above correctly."
STEP_TAGS = (
    "Put each step in tags of its own, <step_1>...</step_1>, <step_2>...</step_2> and so on, and "
    "the final answer behind the last step."
)
CHOICE = "Reason step by step, and give the letter of the right choice as <answer>letter</answer>."
ANSWERS = {"boxed": r"\boxed{{{}}}", "answer_is": "The answer is {}."}
ANSWERS |= {"choice": "<answer>{}</answer>", "none": "{}"}
INSTRUCTIONS: dict[str, Callable[[languages.Language], str]] = {
    "boxed": lambda lang: lang.instruction,
    "answer_is": lambda lang: lang.instruction_answer_is,
    "choice": lambda lang: CHOICE,  # in English, as STEP_TAGS
    "none": lambda lang: "",  # the problem says how it is to be answered
}


def _fenced(name: str, text: str) -> str:
    return f"--- {name} begins ---\n{text}\n--- {name} ends ---"


def _tagged(solution: str) -> str:
    tagged, known = "<step_{0}>{1}</step_{0}>".format, solution_steps.split(solution).steps
    return " ".join(tagged(s.number, solution[s.start : s.end]) for s in known)


def worked(spec: Spec, row: problem_row.Row) -> str:
    """The completion that a row's own solution makes: of an exemplar, and the target of SFT.

    Raises:
      ValueError: the row has no solution or no answer.
    """
    if not row.solution or not row.answer:
        raise ValueError(f"row {row.id!r} needs a solution and an answer to be worked through")
    solution = _tagged(row.solution) if spec.form == "step_tags" else row.solution
    return f"{solution} {ANSWERS[spec.answer].format(row.answer)}"


def _content(spec: Spec, row: problem_row.Row, turn: Turn) -> str:
    """A turn's text in the chat template."""
    lang = spec.languages[row.lang]
    text = ""
    for k, part in enumerate(turn.sections):
        gap = "" if not k else "\n" if turn.sections[k - 1].kind == "transition" else "\n\n"
        if part.kind != "instruction":
            text += gap + CHAT[part.kind](lang, row, part)
            continue
        said = [INSTRUCTIONS[spec.answer](lang), STEP_TAGS * (spec.form == "step_tags")]
        text += gap * any(said) + " ".join(filter(None, said))
    return text


# --------------------------------------------------------------------------------- encoding


@functools.lru_cache(maxsize=4)
def _bare(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer without its added tokens: no text gives a special id."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["added_tokens"] = []
    settings["post_processor"] = settings["truncation"] = settings["padding"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(settings))


@functools.lru_cache(maxsize=4)
def _added(tokenizer: Tokenizer) -> tuple[dict[str, int], re.Pattern]:
    """Added tokens (special ones and those like <think>) and a pattern that finds them."""
    vocabulary = dict(tokenizer.get_added_vocab())
    longest_first = sorted(vocabulary, key=len, reverse=True)
    return vocabulary, re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _encode_bare(tokenizer: Tokenizer, text: str) -> tokenizers.Encoding:
    encoding = _bare(tokenizer).encode(text, add_special_tokens=False)
    special = set(encoding.ids) & set(_added(tokenizer)[0].values())
    if special:
        raise ValueError(f"the text {text!r} gives the special token ids {sorted(special)}")
    return encoding


def _encode(tokenizer: Tokenizer, text: str, literal: Mapping[str, str]) -> list[int]:
    """Ids of templated text; the characters of `literal` stand for text that is not special."""
    added, pattern = _added(tokenizer)
    ids, at = [], 0
    for match in [*pattern.finditer(text), None]:
        piece = _restore(text[at : match.start() if match else len(text)], literal)
        ids += _encode_bare(tokenizer, piece).ids if piece else []
        if match:
            ids.append(added[match.group()])
            at = match.end()
    return ids


def _restore(text: str, literal: Mapping[str, str]) -> str:
    return "".join(literal.get(char, char) for char in text) if literal else text


class _Guard:
    """Stands private characters in for special tokens' texts, so that no template sees them."""

    def __init__(self, tokenizer: Tokenizer, contents: Sequence[str]):
        used = set().union(*contents)
        free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
        self.mark = next(free)  # where the last conversation starts
        self._pattern = _added(tokenizer)[1]
        found = {token for text in contents for token in self._pattern.findall(text)}
        self._stand_in = {token: next(free) for token in sorted(found)}
        self.literal = {char: token for token, char in self._stand_in.items()}

    def __call__(self, text: str) -> str:
        return self._pattern.sub(lambda match: self._stand_in[match.group()], text)


@functools.lru_cache(maxsize=4)
def has_thinking(tokenizer: Tokenizer) -> bool:
    """Whether the chat template has a thinking switch (`enable_thinking` changes the text)."""
    if not tokenizer.chat_template:
        raise ValueError("prompt.template is 'chat', but the tokenizer has no chat template")
    message = [{"role": "user", "content": "x"}]
    return _render(tokenizer, message, "on") != _render(tokenizer, message, "off")


def _render(tokenizer: Tokenizer, messages: list[dict], thinking: str) -> str:
    """The template's text up to where the assistant's turn goes on."""
    switch: dict[str, Any] = {} if thinking == "none" else {"enable_thinking": thinking != "off"}
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **switch
    )
    assert isinstance(text, str)
    return text


def check_thinking(tokenizer: Tokenizer, template: str, thinking: str, setting: str) -> None:
    """Raises unless `thinking` can be done with this template; `setting` is its name."""
    if template == "plain":
        choices, why = ("none",), "prompt.template is 'plain'"
    elif has_thinking(tokenizer):
        choices, why = THINKING[1:], "the tokenizer's chat template has a thinking switch"
    else:
        choices, why = ("none",), "the tokenizer's chat template has no thinking switch"
    if thinking not in choices:
        raise ValueError(f"{setting} is {thinking!r}: {why}, so the choices are {choices}")


def _state(text: str, thinking: str) -> str:
    """The template state at the end of a rendered prompt in which contents are guarded."""
    if re.search(r"<think>\s*</think>\s*$", text):
        return "closed"
    if re.search(r"<think>\s*$", text):
        return "open"
    return "plain" if thinking == "none" else "unopened"


def _chat(
    tokenizer: Tokenizer, thinking: str, messages: list[dict], start: int, opening: str
) -> Prompt:
    """Renders messages with the tokenizer's template; those from `start` on are not shared."""
    guard = _Guard(tokenizer, [message["content"] for message in messages] + [opening])
    guarded = [{**message, "content": guard(message["content"])} for message in messages]
    guarded[start]["content"] = guard.mark + guarded[start]["content"]
    text = _render(tokenizer, guarded, thinking)
    if text.count(guard.mark) != 1:
        raise ValueError("the chat template does not show each message exactly once")
    state = _state(text, thinking)
    if thinking == "prefix":
        # The template allows thinking, the block is opened by hand (ALGORITHMS: COPSD).
        text += guard(opening) if state == "open" else "<think>\n" + guard(opening)
        state = "open"
    cut = _cut(tokenizer, text, text.index(guard.mark)) if start else 0
    text = text.replace(guard.mark, "")
    shared, own = (tuple(_encode(tokenizer, t, guard.literal)) for t in (text[:cut], text[cut:]))
    return Prompt(shared, own, _restore(text, guard.literal), state)


def _cut(tokenizer: Tokenizer, text: str, end: int) -> int:
    """The start of the last special token before `end`: tokens never cross that place."""
    starts = [match.start() for match in _added(tokenizer)[1].finditer(text, 0, end)]
    if not starts:
        raise ValueError(
            "prompt.exemplars needs a chat template that starts turns with a special token"
        )
    return starts[-1]


@functools.lru_cache(maxsize=64)
def _plain_prefix(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Tokens of the exemplars as they are when another block follows."""
    encoding = _encode_bare(tokenizer, text + PLAIN_START)
    count = sum(end <= len(text) for _, end in encoding.offsets)
    return tuple(encoding.ids[:count])


def _plain(tokenizer: Tokenizer, shared: str, own: str) -> Prompt:
    """Plain text; it starts with the tokenizer's start token where it has the habit of one."""
    start = tuple(tokenizer.encode("", add_special_tokens=True))
    start = start[:1] if start[:1] == (tokenizer.bos_token_id,) else ()
    prefix = _plain_prefix(tokenizer, shared) if shared else ()
    ids = tuple(_encode_bare(tokenizer, shared + own).ids)
    if ids[: len(prefix)] != prefix:
        raise ValueError(f"the tokenizer merges the exemplars with {own[:40]!r}")
    if not shared:
        return Prompt((), start + ids, own, "plain")
    return Prompt(start + prefix, ids[len(prefix) :], shared + own, "plain")


# ---------------------------------------------------------------------------------- prompts


def build(
    tokenizer: Tokenizer,
    spec: Spec,
    row: problem_row.Row,
    conversation: Conversation,
    shots: Sequence[tuple[problem_row.Row, Conversation]] = (),
) -> Prompt:
    """The prompt whose completion answers `conversation` about `row`.

    Args:
      conversation: ends with a user's turn.
      shots: exemplars with their conversations, each answered with its solution.
    Raises:
      ValueError: the template cannot do `spec.thinking`, or an exemplar has no solution.
    """
    check_thinking(tokenizer, spec.template, spec.thinking, "a side's thinking")
    for shown, turns in [*shots, (row, conversation)]:
        _check_sections(shown, turns)
    if spec.template == "plain":
        shared = "".join(
            _plain_text(shot, turns) + " " + _line(worked(spec, shot)) + PLAIN_GAP
            for shot, turns in shots
        )
        return _plain(tokenizer, shared, _plain_text(row, conversation))
    shown = []
    for shot, turns in shots:
        shown += messages(spec, shot, turns)
        shown.append({"role": "assistant", "content": worked(spec, shot)})
    start = len(shown)
    shown += messages(spec, row, conversation)
    opening = spec.languages[row.lang].think_prefix.strip()
    return _chat(tokenizer, spec.thinking, shown, start, opening)


def _check_sections(row: problem_row.Row, conversation: Conversation) -> None:
    for part in (part for turn in conversation for part in turn.sections):
        shown, field = _shown(row, part), {"gold": "answer"}.get(part.kind, part.kind)
        if field in ("problem", "problem_en", "solution", "answer") and not getattr(shown, field):
            raise ValueError(f"row {shown.id!r} has no {field}, which its prompt shows")


def _plain_text(row: problem_row.Row, conversation: Conversation) -> str:
    return "".join(PLAIN[s.kind](row, s) for turn in conversation for s in turn.sections)


def messages(spec: Spec, row: problem_row.Row, conversation: Conversation) -> list[dict[str, str]]:
    """A conversation as `role` and `content`, in the wording of the chat template."""
    return [{"role": turn.role, "content": _content(spec, row, turn)} for turn in conversation]


def target(
    tokenizer: Tokenizer, spec: Spec, row: problem_row.Row, stop: Sequence[str], state: str
) -> tuple[int, ...]:
    """The completion that SFT trains: `worked`, and what ends it.

    In plain text that is the first of the strings `stop` at which rollouts end, else (and in the
    chat template) the tokenizer's end token. Behind a prompt whose `state` is "open" the think
    block is closed first: an answer inside it would be none.

    Raises:
      ValueError: the row has no solution or answer, or the tokenizer no end token.
    """
    if spec.template == "plain" and stop:
        return tuple(_encode_bare(tokenizer, f" {_line(worked(spec, row))}{stop[0]}").ids)
    end: Any = tokenizer.eos_token_id
    if end is None:
        raise ValueError("method=sft needs a tokenizer with an end token")
    text = f" {_line(worked(spec, row))}" if spec.template == "plain" else worked(spec, row)
    opened = _encode(tokenizer, "\n</think>\n\n", {}) if state == "open" else []
    return (*opened, *_encode_bare(tokenizer, text).ids, end)


def shorten(tokenizer: Tokenizer, text: str, limit: int) -> str:
    """The beginning of a text that has at most `limit` tokens."""
    offsets = _encode_bare(tokenizer, text).offsets
    return text if len(offsets) <= limit else text[: offsets[limit][0]].rstrip()


def student(tokenizer: Tokenizer, spec: Spec, row: problem_row.Row) -> Prompt:
    """What the student sees, in training, baselines and evaluation alike."""
    return build(tokenizer, spec, row, STUDENT, [(shot, STUDENT) for shot in spec.exemplars])


def check_states(student: Prompt, teacher: Prompt, allow: bool) -> None:
    """Raises if the two sides' completions start in different template states.

    Args:
      allow: parity.template_mismatch.
    """
    if student.state != teacher.state and not allow:
        raise ValueError(
            f"the student's completion starts in state {student.state!r} and the teacher's in "
            f"{teacher.state!r}: set prompt.thinking and teacher.thinking alike, or "
            "parity.template_mismatch=True where a published recipe has it"
        )


def within(
    rows: Sequence[problem_row.Row],
    make: Callable[[problem_row.Row], Prompt],
    limit: int,
    *,
    setting: str,
    overlong: str,
) -> tuple[list[problem_row.Row], int]:
    """Rows whose prompt has at most `limit` tokens, and how many had more. Nothing is cut.

    Args:
      make: a row's prompt.
      setting: the setting that `limit` comes from.
      overlong: "drop", or "error" to raise at the first.
    """
    if overlong not in ("drop", "error"):
        raise ValueError(f"data.overlong is {overlong!r}: the choices are drop, error")
    kept = []
    for row in rows:
        length = make(row).length
        if length > limit and overlong == "error":
            raise ValueError(
                f"row {row.id!r} has a prompt of {length} tokens, {setting} is {limit}; "
                "data.overlong=drop leaves such rows out"
            )
        if length <= limit:
            kept.append(row)
    return kept, len(rows) - len(kept)


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Ids as text with special tokens shown, nothing tidied: the inverse of `build`."""
    return tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
