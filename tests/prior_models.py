"""A small classifier under a prior with parameters of its own, and what these are."""

import torch
from small_training import X, Y
from torch import nn

from ppl_bnn import Classifier, bayesian
from ppl_bnn.models import site_priors


def parameter(value=0.1):
    return nn.Parameter(torch.tensor(value))


def classifier(prior):
    return Classifier(bayesian(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), prior), len(X))


def learnt_of(model):
    return {name: value for name, value in model.named_parameters() if ".weight_prior_" in name}


def scales(model):
    x = X[:1].to(model.net[0].bias.dtype)
    return [prior.base_dist.stddev.flatten()[0] for prior in site_priors(model, x, Y[:1]).values()]
