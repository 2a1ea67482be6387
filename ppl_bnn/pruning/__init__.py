"""Pruning of a trained posterior: what weights are worth, which go, and what is left."""

from ppl_bnn.pruning.criteria import scores
from ppl_bnn.pruning.finetune import finetune
from ppl_bnn.pruning.prune import Pruned, prune
from ppl_bnn.pruning.snr import snr, snr_histogram

__all__ = ["Pruned", "finetune", "prune", "scores", "snr", "snr_histogram"]
