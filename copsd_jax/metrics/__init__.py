"""Scores with confidence intervals, token statistics, metric files, and terminal output.

May import: runtime.
"""
