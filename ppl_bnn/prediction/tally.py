"""The sums of a predictive while it is drawn."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ppl_bnn.distributed import Communicator
from ppl_bnn.errors import UserError
from ppl_bnn.models.likelihoods import DrawStatistics
from ppl_bnn.native.normals import GENERATOR, draw_seed
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.prediction.running import Target
from ppl_bnn.prediction.sketch import QuantileSketch

Latents = Sequence[dict[str, Tensor]]


def check_so_far(
    so_far: Predictive, num_samples: int, y: Tensor | None, kept: Tensor, method: str, sampling: str, compact: bool
) -> None:
    """Raise UserError for an earlier result that cannot be added to: it was made otherwise, or of other examples."""
    if so_far.num_samples > num_samples:
        raise UserError(f"num_samples is {num_samples}, and so_far has {so_far.num_samples} draws already")
    if so_far.generator != GENERATOR:
        raise UserError(
            f"so_far was drawn by the generator {so_far.generator}, and this version draws by {GENERATOR}; the draws "
            "would not fit together: leave out so_far"
        )
    own = {"method": method, "sampling": sampling, "compact": compact}
    for name, here in own.items():
        if getattr(so_far, name) != here:
            raise UserError(f"so_far has {name} {getattr(so_far, name)!r}, and this call {here!r}: leave out so_far")
    same = (so_far.y is None and y is None) or (
        so_far.y is not None and y is not None and torch.equal(so_far.y, y.cpu())
    )
    if not same or not torch.equal(so_far.kept, kept):
        raise UserError("so_far has other labels, or keeps other examples: leave out so_far")


class Tally:
    """The sums of a predictive while it is drawn, the same on every rank.

    Draws are added one after the other in float64, so the result is the same to the last bit however they were divided
    among ranks or sessions. Squares are of deviations from draw 0, so that no digits cancel.

    Args:
        count: N.
        y: observed values [N, ...], or None.
        target: the likelihood, and outputs [n, *] of a few examples, n >= 1, which tell the statistics' shapes.
        seed: of the draws; y is drawn by (seed, draw number).
        sketched: sketch the draws of y of all examples.
        log_likelihood: whether log p(y_i | draw s) is kept for each draw, [S, N].

    Attributes:
        done: draws so far.
        active: positions of the examples that get further draws.
        seconds: time spent on draws.
    """

    def __init__(
        self, num_samples: int, kept: Tensor, count: int, y: Tensor | None, target: Target, *, sampling: str,
        method: str, compact: bool = False, seed: int = 0, log_likelihood: bool = True, sketched: bool = False,
    ) -> None:  # fmt: skip
        self.num_samples, self.kept, self.y = num_samples, kept, None if y is None else y.cpu()
        likelihood, like = target.likelihood, target.outputs[:1]
        self.likelihood, self.sampling, self.method, self.compact = likelihood, sampling, method, compact
        self.done, self.seconds, self.seed = 0, 0.0, seed
        self.active = torch.arange(count, device="cpu")
        self.draws = torch.zeros(count, dtype=torch.int64, device="cpu")
        first = likelihood.statistics(like.unsqueeze(0), None if self.y is None else self.y[:1], **target.latents)
        self.log_likelihood = self.log_sum = self.scores = self.samples = self.sketch = None
        if self.y is not None:
            self.scores = _missing(num_samples)
            if log_likelihood:
                self.log_likelihood = _missing(num_samples, count)
            else:
                self.log_sum = torch.full((count,), -math.inf, dtype=torch.float64)
        # Probabilities need no more; numbers may be large beside their differences.
        dtype = first.mean.dtype if likelihood.drawn else torch.float32
        self.means = _missing(num_samples, len(kept), *first.mean.shape[2:], dtype=dtype)
        shapes = {"mean": first.mean, **first.others, "spread": first.mean}
        if likelihood.drawn:
            drawn = likelihood.sample(like, seed=0, **target.latents)
            dtype = torch.promote_types(drawn.dtype, torch.float32)
            self.samples = _missing(num_samples, len(kept), *drawn.shape[1:], dtype=dtype)
            self.sketch = QuantileSketch((count, *drawn.shape[1:]), dtype=dtype) if sketched else None
            if self.y is not None:
                shapes |= {"below": drawn.unsqueeze(0), "up_to": drawn.unsqueeze(0)}
        self.sums = {name: torch.zeros(count, *value.shape[2:], dtype=torch.float64) for name, value in shapes.items()}
        self.squares, self.reference = torch.zeros_like(self.sums["mean"]), torch.zeros_like(self.sums["mean"])
        self._find_kept()

    def add(self, outputs: Tensor, latents: Latents = ()) -> None:
        """Add the next draws [S, active, *], each with its own latents of the likelihood, if it has some.

        Raises:
            UserError: outputs that make the predictive NaN.
        """
        found = self._statistics(outputs, latents)
        draws, rows = len(found.mean), slice(self.done, self.done + len(found.mean))
        if found.mean.isnan().any():
            bad = int(found.mean.isnan().flatten(1).any(1).nonzero()[0])
            raise UserError(f"draw {self.done + bad} gives NaN: its weights or outputs overflow or are NaN")
        if not self.done:
            self.reference = found.mean[0].double()
        deviations = found.mean.double() - self.reference[self.active]
        added = {"mean": found.mean, **found.others, "spread": deviations.square()}
        if self.samples is not None:
            added |= self._sampled(rows, outputs, latents)
        if found.log_likelihood is not None and found.score is not None:
            self._score(rows, found.log_likelihood, found.score)
        self.means[rows, self._at] = found.mean[:, self._of].to(self.means.dtype)
        for name, values in added.items():
            self.sums[name][self.active] = _plus(self.sums[name][self.active], values)
        if self.sampling == "antithetic":
            deviations = deviations.unflatten(0, (-1, 2)).mean(1)
        self.squares[self.active] = _plus(self.squares[self.active], deviations.square())
        self.draws[self.active] += draws
        self.done += draws

    def leave_out(self, known: Tensor) -> None:
        """No further draws of the examples that `known` [N] says."""
        self.active = self.active[~known[self.active]]
        self._find_kept()

    def result(self) -> Predictive:
        """The predictive of the draws so far."""
        return Predictive(
            means=self.means[: self.done],
            kept=self.kept,
            y=self.y,
            log_likelihood=None if self.log_likelihood is None else self.log_likelihood[: self.done],
            sums={name: total.clone() for name, total in self.sums.items()},
            squares=self.squares.clone(),
            reference=self.reference,
            draws=self.draws.clone(),
            draw_scores=None if self.scores is None else self.scores[: self.done],
            seconds=self.seconds,
            samples=None if self.samples is None else self.samples[: self.done],
            sketch=copy.deepcopy(self.sketch),
            log_sum=None if self.log_sum is None else self.log_sum.clone(),
            method=self.method,
            sampling=self.sampling,
            compact=self.compact,
            seed=self.seed,
            likelihood=self.likelihood,
        )

    def go_on_from(self, before: Predictive | None, ranks: Communicator) -> None:
        """Begin with the draws of an earlier result: rank 0's, on every rank."""
        self.done = int(ranks.share([0 if before is None else before.num_samples])[0])
        if not self.done:
            return
        if before is not None and ranks.is_main:
            self._restore(before)
        optional = (self.log_likelihood, self.log_sum, self.scores)
        sketch = self.sketch.state().values() if self.sketch is not None else ()
        shared = [*(part for part in optional if part is not None), *self.sums.values(), *sketch]
        ranks.broadcast([*shared, self.squares, self.reference, self.draws])
        self.leave_out(self.draws < self.done)

    def _restore(self, before: Predictive) -> None:
        self.seconds, self.sketch = before.seconds, copy.deepcopy(before.sketch)
        self.draws, self.reference, self.squares = (
            part.clone() for part in (before.draws, before.reference, before.squares)
        )
        self.sums = {name: total.clone() for name, total in before.sums.items()}
        self.log_sum = None if before.log_sum is None else before.log_sum.clone()
        for rows, saved in (
            (self.means, before.means),
            (self.samples, before.samples),
            (self.log_likelihood, before.log_likelihood),
            (self.scores, before.draw_scores),
        ):
            if rows is not None and saved is not None:
                rows[: self.done] = saved

    def _statistics(self, outputs: Tensor, latents: Latents) -> DrawStatistics:
        y = None if self.y is None else self.y[self.active]
        if not any(latents):
            return self.likelihood.statistics(outputs, y)
        each = [
            self.likelihood.statistics(draw.unsqueeze(0), y, **own) for draw, own in zip(outputs, latents, strict=True)
        ]
        return DrawStatistics(
            torch.cat([one.mean for one in each]),
            None if y is None else torch.cat([one.log_likelihood for one in each if one.log_likelihood is not None]),
            None if y is None else torch.cat([one.score for one in each if one.score is not None]),
            {name: torch.cat([one.others[name] for one in each]) for name in each[0].others},
        )

    def _sampled(self, rows: slice, outputs: Tensor, latents: Latents) -> dict[str, Tensor]:
        """Keep one y of each draw; return whether it is below the observed y, or at most that."""
        assert self.samples is not None
        # By the seed and the draw's number, whatever is drawn beside it.
        samples = torch.stack(
            [
                self.likelihood.sample(draw, seed=draw_seed(self.seed, self.done + at), **own)
                for at, (draw, own) in enumerate(zip(outputs, latents or [{}] * len(outputs), strict=True))
            ]
        )
        self.samples[rows, self._at] = samples[:, self._of].to(self.samples.dtype)
        if self.sketch is not None:
            self.sketch.add(samples.to(self.samples.dtype), self.active)
        if self.y is None:
            return {}
        y = self.y[self.active]
        return {"below": samples < y, "up_to": samples <= y}

    def _score(self, rows: slice, log_likelihood: Tensor, score: Tensor) -> None:
        if self.log_likelihood is not None:
            self.log_likelihood[rows, self.active] = log_likelihood.float()
        if self.log_sum is not None:
            total = self.log_sum[self.active]
            for draw in log_likelihood.double():
                total = torch.logaddexp(total, draw)
            self.log_sum[self.active] = total
        if self.scores is not None and len(self.active) == len(self.draws):
            self.scores[rows] = score.float()

    def _find_kept(self) -> None:
        # Where the kept examples are in `means`, and where among the active ones.
        where = torch.full((len(self.draws),), -1)
        where[self.active] = torch.arange(len(self.active))
        self._at = (where[self.kept] >= 0).nonzero().flatten()
        self._of = where[self.kept][self._at]


def _plus(total: Tensor, values: Tensor) -> Tensor:
    """The total [N, ...] and values [S, N, ...], added one after the other."""
    values = values.double()
    return total + values[0] if len(values) == 1 else torch.cat([total.unsqueeze(0), values]).cumsum(0)[-1]


def _missing(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)
