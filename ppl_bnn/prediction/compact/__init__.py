"""The small, fast form of a pruned network.

May import: prediction.plain, guides, models, native, errors.
"""
