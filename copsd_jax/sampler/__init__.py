"""The sampler: prefill, insert and decode on slots; a slot is refilled when its text ends.

May import: runtime, attention, losses, model.
"""
