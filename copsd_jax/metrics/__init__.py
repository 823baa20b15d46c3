"""Scores with intervals, statistics of tokens, and what is written and printed of a run.

May import: nothing of the package.
"""
