"""How a training step uses the random weights: Pyro handlers that answer a layer's message."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from ppl_bnn.guides.estimators.base import Estimator, Uses
from ppl_bnn.guides.estimators.flipout import Flipout
from ppl_bnn.guides.estimators.groups import GroupedFlips
from ppl_bnn.guides.estimators.local import LocalReparameterization

# `plain` is the model as it stands: one weight draw shared by the whole batch.
ESTIMATORS: dict[str, Callable[[], AbstractContextManager]] = {
    "plain": nullcontext,
    "flipout": Flipout,
    "flipout-bfloat16": partial(Flipout, torch.bfloat16),
    "groups": GroupedFlips,
    "local": LocalReparameterization,
}

__all__ = ["ESTIMATORS", "Estimator", "Flipout", "GroupedFlips", "LocalReparameterization", "Uses"]
