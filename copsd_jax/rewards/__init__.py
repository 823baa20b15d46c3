"""Graders of answers, and the reward functions that use graders.

May import: nothing of the package.
"""
