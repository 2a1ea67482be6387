"""Every estimator has the expected NLL of the plain draw, on tokens, images and a weight that is used twice."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ppl_bnn import Classifier, KLScaledELBO, MeanFieldNormal, bayesian
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.guides.estimators import Estimator
from ppl_bnn.inference.door import check_training

N, STEPS = 8, 600


class Tokens(nn.Module):
    """Embedding, attention of plain draws, and layers on [N, T, features]."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(self.hidden(x).tanh().mean(1))


class Tied(nn.Module):
    """A weight that embeds tokens and reads them out, and one that is applied twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.hidden(self.hidden(self.embed(x).mean(1)).tanh())
        return F.linear(x, self.embed.weight)


IMAGES = nn.Sequential(
    nn.Conv2d(1, 3, 3),
    nn.Tanh(),
    nn.ConvTranspose2d(3, 2, 2, stride=2),
    nn.AvgPool2d(2),
    nn.Flatten(),
    nn.Linear(32, 3),
)
TOKENS = torch.randint(0, 7, (N, 5), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(N, 1, 6, 6, generator=torch.Generator().manual_seed(0))
CASES = {"tokens": (Tokens, TOKENS), "tied": (Tied, TOKENS), "images": (lambda: IMAGES, PIXELS)}


def fitted(case):
    """Model, guide, inputs, labels, and the sites that have the plain draw."""
    make, x = CASES[case]
    torch.manual_seed(0)
    y = torch.arange(N) % 3
    model = Classifier(bayesian(make()), N)
    guide = MeanFieldNormal(model, x[:1], y[:1], init_loc=0.5, init_scale=0.4, init_jitter=0.3)
    return model, guide, x, y, check_training(model, guide, x, y, batch_size=N, with_uses=True).plain_sites


def nlls(model, guide, x, y, plain_sites, estimator, steps=STEPS):
    elbo, found = KLScaledELBO(N), []
    torch.manual_seed(1)
    with torch.no_grad(), ESTIMATORS[estimator]() as handler:
        if isinstance(handler, Estimator):
            handler.plain_sites = plain_sites
        for _ in range(steps):
            elbo.loss(model, guide, x, y)
            found.append(elbo.terms.nll)
    return torch.tensor(found, dtype=torch.double)


@pytest.mark.parametrize("case", CASES)
def test_estimators_have_the_expected_nll_of_the_plain_draw(case):
    case = fitted(case)
    plain = nlls(*case, "plain")
    for estimator in ("flipout", "groups"):
        other = nlls(*case, estimator)
        error = ((plain.var() + other.var()) / STEPS).sqrt()
        assert abs(other.mean() - plain.mean()) < 3 * error, estimator
        # Less is left to chance, so that the test could fail.
        assert other.std() < 1.1 * plain.std()


def test_local_is_biased_over_tokens_and_says_so(caplog):
    nlls(*fitted("tokens"), "local", steps=2)
    assert "local is biased for layer hidden" in caplog.text
