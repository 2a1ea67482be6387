"""The posterior predictive: by Monte Carlo, p(y | x) = (1/S) sum_s p(y | x, draw s), or by moments without a draw."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ppl_bnn.distributed import Alone, Communicator
from ppl_bnn.errors import Interrupted, UserError
from ppl_bnn.guides.posterior import Posterior, Symmetric, check_num_draws, offered
from ppl_bnn.guides.pyro_guide import as_posterior
from ppl_bnn.models.example_weights import Weights, example_weights
from ppl_bnn.models.likelihoods import Likelihood
from ppl_bnn.native.normals import draw_seed
from ppl_bnn.prediction.door import check_inputs, check_prediction, checked_y, positions
from ppl_bnn.prediction.draws import Blocks
from ppl_bnn.prediction.methods import (
    METHODS,
    SAMPLINGS,
    Prepared,
    check_draws,
    drawn_blocks,
    mirrored,
    prepared_network,
)
from ppl_bnn.prediction.observed_site import observed_values, site_blocks
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.prediction.running import latents_of_draw
from ppl_bnn.prediction.stopping import is_look, precise, schedule
from ppl_bnn.prediction.tally import Tally, check_so_far
from ppl_bnn.prediction.without_draws import without_draws

__all__ = ["METHODS", "SAMPLINGS", "Predictive", "draw_outputs", "predict"]


@torch.no_grad()
def predict(
    model: Callable[..., Any],
    posterior: Posterior | Callable[..., Any],
    x: Tensor,
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
    norm_inputs: Tensor | None = None,
    keep: Tensor | None = None,
    log_likelihood: bool = True,
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

    Args:
        model: a `Model` (or `Classifier`), whose likelihood summarizes the draws; a network of class logits, [B, ...]
            -> [B, C]; or a Pyro model of your own, called as model(x) or model(x, y), whose observed site lies in a
            data plate. Draws of the last run by Pyro, several times slower.
        posterior: its posterior, pruned or not: a `MeanFieldNormal`, any `ppl_bnn.guides.posterior.Posterior`, or a
            Pyro guide (`as_posterior`). A posterior without sites (a deterministic network) gives S equal draws.
        x: inputs [N, ...].
        y: observed values [N, ...] (a tensor, or a numpy array), as the likelihood takes them; only needed for scores
            and the log likelihood.
        site: which observed site of a Pyro model of your own, where it has several.
        weights: [N], as of `fit`: example i's log likelihoods are multiplied by weights[i], and so enter the NLL and
            leave-one-out cross-validation. Other scores do not know them.
        num_samples: S; the most, where there is a tolerance.
        method: ``draws``, ``layerwise``, ``moments`` (modules of those names in `ppl_bnn.prediction`; the last is an
            approximation without draws, its result has one row instead of S) or ``auto``: layerwise where that needs
            fewer random numbers than draws, which is for few examples of a network whose weights are all in dense
            layers. layerwise and moments need a posterior with `loc_scale`; without one ``auto`` is draws.
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
        keep: positions [K] of the examples whose means (probabilities) and y are kept for every draw; all of them
            unless given. Quantiles of y of all examples then come from a sketch (`QuantileSketch`).
        log_likelihood: keep log p(y_i | draw s) of every draw, [S, N]. False keeps their sum alone, enough for the NLL.
        communicator: ranks to share the draws out among, called by all of them alike; all get the result, but only
            rank 0 the kept draws.
        so_far: the result of fewer draws made in the same way: only the rest is drawn. Rank 0's counts.
        save: called on rank 0 with the result so far, when stopped and every `save_seconds` at most.

    Raises:
        UserError: before the first draw: S < 1, odd for antithetic draws, or above the posterior's number of draws; x
            that is no finite tensor; y that the likelihood cannot give; a posterior of other sites than the model's, or
            with values that are not finite; an observed site that is missing; a method, sampling or compact that
            network and posterior do not allow;
            `norm_inputs` for a network without batch norm; `keep` that is no positions; `so_far` made otherwise.
        Interrupted: `should_stop` said so on some rank.
    """
    if not isinstance(posterior, Posterior):
        check_inputs(x)
        posterior = as_posterior(posterior, x[:2], None if y is None else torch.as_tensor(y)[:2], model=model)
    _check(posterior, num_samples, method, sampling, compact)
    target, given = check_prediction(model, posterior, x, y, seed=seed, site=site), y
    if target.site is not None:
        method = _by_pyro(posterior, method, sampling, compact, norm_inputs)
        y = observed_values(target, posterior, x, y, seed=seed) if y is not None else None
    targets, weighted = checked_y(y, x, target), None if weights is None else example_weights(weights, len(x))
    _check_tolerance(tolerance, sampling, target.likelihood)
    ranks, started = communicator or Alone(), time.perf_counter()
    if compact == "yes" and method == "auto":
        method = "draws"
    kept = positions(keep, len(x))
    prepared = Prepared(None, "draws")
    if target.site is None:
        prepared = prepared_network(target.net, posterior, x, method, sampling, norm_inputs)
        prepared = prepared.with_compact(posterior, x, batch_size, compact)
    if so_far is not None:
        check_so_far(
            so_far, num_samples, targets, kept, prepared.method, sampling, prepared.small is not None, weighted
        )
    if prepared.method == "moments":
        if weighted is not None:
            raise UserError("the method moments does not take weights; use the method draws")
        return without_draws(target, posterior, x, targets, kept, seed=seed)
    tally = Tally(
        num_samples, kept if ranks.is_main else kept[:0], len(x), targets, target, sampling=sampling,
        method=prepared.method, compact=prepared.small is not None, seed=seed, log_likelihood=log_likelihood,
        sketched=len(kept) < len(x),
    )  # fmt: skip
    tally.weights = weighted
    tally.go_on_from(so_far, ranks)
    tally.seconds += time.perf_counter() - started

    def blocks() -> Blocks:
        """Blocks of the examples that get further draws."""
        rest = x[tally.active.to(x.device)]
        if target.site is not None:
            some = None if given is None else torch.as_tensor(given)[tally.active]
            made = site_blocks(target, posterior, rest, some, seed=seed, batch_size=batch_size)
            return mirrored(made) if sampling == "antithetic" else made
        # Layerwise blocks of fewer examples have another size, and their numbers start anew: with the same seed some
        # would come again.
        anew = prepared.method == "layerwise" and len(rest) < len(x)
        own_seed = draw_seed(seed, len(rest)) if anew else seed
        return drawn_blocks(target.net, posterior, rest, own_seed, prepared, sampling, batch_size)

    def latents(draw: int) -> dict[str, Tensor]:
        """What the likelihood takes beside the outputs of this draw."""
        if not target.latents:
            return {}
        return latents_of_draw(target.likelihood, posterior, draw, seed=seed, sampling=sampling)

    bar = tqdm(total=num_samples, initial=tally.done, disable=not progress, unit="draw", dynamic_ncols=True)
    saved, saving = time.perf_counter(), 0.0
    with bar:
        for _ in _drawn(tally, blocks, latents, ranks, tolerance):
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


def _drawn(
    tally: Tally, blocks: Callable[[], Blocks], latents: Callable[[int], dict[str, Tensor]], ranks: Communicator,
    tolerance: float | None,
) -> Iterator[None]:  # fmt: skip
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
            outputs = of_rest.logits(min(first + ranks.rank, last), 1.0)
            outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
            if not outputs.is_cpu:
                torch.get_device_module(outputs.device).synchronize(outputs.device)
            outputs = ranks.gather(outputs).flatten(0, 1)[new]
            tally.seconds += time.perf_counter() - started
            tally.add(outputs, [latents(tally.done + at) for at in range(len(outputs))])
            yield


def draw_outputs(
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


def _by_pyro(posterior: Posterior, method: str, sampling: str, compact: str, norm_inputs: Tensor | None) -> str:
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
