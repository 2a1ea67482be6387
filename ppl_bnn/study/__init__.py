"""The study by Sharma and Jennings (2020), redone by this library's own commands and set beside its numbers.

May import: scaling, experiment, results, models, the ground.
"""
