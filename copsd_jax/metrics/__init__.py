"""Scores with intervals, statistics of tokens, metric files, and output for a terminal.

May import: nothing of the package.
"""
