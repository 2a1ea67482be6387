"""Log likelihoods of the training data as ArviZ InferenceData: `train_log_likelihood.nc`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ppl_bnn.data import Split
from ppl_bnn.prediction.log_density import TrainLogLikelihood
from ppl_bnn.results.idata import assemble, dataset, dims_of


def train_to_inference_data(
    likelihood: TrainLogLikelihood, data: Split | Tensor, *, attrs: Mapping[str, Any] | None = None
) -> Any:
    """Return what leave-one-out cross-validation needs as InferenceData, all in nats.

    Groups: `log_likelihood` (y [chain, draw, obs_id] of the training examples), `sample_stats` (each draw's log_prior
    and log_q, the densities of its weights, and lp: log_prior + the sum of its log likelihoods), `observed_data` (y).

    Args:
        data: the training data, or the observed y [N, ...].
    """
    y = data if isinstance(data, Tensor) else data.targets
    obs = np.arange(len(y))
    by_draw = ("chain", "draw")
    log_joint = likelihood.log_prior + likelihood.log_likelihood.double().sum(1)
    groups = {
        "log_likelihood": dataset({"y": ((*by_draw, "obs_id"), likelihood.log_likelihood[None])}, obs_id=obs),
        "sample_stats": dataset(
            {
                "log_prior": (by_draw, likelihood.log_prior[None]),
                "log_q": (by_draw, likelihood.log_q[None]),
                "lp": (by_draw, log_joint[None]),
            }
        ),
        "observed_data": dataset({"y": (dims_of(y, "y"), y)}, obs_id=obs),
    }
    title = f"{len(y)} examples" if isinstance(data, Tensor) else data.title
    return assemble(groups, {"title": title, **(attrs or {})})
