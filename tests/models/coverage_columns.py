"""What the table of coverage asks of each network: one function a column, which raises where it does not hold."""

from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from coverage_rows import CLASSES, STEPS, Row
from pyro import poutine
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, fit, load_checkpoint, predict, predictor, prune
from ppl_bnn.errors import UserError
from ppl_bnn.guides.estimators import ESTIMATORS, Estimator, Flipout, GroupedFlips, LocalReparameterization, Uses
from ppl_bnn.guides.posterior import Posterior
from ppl_bnn.inputs import parts
from ppl_bnn.models.model import one_tensor
from ppl_bnn.models.random_network import random_sites
from ppl_bnn.prediction.draws import coherent

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# So small that the KL's gradients are below any of the data's.
NO_KL = 1e-25


class Network:
    """A row's network and its inputs; its batch norm has statistics of them."""

    def __init__(self, row: Row) -> None:
        torch.manual_seed(0)
        self.row, self.net, self.inputs = row, row.build(), row.inputs()
        with torch.no_grad():
            for _ in range(20):
                self.net(*self.copies())
        self.labels = torch.arange(len(self.inputs[0])) % CLASSES

    def copies(self) -> list[Tensor]:
        """The inputs, for a network that may change them."""
        return [part.clone() for part in self.inputs]

    def given(self) -> Any:
        """The inputs as `fit` and `predict` take them."""
        x = self.copies()
        return x[0] if len(x) == 1 else tuple(x)

    def random(self) -> nn.Module:
        """The network with random parameters, anew."""
        return bayesian(self.net, select=self.row.select)

    def weights(self) -> dict[str, Tensor]:
        """The network's parameters, by name."""
        return {name: value.detach().clone() for name, value in self.net.named_parameters()}

    def guide(self, net: nn.Module, scale: float = 0.02) -> MeanFieldNormal:
        """A posterior around the network's own weights."""
        return MeanFieldNormal(net, *self.copies(), init_loc=self.weights(), init_scale=scale, init_jitter=0.0)


def sites(network: Network) -> None:
    """The random sites are the expected ones, and their numbers."""
    row, random = network.row, random_sites(network.random())
    if row.select is None:
        assert list(random) == [
            name
            for name, value in network.net.named_parameters()
            if value.dim() > 1 and not isinstance(network.net.get_submodule(name.rpartition(".")[0]), NORMS)
        ]
    trace = poutine.trace(network.random()).get_trace(*network.copies())
    values = {name: site["value"] for name, site in trace.nodes.items() if name in trace.stochastic_nodes}
    assert list(values) == list(random)
    assert (len(values), sum(value.numel() for value in values.values())) == (row.sites, row.parameters)


def same_as_torch(network: Network) -> None:
    """With the network's own weights as draws it gives what the network gives; so it does where estimators look on."""
    expected = network.net.eval()(*network.copies())
    network.net.train()
    net = network.random().eval()
    for handler in ("plain", "flipout"):
        with ESTIMATORS[handler](), poutine.condition(data=network.weights()):
            torch.testing.assert_close(net(*network.copies()), expected, rtol=0, atol=1e-6)


def own_noise(network: Network) -> None:
    """These many sites have a noise of each example; with next to none of it every estimator gives torch's numbers."""
    expected = network.net.eval()(*network.copies())
    network.net.train()
    net = network.random().eval()
    guide = network.guide(net, scale=1e-6)
    for handler in (uses := Uses(), Flipout(), GroupedFlips(), LocalReparameterization()):
        if isinstance(handler, Estimator):
            handler.plain_sites = uses.plain_sites
        with handler:
            sampled = poutine.trace(guide).get_trace(*network.copies())
            found = poutine.replay(net, trace=sampled)(*network.copies())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    matrices = {site for site, (_, random) in random_sites(net).items() if random.point.dim() > 1}
    assert len(matrices - uses.plain_sites) == network.row.own_noise


class Noting(torch.optim.SGD):
    """Moves nothing, and keeps the gradients of its last step, {id: gradient}."""

    seen: ClassVar[dict[int, Tensor]] = {}

    def step(self, closure: object = None) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        Noting.seen = {id(one): one.grad.clone() for one in parameters if one.grad is not None}


def step(estimator: str, network: Network) -> None:
    """A step of training has a finite loss, and the data give every site's loc and scale a gradient."""
    model = Classifier(network.random(), len(network.labels))
    guide, x = network.guide(model.net), network.given()
    (record,) = fit(
        model, guide, x, network.labels, epochs=1, batch_size=len(network.labels), estimator=estimator,
        optimizer="coverage_columns:Noting", kl_weight=NO_KL, progress=False,
    )  # fmt: skip
    assert torch.isfinite(torch.tensor(record["loss"]))
    gradients = {name: Noting.seen.pop(id(parameter)) for name, parameter in guide.named_parameters()}
    assert not [name for name, gradient in gradients.items() if not 1e-16 < gradient.abs().max() < torch.inf]
    torch.testing.assert_close(parts(x), list(network.inputs), rtol=0, atol=0)


