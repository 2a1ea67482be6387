"""q(w): a distribution over a network's random weights that can be drawn by number, and the estimators that train it.

May import: models, native, the ground.
"""

from ppl_bnn.guides.estimators import ESTIMATORS, Flipout, GroupedFlips, LocalReparameterization
from ppl_bnn.guides.mean_field import MeanFieldNormal
from ppl_bnn.guides.posterior import median_latents
from ppl_bnn.guides.pyro_guide import PyroGuide, as_posterior
from ppl_bnn.guides.stored import StoredPosterior

__all__ = [
    "ESTIMATORS",
    "Flipout",
    "GroupedFlips",
    "LocalReparameterization",
    "MeanFieldNormal",
    "PyroGuide",
    "StoredPosterior",
    "as_posterior",
    "median_latents",
]
