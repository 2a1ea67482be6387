"""ppl_bnn: Bayesian neural networks as Pyro models -- trained, predicted with, and pruned.

Five ideas: a *model* (`Classifier` around a network from `build` or `bayesian`), a *guide* (`MeanFieldNormal`), an
*estimator* (how a training step uses the random weights), *draws* (`predict`), and *InferenceData*
(`to_inference_data`).
"""

import os

# GNU OpenMP, which `import torch` loads, reads this once. Its threads look 300,000 times for each other before they
# sleep: on a core that other work wants too, that wait takes the time slice the awaited thread would need.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "3000"

from ppl_bnn.data import Images, load
from ppl_bnn.guides import Flipout, GroupedFlips, LocalReparameterization, MeanFieldNormal
from ppl_bnn.inference.elbo import KLScaledELBO, kl_by_site, kl_schedule
from ppl_bnn.inference.ivon import IVON
from ppl_bnn.inference.svi import fit
from ppl_bnn.models import Classifier, GaussianScaleMixture, bayesian, build
from ppl_bnn.prediction.predictive import predict
from ppl_bnn.prediction.predictor import predictor
from ppl_bnn.prediction.tally import Predictive
from ppl_bnn.pruning import prune, snr
from ppl_bnn.pruning.sweep import sweep
from ppl_bnn.results.predictive import to_inference_data
from ppl_bnn.results.pruning import sweep_to_inference_data
from ppl_bnn.version import __version__

__all__ = [
    "IVON",
    "Classifier",
    "Flipout",
    "GaussianScaleMixture",
    "GroupedFlips",
    "Images",
    "KLScaledELBO",
    "LocalReparameterization",
    "MeanFieldNormal",
    "Predictive",
    "__version__",
    "bayesian",
    "build",
    "fit",
    "kl_by_site",
    "kl_schedule",
    "load",
    "predict",
    "predictor",
    "prune",
    "snr",
    "sweep",
    "sweep_to_inference_data",
    "to_inference_data",
]
