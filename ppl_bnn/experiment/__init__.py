"""A run folder: its settings, their checks, the stages, the report, and many runs at once.

May import: results, pruning, inference, prediction, data, guides, models, distributed, native, the ground.
"""
