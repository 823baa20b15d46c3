"""The sampler, which decodes one text per slot and refills a slot when its text ends.

May import: runtime, attention, losses, model.
"""
