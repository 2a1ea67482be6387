"""ppl_bnn: Bayesian neural networks as Pyro models -- trained, predicted with, and pruned.

Six ideas: a *model* (`Model` or `Classifier` around a network from `build` or `bayesian`), its *likelihood*
(`Categorical`, `Normal`), a *posterior* (`MeanFieldNormal`, the guide), an *estimator* (how a training step uses the
random weights), *draws* (`predict`), and *InferenceData* (`to_inference_data`).

Each folder is a room, whose docstring says what it may import. The modules beside the rooms are commands and the
ground: errors, files, metrics and the like, which every room may import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ppl_bnn.version import __version__

if TYPE_CHECKING:
    from ppl_bnn.data import Examples, Images, Table, as_examples, load, normalize
    from ppl_bnn.errors import UserError
    from ppl_bnn.experiment.open_run import Run, open_run
    from ppl_bnn.guides import (
        Flipout,
        GroupedFlips,
        LocalReparameterization,
        MeanFieldNormal,
        StoredPosterior,
        as_posterior,
    )
    from ppl_bnn.guides.posterior import Posterior
    from ppl_bnn.inference.callbacks import Callback
    from ppl_bnn.inference.checkpoint import load_checkpoint
    from ppl_bnn.inference.elbo import KLScaledELBO, kl_by_site
    from ppl_bnn.inference.ivon import IVON
    from ppl_bnn.inference.loggers import Logger
    from ppl_bnn.inference.posterior_file import load_posterior, save_posterior
    from ppl_bnn.inference.schedules import kl_schedule
    from ppl_bnn.inference.svi import fit
    from ppl_bnn.inference.training_step import TrainingStep
    from ppl_bnn.models import (
        Classifier,
        GaussianScaleMixture,
        Model,
        ard,
        bayesian,
        build,
        hierarchical,
        horseshoe,
        learnt_normal,
        pretrained_prior,
    )
    from ppl_bnn.models.likelihoods import (
        Bernoulli,
        Categorical,
        Likelihood,
        NegativeBinomial,
        Normal,
        Poisson,
        StudentT,
    )
    from ppl_bnn.prediction.conformal import conformal_interval, conformal_sets
    from ppl_bnn.prediction.predictive import predict
    from ppl_bnn.prediction.predictor import predictor
    from ppl_bnn.prediction.result import Predictive
    from ppl_bnn.pruning import prune, snr
    from ppl_bnn.pruning.sweep import sweep
    from ppl_bnn.results.figures.choice import draw_figures
    from ppl_bnn.results.predictive import to_inference_data
    from ppl_bnn.results.pruning import sweep_to_inference_data

# The imports above, made when a name is first used: `import ppl_bnn` loads no torch, and training loads no ArviZ.
_HOMES = {
    "ppl_bnn.data": ("Examples", "Images", "Table", "as_examples", "load", "normalize"),
    "ppl_bnn.errors": ("UserError",),
    "ppl_bnn.experiment.open_run": ("Run", "open_run"),
    "ppl_bnn.guides": (
        "Flipout",
        "GroupedFlips",
        "LocalReparameterization",
        "MeanFieldNormal",
        "StoredPosterior",
        "as_posterior",
    ),
    "ppl_bnn.guides.posterior": ("Posterior",),
    "ppl_bnn.inference.callbacks": ("Callback",),
    "ppl_bnn.inference.checkpoint": ("load_checkpoint",),
    "ppl_bnn.inference.elbo": ("KLScaledELBO", "kl_by_site"),
    "ppl_bnn.inference.ivon": ("IVON",),
    "ppl_bnn.inference.loggers": ("Logger",),
    "ppl_bnn.inference.posterior_file": ("load_posterior", "save_posterior"),
    "ppl_bnn.inference.schedules": ("kl_schedule",),
    "ppl_bnn.inference.svi": ("fit",),
    "ppl_bnn.inference.training_step": ("TrainingStep",),
    "ppl_bnn.models": (
        "Classifier",
        "GaussianScaleMixture",
        "Model",
        "ard",
        "bayesian",
        "build",
        "hierarchical",
        "horseshoe",
        "learnt_normal",
        "pretrained_prior",
    ),
    "ppl_bnn.models.likelihoods": (
        "Bernoulli",
        "Categorical",
        "Likelihood",
        "NegativeBinomial",
        "Normal",
        "Poisson",
        "StudentT",
    ),
    "ppl_bnn.prediction.conformal": ("conformal_interval", "conformal_sets"),
    "ppl_bnn.prediction.predictive": ("predict",),
    "ppl_bnn.prediction.predictor": ("predictor",),
    "ppl_bnn.prediction.result": ("Predictive",),
    "ppl_bnn.pruning": ("prune", "snr"),
    "ppl_bnn.pruning.sweep": ("sweep",),
    "ppl_bnn.results.figures.choice": ("draw_figures",),
    "ppl_bnn.results.predictive": ("to_inference_data",),
    "ppl_bnn.results.pruning": ("sweep_to_inference_data",),
}

__all__ = [
    "IVON",
    "Bernoulli",
    "Callback",
    "Categorical",
    "Classifier",
    "Examples",
    "Flipout",
    "GaussianScaleMixture",
    "GroupedFlips",
    "Images",
    "KLScaledELBO",
    "Likelihood",
    "LocalReparameterization",
    "Logger",
    "MeanFieldNormal",
    "Model",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "Posterior",
    "Predictive",
    "Run",
    "StoredPosterior",
    "StudentT",
    "Table",
    "TrainingStep",
    "UserError",
    "__version__",
    "ard",
    "as_examples",
    "as_posterior",
    "bayesian",
    "build",
    "conformal_interval",
    "conformal_sets",
    "draw_figures",
    "fit",
    "hierarchical",
    "horseshoe",
    "kl_by_site",
    "kl_schedule",
    "learnt_normal",
    "load",
    "load_checkpoint",
    "load_posterior",
    "normalize",
    "open_run",
    "predict",
    "predictor",
    "pretrained_prior",
    "prune",
    "save_posterior",
    "snr",
    "sweep",
    "sweep_to_inference_data",
    "to_inference_data",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = getattr(import_module(module), name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
