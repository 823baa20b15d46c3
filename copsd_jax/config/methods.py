"""The table of methods, with the traits that determine which settings and programs are used."""

from typing import NamedTuple


class Method(NamedTuple):
    """The traits of a method; `methods/<name>.py` makes its batches.

    Attributes:
      samples: whether the student samples completions. If not, the completions are the solutions
        in the data.
      teacher: whether a teacher scores the completions under a context, and the loss is a
        divergence.
      policy_gradient: whether the loss is the policy gradient.
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
    """Returns the names of the methods that have the trait; `trait` is a field of `Method`."""
    return tuple(name for name, method in METHODS.items() if getattr(method, trait))
