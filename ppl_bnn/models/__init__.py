"""p(y, w | x): networks, their random parameters, priors and the likelihood.

May import: distributed, native, the ground.
"""

from ppl_bnn.models.conversion import bayesian
from ppl_bnn.models.cross_entropy import cross_entropy_operation
from ppl_bnn.models.model import Classifier, Model
from ppl_bnn.models.named_priors import ard, hierarchical, horseshoe, learnt_normal, pretrained_prior
from ppl_bnn.models.networks import NETWORKS, build
from ppl_bnn.models.prior_parsing import parse_prior
from ppl_bnn.models.priors import GaussianScaleMixture
from ppl_bnn.models.site_priors import site_priors
from ppl_bnn.models.summary import layer_table, network_table, render_table, totals

__all__ = [
    "NETWORKS",
    "Classifier",
    "GaussianScaleMixture",
    "Model",
    "ard",
    "bayesian",
    "build",
    "cross_entropy_operation",
    "hierarchical",
    "horseshoe",
    "layer_table",
    "learnt_normal",
    "network_table",
    "parse_prior",
    "pretrained_prior",
    "render_table",
    "site_priors",
    "totals",
]
