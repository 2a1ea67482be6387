"""p(y, w | x): networks, their Bayesian layers, priors and the likelihood.

May import: distributed, native, the ground.
"""

from ppl_bnn.models.conversion import bayesian
from ppl_bnn.models.layers import BayesianConv2d, BayesianLinear
from ppl_bnn.models.model import Classifier, Model
from ppl_bnn.models.networks import NETWORKS, build
from ppl_bnn.models.priors import GaussianScaleMixture, parse_prior, site_priors
from ppl_bnn.models.summary import layer_table, network_table, render_table, totals

__all__ = [
    "NETWORKS",
    "BayesianConv2d",
    "BayesianLinear",
    "Classifier",
    "GaussianScaleMixture",
    "Model",
    "bayesian",
    "build",
    "layer_table",
    "network_table",
    "parse_prior",
    "render_table",
    "site_priors",
    "totals",
]
