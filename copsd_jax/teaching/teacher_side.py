"""Builds a run's teacher prompts, which share one format, one context and the same exemplars."""

import dataclasses
import functools
from collections.abc import Sequence

from copsd_jax.problems import problem_row
from copsd_jax.teaching import (
    contexts,
    conversations,
    prompts,
    replies,
    teacher_prompts,
    text_encoding,
)


@dataclasses.dataclass(frozen=True)
class TeacherSide:
    """The parts that all prompts of the teacher have in common.

    Attributes:
      tokenizer: the model's tokenizer.
      spec: the teacher's prompt format.
      context: the settings of the privileged context.
      exemplars: the worked examples before every prompt, each with a reply.
    """

    tokenizer: text_encoding.Tokenizer
    spec: conversations.PromptFormat
    context: contexts.Settings
    exemplars: tuple[teacher_prompts.Exemplar, ...]

    def build(
        self, attempt: contexts.Attempt, reply: replies.Reply = replies.NONE
    ) -> prompts.Prompt | None:
        """Builds the prompt for one completion.

        Args:
          attempt: the completion, and the facts about it that contexts may use.
          reply: the author's reply about the completion.

        Returns:
          The prompt, or None if the context has nothing to teach about the attempt.
        """
        return teacher_prompts.build_teacher_prompt(
            self.tokenizer, self.spec, self.context, attempt, reply, self.exemplars
        )

    def build_shortest(self, row: problem_row.Row) -> prompts.Prompt:
        """Builds a row's shortest possible prompt, with the shortest attempt and reply.

        The exemplars and the template state are the same as in every other prompt of the teacher.
        """
        prompt = self.build(shortest_attempt(row), replies.PROBE)
        assert prompt is not None  # the attempt has every part that a context may read
        return prompt

    def measure_author(
        self, kind: str, spec: conversations.PromptFormat, rows: Sequence[problem_row.Row]
    ) -> dict[str, int]:
        """Returns the number of tokens in the longest author prompt, with the shortest attempts.

        The tokenizer of a server is not known. The messages to a server are therefore measured with
        the model's tokenizer, without a chat template.

        Args:
          kind: the value of author.kind.
          spec: the author's prompt format.
          rows: the problems.

        Returns:
          {"author": tokens} if the student or the teacher is the author, {"author_server": tokens}
          if a server is the author, and {} for all other authors.
        """
        attempts, tokenizer = map(shortest_attempt, rows), self.tokenizer
        if kind in ("student", "teacher"):
            build = teacher_prompts.build_author_prompt
            asks = [build(tokenizer, spec, self.context, attempt) for attempt in attempts]
            return {"author": max((prompt.length for prompt in asks if prompt), default=0)}
        if kind != "server":
            return {}
        build, longest = teacher_prompts.build_author_conversation, 0
        for attempt in attempts:
            conversation, _ = build(tokenizer, self.context, attempt)
            messages = conversations.render_messages(spec, attempt.row, conversation or ())
            texts = [message["content"] for message in messages]
            encode = functools.partial(tokenizer.encode, add_special_tokens=False)
            longest = max(longest, sum(len(ids) for ids in map(encode, texts)))
        return {"author_server": longest}


def shortest_attempt(row: problem_row.Row) -> contexts.Attempt:
    """Returns an attempt in which every part is present and as short as possible."""
    return contexts.Attempt(row, "-", False, "-", "-", row)
