"""Posteriors run through the contract: the mean-field guide, and one written in twenty lines."""

import pytest
import torch
from posterior_conformance import check_posterior
from small_posteriors import dense
from weight_clouds import Cloud, StoredCloud

from ppl_bnn import prune
from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Factorized, Prunable, Symmetric, offered

SHAPES = {"0.weight": torch.Size((8, 5)), "2.weight": torch.Size((3, 8))}


@pytest.mark.parametrize("bayesian_bias", [False, True])
def test_the_mean_field_guide_keeps_the_contract(bayesian_bias):
    biases = {"0.bias": torch.Size((8,)), "2.bias": torch.Size((3,))} if bayesian_bias else {}
    check_posterior(dense(bayesian_bias=bayesian_bias)[1], SHAPES | biases)


def test_a_pruned_mean_field_guide_keeps_the_contract():
    check_posterior(prune(dense()[1], fraction=0.6).guide, SHAPES)


def test_twenty_lines_keep_the_contract():
    check_posterior(Cloud(SHAPES), SHAPES)


def test_stored_draws_keep_the_contract():
    check_posterior(StoredCloud(SHAPES, 10), SHAPES, seeded=False)


def test_what_a_posterior_lacks_is_named():
    cloud = Cloud(SHAPES)
    message = "method layerwise needs a posterior with loc_scale; Cloud has none: use method draws"
    with pytest.raises(UserError, match=message):
        offered(cloud, Factorized, "method layerwise", "use method draws")
    for capability in (Symmetric, Prunable):
        with pytest.raises(UserError, match="a posterior with loc_scale"):
            offered(cloud, capability, "it", "do without")
    guide = dense()[1]
    assert offered(guide, Symmetric, "it", "do without") is guide
