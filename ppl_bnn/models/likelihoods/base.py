"""Likelihood: p(y | network outputs), and how draws of its predictive are summarized.

A likelihood of your own is a subclass with one method, `distribution`; everything else has a default that follows from
it. tests/models/likelihood_conformance.py runs any implementation through this contract.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_bnn import number_metrics
from ppl_bnn.errors import UserError
from ppl_bnn.models.evaluating import forked_random, seed_random
from ppl_bnn.models.labels import as_tensor, not_finite, right_answers

Averages = Mapping[str, Tensor]

# Nominal levels at which intervals are scored.
LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class DrawStatistics:
    """What S draws say about N examples, on the CPU.

    Attributes:
        mean: E[y | draw], [S, N, ...]: class probabilities, means. Kept for each draw; its Monte Carlo error is
            tracked.
        log_likelihood: log p(y_i | x_i, draw s), [S, N], nats; None without y.
        score: each draw's own score over the N examples, [S], larger is better: accuracy, minus squared error; None
            without y.
        others: further numbers [S, N, ...] whose average over draws the predictive needs.
    """

    mean: Tensor
    log_likelihood: Tensor | None = None
    score: Tensor | None = None
    others: Averages = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What scores are made of: the averaged predictive of N examples, and what was observed.

    Attributes:
        averages: float64 [N, ...] by name: ``mean``, ``spread`` (Var[E[y | draw]] over the draws) and the names of
            `DrawStatistics.others`.
        y: observed values [N, ...].
        nll: of the averaged predictive, nats per datum.
        quantiles: levels [Q] -> quantiles [Q, N, ...] of y; NaN where an example has no draws of y. Where single draws
            of K examples are all there is, those of these, [Q, K, ...].
        samples: draws of y for K of the examples, [S, K, ...]; None for likelihoods whose y is not drawn.
        kept: positions [K] of these examples.
        pit: `number_metrics.pit_limits` of every example, [N, ...] each; None where y is not drawn.
    """

    averages: Averages
    y: Tensor
    nll: float
    quantiles: Callable[[Tensor], Tensor]
    samples: Tensor | None
    kept: Tensor
    pit: tuple[Tensor, Tensor] | None


