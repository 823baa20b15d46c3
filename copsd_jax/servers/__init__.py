"""Servers over HTTP: their client, and completions drawn by one instead of the sampler.

May import: runtime, sampler.
"""
