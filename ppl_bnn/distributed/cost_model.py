"""What a step takes on any number of ranks: fitted to measured steps, it predicts others, with an uncertainty.

    step(N) = compute + [N > 1] (copy bytes + exposed(N))
    wire(N) = 2 (N - 1) (latency messages + bytes / (N bandwidth))
    exposed(N) = max((1 - overlap) wire(N), wire(N) - 2/3 compute)

Compute is what a rank's own step takes. It depends on the workload (network, batch, device) and not on N, since each
rank has a batch of its own. Wire is the ring allreduce (Patarasuk and Yuan 2009): 2 (N - 1) rounds, in each of which a
rank sends 1/N of every message. A share of it, `overlap`, hides behind back-propagation, which is two thirds of compute
and cannot hide more than its own length. Of a link whose bandwidth is known, `goodput` is the share that gradients get:
the rest goes to headers and to waiting for acknowledgements. Copy is what a byte costs a rank's processor, which
nothing hides: into the bucket, through the sockets, added up.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

# Relative standard deviation of what the formula leaves out: that of eight rehearsed points, each predicted by the
# other link speeds. Where there are enough speeds, `discrepancy` finds the machine's own.
MODEL_ERROR = 0.15
# It is known from so few link speeds that it has Student's t, of about so many degrees of freedom.
_FREEDOM = 3
# Centre and standard deviation of what is fitted beside compute, before there are data: log seconds, log bytes a
# second, log seconds a byte, and logits of the shares. 1.5 is a factor of 4.5; goodput lies between 0.7 and 0.97.
_PRIOR = {
    "latency": (np.log(1e-4), 1.5),
    "bandwidth": (np.log(1e9), 1.5),
    "copy": (np.log(1e-9), 1.5),
    "overlap": (0.0, 1.5),
    "goodput": (2.2, 0.7),
}


@dataclass(frozen=True)
class Point:
    """A measured setting.

    Args:
        workload: any name; points of one name share their compute.
        ranks: how many.
        messages, bytes: of gradients, a step.
        seconds: of each measured step [K], K at least 2.
        bandwidth: bytes a second of the links between the ranks, where it is known; else it is fitted.
    """

    workload: str
    ranks: int
    messages: float
    bytes: float
    seconds: Sequence[float]
    bandwidth: float | None = None


@dataclass(frozen=True)
class CostModel:
    """Fitted constants, and draws of them that stand for their uncertainty.

    Attributes:
        draws: ``latency`` (seconds a message and round), ``bandwidth`` (bytes a second), ``copy`` (seconds a byte),
            ``overlap`` and ``goodput`` (in [0, 1]) and ``compute <workload>`` (seconds): [S] each, the best fit first.
        error: relative standard deviation of what the formula leaves out.
    """

    draws: Mapping[str, NDArray[Any]]
    error: float = 0.0

    def step(self, workload: str, ranks: int, messages: float, bytes: float, bandwidth: float | None = None) -> NDArray:
        """Seconds a step [S] of a workload that was fitted; arguments as in `Point`."""
        return _step(self.draws, Point(workload, ranks, messages, bytes, (), bandwidth))

    def measured(
        self, workload: str, ranks: int, messages: float, bytes: float, bandwidth: float | None = None
    ) -> NDArray:
        """`step`, and on several ranks the model's own error on top: what a run that is measured may take [S]."""
        steps = self.step(workload, ranks, messages, bytes, bandwidth)
        random = np.random.default_rng([zlib.crc32(workload.encode()), ranks])
        return steps * np.exp(self.error * (ranks > 1) * random.standard_t(_FREEDOM, len(self.draws["copy"])))


