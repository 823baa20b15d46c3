"""Pallas kernels of the divergence for TPU and GPU, over blocks of the vocabulary.

May import: runtime, and files of losses that do not import pallas.
"""
