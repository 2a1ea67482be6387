"""Labels: Bernoulli, and Categorical of pixels and tokens, with class weights, ignored and soft labels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from likelihood_conformance import check_likelihood
from torch.distributions import Categorical as TorchCategorical

from ppl_bnn import metrics
from ppl_bnn.errors import UserError
from ppl_bnn.models.likelihoods import Bernoulli, Categorical, Summary

generator = torch.Generator().manual_seed(0)
LOGITS = 1.5 * torch.randn(6, 5, 4, 3, generator=generator)
TOKENS = torch.randint(3, (5, 4), generator=generator)
SOFT = torch.rand(5, 4, 3, generator=generator).softmax(-1)
BINARY = torch.tensor([0, 1, 1, 0, 1])


def entropy_of_bits(samples):
    p = samples.double().mean(0)
    return metrics.entropy(torch.stack([p, 1 - p], -1))


def entropy_of_labels(samples):
    return metrics.entropy(F.one_hot(samples, 3).double().mean(0))


# -- Bernoulli ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("y", [BINARY, BINARY.bool(), BINARY.float(), BINARY.numpy().astype(np.uint8), BINARY.tolist()])
def test_binary_labels_of_any_dtype_keep_the_contract(y):
    outputs = LOGITS[..., 0, :1]
    refused = [(outputs[0], values) for values in (2 * BINARY, BINARY - 1, BINARY + 0.5, BINARY[:, None], ["a"] * 5)]
    check_likelihood(Bernoulli(), outputs, y, refused, total_of_draws=entropy_of_bits)
    check_likelihood(Bernoulli(), outputs[..., 0], y, refused, total_of_draws=entropy_of_bits)
    assert Bernoulli().observed(y, outputs[0]).dtype == torch.float32


def test_several_binary_labels_keep_the_contract():
    y = TOKENS > 0
    check_likelihood(Bernoulli(), LOGITS[..., 0], y, [(LOGITS[0, ..., 0], BINARY)], total_of_draws=entropy_of_bits)


def test_scores_of_binary_labels_are_over_all_labels():
    p, y = LOGITS[0, ..., 0].sigmoid().double(), (TOKENS > 0).float()
    found = Bernoulli().scores(Summary({"mean": p}, y, 0.5, lambda levels: levels, None, torch.arange(5), None))
    assert found["accuracy"] == pytest.approx(float(((p > 0.5) == (y > 0)).double().mean()))
    assert found["brier"] == pytest.approx(float((p - y).square().mean()))
    assert found["ece"] == pytest.approx(metrics.binary_ece(p.flatten(), y.flatten()))
    assert found["nll"] == 0.5


@pytest.mark.parametrize("logit", [200.0, 5000.0])
def test_huge_logits_leave_finite_densities_and_no_entropy(logit):
    outputs = torch.tensor([[logit, -logit]])
    found = Bernoulli().statistics(outputs, torch.tensor([1.0, 1.0]))
    assert found.log_likelihood.tolist() == [[0.0, -logit]]
    assert found.others["entropy"].abs().max() == 0


# -- Categorical with options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ignore_index": -100}, {"class_weights": [1.0, 0.5, 2.0]}])
def test_labels_of_tokens_keep_the_contract(options):
    bad = (TOKENS.float(), TOKENS + 1, TOKENS[:, 0], F.one_hot(TOKENS, 3), ["a"] * 5)
    likelihood = Categorical(class_dim=-1, **options)
    refused = [(LOGITS[0], y) for y in bad]
    check_likelihood(likelihood, LOGITS, TOKENS.int().numpy(), refused, total_of_draws=entropy_of_labels)


def test_labels_of_pixels_keep_the_contract():
    images = LOGITS.movedim(-1, 2).unflatten(-1, (2, 2))
    y = TOKENS.unflatten(-1, (2, 2))
    check_likelihood(Categorical(class_dim=1), images, y, [(images[0], TOKENS)], total_of_draws=entropy_of_labels)


def test_soft_labels_keep_the_contract():
    def entropy(samples):
        return metrics.entropy(samples.double().mean(0))

    refused = [(LOGITS[0], y) for y in (TOKENS, 2 * SOFT, -SOFT, SOFT[:, 0], SOFT * float("nan"))]
    check_likelihood(Categorical(class_dim=-1, soft_labels=True), LOGITS, SOFT, refused, total_of_draws=entropy)
    outputs = LOGITS[:, :, 0]
    check_likelihood(Categorical(soft_labels=True), outputs, SOFT[:, 0], [], total_of_draws=entropy)


def test_the_log_likelihood_of_an_example_is_the_weighted_sum_over_its_labels_that_count():
    y = TOKENS.clone()
    y[0], y[1, 2] = -1, -1
    weights = torch.tensor([1.0, 0.5, 2.0])
    likelihood = Categorical(class_dim=-1, ignore_index=-1, class_weights=weights)
    found = likelihood.distribution(LOGITS[0]).log_prob(likelihood.observed(y, LOGITS[0]))
    logs = LOGITS[0].log_softmax(-1)
    expected = [
        sum(float(weights[label] * logs[row, at, label]) for at, label in enumerate(labels) if label >= 0)
        for row, labels in enumerate(y.tolist())
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert found[0] == 0


def test_hard_labels_as_probabilities_are_the_hard_labels():
    hard = Categorical(class_dim=-1).statistics(LOGITS, TOKENS)
    soft = Categorical(class_dim=-1, soft_labels=True).statistics(LOGITS, F.one_hot(TOKENS, 3).float())
    torch.testing.assert_close(soft.log_likelihood, hard.log_likelihood)
    assert torch.equal(soft.score, hard.score)


def test_one_label_an_example_is_plain_categorical():
    outputs, y = LOGITS[:, :, 0], TOKENS[:, 0]
    plain, general = Categorical(), Categorical(class_dim=1)
    expected, found = plain.statistics(outputs, y), general.statistics(outputs, y)
    for name in ("mean", "log_likelihood", "score"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert isinstance(plain.distribution(outputs[0]), TorchCategorical)


def test_images_of_logits_have_the_class_where_torch_has_it():
    images, y = LOGITS.unsqueeze(-1).movedim(3, 2), TOKENS.unsqueeze(-1)
    by_default, named = Categorical(), Categorical(class_dim=1)
    check_likelihood(by_default, images, y, [(images[0], TOKENS)], total_of_draws=entropy_of_labels)
    expected, found = named.statistics(images, y), by_default.statistics(images, y)
    for name in ("mean", "log_likelihood", "score"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    losses = F.cross_entropy(images[0], y, reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(found.log_likelihood[0], -losses)
    probs = expected.mean.mean(0).double()
    assert by_default.scores(summary(probs, y)) == named.scores(summary(probs, y))


def summary(probs, y):
    return Summary({"mean": probs}, y, 0.5, lambda levels: levels, None, torch.arange(len(y)), None)


def test_scores_are_over_the_labels_that_count():
    probs = LOGITS[0].softmax(-1).double()
    y = torch.where(TOKENS == 2, -100, TOKENS)
    found = Categorical(class_dim=-1, ignore_index=-100).scores(summary(probs, y))
    chosen, known = probs[y >= 0], y[y >= 0]
    assert found == {
        "accuracy": metrics.accuracy(chosen, known), "nll": 0.5,
        "ece": metrics.ece(chosen, known), "brier": metrics.brier(chosen, known),
    }  # fmt: skip
    nothing = Categorical(class_dim=-1, ignore_index=-100).scores(summary(probs, torch.full_like(y, -100)))
    assert all(math.isnan(nothing[name]) for name in ("accuracy", "ece", "brier"))


def test_scores_of_soft_labels():
    probs = LOGITS[0].softmax(-1).double()
    found = Categorical(class_dim=-1, soft_labels=True).scores(summary(probs, SOFT))
    assert found["accuracy"] == pytest.approx(float((probs.argmax(-1) == SOFT.argmax(-1)).double().mean()))
    assert found["brier"] == pytest.approx(float((probs - SOFT).square().sum(-1).mean()))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.full((5, 4), -1), r"labels y are from -1 to -1; expected .* 0\.\.2 or -100 of shape \[N, 4\]"),
        (TOKENS + 1, r"labels y are from 1 to 3; expected .* 0\.\.2 or -100 .*: subtract 1"),
    ],
)
def test_a_label_that_is_neither_a_class_nor_ignored_is_refused(y, message):
    with pytest.raises(UserError, match=message):
        Categorical(class_dim=-1, ignore_index=-100).observed(y, LOGITS[0])


def test_labels_that_are_all_ignored_are_allowed():
    y = Categorical(class_dim=-1, ignore_index=-100).observed(torch.full((5, 4), -100), LOGITS[0])
    assert (y == -100).all()


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (2, 3, 4), "at least 2 outputs, one for each class.*give class_dim"),
        ({}, (2, 1, 4, 4), "at least 2 outputs, one for each class"),
        ({"class_dim": 4}, (2, 3, 4), r"class_dim is 4, and the network gives \[2, 3, 4\]"),
        ({"class_dim": -3}, (2, 3, 4), "class_dim is -3"),
        ({"class_dim": 1}, (2, 1, 4), "at least 2 classes in dimension 1"),
        ({"class_weights": [1.0, 2.0]}, (2, 3), "2 class_weights, and the network has 3 classes"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(options, shape, message):
    with pytest.raises(UserError, match=message):
        Categorical(**options).check(torch.zeros(shape))


@pytest.mark.parametrize(
    "options",
    [
        {"class_dim": 0},
        {"soft_labels": True, "ignore_index": 1},
        {"class_weights": [1.0, -1.0]},
        {"class_weights": [[1.0]]},
        {"class_weights": [0.0, 0.0]},
        {"class_weights": [1.0, float("nan")]},
    ],
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(UserError, match=r"class_dim|soft labels|class_weights"):
        Categorical(**options)
