"""Row attention for training and prefill, decode attention to a cache, and their Pallas kernels.

May import: runtime.
"""
