"""Figures 3c, 4 and 5: whole trainings on CIFAR-10, the time to an accuracy, and densities of the softmax."""

import math
from pathlib import Path

import xarray as xr

from ppl_bnn.results import netcdf
from ppl_bnn.scaling.point import Setting
from ppl_bnn.study.page import Row, Section
from ppl_bnn.study.timings import Timings, counted, on_ranks, text, timed, training_accuracy
from ppl_bnn.study.work import MISSING, Outcome, Work

_VGG, _RESNET = "cifar10-vgg16", "cifar10-resnet18"
_ACCURACIES = (0.4, 0.6)
_PUBLISHED = {(0.6, 2): "7.57", (0.4, 2): "7.14", (0.6, 16): "2.76", (0.4, 16): "1.99"}


def time_to_accuracy(work: Work) -> Section:
    """Figure 3c: seconds to training accuracies 0.4 and 0.6, by number of ranks."""
    section, outcome = Section("Figure 3c: time to a training accuracy"), _trained(work)
    section.commands, table = [outcome.command], Timings(work, "trainings")
    for ranks in work.ranks:
        for accuracy in _ACCURACIES:
            seconds = [_seconds_to(accuracy, table.row(run, ranks)) for run in (_VGG, f"{_VGG}-cnn")]
            ratio = (seconds[0] or math.nan) / (seconds[1] or math.nan)
            each = "; ".join(
                MISSING if value is None else f"{value:,.0f} s" if math.isfinite(value) else "not reached"
                for value in seconds
            )
            ours = f"{ratio:.2f} ({each})" if math.isfinite(ratio) else each
            section.rows.append(
                Row(f"VGG: time to {accuracy}, BNN over CNN, {on_ranks(ranks)}",
                    _PUBLISHED.get((accuracy, ranks), "figure only"), "section 4.2, figure 3c", outcome.or_reason(ours))
            )  # fmt: skip
    section.figures = work.figures(
        "trainings", {"time_to_accuracy": "Figure 3c: seconds to training accuracies 0.4 and 0.6"}
    )
    section.notes = [
        "The accuracy is that of the last steps together, so the time is that of a step and not of an epoch.",
        f"Our trainings have {counted(work.scale.large_epochs, 'epoch')} and the settings in the command. The study "
        "trained for 64 epochs on all of CIFAR-10.",
    ]
    return section


def draw_counts(work: Work) -> Section:
    """Figure 4: the softmax of class 2 for one image of class 2 by number of draws, and the time of 10 and 1000."""
    scale, section = work.scale, Section("Figure 4: density by number of draws, and their time")
    section.commands.append(_trained(work).command)
    ranks = dict.fromkeys((min(work.ranks), max(work.ranks)))
    files, names = [], []
    for number in ranks:
        folder, what = _point(work, number), f"trained on {on_ranks(number)}"
        few = _predicted(work, f"draws-few-{number}", folder, scale.few_draws, after=["trainings"])
        # The draws of the first are kept, so its time is read before.
        many = _predicted(work, f"draws-{number}", folder, scale.draws, after=["trainings", f"draws-few-{number}"])
        section.commands += [few.command, many.command]
        seconds, total, at = few.found, many.found, len(section.commands)
        section.rows += [
            Row(f"training accuracy, {what}", "0.923 (text), 0.91 (caption)" if number == 1 else "0.64 (16 nodes)",
                "section 4.3, figure 4", training_accuracy(folder)),
            Row(f"seconds of {scale.few_draws} and of {scale.draws} draws, {what}",
                "152.4; 2861.0 (10 and 1000 draws)", "section 4.3",
                many.or_reason(f"{text(seconds, '{:.1f}')}; {text(total, '{:.1f}')}"), at),
            Row(f"time of {scale.few_draws} draws over {scale.draws}, {what}", "about 5%", "section 4.3",
                many.or_reason(text(seconds / total, "{:.1%}")), at),
        ]  # fmt: skip
        if many.reason is None:
            files.append(folder / "predictive.nc")
            names.append(what)
    section.rows.append(
        Row(
            "time of 1000 draws over 400", "2.5", "section 4.6", "2.5 by number: each draw is one pass; not timed", None
        )
    )
    if files:
        from ppl_bnn.results.figures.draw_counts import compare_draw_counts

        path = work.out / "figures" / "figure-4.png"
        compare_draw_counts(files, path, names=names, image=work.options.cifar_image)
        section.figures.append(("Figure 4: density of the true class's softmax by number of draws", path))
    section.notes = [
        f"Our times are of {scale.test_images} test images; the study does not say how many its times are of.",
        "Each draw costs the same, so without a start-up the ratio would be 1%: the study's 10 draws paid mostly for "
        "the start.",
        "The study finds 400 draws enough by eye. Here predict.tolerance stops an image's draws when its probabilities "
        "are known closely enough.",
    ]
    return section


