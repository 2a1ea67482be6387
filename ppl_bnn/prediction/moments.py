"""The posterior predictive without draws: means and variances carried through the layers, units taken as independent.

For y = W x + b with independent W ~ (loc, scale^2) and x ~ (mean, variance), exactly:
E[y] = loc mean + b, Var[y] = scale^2 mean^2 + (loc^2 + scale^2) variance. ReLU and max pooling take their inputs for
independent Normals and use the first two moments of the larger of two (Clark 1961, eq. 2 to 4). What is lost are the
covariances between units: layers above the first share their inputs' noise, and positions of a feature map share
their filter's weights.
"""

import math
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Factorized, Posterior, offered
from ppl_bnn.inputs import Inputs, call, split
from ppl_bnn.prediction.plain import PlainNetwork, plain

POINTS = 32  # of the logits' Normals, to average the softmax over
# Mean and variance of each unit; no variance where the value is certain, as the input is.
Moments = tuple[Tensor, Tensor | None]


def moment_predictive(net: nn.Module, guide: Posterior, x: Inputs, *, batch_size: int = 100) -> tuple[Tensor, Tensor]:
    """The predictive's probabilities [N, C] and the draws' expected entropy [N], nats, without a draw.

    The two are what `metrics.uncertainties` takes. Accuracy, cost and where it is off: docs/moments.md.

    Raises:
        NotTraceable, UserError: as `moment_network`.
    """
    network, found = moment_network(net, guide), []
    points: Tensor | None = None
    with torch.no_grad():
        for batch in split(x, batch_size):
            mean, variance = call(network, batch)
            points = standard_normals(mean.shape[1]).to(mean) if points is None else points
            found.append(softmax_moments(mean, variance, points))
    probs, mean_entropy = zip(*found, strict=True)
    return torch.cat(probs), torch.cat(mean_entropy)


@torch.no_grad()
def moment_network(net: nn.Module, guide: Posterior) -> fx.GraphModule:
    """Return a plain torch module, x [N, ...] -> mean and variance of the logits, each [N, C].

    Raises:
        NotTraceable: the forward pass has no fixed graph of layers.
        UserError: a layer whose moments are not known here; the message names it.
    """
    factorized = offered(guide, Factorized, "method moments", "use method draws")
    network = plain(net)
    module, graph = network.net, network.net.graph
    _pool_before_relu(module)
    steps: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder":
            with graph.inserting_after(node):
                certain = graph.call_function(_certain, (node,))
            node.replace_all_uses_with(certain, delete_user_cb=lambda user, new=certain: user is not new)
        elif node.op == "call_module":
            steps[node.target] = _step(module.get_submodule(node.target), node.target, network, factorized)
        elif _is_sum_of_two(node):
            node.target = _add
        elif node.op in ("call_function", "call_method"):
            target = f"function_{node.name}"
            steps[target] = _step(_as_layer(node), node.name, network, factorized)
            node.op, node.target, node.args, node.kwargs = "call_module", target, node.args[:1], {}
        elif node.op == "output":
            with graph.inserting_before(node):
                node.args = (graph.call_function(_with_variance, (node.args[0],)),)
    return fx.GraphModule(steps, graph, "Moments").eval().requires_grad_(False)


