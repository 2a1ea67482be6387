"""p(y | network outputs): the protocol, and the likelihoods that come with the library."""

from ppl_bnn.models.likelihoods.base import Averages, DrawStatistics, Likelihood, Summary
from ppl_bnn.models.likelihoods.classes import Categorical
from ppl_bnn.models.likelihoods.numbers import Normal

__all__ = ["Averages", "Categorical", "DrawStatistics", "Likelihood", "Normal", "Summary"]