def draws(network: Network) -> None:
    """Coherent draws are Pyro's of the same weights; the other methods are right, too, or refuse by name."""
    net = network.random()
    x = network.given()
    # Of a posterior with next to no noise every method's predictive is the network's own.
    certain = network.guide(net, scale=1e-6)
    predictive = predict(net, certain, x, num_samples=2, method="draws", progress=False)
    expected = _by_pyro(network, certain, 0).softmax(-1)
    torch.testing.assert_close(torch.as_tensor(predictive.probs)[0], expected, rtol=0, atol=1e-3)
    for method in ("auto", "layerwise", "moments"):
        try:
            predictive = predict(net, certain, x, num_samples=2, method=method, progress=False)
        except UserError:
            assert method != "auto"
        else:
            torch.testing.assert_close(torch.as_tensor(predictive.probs)[0], expected, rtol=0, atol=1e-3)
    guide = network.guide(net)
    with torch.no_grad():
        blocks = coherent(net, guide, x)
        found = [blocks.logits(index, 1.0)[0] for index in range(2)]
    for index, logits in enumerate(found):
        expected = _by_pyro(network, guide, index)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert (found[0] - found[1]).norm() > 1e-3 * found[0].norm()
    torch.testing.assert_close(parts(x), list(network.inputs), rtol=0, atol=0)


def pruned(network: Network) -> None:
    """With half of the weights at zero predictions are those of Pyro."""
    net = network.random()
    found = prune(network.guide(net), fraction=0.5)
    assert sum(found.nonzero.values()) == network.row.parameters - round(0.5 * network.row.parameters)
    x, how = network.given(), {"num_samples": 2, "method": "draws", "progress": False}
    predictive = predict(net, found.guide, x, **how)
    expected = torch.stack([_by_pyro(network, found.guide, index) for index in range(2)]).softmax(-1)
    torch.testing.assert_close(torch.as_tensor(predictive.probs), expected, rtol=0, atol=1e-4)
    try:
        predictive = predict(net, found.guide, x, compact="yes", **how)
    except UserError as error:
        if "compact 'yes'" not in str(error):
            raise
    else:
        torch.testing.assert_close(torch.as_tensor(predictive.probs), expected, rtol=0, atol=1e-4)


def saved(network: Network) -> None:
    """A checkpoint of a training, loaded into a new model and guide, predicts the same; so does a predictor."""
    x, found = network.given(), []
    with TemporaryDirectory() as folder:
        for _ in range(2):
            model = Classifier(network.random(), len(network.labels))
            guide = network.guide(model.net)
            if not found:
                fit(model, guide, x, network.labels, epochs=1, batch_size=4, lr=0.01, folder=folder, progress=False)
            else:
                load_checkpoint(folder, model=model, guide=guide)
                model.eval()
            found.append(torch.as_tensor(predict(model, guide, x, num_samples=2, progress=False).probs))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(predictor(model, guide, x, num_samples=2)(x)[0], found[0].mean(0), rtol=0, atol=1e-4)


def untouched(network: Network) -> None:
    """Conversion, training and prediction leave the user's network, and the copy's own attributes, as they were."""
    before = _everything(network.net)
    net = network.random()
    assert net.state_dict().keys() == network.net.state_dict().keys()
    assert isinstance(net, type(network.net))
    attributes = {path: set(vars(module)) for path, module in net.named_modules()}
    guide = network.guide(net)
    with torch.enable_grad():
        poutine.replay(net, trace=poutine.trace(guide).get_trace(*network.copies()))(*network.copies())
    with torch.no_grad(), poutine.condition(data=guide.draw(0)):
        net.eval()(*network.copies())
    after = _everything(network.net)
    assert after.keys() == before.keys()
    for name, value in before.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True)
        else:
            assert after[name] is value, name
    assert attributes == {path: set(vars(module)) for path, module in net.named_modules()}
    assert all(isinstance(value, nn.Parameter) for value in net.parameters())


def _everything(net: nn.Module) -> dict[str, Any]:
    """Classes, tensors and other attributes of all modules, by name."""
    found: dict[str, Any] = {name: value.detach().clone() for name, value in net.state_dict().items()}
    for path, module in net.named_modules():
        found |= {f"{path}: class": type(module), f"{path}: mode": module.training}
        for name, value in vars(module).items():
            found[f"{path}: {name}"] = value.detach().clone() if isinstance(value, Tensor) else value
    return found


def _by_pyro(network: Network, guide: Posterior, index: int) -> Tensor:
    with torch.no_grad(), poutine.condition(data=guide.draw(index)):
        return one_tensor(network.random().eval()(*network.copies()))


COLUMNS: dict[str, Callable[[Network], None]] = {
    "sites": sites,
    "same as torch": same_as_torch,
    "own noise": own_noise,
    **{name: partial(step, name) for name in STEPS},
    "draws": draws,
    "prune": pruned,
    "save": saved,
    "untouched": untouched,
}
