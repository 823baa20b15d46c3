"""What trains the student: one file and one table entry a method."""

from copsd_jax.methods import distill

METHODS = {"distill": distill}
