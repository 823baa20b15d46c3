"""The decoder of all model families, LoRA adapters, and keys of shared prefixes.

May import: runtime, attention.
"""
