"""Log likelihoods of the training data as ArviZ InferenceData: `train_log_likelihood.nc`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ppl_bnn.data import Split
from ppl_bnn.prediction.log_density import TrainLogLikelihood
from ppl_bnn.results.idata import assemble, dataset


def train_to_inference_data(
    likelihood: TrainLogLikelihood, data: Split, *, attrs: Mapping[str, Any] | None = None
) -> Any:
    """Return what leave-one-out cross-validation needs as InferenceData, all in nats.

    Groups: `log_likelihood` (y [chain, draw, obs_id] of the training data), `sample_stats` (each draw's log_prior
    and log_q, the densities of its weights, and lp: log_prior + the sum of its log likelihoods), `observed_data` (y).
    """
    obs = np.arange(len(data))
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
        "observed_data": dataset({"y": (("obs_id",), data.targets)}, obs_id=obs),
    }
    return assemble(groups, {"title": data.title, **(attrs or {})})
