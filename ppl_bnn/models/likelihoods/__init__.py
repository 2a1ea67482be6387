"""p(y | network outputs): the protocol, and the likelihoods that come with the library."""

from ppl_bnn.models.likelihoods.base import Averages, DrawStatistics, Likelihood, Summary
from ppl_bnn.models.likelihoods.classes import Bernoulli, Categorical
from ppl_bnn.models.likelihoods.counts import NegativeBinomial, Poisson
from ppl_bnn.models.likelihoods.numbers import Normal, StudentT

__all__ = [
    "Averages",
    "Bernoulli",
    "Categorical",
    "DrawStatistics",
    "Likelihood",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "StudentT",
    "Summary",
]
