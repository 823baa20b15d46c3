"""The training methods, with one file per method, and the authors of contexts.

May import: config, problems, runtime, teaching, losses, sampler, servers, training.
"""
