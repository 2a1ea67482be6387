"""Figures, drawn from result files alone.

May import: results and what results may.
"""
