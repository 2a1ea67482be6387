"""The posterior predictive: by Monte Carlo, p(y | x) = (1/S) sum_s softmax(logits_s), or by moments without a draw."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ppl_bnn.distributed import Alone, Communicator
from ppl_bnn.errors import Interrupted, UserError
from ppl_bnn.guides.mean_field import MeanFieldNormal
from ppl_bnn.native.normals import GENERATOR, draw_seed
from ppl_bnn.prediction.draws import Blocks, coherent, normalized
from ppl_bnn.prediction.layerwise import fewer_numbers, layerwise
from ppl_bnn.prediction.moments import moment_predictive
from ppl_bnn.prediction.plain import NotTraceable, PlainNetwork, plain
from ppl_bnn.prediction.stopping import is_look, precise
from ppl_bnn.prediction.tally import Predictive, Tally, check_labels

DRAWN: dict[str, Callable[..., Blocks]] = {"draws": coherent, "layerwise": layerwise}
METHODS = ("auto", *DRAWN, "moments")
SAMPLINGS = ("independent", "antithetic", "sobol")

__all__ = ["METHODS", "SAMPLINGS", "Predictive", "cheapest", "draw_logits", "predict"]


def predict(
    net: nn.Module,
    guide: MeanFieldNormal,
    x: Tensor,
    y: Tensor,
    *,
    num_samples: int = 400,
    seed: int = 0,
    method: str = "auto",
    sampling: str = "independent",
    tolerance: float | None = None,
    batch_size: int | None = None,
    norm_inputs: Tensor | None = None,
    keep: Tensor | None = None,
    progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
    communicator: Communicator | None = None,
    so_far: Predictive | None = None,
    save: Callable[[Predictive], None] | None = None,
    save_seconds: float = 60.0,
) -> Predictive:
    """Draw S networks from the guide and predict every example with each.

    Draws depend on (seed, draw index) alone, so they are the same in any order, on any number of ranks, and whether
    asked for at once or added to. Memory beside the stored output does not depend on S.

    Args:
        net: the network inside the model (``Classifier.net``), [B, ...] -> logits [B, C].
        guide: its posterior, pruned or not; a guide without sites (a deterministic network) gives S equal draws.
        x, y: inputs [N, ...] and labels [N].
        num_samples: S; the most, where there is a tolerance.
        method: ``draws``, ``layerwise``, ``moments`` (modules of those names in `ppl_bnn.prediction`; the last is an
            approximation without draws, its result has one row instead of S) or ``auto``: layerwise where that needs
            fewer random numbers than draws, which is for few examples of a network whose weights are all in dense
            layers.
        sampling: ``independent``, ``antithetic``: draw 2k uses the noise of independent draw k, 2k + 1 its negative, or
            ``sobol``, for layerwise alone: draw k uses point k of a randomized quasi-random sequence (Sobol's).
        tolerance: leave an example out of further draws once each of its probabilities is known to within this
            (`ppl_bnn.prediction.stopping`).
        batch_size: examples a forward pass.
        norm_inputs: training inputs [K, ...], a thousand, say: each draw's batch norm has its own statistics of them
            instead of the running averages, for K examples more a draw. For the method `draws` alone.
        keep: positions [K] of the examples whose probabilities are kept for every draw; all of them unless given.
        communicator: ranks to share the draws out among, called by all of them alike; all get the result, but only
            rank 0 the kept probabilities.
        so_far: the result of fewer draws made in the same way: only the rest is drawn. Rank 0's counts.
        save: called on rank 0 with the result so far, when stopped and every `save_seconds` at most.

    Raises:
        UserError: S < 1 or odd for antithetic draws, no examples, values that are not finite, labels that do not
            fit, a method that the network does not allow, `norm_inputs` for one without batch norm, or `so_far` of
            more draws or another generator.
        Interrupted: `should_stop` said so on some rank.
    """
    _check(x, y, num_samples, method, sampling, tolerance)
    ranks = communicator or Alone()
    network, method = prepared_network(net, guide, x, method, sampling, norm_inputs)
    if so_far is not None and len(so_far.log_likelihood) > num_samples:
        raise UserError(f"num_samples is {num_samples}, and so_far has {len(so_far.log_likelihood)} draws already")
    if so_far is not None and so_far.generator != GENERATOR:
        raise UserError(
            f"so_far was drawn by the generator {so_far.generator}, and this version draws by {GENERATOR}; the draws "
            "would not fit together: leave out so_far"
        )
    kept = torch.arange(len(x)) if keep is None else keep.cpu()
    if method == "moments":
        return _without_draws(net, guide, x, y, kept)
    tally = Tally(num_samples, kept if ranks.is_main else kept[:0], y, sampling, method)
    tally.go_on_from(so_far, ranks)

    def blocks_of_the_rest() -> Blocks:
        if tolerance is not None and is_look(tally.done):
            tally.leave_out(precise(tally.result(), tolerance))
        started = time.perf_counter()
        rest = x[tally.active.to(x.device)]
        own_seed = seed
        if method == "layerwise" and len(rest) < len(x):
            # Blocks are of another size now, and their numbers start anew: with the same seed some would come again.
            own_seed = draw_seed(seed, len(rest))
        blocks = drawn_blocks(net, guide, rest, own_seed, method, sampling, batch_size, network)
        # Layers in front of the first random one are computed here: all of a deterministic network.
        tally.seconds += time.perf_counter() - started
        return blocks

    blocks = blocks_of_the_rest()
    bar = tqdm(total=num_samples, initial=tally.done, disable=not progress, unit="draw", dynamic_ncols=True)
    saved, saving = time.perf_counter(), 0.0
    with bar:
        while tally.done < num_samples and len(tally.active):
            started = time.perf_counter()
            first = tally.done // blocks.size
            logits = blocks.logits(first + ranks.rank, 1.0).float()
            if not logits.is_cpu:
                torch.get_device_module(logits.device).synchronize(logits.device)
            logits = ranks.gather(logits).flatten(0, 1)
            tally.seconds += time.perf_counter() - started
            # A block is whole wherever it is needed in part: its numbers are the same.
            last = min(num_samples, (first + ranks.size) * blocks.size)
            if tolerance is not None:
                last = next((draw for draw in range(tally.done + 1, last) if is_look(draw)), last)
            bar.update(last - tally.done)
            tally.add(logits[tally.done - first * blocks.size : last - first * blocks.size])
            if tolerance is not None and is_look(last) and last < num_samples:
                blocks = blocks_of_the_rest()
            stop = ranks.any(should_stop()) and last < num_samples
            now = time.perf_counter()
            # Saving takes at most a twentieth of the time.
            if save and ranks.is_main and (stop or now - saved > max(save_seconds, 20 * saving)):
                save(tally.result())
                saved, saving = time.perf_counter(), time.perf_counter() - now
            if stop:
                # As in training: no rank ends while rank 0 is writing.
                ranks.barrier()
                raise Interrupted(f"stopped after draw {last} of {num_samples}")
    return tally.result()


def mirrored(blocks: Blocks) -> Blocks:
    """Each draw followed by its mirror image."""

    def pairs(block: int, sign: float) -> Tensor:
        return torch.stack([blocks.logits(block, sign), blocks.logits(block, -sign)], 1).flatten(0, 1)

    return Blocks(2 * blocks.size, pairs)


def prepared_network(
    net: nn.Module, guide: MeanFieldNormal, x: Tensor, method: str, sampling: str, norm_inputs: Tensor | None
) -> tuple[PlainNetwork | None, str]:
    """The plain network that draws of such inputs take, None where there is none, and the method that `auto` is."""
    if sampling == "sobol" and method == "draws":
        raise UserError("sampling sobol is for the method layerwise: draws of weights take more numbers than it has")
    if norm_inputs is not None:
        method = _whole_draws(guide, method, sampling)
        check_finite(norm_inputs)
        return normalized(net, norm_inputs), method
    network = None
    with suppress(NotTraceable):
        network = plain(net)
    if method == "auto":
        method = "layerwise" if sampling == "sobol" else cheapest(network, guide, x)
    return network, method


def cheapest(network: PlainNetwork | None, guide: MeanFieldNormal, x: Tensor) -> str:
    """What the method ``auto`` is for these examples."""
    return "layerwise" if network and guide.sites and fewer_numbers(network, guide, x) else "draws"


def draw_logits(
    net: nn.Module,
    guide: MeanFieldNormal,
    x: Tensor,
    *,
    num_samples: int,
    seed: int = 0,
    batch_size: int | None = None,
    method: str = "draws",
    sampling: str = "independent",
    norm_inputs: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the logits [N, C] of draw 0, 1, ... S - 1, each the same whichever draws are asked for."""
    network, method = prepared_network(net, guide, x, method, sampling, norm_inputs)
    blocks = drawn_blocks(net, guide, x, seed, method, sampling, batch_size, network)
    for first in range(0, num_samples, blocks.size):
        yield from blocks.logits(first // blocks.size, 1.0)[: num_samples - first]


def drawn_blocks(
    net: nn.Module,
    guide: MeanFieldNormal,
    x: Tensor,
    seed: int,
    method: str,
    sampling: str,
    batch_size: int | None,
    network: PlainNetwork | None = None,
) -> Blocks:
    """Blocks of draws by a method and a sampling; of no examples, empty ones."""
    if not len(x):
        return Blocks(1, lambda block, sign: x)
    how: dict[str, Any] = {"sobol": True} if sampling == "sobol" else {}
    blocks = DRAWN[method](net, guide, x, seed=seed, batch_size=batch_size, network=network, **how)
    return mirrored(blocks) if sampling == "antithetic" else blocks


def _without_draws(net: nn.Module, guide: MeanFieldNormal, x: Tensor, y: Tensor, kept: Tensor) -> Predictive:
    started = time.perf_counter()
    mean, entropy = (part.cpu().double() for part in moment_predictive(net, guide, x))
    seconds = time.perf_counter() - started
    labels = y.cpu()
    check_labels(labels, mean.shape[1])
    return Predictive(
        probs=mean[kept].float().unsqueeze(0),
        kept=kept,
        log_likelihood=mean.gather(1, labels.unsqueeze(1)).log().float().T,
        labels=labels,
        mean_probs=mean,
        mean_entropy=entropy,
        accuracies=(mean.argmax(1) == labels).float().mean().unsqueeze(0),
        seconds=seconds,
        mean_squares=mean.square(),
        draws=torch.zeros(len(x), dtype=torch.long),
        method="moments",
    )


def _check(x: Tensor, y: Tensor, num_samples: int, method: str, sampling: str, tolerance: float | None) -> None:
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    check_draws(num_samples, sampling)
    if tolerance is not None and not 0 < tolerance < 1:
        raise UserError(f"tolerance must be above 0 and below 1, got {tolerance}")
    if tolerance is not None and sampling == "sobol":
        raise UserError(
            "a tolerance needs draws that tell their own error, which Sobol points, made to fit each other, do not; "
            "use sampling antithetic with it"
        )
    if len(x) == 0 or len(x) != len(y):
        raise UserError(f"x and y need the same number of examples, at least 1; got {len(x)} and {len(y)}")
    check_finite(x)


def _whole_draws(guide: MeanFieldNormal, method: str, sampling: str) -> str:
    """The method that has a draw of every layer, which batch norm's own statistics need."""
    if not guide.sites:
        raise UserError("a deterministic network has no draws with statistics of their own; leave out norm_inputs")
    if method not in ("auto", "draws") or sampling == "sobol":
        asked = f"method {method}" if sampling != "sobol" else "sampling sobol"
        raise UserError(f"batch norm's own statistics are those of whole draws: method draws, not {asked}")
    return "draws"


def check_draws(num_samples: int, sampling: str) -> None:
    """Raise UserError for a number of draws below 1, or odd where they come in pairs, or an unknown sampling."""
    if num_samples < 1:
        raise UserError(f"num_samples must be at least 1, got {num_samples}")
    if sampling not in SAMPLINGS:
        raise UserError(f"sampling must be one of {', '.join(SAMPLINGS)}; got {sampling!r}")
    if sampling == "antithetic" and num_samples % 2:
        raise UserError(f"antithetic draws come in pairs: num_samples must be even, got {num_samples}")


def check_finite(x: Tensor) -> None:
    """Raise UserError for inputs [N, ...] that are not all finite."""
    if x.is_floating_point() and not x.isfinite().all():
        bad = (~x.flatten(1).isfinite().all(1)).nonzero().flatten()
        raise UserError(
            f"x must be finite; {len(bad)} examples have NaN or infinite values, the first is {int(bad[0])}"
        )
