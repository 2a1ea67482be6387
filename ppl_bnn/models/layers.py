"""Bayesian layers: torch's own Linear and Conv2d with a random weight, and the call that makes any network Bayesian."""

import copy

import pyro.distributions as dist
import torch.nn.functional as F
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from pyro.poutine.runtime import effectful
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.models.listeners import attribute, heard
from ppl_bnn.models.priors import Prior, check_patterns_used, map_tensors, prior_for, prior_text

# An estimator is a Pyro handler that answers these two messages; without one they are torch's own functions.
# The message's name is the weight's site, its arguments are (input, weight, bias[, convolution settings]).
bayes_linear = effectful(F.linear, type="bayes_linear")
bayes_conv2d = effectful(F.conv2d, type="bayes_conv2d")


def bayesian(net: nn.Module, prior: Prior | None = None, *, bayesian_bias: bool = False) -> nn.Module:
    """Return a copy of a torch network whose Linear and Conv2d weights are random, with a prior.

    Sites are named by module path (``fc1.weight``). Everything else, batch norm included, stays a point estimate.

    Args:
        net: any network with ``nn.Linear`` or ``nn.Conv2d`` layers.
        prior: see `ppl_bnn.models.priors`; Normal(0, 1) for every weight unless said.
        bayesian_bias: give the biases the prior too (a site named ``fc1.bias``).

    Raises:
        UserError: no such layer; a layer that has weights and cannot be converted, or that is used at two paths;
            a prior that does not fit.
    """
    prior = dist.Normal(0.0, 1.0) if prior is None else prior
    net = copy.deepcopy(net)
    converted: list[str] = []
    seen: dict[int, str] = {}
    for path, module in list(net.named_modules(remove_duplicate=False)):
        if seen.setdefault(id(module), path) != path and next(module.parameters(), None) is not None:
            raise UserError(
                f"{path!r} is the same module as {seen[id(module)]!r}; a shared layer cannot be made Bayesian"
            )
        if type(module) in (nn.Linear, nn.Conv2d):
            layer = _convert(module, path, prior, bayesian_bias)
            converted += [f"{path}.{name}" if path else name for name in layer._pyro_samples]
            if not path:
                net = layer
            else:
                parent, _, name = path.rpartition(".")
                setattr(net.get_submodule(parent), name, layer)
        elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.modules.rnn.RNNBase)):
            raise UserError(
                f"layer {path!r} is a {type(module).__name__}, which cannot be made Bayesian; "
                "nn.Linear and nn.Conv2d can"
            )
    if not converted:
        raise UserError(f"{type(net).__name__} has no nn.Linear or nn.Conv2d layer to make Bayesian")
    check_patterns_used(prior, converted)
    to_pyro_module_(net)
    return net


def priors_of(model: nn.Module) -> dict[str, str]:
    """The prior of each random weight of a network's Bayesian layers, as text, by its path."""
    return {
        f"{path}.{name}": prior_text(prior)
        for path, module in model.named_modules()
        if isinstance(module, _BayesianLayer)
        for name, prior in module._pyro_samples.items()
    }


class _BayesianLayer(PyroModule):
    """What the two layers share: their random attributes, and priors that follow the layer's device and dtype."""

    def make_random(self, attribute: str, prior: Prior, path: str = "") -> None:
        """Replace the parameter `attribute` by a sample site with the prior's distribution of its shape."""
        weight = getattr(self, attribute)
        site = f"{path}.{attribute}" if path else attribute
        found = copy.deepcopy(prior_for(prior, site, weight.shape))
        map_tensors(found, lambda tensor: tensor.to(weight))
        setattr(self, attribute, PyroSample(found))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        for found in self._pyro_samples.values():
            map_tensors(found, fn)
        return super()._apply(fn, recurse)


class BayesianLinear(nn.Linear, _BayesianLayer):
    """``nn.Linear`` with a random weight [out_features, in_features] and a point-estimate bias [out_features].

    Outside an estimator it is plain Pyro: every handler and inference algorithm of Pyro works on it.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, prior: Prior | None = None) -> None:
        super().__init__(in_features, out_features, bias)
        self.make_random("weight", dist.Normal(0.0, 1.0) if prior is None else prior)

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_features] -> [N, out_features]."""
        bias = attribute(self, "bias")
        if not heard("bayes_linear"):
            return F.linear(input, self.weight, bias)
        return bayes_linear(input, self.weight, bias, name=self._pyro_get_fullname("weight"))  # type: ignore[operator]


class BayesianConv2d(nn.Conv2d, _BayesianLayer):
    """``nn.Conv2d`` (zero padding) with a random weight [out, in, height, width] and a point-estimate bias [out]."""

    def __init__(self, *arguments, prior: Prior | None = None, **keywords) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*arguments, **keywords)
        if self.padding_mode != "zeros":
            raise UserError(f"BayesianConv2d pads with zeros; padding_mode {self.padding_mode!r} is not supported")
        self.make_random("weight", dist.Normal(0.0, 1.0) if prior is None else prior)

    def forward(self, input: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H', W']."""
        bias = attribute(self, "bias")
        site = self._pyro_get_fullname("weight")  # type: ignore[operator]
        return bayes_conv2d(input, self.weight, bias, self.stride, self.padding, self.dilation, self.groups, name=site)


def _convert(module: nn.Module, path: str, prior: Prior, bayesian_bias: bool) -> _BayesianLayer:
    layer: _BayesianLayer
    # A placeholder prior: the real one is chosen by the layer's path, which its constructor does not know.
    if isinstance(module, nn.Conv2d):
        layer = BayesianConv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
        )
    else:
        assert isinstance(module, nn.Linear)
        layer = BayesianLinear(module.in_features, module.out_features, module.bias is not None)
    layer.to(module.weight)
    layer.weight = module.weight
    if module.bias is not None:
        layer.bias = nn.Parameter(module.bias.detach().clone())
    layer.make_random("weight", prior, path)
    if bayesian_bias and module.bias is not None:
        layer.make_random("bias", prior, path)
    layer.train(module.training)
    return layer
