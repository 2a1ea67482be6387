"""The posterior predictive: by Monte Carlo, p(y | x) = (1/S) sum_s p(y | x, draw s), or by moments without a draw."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ppl_bnn.distributed import Alone, Communicator
from ppl_bnn.errors import Interrupted, UserError, WorkerLost
from ppl_bnn.guides.posterior import Posterior, Symmetric, check_num_draws, offered
from ppl_bnn.guides.pyro_guide import as_posterior
from ppl_bnn.inputs import Inputs, count
from ppl_bnn.models.example_weights import Weights, example_weights
from ppl_bnn.models.likelihoods import Likelihood
from ppl_bnn.prediction.chunks import Chunk, chunks_of, whole_or_examples
from ppl_bnn.prediction.door import check_inputs, check_prediction, checked_y
from ppl_bnn.prediction.drawing import Drawing
from ppl_bnn.prediction.kept import what_is_kept
from ppl_bnn.prediction.methods import METHODS, SAMPLINGS, Prepared, check_draws, drawn_blocks, prepared_network
from ppl_bnn.prediction.observed_site import observed_values
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.prediction.running import Target, parameter_of
from ppl_bnn.prediction.so_far import check_so_far, go_on_from, narrowed
from ppl_bnn.prediction.tally import Tally
from ppl_bnn.prediction.without_draws import without_draws

__all__ = ["METHODS", "SAMPLINGS", "Predictive", "draw_outputs", "predict"]


@torch.no_grad()
def predict(
    model: Callable[..., Any],
    posterior: Posterior | Callable[..., Any],
    x: Any,
    y: object = None,
    *,
    site: str | None = None,
    weights: Weights | None = None,
    num_samples: int = 400,
    seed: int = 0,
    method: str = "auto",
    sampling: str = "independent",
    tolerance: float | None = None,
    compact: str = "auto",
    batch_size: int | None = None,
    norm_inputs: Inputs | None = None,
    keep: Tensor | None = None,
    log_likelihood: bool | None = None,
    progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
    communicator: Communicator | None = None,
    so_far: Predictive | None = None,
    save: Callable[[Predictive], None] | None = None,
    save_seconds: float = 60.0,
) -> Predictive:
    """Draw S networks from the posterior and predict every example with each.

    Draws depend on (seed, draw index) alone, so they are the same in any order, on any number of ranks, and whether
    asked for at once or added to. Memory beside the stored output (the kept draws and the log likelihood [S, N]) does
    not depend on S.

    Data that are not tensors in memory are predicted in chunks (`ppl_bnn.prediction.chunks`): each example is read
    once, all draws of a chunk are made, and the next chunk is read meanwhile. Memory beside the result is that of two
    chunks, whatever N is. The method `draws` gives what it gives for tensors. Of numbers, the drawn y of several chunks
    have other noise than those of tensors. With `layerwise`, each chunk has random numbers of its own.

    Args:
        model: a `Model` (or `Classifier`), whose likelihood summarizes the draws; a network of class logits, [B, ...]
            -> [B, C]; or a Pyro model of your own, called as model(x) or model(x, y), whose observed site lies in a
            data plate. Draws of the last run by Pyro, several times slower.
        posterior: its posterior, pruned or not: a `MeanFieldNormal`, any `ppl_bnn.guides.posterior.Posterior`, or a
            Pyro guide (`as_posterior`). A posterior without sites (a deterministic network) gives S equal draws.
        x: inputs [N, ...]; for a network with several inputs a tuple or dict of tensors; or other data, with or without
            labels: whatever `as_examples` takes. Without `y`, the last of a tuple and the ``y`` of a dict are labels; a
            tuple of as many tensors as the network cannot be called without has none.
        y: observed values [N, ...] (a tensor, or a numpy array), as the likelihood takes them; only needed for scores
            and the log likelihood.
        site: which observed site of a Pyro model of your own, where it has several.
        weights: [N], as of `fit`: example i's log likelihoods are multiplied by weights[i], and so enter the NLL and
            leave-one-out cross-validation. Other scores do not know them.
        num_samples: S; the most, where there is a tolerance.
        method: ``draws``, ``layerwise``, ``moments`` (modules of those names in `ppl_bnn.prediction`; the last is an
            approximation without draws, its result has one row instead of S) or ``auto``: layerwise where that needs
            fewer random numbers than draws, which is for few examples of a network whose weights are all in dense
            layers; draws for several chunks. layerwise and moments need a posterior with `loc_scale`; without one
            ``auto`` is draws.
        sampling: ``independent``, ``antithetic``: draw 2k uses the noise of independent draw k, 2k + 1 its negative, or
            ``sobol``, for layerwise alone: draw k uses point k of a randomized quasi-random sequence (Sobol's).
            Antithetic draws of weights need a posterior with `noise`.
        tolerance: leave an example out of further draws once its mean (each of its probabilities) is known to within
            this, in units of y (`ppl_bnn.prediction.stopping`).
        compact: whether draws of a pruned posterior are computed in its smaller network, with the same weights:
            ``yes``, ``no``, or ``auto``: where counts of operations say that it pays (`prediction.compact.forms`).
            Results differ by rounding; the result records what was used.
        batch_size: examples a forward pass.
        norm_inputs: training inputs [K, ...], a thousand, say: each draw's batch norm has its own statistics of them
            instead of the running averages, for K examples more a draw. For the method `draws` alone.
        keep: positions [K] of the examples whose means (probabilities) and y are kept for every draw. Quantiles of y of
            all examples then come from a sketch (`QuantileSketch`), 1 KiB an element of y. Unless given, all are kept;
            of data that are not tensors in memory the first 1000, without a sketch above 1 GiB, where all are more than
            1 GiB.
        log_likelihood: keep log p(y_i | draw s) of every draw, [S, N]. False keeps their sum alone, enough for the NLL.
            Unless given, they are kept; of data that are not tensors in memory up to 1 GiB.
        communicator: ranks to share the draws out among, called by all of them alike; all get the result, but only
            rank 0 the kept draws. Each rank reads all of the data.
        so_far: the result of fewer draws, or of the first of these examples, made in the same way: only the rest is
            read and drawn. Rank 0's counts.
        save: called on rank 0 with the result so far, when stopped, when the data cannot be read any further, and every
            `save_seconds` at most. Of several chunks it has the examples of the chunks that have draws.

    Raises:
        UserError: before the first draw: S < 1, odd for antithetic draws, or above the posterior's number of draws; x
            that is no finite tensor; y that the likelihood cannot give; a posterior of other sites than the model's, or
            with values that are not finite; an observed site that is missing; a method, sampling or compact that
            network and posterior do not allow;
            `norm_inputs` for a network without batch norm; `keep` that is no positions; `so_far` made otherwise.
        Interrupted: `should_stop` said so on some rank.
    """
    ranks, like = communicator or Alone(), parameter_of(model, posterior)
    data = whole_or_examples(model, x, y, like)
    total = data.end if isinstance(data, Chunk) else len(data)
    start = 0 if isinstance(data, Chunk) else _unfinished(so_far, num_samples, ranks) % total
    with chunks_of(data, like, start=start, batch_size=batch_size) as chunks:
        one = next(chunks)
        posterior = _as_posterior(posterior, one, model)
        _check(posterior, num_samples, method, sampling, compact)
        target = check_prediction(model, posterior, one.x, one.y, seed=seed, site=site)
        if target.site is not None:
            method = _by_pyro(posterior, method, sampling, compact, norm_inputs)
        targets = _observed(target, posterior, one, seed)
        weighted = None if weights is None else example_weights(weights, total)
        _check_tolerance(tolerance, sampling, target.likelihood)
        started, several = time.perf_counter(), count(one.x) < total
        if method == "auto" and (compact == "yes" or (several and sampling != "sobol")):
            method = "draws"
        prepared = Prepared(None, "draws")
        if target.site is None:
            prepared = prepared_network(target.net, posterior, one.x, method, sampling, norm_inputs)
            prepared = prepared.with_compact(posterior, one.x, batch_size, compact)
        in_memory, draws = isinstance(data, Chunk), 1 if prepared.method == "moments" else num_samples
        kept, log_likelihood, sketched = what_is_kept(target, draws, total, keep, log_likelihood, in_memory)
        if so_far is not None:
            so_far = narrowed(so_far, kept, log_likelihood, sketched)
            check_so_far(
                so_far, num_samples, total, targets, kept, prepared.method, sampling, prepared.small is not None,
                weighted, log_likelihood,
            )  # fmt: skip
        checked = chain([(one, targets)], ((chunk, _observed(target, posterior, chunk, seed)) for chunk in chunks))
        if prepared.method == "moments":
            if weighted is not None:
                raise UserError("the method moments does not take weights; use the method draws")
            return without_draws(target, posterior, checked, kept, seed=seed)
        tally = Tally(
            num_samples, kept if ranks.is_main else kept[:0], total, targets, target, sampling=sampling,
            method=prepared.method, compact=prepared.small is not None, seed=seed, log_likelihood=log_likelihood,
            sketched=sketched,
        )  # fmt: skip
        tally.weights = weighted
        # Not the first chunk for as long as the others.
        del one, targets
        go_on_from(tally, so_far, ranks)
        tally.seconds += time.perf_counter() - started
        drawing = Drawing(target, posterior, prepared, seed, sampling, tolerance, batch_size, ranks)
        _draw(drawing, checked, tally, several, progress, should_stop, save, save_seconds)
    return tally.final()


def _draw(
    drawing: Drawing, chunks: Iterable[tuple[Chunk, Tensor | None]], tally: Tally, several: bool, progress: bool,
    should_stop: Callable[[], bool], save: Callable[[Predictive], None] | None, save_seconds: float,
) -> None:  # fmt: skip
    """Draw chunk after chunk, with a progress bar; save and stop in between."""
    ranks, samples, total = drawing.ranks, tally.num_samples, len(tally.draws)
    bar = tqdm(
        total=total if several else samples, unit="example" if several else "draw", unit_scale=several,
        disable=not progress, dynamic_ncols=True,
    )  # fmt: skip
    saved, saving = time.perf_counter(), 0.0
    with bar:
        for chunk, y in _saved_if_refused(chunks, tally, save if ranks.is_main else None):
            tally.begin(chunk.first, chunk.end, y)
            for _ in drawing.of(chunk, tally):
                share = (chunk.end - chunk.first) * tally.done / samples
                bar.update((chunk.first + share if several else tally.done) - bar.n)
                stop = ranks.any(should_stop()) and (tally.done < samples or chunk.end < total)
                now = time.perf_counter()
                # Saving takes at most a twentieth of the time.
                if save and ranks.is_main and (stop or now - saved > max(save_seconds, 20 * saving)):
                    save(tally.result())
                    saved, saving = time.perf_counter(), time.perf_counter() - now
                if stop:
                    # As in training: no rank ends while rank 0 is writing.
                    ranks.barrier()
                    of = f" of the examples {chunk.first} to {chunk.end - 1} of {total}" if several else ""
                    raise Interrupted(f"stopped after draw {tally.done} of {samples}{of}")


def _saved_if_refused(
    chunks: Iterable[tuple[Chunk, Tensor | None]], tally: Tally, save: Callable[[Predictive], None] | None
) -> Iterator[tuple[Chunk, Tensor | None]]:
    """The chunks; where the data cannot be read any further, what was drawn so far is saved first."""
    try:
        yield from chunks
    except (UserError, WorkerLost):
        if save is not None and tally.end:
            save(tally.result())
        raise


def _unfinished(so_far: Predictive | None, num_samples: int, ranks: Communicator) -> int:
    """The first example that lacks draws in an earlier result: rank 0's."""
    if so_far is None:
        return int(ranks.share([0])[0])
    short = (so_far.draws < num_samples).nonzero()
    return int(ranks.share([int(short[0]) if len(short) else len(so_far.draws)])[0])


def _observed(target: Target, posterior: Posterior, chunk: Chunk, seed: int) -> Tensor | None:
    """What was observed of a chunk, as the likelihood takes it, once its inputs are found to be finite."""
    check_inputs(chunk.x, first=chunk.first)
    y = chunk.y
    try:
        if target.site is not None and y is not None:
            y = observed_values(target, posterior, chunk.x, y, seed=seed)
        return checked_y(y, chunk.x, target)
    except UserError as error:
        if not chunk.first:
            raise
        raise UserError(f"of the examples {chunk.first} to {chunk.end - 1}, numbered from 0: {error}") from None


def _as_posterior(posterior: Any, one: Chunk, model: Callable[..., Any]) -> Posterior:
    check_inputs(one.x)
    if isinstance(posterior, Posterior):
        return posterior
    if not isinstance(one.x, Tensor):
        raise UserError("a Pyro guide is predicted with one input tensor; for several inputs use MeanFieldNormal")
    return as_posterior(posterior, one.x[:2], None if one.y is None else torch.as_tensor(one.y)[:2], model=model)


def draw_outputs(
    net: nn.Module,
    guide: Posterior,
    x: Inputs,
    *,
    num_samples: int,
    seed: int = 0,
    batch_size: int | None = None,
    method: str = "draws",
    sampling: str = "independent",
    norm_inputs: Inputs | None = None,
) -> Iterator[Tensor]:
    """Yield the outputs [N, *] of draw 0, 1, ... S - 1, each the same whichever draws are asked for."""
    check_num_draws(guide, num_samples)
    prepared = prepared_network(net, guide, x, method, sampling, norm_inputs)
    blocks = drawn_blocks(net, guide, x, seed, prepared, sampling, batch_size)
    for first in range(0, num_samples, blocks.size):
        yield from blocks.logits(first // blocks.size, 1.0)[: num_samples - first]


def _check(posterior: Posterior, num_samples: int, method: str, sampling: str, compact: str) -> None:
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    check_draws(posterior, num_samples, sampling, compact)


def _check_tolerance(tolerance: float | None, sampling: str, likelihood: Likelihood) -> None:
    if tolerance is None:
        return
    # Probabilities are at most 1 apart; numbers may be anywhere.
    most = math.inf if likelihood.drawn else 1
    if not 0 < tolerance < most:
        limits = "above 0 and finite" if likelihood.drawn else "above 0 and below 1"
        raise UserError(f"tolerance must be {limits}, got {tolerance}")
    if sampling == "sobol":
        raise UserError(
            "a tolerance needs independent draws to estimate the error, and Sobol points are not independent; "
            "use sampling antithetic with it"
        )


def _by_pyro(posterior: Posterior, method: str, sampling: str, compact: str, norm_inputs: Inputs | None) -> str:
    """The method of a Pyro model of the user's own: whole draws."""
    if method not in ("auto", "draws") or sampling == "sobol":
        raise UserError(
            f"a Pyro model of your own is predicted by whole draws: use method draws and sampling independent, got "
            f"method {method} and sampling {sampling}"
        )
    if compact == "yes" or norm_inputs is not None:
        raise UserError("compact 'yes' and norm_inputs are for a Model or a network, not a Pyro model of your own")
    if sampling == "antithetic":
        offered(posterior, Symmetric, "sampling antithetic", "use sampling independent")
    return "draws"
