"""The variational posterior and the ways a training step uses its random weights."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from ppl_bnn.guides.flipout import Flipout
from ppl_bnn.guides.groups import GroupedFlips
from ppl_bnn.guides.local import LocalReparameterization
from ppl_bnn.guides.mean_field import MeanFieldNormal

# `plain` is the model as it stands: one weight draw shared by the whole batch.
ESTIMATORS: dict[str, Callable[[], AbstractContextManager]] = {
    "plain": nullcontext,
    "flipout": Flipout,
    "flipout-bfloat16": partial(Flipout, torch.bfloat16),
    "groups": GroupedFlips,
    "local": LocalReparameterization,
}

__all__ = ["ESTIMATORS", "Flipout", "GroupedFlips", "LocalReparameterization", "MeanFieldNormal"]
