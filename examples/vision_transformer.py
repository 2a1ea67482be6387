"""A small Vision Transformer of torchvision, all of whose weights are random: attention, embeddings, MLPs and head.

It learns 5,000 MNIST digits from 16 patches each, with flipout for convolution and linear layers; the projections
inside of attention have one draw a step. Then the weights with the lowest signal-to-noise ratio are pruned. Prints the
test accuracy at each level, before and after pruning; the figure has it too, and what is left of each weight.

    python examples/vision_transformer.py --figure vision_transformer.png
"""

import argparse
from pathlib import Path

import pyro.distributions as dist
import torch
from torch import nn
from torchvision.models import VisionTransformer

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, fit, load, sweep


def main(arguments: list[str] | None = None) -> None:
    """Train, prune and predict, print the accuracies, draw them and what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12, help="training epochs (default: 12)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets (default: data)")
    parser.add_argument("--figure", type=Path, default=None, help="where to draw the levels (default: nowhere)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    train, test = load("mnist", options.data)
    train, test = train.first(5000), test.first(1000)
    net = VisionTransformer(
        image_size=28, patch_size=7, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    net.conv_proj = nn.Conv2d(1, 32, 7, stride=7)  # its own takes three colours
    x, y = train.inputs(), train.labels
    model = Classifier(bayesian(net, dist.Normal(0.0, 0.2)), num_data=len(x))
    guide = MeanFieldNormal(model, x[:1], y[:1], init_loc=dict(net.state_dict()), init_scale=0.01)
    how = {"lr": 0.02, "lr_warmup": 0.1, "optimizer": "adam", "lr_schedule": "cosine", "estimator": "flipout"}
    fit(model, guide, x, y, epochs=options.epochs, batch_size=100, kl_weight=0.2, **how)
    fractions = (0.0, 0.3, 0.5, 0.7, 0.9)
    levels = sweep(model, guide, test.inputs(), test.labels, thresholds=(), fractions=fractions, num_samples=10)
    for level in levels:
        scores = {name: round(value, 3) for name, value in level.predictive.scores().items()}
        print(f"{level.pruned.fraction:.0%} of {sum(level.pruned.total.values())} weights pruned:", scores)
    if options.figure:
        draw(levels, options.figure)


def draw(levels: list, path: Path) -> None:
    """Accuracy against the share of pruned weights, and the share of each weight that is left at 70%."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", width_ratios=(2, 3))
    accuracies = [level.predictive.scores()["accuracy"] for level in levels]
    left.plot([level.pruned.fraction for level in levels], accuracies, "o-", color="#0072B2")
    left.set(xlabel="share of weights pruned", ylabel="test accuracy", ylim=(0, 1))
    pruned = levels[3].pruned
    names = [
        site.removeprefix("encoder.").replace("layers.encoder_", "").removesuffix(".weight") for site in pruned.total
    ]
    right.barh(names, [pruned.nonzero[site] / total for site, total in pruned.total.items()], color="#56B4E9")
    right.invert_yaxis()
    right.set(xlabel=f"share left, {pruned.fraction:.0%} pruned in all")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
