"""Pallas kernels that compute the divergence on TPU and GPU, in tiles of the vocabulary.

May import: runtime, and files of losses that do not import pallas.
"""
