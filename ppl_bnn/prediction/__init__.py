"""Posterior + inputs -> predictive draws and their summaries.

May import: data, guides, models, distributed, native, the ground.
"""
