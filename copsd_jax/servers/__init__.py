"""Servers over HTTP: a chat client, and completions drawn on a server instead of the sampler.

May import: config, runtime, sampler.
"""
