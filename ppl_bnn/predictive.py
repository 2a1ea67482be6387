"""The posterior predictive by Monte Carlo: p(y | x) = (1/S) sum_s softmax(logits_s)."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyro
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn
from tqdm import tqdm

from ppl_bnn import metrics
from ppl_bnn.guides.mean_field import MeanFieldNormal
from ppl_bnn.models.evaluating import evaluating
from ppl_bnn.training import Interrupted


@dataclass(frozen=True)
class Predictive:
    """S draws of the predictive of N examples.

    Attributes:
        probs: softmax of each draw's logits for the examples kept, float32 [S, K, C]; all examples unless `keep` said.
        kept: the examples' positions, int64 [K].
        log_likelihood: log p(label | draw) of every example, float32 [S, N].
        labels: int64 [N].
        mean_probs: the averaged predictive, float64 [N, C].
        mean_entropy: mean over draws of each draw's entropy, nats, float64 [N].
        accuracies: accuracy of each single draw, float32 [S]. The network's accuracy is that of `mean_probs`.
        seconds: time spent on drawing weights and on forward passes.
    """

    probs: Tensor
    kept: Tensor
    log_likelihood: Tensor
    labels: Tensor
    mean_probs: Tensor
    mean_entropy: Tensor
    accuracies: Tensor
    seconds: float

    def summary(self) -> dict[str, float]:
        """num_samples, seconds, accuracy, nll, ece and brier, all but the first two of the averaged predictive."""
        return {
            "num_samples": len(self.log_likelihood),
            "seconds": self.seconds,
            "accuracy": metrics.accuracy(self.mean_probs, self.labels),
            "nll": metrics.nll(self.log_likelihood),
            "ece": metrics.ece(self.mean_probs, self.labels),
            "brier": metrics.brier(self.mean_probs, self.labels),
        }

    def uncertainties(self) -> tuple[Tensor, Tensor, Tensor]:
        """Total, aleatoric and epistemic uncertainty, nats, each [N]."""
        return metrics.uncertainties(self.mean_probs, self.mean_entropy)


def predict(
    net: nn.Module,
    guide: MeanFieldNormal,
    x: Tensor,
    y: Tensor,
    *,
    num_samples: int = 400,
    seed: int = 0,
    batch_size: int = 2000,
    keep: Tensor | None = None,
    progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> Predictive:
    """Draw S networks from the guide and predict every example with each.

    A draw is one function over all of `x`: its weights are drawn once, from (seed, draw index). Memory beside the
    stored output does not depend on S.

    Args:
        net: the network inside the model (``Classifier.net``), [B, ...] -> logits [B, C].
        guide: its posterior, pruned or not; a guide without sites (a deterministic network) gives S equal draws.
        x, y: inputs [N, ...] and labels [N].
        num_samples: S.
        keep: positions [K] of the examples whose probabilities are kept for every draw; all of them unless given.

    Raises:
        ValueError: S < 1, no examples, or labels that do not fit.
        Interrupted: `should_stop` said so.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(f"x and y need the same number of examples, at least 1; got {len(x)} and {len(y)}")
    kept = torch.arange(len(x)) if keep is None else keep
    stored: Tensor | None = None
    log_likelihood = torch.empty(num_samples, len(x))
    accuracies = torch.empty(num_samples)
    mean_probs: Tensor | float = 0.0
    mean_entropy: Tensor | float = 0.0
    seconds, started = 0.0, time.perf_counter()
    draws = draw_logits(net, guide, x, num_samples=num_samples, seed=seed, batch_size=batch_size)
    for s, logits in enumerate(tqdm(draws, total=num_samples, disable=not progress, unit="draw", dynamic_ncols=True)):
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        seconds += time.perf_counter() - started
        if stored is None:
            _check_labels(y, logits.shape[1])
            stored = torch.empty(num_samples, len(kept), logits.shape[1])
        log_probs = F.log_softmax(logits.float(), -1)
        probs = log_probs.exp()
        stored[s] = probs[kept.to(probs.device)]
        log_likelihood[s] = log_probs.gather(1, y.unsqueeze(1)).squeeze(1)
        accuracies[s] = (logits.argmax(-1) == y).float().mean()
        mean_probs = mean_probs + probs.double()
        mean_entropy = mean_entropy + metrics.entropy(probs).double()
        if should_stop() and s + 1 < num_samples:
            raise Interrupted(f"stopped after draw {s + 1} of {num_samples}")
        started = time.perf_counter()
    assert stored is not None
    assert isinstance(mean_probs, Tensor)
    assert isinstance(mean_entropy, Tensor)
    means = (mean_probs.cpu() / num_samples, mean_entropy.cpu() / num_samples)
    return Predictive(stored, kept.cpu(), log_likelihood, y.cpu(), *means, accuracies, seconds)


def draw_logits(
    net: nn.Module, guide: MeanFieldNormal, x: Tensor, *, num_samples: int, seed: int = 0, batch_size: int = 2000
) -> Iterator[Tensor]:
    """Yield the logits [N, C] of draw 0, 1, ... S - 1, each the same whichever draws are asked for."""
    for index in range(num_samples):
        with evaluating(net), pyro.get_param_store().scope():
            conditioned = poutine.condition(net, data=guide.draw(index, seed=seed))
            logits = torch.cat([conditioned(batch) for batch in x.split(batch_size)])
        yield logits


def _check_labels(y: Tensor, classes: int) -> None:
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(f"labels must be from 0 to {classes - 1}, got {int(y.min())} to {int(y.max())}")
