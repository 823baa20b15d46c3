"""Attention of whole rows, and of single queries to a decode cache; Pallas kernels of both.

May import: runtime.
"""
