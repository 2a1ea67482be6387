"""The pruning study: the same predictive again at every level of pruning."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ppl_bnn.guides.mean_field import MeanFieldNormal
from ppl_bnn.predictive import Predictive, predict
from ppl_bnn.pruning.prune import Pruned, prune


@dataclass(frozen=True)
class Level:
    """One level of a sweep: what was pruned, and the predictive of what is left."""

    pruned: Pruned
    predictive: Predictive


def sweep(
    net: nn.Module,
    guide: MeanFieldNormal,
    x: Tensor,
    y: Tensor,
    *,
    thresholds: Sequence[float] = (10.0,),
    fractions: Sequence[float] = (),
    scope: str = "global",
    num_samples: int = 200,
    seed: int = 0,
    keep: Tensor | None = None,
    progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Level]:
    """Prune at every threshold and target fraction and predict again; levels come in order of pruned fraction.

    Every level uses the same random numbers, so differences between levels are not Monte Carlo noise of the draws.

    Args:
        keep: positions [K] of the examples whose single draws are kept (`ppl_bnn.predictive.predict`).

    Raises:
        ValueError: no level, or one out of range; before any prediction is made.
        Interrupted: `should_stop` said so.
    """
    levels = [prune(guide, threshold=threshold) for threshold in thresholds]
    levels += [prune(guide, fraction=fraction, scope=scope) for fraction in fractions]
    if not levels:
        raise ValueError("a pruning sweep needs at least one threshold or fraction")
    levels.sort(key=lambda level: level.fraction)
    return [
        Level(
            level,
            predict(
                net,
                level.guide,
                x,
                y,
                num_samples=num_samples,
                seed=seed,
                method="draws",
                keep=keep,
                progress=progress,
                should_stop=should_stop,
            ),
        )
        for level in levels
    ]
