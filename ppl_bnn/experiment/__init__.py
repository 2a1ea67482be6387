"""A run folder: its settings, their checks, the stages, the report, and many runs at once.

May import: all rooms but scaling.
"""
