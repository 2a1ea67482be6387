"""Networks with several inputs: a tuple or dict of tensors is predicted as one tensor is."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from small_posteriors import by_pyro
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, as_examples, bayesian, predict, predictor, prune, sweep
from ppl_bnn.errors import UserError
from ppl_bnn.inputs import call, rows
from ppl_bnn.prediction.log_density import train_log_likelihood
from ppl_bnn.prediction.onnx import export
from ppl_bnn.prediction.plain import plain

N = 30
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3
BOTH = {"left": X[:, :2], "right": X[:, 2:]}


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.out = nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(4, 8), nn.Linear(16, 3)

    def head(self, left, right):
        return self.out(torch.cat([self.norm(self.a(left)), self.b(right)], 1).relu())


class OneDict(Layers):
    def forward(self, x):
        return self.head(x["left"], x["right"])


class TwoArguments(Layers):
    def forward(self, left, right, scale=None):
        return self.head(left, right if scale is None else right * scale)


class Untraceable(Layers):
    def forward(self, left, right):
        return self.head(left, right) if left.sum() < 1e9 else left


def made(kind, x):
    torch.manual_seed(0)
    net = bayesian(kind()).eval()
    net.norm.running_var.uniform_(0.5, 2)
    model = Classifier(net, N)
    return model, MeanFieldNormal(model, rows(x, slice(1)), Y[:1], init_loc="he", init_scale=0.2)


KINDS = [
    (OneDict, BOTH), (TwoArguments, BOTH), (TwoArguments, tuple(BOTH.values())), (Untraceable, BOTH),
    (TwoArguments, {**BOTH, "scale": torch.full((N, 1), 2.0)}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "x"), KINDS)
def test_draws_are_those_of_the_posterior(kind, x):
    model, guide = made(kind, x)
    found = predict(model, guide, x, Y, num_samples=3, method="draws", batch_size=7, progress=False)
    for probs, index in zip(found.probs, range(3), strict=True):
        with torch.no_grad(), pyro.poutine.condition(data=guide.draw(index)):
            expected = call(model.net, x)
        torch.testing.assert_close(probs, expected.softmax(1))
    assert predict(model.net, guide, x, Y, num_samples=3, method="draws", progress=False).nll == pytest.approx(
        found.nll
    )


@pytest.mark.parametrize(("kind", "x"), KINDS[:3])
def test_layerwise_draws_have_the_same_mean(kind, x):
    model, guide = made(kind, x)
    assert set(plain(model.net, x).folded) == {"a.weight"}
    found, expected = (
        predict(model, guide, x, Y, num_samples=4000, method=method, progress=False)
        for method in ("layerwise", "draws")
    )
    assert found.method == "layerwise"
    assert float((found.mean - expected.mean).abs().max()) < 5 * float((found.mc_error + expected.mc_error).max())


@pytest.mark.parametrize(("kind", "x"), KINDS)
def test_a_predictor_answers_what_predict_gives(kind, x):
    model, guide = made(kind, x)
    answer = predictor(model, guide, rows(x, slice(5)), num_samples=20)
    probs, _ = answer(rows(x, slice(5)))
    expected = predict(model, guide, rows(x, slice(5)), Y[:5], num_samples=20, progress=False)
    torch.testing.assert_close(probs.double(), expected.mean)


def test_statistics_of_batch_norm_are_taken_of_several_inputs():
    model, guide = made(TwoArguments, BOTH)
    found = predict(model, guide, BOTH, Y, num_samples=2, norm_inputs=BOTH, progress=False)
    net = plain(model.net, BOTH, fold=False)
    for site, value in guide.draw(1).items():
        net.set(site, value)
    norm = net.net.get_submodule("norm").train()
    norm.momentum = 1.0
    net.net(**BOTH)
    norm.eval()
    torch.testing.assert_close(found.probs[1], net.net(**BOTH).softmax(1))


def test_a_sweep_and_the_training_log_likelihood_take_several_inputs():
    model, guide = made(OneDict, BOTH)
    levels = sweep(model, guide, BOTH, Y, thresholds=(), fractions=(0.0, 0.5), num_samples=3, progress=False)
    assert [len(level.predictive.mean) for level in levels] == [N, N]
    found = train_log_likelihood(model, guide, BOTH, Y, num_samples=3, progress=False)
    expected = predict(model, guide, BOTH, Y, num_samples=3, method="draws", progress=False)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood)


def test_labels_may_lie_among_the_inputs():
    model, guide = made(OneDict, BOTH)
    expected = predict(model, guide, BOTH, Y, num_samples=3, progress=False)
    for data in ({**BOTH, "y": Y}, as_examples({**BOTH, "label": Y}, target="label")):
        assert predict(model, guide, data, num_samples=3, progress=False).nll == expected.nll


def test_tokens_and_their_mask_are_inputs():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(9, 6), nn.Linear(6, 3)

        def forward(self, tokens, mask=None):
            h = self.words(tokens)
            return self.out(h.mean(1) if mask is None else (h * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))

    tokens = torch.randint(0, 9, (N, 7), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    net = bayesian(Words())
    guide = MeanFieldNormal(Classifier(net, N), tokens[:1], Y[:1], init_loc="he", init_scale=0.3)
    plainly = predict(net, guide, tokens, Y, num_samples=4, method="draws", progress=False)
    for probs, logits in zip(plainly.probs, by_pyro(net, guide, tokens, 4), strict=True):
        torch.testing.assert_close(probs, logits.softmax(1))
    masked = predict(net, guide, (tokens, torch.ones(N, 7)), Y, num_samples=4, method="draws", progress=False)
    torch.testing.assert_close(masked.probs, plainly.probs)
    mask = (torch.arange(7) <= torch.arange(N).unsqueeze(1)).float()
    cut = predict(net, guide, (tokens, mask), Y, num_samples=4, method="draws", progress=False)
    assert not torch.allclose(cut.probs, plainly.probs)
    # The noise of layers is Normal, whatever the dtype of the inputs is.
    layered = predict(net, guide, tokens, Y, num_samples=4000, method="layerwise", progress=False)
    drawn = predict(net, guide, tokens, Y, num_samples=4000, method="draws", progress=False)
    assert float((layered.mean - drawn.mean).abs().max()) < 5 * float((layered.mc_error + drawn.mc_error).max())


def test_a_pyro_model_gets_its_inputs_as_one_argument():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
        with pyro.plate("data", len(x["left"])):
            return pyro.sample("y", dist.Normal(x["left"] @ w, 0.1), obs=y)

    class Fixed:
        sites = ("w",)

        def draw(self, index, *, seed=0):
            return {"w": torch.tensor([1.0, 2.0])}

    found = predict(model, Fixed(), BOTH, X[:, 0], num_samples=3, progress=False)
    torch.testing.assert_close(found.mean.float(), BOTH["left"] @ torch.tensor([1.0, 2.0]))


def test_a_tuple_of_all_that_the_network_needs_has_no_label():
    model, guide = made(TwoArguments, BOTH)
    found = predict(model, guide, tuple(BOTH.values()), num_samples=3, progress=False)
    assert found.y is None
    assert torch.equal(found.mean, predict(model, guide, BOTH, num_samples=3, progress=False).mean)
    labelled = predict(model, guide, (*BOTH.values(), Y), num_samples=3, progress=False)
    assert torch.equal(labelled.y, Y)


def test_what_takes_one_tensor_alone_says_so(tmp_path):
    model, guide = made(TwoArguments, BOTH)
    for refused, message in (
        (lambda: predict(model, guide, BOTH, method="moments", progress=False), "predict with draws"),
        (lambda: predict(model, guide, BOTH, compact="yes", progress=False), "one input tensor"),
        (lambda: export(tmp_path / "x.onnx", model, guide, BOTH), "export takes networks of one input tensor"),
        (lambda: predict(model, guide, X, progress=False), "the network takes 'left', 'right'"),
        # Without y, the last of a tuple is the label, as in fit.
        (lambda: predict(model, guide, (BOTH["left"],), progress=False), "or a tuple beside y"),
        (lambda: predict(model, lambda x, y: None, BOTH, progress=False), "a Pyro guide is predicted with one input"),
        (lambda: predict(model, guide, {"left": X, "other": X}, progress=False), "fails on x, a dict of 'left'"),
        (lambda: predict(model, guide, {**BOTH, "left": X[:5, :2]}, Y, progress=False), "the same number of examples"),
        (
            lambda: predict(model, guide, {**BOTH, "right": X[:, 2:] / 0}, Y, progress=False),
            r"x\['right'\] must be finite",
        ),
        (lambda: predict(model, guide, {**BOTH, "right": X[:, 2:].double()}, Y, progress=False), "x has dtype float64"),
    ):
        with pytest.raises(UserError, match=message) as error:
            refused()
        assert "\n" not in str(error.value)
    # A pruned posterior is predicted without its compact network.
    pruned = prune(guide, fraction=0.9).guide
    assert not predict(model, pruned, BOTH, Y, num_samples=2, progress=False).compact
