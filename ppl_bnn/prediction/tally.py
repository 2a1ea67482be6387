"""The sums of a predictive while it is drawn."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.models.likelihoods import DrawStatistics
from ppl_bnn.native.normals import draw_seed
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.prediction.running import Target
from ppl_bnn.prediction.sketch import QuantileSketch

Latents = Sequence[dict[str, Tensor]]


class Tally:
    """The sums of a predictive while it is drawn, the same on every rank.

    Draws are added one after the other in float64, so the result is the same to the last bit however they were divided
    among ranks or sessions. Squares are of deviations from draw 0, so that no digits cancel.

    Examples come in chunks: `begin` names the examples that the next draws are of.

    Args:
        count: N.
        y: observed values [N, ...] or of the first chunk, or None.
        target: the likelihood, and outputs [n, *] of a few examples, n >= 1, which tell the statistics' shapes.
        seed: of the draws; y is drawn by (seed, first example of the chunk, draw number).
        sketched: sketch the draws of y of all examples.
        log_likelihood: whether log p(y_i | draw s) is kept for each draw, [S, N].

    Attributes:
        first, end: the examples of this chunk are first .. end - 1.
        done: draws of this chunk so far.
        active: positions of the examples that get further draws.
        seconds: time spent on draws.
        weights: what the examples' log likelihoods are multiplied by, [N]; set it before the first draw.
    """

    def __init__(
        self, num_samples: int, kept: Tensor, count: int, y: Tensor | None, target: Target, *, sampling: str,
        method: str, compact: bool = False, seed: int = 0, log_likelihood: bool = True, sketched: bool = False,
    ) -> None:  # fmt: skip
        self.num_samples, self.kept, self.y = num_samples, kept, None if y is None else y.cpu()
        likelihood, like = target.likelihood, target.outputs[:1]
        self.likelihood, self.sampling, self.method, self.compact = likelihood, sampling, method, compact
        self.seconds, self.seed = 0.0, seed
        self.scored = torch.zeros(num_samples, dtype=torch.float64)
        self.weights: Tensor | None = None
        self.draws = torch.zeros(count, dtype=torch.int64, device="cpu")
        first = likelihood.statistics(like.unsqueeze(0), None if self.y is None else self.y[:1], **target.latents)
        self.log_likelihood = self.log_sum = self.scores = self.samples = self.sketch = None
        if self.y is not None:
            # Of each draw the sum over the examples, of which it has `scored` so far.
            self.scores = torch.zeros(num_samples, dtype=torch.float64)
            if log_likelihood:
                self.log_likelihood = _missing(num_samples, count)
            else:
                self.log_sum = torch.full((count,), -math.inf, dtype=torch.float64)
            if len(self.y) < count:
                self.y = self.y.new_zeros((count, *self.y.shape[1:]))
            else:
                self.y = self.y.clone()
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
        # Independent draws have the same squares as the spread.
        self._paired = sampling == "antithetic"
        self.squares = torch.zeros_like(self.sums["mean"]) if self._paired else self.sums["spread"]
        self.reference = torch.zeros_like(self.sums["mean"])
        self.first = self.end = self.done = 0

    def begin(self, first: int, end: int, y: Tensor | None = None) -> None:
        """The next draws are of the examples first .. end - 1, whose observed values are `y` [end - first, ...].

        Raises:
            UserError: an earlier result has draws of some of them alone.
        """
        self.first, self.end = first, end
        draws = self.draws[first:end]
        self.done = int(draws.max())
        if self.done and not draws.min():
            raise UserError(
                f"so_far ends between the examples {first} and {end - 1}, which are predicted together: it was made "
                "with another batch_size, or of fewer examples; leave out so_far"
            )
        if self.y is not None and y is not None:
            if self.done and not torch.equal(self.y[first:end], y.cpu()):
                raise UserError("so_far has other labels, or keeps other examples: leave out so_far")
            self.y[first:end] = y.cpu()
        self.active = torch.arange(first, end, device="cpu")[draws == self.done]
        self._find_kept()

    def add(self, outputs: Tensor, latents: Latents = ()) -> None:
        """Add the next draws [S, active, *], each with its own latents of the likelihood, if it has some.

        Raises:
            UserError: outputs that make the predictive NaN.
        """
        found = self._statistics(outputs, latents)
        draws, rows = len(found.mean), slice(self.done, self.done + len(found.mean))
        if not found.mean.isfinite().all():
            bad = int((~found.mean.isfinite()).flatten(1).any(1).nonzero()[0])
            what = "NaN" if found.mean[bad].isnan().any() else "infinite means"
            raise UserError(f"draw {self.done + bad} gives {what}: its weights or outputs overflow or are NaN")
        if not self.done:
            self.reference[self._rows] = found.mean[0].double()
        deviations = found.mean.double() - self.reference[self._rows]
        added = {"mean": found.mean, **found.others, "spread": deviations.square()}
        if self.samples is not None:
            added |= self._sampled(rows, outputs, latents)
        if found.log_likelihood is not None and found.score is not None:
            self._score(rows, found.log_likelihood, found.score)
        self.means[rows, self._at] = found.mean[:, self._of].to(self.means.dtype)
        for name, values in added.items():
            self.sums[name][self._rows] = _plus(self.sums[name][self._rows], values)
        if self._paired:
            deviations = deviations.unflatten(0, (-1, 2)).mean(1)
            self.squares[self._rows] = _plus(self.squares[self._rows], deviations.square())
        self.draws[self._rows] += draws
        self.done += draws

    def leave_out(self, known: Tensor) -> None:
        """No further draws of the examples of the chunk that `known` [end - first] says."""
        self.active = self.active[~known[self.active - self.first]]
        self._find_kept()

    def result(self) -> Predictive:
        """The predictive of the draws so far: of the chunks that have draws."""
        return self._predictive(slice(self.end if self.done else self.first))

    def chunk(self) -> Predictive:
        """That of this chunk's examples."""
        return self._predictive(slice(self.first, self.end))

    def final(self) -> Predictive:
        """That of all examples, in the memory of the tally, which ends with it."""
        return self._predictive(slice(len(self.draws)), shared=True)

    def _predictive(self, rows: slice, shared: bool = False) -> Predictive:
        draws = self.draws[rows]
        count = int(draws.max()) if len(draws) else 0

        def own(values: Tensor) -> Tensor:
            return values[rows] if shared else values[rows].clone()

        stop, first = rows.stop, rows.start or 0
        inside = (self.kept >= first) & (self.kept < stop)
        at: Any = slice(None) if bool(inside.all()) else inside
        scores = None
        if self.scores is not None:
            # An unfinished chunk has fewer draws than the others.
            scored, have = self.scored[:count], having(draws, count)
            lacking = scored != (len(draws) if shared else have)
            scores = (self.scores[:count] / scored).float().masked_fill(lacking, math.nan)
        sums = {name: own(total) for name, total in self.sums.items()}
        return Predictive(
            means=self.means[:count, at],
            kept=self.kept[at] - first,
            y=None if self.y is None else self.y[rows],
            log_likelihood=None if self.log_likelihood is None else self.log_likelihood[:count, rows],
            sums=sums,
            squares=own(self.squares) if self._paired else sums["spread"],
            reference=own(self.reference),
            draws=own(draws) if shared else draws.clone(),
            draw_scores=scores,
            seconds=self.seconds,
            samples=None if self.samples is None else self.samples[:count, at],
            sketch=None if self.sketch is None else self.sketch if shared else self.sketch.of_rows(rows),
            log_sum=None if self.log_sum is None else own(self.log_sum),
            method=self.method,
            sampling=self.sampling,
            compact=self.compact,
            seed=self.seed,
            likelihood=self.likelihood,
            weights=None if self.weights is None else self.weights[rows],
        )

    def _statistics(self, outputs: Tensor, latents: Latents) -> DrawStatistics:
        y = None if self.y is None else self.y[self._rows]
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
        # By the seed and the draw's number, whatever is drawn beside it. Chunks have noise of their own.
        seed = draw_seed(self.seed, self.first) if self.first else self.seed
        samples = torch.stack(
            [
                self.likelihood.sample(draw, seed=draw_seed(seed, self.done + at), **own)
                for at, (draw, own) in enumerate(zip(outputs, latents or [{}] * len(outputs), strict=True))
            ]
        )
        self.samples[rows, self._at] = samples[:, self._of].to(self.samples.dtype)
        if self.sketch is not None:
            self.sketch.add(samples.to(self.samples.dtype), self.active)
        if self.y is None:
            return {}
        y = self.y[self._rows]
        return {"below": samples < y, "up_to": samples <= y}

    def _score(self, rows: slice, log_likelihood: Tensor, score: Tensor) -> None:
        if self.weights is not None:
            own = self.weights[self._rows]
            log_likelihood = (log_likelihood.double() * own).masked_fill(own == 0, 0)
        if self.log_likelihood is not None:
            self.log_likelihood[rows, self._rows] = log_likelihood.float()
        if self.log_sum is not None:
            total = self.log_sum[self._rows]
            for draw in log_likelihood.double():
                total = torch.logaddexp(total, draw)
            self.log_sum[self._rows] = total
        if self.scores is not None and len(self.active) == self.end - self.first:
            self.scores[rows] += len(self.active) * score.double()
            self.scored[rows] += len(self.active)

    def _find_kept(self) -> None:
        # Where the kept examples are in `means`, and where among the active ones.
        where = torch.full((self.end - self.first,), -1)
        where[self.active - self.first] = torch.arange(len(self.active))
        inside = ((self.kept >= self.first) & (self.kept < self.end)).nonzero().flatten()
        of = where[self.kept[inside] - self.first]
        self._at, self._of = inside[of >= 0], of[of >= 0]
        # A slice copies nothing.
        self._rows = slice(self.first, self.end) if len(self.active) == self.end - self.first else self.active


def having(draws: Tensor, count: int) -> Tensor:
    """How many examples have draw 0, 1, ... count - 1, by the examples' numbers of draws [N]."""
    return len(draws) - draws.bincount(minlength=count).cumsum(0)[:count]


def _plus(total: Tensor, values: Tensor) -> Tensor:
    """The total [N, ...] and values [S, N, ...], added one after the other."""
    values = values.double()
    return total + values[0] if len(values) == 1 else torch.cat([total.unsqueeze(0), values]).cumsum(0)[-1]


def _missing(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)
