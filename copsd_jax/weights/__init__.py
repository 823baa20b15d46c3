"""Files of weights, adapters and tokenizers, and the places where models are found.

May import: model.
"""
