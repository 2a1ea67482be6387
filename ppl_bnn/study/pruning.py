"""Figures 8 and 9: pruning BNN-FC and BNN-Conv, the time at 70% pruned, and other weights of the KL."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.provenance import result_path
from ppl_bnn.results import netcdf
from ppl_bnn.study.page import Row, Section
from ppl_bnn.study.timings import counted, training_accuracy
from ppl_bnn.study.work import MISSING, Outcome, Work

FRACTIONS = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
_STARTS = {-9: "mnist-fc-start-9", -3: "mnist-fc-start-3"}
_CONV = "mnist-conv"


@dataclass(frozen=True)
class _Network:
    """A network's results: its name on the page, the out folders of its trainings, and how they were made."""

    name: str
    folders: list[Path]
    outcome: Outcome

    def pruned(self) -> list[Path]:
        """The sweeps that are there."""
        paths = (result_path(folder, "pruning") for folder in self.folders if (folder / "config.yaml").exists())
        return [path for path in paths if path.exists()]


def pruning(work: Work) -> Section:
    """Figure 8: test accuracy by share of the weights pruned; the time at 70%."""
    section = Section("Figure 8: accuracy under pruning, and the time at 70%")
    networks = [*(_dense(work, start) for start in _STARTS), _convolutional(work)]
    published = [("about 60%", "0.90", "about 2"), ("about 60%", "0.90", "about 2"), ("about 80%", "0.98", "-")]
    for network, numbers in zip(networks, published, strict=True):
        section.commands.append(network.outcome.command)
        section.rows += _rows(network, numbers, len(section.commands))
    if found := {network.name: network.pruned() for network in networks if network.pruned()}:
        from ppl_bnn.results.figures.pruning import pruning_accuracy

        figure = work.out / "figures" / "figure-8.png"
        pruning_accuracy(found, figure)
        section.figures.append(("Figure 8: test accuracy by share of the weights pruned", figure))
    section.notes = [
        "Unchanged means: within two standard errors of the unpruned network's accuracy, of all trainings together.",
        "The study does not say where q starts for these networks. We show both candidates; its training accuracy of "
        "0.90 for BNN-FC fits neither.",
        'The abstract says that pruning "up to 80%" costs 7.0% of accuracy "for certain models"; section 4.6 says that '
        "Model-Conv loses nothing at 80%. So the 7.0% must be those of Model-FC.",
        "The study notes that its pruned weights still cost their full time in TensorFlow, and yet that the time "
        "halves at 70%. Ours computes the pruned draws in a smaller or sparse network.",
    ]
    return section


def densities(work: Work) -> Section:
    """Figure 9: densities of the true class's softmax at several pruning levels, two networks side by side."""
    section, networks = Section("Figure 9: densities under pruning"), [_convolutional(work), _dense(work, -9)]
    section.commands = [network.outcome.command for network in networks]
    paths = [path for network in networks for path in network.pruned()[:1]]
    section.rows = [
        Row("digits that keep their density at over 90% pruned", f"{name}: {digits}", "section 4.6",
            network.outcome.or_reason("see the figure" if network.pruned() else MISSING), number)
        for number, (network, name, digits) in enumerate(
            zip(networks, ("Model-Conv", "Model-FC"), ("3, 6, 8, 9", "7"), strict=True), 1
        )
    ]  # fmt: skip
    if len(paths) == len(networks):
        from ppl_bnn.results.figures.pruning_densities import compare_pruning_densities

        figure, names = work.out / "figures" / "figure-9.png", [network.name for network in networks]
        compare_pruning_densities(paths, figure, images=work.options.digits, names=names)
        section.figures.append(("Figure 9: density of the true class's softmax by share pruned", figure))
    section.notes = ["The study does not say which test digits it shows. --digits chooses ours."]
    return section


def kl_weights(work: Work) -> Section:
    """Other weights of the KL, on BNN-FC."""
    section, name = Section("Section 3.2: other weights of the KL (beta)"), _STARTS[-9]
    betas = ",".join(f"{beta:g}" for beta in work.scale.betas)
    folders = {beta: work.folder("beta") / "jobs" / f"train.kl_weight={beta:g}" for beta in work.scale.betas}
    others = work.do(
        "beta", "jobs", work.run_folder(name), "--vary", f"train.kl_weight={betas}", "--workers", "2",
        "--stages", "train,predict", "--out", str(work.folder("beta")), *work.data(name),
        "--predict.num_samples", str(work.scale.pruning_draws), *work.scale.dense,
        makes=[folder / "predictive.nc" for folder in folders.values()],
    )  # fmt: skip
    own = _dense(work, -9)
    section.commands = [own.outcome.command, others.command]
    for beta, folder in sorted({1.0: own.folders[0], **folders}.items()):
        outcome = own.outcome if beta == 1 else others
        section.rows.append(
            Row(f"BNN-FC: test accuracy, NLL and ECE at beta {beta:g}", "no improvement over 1, no numbers",
                "section 3.2", outcome.or_reason(_scores(folder / "predictive.nc")), 1 if beta == 1 else 2)
        )  # fmt: skip
    section.notes = [
        "The study varied beta for VGG-16 and ResNet-18 on CIFAR-10. This is BNN-FC on MNIST, which trains in minutes.",
    ]
    return section


