"""LoRA adapters, the keys and values of shared prefixes, and the decoder of all model families.

May import: runtime, attention.
"""
