"""An LSTM whose weights are random forecasts a series: the daily trading volume of Google's stock, 2004 to 2008.

The series ships with matplotlib. From the last 20 days the network predicts the next day's logarithm of the volume,
standardized; 800 days are for training, the 226 after them for testing. The LSTM has one draw of its weights over all
time steps (a variational RNN). Prints the scores beside two simple forecasts, and draws 90% intervals.

    python examples/lstm_series.py --figure lstm_series.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro.distributions as dist
import torch
from matplotlib.cbook import get_sample_data
from torch import Tensor, nn

from ppl_bnn import MeanFieldNormal, Model, Normal, bayesian, fit, predict

WINDOW, TRAIN = 20, 800


class Net(nn.Module):
    """An LSTM over a window [N, T, 2], and the forecast of the day after it, [N, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 16, batch_first=True), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def data() -> tuple[Tensor, Tensor, np.ndarray]:
    """Windows [N, T, 2] of log volume and size of the price's move, the next day's log volume [N], and its date."""
    prices = get_sample_data("goog.npz")["price_data"]
    volume = torch.as_tensor(np.log(prices["volume"][1:].astype(float))).float()
    move = torch.as_tensor(np.abs(np.diff(np.log(prices["close"])))).float()
    known = (series := torch.stack([volume, move], 1))[: WINDOW + TRAIN]
    series = (series - known.mean(0)) / known.std(0)
    x = series.unfold(0, WINDOW, 1)[:-1].transpose(1, 2).contiguous()
    return x, series[WINDOW:, 0], prices["date"][1 + WINDOW :]


def main(arguments: list[str] | None = None) -> None:
    """Train, forecast, print the scores, draw the intervals of the volume and of its mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100, help="training epochs (default: 100)")
    parser.add_argument("--figure", type=Path, default=None, help="where to draw the forecasts (default: nowhere)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    x, y, dates = data()
    x_train, y_train, x_test, y_test = x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]
    net = Net()
    model = Model(bayesian(net, dist.Normal(0.0, 0.3)), Normal(), num_data=TRAIN)
    guide = MeanFieldNormal(model, x[:1], y[:1], init_loc=dict(net.state_dict()), init_scale=0.02)
    how = {"lr": 0.005, "optimizer": "adam", "lr_schedule": "cosine"}
    fit(model, guide, x_train, y_train, epochs=options.epochs, batch_size=100, **how)
    found = predict(model, guide, x_test, y_test, num_samples=400)
    scores = found.scores()
    print({name: round(scores[name], 3) for name in ("nll", "rmse", "crps", "coverage_90", "coverage_50")})
    last, mean = (part.sub(y_test).square().mean().sqrt() for part in (x_test[:, -1, 0], x_test[:, -5:, 0].mean(1)))
    print(f"rmse of the last day's volume {last:.3f}, of the last five days' mean {mean:.3f}")
    if options.figure:
        figure, axis = plt.subplots(figsize=(8, 3.5), layout="constrained")
        days, bands = dates[TRAIN:], [(None, "#56B4E9", "90% of volumes"), ("mean", "#0072B2", "90% of their mean")]
        for of, color, label in bands:
            axis.fill_between(days, *found.interval(0.9, of=of), color=color, alpha=0.4, label=label)
        axis.plot(days, found.mean, color="#0072B2", label="forecast")
        axis.plot(days, y_test, "k.", markersize=4, label="observed")
        axis.set(ylabel="log trading volume (standardized)", ylim=(-3, 3.2))
        axis.legend(ncols=4, fontsize="small", loc="upper center")
        figure.savefig(options.figure, dpi=150)


if __name__ == "__main__":
    main()
