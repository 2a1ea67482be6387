"""The pruning study: the same predictive again at every level of pruning."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Posterior
from ppl_bnn.inputs import Inputs
from ppl_bnn.prediction.predictive import predict
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.pruning.criteria import Priors
from ppl_bnn.pruning.masks import Pruned, Threshold, prune


@dataclass(frozen=True)
class Level:
    """One level of a sweep: what was pruned, and the predictive of what is left.

    Attributes:
        model: what predicted: the model that was passed in, or the fine-tuned one.
        fraction: that was asked for; None where it was a threshold.
    """

    pruned: Pruned
    predictive: Predictive
    model: nn.Module
    fraction: float | None = None


def sweep(
    model: nn.Module,
    guide: Posterior,
    x: Any,
    y: object = None,
    *,
    thresholds: Sequence[Threshold] = (10.0,),
    fractions: Sequence[float] = (),
    scope: str = "global",
    criterion: str = "snr",
    structure: str = "weights",
    priors: Priors | None = None,
    tuned: Callable[[Pruned], tuple[nn.Module, Pruned]] | None = None,
    num_samples: int = 200,
    seed: int = 0,
    norm_inputs: Inputs | None = None,
    compact: str = "auto",
    keep: Tensor | None = None,
    progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Level]:
    """Prune at every threshold and target fraction and predict again; levels come in order of pruned fraction.

    Every level uses the same random numbers, so differences between levels are not Monte Carlo noise of the draws.

    Args:
        model: a `Model`, or a network of class logits (as in `ppl_bnn.predict`).
        x: inputs [N, ...], or other data, as in `ppl_bnn.predict`: each level reads them once.
        y: observed values [N, ...], by which each level is scored, where `x` does not have them.
        scope, criterion, structure, priors: as in `prune`.
        tuned: returns the model and posterior to predict with instead of a level that lost weights
            (`ppl_bnn.pruning.finetuning`).
        norm_inputs: training inputs whose statistics each draw's batch norm has (as in `ppl_bnn.predict`).
        compact: whether draws are computed in each level's smaller network (likewise).
        keep: positions [K] of the examples whose single draws are kept (likewise).

    Raises:
        UserError: no level, or one out of range; before any prediction is made.
        Interrupted: `should_stop` said so.
    """
    how: dict[str, Any] = {"criterion": criterion, "structure": structure, "priors": priors}
    levels: list[tuple[Pruned, float | None]]
    levels = [(prune(guide, threshold=threshold, **how), None) for threshold in thresholds]
    levels += [(prune(guide, fraction=fraction, scope=scope, **how), fraction) for fraction in fractions]
    if not levels:
        raise UserError("a pruning sweep needs at least one threshold or fraction")
    found = []
    for level, fraction in sorted(levels, key=lambda level: level[0].fraction):
        own_model, level = tuned(level) if tuned is not None and level.fraction > 0 else (model, level)
        predictive = predict(
            own_model,
            level.guide,
            x,
            y,
            num_samples=num_samples,
            seed=seed,
            method="draws",
            norm_inputs=norm_inputs,
            compact=compact,
            keep=keep,
            progress=progress,
            should_stop=should_stop,
        )
        found.append(Level(level, predictive, own_model, fraction))
    return found
