"""Coherent draws: draw s is one network, the same for every example, at the cost of a deterministic forward pass."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from pyro import poutine
from torch import Tensor, fx, nn

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Factorized, Posterior, Symmetric, is_pruned, signed_draw
from ppl_bnn.inputs import I, Inputs, call, lead, mapped, parts, positional, rows, split
from ppl_bnn.models.evaluating import evaluating, forked_random
from ppl_bnn.models.model import one_tensor
from ppl_bnn.models.param_store import own_parameters
from ppl_bnn.models.random_network import given, random_sites
from ppl_bnn.prediction.compact.forms import choose_layers, compact_pays, uses_of
from ppl_bnn.prediction.compact.network import CompactNetwork, can_be_compact, compact
from ppl_bnn.prediction.norm_statistics import own_statistics
from ppl_bnn.prediction.plain import NotTraceable, PlainNetwork, depending, plain

Noise = Iterable[tuple[str, Tensor]]
COMPACT = ("auto", "yes", "no")

log = logging.getLogger(__name__)


class Blocks(NamedTuple):
    """Logits of draws k * size to (k + 1) * size - 1, [size, N, C], by block number k: in any order, on any rank.

    The second argument is what the standard normal noise is multiplied by: 1, or -1 for the draws' mirror images,
    which a posterior without noise does not have.
    """

    size: int
    logits: Callable[[int, float], Tensor]


def coherent(
    net: nn.Module,
    guide: Posterior,
    x: Inputs,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    network: PlainNetwork | None = None,
    small: CompactNetwork | None = None,
) -> Blocks:
    """Blocks of one draw: the function that ``guide.draw(index, seed=seed)`` is, up to rounding.

    Weights are written into a plain torch network with batch norm folded, and what comes before the first random
    layer is computed once. A network that ``torch.fx`` cannot trace runs as it is with the drawn weights in place; one
    that samples sites of its own, through Pyro, several times slower.

    Args:
        batch_size: examples a forward pass; unless given, 200 for convolutions on a CPU, else 2000.
        network: ``plain(net)``, where it is there already, or ``normalized(net, norm_inputs)``.
        small: what `compact_network` returned; each draw is then computed in it.
    """
    try:
        network = network or plain(net, x)
    except NotTraceable as error:
        log.info("draws run the network as it is: %s", error)
        return as_it_is(net, guide, x, seed, batch_size, by_pyro=samples_more(net, guide, x))
    x = laid_out(network, x)
    limit = batch_size or default_batch(network, x)
    set_draw = _setter(network, guide, seed)
    run = passes(network.net, guide.sites, x, limit) if small is None else compact_passes(network, small, x, limit)

    def logits(index: int, sign: float) -> Tensor:
        set_draw(index, sign)
        if network.normalize:
            network.normalize(seed, index, sign)
        return run().unsqueeze(0)

    return Blocks(1, logits)


def compact_network(
    network: PlainNetwork | None, guide: Posterior, x: Inputs, batch_size: int | None, setting: str
) -> CompactNetwork | None:
    """The compact network in which draws of these inputs are computed, or None for the plain network.

    Args:
        network: None where torch.fx cannot trace it.
        setting: ``no``; ``yes``; or ``auto``: where the posterior is pruned, on a CPU, and a draw then costs clearly
            fewer operations (`ppl_bnn.prediction.compact.forms`).

    Raises:
        UserError: the setting is ``yes`` and there is no such network.
    """
    if setting == "no" or (setting == "auto" and not is_pruned(guide)):
        return None
    if (
        network is None or network.normalize or not isinstance(x, Tensor) or not x.is_cpu
        or not isinstance(guide, Factorized) or not guide.sites or not can_be_compact(network, guide)
    ):  # fmt: skip
        if setting == "auto":
            return None
        raise UserError(
            "compact 'yes' needs a posterior with loc_scale, of a network that torch.fx traces and whose random "
            "parameters are of Linear and Conv2d layers, with one input tensor on a CPU, without norm_inputs; leave it "
            "at 'auto'"
        )
    x = laid_out(network, x)
    limit = min(len(x), batch_size or default_batch(network, x))
    small = compact(network, guide)
    chosen = choose_layers(small, limit)
    if setting == "yes":
        return small
    dense = {layer.path: network.parameter(f"{layer.path}.weight").numel() for layer in small.layers}
    return small if compact_pays(small, chosen, uses_of(network.net, dense, x[:1]), dense, len(x), limit) else None


def normalized(net: nn.Module, norm_inputs: Inputs) -> PlainNetwork:
    """A plain network in which each draw has batch norm by its own statistics of `norm_inputs` [K, ...].

    Raises:
        UserError: `net` has no fixed graph of layers, or no batch norm with running statistics; K < 2.
    """
    network = plain(net, norm_inputs, fold=False)
    return replace(network, normalize=own_statistics(network.net, laid_out(network, norm_inputs)))


def passes(module: fx.GraphModule, sites: Sequence[str], x: Inputs, limit: int) -> Callable[[], Tensor]:
    """A function to the logits [N, C] of `module` with the weights it has when called, `limit` examples a pass."""
    layers = {site.rpartition(".")[0] for site in sites}
    starts = [constants(module, layers, part) for part in split(x, limit)]

    def run() -> Tensor:
        with torch.inference_mode():
            return torch.cat([fx.Interpreter(module).run(initial_env=dict(start)) for start in starts])

    return run


def compact_passes(network: PlainNetwork, small: CompactNetwork, x: Inputs, limit: int) -> Callable[[], Tensor]:
    """What `passes` gives of the plain network, up to rounding, by its compact network."""
    assert isinstance(x, Tensor)
    run_small = passes(small.net, [f"{layer.path}.weight" for layer in small.layers], small.select(x), limit)

    def run() -> Tensor:
        small.set_weights(network)
        return run_small()

    return run


def _setter(network: PlainNetwork, guide: Posterior, seed: int) -> Callable[[int, float], None]:
    """A function of a draw's index and sign that sets the plain network's weights to the draw."""
    if isinstance(guide, Symmetric):
        with_noise = placed(network, guide, guide.sites)
        return lambda index, sign: with_noise((site, sign * noise) for site, noise in guide.noise(index, seed=seed))

    def set_draw(index: int, sign: float) -> None:
        assert sign == 1, "mirror images need a posterior with noise"
        draw = guide.draw(index, seed=seed)
        for site in guide.sites:
            network.set(site, draw[site])

    return set_draw


def placed(network: PlainNetwork, guide: Factorized, sites: Iterable[str]) -> Callable[[Noise], None]:
    """A function that sets weights of the plain network to loc + scale * noise, for noise (site, [*shape]) each."""
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
    def with_noise(noise: Noise) -> None:
        for site, values in noise:
            weight, loc, scale = where[site]
            torch.addcmul(loc, scale, values, out=weight)

    return with_noise


def constants(module: fx.GraphModule, random: set[str], x: Inputs) -> dict[fx.Node, Tensor | None]:
    """The values of a graph that do not depend on its `random` layers, for inputs x: an ``fx.Interpreter``'s start.

    What nothing that depends on them reads is None.
    """
    depends = depending(module.graph, random) | set(module.graph.find_nodes(op="output"))
    runner = fx.Interpreter(module, garbage_collect_values=False)
    runner.args_iter = iter(positional(module, x))
    with torch.inference_mode():
        for node in module.graph.nodes:
            if node not in depends:
                runner.env[node] = runner.run_node(node)
    return {node: value if depends.intersection(node.users) else None for node, value in runner.env.items()}


def laid_out(network: PlainNetwork, x: I) -> I:
    """The inputs, and the network with them, in the faster memory layout: channels_last for convolutions on a CPU."""
    if _convolutions(network) and lead(x).is_cpu and any(part.dim() == 4 for part in parts(x)):
        network.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return mapped(x, lambda part: part.contiguous(memory_format=torch.channels_last) if part.dim() == 4 else part)
    return x


def default_batch(network: PlainNetwork, x: Inputs) -> int:
    """Examples a forward pass: on a CPU as many as keep activations in reach of the caches, else as keep it busy."""
    return 200 if _convolutions(network) and lead(x).is_cpu else 2000


def _convolutions(network: PlainNetwork) -> bool:
    return any(isinstance(layer, nn.Conv2d) for layer in network.net.modules())


def samples_more(net: nn.Module, guide: Posterior, x: Inputs) -> bool:
    """Whether a network has sites beside its random parameters, so that Pyro must hand it their values."""
    draw = guide.draw(0)
    if not draw.keys() >= random_sites(net).keys():
        return True
    with (
        evaluating(net),
        forked_random(lead(x)),
        poutine.block(),
        own_parameters(),
        given(net, draw),
        poutine.trace() as run,
    ):
        call(net, mapped(rows(x, slice(1)), torch.clone))
    if more := [name for name, site in run.trace.nodes.items() if site["type"] == "sample"]:
        log.warning("draws go through Pyro, several times slower: the network samples %r in its forward pass", more[0])
    return bool(more)


def as_it_is(
    net: nn.Module, guide: Posterior, x: Inputs, seed: int, batch_size: int | None, *, by_pyro: bool
) -> Blocks:
    """Blocks of one draw of a network that torch.fx cannot trace, with the drawn weights in place."""

    def logits(index: int, sign: float) -> Tensor:
        draw = signed_draw(guide, index, seed=seed, sign=sign)
        with evaluating(net), own_parameters(), poutine.condition(data=draw) if by_pyro else given(net, draw):
            # Copies, for a network that changes its input in place.
            found = [one_tensor(call(net, mapped(part, torch.clone))) for part in split(x, batch_size or 200)]
            return torch.cat(found).unsqueeze(0)

    return Blocks(1, logits)
