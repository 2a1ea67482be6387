"""A pretrained backbone with a Bayesian head: a new task with few labels, and images that the head should doubt.

A small CNN learns MNIST's digits; it stands for a pretrained network. Then it is frozen, and a random head learns
Fashion-MNIST's clothes from 20 labels of each kind. Beside it stands the same head without a prior (maximum
likelihood). The figure has the predictive entropy of test clothes, and of digits, of which the head saw none.

A backbone of torchvision is one line, and `bayesian(net, {"fc.*": dist.Normal(0.0, 1.0)})` makes its head random:

    net = torchvision.models.resnet18(weights="DEFAULT").requires_grad_(False).eval(); net.fc = nn.Linear(512, 10)

    python examples/pretrained_backbone.py --figure pretrained_backbone.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, fit, load, predict


class Net(nn.Module):
    """Two convolutions, whose 512 outputs are the features, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Conv2d(1, 16, 5, stride=2), nn.Conv2d(16, 32, 5, stride=2)
        self.backbone = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int) -> tuple[Classifier, MeanFieldNormal]:
    """Fit what is not frozen: the posterior of random parameters, if there are any, and the point estimates."""
    model = Classifier(net, num_data=len(x))
    guide = MeanFieldNormal(model, x[:1], y[:1], init_scale=0.05)
    how = {"lr": 0.01, "optimizer": "adam", "lr_schedule": "cosine", "estimator": "local"}
    fit(model, guide, x, y, epochs=epochs, batch_size=100, **how)
    return model, guide


def main(arguments: list[str] | None = None) -> None:
    """Pretrain, fit both heads, predict, print the scores, draw the entropies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=300, help="epochs of the heads, 2 steps each (default: 300)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets (default: data)")
    parser.add_argument("--figure", type=Path, default=None, help="where to draw the entropies (default: nowhere)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    (digits, digits_test), (clothes, clothes_test) = (load(name, options.data) for name in ("mnist", "fashion-mnist"))
    pretraining, inside, outside = digits.first(10000), clothes_test.first(4000), digits_test.first(4000)
    train(net := Net(), pretraining.inputs(), pretraining.labels, epochs=min(3, options.epochs))
    net.backbone.requires_grad_(False)
    net.head.reset_parameters()
    few = torch.cat([(clothes.labels == kind).nonzero()[:20, 0] for kind in range(10)])
    x, y, images = clothes.inputs()[few], clothes.labels[few], {"clothes": inside.inputs(), "digits": outside.inputs()}
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharex=True, sharey=True, layout="constrained")
    heads = {"Bayesian head": bayesian(net, {"head.*": dist.Normal(0.0, 1.0)}), "maximum likelihood": net}
    for axis, (name, one) in zip(axes, heads.items(), strict=True):
        model, guide = train(one, x, y, options.epochs)
        scores = predict(model, guide, images["clothes"], inside.labels, num_samples=100).scores()
        print(name, {key: round(value, 3) for key, value in scores.items()})
        for kind, part in images.items():
            entropy = predict(model, guide, part, num_samples=100).uncertainties()[0]
            print(f"  mean predictive entropy of {kind}: {entropy.mean():.2f} nats")
            axis.hist(entropy.numpy(), bins=40, range=(0, 2.31), density=True, alpha=0.6, label=kind)
        axis.set(title=name, xlabel="predictive entropy (nats)", ylabel="density of test images")
        axis.legend()
    if options.figure:
        figure.savefig(options.figure, dpi=150)


if __name__ == "__main__":
    main()
