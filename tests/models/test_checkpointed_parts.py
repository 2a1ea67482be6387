"""Parts of a random network under torch.utils.checkpoint, which computes them again in back-propagation."""

import pytest
import torch
from converted_networks import X, Y, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

from ppl_bnn import Classifier, KLScaledELBO, MeanFieldNormal, UserError, bayesian


class Recomputed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 3), reentrant

    def forward(self, x):
        hidden = self.a(x).relu()
        return self.b(hidden) if self.reentrant is None else checkpoint(self.b, hidden, use_reentrant=self.reentrant)


@pytest.mark.parametrize("num_particles", [1, 2])
def test_activation_checkpointing_sees_the_draw_of_the_forward_pass(num_particles):
    def gradients(reentrant):
        torch.manual_seed(0)
        model = Classifier(bayesian(Recomputed(reentrant)), 12)
        guide = MeanFieldNormal(model, X, Y)
        torch.manual_seed(1)
        KLScaledELBO(12, num_particles=num_particles).loss_and_grads(model, guide, X, Y)
        assert all(isinstance(value, nn.Parameter) for value in model.parameters())
        return [value.grad for value in guide.parameters()]

    torch.testing.assert_close(gradients(False), gradients(None))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_the_reentrant_form_of_activation_checkpointing_is_refused_by_name():
    with pytest.raises(UserError, match=r"would not train the random parameter 'b.weight'.*use_reentrant=False"):
        trained(bayesian(Recomputed(True)))


def test_a_recomputation_of_the_whole_network_is_refused():
    bnn = bayesian(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)))
    with pytest.raises(UserError, match="the whole BayesianSequential runs again during back-propagation"):
        checkpoint(bnn, X, use_reentrant=False).sum().backward()
