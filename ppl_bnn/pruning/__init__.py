"""Posterior -> smaller posterior, and what it costs: which weights go, and the sweep over how many.

May import: inference, prediction, data, guides, models, distributed, native, the ground.
"""

from ppl_bnn.pruning.criteria import scores
from ppl_bnn.pruning.finetuning import finetune
from ppl_bnn.pruning.masks import Pruned, prune
from ppl_bnn.pruning.ratios import snr, snr_histogram

__all__ = ["Pruned", "finetune", "prune", "scores", "snr", "snr_histogram"]
