"""Answers to many small requests: the network is prepared once, and each request pays for its draws alone."""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Factorized, Posterior, is_pruned, offered
from ppl_bnn.inputs import Inputs, count, shape_of
from ppl_bnn.models.likelihoods import Likelihood
from ppl_bnn.prediction.compact.layerwise import NotDense, compact_draws
from ppl_bnn.prediction.compact.network import can_be_compact
from ppl_bnn.prediction.compact.network import compact as compact_form
from ppl_bnn.prediction.door import check_inputs, check_prediction
from ppl_bnn.prediction.layerwise import Layerwise, Numbers
from ppl_bnn.prediction.methods import check_draws, drawn_blocks, mirrored, prepared_network
from ppl_bnn.prediction.plain import PlainNetwork
from ppl_bnn.prediction.running import latents_of_draw

# Noise is kept from one request to the next up to so many rows of it (examples times draws).
_KEPT_ROWS = 4000


def predictor(
    model: nn.Module,
    posterior: Posterior,
    x: Inputs,
    *,
    num_samples: int = 400,
    seed: int = 0,
    sampling: str = "independent",
    compact: str = "auto",
    norm_inputs: Inputs | None = None,
) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    """Return a function of x [N, ...], or a tuple or dict of such, to the predictive in two tensors.

    For classes they are the probabilities [N, C] and the draws' mean entropy [N] in nats, which
    `metrics.uncertainties` takes; for numbers the mean and the standard deviation of y, [N, ...] each. The function
    gives the same answer for the same request, and what `ppl_bnn.predict` gives with the same settings; of a pruned
    posterior of dense layers alone, other draws of the same distribution, those of its compact network in the form that
    takes fewer operations for `x`. It holds the network and posterior as they were when it was made, and answers one
    request at a time, whichever threads they come from.

    Args:
        model, posterior: as `ppl_bnn.predict` takes them, but for a Pyro model of your own.
        x: a request like those to come, [N, ...]; how draws are made is chosen by it (`predict`'s method ``auto``).
        num_samples, seed, sampling, norm_inputs: as `ppl_bnn.predict` takes them. The draws' own statistics of
            `norm_inputs` are taken here, once.
        compact: as `ppl_bnn.predict` takes it. ``no`` keeps to the draws of `predict` for a pruned posterior too.

    Raises:
        UserError: settings, a posterior or an `x` that `ppl_bnn.predict` refuses; values that are not finite, by the
            function too.
    """
    check_draws(posterior, num_samples, sampling, compact)
    target = check_prediction(model, posterior, x, seed=seed, own_model="predictor")
    net, guide, likelihood = copy.deepcopy((target.net, posterior, target.likelihood))
    method = "draws" if compact == "yes" and sampling != "sobol" else "auto"
    prepared = prepared_network(net, guide, x, method, sampling, norm_inputs)
    drawn = layerwise = None
    if prepared.network is not None and prepared.method == "layerwise":
        if sampling == "independent" and compact != "no":
            drawn = _of_compact(prepared.network, guide, x, num_samples, seed)
        if drawn is None:
            layerwise = Layerwise(net, guide, x, network=prepared.network, sobol=sampling == "sobol")
    if drawn is None:
        prepared = prepared.with_compact(guide, x, None, compact)
    known: dict[int, Numbers] = {}
    shape = shape_of(x)
    one_at_a_time = threading.Lock()

    def numbers(of: Layerwise, x: Inputs) -> Numbers:
        examples = count(x)
        if examples * num_samples > _KEPT_ROWS:
            return of.numbers(x, seed)
        if examples not in known:
            known.clear()
            known[examples] = cache(of.numbers(x, seed))
        return known[examples]

    def outputs(x: Inputs) -> Iterator[Tensor]:
        if drawn and isinstance(x, Tensor):
            yield drawn(x)
            return
        if layerwise:
            blocks = layerwise.blocks(x, numbers(layerwise, x))
            blocks = mirrored(blocks) if sampling == "antithetic" else blocks
        else:
            blocks = drawn_blocks(net, guide, x, seed, prepared, sampling, None)
        for first in range(0, num_samples, blocks.size):
            yield blocks.logits(first // blocks.size, 1.0)[: num_samples - first]

    def latents(draw: int) -> dict[str, Tensor]:
        return latents_of_draw(likelihood, guide, draw, seed=seed, sampling=sampling) if target.latents else {}

    def answer(x: Inputs) -> tuple[Tensor, Tensor]:
        check_inputs(x)
        # A compact network picks its pixels by their place: of another shape it would pick others.
        if (drawn or prepared.small is not None) and shape_of(x) != shape:
            raise UserError(f"the predictor was made for inputs {list(shape)}, got {list(shape_of(x))}")
        # A draw's weights are written into the network.
        with one_at_a_time, torch.no_grad():
            return likelihood.answer(_averages(likelihood, outputs(x), latents))

    if norm_inputs is not None:
        answer(x)
    return answer


def _averages(
    likelihood: Likelihood, outputs: Iterable[Tensor], latents: Callable[[int], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Averages over draws [s, N, *] of what the likelihood makes of them; ``spread`` is the variance of the means."""
    sums: dict[str, Tensor] = {}
    first, draws = torch.zeros(()), 0
    for some in outputs:
        own = [latents(draws + at) for at in range(len(some))]
        if any(own):
            each = [likelihood.parts(draw, **given) for draw, given in zip(some, own, strict=True)]
            parts = {name: torch.stack([one[name] for one in each]) for name in each[0]}
        else:
            flat = likelihood.parts(some.flatten(0, 1))
            parts = {name: values.unflatten(0, (len(some), -1)) for name, values in flat.items()}
        if not draws:
            # Deviations from the first draw: no digits cancel.
            first = parts["mean"][0]
        if likelihood.drawn:
            parts |= {"spread": (parts["mean"] - first).square(), "mean": parts["mean"] - first}
        draws += len(some)
        sums = {name: sums.get(name, 0) + values.sum(0) for name, values in parts.items()}
    averages = {name: total / draws for name, total in sums.items()}
    if likelihood.drawn:
        averages["spread"] = (averages["spread"] - averages["mean"].square()).clamp_min(0)
        averages["mean"] = averages["mean"] + first
    return averages


def _of_compact(
    network: PlainNetwork, guide: Posterior, x: Inputs, num_samples: int, seed: int
) -> Callable[[Tensor], Tensor] | None:
    """Draws of logits by the compact network of a pruned guide; None where it is not pruned, or not dense alone."""
    if not isinstance(x, Tensor) or not x.is_cpu or not is_pruned(guide):
        return None
    factorized = offered(guide, Factorized, "a compact network", "set compact to 'no'")
    if not can_be_compact(network, factorized):
        return None
    small = compact_form(network, factorized)
    with suppress(NotDense):
        draws = compact_draws(small, len(x), num_samples)
        noise, limit = draws.noise(num_samples, seed), max(1, _KEPT_ROWS // num_samples)

        def logits(x: Tensor) -> Tensor:
            return torch.cat([draws.logits(part, noise, num_samples) for part in small.select(x).split(limit)], 1)  # type: ignore[arg-type]

        return logits
    return None
