"""A training step's arithmetic over all the weights of a posterior, in one buffer: one pass in C, or torch operations.

A site's weights lie one after the other in the order of the site's memory, and the sites one after the other. Each has
a kind of value that the network is given: the draw loc + scale * noise, the variance scale^2, or several draws that
differ in signs (`ppl_bnn.guides.estimators.groups`). With e = scale * noise these are loc + e, loc - e, loc + flip * e,
loc - flip * e, and so on.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_bnn.native import weights
from ppl_bnn.native.flat_agreement import agrees
from ppl_bnn.native.library import library
from ppl_bnn.native.normals import normals

_SOURCE = Path(__file__).with_name("flat.c")
# Of flat.c: weights of a task.
_MOST = 4096
DRAW, VARIANCE, FLIPPED = 0, 1, 2
MOST_COPIES = 8


class _Task(ctypes.Structure):
    _fields_ = (("site", ctypes.c_long), ("first", ctypes.c_long), ("count", ctypes.c_long))


class _Site(ctypes.Structure):
    _fields_ = (
        ("first", ctypes.c_long), ("kind", ctypes.c_long), ("group", ctypes.c_long), ("seed", ctypes.c_uint64),
        ("centre", ctypes.c_float), ("rate", ctypes.c_float), ("squares", ctypes.c_float), ("logs", ctypes.c_float),
        ("to_value", ctypes.c_void_p * MOST_COPIES), ("to_loc", ctypes.c_void_p), ("to_u", ctypes.c_void_p),
    )  # fmt: skip


@dataclass(frozen=True)
class Gradients:
    """What back-propagation gave a site, of values, loc and unconstrained scale, as vectors; None is zero."""

    values: Sequence[Tensor | None] = (None,)
    loc: Tensor | None = None
    u: Tensor | None = None


class FlatArithmetic:
    """The buffers of some sites, and the two passes of a step over them.

    Args:
        counts: weights of each site.
        groups: of each site a number, from 0 and rising: sites of one number are summed together.
        like: a tensor of the buffers' dtype and device.
        kinds: of each site, DRAW, VARIANCE or FLIPPED.
        copies: number of values of a FLIPPED site, at most 8.
        centres: of each group, around which squares are taken.
        precisions, logs: of each group: k sum(precision / 2 * squares - log * logs) is the part of the loss whose
            gradients `gradients` adds.

    Attributes:
        loc, u: loc and unconstrained scale, [n].
        noise: of the last `draw`, [n], and values: of it, [copies, n]; both until `gradients`.
        flips: -1 or 1, or nothing yet, [(copies - 1) // 2, n]: set them before `draw`.
        to_loc, to_u: the gradients, [n]; to: both, [2, n].
        spans: where each site is in them.
    """

    def __init__(
        self, counts: Sequence[int], groups: Sequence[int], like: Tensor, *, kinds: Sequence[int],
        centres: Sequence[float], precisions: Sequence[float], logs: Sequence[float], copies: int = 1,
    ) -> None:  # fmt: skip
        firsts = [0, *accumulate(counts)]
        self.spans = [slice(*ends) for ends in pairwise(firsts)]
        self.centres, self.precisions, self.logs = centres, precisions, logs
        self.loc, self.u = (like.new_zeros(firsts[-1]) for _ in range(2))
        # Side by side, for the sum of the squares of both.
        self.to = like.new_zeros(2, firsts[-1])
        self.to_loc, self.to_u = self.to
        # Its last use is the gradient's.
        self.noise = self.to_u
        self.values, self.flips = like.new_zeros(copies, firsts[-1]), like.new_zeros((copies - 1) // 2, firsts[-1])
        self._kinds = kinds
        self._of_kind = self._runs(kinds)
        self._of_group = [span for span, _ in self._runs(groups)]
        cut = [
            (site, first, min(_MOST, span.stop - first))
            for site, span in enumerate(self.spans)
            for first in range(span.start, span.stop, _MOST)
        ]
        self._tasks = (_Task * len(cut))(*(_Task(*one) for one in cut))
        self._tasks_before = [0, *accumulate(-(-count // _MOST) for count in counts)]
        self._sites = (_Site * len(counts))(
            *(_Site(span.start, kind, group) for span, kind, group in zip(self.spans, kinds, groups, strict=True))
        )
        for own, group in zip(self._sites, groups, strict=True):
            own.centre = centres[group]
        self._part, self._sums = (ctypes.c_double * (2 * len(cut)))(), (ctypes.c_double * (2 * len(centres)))()

    @cached_property
    def native(self) -> ctypes.CDLL | None:
        """The C code, where it serves these buffers."""
        found = library(_SOURCE, agrees) if self.loc.is_cpu and self.loc.dtype == torch.float32 else None
        if found is not None:
            found.gradients.restype = ctypes.c_double
        return found

    def draw(self, seeds: Sequence[int] | None) -> Sequence[float] | Tensor:
        """Fill noise and value; returns each group's sums of (loc - centre)^2 + scale^2 and of log scale, [2 groups].

        Args:
            seeds: of each site, whose noise is `normals` of it; None takes the noise of all sites from the device's
                generator.
        """
        native = self.native
        if native is not None and seeds is not None:
            for own, seed in zip(self._sites, seeds, strict=True):
                own.seed = seed
            native.draws(
                *self._arguments(), *self._copied(), _address(self.values), _address(self.flips), self._part,
                ctypes.c_long(len(self.centres)), self._sums,
            )  # fmt: skip
            return list(self._sums)
        if seeds is None:
            self.noise.normal_()
        else:
            for seed, span, kind in zip(seeds, self.spans, self._kinds, strict=True):
                if kind != VARIANCE:
                    self.noise[span] = normals(seed, span.stop - span.start, self.noise)
        scale = weights.softplus(self.u)
        for span, kind in self._of_kind:
            loc, values = self.loc[span], self.values[:, span]
            if kind == VARIANCE:
                torch.square(scale[span], out=values[0])
                continue
            torch.addcmul(loc, scale[span], self.noise[span], out=values[0])
            if kind == FLIPPED:
                away = values[0] - loc
                torch.sub(loc, away, out=values[1])
                for copy in range(2, len(values)):
                    sign = -1 if copy % 2 else 1
                    torch.addcmul(loc, self.flips[copy // 2 - 1, span], away, value=sign, out=values[copy])
        found = []
        for span, centre in zip(self._of_group, self.centres, strict=True):
            loc, own = self.loc[span], scale[span]
            away = loc - centre if centre else loc
            found += [away.dot(away) + own.dot(own), own.log().sum()]
        return torch.stack(found)

    def gradients(self, found: Mapping[int, Gradients], k: float | Tensor) -> float | Tensor:
        """Fill to_loc and to_u of neighbouring sites with the loss's gradients; returns the sum of their squares.

        Args:
            found: what back-propagation gave each of these sites, by its number.
            k: see `precisions`.
        """
        native, first, last = self.native, min(found), max(found)
        if native is not None:
            for site, parts in found.items():
                own = self._sites[site]
                own.squares, own.logs = k * self.precisions[own.group], -k * self.logs[own.group]
                for copy, part in enumerate(parts.values):
                    own.to_value[copy] = None if part is None else part.data_ptr()
                own.to_loc, own.to_u = map(_address, (parts.loc, parts.u))
            return native.gradients(
                *self._arguments(first, last), *self._copied(), _address(self.flips), _address(self.to_loc),
                _address(self.to_u), self._part,
            )  # type: ignore[no-any-return]  # fmt: skip
        whole = slice(self.spans[first].start, self.spans[last].stop)
        by_copy = self._gathered(found, whole)
        if len(by_copy) > 1:
            torch.sum(by_copy, 0, out=self.to_loc[whole])
        scales, to_scale = weights.softplus(self.u[whole]), self.noise
        for every, kind in self._of_kind:
            if not (span := _within(every, whole)):
                continue
            at = slice(span.start - whole.start, span.stop - whole.start)
            if kind == VARIANCE:
                torch.mul(by_copy[0, at], scales[at], out=to_scale[span]).mul_(2)
                self.to_loc[span].zero_()
            elif kind == DRAW:
                to_scale[span].mul_(by_copy[0, at])
            else:
                by_noise = by_copy[0, at] - by_copy[1, at]
                for copy in range(2, len(by_copy)):
                    sign = -1 if copy % 2 else 1
                    by_noise.addcmul_(self.flips[copy // 2 - 1, span], by_copy[copy, at], value=sign)
                to_scale[span].mul_(by_noise)
        factor = torch.as_tensor(k).to(self.loc)
        priors = zip(self._of_group, self.centres, self.precisions, self.logs, strict=True)
        for every, centre, precision, log in priors:
            if not (span := _within(every, whole)):
                continue
            scale, loc = scales[span.start - whole.start : span.stop - whole.start], self.loc[span]
            if log:
                to_scale[span].addcdiv_(factor, scale, value=-log)
            if precision:
                to_scale[span].addcmul_(factor, scale, value=precision)
                self.to_loc[span].addcmul_(factor, loc - centre if centre else loc, value=precision)
        self.to_u[whole].mul_(torch.sigmoid(self.u[whole]))
        for name, buffer in (("loc", self.to_loc), ("u", self.to_u)):
            pairs = [(buffer[self.spans[site]], getattr(parts, name)) for site, parts in found.items()]
            if pairs := [pair for pair in pairs if pair[1] is not None]:
                torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
        return self.squares(whole if len(found) < len(self.spans) else slice(None))

    def squares(self, span: slice = slice(None)) -> float | Tensor:
        """The sum of the squares of the gradients; on a CPU as a number."""
        parts = (self.to.view(-1),) if span == slice(None) else (self.to_loc[span], self.to_u[span])
        found = sum(part.dot(part) for part in parts)
        return float(found) if self.loc.is_cpu else found

    def ivon_step(
        self, momentum: Tensor, rate: Any, factors: Sequence[float], c: Any, share: Any, alive: Tensor | None = None
    ) -> None:
        """A step of `ppl_bnn.inference.ivon` on loc and unconstrained scale by the gradients.

        Args:
            momentum: [n], changed.
            rate, factors: rate times a site's factor is the rate of the site.
            c, share: of `ivon_step`, and 1 - beta1. These and `rate` are numbers, or on a device tensors of one.
            alive: 0 leaves everything as it is, 1 does not; not in C.
        """
        native = self.native
        if native is not None:
            for own, factor in zip(self._sites, factors, strict=True):
                own.rate = rate * factor
            native.ivon(
                *self._arguments(), *map(_address, (momentum, self.to_loc, self.to_u)), ctypes.c_float(c),
                ctypes.c_float(1 - share),
            )  # fmt: skip
            return
        if alive is not None:
            for part in (self.to_loc, self.to_u):
                part.nan_to_num_(0.0, 0.0, 0.0)
            c, share, rate = c * alive, share * alive, rate * alive
        step = weights.ivon_change(self.u, momentum, self.to_loc, self.to_u, c, 1 - share)
        torch._foreach_mul_([step[span] for span in self.spans], list(factors))
        self.loc.sub_(step.mul_(rate))

    def _arguments(self, first: int = 0, last: int = -1) -> tuple[object, ...]:
        begin, end = self._tasks_before[first], self._tasks_before[last + 1 or -1]
        tasks = ctypes.byref(self._tasks, begin * ctypes.sizeof(_Task))
        return (
            ctypes.c_long(torch.get_num_threads()), ctypes.c_long(end - begin), tasks, self._sites,
            _address(self.loc), _address(self.u),
        )  # fmt: skip

    def _copied(self) -> tuple[object, ...]:
        return _address(self.noise), ctypes.c_long(len(self.noise)), ctypes.c_long(len(self.values))

    def _gathered(self, found: Mapping[int, Gradients], whole: slice) -> Tensor:
        """The gradients of neighbouring sites' values, [copies, n]: of one copy in to_loc, else in place of values."""
        copies, parts = len(self.values), []
        for copy in range(copies):
            for site, own in sorted(found.items()):
                value, span = own.values[copy] if copy < len(own.values) else None, self.spans[site]
                parts.append(self.noise.new_zeros(()).expand(span.stop - span.start) if value is None else value)
        if copies == 1:
            return torch.cat(parts, out=self.to_loc[whole]).view(1, -1)
        if len(found) == len(self.spans):
            return torch.cat(parts, out=self.values.view(-1)).view(copies, -1)
        return torch.cat(parts).view(copies, -1)

    def _runs(self, labels: Sequence[int]) -> list[tuple[slice, int]]:
        """Neighbouring sites of one label as one span."""
        pairs = zip(self.spans, labels, strict=True)
        runs = [(label, [span for span, _ in run]) for label, run in groupby(pairs, lambda pair: pair[1])]
        return [(slice(run[0].start, run[-1].stop), label) for label, run in runs]


def _within(span: slice, whole: slice) -> slice | None:
    start, stop = max(span.start, whole.start), min(span.stop, whole.stop)
    return slice(start, stop) if start < stop else None


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
