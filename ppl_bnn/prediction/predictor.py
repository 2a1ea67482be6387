"""Answers to many small requests: the network is prepared once, and each request pays for its draws alone."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor, nn

from ppl_bnn import metrics
from ppl_bnn.errors import UserError
from ppl_bnn.guides.mean_field import MeanFieldNormal
from ppl_bnn.prediction.compact.layerwise import NotDense
from ppl_bnn.prediction.compact.layerwise import layerwise as compact_layerwise
from ppl_bnn.prediction.compact.network import compact
from ppl_bnn.prediction.layerwise import Numbers, prepared
from ppl_bnn.prediction.plain import PlainNetwork
from ppl_bnn.prediction.predictive import check_draws, check_finite, drawn_blocks, mirrored, prepared_network

# Noise is kept from one request to the next up to so many rows of it (examples times draws).
_KEPT_ROWS = 4000


def predictor(
    net: nn.Module,
    guide: MeanFieldNormal,
    x: Tensor,
    *,
    num_samples: int = 400,
    seed: int = 0,
    sampling: str = "independent",
    norm_inputs: Tensor | None = None,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a function x [N, ...] -> the predictive's probabilities [N, C] and the draws' mean entropy [N], nats.

    `metrics.uncertainties` takes the two. The function gives the same answer for the same request, and what
    `ppl_bnn.predict` gives with the same settings; of a pruned posterior of dense layers alone, other draws of the same
    distribution, those of its compact network in the form that is fastest for `x`. It holds the network and posterior
    as they were when it was made, and answers one request at a time, whichever threads they come from.

    Args:
        net, guide: as `ppl_bnn.predict` takes them.
        x: a request like those to come, [N, ...]; how draws are made is chosen by it (`predict`'s method ``auto``).
        num_samples, seed, sampling, norm_inputs: as `ppl_bnn.predict` takes them. The draws' own statistics of
            `norm_inputs` are taken here, once.

    Raises:
        UserError: settings that do not fit; values that are not finite, by the function too.
    """
    check_draws(num_samples, sampling)
    net, guide = copy.deepcopy((net, guide))
    network, method = prepared_network(net, guide, x, "auto", sampling, norm_inputs)
    drawn = layerwise = None
    if network is not None and method == "layerwise" and sampling == "independent":
        drawn = _of_compact(network, guide, x, num_samples, seed)
    if method == "layerwise" and drawn is None:
        layerwise = prepared(net, guide, x, network=network, sobol=sampling == "sobol")
    known: dict[int, Numbers] = {}
    one_at_a_time = threading.Lock()

    def logits(x: Tensor) -> Iterator[Tensor]:
        def kept(numbers: Callable[[], Numbers]) -> Numbers:
            if len(x) * num_samples > _KEPT_ROWS:
                return numbers()
            if len(x) not in known:
                known.clear()
                known[len(x)] = cache(numbers())
            return known[len(x)]

        if drawn:
            yield drawn(x)
            return
        if layerwise:
            blocks = layerwise(x, seed, None, kept)
            blocks = mirrored(blocks) if sampling == "antithetic" else blocks
        else:
            blocks = drawn_blocks(net, guide, x, seed, method, sampling, None, network)
        for first in range(0, num_samples, blocks.size):
            yield blocks.logits(first // blocks.size, 1.0)[: num_samples - first]

    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        if not len(x):
            raise UserError("a request needs at least 1 example")
        check_finite(x)
        probs, entropy = torch.zeros(()), torch.zeros(())
        # A draw's weights are written into the network.
        with one_at_a_time:
            for some in logits(x):
                some = some.softmax(-1)
                probs, entropy = probs + some.sum(0), entropy + metrics.entropy(some).sum(0)
        return probs / num_samples, entropy / num_samples

    if norm_inputs is not None:
        answer(x)
    return answer


def _of_compact(
    network: PlainNetwork, guide: MeanFieldNormal, x: Tensor, num_samples: int, seed: int
) -> Callable[[Tensor], Tensor] | None:
    """Draws of logits by the compact network of a pruned guide; None where it is not pruned, or not dense alone."""
    if not x.is_cpu or not guide.is_pruned:
        return None
    small = compact(network, guide)
    with suppress(NotDense):
        draws = compact_layerwise(small, small.select(x), num_samples)
        noise, limit = draws.noise(num_samples, seed), max(1, _KEPT_ROWS // num_samples)

        def logits(x: Tensor) -> Tensor:
            return torch.cat([draws.logits(part, noise, num_samples) for part in small.select(x).split(limit)], 1)

        return logits
    return None
