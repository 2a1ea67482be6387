"""How good and how sure a predictive distribution of numbers or counts is: pure functions of draws and intervals.

y has shape [N, ...]: N examples of one or more numbers each. A score of one example is in the unit of y and smaller is
better. Counts are numbers here: every function but the closed forms holds for them too.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ppl_bnn.errors import UserError

LEVELS = tuple(k / 20 for k in range(1, 20))
# Draws that a score converts to float64 at once: 32 MB.
_CHUNK = 2**22


def rmse(mean: Tensor, y: Tensor) -> float:
    """Root mean squared error of the predictive mean, in the unit of y; mean and y [N, ...]."""
    _check_shapes(y, mean=mean)
    return math.sqrt(float((mean.double() - y.double()).square().mean()))


def mae(median: Tensor, y: Tensor) -> float:
    """Mean absolute error, in the unit of y; median and y [N, ...]. The predictive median has the smallest one."""
    _check_shapes(y, median=median)
    return float((median.double() - y.double()).abs().mean())


def crps_from_draws(draws: Tensor, y: Tensor, *, fair: bool = True) -> Tensor:
    """Continuous ranked probability score E|Y - y| - E|Y - Y'| / 2 by draws (Gneiting and Raftery 2007, eq. 21).

    With `fair` the second expectation is over pairs of different draws, so that the score of independent draws has
    the predictive's own CRPS as its mean, whatever their number (Ferro 2014). Without it the score is the CRPS
    of the draws' empirical distribution: larger by E|Y - Y'| / (2 S) on average, and equal to Pyro's
    `crps_empirical`, which does not know examples with fewer draws.

    Args:
        draws: of y, [S, N, ...]; NaN where an example has no such draw.
        y: observed values [N, ...].

    Returns:
        float64 [N, ...], in the unit of y; NaN for an example without a draw, and with one draw if `fair`.
    """
    _check_draws(draws, y)

    def score(y: Tensor, draws: Tensor) -> Tensor:
        ordered = (draws.double() - y.double()).sort(0).values  # Missing draws are last.
        count = (~ordered.isnan()).sum(0)
        rank = torch.arange(1, len(ordered) + 1, device=ordered.device).unsqueeze(1)
        # The sum over pairs i < j of x_j - x_i has every x_i i - 1 times with plus and n - i times with minus.
        between = (ordered * (2 * rank - count - 1)).nansum(0) / (count * (count - 1 if fair else count))
        return ordered.abs().nanmean(0) - between

    return _in_chunks(score, y, draws)


def crps_normal(loc: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """CRPS of Normal(loc, scale), in the unit of y, float64 [N, ...] (Gneiting et al. 2005, eq. 5).

    s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)) with z = (y - loc) / s; a scale of 0 gives |y - loc|.

    Args:
        loc, y: [N, ...].
        scale: standard deviation [N, ...], or one number for all.
    """
    _check_shapes(y, loc=loc)
    scale = _beside(scale, y)
    return _mean_distance(y.double() - loc.double(), scale) - scale / math.sqrt(math.pi)


def crps_normal_mixture(loc: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """CRPS of the mixture of S Normals of equal weight, in the unit of y, float64 [N, ...] (Grimit et al. 2006, eq. 5).

    This is the CRPS of the predictive of S weight draws under a Normal likelihood, without noise of drawn y. Its work
    grows with S^2.

    Args:
        loc: means of the components, [S, N, ...]; NaN where an example has no such draw.
        scale: their standard deviations: [S, N, ...], or one number for all.
        y: [N, ...].
    """
    _check_draws(loc, y, "loc")

    def score(y: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        loc = loc.double()
        count = (~loc.isnan()).sum(0)
        to_y = _mean_distance(y.double() - loc, scale).nansum(0) / count
        # |Y - Y'| of two draws of the same component i is that of Normal(0, sqrt(2) s_i): 2 s_i / sqrt(pi).
        between = (scale * (2 / math.sqrt(math.pi))).masked_fill(loc.isnan(), 0).sum(0)
        for i in range(len(loc) - 1):
            distance = _mean_distance(loc[i] - loc[i + 1 :], (scale[i].square() + scale[i + 1 :].square()).sqrt())
            between += 2 * distance.nansum(0)
        return to_y - between / (2 * count.square())

    return _in_chunks(score, y, loc, _beside(scale, loc))


def interval_score(lower: Tensor, upper: Tensor, y: Tensor, level: float) -> Tensor:
    """Width plus 2 / (1 - level) times the distance by which y is outside (Winkler 1972).

    It is smallest, on average, for the quantiles (1 - level) / 2 and (1 + level) / 2 (Gneiting and Raftery 2007,
    eq. 43).

    Args:
        lower, upper: bounds of the central interval, [N, ...].
        y: [N, ...].
        level: the interval's nominal probability, between 0 and 1.

    Returns:
        float64 [N, ...], in the unit of y.
    """
    _check_shapes(y, lower=lower, upper=upper)
    _check_levels([level])
    lower, upper, y = lower.double(), upper.double(), y.double()
    return upper - lower + ((lower - y).clamp_min(0) + (y - upper).clamp_min(0)) * (2 / (1 - level))


def coverage(lower: Tensor, upper: Tensor, y: Tensor) -> float:
    """Share of y inside [lower, upper], bounds included; all [N, ...]."""
    _check_shapes(y, lower=lower, upper=upper)
    return float(((lower <= y) & (y <= upper)).double().mean())


def width(lower: Tensor, upper: Tensor) -> float:
    """Mean width of intervals, in the unit of y; lower and upper [N, ...]."""
    _check_shapes(lower, upper=upper)
    return float((upper.double() - lower.double()).mean())


def pit(draws: Tensor, y: Tensor) -> Tensor:
    """Probability integral transform of y: its mid-rank among its draws and itself, between 0 and 1, [N, ...].

    (b + (t + 1) / 2) / (n + 1) for n draws, of which b are below y and t equal to it: the middle of `pit_limits`. Under
    a perfect predictive of continuous y it takes the n + 1 possible values with equal probability. Ties of counts are
    split in the middle (Czado et al. 2009, sec. 2), so the result is no random number: its mean is 1 / 2 under a
    perfect predictive of counts as well, but it is not uniform.

    Args:
        draws: of y, [S, N, ...]; NaN where an example has no such draw.
        y: [N, ...].
    """
    lower, upper = pit_limits(draws, y)
    return (lower + upper) / 2


def pit_limits(draws: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Between which the PIT of y is uniform under a perfect predictive, float64 [N, ...] each; arguments as of `pit`.

    b / (n + 1) and (b + t + 1) / (n + 1): the estimates of P(Y < y) and P(Y <= y). With them the shares of a perfect
    predictive are right on average for counts, and for any number of draws (Czado et al. 2009, sec. 2).
    """
    _check_draws(draws, y)
    below, tied = (draws < y).sum(0).double(), (draws == y).sum(0)
    count = (~draws.isnan()).sum(0)
    return below / (count + 1), (below + tied + 1) / (count + 1)


