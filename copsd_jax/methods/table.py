"""The methods by name: one file and one entry each."""

from copsd_jax.methods import distill, grpo, sft

METHODS = {"distill": distill, "grpo": grpo, "sft": sft}
