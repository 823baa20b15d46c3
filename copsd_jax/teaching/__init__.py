"""Builds prompts from contexts, reads authors' replies, and selects the tokens that carry loss.

May import: config, problems, rewards, runtime.
"""
