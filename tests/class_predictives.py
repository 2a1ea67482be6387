"""A predictive of class labels from its draws' probabilities, without a network."""

import torch

from ppl_bnn.prediction.result import Predictive


def of_classes(probs, labels, **others):
    """The `Predictive` of probabilities [S, N, C]; NaN where an example has no such draw. `others` are its fields."""
    draws, count = len(probs), len(labels)
    log_likelihood = probs.gather(2, labels[None, :, None].expand(draws, -1, 1)).squeeze(2).log()
    deviations = (probs.double() - probs[0].double()).square().nansum(0)
    return Predictive(
        **{
            "means": probs,
            "kept": torch.arange(count),
            "y": labels,
            "log_likelihood": log_likelihood,
            "sums": {
                "mean": probs.double().nansum(0),
                "entropy": torch.special.entr(probs).sum(-1).double().nansum(0),
                "spread": deviations,
            },
            "squares": deviations,
            "reference": probs[0].double(),
            "draws": (~probs.isnan().any(2)).sum(0),
            "draw_scores": (probs.argmax(2) == labels).float().mean(1),
            "seconds": 0.1,
            **others,
        }
    )
