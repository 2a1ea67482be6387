"""Cost model: the seconds of a step on any number of ranks, fitted to measured steps, with an uncertainty.

    step(N) = compute + [N > 1] (copy bytes + exposed(N) + 2 (N - 1) (latency + delay))
    wire(N) = 2 (N - 1) ((latency + trips delay) messages + bytes / (N bandwidth))
    exposed(N) = max((1 - overlap) wire(N), wire(N) - 2/3 compute)

Compute is the time of a rank's own step. It depends on the workload (network, batch, device). It does not depend on N,
because each rank has a batch of its own.

Wire is the ring allreduce (Patarasuk and Yuan 2009): 2 (N - 1) rounds. In each round a rank sends 1/N of every message.
A share of it, `overlap`, hides behind back-propagation. Back-propagation is two thirds of compute, and cannot hide more
than its own length. Nothing hides the step's small message.

For a known link, `goodput` is the share of its bandwidth that gradients get. The rest goes to headers and to waiting
for acknowledgements. A large message travels the link `trips` times in a round: to ask, to answer, and until TCP's
window is open.

Copy is the cost of a byte on a rank's processor: into the bucket, through the sockets, and into the sum. Nothing hides
it.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from ppl_bnn.errors import UserError

# Relative standard deviation of what the formula leaves out. It was measured on eight rehearsed points, each predicted
# from the other link speeds. With enough links, `discrepancy` measures the machine's own.
MODEL_ERROR = 0.15
# It is known from few links only, so it has Student's t, with about this number of degrees of freedom.
_FREEDOM = 3
# Prior of the fitted constants beside compute, as centre and standard deviation. The scales are log seconds, log bytes
# a second, log seconds a byte, logits of the shares, and a log number. A deviation of 1.5 is a factor of 4.5. Goodput
# lies between 0.7 and 0.97, and trips between 0.8 and 5.
_PRIOR = {
    "latency": (np.log(1e-4), 1.5),
    "bandwidth": (np.log(1e9), 1.5),
    "copy": (np.log(1e-9), 1.5),
    "overlap": (0.0, 1.5),
    "goodput": (2.2, 0.7),
    "trips": (np.log(2.0), 0.6),
}


@dataclass(frozen=True)
class Link:
    """The links between ranks: bandwidth in bytes a second, and seconds until a packet arrives."""

    bandwidth: float
    delay: float = 0.0


@dataclass(frozen=True)
class Point:
    """A setting to fit to, or to predict.

    Args:
        workload: any name. Points of one name share their compute.
        ranks: number of ranks.
        messages, bytes: messages and bytes of gradients a step.
        seconds: seconds of each measured step [K]. A point to fit to needs K of at least 2.
        link: the link between the ranks, if it is known. If not, it is fitted.
    """

    workload: str
    ranks: int
    messages: float
    bytes: float
    seconds: Sequence[float] = ()
    link: Link | None = None


@dataclass(frozen=True)
class CostModel:
    """The fitted constants, as draws that represent their uncertainty.

    Attributes:
        draws: ``latency`` (seconds a message and round), ``bandwidth`` (bytes a second), ``copy`` (seconds a byte),
            ``overlap`` and ``goodput`` (in [0, 1]), ``trips`` and ``compute <workload>`` (seconds). Each is [S], with
            the best fit first.
        error: relative standard deviation of what the formula leaves out.
    """

    draws: Mapping[str, NDArray[Any]]
    error: float = 0.0

    def step(self, point: Point) -> NDArray:
        """Return seconds a step [S] of a fitted workload, without the model's own error."""
        return _step(self.draws, point)

    def measured(self, point: Point) -> NDArray:
        """Return seconds a step [S] as a measurement may give them: on several ranks the model's own error is added."""
        random = np.random.default_rng([zlib.crc32(point.workload.encode()), point.ranks])
        error = self.error * (point.ranks > 1) * random.standard_t(_FREEDOM, len(self.draws["copy"]))
        return self.step(point) * np.exp(error)


def fit_cost_model(
    points: Sequence[Point], *, num_samples: int = 200, model_error: float | None = None, seed: int = 0
) -> CostModel:
    """Fit the constants to the points' medians, by least squares of log seconds under a wide prior.

    The draws are randomized maximum a posteriori (Bardsley et al. 2014). Each draw resamples every point's steps, moves
    the points by the model's own error and the prior's centres by their deviation, and fits again. A constant that the
    points do not determine stays as uncertain as its prior.

    Args:
        num_samples: number of draws S.
        model_error: relative standard deviation of what the formula leaves out. None: `discrepancy` of the points.

    Raises:
        UserError: no points, or one without two positive, finite measured steps.
    """
    if not points:
        raise UserError("a cost model needs measured points, got none")
    steps = [np.asarray(point.seconds, dtype=float) for point in points]
    for point, seconds in zip(points, steps, strict=True):
        if len(seconds) < 2 or not (np.isfinite(seconds) & (seconds > 0)).all():
            raise UserError(f"{point.workload} on {point.ranks} ranks needs at least 2 positive, finite measured steps")
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

    # The exposed part has a kink, and there may be an optimum on each side of it.
    tilts = np.array([[0, 0, 0, 0, 0, 0], [0, 1, 0, -1, 0, 0], [0, -1, 0, 1, 0, 0], [0, 2, 1, 0, 0, 0]])
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
    """Return the relative standard deviation of what the formula leaves out, with run-to-run noise.

    With three known links or more, this is the root mean square of log(measured / predicted). Each link is predicted by
    a fit to the others. The result is never below a fifth of `MODEL_ERROR`. With fewer links it is `MODEL_ERROR`.
    """
    links = dict.fromkeys(point.link for point in points if point.link is not None)
    if len(links) < 3:
        return MODEL_ERROR
    errors = []
    for link in links:
        others = [point for point in points if point.link != link]
        model = fit_cost_model(others, num_samples=1, model_error=MODEL_ERROR)
        left_out = [point for point in points if point.link == link]
        errors += [np.log(np.median(point.seconds) / model.step(point)[0]) for point in left_out]
    return max(MODEL_ERROR / 5, float(np.sqrt(np.mean(np.square(errors)))))


def _constants(values: NDArray, workloads: Sequence[str]) -> dict[str, NDArray]:
    """Map fitted values [P] or [P, S] from the real line to positive constants and shares in [0, 1]."""
    constants = dict(zip([*_PRIOR, *(f"compute {name}" for name in workloads)], np.exp(values), strict=True))
    shares = {name: constants[name] / (1 + constants[name]) for name in ("overlap", "goodput")}
    return {**constants, **shares}


def _step(constants: Mapping[str, NDArray], point: Point) -> NDArray:
    compute = constants[f"compute {point.workload}"]
    if point.ranks == 1:
        return compute
    bandwidth = constants["goodput"] * point.link.bandwidth if point.link else constants["bandwidth"]
    delay = point.link.delay if point.link else 0.0
    rounds = 2 * (point.ranks - 1)
    latency = constants["latency"] + constants["trips"] * delay
    wire = rounds * (latency * point.messages + point.bytes / (point.ranks * bandwidth))
    exposed = np.maximum((1 - constants["overlap"]) * wire, wire - 2 / 3 * compute)
    return compute + constants["copy"] * point.bytes + exposed + rounds * (constants["latency"] + delay)
