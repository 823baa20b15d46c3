"""Files that hold weights, adapters or tokenizers, and the local paths of models.

May import: runtime, model.
"""
