"""The sampler: prefill, insert and decode over slots, which are refilled when their texts end.

May import: runtime, attention, losses, model.
"""
