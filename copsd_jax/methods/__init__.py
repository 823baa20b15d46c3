"""The methods, one file each, and the authors of contexts.

May import: problems, runtime, teaching, losses, sampler, servers, training.
"""
