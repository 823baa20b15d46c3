"""Loads problems as rows: the sources, the languages, the bundled files, and each step's rows.

May import: nothing of the package.
"""