def softmax_moments(mean: Tensor, variance: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """E[softmax(z)] [N, C] and E[entropy of softmax(z)] [N], nats, of independent z ~ Normal(mean, variance) [N, C].

    A quasi-Monte Carlo average over `points` [P, C] from `standard_normals`, the same for every example.
    """
    log_probs = torch.addcmul(mean.unsqueeze(1), variance.sqrt().unsqueeze(1), points).log_softmax(-1)
    probs = log_probs.exp()
    return probs.mean(1), -(probs * log_probs).sum(-1).mean(1)


def standard_normals(dimensions: int, count: int = POINTS) -> Tensor:
    """The same standard Normal points [count, dimensions] at every call: Sobol points, scrambled, and their mirror."""
    half = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=0).draw(count // 2, dtype=torch.float32)
    normals = torch.special.ndtri(half.double().clamp(1e-6, 1 - 1e-6)).float()
    return torch.cat([normals, -normals])


def larger(mean: Tensor, variance: Tensor, other_mean: Tensor | float, other: Tensor | float) -> tuple[Tensor, Tensor]:
    """Mean and variance of the larger of two independent Normals (Clark 1961), exact where both variances are 0."""
    total = variance + other
    width, gap = total.sqrt(), mean - other_mean
    # Beyond 7 widths (in float64 10) the tail is below the rounding of 1. Clamped, nothing is inf * 0 where the width
    # is 0, and nothing becomes a denormal number, which takes the processor many times as long.
    widths = 10 if mean.dtype == torch.float64 else 7
    at = (gap / width.clamp_min(torch.finfo(mean.dtype).tiny ** 0.5)).clamp(-widths, widths)
    square = at * at
    density = torch.exp(-0.5 * square) * (1 / math.sqrt(2 * math.pi))
    first = 0.5 + 0.5 * torch.erf(at * math.sqrt(0.5))
    second = 1 - first
    # Clark's second moment less the square of his first, with the large terms that cancel taken out by hand.
    spread = square * first * second + density * (at * (second - first) - density)
    larger_mean = mean * first + other_mean * second + width * density
    return larger_mean, (variance * first + other * second + total * spread).clamp_min(0)


class _Weighted(nn.Module):
    """A dense or convolutional layer; its weight and bias are random, or certain where the variance is None."""

    weight_variance: Tensor | None
    bias_variance: Tensor | None
    second_moment: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, path: str, network: PlainNetwork, guide: Factorized) -> None:
        super().__init__()
        self.layer = layer
        for name in ("weight", "bias"):
            site, scale = f"{path}.{name}", None
            if site in guide.sites:
                loc, scale = network.place(site, *guide.loc_scale(site))
                network.parameter(site).copy_(loc)
            self.register_buffer(f"{name}_variance", None if scale is None else scale.detach().square())
        second = layer.weight.square()
        self.register_buffer("second_moment", second if self.weight_variance is None else second + self.weight_variance)

    def forward(self, moments: Moments) -> Moments:
        mean, variance = moments
        for hook in self.layer._forward_pre_hooks.values():
            hook(self.layer, (mean,))
        new = None if variance is None else self._map(variance, self.second_moment, self.bias_variance)
        if self.weight_variance is not None:
            own = self._map(mean.square(), self.weight_variance, self.bias_variance if new is None else None)
            new = own if new is None else new + own
        if new is not None and isinstance(self.layer, nn.Conv2d):
            # A GPU's fast convolutions round a 0 to less.
            new = new.clamp_min(0)
        return self._map(mean, self.layer.weight, self.layer.bias), new

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, bias)
        return self.layer._conv_forward(x, weight, bias)


