"""The divergence of student and teacher, its Pallas kernels, and the policy loss.

May import: runtime.
"""
