"""Fine-tuning: train what pruning left, so that the surviving weights take over from the others."""

import copy
import dataclasses
from typing import Any

from ppl_bnn.inference.svi import fit
from ppl_bnn.models.model import Model
from ppl_bnn.pruning.masks import Pruned


def finetune(
    model: Model, pruned: Pruned, x: Any, y: Any = None, *, epochs: int, **settings: Any
) -> tuple[Model, Pruned]:
    """Go on training the surviving weights and the point estimates; return the new model and posterior.

    Pruned weights stay exactly zero: they have no noise, no gradient and no part in the KL. Model and posterior that
    were passed in stay as they are.

    Args:
        model: the Pyro model the posterior was trained in.
        x, y: training inputs [N, ...] and observed values [N, ...], or other data, as in `ppl_bnn.fit`.
        epochs, **settings: as in `ppl_bnn.fit`.

    Raises:
        UserError, Diverged, Interrupted: as `ppl_bnn.fit` does.
    """
    model, guide = copy.deepcopy(model), copy.deepcopy(pruned.guide)
    fit(model, guide, x, y, epochs=epochs, **settings)
    return model, dataclasses.replace(pruned, guide=guide)
