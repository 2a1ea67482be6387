"""Training by PyTorch Lightning: a module around the step of `fit`.

pip install lightning
python examples/lightning_module.py --epochs 40
"""

import argparse

import lightning
import torch
from own_loop import two_moons
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ppl_bnn import Classifier, MeanFieldNormal, TrainingStep, bayesian, predict


class BayesianModule(lightning.LightningModule):
    """A model and its guide, trained by `TrainingStep`: forward, backward and update are the step's."""

    def __init__(self, model: nn.Module, guide: nn.Module, num_data: int, lr: float = 0.01) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.guide, self.num_data, self.lr = model, guide, num_data, lr
        self.update: TrainingStep | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([*self.guide.parameters(), *self.model.parameters()], lr=self.lr, fused=True)

    def training_step(self, batch: list, number: int) -> None:
        x, y = batch
        if self.update is None:
            own = self.optimizers().optimizer
            self.update = TrainingStep(self.model, self.guide, x, y, num_data=self.num_data, optimizer=own)
        terms = self.update(x, y, kl_weight=0.1)
        self.log_dict({"loss": terms.loss, "nll": terms.nll, "kl": terms.kl}, on_step=False, on_epoch=True)

    def validation_step(self, batch: list, number: int) -> None:
        scores = predict(self.model, self.guide, *batch, num_samples=20, progress=False).scores()
        self.log_dict({f"val_{name}": score for name, score in scores.items()}, batch_size=len(batch[0]))


def main() -> None:
    """Train on 400 points of two half circles, with 200 others for validation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    x, y = two_moons(400, seed=0)
    model = Classifier(bayesian(nn.Sequential(nn.Linear(2, 50), nn.ReLU(), nn.Linear(50, 2))), num_data=len(x))
    module = BayesianModule(model, MeanFieldNormal(model, x[:2], y[:2]), len(x))
    data = TensorDataset(x, y), TensorDataset(*two_moons(200, seed=1))
    loaders = DataLoader(data[0], batch_size=80, shuffle=True), DataLoader(data[1], batch_size=200)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=options.epochs, accelerator="cpu", **quiet)
    trainer.fit(module, *loaders)
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
