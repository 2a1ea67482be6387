"""IVON, natural-gradient learning of the mean-field guide: improved variational online Newton (Shen et al. 2024)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ppl_bnn.guides.normal import SMALLEST_SCALE, inverse_scale, softplus
from ppl_bnn.native.arithmetic import arithmetic


class IVON(torch.optim.Optimizer):
    """Improved variational online Newton (Shen et al. 2024, algorithm 1) on a guide's loc and unconstrained scale.

    With tau = kl_weight / num_data and the precision p = h + delta of that paper, the scale it keeps is
    sqrt(tau / p): p is read off the guide's own scale, and the difference of its new and its running curvature is the
    KL-scaled ELBO's gradient with respect to the scale, divided by the scale. So it needs no copy of the prior, works
    with any prior and any estimator, and keeps one number a weight, the momentum. With ratio = gradient * scale / tau
    and c = 1 - beta2 a step is

        1 / scale^2  <-  (1 + c ratio + (c ratio)^2 / 2) / scale^2
        loc          <-  loc - lr (scale / initial scale)^2 momentum

    where the squared term keeps the precision positive (their eq. 8, as in Lin et al. 2020) and momentum is the
    bias-corrected moving average of loc's gradient. Beside the paper: the gradient of the prior is averaged with that
    of the likelihood (there it is added after averaging); `lr` is the learning rate of their ``rescale_lr``, on SGD's
    scale. Point estimates are learned by SGD with the same lr and momentum.

    Args:
        weights: pairs (loc, unconstrained_scale) of the guide's parameters. A pair without gradients stays as it is.
        points: parameters without a scale: biases and batch norm.
        lr: learning rate; about 0.1.
        beta1, beta2: decay of the momentum and of the curvature.
    """

    def __init__(
        self,
        weights: Iterable[tuple[Tensor, Tensor]],
        points: Iterable[Tensor] = (),
        *,
        lr: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.99999,
    ) -> None:
        locs, scales = zip(*weights, strict=True)
        groups: list[dict[str, Any]] = [{"params": list(locs)}, {"params": list(scales)}]
        if points := list(points):
            groups.append({"params": points})
        super().__init__(groups, {"lr": lr, "beta1": beta1, "beta2": beta2, "kl_per_datum": 1.0})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """One update; `kl_per_datum` (kl_weight / num_data) of the first group must be that of the gradients."""
        locs, scales, *rest = self.param_groups
        for loc, unconstrained in zip(locs["params"], scales["params"], strict=True):
            if loc.grad is None and unconstrained.grad is None:
                continue
            state = self._state(loc)
            if "initial_variance" not in state:
                state["initial_variance"] = softplus(unconstrained).square_().mean()
            # The step's factors as tensors on the device, so that a compiled function does not take them for constants.
            rate = locs["lr"] / (state["initial_variance"] * (1 - locs["beta1"] ** int(state["step"])))
            c = loc.new_full((), (1 - locs["beta2"]) / locs["kl_per_datum"])
            beta1 = loc.new_full((), locs["beta1"])
            momentum = state["momentum"]
            # What is changed in place must lie in memory like the first argument.
            assert loc.stride() == unconstrained.stride() == momentum.stride()
            arithmetic(_step)(loc, unconstrained, momentum, loc.grad, unconstrained.grad, rate, c, beta1)
        for group in rest:
            for point in group["params"]:
                if point.grad is not None:
                    state = self._state(point)
                    state["momentum"].lerp_(point.grad, 1 - group["beta1"])
                    point.sub_(state["momentum"], alpha=group["lr"] / (1 - group["beta1"] ** int(state["step"])))

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"], state["momentum"] = torch.tensor(0.0), torch.zeros_like(parameter)
        state["step"] += 1
        return state


def _step(
    loc: Tensor, u: Tensor, momentum: Tensor, to_loc: Tensor, to_u: Tensor, rate: Tensor, c: Tensor, beta1: Tensor
) -> None:
    momentum.lerp_(to_loc, 1 - beta1)
    # softplus(u), and below its derivative, a sigmoid, which to_u holds: of one exponential, half the time of two.
    t = u.abs().neg_().exp_()
    scale = t.log1p().add_(u.clamp_min(0)).add_(SMALLEST_SCALE)
    change = (to_u * (1 + t)).div_(torch.where(u > 0, 1, t)).mul_(scale).mul_(c)
    scale.mul_(change.square().mul_(0.5).add_(change).add_(1).rsqrt_())
    loc.sub_((scale.square() * rate).mul_(momentum))
    u.copy_(inverse_scale(scale))
