"""Figures 8 and 9: pruning BNN-FC and BNN-Conv, the time at 70% pruned, and other weights of the KL."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xarray as xr

from ppl_bnn.results import netcdf
from ppl_bnn.study.page import Row, Section
from ppl_bnn.study.work import MISSING, Outcome, Work

FRACTIONS = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
# Points of accuracy that count as unchanged: about two standard errors of 10,000 test images.
_UNCHANGED = 0.003
_STARTS = {"start -9": "mnist-fc-start-9", "start -3": "mnist-fc-start-3"}
_CONV = "mnist-conv"


def pruning(work: Work) -> Section:
    """Figure 8: test accuracy by share of the weights pruned; the time at 70%."""
    section = Section("Figure 8: accuracy under pruning, and the time at 70%")
    results: dict[str, list[Path]] = {}
    for start, name in _STARTS.items():
        outcome = _dense(work, name)
        section.commands.append(outcome.command)
        files = [_seed_folder(work, name, seed) / "pruning.nc" for seed in range(work.scale.seeds)]
        results[f"BNN-FC, {start}"] = [path for path in files if path.exists()]
        section.rows += _rows(f"BNN-FC, {start}, {len(files)} seeds", results[f"BNN-FC, {start}"], outcome,
                              ("about 60%", "0.90"), len(section.commands))  # fmt: skip
    outcome = _convolutional(work)
    section.commands.append(outcome.command)
    path = work.folder(_CONV) / "pruning.nc"
    results["BNN-Conv"] = [path] if path.exists() else []
    section.rows += _rows("BNN-Conv, start -9", results["BNN-Conv"], outcome, ("about 80%", "0.98"),
                          len(section.commands))  # fmt: skip
    if found := {name: paths for name, paths in results.items() if paths}:
        from ppl_bnn.results.figures.pruning import pruning_accuracy

        figure = work.out / "figures" / "figure-8.png"
        pruning_accuracy(found, figure)
        section.figures.append(("Figure 8: test accuracy by share of the weights pruned", figure))
    section.notes = [
        f"Unchanged means: within {100 * _UNCHANGED:g} points of the unpruned network, about two standard errors of "
        "10,000 test digits. The largest share that was tried is named.",
        "The study does not say where q starts for these networks. We show both candidates; its training accuracy of "
        "0.90 for BNN-FC fits neither.",
        "The study notes that its pruned weights still cost their full time in TensorFlow, and yet that the time "
        "halves at 70%. Ours computes the pruned draws in a smaller or sparse network.",
    ]
    return section


def densities(work: Work) -> Section:
    """Figure 9: densities of the true class's softmax at several pruning levels, two networks side by side."""
    section = Section("Figure 9: densities under pruning")
    conv, dense = _convolutional(work), _dense(work, _STARTS["start -9"])
    section.commands = [conv.command, dense.command]
    paths = [work.folder(_CONV) / "pruning.nc", _seed_folder(work, _STARTS["start -9"], 0) / "pruning.nc"]
    there = all(path.exists() for path in paths)
    section.rows = [
        Row("pruning over 90% has little impact on some digits", "Model-Conv: 3, 6, 8, 9; Model-FC: 7", "section 4.6",
            "see the figure" if there else conv.or_reason(dense.or_reason(MISSING))),
    ]  # fmt: skip
    if there:
        from ppl_bnn.results.figures.pruning_densities import compare_pruning_densities

        figure = work.out / "figures" / "figure-9.png"
        compare_pruning_densities(paths, figure, images=work.options.digits, names=("BNN-Conv", "BNN-FC"))
        section.figures.append(("Figure 9: density of the true class's softmax by share pruned", figure))
    section.notes = ["The study does not say which test digits it shows. --digits chooses ours."]
    return section


def kl_weights(work: Work) -> Section:
    """Other weights of the KL, on BNN-FC."""
    section, name = Section("Section 3.2: other weights of the KL (beta)"), _STARTS["start -9"]
    betas = ",".join(f"{beta:g}" for beta in work.scale.betas)
    outcome = work.do(
        "beta", "jobs", work.run_folder(name), "--vary", f"train.kl_weight={betas}", "--workers", "2",
        "--stages", "train,predict", "--out", str(work.folder("beta")), *work.data(name), *work.scale.dense,
    )  # fmt: skip
    section.commands = [_dense(work, name).command, outcome.command]
    folders = {1.0: _seed_folder(work, name, 0)}
    folders |= {beta: work.folder("beta") / "jobs" / f"train.kl_weight={beta:g}" for beta in work.scale.betas}
    for beta, folder in sorted(folders.items()):
        section.rows.append(
            Row(f"BNN-FC: test accuracy, NLL and ECE at beta {beta:g}", "no improvement over 1, no numbers",
                "section 3.2", outcome.or_reason(_scores(folder / "predictive.nc")), 1 if beta == 1 else 2)
        )  # fmt: skip
    section.notes = [
        "The study varied beta for VGG-16 and ResNet-18 on CIFAR-10. This is BNN-FC on MNIST, which trains in minutes.",
    ]
    return section


