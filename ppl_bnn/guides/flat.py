"""The weights of a mean-field guide in one buffer, and a step's draw and gradients of all of them at once.

The guide's parameters stay what they are (names, ``state_dict``, `loc_scale`, ``requires_grad``): their memory moves
into the buffers for the time of a training. A parameter that is given other memory meanwhile (``.to``, say) has left
them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Normal

from ppl_bnn.errors import UserError
from ppl_bnn.guides.mean_field import MeanFieldNormal
from ppl_bnn.guides.normal import FactorizedNormal, outer_shapes, seeds, signs
from ppl_bnn.models.cross_entropy import cross_entropy_operation
from ppl_bnn.models.priors import elementwise, varies
from ppl_bnn.native.arithmetic import Operation
from ppl_bnn.native.flat import DRAW, FLIPPED, VARIANCE, FlatArithmetic, Gradients


class FlatNormal:
    """Some sites of a mean-field guide, whose loc and unconstrained scale are both trained, in one buffer each.

    A step is `draw`, back-propagation through `values`, and `gradients`.

    Args:
        guide: not pruned. The sites' parameters must have one dtype and device.
        priors: of the sites, in their order here, the prior where its KL is computed here (`has_flat_kl`), else None.
        with_variance: sites that the network is given the variance of, in place of a draw.
        flipped: sites that have several draws, which differ in signs (`ppl_bnn.guides.estimators.groups`).
        copies: their number of draws.

    Attributes:
        kl_factor: what the KL of `kl_sites` is multiplied by in the loss; set it before `gradients`.
        values: leaf tensors that require gradients, {site: [*shape]}: the draw, or the variance.
        posterior: {site: q of the site}.
        kl_sites: those whose KL is computed here.
        locs, unconstrained_scales: the parameters of each site, in the order of the buffers.
    """

    def __init__(
        self, guide: MeanFieldNormal, priors: Mapping[str, Distribution | None], *, with_variance: Sequence[str] = (),
        flipped: Sequence[str] = (), copies: int = 1,
    ) -> None:  # fmt: skip
        kinds = {site: None if prior is None else _kind(elementwise(prior)) for site, prior in priors.items()}
        groups = list(dict.fromkeys(kinds.values()))
        # Sites of one prior lie side by side, so that their sums are one.
        self._sites = sorted(priors, key=lambda site: groups.index(kinds[site]))
        self.kl_sites = {site for site in priors if kinds[site] is not None}
        self._parameters = {site: guide.parameters_of(site) for site in self._sites}
        like = next(iter(self._parameters.values()))[0].detach()
        normals = [one if isinstance(one, _Normal) else _Normal(0.0, math.inf) for one in groups]
        self.arithmetic = FlatArithmetic(
            [self._parameters[site][0].numel() for site in self._sites],
            [groups.index(kinds[site]) for site in self._sites],
            like,
            kinds=[VARIANCE if site in with_variance else FLIPPED if site in flipped else DRAW for site in self._sites],
            copies=copies,
            centres=[one.loc for one in normals],
            precisions=[one.scale**-2 for one in normals],
            logs=[0.0 if one is None else 1.0 for one in groups],
        )
        pairs = zip(self.arithmetic.precisions, self.arithmetic.logs, strict=True)
        self._kl_factors = [factor for precision, log in pairs for factor in (precision / 2, -log)]
        self._factors: Tensor | None = None
        # What the sums leave out.
        self._constant = sum(
            (math.log(kind.scale) - 0.5 if isinstance(kind, _Normal) else -0.5 * math.log(2 * math.pi * math.e))
            * self._parameters[site][0].numel()
            for site, kind in kinds.items()
            if kind is not None
        )
        found: dict[object, tuple[Operation, list[Tensor]]] = {
            kind: (kind.operation, [like.new_full((), scalar) for scalar in kind.scalars])
            for kind in groups
            if isinstance(kind, _CrossEntropy)
        }
        self._cross_entropies = {
            number: found[kinds[site]] for number, site in enumerate(self._sites) if kinds[site] in found
        }
        self._cross_entropy: float | Tensor = 0.0
        self.kl_factor: float | Tensor = 1.0
        self._flips: list[tuple[Tensor, tuple[Size, Size]]] = []
        self.values: dict[str, Tensor] = {}
        self.posterior: dict[str, FactorizedNormal] = {}
        self.locs, self.unconstrained_scales = map(list, zip(*self._parameters.values(), strict=True))
        for parameter, view in self._with_views(self.arithmetic.loc, self.arithmetic.u):
            view.copy_(parameter.detach())
            parameter.data = view
        for site, span in zip(self._sites, self.arithmetic.spans, strict=True):
            loc, u = self._parameters[site]
            rows = self.arithmetic.values if site in flipped else self.arithmetic.values[:1]
            leaves = [_as_shaped(row[span], loc).requires_grad_() for row in rows]
            self.values[site] = leaves[0]
            self.posterior[site] = _FlatSite(loc, u, leaves[0] if site in with_variance else None, leaves[1:])
            if site in flipped:
                flips = [_as_shaped(row[span], loc) for row in self.arithmetic.flips]
                self._flips += [(flip, outer_shapes(loc)) for flip in flips]
        self._places = {site: _places(*pair) for site, pair in self._parameters.items()}

    def draw(self, of_sites: Mapping[str, int] | None = None) -> float | Tensor:
        """Draw every site anew; returns the KL of `kl_sites` in nats, but for `take_cross_entropy`; a number on a CPU.

        Args:
            of_sites: a seed of each site's noise; None takes the noise from the device's generator.
        """
        self._check()
        with torch.no_grad():
            self._draw_flips(on_cpu=of_sites is not None)
            sums = self.arithmetic.draw(None if of_sites is None else [of_sites[site] for site in self._sites])
        if isinstance(sums, Tensor):
            if self._factors is None:
                self._factors = torch.tensor(self._kl_factors, dtype=sums.dtype, device=sums.device)
            return sums.dot(self._factors) + self._constant
        return self._constant + sum(factor * one for factor, one in zip(self._kl_factors, sums, strict=True))

    def _check(self) -> None:
        """Raise UserError for a parameter that is frozen since, or no longer in the buffers."""
        for site, (loc, u) in self._parameters.items():
            if not (loc.requires_grad and u.requires_grad) or self._places[site] != _places(loc, u):
                raise UserError(
                    f"the parameters of {site!r} were frozen, moved or converted during a training: end it first, and "
                    "call fit again"
                )

    def _draw_flips(self, *, on_cpu: bool) -> None:
        """Draw the signs of outputs and inputs of each flipped site, and multiply them."""
        counts = [shape.numel() for _, shapes in self._flips for shape in shapes]
        if not counts:
            return
        like = self.arithmetic.noise
        if on_cpu:
            # As the estimator draws them.
            parts = [signs(like, (count,), seed=seed) for count, seed in zip(counts, seeds(len(counts)), strict=True)]
        else:
            parts = [*signs(like, (sum(counts),)).split(counts)]
        for (flip, shapes), one, other in zip(self._flips, parts[::2], parts[1::2], strict=True):
            torch.mul(one.view(shapes[0]).expand(flip.shape), other.view(shapes[1]), out=flip)

    def gradients(self, sites: range | None = None) -> float | Tensor:
        """Gather the gradients of `values` and of the parameters, which lose theirs; returns the sum of their squares.

        The KL of `kl_sites` counts `kl_factor` times in the loss.

        Args:
            sites: numbers of neighbouring sites in the order of the buffers; None for all. Of a part, what is returned
                is not the sum.
        """
        found = {}
        for number in range(len(self._sites)) if sites is None else sites:
            *values, loc, u = map(_taken, self.leaves(number))
            found[number] = Gradients(values, loc, u)
        with torch.no_grad():
            squares = self.arithmetic.gradients(found, self.kl_factor)
            if not self._cross_entropies:
                return squares
            self._add_cross_entropies(range(min(found), max(found) + 1))
            return self.arithmetic.squares() if sites is None else math.nan

    def _add_cross_entropies(self, sites: range) -> None:
        arithmetic = self.arithmetic
        parts = (arithmetic.to_loc, arithmetic.to_u, arithmetic.loc, arithmetic.u)
        k = torch.as_tensor(self.kl_factor).to(arithmetic.loc)
        number = sites.start
        while number < sites.stop:
            first, found = number, self._cross_entropies.get(number)
            # Neighbours of one prior at once.
            while number < sites.stop and self._cross_entropies.get(number) is found:
                number += 1
            if found is not None:
                span = slice(arithmetic.spans[first].start, arithmetic.spans[number - 1].stop)
                value = found[0](*(part[span] for part in parts), k, *found[1])[0]
                self._cross_entropy = self._cross_entropy + (float(value) if value.is_cpu else value)

    def take_cross_entropy(self) -> float | Tensor:
        """What `gradients` found of the KL since the last call, and `draw` leaves out: -E[log prior], in nats."""
        found, self._cross_entropy = self._cross_entropy, 0.0
        return found

    def leaves(self, number: int) -> tuple[Tensor, ...]:
        """What back-propagation reaches of a site, by its number: its values, loc and unconstrained scale."""
        site = self._sites[number]
        return self.values[site], *self.posterior[site].copies, *self._parameters[site]

    def parts(self, size: float) -> Iterator[tuple[range, list[Tensor], list[Tensor], list[Tensor]]]:
        """Neighbouring sites whose gradients take about `size` bytes: numbers, leaves, values of these, gradients."""
        first, spans, to = 0, self.arithmetic.spans, self.arithmetic.to
        for last, span in enumerate(spans):
            whole = slice(spans[first].start, span.stop)
            after = spans[last + 1].stop if last + 1 < len(spans) else math.inf
            if (after - whole.start) * 2 * to.element_size() > size:
                sites = range(first, last + 1)
                leaves = [self.leaves(site) for site in sites]
                values = [value for own in leaves for value in own[:-2]]
                # All of them are one piece of memory.
                parts = [to.view(-1)] if len(sites) == len(spans) else [one[whole] for one in to]
                yield sites, [leaf for own in leaves for leaf in own], values, parts
                first = last + 1

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers beside the parameters: noise, values and gradients."""
        arithmetic = self.arithmetic
        return 2 * arithmetic.loc.nbytes + arithmetic.values.nbytes + arithmetic.flips.nbytes

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Each site's part of a buffer [n], in the site's shape."""
        return [_as_shaped(buffer[span], loc) for span, loc in zip(self.arithmetic.spans, self.locs, strict=True)]

    def give_gradients(self) -> None:
        """Set the ``grad`` of every parameter to its part of the buffers."""
        for parameter, view in self._with_views(self.arithmetic.to_loc, self.arithmetic.to_u):
            parameter.grad = view

    def _with_views(self, of_loc: Tensor, of_u: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Every parameter, with its part of a buffer of loc or of one of the unconstrained scale."""
        for parameters, buffer in ((self.locs, of_loc), (self.unconstrained_scales, of_u)):
            yield from zip(parameters, self.views(buffer), strict=True)

    def release(self) -> None:
        """Give every parameter memory of its own again, in which it is what it was."""
        for parameter in (*self.locs, *self.unconstrained_scales):
            parameter.data = parameter.detach().clone()

    def drop_gradients(self) -> None:
        """Set the ``grad`` of every parameter, and of every value, to None."""
        for number in range(len(self._sites)):
            for leaf in self.leaves(number):
                leaf.grad = None


