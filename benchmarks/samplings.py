"""Measures the error of the mean probabilities against the number of draws: independent, antithetic and Sobol.

A trained posterior predicts by layer outputs (`layerwise`). The error is the root mean square, over images, classes and
seeds, of the difference to a reference of many antithetic draws of weights. The table also has the seconds of a
prediction.

    python benchmarks/samplings.py runs/mnist-fc/out
"""

import argparse
import time
from pathlib import Path

import torch

from ppl_bnn.experiment.setup import opened
from ppl_bnn.prediction.predictive import SAMPLINGS, predict


def main(arguments: list[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a run's out folder")
    parser.add_argument("--data_dir", default=None, help="folder of the data sets (default: that of the run)")
    parser.add_argument("--images", type=int, default=300, help="number of test images (default: 300)")
    parser.add_argument("--draws", default="50,100,200,400", help="numbers of draws (default: 50,100,200,400)")
    parser.add_argument("--seeds", type=int, default=4, help="number of predictions of each kind (default: 4)")
    parser.add_argument("--reference", type=int, default=12_000, help="draws of the reference (default: 12000)")
    options = parser.parse_args(arguments)
    run = opened(options.out, data_dir=options.data_dir)
    run.restored("last")
    x, y = (tensor[: options.images] for tensor in run.tensors(run.test_data))
    of = (run.model.net, run.guide, x, y)
    few = {"keep": torch.arange(0), "progress": False}
    reference = predict(
        *of, num_samples=options.reference, seed=options.seeds, method="draws", sampling="antithetic", **few
    ).mean_probs
    print("| draws | " + " | ".join(SAMPLINGS) + " |\n" + "| --- " * (len(SAMPLINGS) + 1) + "|")
    for num_samples in map(int, options.draws.split(",")):
        cells = []
        for sampling in SAMPLINGS:
            started, squares = time.perf_counter(), []
            for seed in range(options.seeds):
                how = {"num_samples": num_samples, "seed": seed, "method": "layerwise", "sampling": sampling}
                found = predict(*of, **how, **few)
                squares.append((found.mean_probs - reference).square().mean())
            seconds = (time.perf_counter() - started) / options.seeds
            cells.append(f"{torch.stack(squares).mean().sqrt():.5f} ({seconds:.2f} s)")
        print(f"| {num_samples} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
