"""Which examples of a step a rank works on."""

from torch import Tensor


def shard(rows: Tensor, rank: int, size: int) -> tuple[Tensor, float]:
    """Rank `rank`'s part of a global batch of example numbers [B], and what its mean counts in the global mean.

    Parts differ by one example at most and are disjoint; together they are the batch. With n examples here the mean
    over the batch is the mean over the ranks of (n * size / B) times the mean over each part. Where there are fewer
    examples than ranks a part is empty: its rank is given the batch's first example with a weight of 0, and so takes
    part in the step with what does not come from the data.
    """
    part = rows.tensor_split(size)[rank]
    return (part, len(part) * size / len(rows)) if len(part) else (rows[:1], 0.0)