def has_flat_kl(prior: object) -> bool:
    """Whether `FlatNormal` computes the KL to a site's prior."""
    return isinstance(prior, Distribution) and _kind(elementwise(prior)) is not None


@dataclass(frozen=True)
class _Normal:
    loc: float
    scale: float


@dataclass(frozen=True)
class _CrossEntropy:
    operation: Operation
    scalars: tuple[float, ...]


def _kind(base: Distribution) -> _Normal | _CrossEntropy | None:
    """How the KL is computed to a prior that is the same for all the weights of a site, and learns nothing."""
    if isinstance(base, Normal):
        if any(varies(value) or value.requires_grad for value in (base.loc, base.scale)):
            return None
        return _Normal(*(float(value[(0,) * value.dim()]) for value in (base.loc, base.scale)))
    found = cross_entropy_operation(base, dtype=torch.float64)
    return None if found is None else _CrossEntropy(found[0], tuple(map(float, found[1])))


class _FlatSite(FactorizedNormal):
    """q of a site; its variance and further draws are leaves in the buffers where there are such."""

    def __init__(
        self, loc: Tensor, unconstrained_scale: Tensor, variance: Tensor | None, copies: Sequence[Tensor]
    ) -> None:
        super().__init__(loc, unconstrained_scale)
        self._variance, self.copies = variance, copies

    @property
    def variance(self) -> Tensor:
        """[*shape]."""
        return super().variance if self._variance is None else self._variance


def _places(*parameters: Tensor) -> list[int | None]:
    """Where tensors are in memory; None where a device does not tell."""
    try:
        return [parameter.data_ptr() for parameter in parameters]
    except RuntimeError:
        return [None]


def _as_shaped(part: Tensor, parameter: Tensor) -> Tensor:
    """A part of a buffer in the shape of a parameter, and in the order of its memory."""
    strides = torch.empty_like(parameter.detach()).stride()
    return part.as_strided(parameter.shape, strides, part.storage_offset())


def _taken(leaf: Tensor) -> Tensor | None:
    """A leaf's gradient as a vector in the order of the leaf's memory; the leaf then has none."""
    gradient = leaf.grad
    if gradient is None:
        return None
    leaf.grad = None
    if gradient.stride() != leaf.stride():
        gradient = torch.empty_like(leaf).copy_(gradient)
    return gradient.as_strided((gradient.numel(),), (1,))