class Likelihood(nn.Module, ABC):
    """p(y | outputs) of one example; examples are independent given the network and the latents.

    A datum is an example: the event of `distribution` is all of its y (every pixel, every token), whose log densities
    are summed. Parameters of the module (a noise scale, say) are trained by `fit` as point estimates. A likelihood
    with random variables of its own samples them in `latents`.

    ``averages`` are averages over draws, float64 [N, ...]: ``mean``, ``spread`` and the names of
    `DrawStatistics.others`.

    Attributes:
        drawn: whether `predict` draws y from each draw of the network. False where the mean tells everything about y,
            as class probabilities do.
        answers: what `answer` returns.
        units: what `Predictive.uncertainties` are in, for labels of figures.
    """

    drawn: ClassVar[bool] = True
    answers: ClassVar[tuple[str, str]] = ("mean", "std")
    units: ClassVar[str] = "variance of y"

    @abstractmethod
    def distribution(self, outputs: Tensor, **latents: Tensor) -> TorchDistribution:
        """p(y | outputs [N, *]), with batch shape [N]; its event is the y of one example."""

    def latents(self) -> dict[str, Tensor]:
        """Sample the random variables that `distribution` takes beside outputs, by Pyro; none by default.

        The model calls it outside its data plate. Names are site names and keywords of `distribution`.
        """
        return {}

    def check(self, outputs: Tensor, **latents: Tensor) -> None:
        """Raise UserError for outputs [N, *] that are no parameters of this distribution."""
        name = type(self).__name__
        try:
            found = self.distribution(outputs, **latents)
        except (ValueError, RuntimeError, IndexError) as error:
            if isinstance(error, UserError):
                raise
            lines = str(error).splitlines()
            raise UserError(
                f"a {name} likelihood does not take outputs {list(outputs.shape)}: {lines[0] if lines else error}"
            ) from None
        if found.batch_shape != outputs.shape[:1]:
            raise UserError(
                f"a {name} likelihood must give the batch shape [N] = {list(outputs.shape[:1])} for outputs "
                f"{list(outputs.shape)}, got {list(found.batch_shape)}: the y of one example is its event (to_event)"
            )

    def observed(self, y: object, outputs: Tensor, **latents: Tensor) -> Tensor:
        """The observed values as a tensor [N, ...], converted where that is unambiguous.

        Args:
            outputs: of a few examples [n, *]; n may differ from N.

        Raises:
            UserError: values that this distribution cannot give.
        """
        found = self.distribution(outputs, **latents)
        return numbers(y, outputs, found, type(self).__name__)

    def nll(self, outputs: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """-sum_i weights_i log p(y_i | outputs_i) of outputs [N, *], y [N, ...] and weights [N], in nats."""
        found = self.distribution(outputs).log_prob(y)
        return -(found if weights is None else found * weights).sum()

    def correct(self, outputs: Tensor, y: Tensor) -> Tensor | None:
        """The number of examples whose one label is the most probable; None where there is no such label."""
        return right_answers(self.distribution(outputs), y)

    def mean(self, outputs: Tensor, **latents: Tensor) -> Tensor:
        """E[y | outputs [N, *]], [N, ...]."""
        return self.distribution(outputs, **latents).mean

    def parts(self, outputs: Tensor, **latents: Tensor) -> dict[str, Tensor]:
        """``mean`` and the numbers [N, ...] whose averages over draws `decompose` and `answer` take.

        A function of torch operations alone: it is exported.
        """
        found = self.distribution(outputs, **latents)
        return {"mean": found.mean, "variance": found.variance}

    @torch.no_grad()
    def statistics(self, outputs: Tensor, y: Tensor | None = None, **latents: Tensor) -> DrawStatistics:
        """What S draws' outputs [S, N, *] with the same latents say, about the observed y [N, ...] if there is one."""
        latents = {name: value.cpu() for name, value in latents.items()}
        # One by one: the last digit of some vectorized functions depends on a number's place in the tensor.
        draws = [draw.contiguous() for draw in outputs.cpu()]
        every = [self.parts(draw, **latents) for draw in draws]
        parts = {name: torch.stack([one[name] for one in every]) for name in every[0]}
        mean = parts.pop("mean")
        if y is None:
            return DrawStatistics(mean, others=parts)
        log_likelihood = torch.stack([self.distribution(draw, **latents).log_prob(y) for draw in draws])
        return DrawStatistics(mean, log_likelihood, self.score(mean, y), parts)

    def score(self, mean: Tensor, y: Tensor) -> Tensor:
        """Each draw's own score [S], larger is better, of its means [S, N, ...]: minus their mean squared error."""
        return -(mean - y).square().flatten(1).mean(1)

    def decompose(self, averages: Averages) -> tuple[Tensor, Tensor, Tensor]:
        """Total, aleatoric and epistemic uncertainty, each [N, ...]; total = aleatoric + epistemic up to rounding.

        By default Var[y] = E[Var[y | draw]] + Var[E[y | draw]] (Depeweg et al. 2018, eq. 8).
        """
        aleatoric, epistemic = averages["variance"], averages["spread"]
        return aleatoric + epistemic, aleatoric, epistemic

    def std(self, averages: Averages) -> Tensor:
        """Standard deviation of y under the averaged predictive, [N, ...]."""
        return self.decompose(averages)[0].sqrt()

    def answer(self, averages: Averages) -> tuple[Tensor, Tensor]:
        """What a `predictor` and an exported file give of an example, named by `answers`. Torch operations alone."""
        return averages["mean"], (averages["variance"] + averages["spread"]).sqrt()

    def scores(self, found: Summary) -> dict[str, float]:
        """Scores of the averaged predictive, ``nll`` (nats per datum) first."""
        return {"nll": found.nll, **number_scores(found)}

    @torch.no_grad()
    def sample(self, outputs: Tensor, *, seed: int, **latents: Tensor) -> Tensor:
        """One y of each example of outputs [N, *], [N, ...], on the CPU: the same for the same seed."""
        latents = {name: value.cpu() for name, value in latents.items()}
        distribution = self.distribution(outputs.cpu(), **latents)
        with forked_random():
            seed_random(seed)
            return distribution.sample()


def numbers(y: object, outputs: Tensor, of: TorchDistribution, name: str) -> Tensor:
    """Observed numbers [N, ...] of the event shape and support of `of`, in the dtype of `outputs`, on the CPU.

    Raises:
        UserError: another shape, or values that are not finite or outside the support.
    """
    y = as_tensor(np.asarray(y) if isinstance(y, list | tuple) else y, "the targets y").cpu()
    event = list(of.event_shape)
    got = f"the targets y have shape {list(y.shape)}; a {name} likelihood of outputs {list(outputs.shape)}"
    if y.dim() == 0 or list(y.shape[1:]) != event:
        squeezed = list(y.shape[1:]) == [*event, 1]
        advice = "pass y.squeeze(-1)" if squeezed else "reshape y, or change the network's outputs"
        raise UserError(f"{got} expects {str(['N', *event]).replace(chr(39), '')}: {advice}")
    if y.is_complex():
        raise UserError(f"the targets y have dtype {str(y.dtype).removeprefix('torch.')}; expected real numbers")
    y = y.to(torch.promote_types(outputs.dtype, torch.float32))
    if bad := not_finite(y):
        raise UserError(f"the targets y must be finite; {bad}: drop or impute them")
    support = of.support
    each = support.base_constraint if isinstance(support, constraints.independent) else support
    if not constraints.is_dependent(each) and not _within(each, y):
        raise UserError(
            f"the targets y are from {float(y.min()):g} to {float(y.max()):g}; a {name} likelihood has the support "
            f"{each}: convert or drop what lies outside, or choose another likelihood"
        )
    return y


def _within(support: constraints.Constraint, y: Tensor) -> bool:
    """Whether all of y is inside; True where bounds differ by example, of which a few are known."""
    support = copy.copy(support)
    for name, bound in vars(support).items():
        if isinstance(bound, Tensor) and bound.dim():
            if not bool((bound == bound.flatten()[0]).all()):
                return True
            setattr(support, name, bound.flatten()[0])
    return bool(support.check(y).all())  # type: ignore[no-untyped-call]


def number_scores(found: Summary) -> dict[str, float]:
    """rmse, mae and crps, by level coverage, width and interval score, and the quantile calibration error.

    All but rmse and mae need draws of y (`number_metrics`); crps is of the examples whose draws were kept.
    """
    y, mean = found.y.double(), found.averages["mean"]
    scores = {"rmse": number_metrics.rmse(mean, y), "mae": number_metrics.mae(mean, y)}
    if found.samples is None or found.pit is None or len(found.samples) < 2:
        return scores
    if len(found.kept):
        scores["crps"] = float(number_metrics.crps_from_draws(found.samples, y[found.kept]).nanmean())
    levels = torch.tensor([side for level in LEVELS for side in (0.5 - level / 2, 0.5 + level / 2)])
    quantiles = found.quantiles(levels).double()
    y = y if quantiles.shape[1] == len(y) else y[found.kept]
    for level, (lower, upper) in zip(LEVELS, quantiles.unflatten(0, (-1, 2)), strict=True):
        name = f"{100 * level:g}"
        scores[f"coverage_{name}"] = number_metrics.coverage(lower, upper, y)
        scores[f"width_{name}"] = number_metrics.width(lower, upper)
        scores[f"interval_score_{name}"] = float(number_metrics.interval_score(lower, upper, y, level).mean())
    scores["quantile_error"] = number_metrics.quantile_calibration_error(*found.pit)
    return scores
