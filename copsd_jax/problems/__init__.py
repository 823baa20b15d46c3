"""Problems as rows: sources and readers, languages, bundled files, and the rows of a step.

May import: nothing of the package.
"""
