"""Checks prompt lengths against the limits in the settings and the model's number of positions."""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from copsd_jax.config import settings as config_lib
from copsd_jax.model import transformer
from copsd_jax.problems import problem_row
from copsd_jax.teaching import contexts, conversations, prompts, teacher_side, text_encoding


class FittingRows(NamedTuple):
    """The rows whose prompts are within the limit.

    Attributes:
      rows: the rows, in their original order.
      longest: number of tokens in the longest prompt of each side.
      dropped: the number of rows left out, by reason.
    """

    rows: list[problem_row.Row]
    longest: dict[str, int]
    dropped: collections.Counter


def keep_fitting(
    rows: Sequence[problem_row.Row], build: Callable[[problem_row.Row], prompts.Prompt], side: str,
    section: str, config: config_lib.Config,
) -> FittingRows:  # fmt: skip
    """Returns the rows whose prompts have at most `<section>.max_tokens` tokens.

    Args:
      rows: the candidates.
      build: function that builds a row's prompt.
      side: name of the side of the prompts, used as the key in the result's `longest`.
      section: the section of the settings that sets the limit: prompt or teacher.
      config: the run's settings; `data.overlong` says whether a long prompt is an error.

    Raises:
      ValueError: no row fits, or a row does not fit and data.overlong is error.
    """
    setting, limit = f"{section}.max_tokens", config[section].max_tokens
    lengths = []

    def build_and_measure(row: problem_row.Row) -> prompts.Prompt:
        prompt = build(row)
        lengths.append(prompt.length)
        return prompt

    kept, gone = prompts.keep_fitting_rows(
        rows, build_and_measure, limit, setting=setting, overlong=config.data.overlong
    )
    if rows and not kept:
        path = config[source := "eval" if side == "evaluation" else "data"].path
        raise ValueError(
            f"{setting} is {limit}: no prompt of {path} ({source}.path) fits; the shortest has "
            f"{min(lengths)} tokens"
        )
    dropped = collections.Counter({f"prompt above {setting}={limit}": gone} if gone else {})
    return FittingRows(kept, {side: max((n for n in lengths if n <= limit), default=0)}, dropped)


def keep_fitting_training(
    rows: Sequence[problem_row.Row], config: config_lib.Config,
    student: conversations.PromptFormat, teacher: teacher_side.TeacherSide,
) -> FittingRows:  # fmt: skip
    """Returns the training rows whose prompts fit; for SFT, their solutions must fit too.

    Args:
      rows: the candidates.
      config: the run's settings.
      student: the format of the student's prompts.
      teacher: the object that has the tokenizer and builds the teacher's prompts. Teacher prompts
        are measured with the shortest possible attempt and reply.

    Raises:
      ValueError: rows do not fit (see `keep_fitting`), or student and teacher start in different
        states of the chat template.
    """
    build = functools.partial(prompts.build_student_prompt, teacher.tokenizer, student)
    fitting = keep_fitting(rows, build, "student", "prompt", config)
    if not config_lib.traits(config).samples:
        return _keep_rows_with_short_solutions(fitting, config, teacher.tokenizer, student)
    if not config_lib.traits(config).teacher:
        return fitting
    taught = keep_fitting(fitting.rows, teacher.build_shortest, "teacher", "teacher", config)
    for row in taught.rows[:1]:
        shortest, allow = teacher.build_shortest(row), config.parity.template_mismatch
        prompts.check_template_states(build(row), shortest, allow)
    longest, dropped = fitting.longest | taught.longest, fitting.dropped + taught.dropped
    return FittingRows(taught.rows, longest, dropped)