def _dense(work: Work, name: str) -> Outcome:
    seeds = ",".join(map(str, range(work.scale.seeds)))
    return work.do(
        name, "jobs", work.run_folder(name), "--vary", f"train.seed={seeds}", "--workers", "2",
        "--stages", "train,predict,prune", "--out", str(work.folder(name)), *work.data(name), *_sweep(work),
        *work.scale.dense,
    )  # fmt: skip


def _convolutional(work: Work) -> Outcome:
    folder, run = work.folder(_CONV), work.run_folder("mnist-conv-start-9")
    if _CONV in work.options.use:
        # What it was trained with stands there; it may not be complete.
        return work.do(
            _CONV,
            "run",
            str(folder),
            "--stages",
            "predict,prune",
            "--quiet",
            *_sweep(work),
            *work.scale.convolutional_use,
        )
    return work.do(
        _CONV, "run", run, "--stages", "train,predict,prune", "--quiet", *work.data(run), *_sweep(work),
        *work.scale.convolutional, "--out", str(folder),
    )  # fmt: skip


def _sweep(work: Work) -> list[str]:
    images = ["--pruning.keep_images", str(work.options.digits)] if work.options.digits else []
    return [
        "--predict.num_samples", str(work.scale.pruning_draws), "--pruning.num_samples", str(work.scale.pruning_draws),
        "--pruning.fractions", str(list(FRACTIONS)), *images,
    ]  # fmt: skip


def _seed_folder(work: Work, name: str, seed: int) -> Path:
    return work.folder(name) / "jobs" / f"train.seed={seed}"


def _rows(what: str, paths: list[Path], outcome: Outcome, published: tuple[str, str], command: int) -> list[Row]:
    levels = [found for path in paths if (found := netcdf.read_group(path, "pruning")) is not None]
    ours = _curve(levels) if levels else dict.fromkeys(("unchanged", "accuracy", "time"), MISSING)
    return [
        Row(f"{what}: share pruned that leaves the accuracy unchanged", published[0], "section 4.6, figure 8",
            outcome.or_reason(ours["unchanged"]), command),
        Row(f"{what}: training accuracy", published[1], "section 4.6", outcome.or_reason(_trained_to(paths)), command),
        Row(f"{what}: test accuracy at 0, 60, 80 and 95% pruned", "figure only", "figure 8",
            outcome.or_reason(ours["accuracy"]), command),
        Row(f"{what}: time of a draw unpruned over 70% pruned", "about 2" if "FC" in what else "not reported",
            "section 4.6", outcome.or_reason(ours["time"]), command),
    ]  # fmt: skip


def _curve(levels: list[xr.Dataset]) -> Mapping[str, str]:
    accuracy = {fraction: np.mean([_at(each, fraction, "accuracy") for each in levels]) for fraction in FRACTIONS}
    flat = 0.0
    for fraction in FRACTIONS:
        if accuracy[fraction] < accuracy[0.0] - _UNCHANGED:
            break
        flat = fraction
    speed = np.mean([_at(each, 0.0, "seconds") / _at(each, 0.7, "seconds") for each in levels])
    return {
        "unchanged": f"{flat:.0%}",
        "accuracy": "; ".join(f"{accuracy[fraction]:.2%}" for fraction in (0.0, 0.6, 0.8, 0.95)),
        "time": f"{speed:.2f}",
    }


def _at(levels: xr.Dataset, fraction: float, name: str) -> float:
    """A number of the level whose share of pruned weights is nearest to `fraction`."""
    place = int(np.abs(levels["pruned_fraction"].values - fraction).argmin())
    return float(levels[name].values[place])


def _trained_to(paths: list[Path]) -> str:
    found = [netcdf.read_group(path.parent / "predictive.nc", "training") for path in paths]
    return "; ".join(f"{float(one['accuracy'][-1]):.3f}" for one in found if one is not None) or MISSING


def _scores(path: Path) -> str:
    if not path.exists():
        return MISSING
    attrs = netcdf.read_attrs(path)
    return f"{attrs['accuracy']:.2%}, {attrs['nll']:.3f} nats per datum, {attrs['ece']:.3f}"
