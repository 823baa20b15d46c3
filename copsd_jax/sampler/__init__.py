"""The sampler: prefill, insert and decode over slots that are refilled as their texts end.

May import: runtime, attention, losses, model.
"""
