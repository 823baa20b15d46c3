"""HTTP servers: a client for chat completions, and an engine that samples completions on a server.

May import: config, runtime, sampler.
"""
