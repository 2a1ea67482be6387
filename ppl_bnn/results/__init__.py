"""Predictives as InferenceData, files and figures: the only room that imports ArviZ.

May import: pruning, prediction, inference, data, guides, models, errors, files, metrics.
"""
