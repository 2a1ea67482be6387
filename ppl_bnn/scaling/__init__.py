"""The scaling study: throughput by number of ranks, a cost model, and hosts rehearsed on one machine.

May import: experiment, results, pruning, inference, prediction, data, guides, models, distributed, native, the ground.
"""
