"""Posterior + inputs -> predictive draws and their summaries.

May import: guides, models, distributed, native, errors, metrics, files.
"""
