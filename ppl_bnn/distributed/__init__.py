"""Training on several processes: who the ranks are, what they say to each other, and their gradients.

May import: the ground.
"""

from ppl_bnn.distributed.buckets import COMPRESSIONS, GradientBuckets, check_buckets
from ppl_bnn.distributed.communicator import Alone, Calls, Communicator, RankLost, shard
from ppl_bnn.distributed.connect import connect
from ppl_bnn.distributed.digest import first_unequal
from ppl_bnn.distributed.horovod_backend import run_elastic

__all__ = [
    "COMPRESSIONS", "Alone", "Calls", "Communicator", "GradientBuckets", "RankLost", "check_buckets", "connect",
    "first_unequal", "run_elastic", "shard",
]  # fmt: skip
