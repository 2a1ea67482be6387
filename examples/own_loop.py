"""A training loop of your own: the step of `fit`, with your order of examples, learning rates and stopping.

    python examples/own_loop.py --epochs 40

Each update is of two batches (gradient accumulation), whose gradients add up to that of one large batch.
"""

import argparse
import math

import torch
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, TrainingStep, bayesian, predict


def two_moons(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [N, 2] on two noisy half circles, and which of them each is on, [N]."""
    generator = torch.Generator().manual_seed(seed)
    angle, y = math.pi * torch.rand(count, generator=generator), torch.arange(count) % 2
    x = torch.stack((angle.cos() + y, angle.sin() * (1 - 2 * y) + 0.5 * y), 1)
    return x + 0.15 * torch.randn(x.shape, generator=generator), y


def main() -> None:
    """Train on 400 points, and score 200 others after every tenth of the epochs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    torch.manual_seed(0)
    x, y = two_moons(400, seed=0)
    net = nn.Sequential(nn.Linear(2, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 2))
    model = Classifier(bayesian(net), num_data=len(x))
    guide = MeanFieldNormal(model, x[:2], y[:2])
    step = TrainingStep(model, guide, x[:8], y[:8], num_data=len(x), lr=0.01, clip_norm=10.0)
    for epoch in range(options.epochs):
        for group in step.optimizer.param_groups:
            group["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * epoch / options.epochs))
        for rows in torch.randperm(len(x)).split(80):
            for few in rows.split(40):
                step.gradients(x[few], y[few], kl_weight=0.1, share=len(few) / len(rows))
            terms = step.update()
        if (epoch + 1) % max(1, options.epochs // 10) == 0:
            found = predict(model, guide, *two_moons(200, seed=1), num_samples=50, progress=False).scores()
            print(
                f"epoch {epoch + 1}: loss {terms.loss:.3f} = nll {terms.nll:.3f} + 0.1 * kl {terms.kl:.3f}; "
                f"test accuracy {found['accuracy']:.3f}, NLL {found['nll']:.3f}"
            )
    step.release()


if __name__ == "__main__":
    main()
