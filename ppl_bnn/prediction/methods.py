"""How draws are made: method, sampling and network, decided before the first draw."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Factorized, Posterior, Symmetric, check_num_draws, offered
from ppl_bnn.inputs import Inputs, count, lead
from ppl_bnn.prediction.compact.network import CompactNetwork
from ppl_bnn.prediction.door import check_inputs
from ppl_bnn.prediction.draws import COMPACT, Blocks, as_it_is, coherent, compact_network, normalized, samples_more
from ppl_bnn.prediction.layerwise import fewer_numbers, layerwise
from ppl_bnn.prediction.plain import NotTraceable, PlainNetwork, plain

DRAWN: dict[str, Callable[..., Blocks]] = {"draws": coherent, "layerwise": layerwise}
METHODS = ("auto", *DRAWN, "moments")
SAMPLINGS = ("independent", "antithetic", "sobol")


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What draws take of a network, decided before the first draw.

    Attributes:
        network: the plain network, None where torch.fx cannot trace it.
        method: ``draws``, ``layerwise`` or ``moments``: what ``auto`` became.
        small: the compact network that draws are computed in, if they are.
        by_pyro: whether a network that is not traced gets its draws through Pyro.
    """

    network: PlainNetwork | None
    method: str
    small: CompactNetwork | None = None
    by_pyro: bool = False

    def with_compact(self, guide: Posterior, x: Inputs, batch_size: int | None, setting: str) -> "Prepared":
        """The same with the compact network, where the setting (`predict`'s compact) says so."""
        if self.method == "draws":
            return replace(self, small=compact_network(self.network, guide, x, batch_size, setting))
        if setting == "yes":
            raise UserError(f"compact 'yes' is for the method draws, not {self.method}; leave it at 'auto'")
        return self


def prepared_network(
    net: nn.Module, guide: Posterior, x: Inputs, method: str, sampling: str, norm_inputs: Inputs | None
) -> Prepared:
    """The plain network that draws of such inputs take, and the method that `auto` is.

    Raises:
        UserError: a method or sampling that the posterior does not allow, or `norm_inputs` with another than draws.
    """
    if sampling == "sobol" and method == "draws":
        raise UserError("sampling sobol is for the method layerwise: draws of weights need more dimensions than it has")
    if sampling == "sobol":
        offered(guide, Factorized, "sampling sobol", "use sampling independent")
    if method in ("layerwise", "moments"):
        offered(guide, Factorized, f"method {method}", "use method draws")
    if norm_inputs is not None:
        method = _whole_draws(guide, method, sampling)
        check_inputs(norm_inputs)
        network: PlainNetwork | None = normalized(net, norm_inputs)
    else:
        network, reason = _traced(net, x)
        if method == "auto":
            method = "layerwise" if sampling == "sobol" else cheapest(network, guide, x)
    if sampling == "antithetic" and method == "draws":
        offered(guide, Symmetric, "sampling antithetic", "use sampling independent")
    if network is None and method == "draws":
        log.info("draws run the network as it is: %s", reason)
        return Prepared(None, method, by_pyro=samples_more(net, guide, x))
    return Prepared(network, method)


def _traced(net: nn.Module, x: Inputs) -> tuple[PlainNetwork | None, str]:
    """The plain network, or None and why torch.fx cannot trace it."""
    try:
        return plain(net, x), ""
    except NotTraceable as error:
        return None, str(error)


def cheapest(network: PlainNetwork | None, guide: Posterior, x: Inputs) -> str:
    """What the method ``auto`` is for these examples."""
    able = network is not None and guide.sites and isinstance(guide, Factorized)
    return "layerwise" if able and network and fewer_numbers(network, guide, x) else "draws"


def drawn_blocks(
    net: nn.Module, guide: Posterior, x: Inputs, seed: int, prepared: Prepared, sampling: str, batch_size: int | None
) -> Blocks:
    """Blocks of draws by a method and a sampling; of no examples, empty ones."""
    if not count(x):
        return Blocks(1, lambda block, sign: lead(x))
    if prepared.network is None and prepared.method == "draws":
        made = as_it_is(net, guide, x, seed, batch_size, by_pyro=prepared.by_pyro)
        return mirrored(made) if sampling == "antithetic" else made
    how: dict[str, Any] = {"sobol": True} if sampling == "sobol" else {}
    if prepared.small is not None:
        how["small"] = prepared.small
    draw = DRAWN[prepared.method]
    blocks = draw(net, guide, x, seed=seed, batch_size=batch_size, network=prepared.network, **how)
    return mirrored(blocks) if sampling == "antithetic" else blocks


def mirrored(blocks: Blocks) -> Blocks:
    """Each draw followed by its mirror image."""

    def pairs(block: int, sign: float) -> Tensor:
        return torch.stack([blocks.logits(block, sign), blocks.logits(block, -sign)], 1).flatten(0, 1)

    return Blocks(2 * blocks.size, pairs)


def check_draws(guide: Posterior, num_samples: int, sampling: str, compact: str) -> None:
    """Raise UserError for a number of draws that cannot be made, or an unknown sampling or compact."""
    if not isinstance(num_samples, Integral):
        raise UserError(f"num_samples must be a whole number, got {num_samples!r}")
    if num_samples < 1:
        raise UserError(f"num_samples must be at least 1, got {num_samples}")
    if sampling not in SAMPLINGS:
        raise UserError(f"sampling must be one of {', '.join(SAMPLINGS)}; got {sampling!r}")
    if sampling == "antithetic" and num_samples % 2:
        raise UserError(f"antithetic draws come in pairs: num_samples must be even, got {num_samples}")
    if compact not in COMPACT:
        raise UserError(f"compact must be one of {', '.join(COMPACT)}; got {compact!r}")
    check_num_draws(guide, num_samples)


def _whole_draws(guide: Posterior, method: str, sampling: str) -> str:
    """The method that has a draw of every layer, which batch norm's own statistics need."""
    if not guide.sites:
        raise UserError("a deterministic network has no draws with statistics of their own; leave out norm_inputs")
    if method not in ("auto", "draws") or sampling == "sobol":
        asked = f"method {method}" if sampling != "sobol" else "sampling sobol"
        raise UserError(f"norm_inputs sets each draw's batch norm statistics, so it needs method draws, got {asked}")
    return "draws"
