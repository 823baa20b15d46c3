"""Prompts of student and teacher, contexts, authors' replies, and the tokens that carry loss.

May import: config, problems, rewards.
"""
