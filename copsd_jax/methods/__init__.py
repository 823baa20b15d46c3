"""The methods, one file each, and the authors of contexts.

May import: config, problems, runtime, teaching, losses, sampler, servers, training.
"""
