"""The distribution of the mean-field guide, written for the speed of a step over millions of weights."""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pyro.distributions import Normal
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, constraints, kl_divergence, register_kl

from ppl_bnn.guides.arithmetic import arithmetic
from ppl_bnn.models.priors import elementwise

SMALLEST_SCALE = 1.2e-7
# Numbers of one generator: large enough to hide a thread's start, small enough to share out a large layer.
_CHUNK = 1 << 16


class FactorizedNormal(TorchDistribution):
    """prod_j Normal(w_j | loc_j, scale_j) over all the weights of a site, as one event of their shape.

    It is ``Normal(loc, scale).to_event()`` with scale = softplus(unconstrained_scale) + 1.2e-7. A draw comes with three
    sums over the weights, of loc, of loc^2 + scale^2 and of log scale, from which the entropy and the KL to any Normal
    prior of all the weights follow; their gradients are taken in the same passes over memory as the draw's. (For
    VGG-16 at batch 128 the weights' arithmetic in plain torch was half of what a Bayesian step cost over a
    deterministic one.)

    Args:
        loc, unconstrained_scale: real, of the site's shape.
        keep: bool, of the same shape; loc and scale are multiplied by it (False prunes a weight). Entropy and KL are
            of the weights that are left: one that is fixed at zero has none.
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.nonnegative}
    has_rsample = True

    def __init__(self, loc: Tensor, unconstrained_scale: Tensor, keep: Tensor | None = None) -> None:
        self._loc, self._unconstrained_scale, self.keep = loc, unconstrained_scale, keep
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None
        super().__init__(Size(), loc.shape, validate_args=False)

    @property
    def loc(self) -> Tensor:
        """[*shape], 0 where pruned."""
        return self._loc if self.keep is None else self._loc * self.keep

    @property
    def scale(self) -> Tensor:
        """[*shape], 0 where pruned."""
        scale: Tensor = _Scale.apply(self._unconstrained_scale)  # type: ignore[no-untyped-call]
        return scale if self.keep is None else scale * self.keep

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.event_dim)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008 -- torch's own signature
        """[*sample_shape, *shape]."""
        noise = standard_normal(self._loc, sample_shape)
        # Sums without a gradient must not be remembered for a KL that is asked for its gradient.
        if sample_shape or self.keep is not None or not torch.is_grad_enabled():
            return torch.addcmul(self.loc, self.scale, noise)
        draw, *sums = _Draw.apply(self._loc, self._unconstrained_scale, noise)  # type: ignore[no-untyped-call]
        self._sums = (sums[0], sums[1], sums[2])
        return draw

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats."""
        return self._independent().log_prob(value)

    def entropy(self) -> Tensor:
        """Nats."""
        return self.sums()[2] + self.count() * 0.5 * math.log(2 * math.pi * math.e)

    def count(self) -> int:
        """The number of weights that are not pruned."""
        return self._loc.numel() if self.keep is None else int(self.keep.sum())

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the weights that are left of loc, of loc^2 + scale^2, and of log scale; scalars."""
        if self._sums is None and self.keep is not None:
            loc, scale = self.loc, self.scale
            return loc.sum(), (loc.square() + scale.square()).sum(), scale.masked_fill(~self.keep, 1.0).log().sum()
        if self._sums is None:
            return _Sums.apply(self.loc, self.scale)  # type: ignore[no-untyped-call,no-any-return]
        return self._sums

    def expand(self, batch_shape: Size, _instance: None = None) -> TorchDistribution:
        return self._independent().expand(batch_shape)

    def _independent(self) -> TorchDistribution:
        return Normal(self.loc, self.scale, validate_args=False).to_event(self.event_dim)


@register_kl(FactorizedNormal, Distribution)
def _kl(q: FactorizedNormal, p: Distribution) -> Tensor:
    base = elementwise(p)
    if not isinstance(base, torch.distributions.Normal) or _varies(base.loc) or _varies(base.scale):
        if q.keep is None:
            return kl_divergence(q._independent(), p)
        each = kl_divergence(Normal(q._loc, softplus(q._unconstrained_scale), validate_args=False), base)
        return (each * q.keep).sum()
    loc, scale = (part[(0,) * part.dim()] for part in (base.loc, base.scale))
    total, squares, logs = q.sums()
    count = q.count()
    # Most priors are centred at 0, which saves a pass; on a GPU it is not worth waiting for the answer.
    if loc.is_cuda or loc.requires_grad or loc:
        squares = squares - 2 * loc * total + count * loc.square()
    return squares * (0.5 / scale.square()) - logs + count * (scale.log() - 0.5)


def _varies(parameter: Tensor) -> bool:
    # A distribution that was expanded repeats one number by strides of 0.
    return any(stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True) if size > 1)


def standard_normal(like: Tensor, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
    """Independent Normal(0, 1) numbers [*sample_shape, *like.shape], from torch's global generator.

    On a CPU, large tensors are filled by all of torch's threads (torch itself uses one); the numbers do not depend on
    how many there are.
    """
    if sample_shape:
        return torch.randn(sample_shape + like.shape, dtype=like.dtype, device=like.device)
    noise = torch.empty_like(like)
    if like.is_cuda or like.numel() <= _CHUNK:
        return noise.normal_()
    # The strides may be those of channels_last; the memory is dense in any case.
    parts = noise.as_strided((like.numel(),), (1,)).split(_CHUNK)
    seeds = torch.randint(2**32, (len(parts),)).tolist()

    def fill(part: Tensor, seed: int) -> None:
        part.normal_(generator=torch.Generator().manual_seed(seed))

    threads = torch.get_num_threads()
    if threads == 1:
        for part, seed in zip(parts, seeds, strict=True):
            fill(part, seed)
    else:
        list(_pool(threads).map(fill, parts, seeds))
    return noise


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="ppl_bnn-noise")


class _Draw(torch.autograd.Function):
    """loc + scale * noise, and the three sums."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, unconstrained: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        draw, scale, *sums = arithmetic(_draw)(loc, unconstrained, noise)
        ctx.save_for_backward(loc, unconstrained, scale, noise)
        ctx.set_materialize_grads(False)
        return draw, *sums

    @staticmethod
    def backward(ctx: Any, to_draw: Tensor | None, *to_sums: Tensor | None) -> tuple[Tensor, Tensor, None]:
        loc, unconstrained, scale, noise = ctx.saved_tensors
        if to_draw is None:
            to_draw = torch.zeros_like(loc)
        return *arithmetic(_draw_gradients)(loc, unconstrained, scale, noise, to_draw, *_scalars(loc, to_sums)), None


