"""Section 3.2's cycle time, figure 6 (the 0.1M digits at two batches) and figure 7 (GPUs)."""

import torch

from ppl_bnn.scaling.launch import checked_launcher
from ppl_bnn.study.page import Row, Section
from ppl_bnn.study.timings import ALONE, Timings, on_ranks, text, timed
from ppl_bnn.study.work import MISSING, Work

_DIGITS = "digits100k-vgg16"


def cycle_time(work: Work) -> Section:
    """Sweep Horovod's cycle time and fusion buffer."""
    scale, network = work.scale, "cifar10-vgg16"
    section, ranks = Section("Section 3.2: cycle time and fusion buffer"), max(work.ranks)
    published = "5 ms and 64 MB are optimal, no numbers"
    if ranks == 1 or checked_launcher(work.options.launcher) == "torch":
        why = ALONE if ranks == 1 else f"{MISSING}: torchrun has no such settings, Horovod has"
        section.rows = [Row("VGG: samples a second by cycle time", published, "section 3.2", why, None)]
        return section
    outcome = timed(
        work, "cycle-time", [network], "--batches", str(scale.batch), "--steps", str(scale.steps),
        "--cycle_ms", *(f"{cycle:g}" for cycle in scale.cycles), "--fusion_mb", f"{scale.fusion:g}",
        ranks=[ranks],
    )  # fmt: skip
    section.commands, table = [outcome.command], Timings(work, "cycle-time")
    for cycle in scale.cycles:
        found = table.pair("samples_per_second", network, ranks, cycle_ms=cycle)
        section.rows.append(
            Row(f"VGG: samples a second, BNN; CNN, cycle {cycle:g} ms, buffer {scale.fusion:g} MB, {on_ranks(ranks)}",
                published, "section 3.2", outcome.or_reason(found))
        )  # fmt: skip
    section.notes = [
        "In the study, Horovod collects tensors that are ready on all ranks, in groups, and sends the complete groups "
        "of a cycle together, as far as they fit in the fusion buffer. Here back-propagation fills buckets in an order "
        "that is the same on all ranks, and each full bucket is one allreduce. So a step negotiates a few messages "
        "and not a thousand, no rank can stall for the order, and the cycle time is nearly all that is left to tune.",
    ]
    return section


def batches(work: Work) -> Section:
    """Figure 6: throughput and time of 12 epochs at batches 512 and 1024."""
    scale = work.scale
    section = Section("Figure 6: 0.1 million digits, batch 512 and 1024")
    outcome = timed(
        work, "figure-6", [_DIGITS], "--batches", *map(str, scale.digit_batches), "--steps", str(scale.digit_steps),
    )  # fmt: skip
    section.commands, table = [outcome.command], Timings(work, "figure-6")
    small, large = scale.digit_batches
    for ranks in work.ranks:
        for column, what, published, source in (
            ("samples_per_second", "samples a second", "+5% to +12%; little", "section 4.4, figure 6a, b"),
            ("fixed_epochs_seconds", "time of 12 epochs", "16 nodes: about -10%; -10%", "section 4.4, figure 6c"),
        ):
            change = [
                table.value(column, _DIGITS + twin, ranks, batch=large)
                / table.value(column, _DIGITS + twin, ranks, batch=small) - 1
                for twin in ("", "-cnn")
            ]  # fmt: skip
            section.rows.append(
                Row(f"{what}, batch {large} against {small}, BNN; CNN, {on_ranks(ranks)}", published, source,
                    outcome.or_reason("; ".join(text(100 * value, "{:+.0f}%") for value in change)))
            )  # fmt: skip
        section.rows += [
            Row(f"efficiency T1 / TN, batch {batch}, BNN; CNN, {on_ranks(ranks)}", "figure only", "figure 6d",
                outcome.or_reason(table.pair("efficiency", _DIGITS, ranks, "{:.2f}", batch=batch)))
            for batch in scale.digit_batches if ranks > 1
        ]  # fmt: skip
    section.figures = work.figures(
        "figure-6", {"batch": "Figure 6a, b: samples a second by batch", "efficiency": "Figure 6d: efficiency"}
    )
    section.notes = [
        "The study made its digits with infimnist (Bottou et al.). Ours are deformed by random fields of our own with "
        "the same indexing, so they are like the study's digits but not the same.",
        "The time of 12 epochs is extrapolated from the timed steps.",
    ]
    return section


_PUBLISHED = (
    ("samples a second, 8 GPUs over 8 CPU nodes, BNN; CNN", "about 29; 18.2"),
    ("time of 12 epochs, 1 CPU node over 1 GPU, BNN", "about 10"),
    ("time of 12 epochs, 8 CPU nodes over 8 GPUs, BNN", "about 11"),
    ("seconds of 12 epochs, 8 GPUs, BNN; CNN", "56.21; 22.51"),
    ("seconds of 12 epochs, 8 CPU nodes, BNN; CNN", "641.79; 387.58"),
    ("time of 12 epochs, 128 CPU nodes over 8 GPUs, BNN", "1.67"),
    ("CPU nodes with the samples a second of 4 GPUs, BNN; CNN", "nearly 128; nearly 128"),
    ("samples a second, 8 GPUs, batch 512, BNN; CNN", "about 42,000; 46,000"),
)


def gpus(work: Work) -> Section:
    """Figure 7: GPUs beside CPUs, where there is a GPU."""
    scale, section = work.scale, Section("Figure 7: GPU beside CPU")
    source = "section 4.5"
    if not torch.cuda.is_available():
        section.rows = [Row(what, published, source, "no GPU", None) for what, published in _PUBLISHED]
        return section
    ranks = [number for number in (1, 2, 4, 8) if number <= torch.cuda.device_count()]
    outcome = timed(
        work, "figure-7", [_DIGITS], "--batches", str(scale.digit_batches[0]), "--steps", str(scale.digit_steps),
        "--devices", "cpu", "cuda", ranks=ranks,
    )  # fmt: skip
    section.commands, table = [outcome.command], Timings(work, "figure-7")
    section.rows = [Row(what, published, source, "see below", None) for what, published in _PUBLISHED]
    for number in ranks:
        for column, what in (
            ("samples_per_second", "samples a second"),
            ("fixed_epochs_seconds", "seconds of 12 epochs"),
        ):
            for device in ("cpu", "cuda"):
                section.rows.append(
                    Row(f"{what}, {device}, BNN; CNN, {on_ranks(number)}", "see above", source,
                        outcome.or_reason(table.pair(column, _DIGITS, number, device=device)))
                )  # fmt: skip
    section.figures = work.figures("figure-7", {"device": "Figure 7: samples a second by device"})
    section.notes = [f"The GPU here is {torch.cuda.get_device_name(0)}; the study had V100s beside nodes of Xeon Phi."]
    return section
