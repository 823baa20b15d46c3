"""The methods, one file each, and the authors of contexts.

May import: problems, runtime, teaching, losses, model, sampler, servers, training.
"""
