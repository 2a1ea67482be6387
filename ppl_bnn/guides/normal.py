"""The distribution of the mean-field guide, written for the speed of a step over millions of weights."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
from pyro.distributions import Normal
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, constraints, kl_divergence, register_kl

from ppl_bnn.models.priors import elementwise

SMALLEST_SCALE = 1.2e-7
# Numbers of one generator: large enough to hide a thread's start, small enough to share out a large layer.
_CHUNK = 1 << 18


class FactorizedNormal(TorchDistribution):
    """prod_j Normal(w_j | loc_j, scale_j) over all the weights of a site, as one event of their shape.

    It is ``Normal(loc, scale).to_event()`` with scale = softplus(unconstrained_scale) + 1.2e-7, and with scale and the
    KL against a Normal prior written out in few passes over memory: for VGG-16 at batch 128 the weights' arithmetic
    was half of what a Bayesian step cost over a deterministic one.

    Args:
        loc, unconstrained_scale: real, of the site's shape.
        keep: of the same shape; loc and scale are multiplied by it (0 prunes a weight).
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.nonnegative}
    has_rsample = True

    def __init__(self, loc: Tensor, unconstrained_scale: Tensor, keep: Tensor | None = None) -> None:
        scale: Tensor = _Scale.apply(unconstrained_scale)  # type: ignore[no-untyped-call]
        self.loc, self.scale = (loc, scale) if keep is None else (loc * keep, scale * keep)
        super().__init__(Size(), loc.shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.event_dim)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008 -- torch's own signature
        """[*sample_shape, *shape]."""
        return torch.addcmul(self.loc, self.scale, standard_normal(self.loc, sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats."""
        return self._independent().log_prob(value)

    def entropy(self) -> Tensor:
        """Nats."""
        return self.scale.log().sum() + self.loc.numel() * 0.5 * math.log(2 * math.pi * math.e)

    def expand(self, batch_shape: Size, _instance: None = None) -> TorchDistribution:
        return self._independent().expand(batch_shape)

    def _independent(self) -> TorchDistribution:
        return Normal(self.loc, self.scale, validate_args=False).to_event(self.event_dim)


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


class _Scale(torch.autograd.Function):
    """softplus(u) + SMALLEST_SCALE."""

    @staticmethod
    def forward(ctx: Any, unconstrained: Tensor) -> Tensor:
        ctx.save_for_backward(unconstrained)
        return arithmetic(_scale)(unconstrained)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return arithmetic(_scale_gradient)(*ctx.saved_tensors, gradient)


class _NormalKL(torch.autograd.Function):
    """Sum over j of KL(Normal(loc_j, scale_j) || Normal(prior_loc, prior_scale)); no gradient for the prior."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, prior_loc: Tensor, prior_scale: Tensor) -> Tensor:
        ctx.save_for_backward(loc, scale, prior_loc, prior_scale)
        return arithmetic(_kl_value)(loc, scale, prior_loc, prior_scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        loc, scale, prior_loc, prior_scale = ctx.saved_tensors
        return *arithmetic(_kl_gradients)(loc, scale, prior_loc, prior_scale, gradient), None, None


def _scale(u: Tensor) -> Tensor:
    # max(u, 0) + log1p(e^-|u|), with log1p(t) = 2 atanh(t / (2 + t)): torch's log1p is ten times slower where
    # t is below 1e-3, as it is for the small scales that trainings start from.
    t = u.abs().neg_().exp_()
    t = t.div_(t + 2).atanh_().mul_(2)
    return t.add_(u.clamp_min(0)).add_(SMALLEST_SCALE)


def inverse_scale(scale: Tensor) -> Tensor:
    """The unconstrained scale of a scale above 1.2e-7: softplus^-1(scale - 1.2e-7)."""
    scale = (scale - SMALLEST_SCALE).clamp_min_(1e-9)
    # s + log(1 - e^-s), with 1 - e^-s = 2 t / (1 + t), t = tanh(s / 2), which keeps its digits for small s.
    t = (0.5 * scale).tanh_()
    return scale.add_((2 * t).div_(1 + t).log_())


def _scale_gradient(u: Tensor, gradient: Tensor) -> Tensor:
    return torch.sigmoid(u).mul_(gradient)


def _kl_value(loc: Tensor, scale: Tensor, prior_loc: Tensor, prior_scale: Tensor) -> Tensor:
    z = (loc - prior_loc).div_(prior_scale)
    ratio = scale / prior_scale
    squares = z.square_().add_(ratio.square()).sum()
    return 0.5 * (squares - loc.numel()) - ratio.log_().sum()


def _kl_gradients(
    loc: Tensor, scale: Tensor, prior_loc: Tensor, prior_scale: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    precision = gradient / prior_scale.square()
    to_scale = torch.reciprocal(scale).mul_(-gradient).add_(scale * precision)
    return (loc - prior_loc).mul_(precision), to_scale


_compiled: dict[Callable, Callable] | None = None


def arithmetic(function: Callable) -> Callable:
    """`function` of equally shaped tensors (and scalar ones), elementwise or a sum: compiled if this context is."""
    if _compiled is None:
        return function
    if function not in _compiled:
        _compiled[function] = _compile(function)
    return _compiled[function]


@contextmanager
def compiled_arithmetic() -> Iterator[None]:
    """Run the weights' arithmetic through ``torch.compile`` in this context: one pass over memory where it takes ten.

    It needs a C++ compiler, and half a minute at the first step.
    """
    global _compiled
    before, _compiled = _compiled, {}
    try:
        yield
    finally:
        _compiled = before


def _compile(function: Callable) -> Callable:
    compiled = torch.compile(function, dynamic=True)

    def call(*tensors: Tensor) -> Any:
        # As vectors all sites share one compiled function; a shape of its own would make the compiler start again.
        first = tensors[0]
        flat = [tensor.detach() if tensor.dim() == 0 else _flat(tensor, first.stride()) for tensor in tensors]
        found = compiled(*flat)
        if isinstance(found, tuple):
            return tuple(part.as_strided(first.shape, first.stride()) for part in found)
        return found.as_strided(first.shape, first.stride()) if found.dim() else found

    return call


def _flat(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    if tensor.stride() != strides:
        tensor = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    # Not a view: the compiler would look at the shape behind it, and compile anew for each.
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), (tensor.numel(),), (1,))  # type: ignore[call-overload]


@register_kl(FactorizedNormal, Distribution)
def _kl(q: FactorizedNormal, p: Distribution) -> Tensor:
    base = elementwise(p)
    if isinstance(base, torch.distributions.Normal) and not (base.loc.requires_grad or base.scale.requires_grad):
        return _NormalKL.apply(q.loc, q.scale, base.loc, base.scale)  # type: ignore[no-untyped-call]
    return kl_divergence(q._independent(), p)
