"""The ranks of a training: who they are, what they send each other, and how their gradients are averaged.

May import: the ground.
"""

from ppl_bnn.distributed.buckets import GradientBuckets
from ppl_bnn.distributed.communicator import Alone, Calls, Communicator, RankLost, shard
from ppl_bnn.distributed.connect import connect, is_first, leave
from ppl_bnn.distributed.digest import first_unequal
from ppl_bnn.distributed.horovod_backend import run_elastic

__all__ = [
    "Alone", "Calls", "Communicator", "GradientBuckets", "RankLost", "connect",
    "first_unequal", "is_first", "leave", "run_elastic", "shard",
]  # fmt: skip
