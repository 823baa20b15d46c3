"""The methods by name, with the traits on which settings and programs depend."""

from typing import NamedTuple


class Method(NamedTuple):
    """The traits of a method, whose batches `methods/<name>.py` makes.

    Attributes:
      samples: the student samples completions; otherwise the data's solutions are the completions.
      teacher: a teacher scores the completions under a context, and a divergence is the loss.
      policy_gradient: the policy gradient is the loss.
    """

    samples: bool = True
    teacher: bool = False
    policy_gradient: bool = False


METHODS = {
    "distill": Method(teacher=True),
    "grpo": Method(policy_gradient=True),
    "sft": Method(samples=False),
}


def with_trait(trait: str) -> tuple[str, ...]:
    """Returns the names of the methods that have a trait of `Method`."""
    return tuple(name for name, method in METHODS.items() if getattr(method, trait))
