"""Devices and their names, sharding, processes, the work directory and checkpoints.

May import: config.
"""