def _dense(work: Work, start: int) -> _Network:
    name, seeds = _STARTS[start], range(work.scale.seeds)
    folders = [work.folder(name) / "jobs" / f"train.seed={seed}" for seed in seeds]
    outcome = work.do(
        name, "jobs", work.run_folder(name), "--vary", f"train.seed={','.join(map(str, seeds))}", "--workers", "2",
        "--stages", "train,predict,prune", "--out", str(work.folder(name)), *work.data(name), *_sweep(work),
        *work.scale.dense, makes=[folder / "predictive.nc" for folder in folders],
    )  # fmt: skip
    return _Network(f"BNN-FC, start {start}", folders, outcome)


def _convolutional(work: Work) -> _Network:
    folder, run = work.folder(_CONV), work.run_folder("mnist-conv-start-9")
    trained = work.options.conv
    if trained is None:
        outcome = work.do(
            _CONV, "run", run, "--stages", "train,predict,prune", "--quiet", *work.data(run), *_sweep(work),
            *work.scale.convolutional, "--out", str(folder), makes=[folder / "predictive.nc"],
        )  # fmt: skip
    else:
        _link(trained, folder)
        # It may be trained further meanwhile, and need not be complete.
        last = max((trained / "checkpoints").glob("step-*.safetensors")).stem
        outcome = work.do(
            _CONV, "run", str(folder), "--stages", "predict,prune", "--quiet", *work.data(run), *_sweep(work),
            *work.scale.convolutional_use, makes=[folder / "predictive.nc"], of=last,
        )  # fmt: skip
    return _Network(_described(folder), [folder], outcome)


def _link(trained: Path, folder: Path) -> None:
    """Give `folder` the settings and the checkpoints of another out folder, which stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.yaml").exists():
        shutil.copyfile(trained / "config.yaml", folder / "config.yaml")
    if not (folder / "checkpoints").exists():
        (folder / "checkpoints").symlink_to((trained / "checkpoints").resolve())


def _described(folder: Path) -> str:
    """The name of BNN-Conv with its start and how far it was trained."""
    if not (folder / "predictive.nc").exists():
        return "BNN-Conv"
    config = saved_config.read(folder / "config.yaml")
    start = round(math.log(math.expm1(config["guide"]["init_scale"])))
    history = netcdf.read_group(folder / "predictive.nc", "training")
    epochs = counted(0 if history is None else history.sizes["epoch"], "epoch")
    return f"BNN-Conv, start {start}, {epochs} of {counted(config['data']['num_train'] or 60_000, 'digit')}"


def _sweep(work: Work) -> list[str]:
    images = ["--pruning.keep_images", str(work.options.digits)] if work.options.digits else []
    return [
        "--predict.num_samples", str(work.scale.pruning_draws), "--pruning.num_samples", str(work.scale.pruning_draws),
        "--pruning.fractions", str(list(FRACTIONS)), *images,
    ]  # fmt: skip


def _rows(network: _Network, published: tuple[str, str, str], command: int) -> list[Row]:
    paths, outcome = network.pruned(), network.outcome
    levels = [found for path in paths if (found := netcdf.read_group(path, "pruning")) is not None]
    ours = _curve(levels) if levels else dict.fromkeys(("unchanged", "accuracy", "loss", "time"), MISSING)
    digits = f", {counted(levels[0].sizes['image'], 'test digit')}" if levels else ""
    what = f"{network.name}{digits}, {counted(len(network.folders), 'seed')}"
    trained_to = "; ".join(training_accuracy(path.parent) for path in paths) or MISSING
    return [
        Row(f"{what}: share pruned that leaves the accuracy unchanged", published[0], "section 4.6, figure 8",
            outcome.or_reason(ours["unchanged"]), command),
        Row(f"{what}: training accuracy", published[1], "section 4.6", outcome.or_reason(trained_to), command),
        Row(f"{what}: test accuracy at 0, 60, 80 and 95% pruned", "figure only", "figure 8",
            outcome.or_reason(ours["accuracy"]), command),
        Row(f"{what}: accuracy lost at 80% pruned, in points", "7.0%" if "FC" in what else "none",
            "abstract" if "FC" in what else "section 4.6", outcome.or_reason(ours["loss"]), command),
        Row(f"{what}: time of a draw, unpruned over 70% pruned", published[2], "section 4.6",
            outcome.or_reason(ours["time"]), command),
    ]  # fmt: skip


def _curve(levels: list[xr.Dataset]) -> Mapping[str, str]:
    accuracy = {
        fraction: float(np.mean([_at(each, fraction, "accuracy") for each in levels])) for fraction in FRACTIONS
    }
    whole, count = accuracy[0.0], sum(each.sizes["image"] for each in levels)
    least, flat = whole - 2 * math.sqrt(whole * (1 - whole) / count), 0.0
    for fraction in FRACTIONS:
        if accuracy[fraction] < least:
            break
        flat = fraction
    speed = np.mean([_at(each, 0.0, "seconds") / _at(each, 0.7, "seconds") for each in levels])
    return {
        "unchanged": f"{flat:.0%}",
        "accuracy": "; ".join(f"{accuracy[fraction]:.2%}" for fraction in (0.0, 0.6, 0.8, 0.95)),
        "loss": f"{100 * (whole - accuracy[0.8]):.2f}",
        "time": f"{speed:.2f}",
    }


def _at(levels: xr.Dataset, fraction: float, name: str) -> float:
    """A number of the level whose share of pruned weights is nearest to `fraction`."""
    place = int(np.abs(levels["pruned_fraction"].values - fraction).argmin())
    return float(levels[name].values[place])


def _scores(path: Path) -> str:
    if not path.exists():
        return MISSING
    attrs = netcdf.read_attrs(path)
    return f"{attrs['accuracy']:.2%}, {attrs['nll']:.3f} nats per datum, {attrs['ece']:.3f}"
