"""On-policy self-distillation of language models in JAX."""
