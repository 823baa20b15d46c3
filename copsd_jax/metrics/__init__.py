"""Scores with intervals, statistics of tokens, metric files, and terminal output.

May import: nothing of the package.
"""
