"""What trains the student: one file and one table entry a method."""

from copsd_jax.methods import distill, grpo, sft

METHODS = {"distill": distill, "grpo": grpo, "sft": sft}
