"""Pallas kernels of the divergence for TPU and GPU, over blocks of the vocabulary.

May import: runtime, and from losses divergences and token_blocks.
"""
