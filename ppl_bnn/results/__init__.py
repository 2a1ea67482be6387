"""Predictives as InferenceData, files and figures: the only room that imports ArviZ.

May import: pruning, inference, prediction, data, guides, models, distributed, native, the ground.
"""
