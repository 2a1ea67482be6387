"""IVON, natural-gradient learning of the mean-field guide: improved variational online Newton (Shen et al. 2024)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ppl_bnn.guides.normal import softplus
from ppl_bnn.native.arithmetic import OPERATIONS


class IVON(torch.optim.Optimizer):
    """Improved variational online Newton (Shen et al. 2024, algorithm 1) on a guide's loc and unconstrained scale.

    Let tau = kl_weight / num_data, and let p = h + delta be the precision of the paper. The scale is sqrt(tau / p), so
    p is read off the guide's own scale. The new curvature minus the running curvature is the gradient of the KL-scaled
    ELBO with respect to the scale, divided by the scale. So IVON needs no copy of the prior, and works with any prior
    and any estimator. It stores one number a weight, the momentum. With ratio = gradient * scale / tau and c = 1 -
    beta2, a step is

        1 / scale^2  <-  (1 + c ratio + (c ratio)^2 / 2) / scale^2
        loc          <-  loc - lr (scale / initial scale)^2 momentum

    The squared term keeps the precision positive (their eq. 8, as in Lin et al. 2020). The momentum is the
    bias-corrected moving average of loc's gradient.

    Two things differ from the paper. The gradient of the prior is averaged with that of the likelihood; the paper adds
    it after averaging. `lr` is the learning rate of their ``rescale_lr``, on SGD's scale. Point estimates are learned
    by SGD with the same lr and momentum.

    Args:
        weights: pairs (loc, unconstrained_scale) of the guide's parameters. A pair without gradients stays as it is.
        points: parameters without a scale: biases and batch norm.
        lr: learning rate; about 0.1.
        beta1, beta2: decay of the momentum and of the curvature.
        kl_per_datum: tau, kl_weight / num_data of the loss; the first group's entry of that name.
    """

    def __init__(
        self,
        weights: Iterable[tuple[Tensor, Tensor]],
        points: Iterable[Tensor] = (),
        *,
        lr: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        kl_per_datum: float = 1.0,
    ) -> None:
        locs, scales = zip(*weights, strict=True)
        groups: list[dict[str, Any]] = [{"params": list(locs)}, {"params": list(scales)}]
        if points := list(points):
            groups.append({"params": points})
        super().__init__(groups, {"lr": lr, "beta1": beta1, "beta2": beta2, "kl_per_datum": kl_per_datum})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state, but for `kl_per_datum`: version 0.1.0 saved a placeholder before the first step."""
        kl_per_datum = self.param_groups[0]["kl_per_datum"]
        super().load_state_dict(state_dict)
        self.param_groups[0]["kl_per_datum"] = kl_per_datum

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """One update; `kl_per_datum` (kl_weight / num_data) of the first group must be that of the gradients."""
        locs, scales, *rest = self.param_groups
        for loc, unconstrained in zip(locs["params"], scales["params"], strict=True):
            if loc.grad is None and unconstrained.grad is None:
                continue
            state = self._state(loc)
            # The step's factors as tensors on the device, so that a compiled function does not take them for constants.
            rate = locs["lr"] / (initial_variance(state, unconstrained) * (1 - locs["beta1"] ** int(state["step"])))
            c = loc.new_full((), (1 - locs["beta2"]) / locs["kl_per_datum"])
            beta1 = loc.new_full((), locs["beta1"])
            momentum = state["momentum"]
            # What is changed in place must lie in memory like the first argument.
            assert loc.stride() == unconstrained.stride() == momentum.stride()
            gradients = loc.grad, unconstrained.grad
            OPERATIONS["ivon_step"](loc, unconstrained, momentum, *gradients, rate, c, beta1)
        for group in rest:
            move_points(self, [point for point in group["params"] if point.grad is not None], group)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"], state["momentum"] = torch.tensor(0.0), torch.zeros_like(parameter)
        state["step"] += 1
        return state


def initial_variance(state: dict[str, Tensor], unconstrained: Tensor) -> Tensor:
    """The mean variance of a site when its training began, which its `state` keeps."""
    if "initial_variance" not in state:
        state["initial_variance"] = softplus(unconstrained).square_().mean()
    return state["initial_variance"]


@torch.no_grad()
def move_points(optimizer: IVON, points: list[Tensor], group: dict[str, Any]) -> None:
    """SGD with momentum on point estimates of one group, all of which have gradients."""
    if points:
        states = [optimizer._state(point) for point in points]
        momenta = [state["momentum"] for state in states]
        gradients: list[Tensor] = [point.grad for point in points]  # type: ignore[misc]
        torch._foreach_lerp_(momenta, gradients, 1 - group["beta1"])
        rates = [group["lr"] / (1 - group["beta1"] ** int(state["step"])) for state in states]
        torch._foreach_sub_(points, torch._foreach_mul(momenta, rates))
