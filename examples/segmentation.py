"""Segmentation: a small U-Net with random weights says of each pixel which kind of clothes it belongs to, or paper.

Each canvas has three pictures of Fashion-MNIST at half their size. Where two of them overlap there is no right label,
and the likelihood ignores those pixels. Prints the scores and where the predictive entropy is: at borders and overlaps.

    python examples/segmentation.py --figure segmentation.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_bnn import Categorical, Images, MeanFieldNormal, Model, bayesian, fit, load, predict

KINDS, PAPER, IGNORED = torch.tensor([0, 1, 7, 8]), 4, -1  # T-shirt, trouser, sneaker, bag


class UNet(nn.Module):
    """Canvases [N, 1, H, W] -> logits [N, 5, H, W]: strided and transposed convolutions, and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.last = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(32, 5, 3, padding=1)
        down = nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 64, 3, 2, 1), nn.Conv2d(64, 64, 3, 1, 1)
        self.coarse = nn.ModuleList([*down, nn.ConvTranspose2d(64, 16, 4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        values = fine = self.fine(x).relu()
        for layer in self.coarse:
            values = layer(values).relu()
        return self.last(torch.cat([fine, values], 1))


def canvases(images: Images, count: int) -> tuple[Tensor, Tensor]:
    """Canvases [N, 1, 32, 32], and the label of each pixel [N, 32, 32]."""
    rows = torch.isin(images.labels, KINDS).nonzero()[: 3 * count, 0]
    things, kinds = nn.AvgPool2d(2)(images.pixels[rows] / 255)[:, 0], torch.searchsorted(KINDS, images.labels[rows])
    places = torch.randint(19, (len(things), 2), generator=torch.Generator().manual_seed(0)).tolist()
    x, y = torch.zeros(count, 32, 32), torch.full((count, 32, 32), PAPER)
    for number, (thing, kind, (top, left)) in enumerate(zip(things, kinds, places, strict=True)):
        at, ink = (number // 3, slice(top, top + 14), slice(left, left + 14)), thing > 0.1
        x[at], y[at] = x[at].maximum(thing), y[at].where(~ink, IGNORED).where(~ink | (y[at] != PAPER), kind)
    return x[:, None], y


def main(arguments: list[str] | None = None) -> None:
    """Train, predict, print the scores and entropies, draw test canvases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets (default: data)")
    parser.add_argument("--figure", type=Path, help="where to draw test canvases (default: nowhere)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = map(canvases, load("fashion-mnist", options.data), (1000, 100))
    net, likelihood = bayesian(UNet(), dist.Normal(0.0, 0.3)), Categorical(class_dim=1, ignore_index=IGNORED)
    guide = MeanFieldNormal(model := Model(net, likelihood, num_data=len(x)), x[:1], y[:1], init_loc="he")
    fit(model, guide, x, y, epochs=options.epochs, batch_size=25, lr=0.01, optimizer="adam", lr_schedule="cosine")
    found = predict(model, guide, x_test, y_test, num_samples=30)
    print({name: round(value, 4) for name, value in found.scores().items()})
    entropy, counted, labels = found.uncertainties()[0], y_test != IGNORED, y_test[:, None].float()
    edge = (nn.MaxPool2d(3, 1, 1)(labels) != -nn.MaxPool2d(3, 1, 1)(-labels))[:, 0]
    for name, at in {"borders": counted & edge, "elsewhere": counted & ~edge, "overlaps (ignored)": ~counted}.items():
        print(f"{name}: {at.double().mean():.1%} of the pixels, mean entropy {entropy[at].mean():.3f} nats")
    if options.figure:
        figure, axes = plt.subplots(4, 1, figsize=(8, 5.7), layout="constrained")
        rows = {"canvas": x_test[:, 0], "label": y_test, "predicted": found.mean.argmax(-1), "entropy": entropy}
        for axis, (name, images) in zip(axes, rows.items(), strict=True):
            labelled = {} if images.is_floating_point() else {"vmin": IGNORED, "vmax": PAPER}
            axis.imshow(torch.cat([*images[:6]], 1).numpy(), cmap="Set3" if labelled else "gray_r", **labelled)
            axis.set(xticks=[], yticks=[], ylabel=name)
        figure.savefig(options.figure, dpi=150)


if __name__ == "__main__":
    main()
