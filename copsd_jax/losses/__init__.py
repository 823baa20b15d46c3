"""The divergence of student and teacher, Pallas kernels for the divergence, and the policy loss.

May import: runtime.
"""
