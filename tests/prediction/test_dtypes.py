"""Double precision as Pyro's users set it: every method predicts, with the numbers of single precision."""

import pytest
import torch
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, predict, predictor

X = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (30,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("sampling", ["independent", "antithetic", "sobol"])
@pytest.mark.parametrize("method", ["auto", "draws", "layerwise", "moments"])
def test_every_method_predicts_in_double_precision(method, sampling):
    if sampling == "sobol" and method == "draws":
        pytest.skip("refused: see test_samplings")
    net = bayesian(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))
    guide = MeanFieldNormal(Classifier(net, 30), X.double()[:1], Y[:1], init_scale=0.3)
    settings = {"num_samples": 60, "seed": 1, "sampling": sampling}
    found = predict(net, guide, X.double(), Y, method=method, progress=False, **settings)
    assert (found.probs.dtype, found.mean_probs.dtype) == (torch.float32, torch.float64)
    assert found.mean_probs.isfinite().all()
    probs, entropy = predictor(net, guide, X.double()[:2], **settings)(X.double()[:2])
    assert (probs.dtype, entropy.dtype) == (torch.float64, torch.float64)
    # Other numbers, the same posterior: within four standard errors of 60 draws.
    assert (probs - found.mean_probs[:2]).abs().max() < 4 * 0.5 / 60**0.5
