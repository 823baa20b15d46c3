"""Files of weights, adapters and tokenizers, and the local paths of models.

May import: model.
"""
