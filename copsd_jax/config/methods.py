"""The table of methods; a method's traits determine which settings and programs a run uses."""

from typing import NamedTuple


class Method(NamedTuple):
    """The traits of a method; `methods/<name>.py` makes the batches of the method.

    Attributes:
      samples: whether the student samples completions; otherwise, the completions are the
        solutions in the data.
      teacher: whether a teacher scores the completions under a context; the loss is then a
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
    """Returns the names of the methods that have a trait; `trait` is a field name of `Method`."""
    return tuple(name for name, method in METHODS.items() if getattr(method, trait))
