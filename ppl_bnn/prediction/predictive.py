"""The posterior predictive: by Monte Carlo, p(y | x) = (1/S) sum_s softmax(logits_s), or by moments without a draw."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ppl_bnn.distributed import Alone, Communicator
from ppl_bnn.errors import Interrupted, UserError
from ppl_bnn.guides.posterior import Posterior, check_num_draws
from ppl_bnn.models.likelihoods import Categorical, Likelihood
from ppl_bnn.native.normals import draw_seed
from ppl_bnn.prediction.door import check_prediction, checked_targets, network_of, positions
from ppl_bnn.prediction.draws import Blocks
from ppl_bnn.prediction.methods import METHODS, SAMPLINGS, check_draws, drawn_blocks, prepared_network
from ppl_bnn.prediction.moments import moment_predictive
from ppl_bnn.prediction.stopping import is_look, precise, schedule
from ppl_bnn.prediction.tally import Predictive, Tally, check_so_far

__all__ = ["METHODS", "SAMPLINGS", "Predictive", "draw_logits", "predict"]


def predict(
    net: nn.Module,
    guide: Posterior,
    x: Tensor,
    y: Tensor,
    *,
    num_samples: int = 400,
    seed: int = 0,
    method: str = "auto",
    sampling: str = "independent",
    tolerance: float | None = None,
    compact: str = "auto",
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
    """Draw S networks from the posterior and predict every example with each.

    Draws depend on (seed, draw index) alone, so they are the same in any order, on any number of ranks, and whether
    asked for at once or added to. Memory beside the stored output does not depend on S.

    Args:
        net: a `Classifier`, or the network inside it (``Classifier.net``), [B, ...] -> logits [B, C].
        guide: its posterior, pruned or not: a `MeanFieldNormal`, or any `ppl_bnn.guides.posterior.Posterior`. A
            posterior without sites (a deterministic network) gives S equal draws.
        x, y: inputs [N, ...] and labels [N], integers 0 .. C - 1 (a tensor, or a numpy array).
        num_samples: S; the most, where there is a tolerance.
        method: ``draws``, ``layerwise``, ``moments`` (modules of those names in `ppl_bnn.prediction`; the last is an
            approximation without draws, its result has one row instead of S) or ``auto``: layerwise where that needs
            fewer random numbers than draws, which is for few examples of a network whose weights are all in dense
            layers. layerwise and moments need a posterior with `loc_scale`; without one ``auto`` is draws.
        sampling: ``independent``, ``antithetic``: draw 2k uses the noise of independent draw k, 2k + 1 its negative, or
            ``sobol``, for layerwise alone: draw k uses point k of a randomized quasi-random sequence (Sobol's).
            Antithetic draws of weights need a posterior with `noise`.
        tolerance: leave an example out of further draws once each of its probabilities is known to within this
            (`ppl_bnn.prediction.stopping`).
        compact: whether draws of a pruned posterior are computed in its smaller network, with the same weights:
            ``yes``, ``no``, or ``auto``: where counts of operations say that it pays (`prediction.compact.forms`).
            Results differ by rounding; the result records what was used.
        batch_size: examples a forward pass.
        norm_inputs: training inputs [K, ...], a thousand, say: each draw's batch norm has its own statistics of them
            instead of the running averages, for K examples more a draw. For the method `draws` alone.
        keep: positions [K] of the examples whose probabilities are kept for every draw; all of them unless given.
        communicator: ranks to share the draws out among, called by all of them alike; all get the result, but only
            rank 0 the kept probabilities.
        so_far: the result of fewer draws made in the same way: only the rest is drawn. Rank 0's counts.
        save: called on rank 0 with the result so far, when stopped and every `save_seconds` at most.

    Raises:
        UserError: before the first draw: S < 1, odd for antithetic draws, or above the posterior's number of draws; x
            that is no finite tensor; y that is no class labels of x; a posterior of other sites than the network's, or
            with values that are not finite; a method, sampling or compact that network and posterior do not allow;
            `norm_inputs` for a network without batch norm; `keep` that is no positions; `so_far` made otherwise.
        Interrupted: `should_stop` said so on some rank.
    """
    net, likelihood = network_of(net)
    _check(guide, num_samples, method, sampling, tolerance, compact)
    outputs = check_prediction(net, guide, x, likelihood, seed=seed)
    labels = checked_targets(y, x, outputs, likelihood)
    ranks = communicator or Alone()
    if compact == "yes" and method == "auto":
        method = "draws"
    prepared = prepared_network(net, guide, x, method, sampling, norm_inputs)
    kept = positions(keep, len(x))
    started = time.perf_counter()
    prepared = prepared.with_compact(guide, x, batch_size, compact)
    if so_far is not None:
        check_so_far(so_far, num_samples, labels, kept, prepared.method, sampling, prepared.small is not None)
    if prepared.method == "moments":
        return _without_draws(net, guide, x, labels, kept, likelihood)
    tally = Tally(
        num_samples, kept if ranks.is_main else kept[:0], labels, outputs, likelihood, sampling=sampling,
        method=prepared.method, compact=prepared.small is not None,
    )  # fmt: skip
    tally.go_on_from(so_far, ranks)
    tally.seconds += time.perf_counter() - started

    def blocks() -> Blocks:
        """Blocks of the examples that get further draws."""
        rest, own_seed = x[tally.active.to(x.device)], seed
        if prepared.method == "layerwise" and len(rest) < len(x):
            # Blocks are of another size now, and their numbers start anew: with the same seed some would come again.
            own_seed = draw_seed(seed, len(rest))
        return drawn_blocks(net, guide, rest, own_seed, prepared, sampling, batch_size)

    bar = tqdm(total=num_samples, initial=tally.done, disable=not progress, unit="draw", dynamic_ncols=True)
    saved, saving = time.perf_counter(), 0.0
    with bar:
        for _ in _drawn(tally, blocks, ranks, tolerance):
            bar.update(tally.done - bar.n)
            stop = ranks.any(should_stop()) and tally.done < num_samples
            now = time.perf_counter()
            # Saving takes at most a twentieth of the time.
            if save and ranks.is_main and (stop or now - saved > max(save_seconds, 20 * saving)):
                save(tally.result())
                saved, saving = time.perf_counter(), time.perf_counter() - now
            if stop:
                # As in training: no rank ends while rank 0 is writing.
                ranks.barrier()
                raise Interrupted(f"stopped after draw {tally.done} of {num_samples}")
    return tally.result()


def _drawn(tally: Tally, blocks: Callable[[], Blocks], ranks: Communicator, tolerance: float | None) -> Iterator[None]:
    """Add draws to the tally until it has all, a block on each rank at a time; yield after each."""
    while tally.done < tally.num_samples and len(tally.active):
        if tolerance is not None and is_look(tally.done):
            tally.leave_out(precise(tally.result(), tolerance))
            if not len(tally.active):
                return
        # Layers in front of the first random one are computed here: all of a deterministic network.
        started = time.perf_counter()
        of_rest = blocks()
        tally.seconds += time.perf_counter() - started
        # Posteriors with stored draws have none behind the last.
        last = (tally.num_samples - 1) // of_rest.size
        for first, new in schedule(tally.done, tally.num_samples, of_rest.size, ranks.size, tolerance is not None):
            started = time.perf_counter()
            logits = of_rest.logits(min(first + ranks.rank, last), 1.0).float()
            if not logits.is_cpu:
                torch.get_device_module(logits.device).synchronize(logits.device)
            logits = ranks.gather(logits).flatten(0, 1)
            tally.seconds += time.perf_counter() - started
            tally.add(logits[new])
            yield


def draw_logits(
    net: nn.Module,
    guide: Posterior,
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
    check_num_draws(guide, num_samples)
    prepared = prepared_network(net, guide, x, method, sampling, norm_inputs)
    blocks = drawn_blocks(net, guide, x, seed, prepared, sampling, batch_size)
    for first in range(0, num_samples, blocks.size):
        yield from blocks.logits(first // blocks.size, 1.0)[: num_samples - first]


def _without_draws(
    net: nn.Module, guide: Posterior, x: Tensor, y: Tensor, kept: Tensor, likelihood: Likelihood
) -> Predictive:
    if not isinstance(likelihood, Categorical):
        raise UserError(f"method moments is for class labels, not {type(likelihood).__name__}; use method draws")
    started = time.perf_counter()
    mean, entropy = (part.cpu().double() for part in moment_predictive(net, guide, x))
    seconds = time.perf_counter() - started
    labels = y.cpu()
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


def _check(
    guide: Posterior, num_samples: int, method: str, sampling: str, tolerance: float | None, compact: str
) -> None:
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    check_draws(guide, num_samples, sampling, compact)
    if tolerance is not None and not 0 < tolerance < 1:
        raise UserError(f"tolerance must be above 0 and below 1, got {tolerance}")
    if tolerance is not None and sampling == "sobol":
        raise UserError(
            "a tolerance needs independent draws to estimate the error, and Sobol points are not independent; "
            "use sampling antithetic with it"
        )