def classes(work: Work) -> Section:
    """Figure 5: the softmax of the true class for an image of each class, VGG-16 and ResNet-18."""
    scale, section = work.scale, Section("Figure 5: one image of each class, two networks")
    ranks = min(work.ranks)
    trained = [_trained(work), _trained_resnet(work)]
    folders = [_point(work, ranks), work.folder("resnet18")]
    outcomes = [
        # More draws than asked for, as figure 4 has them: the figure takes the first.
        _predicted(work, f"draws-{ranks}", folders[0], scale.draws, after=["trainings", f"draws-few-{ranks}"]),
        _predicted(work, "classes-resnet18", folders[1], scale.class_draws, after=["resnet18"]),
    ]
    section.commands = [outcome.command for pair in zip(trained, outcomes, strict=True) for outcome in pair]
    for place, (name, published) in enumerate((("VGG", "0.923"), ("ResNet", "0.942"))):
        section.rows.append(
            Row(f"{name}: training accuracy", published, "section 4.3",
                outcomes[place].or_reason(training_accuracy(folders[place])), 1 + 2 * place)
        )  # fmt: skip
    if not any(outcome.reason for outcome in outcomes):
        from ppl_bnn.results.figures.densities import compare_densities

        path = work.out / "figures" / "figure-5.png"
        files = [folder / "predictive.nc" for folder in folders]
        compare_densities(files[0], files[1], path, images=work.options.cifar_images, num_samples=scale.class_draws)
        section.figures.append((f"Figure 5: density of the true class's softmax over {scale.class_draws} draws", path))
    section.notes = [
        "The study does not say which test images it shows. --cifar_images chooses ours; by default they are those "
        "that the two networks are least certain about.",
    ]
    return section


def _seconds_to(accuracy: float, row: xr.Dataset | None) -> float | None:
    return None if row is None else float(row["seconds_to_accuracy"].sel(accuracy=accuracy))


def _trained(work: Work) -> Outcome:
    scale = work.scale
    return timed(
        work, "trainings", [_VGG], "--batches", str(scale.large_batch), "--epochs", str(scale.large_epochs),
        "--accuracy", *map(str, _ACCURACIES), settings=scale.large,
    )  # fmt: skip


def _trained_resnet(work: Work) -> Outcome:
    scale = work.scale
    return work.do(
        "resnet18", "run", work.run_folder(_RESNET), "--stages", "train", "--quiet", *work.data(_RESNET),
        "--train.batch_size", str(scale.large_batch), "--train.epochs", str(scale.large_epochs), *scale.large,
        "--out", str(work.folder("resnet18")), makes=[work.folder("resnet18") / "checkpoints"],
    )  # fmt: skip


def _point(work: Work, ranks: int) -> Path:
    point = Setting(work.run_folder(_VGG), "cpu", work.scale.large_batch, ranks)
    return work.folder("trainings") / "points" / point.name


def _predicted(work: Work, name: str, folder: Path, draws: int, *, after: list[str]) -> Outcome:
    # An out folder reloads its training by itself.
    return work.do(
        name, "run", str(folder), "--stages", "predict", "--quiet", "--data.num_test", str(work.scale.test_images),
        "--predict.num_samples", str(draws), "--predict.method", "draws", after=after, makes=[folder / "predictive.nc"],
        read=lambda: float(netcdf.read_attrs(folder / "predictive.nc")["seconds"]),
    )  # fmt: skip