def observed_shares(pit: Tensor, upper: Tensor | None = None, *, levels: Sequence[float] = LEVELS) -> Tensor:
    """Share of y below its predictive quantile at each level, float64 [Q]: under a perfect predictive the level.

    Args:
        pit: [N, ...]; or with `upper` the lower one of `pit_limits`, between which the PIT is spread evenly.
        levels: Q levels between 0 and 1.
    """
    _check_levels(levels)
    if upper is None:
        return torch.stack([(pit <= level).double().mean() for level in levels])
    _check_shapes(pit, upper=upper)
    return torch.stack([((level - pit) / (upper - pit)).clamp(0, 1).mean() for level in levels])


def quantile_calibration_error(pit: Tensor, upper: Tensor | None = None, *, levels: Sequence[float] = LEVELS) -> float:
    """Mean over the levels of |observed share - level|, between 0 and 1 (Kuleshov et al. 2018, eq. 9).

    Absolute differences instead of the paper's squares: the error is then in units of probability, as the ECE is. A
    perfect predictive does not have 0: with N independent values and the default levels it has 0.33 / sqrt(N) on
    average (0.010 for 1000), from the binomial errors of the shares; less with `upper`, which shares ties out.

    Args:
        pit, upper, levels: as of `observed_shares`. Counts, and draws fewer than about 100, need both limits.
    """
    shares = observed_shares(pit, upper, levels=levels)
    return float((shares - torch.tensor(levels, dtype=shares.dtype, device=shares.device)).abs().mean())


def _mean_distance(gap: Tensor, scale: Tensor) -> Tensor:
    # E|X| of X ~ Normal(gap, scale): gap (2 Phi(z) - 1) + 2 scale phi(z) with z = gap / scale.
    z = torch.where(gap == 0, 0, gap / scale)
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    return gap * torch.erf(z / math.sqrt(2)) + 2 * scale * density


def _in_chunks(score: Callable[..., Tensor], y: Tensor, *draws: Tensor) -> Tensor:
    # score([E], [S, E], ...) -> [E] of a bounded number of draws at once.
    size = max(1, _CHUNK // max(1, len(draws[0])))
    parts = zip(*(values.flatten(-y.dim()).split(size, -1) for values in (y, *draws)), strict=True)
    return torch.cat([score(*part) for part in parts]).view(y.shape)


def _beside(scale: Tensor, values: Tensor) -> Tensor:
    scale = torch.as_tensor(scale, dtype=torch.float64, device=values.device)
    if scale.dim() and scale.shape != values.shape:
        raise UserError(
            f"scale has shape {list(scale.shape)} beside {list(values.shape)}: pass one of that shape, or one number"
        )
    return scale.expand(values.shape)


def _check_shapes(y: Tensor, **others: Tensor) -> None:
    # Broadcasting [N] with [N, 1] would compare every example with every other.
    for name, values in others.items():
        if values.shape != y.shape:
            raise UserError(
                f"{name} has shape {list(values.shape)} and belongs to values of shape {list(y.shape)}: "
                "reshape one to the other's shape"
            )


def _check_draws(draws: Tensor, y: Tensor, name: str = "draws") -> None:
    if not y.dim() or draws.dim() != y.dim() + 1 or draws.shape[1:] != y.shape:
        raise UserError(
            f"{name} has shape {list(draws.shape)} and y {list(y.shape)}; expected y [N, ...] and {name} [S, N, ...]: "
            "put the dimension of draws first"
        )


def _check_levels(levels: Sequence[float]) -> None:
    if not levels or not all(0 < level < 1 for level in levels):
        raise UserError(f"levels are probabilities between 0 and 1, both excluded, got {list(levels)}: 0.9 for 90%")
