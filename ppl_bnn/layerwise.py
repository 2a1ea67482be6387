"""Draws of pre-activations: for a dense layer exactly the distribution that drawing its weights gives each example.

With weights Normal(loc, scale^2), independent, the pre-activations of one example h are independent
Normal(loc h + b, scale^2 h^2) (the local reparameterization of Kingma, Salimans and Welling 2015, section 2.3): one
random number a unit and example, where weights take one each. Draw s is then not one network: examples are drawn
independently of each other.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ppl_bnn.draws import Blocks, constants, default_batch, laid_out, placed
from ppl_bnn.guides.mean_field import MeanFieldNormal, draw_seed
from ppl_bnn.models.plain import NotTraceable, PlainNetwork, plain

# As many rows of activations at once as stay in the caches, and no more draws than a small request can use.
_ROWS, _DRAWS = 2000, 200


def layerwise(
    net: nn.Module, guide: MeanFieldNormal, x: Tensor, *, seed: int = 0, batch_size: int | None = None
) -> Blocks:
    """Blocks of draws whose dense layers are drawn by pre-activation, the same for the same (seed, block, x).

    The first random layer's mean and standard deviation do not depend on the draw and are computed once. Where there
    are random convolutions too, their weights are drawn once a draw for all examples, and only the dense layers
    behind them as said; blocks are then of one draw.

    Raises:
        ValueError: no random layer is dense with one vector an example, or the network cannot be traced.
    """
    try:
        network = plain(net)
    except NotTraceable as error:
        raise ValueError(f"the method layerwise needs a traced network: {error}; use the method draws") from None
    x = laid_out(network, x)
    dense = dense_layers(network, guide, x)
    if not dense:
        raise ValueError("the method layerwise needs a dense random layer, and there is none; use the method draws")
    shared = [site for site in guide.sites if site.rpartition(".")[0] not in dense]
    size = 1 if shared else max(1, min(_DRAWS, _ROWS // len(x)))
    limit = batch_size or (default_batch(network) if shared else _ROWS)
    with_noise = placed(network, guide)
    normals = {path: _normal(network, guide, path) for path in dense}
    layers = {site.rpartition(".")[0] for site in guide.sites}
    parts = [_start(network.net, layers, normals, part, size) for part in x.split(limit)]

    def logits(block: int, sign: float) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(draw_seed(seed, block))

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device).mul_(sign)

        module = with_noise((site, noise(network.parameter(site))) for site in shared)
        with torch.inference_mode():
            found = [_Sampling(module, normals, moments, noise).run(initial_env=dict(env)) for env, moments in parts]
            return torch.cat([part.view(size, -1, part.shape[-1]) for part in found], 1)

    return Blocks(size, logits)


def fewer_numbers(network: PlainNetwork, guide: MeanFieldNormal, x: Tensor) -> bool:
    """Whether `layerwise` needs fewer random numbers a draw than `coherent`: units * examples < weights."""
    dense = dense_layers(network, guide, x)
    weights = sum(network.parameter(site).numel() for site in guide.sites if site.rpartition(".")[0] in dense)
    return len(x) * sum(network.net.get_submodule(path).out_features for path in dense) < weights  # type: ignore[misc]


def dense_layers(network: PlainNetwork, guide: MeanFieldNormal, x: Tensor) -> list[str]:
    """Paths of the random dense layers that see each example once, as one vector."""
    # With two examples: a layer whose input has other rows shares its weights among parts of an example.
    two = torch.cat([x[:1], x[:1]])
    with torch.inference_mode():
        ShapeProp(network.net).propagate(two)
    random = {site.rpartition(".")[0] for site in guide.sites}
    shapes: dict[str, list[torch.Size]] = {}
    for node in network.net.graph.nodes:
        if node.target in random and isinstance(network.net.get_submodule(node.target), nn.Linear):
            shapes.setdefault(node.target, []).append(node.args[0].meta["tensor_meta"].shape)
    return [path for path, found in shapes.items() if len(found) == 1 and len(found[0]) == 2 and found[0][0] == 2]


class _Normal(NamedTuple):
    """A dense layer's weights and bias, [in, out] and [out], as mean and variance."""

    loc: Tensor
    variance: Tensor
    bias: Tensor
    bias_variance: Tensor

    def moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [N, out] of the pre-activations of h [N, in]."""
        variance = torch.addmm(self.bias_variance, h.square(), self.variance)
        # Rounding alone could take a variance of 0 below it.
        return torch.addmm(self.bias, h, self.loc), variance.clamp_min_(0).sqrt_()


@torch.no_grad()
def _normal(network: PlainNetwork, guide: MeanFieldNormal, path: str) -> _Normal:
    layer = network.net.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    fixed = torch.zeros(layer.out_features).to(layer.weight) if layer.bias is None else layer.bias
    both: list[Tensor] = []
    for name, values in (("weight", layer.weight), ("bias", fixed)):
        site = f"{path}.{name}"
        random = site in guide.sites
        both += network.place(site, *guide.loc_scale(site)) if random else (values, torch.zeros_like(values))
    loc, scale, bias, bias_scale = both
    return _Normal(loc.T.contiguous(), scale.square().T.contiguous(), bias, bias_scale.square())


def _start(
    module: fx.GraphModule, random: set[str], normals: dict[str, _Normal], x: Tensor, size: int
) -> tuple[dict[fx.Node, Tensor | None], dict[str, tuple[Tensor, Tensor]]]:
    """What does not depend on the draw: values, once for each of a block's draws, and moments [size, N, out]."""
    values, moments = constants(module, random, x), {}
    env: dict[fx.Node, Tensor | None] = {}
    with torch.inference_mode():
        for node, value in values.items():
            env[node] = None
            if value is None:
                continue
            for user in node.users:
                if user.target in normals:
                    of = normals[user.target].moments(value)
                    moments[user.target] = tuple(part.expand(size, *part.shape) for part in of)
                else:
                    env[node] = value.expand(size, *value.shape).flatten(0, 1) if size > 1 else value
    return env, moments  # type: ignore[return-value]


class _Sampling(fx.Interpreter):
    """Runs the network on the rows of all draws of a block, [size * N, ...], dense layers by pre-activation."""

    def __init__(self, module: fx.GraphModule, normals: dict, moments: dict, noise) -> None:  # type: ignore[no-untyped-def]
        super().__init__(module)
        self._normals, self._moments, self._noise = normals, moments, noise

    def call_module(self, target, args: Iterable, kwargs: dict):  # type: ignore[no-untyped-def]
        """A dense random layer's pre-activations, or what the layer itself computes."""
        if target not in self._normals:
            return super().call_module(target, tuple(args), kwargs)
        known = self._moments.get(target)
        mean, std = known or self._normals[target].moments(*args)
        sampled = torch.addcmul(mean, std, self._noise(mean))
        return sampled.flatten(0, 1) if known else sampled
