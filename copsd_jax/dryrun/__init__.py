"""Ahead-of-time compilation of a run for absent devices, and a report on memory and time.

May import: config, runtime, attention, losses, model, sampler, weights, training.
"""
