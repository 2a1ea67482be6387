"""Compares pruning criteria and structures at equal shares of pruned weights, on a trained run.

    python benchmarks/pruning_criteria.py runs/mnist-fc
    python benchmarks/pruning_criteria.py runs/mnist-lenet --out results/lenet --num_samples 20

Prints a Markdown table: accuracy, NLL, ECE and mean epistemic uncertainty on the run's test set. The last column says
how well the total uncertainty tells its images from those of Fashion-MNIST (area under the ROC curve; 0.5 is chance).
Every row uses the same random numbers.
"""

from pathlib import Path

import torch
from jsonargparse import auto_cli

from ppl_bnn import load, metrics, predict, prune
from ppl_bnn.experiment.setup import opened
from ppl_bnn.models import site_priors

# Name, criterion, structure, scope.
WAYS = (
    ("SNR", "snr", "weights", "global"),
    ("SNR, equal share a layer", "snr", "weights", "layer"),
    ("KL", "kl", "weights", "global"),
    ("evidence", "evidence", "weights", "global"),
    ("SNR, units", "snr", "units", "global"),
    ("evidence, units", "evidence", "units", "global"),
    ("SNR, inputs", "snr", "inputs", "global"),
    ("evidence, inputs", "evidence", "inputs", "global"),
)


def main(
    run: str,
    out: str | None = None,
    fractions: list[float] = [0.95, 0.98],  # noqa: B006 -- jsonargparse shows it
    num_samples: int = 50,
    num_test: int = 10_000,
    data_dir: str = "data",
) -> None:
    """Compare the criteria.

    Args:
        run: folder of the run's config.yaml.
        out: out folder of the run (default: RUN/out).
        fractions: shares of the weights to prune.
        num_samples: number of Monte Carlo draws a row.
        num_test: number of images of each of the two test sets.
        data_dir: folder of the data sets.
    """
    folder = Path(out) if out else Path(run) / "out"
    experiment = opened(folder, data_dir=data_dir)
    experiment.restored("last")
    guide, net = experiment.guide, experiment.model.net
    x, y = (part[:num_test] for part in experiment.tensors(experiment.test_data))
    priors = site_priors(experiment.model, *experiment.example())
    strange = load("fashion-mnist", data_dir)[1].first(num_test)

    def row(name: str, posterior: torch.nn.Module, fraction: float, nonzero: int) -> str:
        known = predict(net, posterior, x, y, num_samples=num_samples, keep=torch.tensor([0]), progress=False)
        unknown = predict(
            net, posterior, strange.inputs(), strange.labels, num_samples=num_samples, keep=torch.tensor([0]),
            progress=False,
        )  # fmt: skip
        auroc = metrics.auroc(known.uncertainties()[0], unknown.uncertainties()[0])
        found, epistemic = known.summary(), float(known.uncertainties()[2].mean())
        return (
            f"| {name} | {100 * fraction:.2f}% | {nonzero:,} | {100 * found['accuracy']:.2f}% | {found['nll']:.4f} | "
            f"{found['ece']:.4f} | {epistemic:.4f} | {auroc:.3f} |"
        )

    print("| criterion | pruned | non-zeros | accuracy | NLL | ECE | epistemic | AUROC |\n|" + " --- |" * 8)
    weights = sum(guide.loc_scale(site)[0].numel() for site in guide.sites)
    print(row("none", guide, 0.0, weights), flush=True)
    for fraction in fractions:
        for name, criterion, structure, scope in WAYS:
            pruned = prune(
                guide, fraction=fraction, criterion=criterion, structure=structure, scope=scope, priors=priors
            )
            print(row(name, pruned.guide, pruned.fraction, sum(pruned.nonzero.values())), flush=True)
    natural = prune(guide, threshold=0.0, criterion="evidence", priors=priors)
    print(row("evidence < 0", natural.guide, natural.fraction, sum(natural.nonzero.values())))


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
