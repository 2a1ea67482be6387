"""Likelihoods as configurations write them."""

import pyro.distributions as dist
import pytest
import torch

from ppl_bnn.errors import UserError
from ppl_bnn.models import build, likelihoods
from ppl_bnn.models.likelihoods import Categorical, Likelihood, Normal
from ppl_bnn.models.likelihoods.parse import FORMS, num_outputs, parse_likelihood


class Laplace(Likelihood):
    """One of a user's own."""

    def distribution(self, outputs):
        return dist.Laplace(outputs[:, 0], 1.0)


class TwoClasses(Likelihood):
    """Softmax without options: its outputs are one a class."""

    drawn = False

    def distribution(self, outputs):
        return dist.Categorical(logits=outputs)


def no_likelihood():
    return torch.zeros(2)


def needs_an_argument(scale):
    return Normal(scale)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("normal", "learnt", None),
        ("normal()", "learnt", None),
        (" normal( 0.25 ) ", "fixed", 0.25),
        ("normal(1e-1)", "fixed", 0.1),
        ("normal(learnt)", "learnt", None),
        ("normal(predicted)", "predicted", None),
    ],
)
def test_a_normal_is_read_with_its_scale(text, kind, value):
    found = parse_likelihood(text)
    assert isinstance(found, Normal)
    assert found.noise.kind == kind
    if value is not None:
        assert float(found.noise.value) == pytest.approx(value)


def test_a_scale_may_have_a_prior():
    found = parse_likelihood("normal(log_normal(-1, 0.5))")
    assert isinstance(found.noise.prior, dist.LogNormal)
    assert (float(found.noise.prior.loc), float(found.noise.prior.scale)) == (-1.0, 0.5)


def test_the_other_families_are_found_by_name(monkeypatch):
    made = []
    for name in ("Bernoulli", "StudentT", "Poisson", "NegativeBinomial"):
        monkeypatch.setattr(likelihoods, name, lambda *values, name=name: made.append((name, values)), raising=False)
    for text in ("bernoulli", "student_t", "student_t(5, learnt)", "poisson", "negative_binomial(predicted)"):
        parse_likelihood(text)
    assert made == [
        ("Bernoulli", ()), ("StudentT", ()), ("StudentT", (5.0, "learnt")), ("Poisson", ()),
        ("NegativeBinomial", ("predicted",)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("norml", f"likelihood 'norml' is not understood; write one of {FORMS}, or the import path"),
        ("normal(", "is not understood; write one of categorical, bernoulli, normal(scale)"),
        ("normal(scale=1)", "is not understood"),
        ("__import__('os').getcwd()", "is not understood"),
        ("normal(1, 2)", "has too many arguments; write normal(scale)"),
        ("categorical(3)", "has too many arguments; write categorical"),
        ("normal(-1)", "likelihood 'normal(-1)': scale must be positive and finite, got -1"),
        ("normal(large)", "likelihood 'normal(large)': scale must be a positive number, 'learnt', 'predicted' or"),
        (
            "normal('learnt')",
            "has an argument that is no number, learnt, predicted or a prior: one of half_cauchy(scale)",
        ),
        ("normal(log_normal(0))", "has an argument that is no number"),
        ("normal(normal(0, 1))", "has an argument that is no number"),
        ("normal(log_normal(0, -1))", "has a prior out of range"),
        ("no_such_module:likelihood", "model.likelihood must be importable"),
        (f"{__name__}:no_likelihood", "must give a ppl_bnn.models.likelihoods.Likelihood, got tensor"),
        (f"{__name__}:needs_an_argument", "must be made without arguments: needs_an_argument() missing 1"),
        (3, "a likelihood is a text such as normal(0.1), got 3"),
    ],
)
def test_what_is_no_likelihood_is_refused_in_one_line(text, message):
    with pytest.raises(UserError) as error:
        parse_likelihood(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("likelihood", "classes", "count"),
    [
        (Categorical(), 10, 10),
        (Normal(), 0, 1),
        (Normal(), 10, 1),
        (Normal(0.1), 0, 1),
        (Normal("predicted"), 0, 2),
        (Normal(dist.LogNormal(0.0, 1.0)), 0, 1),
        (TwoClasses(), 3, 3),
        (parse_likelihood(f"{__name__}:Laplace"), 0, 1),
    ],
)
def test_the_network_gets_the_outputs_that_the_likelihood_needs(likelihood, classes, count):
    before = torch.random.get_rng_state()
    assert num_outputs(likelihood, classes) == count
    assert torch.equal(torch.random.get_rng_state(), before)


def test_classes_are_no_numbers():
    with pytest.raises(UserError, match="a Categorical likelihood needs class labels, and the targets are numbers"):
        num_outputs(Categorical(), 0)


def test_the_mlp_takes_any_input_and_gives_any_number_of_outputs():
    net = build("mlp", image_shape=(7,), num_outputs=2, deterministic=True)
    assert net(torch.zeros(3, 7)).shape == (3, 2)
    assert build("mlp", deterministic=True)(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert [type(layer).__name__ for layer in net] == ["Flatten", "Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert build("bnn-fc", num_outputs=2, deterministic=True)(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
