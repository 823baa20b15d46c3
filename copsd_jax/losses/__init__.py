"""The divergence of student and teacher, Pallas kernels that compute it, and the policy loss.

May import: runtime.
"""
