"""Graders of answers, and the reward functions built on them.

May import: nothing of the package.
"""