def _keep_rows_with_short_solutions(
    fitting: FittingRows, config: config_lib.Config, tokenizer: text_encoding.Tokenizer,
    student: conversations.PromptFormat,
) -> FittingRows:  # fmt: skip
    """Returns the rows whose solution (the target of SFT) fits into `rollout.max_tokens`."""
    limit, kept, rows = config.rollout.max_tokens, [], fitting.rows
    for row in rows:
        state = prompts.build_student_prompt(tokenizer, student, row).state
        length = len(prompts.encode_target(tokenizer, student, row, config.rollout.stop, state))
        if length > limit and config.data.overlong == "error":
            raise ValueError(
                f"row {row.id!r} has a solution of {length} tokens, but rollout.max_tokens is "
                f"{limit}; data.overlong=drop leaves such rows out"
            )
        kept += [row] if length <= limit else []
    if rows and not kept:
        raise ValueError(
            f"rollout.max_tokens is {limit}: no solution of {config.data.path} (data.path) fits"
        )
    long = {f"solution above rollout.max_tokens={limit}": len(rows) - len(kept)}
    return fitting._replace(rows=kept, dropped=fitting.dropped + collections.Counter(long))


def check_room(config: config_lib.Config, longest: dict[str, int], room: int, place: str) -> None:
    """Checks that a model or a server has room for the longest prompts and their completions.

    Args:
      config: the run's settings, with the limits of completions.
      longest: for each side to check, the number of tokens in its longest prompt.
      room: maximum number of tokens of a prompt and its completion together.
      place: the words that name the maximum `room` in the error message.

    Raises:
      ValueError: the room is too small; the message names the side and the setting.
    """
    completion = config.rollout.max_tokens
    limits = {
        "student": ("rollout.max_tokens", completion),
        "teacher": ("rollout.max_tokens", completion),
        "evaluation": ("eval.max_tokens", config.eval.max_tokens or completion),
        "author": ("author.max_tokens", config.author.max_tokens),
    }
    for side, (name, tokens) in limits.items():
        if side in longest and longest[side] + tokens > room:
            raise ValueError(
                f"{name} is {tokens}: added to the longest {side} prompt ({longest[side]} tokens), "
                f"this exceeds {place}"
            )


def bound_teacher(
    config: config_lib.Config,
    context: contexts.Settings,
    model_config: transformer.ModelConfig,
    shortest: int,
) -> int:
    """Returns an upper bound for the number of tokens of a teacher prompt in a step.

    Args:
      config: the run's settings.
      context: the privileged context; replies and siblings' answers make prompts longer.
      model_config: the shape of the model, including the maximum number of positions.
      shortest: a lower bound for the longest teacher prompt: the longest over all rows, with
        attempts and replies as short as possible.
    """
    reads = contexts.list_inputs(context)
    tokens = shortest + (config.author.max_tokens if "reply" in reads else 0)
    tokens += config.rollout.max_tokens if "siblings" in reads else 0
    return min(tokens, teacher_limit(config, model_config))


def teacher_limit(config: config_lib.Config, model_config: transformer.ModelConfig) -> int:
    """Returns the maximum number of tokens of a teacher prompt; steps leave out longer prompts."""
    return min(config.teacher.max_tokens, model_config.max_position - config.rollout.max_tokens)


def drop_overlong(
    config: config_lib.Config,
    model_config: transformer.ModelConfig,
    students: Sequence[prompts.Prompt],
    teachers: Sequence[prompts.Prompt | None],
) -> tuple[list[prompts.Prompt | None], int]:
    """Replaces a step's overlong teacher prompts with None, and counts them.

    Args:
      config: the run's settings.
      model_config: the shape of the model, including the maximum number of positions.
      students: the student's prompt of each completion.
      teachers: the teacher's prompt of each completion; None for a completion without a teacher
        prompt.

    Returns:
      The teacher's prompts, and the number of overlong prompts.

    Raises:
      ValueError: a prompt is overlong and data.overlong is error, or the two sides start in
        different states of the chat template.
    """
    kept, overlong = [], 0
    limit = teacher_limit(config, model_config)
    for student, teacher in zip(students, teachers, strict=True):
        if teacher is not None:
            prompts.check_template_states(student, teacher, config.parity.template_mismatch)
        if teacher is not None and teacher.length > limit:
            if config.data.overlong == "error":
                raise ValueError(
                    f"teacher.max_tokens is {config.teacher.max_tokens}: a teacher prompt with its "
                    f"context has {teacher.length} tokens, but there is room for {limit}"
                )
            teacher, overlong = None, overlong + 1
        kept.append(teacher)
    return kept, overlong
