"""The sampler: slots that are refilled, by prefill, insert and decode.

May import: runtime, attention, losses, model.
"""