class _Sums(torch.autograd.Function):
    """The three sums alone, of loc and scale."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(loc, scale)
        ctx.set_materialize_grads(False)
        return arithmetic(_sums)(loc, scale)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *to_sums: Tensor | None) -> tuple[Tensor, Tensor]:
        loc, scale = ctx.saved_tensors
        return arithmetic(_sums_gradients)(loc, scale, *_scalars(loc, to_sums))  # type: ignore[no-any-return]


class _Scale(torch.autograd.Function):
    """softplus(u) + SMALLEST_SCALE."""

    @staticmethod
    def forward(ctx: Any, unconstrained: Tensor) -> Tensor:
        ctx.save_for_backward(unconstrained)
        return arithmetic(softplus)(unconstrained)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return arithmetic(_softplus_gradient)(*ctx.saved_tensors, gradient)  # type: ignore[no-any-return]


def softplus(u: Tensor) -> Tensor:
    """The scale of an unconstrained scale: log(1 + e^u) + 1.2e-7."""
    return F.softplus(u).add_(SMALLEST_SCALE)


def inverse_scale(scale: Tensor) -> Tensor:
    """The unconstrained scale of a scale above 1.2e-7: softplus^-1(scale - 1.2e-7)."""
    scale = (scale - SMALLEST_SCALE).clamp_min_(1e-9)
    # s + log(1 - e^-s), which keeps its digits for small s and does not overflow for large.
    return scale.add_((-scale).expm1_().neg_().log_())


def _softplus_gradient(u: Tensor, gradient: Tensor) -> Tensor:
    return torch.sigmoid(u).mul_(gradient)


def _draw(loc: Tensor, u: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    scale = softplus(u)
    return torch.addcmul(loc, scale, noise), scale, *_sums(loc, scale)


def _draw_gradients(
    loc: Tensor, u: Tensor, scale: Tensor, noise: Tensor, to_draw: Tensor, *to_sums: Any
) -> tuple[Tensor, Tensor]:
    to_loc, to_scale = _sums_gradients(loc, scale, *to_sums)
    return to_loc.add_(to_draw), _softplus_gradient(u, to_scale.addcmul_(to_draw, noise))


def _sums(loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return loc.sum(), loc.square().addcmul_(scale, scale).sum(), scale.log().sum()


def _sums_gradients(
    loc: Tensor, scale: Tensor, to_total: Tensor | None, to_squares: Tensor, to_logs: Tensor
) -> tuple[Tensor, Tensor]:
    to_loc = loc * (2 * to_squares)
    if to_total is not None:
        to_loc.add_(to_total)
    return to_loc, torch.reciprocal(scale).mul_(to_logs).add_(scale * (2 * to_squares))


def _scalars(like: Tensor, to_sums: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    # The sum of loc is mostly not used, and then costs nothing.
    return [to_sums[0], *(like.new_zeros(()) if gradient is None else gradient for gradient in to_sums[1:])]
