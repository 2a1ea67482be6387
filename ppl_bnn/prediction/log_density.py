"""What importance sampling needs of each draw: its log likelihood of the training data, its log prior and its log q."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ppl_bnn.errors import Interrupted, UserError
from ppl_bnn.guides.posterior import Posterior, WithDensity, check_num_draws, offered
from ppl_bnn.inputs import Inputs, rows
from ppl_bnn.models import Model
from ppl_bnn.models.sites import log_prior as density_of_prior
from ppl_bnn.prediction.chunks import Chunk, chunks_of, whole_or_examples
from ppl_bnn.prediction.door import check_prediction, checked_y
from ppl_bnn.prediction.predictive import draw_outputs
from ppl_bnn.prediction.running import latents_of_draw, parameter_of


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
    model: Model,
    guide: Posterior,
    x: Any,
    y: Tensor | None = None,
    *,
    num_samples: int = 400,
    seed: int = 0,
    batch_size: int | None = None,
    norm_inputs: Inputs | None = None,
    progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainLogLikelihood:
    """Draw S networks from the guide, the draws of (seed, draw index), and evaluate all three densities of each.

    With them, leave-one-out cross-validation can correct for sampling from q in place of the posterior: the importance
    ratio of draw s is p(w_s) p(y | x, w_s) / q(w_s) (Magnusson et al. 2019, eq. 8).

    Args:
        x, y: the training inputs [N, ...] and labels [N], or whatever `fit` takes; without augmentation.
        norm_inputs: as in `predict`.

    Raises:
        UserError: S < 1, or what `predict` refuses; a posterior without sites or without `log_prob`.
        Interrupted: `should_stop` said so.
    """
    if num_samples < 1:
        raise UserError(f"num_samples must be at least 1, got {num_samples}")
    if not guide.sites:
        raise UserError("the guide has no random weights: a deterministic network has one log likelihood, not draws")
    q = offered(guide, WithDensity, "the training log likelihood", "importance sampling needs the density of its draws")
    check_num_draws(guide, num_samples)
    data = whole_or_examples(model, x, y, parameter_of(model, guide))
    total = data.end if isinstance(data, Chunk) else len(data)
    log_likelihood = torch.empty(num_samples, total, dtype=torch.float32)
    log_prior, log_q = torch.empty(2, num_samples, dtype=torch.double)
    bar = tqdm(total=total * num_samples, disable=not progress, unit="example", unit_scale=True, dynamic_ncols=True)
    with chunks_of(data, parameter_of(model, guide), batch_size=batch_size) as chunks, bar:
        for chunk in chunks:
            target = check_prediction(model, guide, chunk.x, seed=seed, own_model="the training log likelihood")
            labels = checked_y(chunk.y, chunk.x, target)
            if labels is None:
                raise UserError("the training log likelihood needs the observed y of the training data")
            draws = draw_outputs(
                model.net, guide, chunk.x, num_samples=num_samples, seed=seed, batch_size=batch_size,
                norm_inputs=norm_inputs,
            )  # fmt: skip
            for s, outputs in enumerate(draws):
                latents = latents_of_draw(model.likelihood, guide, s, seed=seed) if target.latents else {}
                found = model.likelihood.statistics(outputs.float().unsqueeze(0), labels.cpu(), **latents)
                assert found.log_likelihood is not None
                log_likelihood[s, chunk.first : chunk.end] = found.log_likelihood[0]
                if not chunk.first:
                    draw = guide.draw(s, seed=seed)
                    log_prior[s] = density_of_prior(model, draw, rows(chunk.x, slice(1)), labels[:1])
                    log_q[s] = q.log_prob(draw)
                bar.update(chunk.end - chunk.first)
                if should_stop() and (s + 1 < num_samples or chunk.end < total):
                    raise Interrupted(f"stopped after draw {s + 1} of {num_samples}")
    return TrainLogLikelihood(log_likelihood, log_prior, log_q)