class _Step(nn.Module):
    """A layer without weights of its own: as it is on a certain input, else by `uncertain`."""

    def __init__(self, layer: nn.Module, uncertain: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.layer, self.uncertain = layer, uncertain

    def forward(self, moments: Moments) -> Moments:
        mean, variance = moments
        return (self.layer(mean), None) if variance is None else self.uncertain(mean, variance)


def _step(layer: nn.Module, path: str, network: PlainNetwork, guide: Factorized) -> nn.Module:
    match layer:
        case nn.Linear() | nn.Conv2d():
            return _Weighted(layer, path, network, guide)
        case _ if any(f"{path}.{name}" in guide.sites for name, _ in layer.named_parameters()):
            pass
        case nn.ReLU():
            return _Step(layer, lambda mean, variance: larger(mean, variance, 0.0, 0.0))
        case nn.Flatten() | nn.Unflatten() | nn.ZeroPad2d() | nn.Identity() | nn.modules.dropout._DropoutNd():
            return _Step(layer, lambda mean, variance: (layer(mean), layer(variance)))
        case nn.BatchNorm1d() | nn.BatchNorm2d() if layer.running_var is not None:
            return _Step(layer, lambda mean, variance: (layer(mean), variance * _gain(layer, mean).square()))
        case nn.AvgPool2d() if not layer.ceil_mode and (layer.count_include_pad or layer.padding in (0, (0, 0))):
            share = 1 / (layer.divisor_override or math.prod(_pair(layer.kernel_size)))
            return _Step(layer, lambda mean, variance: (layer(mean), layer(variance) * share))
        case nn.AdaptiveAvgPool2d() if layer.output_size in (1, (1, 1)):
            return _Step(layer, lambda mean, variance: (layer(mean), layer(variance) / math.prod(variance.shape[-2:])))
        case nn.MaxPool2d() if layer.dilation in (1, (1, 1)) and not layer.ceil_mode:
            return _Step(layer, lambda mean, variance: _max_pool(layer, mean, variance))
    raise UserError(
        f"layer {path!r} ({layer}) has no moments here; predict with draws, or use the layers of docs/moments.md"
    )


def _max_pool(layer: nn.MaxPool2d, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    high, wide = _pair(layer.padding)
    if high or wide:
        # Finite, so that 0 times it is 0.
        mean, variance = F.pad(mean, (wide, wide, high, high), value=-1e30), F.pad(variance, (wide, wide, high, high))
    for dim, size, stride in zip((-2, -1), _pair(layer.kernel_size), _pair(layer.stride), strict=True):
        windows = [
            (mean.unfold(dim, size, stride).select(-1, at), variance.unfold(dim, size, stride).select(-1, at))
            for at in range(size)
        ]
        mean, variance = windows[0]
        for window in windows[1:]:
            mean, variance = larger(mean, variance, *window)
    return mean, variance


def _gain(norm: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> Tensor:
    assert norm.running_var is not None
    gain = (norm.running_var + norm.eps).rsqrt() * (norm.weight if norm.affine else 1)
    return gain.view(-1, *[1] * (x.dim() - 2))


def _certain(x: Tensor) -> Moments:
    return x, None


def _with_variance(moments: Moments) -> tuple[Tensor, Tensor]:
    mean, variance = moments
    return mean, torch.zeros_like(mean) if variance is None else variance


def _add(first: Moments, second: Moments) -> Moments:
    variances = [variance for _, variance in (first, second) if variance is not None]
    return first[0] + second[0], sum(variances[1:], variances[0]) if variances else None


def _as_layer(node: fx.Node) -> nn.Module:
    name = node.target if isinstance(node.target, str) else node.target.__name__
    if name not in LAYER_OF:
        raise UserError(f"operation {node.name!r} ({name}) has no moments here; predict with draws")
    return LAYER_OF[name](*node.args[1:], **node.kwargs)


LAYER_OF: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "flatten": nn.Flatten,
    "max_pool2d": nn.MaxPool2d,
    "avg_pool2d": nn.AvgPool2d,
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d,
}


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _pool_before_relu(module: fx.GraphModule) -> None:
    # The largest of rectified values is the rectified largest: pooled first, Clark's formulas meet Normals, and the
    # ReLU has a quarter of the work.
    for node in list(module.graph.nodes):
        if not _is(module, node, nn.MaxPool2d):
            continue
        relu = node.args[0]
        if _is(module, relu, nn.ReLU) and len(relu.users) == 1:
            node.replace_all_uses_with(relu)
            node.replace_input_with(relu, relu.args[0])
            relu.replace_input_with(relu.args[0], node)
            node.append(relu)


def _is_sum_of_two(node: fx.Node) -> bool:
    added = node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
    return added and not node.kwargs and all(isinstance(term, fx.Node) for term in node.args)


def _is(module: fx.GraphModule, node: fx.Node, kind: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), kind)
