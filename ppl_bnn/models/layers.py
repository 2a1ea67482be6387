"""Bayesian layers: torch's own Linear and Conv2d with a random weight."""

from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.nn import PyroModule, PyroSample
from pyro.poutine.runtime import effectful
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.models.evaluated_priors import Shared, layer_prior
from ppl_bnn.models.listeners import attribute, heard
from ppl_bnn.models.priors import Prior, map_tensors, prior_text

# An estimator is a Pyro handler that answers these two messages; without one they are torch's own functions.
# The message's name is the weight's site, its arguments are (input, weight, bias[, convolution settings]).
bayes_linear = effectful(F.linear, type="bayes_linear")
bayes_conv2d = effectful(F.conv2d, type="bayes_conv2d")


def priors_of(model: nn.Module) -> dict[str, str]:
    """The prior of each random weight of a network's Bayesian layers, as text, by its path."""
    return {
        f"{path}.{name}": prior_text(prior)
        for path, module in model.named_modules()
        if isinstance(module, _BayesianLayer)
        for name, prior in module._pyro_samples.items()
    }


class ConstantIfFrozen(PyroModule):
    """A Pyro module whose frozen parameters are constants: Pyro's parameter store would set their `requires_grad`."""

    def __getattr__(self, name: str) -> Any:
        parameter = self.__dict__.get("_parameters", {}).get(name)
        if parameter is not None and not parameter.requires_grad:
            return parameter
        return super().__getattr__(name)


class _BayesianLayer(ConstantIfFrozen):
    """What the two layers share: their random attributes, and priors that follow the layer's device and dtype."""

    weight_dim: int

    def make_random(self, attribute: str, prior: Prior, path: str = "", shared: Shared | None = None) -> None:
        """Replace the parameter `attribute` by a sample site with the prior's distribution of its shape.

        What the prior learns becomes a parameter of the layer; `shared` has those of the network's other priors.
        """
        site = f"{path}.{attribute}" if path else attribute
        found = layer_prior(self, attribute, prior, site, {} if shared is None else shared)
        setattr(self, attribute, PyroSample(found))

    def random_weight(self) -> tuple[Tensor, str]:
        """The weight's value in this forward pass, and the name of its site."""
        if torch._C._current_graph_task_id() != -1:
            raise UserError(
                f"layer {self._pyro_name!r} runs again during back-propagation (torch.utils.checkpoint does this), "
                "where its weight is no longer the draw of the forward pass; call it without activation checkpointing"
            )
        weight = self.weight
        # Pyro's Predictive adds dimensions of size 1 to draws of a guide that has plates.
        while weight.dim() > self.weight_dim and len(weight) == 1:
            weight = weight[0]
        return weight, self._pyro_get_fullname("weight")

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        for found in self._pyro_samples.values():
            map_tensors(found, fn)
        return super()._apply(fn, recurse)


class BayesianLinear(nn.Linear, _BayesianLayer):
    """``nn.Linear`` with a random weight [out_features, in_features] and a point-estimate bias [out_features].

    Outside an estimator it is plain Pyro: every handler and inference algorithm of Pyro works on it.
    """

    weight_dim = 2

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, prior: Prior | None = None) -> None:
        super().__init__(in_features, out_features, bias)
        self.make_random("weight", dist.Normal(0.0, 1.0) if prior is None else prior)

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_features] -> [N, out_features]."""
        bias = attribute(self, "bias")
        weight, site = self.random_weight()
        if weight.dim() > self.weight_dim:
            return _parallel_linear(input, weight, bias)
        if not heard("bayes_linear"):
            return F.linear(input, weight, bias)
        return bayes_linear(input, weight, bias, name=site)


class BayesianConv2d(nn.Conv2d, _BayesianLayer):
    """``nn.Conv2d`` (zero padding) with a random weight [out, in, height, width] and a point-estimate bias [out]."""

    weight_dim = 4

    def __init__(self, *arguments, prior: Prior | None = None, **keywords) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*arguments, **keywords)
        if self.padding_mode != "zeros":
            raise UserError(f"BayesianConv2d pads with zeros; padding_mode {self.padding_mode!r} is not supported")
        self.make_random("weight", dist.Normal(0.0, 1.0) if prior is None else prior)

    def forward(self, input: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H', W']."""
        bias = attribute(self, "bias")
        weight, site = self.random_weight()
        if weight.dim() > self.weight_dim:
            raise UserError(
                f"layer {self._pyro_name!r} was given {len(weight)} weights at once, and a Bayesian Conv2d takes one: "
                "use Predictive(..., parallel=False)"
            )
        return bayes_conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups, name=site)


def _parallel_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[N, in_features] or [S, N, in_features] -> [S, N, out_features], with S draws of the weights at once.

    Pyro's ``Predictive(..., parallel=True)`` puts the draws in front of all plates: the weight is [S, 1, out, in] where
    the model has a data plate, and [S, out, in] where it has none.
    """
    if weight.shape[-3] == 1:
        weight = weight.squeeze(-3)
    output = input @ weight.mT
    if bias is None:
        return output
    return output + (bias if bias.dim() == 1 or bias.shape[-2] == 1 else bias.unsqueeze(-2))
