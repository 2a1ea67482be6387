"""A predictive that is added to: an earlier result of fewer draws, or of the first of the examples."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppl_bnn.distributed import Communicator
from ppl_bnn.errors import UserError
from ppl_bnn.native.normals import GENERATOR
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.prediction.sketch import QuantileSketch
from ppl_bnn.prediction.tally import Tally, having


def check_so_far(
    so_far: Predictive, num_samples: int, count: int, y: Tensor | None, kept: Tensor, method: str, sampling: str,
    compact: bool, weights: Tensor | None, log_likelihood: bool,
) -> None:  # fmt: skip
    """Raise UserError for an earlier result that cannot be added to: it was made otherwise, or of other examples.

    Args:
        count: N, of which `so_far` may have the first.
        y: observed values of all N, or (as far as that tells something) of some.
    """
    if so_far.num_samples > num_samples:
        raise UserError(f"num_samples is {num_samples}, and so_far has {so_far.num_samples} draws already")
    if so_far.generator != GENERATOR:
        raise UserError(
            f"so_far was drawn by the generator {so_far.generator}, and this version draws by {GENERATOR}; the draws "
            "would not fit together: leave out so_far"
        )
    own = {"method": method, "sampling": sampling, "compact": compact}
    for name, here in own.items():
        if getattr(so_far, name) != here:
            raise UserError(f"so_far has {name} {getattr(so_far, name)!r}, and this call {here!r}: leave out so_far")
    done, before = len(so_far.draws), so_far.weights
    now = None if weights is None else weights[:done]
    if (before is None) != (now is None) or (before is not None and now is not None and not torch.equal(before, now)):
        raise UserError("so_far has other weights of the examples: leave out so_far")
    same = done <= count and (so_far.y is None) == (y is None)
    if same and y is not None and len(y) == count:
        same = torch.equal(so_far.labels, y[:done].cpu())
    if not same or not torch.equal(so_far.kept, kept[kept < done]):
        raise UserError("so_far has other labels, or keeps other examples: leave out so_far")
    if y is not None and (so_far.log_likelihood is not None) != log_likelihood:
        raise UserError("so_far has log_likelihood kept and this call has not, or the reverse: leave out so_far")


def narrowed(so_far: Predictive, kept: Tensor, log_likelihood: bool, sketched: bool) -> Predictive:
    """An earlier result of which everything was kept as one that keeps less: with more draws it would take too much."""
    done, parts = len(so_far.draws), dict[str, Any]()
    if so_far.log_likelihood is not None and not log_likelihood:
        total = torch.full((done,), -math.inf, dtype=torch.float64)
        for draw in so_far.log_likelihood.double():
            total = torch.logaddexp(total, draw.nan_to_num(-math.inf))
        parts |= {"log_likelihood": None, "log_sum": total}
    if len(so_far.kept) == done and len(wanted := kept[kept < done]) < done:
        parts |= {"means": so_far.means[:, wanted], "kept": wanted}
        if so_far.samples is not None:
            parts["samples"] = so_far.samples[:, wanted]
            if sketched:
                parts["sketch"] = sketch = QuantileSketch(so_far.samples.shape[1:], dtype=so_far.samples.dtype)
                for draws in so_far.draws.unique().tolist():
                    rows = (so_far.draws == draws).nonzero().flatten()
                    sketch.add(so_far.samples[:draws, rows], rows)
    return replace(so_far, **parts) if parts else so_far


def go_on_from(tally: Tally, before: Predictive | None, ranks: Communicator) -> None:
    """Begin with the draws of an earlier result, of all examples or the first of them: rank 0's, on every rank."""
    count = int(ranks.share([0 if before is None else len(before.draws)])[0])
    if not count:
        return
    if before is not None and ranks.is_main:
        _restore(tally, before)
    parts = [*tally.sums.values(), tally.squares, tally.reference, tally.draws]
    parts += [part for part in (tally.y, tally.log_sum) if part is not None]
    parts += [] if tally.sketch is None else tally.sketch.tensors
    parts = [part[:count] for part in parts]
    parts += [part for part in (tally.log_likelihood, tally.scores) if part is not None]
    parts.append(tally.scored)
    ranks.broadcast(parts)


def _restore(tally: Tally, before: Predictive) -> None:
    count, done, tally.seconds = len(before.draws), before.num_samples, before.seconds
    by_example = {name: getattr(tally, name) for name in ("y", "draws", "reference", "squares", "log_sum")}
    for name, own in by_example.items():
        if own is not None:
            own[:count] = getattr(before, name)
    for name, total in before.sums.items():
        tally.sums[name][:count] = total
    if tally.sketch is not None and before.sketch is not None:
        for own, saved in zip(tally.sketch.tensors, before.sketch.tensors, strict=True):
            own[:count] = saved
    if tally.log_likelihood is not None and before.log_likelihood is not None:
        tally.log_likelihood[:done, :count] = before.log_likelihood
    if tally.scores is not None and before.draw_scores is not None:
        tally.scored[:done] = having(before.draws, done) * before.draw_scores.isfinite()
        tally.scores[:done] = before.draw_scores.double().nan_to_num() * tally.scored[:done]
    inside = tally.kept < count
    tally.means[:done, inside] = before.means.to(tally.means.dtype)
    if tally.samples is not None and before.samples is not None:
        tally.samples[:done, inside] = before.samples.to(tally.samples.dtype)
