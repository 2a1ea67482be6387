"""The scaling study: throughput by number of ranks, a cost model of it, and rehearsed hosts.

May import: experiment, results, pruning, inference, prediction, data, guides, models, distributed, native, the ground.
"""
