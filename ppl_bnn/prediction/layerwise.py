"""Draws of pre-activations: for a dense layer exactly the distribution that drawing its weights gives each example.

With weights Normal(loc, scale^2), independent, the pre-activations of one example h are independent
Normal(loc h + b, scale^2 h^2) (the local reparameterization of Kingma, Salimans and Welling 2015, section 2.3): one
random number a unit and example, where weights take one each. Draw s is then not one network: examples are drawn
independently of each other.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Factorized, Posterior, offered
from ppl_bnn.inputs import Inputs, call, count, joined, rows, split
from ppl_bnn.native.normals import draw_seed, normals
from ppl_bnn.prediction.draws import Blocks, constants, default_batch, laid_out, placed
from ppl_bnn.prediction.plain import NotTraceable, PlainNetwork, plain
from ppl_bnn.prediction.sobol import sobol_normals_by_image

# As many rows of activations at once as stay in the caches, and no more draws than a small request can use.
_ROWS, _DRAWS = 2000, 400

# Block number -> the noise of each shared site [*shape] and of each dense layer [size, N, out].
Numbers = Callable[[int], dict[str, Tensor]]


def layerwise(
    net: nn.Module,
    guide: Posterior,
    x: Inputs,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    network: PlainNetwork | None = None,
    sobol: bool = False,
) -> Blocks:
    """Blocks of draws whose dense layers are drawn by pre-activation, the same for the same (seed, block, x).

    The first random layer's mean and standard deviation do not depend on the draw and are computed once. Where there
    are random convolutions too, their weights are drawn once a draw for all examples, and only the dense layers
    behind them as said; blocks are then of one draw.

    Args:
        batch_size: examples a forward pass.
        network: ``plain(net)``, where it is there already.
        sobol: noise from the points of `ppl_bnn.prediction.sobol` in place of independent numbers.

    Raises:
        UserError: no random layer is dense with one vector an example, the network cannot be traced, or it has more
            units than Sobol points have dimensions.
    """
    prepared = Layerwise(net, guide, x, network=network, sobol=sobol)
    return prepared.blocks(x, prepared.numbers(x, seed), batch_size)


class Layerwise:
    """`layerwise` for any number of examples, of the shape of `like`: what does not depend on them is done once.

    Raises:
        UserError: as `layerwise`.
    """

    def __init__(
        self, net: nn.Module, guide: Posterior, like: Inputs, *, network: PlainNetwork | None = None,
        sobol: bool = False,
    ) -> None:  # fmt: skip
        factorized = offered(guide, Factorized, "method layerwise", "use method draws")
        try:
            self.traced = network or plain(net, like)
        except NotTraceable as error:
            raise UserError(f"the method layerwise needs a traced network: {error}; use the method draws") from None
        self.dense = dense_layers(self.traced, guide, like)
        if not self.dense:
            raise UserError("the method layerwise needs a dense random layer, and there is none; use the method draws")
        self.shared = [site for site in guide.sites if site.rpartition(".")[0] not in self.dense]
        self.with_noise = placed(self.traced, factorized, self.shared)
        self.posteriors = {path: _normal(self.traced, factorized, path) for path in self.dense}
        self.layers = {site.rpartition(".")[0] for site in guide.sites}
        self.sobol = sobol

    def numbers(self, x: Inputs, seed: int) -> Numbers:
        """The noise of the blocks of so many examples as x [N, ...] has: the same whatever they are."""
        size = self._size(x)
        shapes = {site: self.traced.parameter(site).shape for site in self.shared}
        shapes |= {path: torch.Size((size, count(x), len(of.loc))) for path, of in self.posteriors.items()}
        return (_sobol if self.sobol else _independent)(
            shapes, seed, len(self.shared), count(x), next(iter(self.posteriors.values())).loc
        )

    def blocks(self, x: Inputs, numbers: Numbers, batch_size: int | None = None) -> Blocks:
        """Blocks of draws of x [N, ...] from `numbers` made for as many examples."""
        x, size = laid_out(self.traced, x), self._size(x)
        limit = batch_size or (default_batch(self.traced, x) if self.shared else _ROWS)
        starts = [_start(self.traced.net, self.layers, self.posteriors, part, size) for part in split(x, limit)]

        def logits(block: int, sign: float) -> Tensor:
            noise = numbers(block)
            if sign != 1:
                noise = {name: sign * values for name, values in noise.items()}
            self.with_noise((site, noise[site]) for site in self.shared)
            with torch.inference_mode():
                found = []
                for first, (env, moments) in zip(range(0, count(x), limit), starts, strict=True):
                    own = {path: noise[path][:, first : first + limit] for path in self.dense}
                    rows = _Sampling(self.traced.net, self.posteriors, moments, own).run(initial_env=dict(env))
                    found.append(rows.unflatten(0, (size, -1)))
                return found[0] if len(found) == 1 else torch.cat(found, 1)

        return Blocks(size, logits)

    def _size(self, x: Inputs) -> int:
        return 1 if self.shared else max(1, min(_DRAWS, _ROWS // count(x)))


def fewer_numbers(network: PlainNetwork, guide: Posterior, x: Inputs) -> bool:
    """Whether `layerwise` needs fewer random numbers a draw than `coherent`: units * examples < weights."""
    dense = dense_layers(network, guide, x)
    weights = sum(network.parameter(site).numel() for site in guide.sites if site.rpartition(".")[0] in dense)
    return count(x) * sum(network.net.get_submodule(path).out_features for path in dense) < weights  # type: ignore[misc]


def dense_layers(network: PlainNetwork, guide: Posterior, x: Inputs) -> list[str]:
    """Paths of the random dense layers that see each example once, as one vector."""
    # With two examples: a layer whose input has other rows shares its weights among parts of an example.
    two = joined([rows(x, slice(1))] * 2)
    random = {site.rpartition(".")[0] for site in guide.sites}
    shapes: dict[str, list[torch.Size]] = {}

    def shape_seen(path: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes.setdefault(path, []).append(inputs[0].shape)

    hooks = [
        layer.register_forward_pre_hook(partial(shape_seen, path))
        for path, layer in network.net.named_modules()
        if path in random and isinstance(layer, nn.Linear)
    ]
    with torch.inference_mode():
        call(network.net, two)
    for hook in hooks:
        hook.remove()
    return [path for path, found in shapes.items() if len(found) == 1 and len(found[0]) == 2 and found[0][0] == 2]


def _independent(shapes: dict[str, torch.Size], seed: int, shared: int, examples: int, like: Tensor) -> Numbers:
    sizes = [math.prod(shape) for shape in shapes.values()]

    def numbers(block: int) -> dict[str, Tensor]:
        flat = normals(draw_seed(seed, block), sum(sizes), like)
        return {name: part.view(shapes[name]) for name, part in zip(shapes, flat.split(sizes), strict=True)}

    return numbers


def _sobol(shapes: dict[str, torch.Size], seed: int, shared: int, examples: int, like: Tensor) -> Numbers:
    by_draw = {name: math.prod(shape) for name, shape in list(shapes.items())[:shared]}
    by_image = {name: shape[2] for name, shape in list(shapes.items())[shared:]}
    size = next(reversed(shapes.values()))[0]
    points = sobol_normals_by_image(
        sum(by_draw.values()), sum(by_image.values()), examples, seed=seed, what="weights and units"
    )

    def numbers(block: int) -> dict[str, Tensor]:
        both = points(block * size, size)
        found: dict[str, Tensor] = {}
        for part, sizes in zip(both, (by_draw, by_image), strict=True):
            found |= dict(zip(sizes, part.to(like).split(list(sizes.values()), -1), strict=True))
        return {name: values.reshape(shapes[name]) for name, values in found.items()}

    return numbers


class _Normal(NamedTuple):
    """A dense layer's weights and bias, [out, in] and [out], as mean and variance."""

    loc: Tensor
    variance: Tensor
    bias: Tensor
    bias_variance: Tensor

    def moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [N, out] of the pre-activations of h [N, in]."""
        # A sum of products of numbers from 0 up: its root is always a number.
        return F.linear(h, self.loc, self.bias), F.linear(h.square(), self.variance, self.bias_variance).sqrt_()


@torch.no_grad()
def _normal(network: PlainNetwork, guide: Factorized, path: str) -> _Normal:
    layer = network.net.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    fixed = torch.zeros(layer.out_features).to(layer.weight) if layer.bias is None else layer.bias
    both: list[Tensor] = []
    for name, values in (("weight", layer.weight), ("bias", fixed)):
        site = f"{path}.{name}"
        random = site in guide.sites
        both += network.place(site, *guide.loc_scale(site)) if random else (values, torch.zeros_like(values))
    loc, scale, bias, bias_scale = both
    # Copies: the guide may be trained on.
    return _Normal(loc.clone(), scale.square(), bias, bias_scale.square())


def _start(
    module: fx.GraphModule, random: set[str], posteriors: dict[str, _Normal], x: Inputs, size: int
) -> tuple[dict[fx.Node, Tensor | None], dict[str, tuple[Tensor, Tensor]]]:
    """What does not depend on the draw: values, once for each of a block's draws, and moments [1, N, out]."""
    values, moments = constants(module, random, x), {}
    env: dict[fx.Node, Tensor | None] = {}
    with torch.inference_mode():
        for node, value in values.items():
            env[node] = None
            if value is None:
                continue
            for user in node.users:
                if user.target in posteriors:
                    of = posteriors[user.target].moments(value)
                    moments[user.target] = tuple(part.unsqueeze(0) for part in of)
                else:
                    env[node] = value.expand(size, *value.shape).flatten(0, 1) if size > 1 else value
    return env, moments  # type: ignore[return-value]


class _Sampling(fx.Interpreter):
    """Runs the network on the rows of all draws of a block, [size * N, ...], dense layers by pre-activation."""

    def __init__(self, module: fx.GraphModule, posteriors: dict, moments: dict, noise: dict) -> None:  # type: ignore[type-arg]
        super().__init__(module)
        self._posteriors, self._moments, self._noise = posteriors, moments, noise

    def call_module(self, target, args: Iterable, kwargs: dict):  # type: ignore[no-untyped-def]
        """A dense random layer's pre-activations, or what the layer itself computes."""
        if target not in self._posteriors:
            return super().call_module(target, tuple(args), kwargs)
        mean, std = self._moments.get(target) or self._posteriors[target].moments(*args)
        noise = self._noise[target]
        return torch.addcmul(mean.view(-1, *noise.shape[1:]), std.view(-1, *noise.shape[1:]), noise).flatten(0, 1)
