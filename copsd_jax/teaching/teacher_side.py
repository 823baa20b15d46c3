"""Builds a run's teacher prompts, which share one format, one context and the same exemplars."""

import dataclasses

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
          attempt: the completion, and the facts about it that contexts may read.
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


def shortest_attempt(row: problem_row.Row) -> contexts.Attempt:
    """Returns an attempt in which every part is present and as short as possible."""
    return contexts.Attempt(row, "-", False, "-", "-", row)
