"""Loads problems as rows: sources, languages, bundled files, and the rows of each step.

May import: nothing of the package.
"""
