"""A part of a network that torch.utils.checkpoint runs again in back-propagation sees the noise of the forward pass."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ppl_bnn import Classifier, KLScaledELBO, MeanFieldNormal, bayesian
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.guides.estimators import Estimator

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Parts(nn.Module):
    """A layer, dropout and a recurrent layer in two parts; the first part's layer is used again behind them."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self.layer, self.drop, self.recurrent = nn.Linear(4, 4), nn.Dropout(0.5), nn.GRUCell(4, 4)
        self.head = nn.Linear(4, 3)

    def first(self, x):
        return self.drop(self.layer(self.layer(x).relu()))

    def second(self, x):
        return self.drop(self.layer(self.recurrent(x)))

    def forward(self, x):
        return self.head(self.run(self.second, self.run(self.first, x)))


def gradients(estimator, run):
    torch.manual_seed(0)
    model = Classifier(bayesian(Parts(run)), len(X))
    guide = MeanFieldNormal(model, X, Y, init_scale=0.3)
    with ESTIMATORS[estimator]() as handler:
        if isinstance(handler, Estimator):
            handler.plain_sites = {"recurrent.weight_ih", "recurrent.weight_hh"}
        KLScaledELBO(len(X)).loss_and_grads(model, guide, X, Y)
    return [parameter.grad for part in (guide, model.net) for parameter in part.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("estimator", ["plain", "flipout", "groups", "local"])
def test_gradients_are_those_of_the_network_without_checkpoints(estimator):
    expected = gradients(estimator, lambda part, x: part(x))
    found = gradients(estimator, lambda part, x: checkpoint(part, x, use_reentrant=False))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(gradient.abs().max() > 0 for gradient in found)
