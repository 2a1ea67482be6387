"""How far a step and a prediction on the device are from float64 on the CPU, with the same draws of the weights."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from gpu_cells import Cell, Clock, NotHere, Plan, Row, need_cuda
from gpu_networks import network
from ppl_bnn import Classifier, KLScaledELBO, MeanFieldNormal, bayesian, fit
from ppl_bnn.prediction.predictive import draw_outputs

# The KL counts as in a training on this many examples.
NUM_DATA = 50_000
# The quickest first.
NETWORKS = ("lstm", "vgg16", "resnet18")
# SGD's rate in the step of fit: its update is far above the rounding of the parameters.
SGD_LR = 100.0


class Precision(NamedTuple):
    """How the device computes: TF32 in matrix products and convolutions of float32, or layers in bfloat16."""

    dtype: torch.dtype = torch.float32
    tf32: bool = False
    bfloat16: bool = False
    on_cpu: bool = False


PRECISIONS = {
    "float64": Precision(torch.float64),
    # What rounding alone does: maxima and ReLU switch.
    "float32 on the CPU": Precision(on_cpu=True),
    "float32": Precision(),
    "float32, TF32": Precision(tf32=True),
    "bfloat16": Precision(bfloat16=True),
}


class Posed(NamedTuple):
    """A model, its guide, and examples: x [N, ...] and labels y [N]."""

    model: nn.Module
    guide: nn.Module
    x: Tensor
    y: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Posed":
        """Return a copy on a device, in a floating-point type."""
        model, guide = (copy.deepcopy(part).to(device, dtype) for part in (self.model, self.guide))
        return Posed(model, guide, self.x.to(device, dtype), self.y.to(device))


# What is compared: {name: tensor} of a posed model.
Compute = Callable[[Posed, Precision], dict[str, Tensor]]


class Recurrent(nn.Module):
    """An LSTM, and a dense layer of its last output: x [N, T, 8] -> logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]


