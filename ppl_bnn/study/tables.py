"""Tables 1 to 6, the layers and parameters of the study's networks, and its "FLOP rates"."""

from functools import cache

import torch

from ppl_bnn.models import build, network_table, totals
from ppl_bnn.models.summary import Row as Layer
from ppl_bnn.study.page import Row, Section, Table
from ppl_bnn.study.published_layers import TABLES, PublishedLayer, PublishedTable
from ppl_bnn.study.work import Work

# Millions, section 4.2, by table.
_FLOP_RATES = {1: 573.87, 2: 18.84, 3: 299.02, 4: 9.82}


def tables(work: Work) -> Section:
    """Compare the parameters of the study's six networks with ours, layer by layer."""
    section = Section("Tables 1 to 6: the networks")
    for published in TABLES:
        rows = _ours(published)
        sums = totals(rows)
        section.commands.append(f"python -m ppl_bnn.run {work.run_folder(published.run)} --stages summary")
        section.rows += [
            Row(f"{published.caption}, {what} parameters", f"{theirs:,}", f"table {published.number}", f"{ours:,}",
                len(section.commands))
            for what, theirs, ours in (
                ("total", published.trainable + published.non_trainable, sums.parameters),
                ("trainable", published.trainable, sums.trainable),
                ("non-trainable", published.non_trainable, sums.non_trainable),
            )
        ]  # fmt: skip
        section.tables.append(_side_by_side(published, rows))
    section.notes = [
        "Section 3.1 speaks of 18 and 9 million trainable parameters, which are those of tables 1 and 3.",
        "Table 2 prints the shapes of the max pooling layers with the channels of the next block (16x16x128 for "
        "Max_I_0). Max pooling does not change channels; ours has 16x16x64.",
        "Table 4 prints the average pooling with its input's shape, 4x4x512. Its dense layer has 5,130 parameters, "
        "that is 512 inputs, so the pooling gives 1x1x512, as in table 3.",
        "Table 5 contradicts itself: the dense layer has 512,010 parameters, that is 25,600 inputs, but flatten gives "
        "2,560, and both convolutions 5x5 outputs. Ours has the 25,600 inputs: 10x10x256 after the second convolution.",
        "A random weight counts twice, as loc and scale. Biases and batch norm are point estimates, as in the study.",
    ]  # fmt: skip
    return section


def operations(work: Work) -> Section:
    """Set the operations of a forward pass beside the study's "FLOP rates"."""
    section = Section("FLOP rates (section 4.2)")
    for published in TABLES:
        if rate := _FLOP_RATES.get(published.number):
            count = totals(_ours(published)).multiply_adds
            parameters = published.trainable + published.non_trainable
            section.commands.append(f"python -m ppl_bnn.run {work.run_folder(published.run)} --stages summary")
            section.rows.append(
                Row(
                    published.caption,
                    f"{rate} million",
                    "section 4.2",
                    f"{count / 1e6:.1f} million multiply-adds a forward pass of an image; the study's number is "
                    f"{1e6 * rate / parameters:.2f} times the number of parameters",
                    len(section.commands),
                )
            )
    section.notes = [
        "The study's numbers are not operations of a forward pass: a convolution uses each weight at every position of "
        "the image. They are 2.00 times the parameters of both deterministic networks, and 30.5 times those of both "
        "Bayesian ones. So they look like counts of what is done once a parameter.",
        'So the study\'s "30x increase in the FLOP rate" (section 6) is a ratio of work on parameters. In operations '
        "of a pass, flipout costs twice the deterministic network, and plain, groups and IVON the same as it.",
    ]
    return section


@cache
def _ours(published: PublishedTable) -> list[Layer]:
    net = build(published.network, deterministic=published.deterministic)
    shape = (1, 28, 28) if published.network.startswith("bnn") else (3, 32, 32)
    return network_table(net, torch.zeros(1, *shape))


def _side_by_side(published: PublishedTable, rows: list[Layer]) -> Table:
    """Give each of our layers with parameters the study's row with as many: the first that no other layer has."""
    left = list(published.layers)
    branches = any(layer.connected_to for layer in left)
    lines: list[tuple[str, ...]] = [("layer (type)", "output shape", "param #", "the study's layer", "its param #")]
    if branches:
        lines = [(*lines[0], "connected to")]
    for row in rows:
        theirs = _first(left, row.parameters) if row.parameters else None
        if theirs is not None:
            left.remove(theirs)
        shape = "x".join(map(str, (*row.output_shape[1:], row.output_shape[0])))
        line: tuple[str, ...] = (f"{row.layer} ({row.kind})", shape, f"{row.parameters:,}")
        line += (theirs.layer, f"{theirs.parameters:,}") if theirs else ("", "")
        lines.append((*line, ", ".join(row.connected_to or ())) if branches else line)
    lines += [("none", "", "", layer.layer, f"{layer.parameters:,}") for layer in left if layer.parameters]
    return Table(f"Table {published.number}: {published.caption}", lines)


def _first(layers: list[PublishedLayer], parameters: int) -> PublishedLayer | None:
    return next((layer for layer in layers if layer.parameters == parameters), None)
