"""Coherent draws: draw s is one network, the same for every example, at the cost of a deterministic forward pass."""

import math
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor, fx, nn

from ppl_bnn.guides.mean_field import MeanFieldNormal
from ppl_bnn.models.evaluating import evaluating
from ppl_bnn.prediction.compact.fastest import choose_layers
from ppl_bnn.prediction.compact.network import compact
from ppl_bnn.prediction.norm_statistics import own_statistics
from ppl_bnn.prediction.plain import NotTraceable, PlainNetwork, plain

Noise = Iterable[tuple[str, Tensor]]
# Seconds of draws before a pruned guide's compact network is made and tried, which itself takes about as long.
_WAIT = 1.0


class Blocks(NamedTuple):
    """Logits of draws k * size to (k + 1) * size - 1, [size, N, C], by block number k: in any order, on any rank.

    The second argument is what the standard normal noise is multiplied by: 1, or -1 for the draws' mirror images.
    """

    size: int
    logits: Callable[[int, float], Tensor]


def coherent(
    net: nn.Module,
    guide: MeanFieldNormal,
    x: Tensor,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    network: PlainNetwork | None = None,
) -> Blocks:
    """Blocks of one draw: the function that ``guide.draw(index, seed=seed)`` is, up to rounding.

    Weights are written into a plain torch network with batch norm folded, and what comes before the first random
    layer is computed once. A network that ``torch.fx`` cannot trace goes through Pyro instead, several times slower.
    The draws of a pruned guide go on in its compact network where that is faster, once enough of them were made.

    Args:
        batch_size: examples a forward pass; unless given, 200 for convolutions on a CPU, else 2000.
        network: ``plain(net)``, where it is there already, or ``normalized(net, norm_inputs)``.
    """
    try:
        network = network or plain(net)
    except NotTraceable:
        return Blocks(1, _by_pyro(net, guide, x, seed, batch_size or 200))
    x = laid_out(network, x)
    with_noise = placed(network, guide, guide.sites)
    limit = batch_size or default_batch(network, x)
    run, seconds, fastest = passes(network.net, guide, x, limit), 0.0, math.inf
    waiting = x.is_cpu and guide.is_pruned and network.normalize is None

    def logits(index: int, sign: float) -> Tensor:
        nonlocal run, seconds, fastest, waiting
        with_noise((site, sign * noise) for site, noise in guide.noise(index, seed=seed))
        if network.normalize:
            network.normalize(seed, index, sign)
        started = time.perf_counter()
        found = run()
        took = time.perf_counter() - started
        seconds, fastest = seconds + took, min(fastest, took)
        if waiting and seconds > _WAIT:
            waiting, smaller = False, compact_passes(network, guide, x, limit)
            if min(timeit.repeat(smaller, number=1, repeat=2)) < fastest:
                run = smaller
        return found.unsqueeze(0)

    return Blocks(1, logits)


def normalized(net: nn.Module, norm_inputs: Tensor) -> PlainNetwork:
    """A plain network in which each draw has batch norm by its own statistics of `norm_inputs` [K, ...].

    Raises:
        UserError: `net` has no fixed graph of layers, or no batch norm with running statistics; K < 2.
    """
    network = plain(net, fold=False)
    return replace(network, normalize=own_statistics(network.net, laid_out(network, norm_inputs)))


def passes(module: fx.GraphModule, guide: MeanFieldNormal, x: Tensor, limit: int) -> Callable[[], Tensor]:
    """A function to the logits [N, C] of `module` with the weights it has when called, `limit` examples a pass."""
    layers = {site.rpartition(".")[0] for site in guide.sites}
    parts = [constants(module, layers, part) for part in x.split(limit)]

    def run() -> Tensor:
        with torch.inference_mode():
            return torch.cat([fx.Interpreter(module).run(initial_env=dict(part)) for part in parts])

    return run


def compact_passes(network: PlainNetwork, guide: MeanFieldNormal, x: Tensor, limit: int) -> Callable[[], Tensor]:
    """What `passes` gives of the plain network, up to rounding, by the compact network of a pruned guide."""
    small = compact(network, guide)
    inputs = small.select(x)
    choose_layers(small, inputs[:limit])
    run_small = passes(small.net, guide, inputs, limit)

    def run() -> Tensor:
        small.set_weights(network)
        return run_small()

    return run


def placed(network: PlainNetwork, guide: MeanFieldNormal, sites: Iterable[str]) -> Callable[[Noise], fx.GraphModule]:
    """A function from noise, (site, [*shape]) each, to the plain network with weights loc + scale * noise."""
    where = {}
    for site in sites:
        with torch.no_grad():
            loc, scale = network.place(site, *guide.loc_scale(site))
        if site in network.folded:
            # A negative factor turns the noise around too: the draw stays the guide's own.
            scale = scale * network.folded[site][0].sign()
        weight = network.parameter(site)
        where[site] = weight, *(torch.empty_like(weight).copy_(part) for part in (loc, scale))

    @torch.no_grad()
    def with_noise(noise: Noise) -> fx.GraphModule:
        for site, values in noise:
            weight, loc, scale = where[site]
            torch.addcmul(loc, scale, values, out=weight)
        return network.net

    return with_noise


def constants(module: fx.GraphModule, random: set[str], x: Tensor) -> dict[fx.Node, Tensor | None]:
    """The values of a graph that do not depend on its `random` layers, for inputs x: an ``fx.Interpreter``'s start.

    What nothing that depends on them reads is None.
    """
    depends: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "output" or node.target in random or depends.intersection(node.all_input_nodes):
            depends.add(node)
    runner = fx.Interpreter(module, garbage_collect_values=False)
    runner.args_iter = iter([x])
    with torch.inference_mode():
        for node in module.graph.nodes:
            if node not in depends:
                runner.env[node] = runner.run_node(node)
    return {node: value if depends.intersection(node.users) else None for node, value in runner.env.items()}


def laid_out(network: PlainNetwork, x: Tensor) -> Tensor:
    """The inputs, and the network with them, in the faster memory layout: channels_last for convolutions on a CPU."""
    if _convolutions(network) and x.dim() == 4 and x.is_cpu:
        network.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return x.contiguous(memory_format=torch.channels_last)
    return x


def default_batch(network: PlainNetwork, x: Tensor) -> int:
    """Examples a forward pass: on a CPU as many as keep activations in reach of the caches, else as keep it busy."""
    return 200 if _convolutions(network) and x.is_cpu else 2000


def _convolutions(network: PlainNetwork) -> bool:
    return any(isinstance(layer, nn.Conv2d) for layer in network.net.modules())


def _by_pyro(
    net: nn.Module, guide: MeanFieldNormal, x: Tensor, seed: int, batch_size: int
) -> Callable[[int, float], Tensor]:
    def weights(index: int, sign: float) -> Iterator[tuple[str, Tensor]]:
        for site, noise in guide.noise(index, seed=seed):
            yield site, torch.addcmul(*guide.loc_scale(site), sign * noise)

    def logits(index: int, sign: float) -> Tensor:
        with evaluating(net), pyro.get_param_store().scope():
            conditioned = poutine.condition(net, data=dict(weights(index, sign)))
            return torch.cat([conditioned(part) for part in x.split(batch_size)]).unsqueeze(0)

    return logits
