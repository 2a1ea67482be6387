"""One noise an example: the positions of an input (tokens, time) share it."""

import math

import pytest
import torch
from estimator_outputs import CONV, LINEAR, layer_and_guide, outputs
from pyro import poutine
from torch import nn

from ppl_bnn import LocalReparameterization

TOKENS = torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(7)).double()


def noise_of_the_mean_over_positions(estimator, x, draws=1500):
    """Standard deviation over draws of each output's mean over positions, [N, out], and the closed form of plain's."""
    net, guide = layer_and_guide(nn.Linear(5, 4), x)
    found = outputs(net, guide, x, estimator, draws).flatten(2, -2).mean(2).std(0)
    scale = guide.loc_scale("0.weight")[1].detach()
    mean, each = x.flatten(1, -2).mean(1), x.flatten(1, -2)
    return found, (mean.square() @ scale.T.square()).sqrt(), (each.square() @ scale.T.square()).sqrt().mean(1)


@pytest.mark.parametrize("x", [TOKENS, TOKENS.view(3, 4, 4, 5)], ids=["tokens", "grid"])
@pytest.mark.parametrize("estimator", ["plain", "groups", "flipout", "flipout-bfloat16"])
def test_one_noise_an_example_is_shared_by_its_positions(estimator, x):
    found, exact, _ = noise_of_the_mean_over_positions(estimator, x)
    # A standard deviation of 1500 draws has a relative error of 1 / sqrt(3000); bfloat16 adds a hundredth.
    assert (found / exact - 1).abs().max() < 5 / math.sqrt(3000) + 0.01 * estimator.endswith("16")


@pytest.mark.parametrize("x", [TOKENS, TOKENS.view(3, 4, 4, 5)], ids=["tokens", "grid"])
def test_local_has_correlation_one_between_positions_and_says_so(x, caplog):
    found, exact, documented = noise_of_the_mean_over_positions("local", x)
    assert (found / documented - 1).abs().max() < 5 / math.sqrt(3000)
    assert (documented > exact).all()
    assert "local is biased for layer 0, whose input is [3, " in caplog.text
    # Equal positions have equal noise: there it is right.
    found, exact, _ = noise_of_the_mean_over_positions("local", TOKENS[:, :1].expand(3, 6, 5))
    assert (found / exact - 1).abs().max() < 5 / math.sqrt(3000)


def test_local_warns_once_and_only_about_positions(caplog):
    net, guide = layer_and_guide(nn.Linear(5, 4), LINEAR[1])
    outputs(net, guide, LINEAR[1], "local", 1)
    outputs(*layer_and_guide(*CONV), CONV[1], "local", 1)
    assert not caplog.records
    with torch.no_grad(), LocalReparameterization():
        for _ in range(3):
            poutine.replay(net, trace=poutine.trace(guide).get_trace(TOKENS))(TOKENS)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("estimator", ["flipout", "local"])
def test_one_example_without_a_batch_dimension_has_the_right_variance(estimator):
    x = LINEAR[1][0]
    net, guide = layer_and_guide(nn.Linear(5, 4), x)
    scale = guide.loc_scale("0.weight")[1].detach()
    found = outputs(net, guide, x, estimator, 4000).var(0)
    assert (found / (scale.square() @ x.square()) - 1).abs().max() < 5 * math.sqrt(2 / 4000)
