"""Warnings about the classes of training and held-out examples."""

import logging

import torch

from ppl_bnn.data.splits import Split
from ppl_bnn.errors import some

log = logging.getLogger(__name__)


def warn_of_classes(train: Split, held_out: Split) -> None:
    """Log a line if held-out or test examples have classes that no training example has.

    Log another line if a ``validation`` split, which is the last training examples, lacks classes of the others: rows
    that are sorted by class look like that.
    """
    if not train.classes:
        return
    known, there = (set(part.targets.unique().tolist()) for part in (train, held_out))
    if new := sorted(there - known):
        log.warning(
            "data: %d of %d %s examples are of classes that no training example has: %s; no network learns them",
            int(torch.isin(held_out.targets, torch.tensor(new)).sum()), len(held_out), held_out.split,
            some(name for label, name in enumerate(train.classes) if label in new),
        )  # fmt: skip
    if held_out.split == "validation" and len(there) < len(known):
        log.warning(
            "data: the last %d examples, which are held out, have %d classes, and the training examples %d: if the "
            "data are sorted by class, shuffle them",
            len(held_out), len(there), len(known),
        )  # fmt: skip
