"""Weights, adapters and tokenizers in their file formats, and where they are found.

May import: model.
"""
