"""Ahead-of-time compilation of a run for devices that are not present, and its report.

May import: config, runtime, losses, model, sampler, weights, training.
"""
