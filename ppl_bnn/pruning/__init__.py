"""Pruning of a trained posterior by its signal-to-noise ratio."""

from ppl_bnn.pruning.prune import Pruned, prune
from ppl_bnn.pruning.snr import snr, snr_histogram
from ppl_bnn.pruning.sweep import Level, sweep

__all__ = ["Level", "Pruned", "prune", "snr", "snr_histogram", "sweep"]
