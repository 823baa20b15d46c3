"""Row attention for training and prefill, decode attention over a cache, and kernels for both.

May import: runtime.
"""