class FixedNoise(Messenger):
    """Gives the guide's sites the draw loc + scale * noise, with its gradients."""

    def __init__(self, noise: dict[str, Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.noise and not msg["done"]:
            q = msg["fn"]
            msg["value"], msg["done"] = q.loc + q.scale * self.noise[msg["name"]], True


def cells(plan: Plan) -> Iterator[Cell]:
    """Compare a step, a step of fit, and predictions, of each network."""
    for name in NETWORKS[: 2 if plan.toy else None]:
        yield Cell(f"{name}: step", 6, partial(compare, plan, name, "step", gradients))
        yield Cell(f"{name}: predictions", 6, partial(compare, plan, name, "predictions", logits))
        yield Cell(f"{name}: step of fit", 6, partial(compare, plan, name, "step of fit", gradients_of_fit))


def compare(plan: Plan, name: str, what: str, compute: Compute, clock: Clock) -> Iterator[Row]:
    """Compute something in float64 on the CPU, then on the device in each precision; yield their distances."""
    posed = pose(plan, name, scale=1.3e-7 if compute is gradients_of_fit else 0.01)
    clock.say(f"{what} of {name} on the CPU")
    reference = compute(posed.to("cpu", torch.float64), Precision(torch.float64))
    for label, precision in PRECISIONS.items():
        row = {"what": what, "network": name, "precision": label}
        try:
            if precision.tf32:
                need_cuda(plan)
        except NotHere as error:
            yield row | {"note": str(error)}
            continue
        clock.say(f"{what} of {name} in {label}")
        with precise(precision):
            found = compute(posed.to("cpu" if precision.on_cpu else plan.device, precision.dtype), precision)
        yield row | distances(found, reference)


def pose(plan: Plan, name: str, *, scale: float) -> Posed:
    """Build a network with posterior scales of `scale`, and a batch of random examples."""
    torch.manual_seed(0)
    count = 4 if plan.toy else 16
    net = Recurrent() if name == "lstm" else network(plan, name)
    x = torch.randn(count, 12, 8) if name == "lstm" else torch.rand(count, 3, 32, 32)
    y = torch.arange(count) % 10
    model = Classifier(bayesian(net), count)
    return Posed(model, MeanFieldNormal(model, x[:1], y[:1], init_loc="he", init_scale=scale), x, y)


def gradients(posed: Posed, precision: Precision) -> dict[str, Tensor]:
    """Return loss and gradients of one step with draw 0, through the ELBO."""
    noise = dict(posed.guide.noise(0))  # type: ignore[operator]
    elbo = KLScaledELBO(len(posed.x))
    pyro.clear_param_store()
    with pyro.validation_enabled(False), FixedNoise(noise), autocast(posed, precision):
        terms = elbo.terms_and_grads(posed.model, posed.guide, posed.x, posed.y, kl_weight=len(posed.x) / NUM_DATA)
    named = [*posed.model.named_parameters(), *posed.guide.named_parameters()]
    found = {name: value.grad for name, value in named if value.grad is not None}
    return _numbers(nll=terms.nll, kl=terms.kl) | found


def gradients_of_fit(posed: Posed, precision: Precision) -> dict[str, Tensor]:
    """Return loss and gradients of one step as `fit` runs it, by what SGD changed.

    The posterior is so narrow that the draws do not matter. The gradients of its scales are lost in rounding.
    """
    parts = posed.model, posed.guide
    named = [(name, value) for part in parts for name, value in part.named_parameters() if "unconstrained" not in name]
    before = {name: value.detach().clone() for name, value in named}
    history = fit(
        posed.model, posed.guide, posed.x, posed.y, epochs=1, batch_size=len(posed.x), lr=SGD_LR,
        optimizer="torch.optim:SGD", estimator="plain", precision="bfloat16" if precision.bfloat16 else "float32",
        kl_weight=len(posed.x) / NUM_DATA, progress=False,
    )  # fmt: skip
    found = {name: (before[name] - value.detach()) / SGD_LR for name, value in named}
    return _numbers(nll=history[0]["nll"], kl=history[0]["kl"]) | found


def logits(posed: Posed, precision: Precision) -> dict[str, Tensor]:
    """Return the logits [2, N, 10] of draws 0 and 1, which depend on their numbers alone."""
    net = posed.model.net
    with torch.no_grad(), autocast(posed, precision):
        return {"logits": torch.stack(list(draw_outputs(net, posed.guide, posed.x, num_samples=2)))}  # type: ignore[arg-type]


def distances(found: dict[str, Tensor], reference: dict[str, Tensor]) -> Row:
    """Return relative differences from the reference: of nll and KL, of all together, and the largest of one tensor.

    A tensor's relative difference is the norm of the difference by the norm of the reference. Tensors whose norm is
    below a millionth of the largest (biases before batch norm, whose gradient is 0) do not count for the largest.
    """
    found = {name: value.detach().cpu().double() for name, value in found.items()}
    row: Row = {}
    for name in ("nll", "kl"):
        if name in reference:
            row[name] = float((found.pop(name) - reference[name]).abs() / reference[name].abs())
    parts = {name: value for name, value in reference.items() if name not in ("nll", "kl")}
    apart = {name: float((found[name] - value).norm()) for name, value in parts.items()}
    norms = {name: float(value.norm()) for name, value in parts.items()}
    counted = [name for name, norm in norms.items() if norm > 1e-6 * max(norms.values())]
    worst = max(counted, key=lambda name: apart[name] / norms[name])
    together = sum(value**2 for value in apart.values()) / sum(value**2 for value in norms.values())
    return row | {"all": together**0.5, "largest": apart[worst] / norms[worst], "of": worst}


@contextmanager
def precise(precision: Precision) -> Iterator[None]:
    """Within this, matrix products and convolutions of float32 on a GPU use TF32 or not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision.tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def autocast(posed: Posed, precision: Precision) -> AbstractContextManager:
    """Return the context in which layers compute in bfloat16, if the precision says so."""
    return torch.autocast(posed.x.device.type, torch.bfloat16) if precision.bfloat16 else nullcontext()


def _numbers(**numbers: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
