"""The divergence between teacher and student, the policy loss, and their Pallas kernels.

May import: runtime.
"""
