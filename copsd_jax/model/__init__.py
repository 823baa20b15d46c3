"""The decoder of all model families, LoRA adapters, and keys and values of shared prefixes.

May import: runtime, attention.
"""