def fit_cost_model(
    points: Sequence[Point], *, num_samples: int = 200, model_error: float | None = None, seed: int = 0
) -> CostModel:
    """Fit the constants to the points' medians, by least squares of log seconds under a wide prior.

    The draws are randomized maximum a posteriori (Bardsley et al. 2014): each resamples every point's steps, moves the
    points by the model's own error and the prior's centres by their deviation, and fits again. What the points do not
    tell, such as the latency where it nowhere counts, stays as uncertain as the prior.

    Args:
        num_samples: number of draws S.
        model_error: relative standard deviation of what the formula leaves out; None for `discrepancy` of the points.

    Raises:
        ValueError: no points, or one without two positive, finite measured steps.
    """
    if not points:
        raise ValueError("a cost model needs measured points, got none")
    steps = [np.asarray(point.seconds, dtype=float) for point in points]
    for point, seconds in zip(points, steps, strict=True):
        if len(seconds) < 2 or not (np.isfinite(seconds) & (seconds > 0)).all():
            raise ValueError(
                f"{point.workload} on {point.ranks} ranks needs at least 2 positive, finite measured steps"
            )
    model_error = discrepancy(points) if model_error is None else model_error
    workloads = sorted({point.workload for point in points})
    centres, deviations = (np.array(column) for column in zip(*_PRIOR.values(), strict=True))
    # The standard error of a median of K steps.
    errors = [np.hypot(model_error, 1.25 * np.log(seconds).std() / len(seconds) ** 0.5) for seconds in steps]
    observed = np.array([np.log(np.median(seconds)) for seconds in steps])
    shortest = [min(o for o, p in zip(observed, points, strict=True) if p.workload == name) for name in workloads]

    def solve(observed: NDArray, centres: NDArray, start: NDArray) -> Any:
        def residuals(values: NDArray) -> NDArray:
            constants = _constants(values, workloads)
            predicted = np.log([_step(constants, point) for point in points])
            return np.concatenate([(predicted - observed) / errors, (values[: len(_PRIOR)] - centres) / deviations])

        return least_squares(residuals, start)

    # The exposed part has a kink, so there may be an optimum on each side of it.
    tilts = np.array([[0, 0, 0, 0, 0], [0, 1, 0, -1, 0], [0, -1, 0, 1, 0], [0, 2, 1, 0, 0]])
    starts = [np.concatenate([centres + tilt * deviations, shortest]) for tilt in tilts]
    best = min((solve(observed, centres, start) for start in starts), key=lambda found: found.cost).x
    random = np.random.default_rng(seed)
    values = [best]
    while len(values) < num_samples:
        again = [np.log(np.median(random.choice(seconds, len(seconds)))) for seconds in steps]
        moved = again + model_error * random.standard_normal(len(points))
        values.append(solve(moved, centres + deviations * random.standard_normal(len(centres)), best).x)
    return CostModel(_constants(np.array(values).T, workloads), model_error)


def discrepancy(points: Sequence[Point]) -> float:
    """Relative standard deviation of what the formula leaves out, run-to-run noise included.

    With three known link speeds or more: the root mean square of log(measured / predicted), each speed predicted by a
    fit to the others (never below a fifth of `MODEL_ERROR`). With fewer: `MODEL_ERROR`.
    """
    speeds = sorted({point.bandwidth for point in points if point.bandwidth is not None})
    if len(speeds) < 3:
        return MODEL_ERROR
    errors = []
    for speed in speeds:
        others = [point for point in points if point.bandwidth != speed]
        model = fit_cost_model(others, num_samples=1, model_error=MODEL_ERROR)
        left_out = [point for point in points if point.bandwidth == speed]
        errors += [np.log(np.median(point.seconds) / _step(model.draws, point)[0]) for point in left_out]
    return max(MODEL_ERROR / 5, float(np.sqrt(np.mean(np.square(errors)))))


def _constants(values: NDArray, workloads: Sequence[str]) -> dict[str, NDArray]:
    """What is fitted, from the real line [P] or [P, S] to where it lives."""
    constants = dict(zip([*_PRIOR, *(f"compute {name}" for name in workloads)], np.exp(values), strict=True))
    shares = {name: constants[name] / (1 + constants[name]) for name in ("overlap", "goodput")}
    return {**constants, **shares}


def _step(constants: Mapping[str, NDArray], point: Point) -> NDArray:
    compute = constants[f"compute {point.workload}"]
    if point.ranks == 1:
        return compute
    known = point.bandwidth is not None
    bandwidth = constants["goodput"] * point.bandwidth if known else constants["bandwidth"]
    one_round = constants["latency"] * point.messages + point.bytes / (point.ranks * bandwidth)
    wire = 2 * (point.ranks - 1) * one_round
    exposed = np.maximum((1 - constants["overlap"]) * wire, wire - 2 / 3 * compute)
    return compute + constants["copy"] * point.bytes + exposed
