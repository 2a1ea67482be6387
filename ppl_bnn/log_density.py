"""What importance sampling needs of each draw: its log likelihood of the training data, its log prior and its log q."""

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from ppl_bnn.guides.mean_field import MeanFieldNormal
from ppl_bnn.models import Classifier
from ppl_bnn.models.evaluating import evaluating
from ppl_bnn.training import Interrupted


@dataclass(frozen=True)
class TrainLogLikelihood:
    """S draws from the guide, in nats.

    Attributes:
        log_likelihood: log p(y_i | x_i, draw s), float32 [S, N].
        log_prior: log p(draw s), float64 [S].
        log_q: log q(draw s), float64 [S].
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_q: Tensor


@torch.no_grad()
def train_log_likelihood(
    model: Classifier,
    guide: MeanFieldNormal,
    x: Tensor,
    y: Tensor,
    *,
    num_samples: int = 400,
    seed: int = 0,
    batch_size: int = 2000,
    progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainLogLikelihood:
    """Draw S networks from the guide, the draws of (seed, draw index), and evaluate all three densities of each.

    With them, leave-one-out cross-validation can correct for sampling from q in place of the posterior: the importance
    ratio of draw s is p(w_s) p(y | x, w_s) / q(w_s) (Magnusson et al. 2019, eq. 8).

    Args:
        x, y: the training inputs [N, ...] and labels [N], without augmentation.

    Raises:
        ValueError: S < 1, or a guide without sites, which has no densities.
        Interrupted: `should_stop` said so.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if not guide.sites:
        raise ValueError("the guide has no random weights: a deterministic network has one log likelihood, not draws")
    log_likelihood = torch.empty(num_samples, len(x))
    densities = torch.empty(2, num_samples, dtype=torch.double)
    for s in tqdm(range(num_samples), disable=not progress, unit="draw", dynamic_ncols=True):
        with evaluating(model), pyro.get_param_store().scope():
            draw = guide.draw(s, seed=seed)
            network = poutine.condition(model.net, data=draw)
            logits = torch.cat([network(batch) for batch in x.split(batch_size)])
            priors = poutine.trace(network).get_trace(x[:1]).nodes
        log_likelihood[s] = -F.cross_entropy(logits.float(), y, reduction="none")
        prior = {site: priors[site]["fn"] for site in guide.sites}
        for row, density in enumerate((prior.__getitem__, guide.distribution)):
            # In double precision: the sum runs over all the weights, and only the differences between draws count.
            densities[row, s] = sum(float(density(site).log_prob(draw[site].double())) for site in guide.sites)
        if should_stop() and s + 1 < num_samples:
            raise Interrupted(f"stopped after draw {s + 1} of {num_samples}")
    return TrainLogLikelihood(log_likelihood, *densities)
