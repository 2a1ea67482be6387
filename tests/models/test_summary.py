"""The layer table with connections: the rows, columns and totals of the study's tables 1 to 6."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ppl_bnn import bayesian, build
from ppl_bnn.models import layer_table, network_table, render_table, totals

IMAGES = {"vgg16": (3, 32, 32), "resnet18": (3, 32, 32), "bnn-conv": (1, 28, 28), "bnn-fc": (1, 28, 28)}
# The study's parameter counts by row, in the order of its tables 1 and 3; an activation, pool or addition has 0.
VGG = [
    0, 3520, 256, 0, 73792, 256, 0, 0, 147584, 512, 0, 295040, 512, 0, 0, 590080, 1024, 0, 1179904, 1024, 0, 0, 2359808,
    2048, 0, 4719104, 2048, 0, 0, 4719104, 2048, 0, 4719104, 2048, 0, 0, 0, 10250,
]  # fmt: skip
RESNET = [
    0, 3520, 256, 0, 73792, 256, 0, 73792, 8256, 0, 256, 0, 147584, 512, 0, 295040, 16512, 0, 512, 0, 590080, 1024, 0,
    1179904, 65792, 0, 1024, 0, 2359808, 2048, 0, 4719104, 262656, 0, 2048, 0, 0, 0, 10250,
]  # fmt: skip


def table(name, **how):
    return network_table(build(name, **how), torch.zeros(1, *IMAGES[name]))


@pytest.mark.parametrize(
    ("name", "counts", "sums"),
    [("vgg16", VGG, (18_829_066, 18_823_178, 5_888)), ("resnet18", RESNET, (9_814_026, 9_810_058, 3_968))],
)
def test_each_row_has_the_studys_parameters(name, counts, sums):
    rows = table(name)
    assert [row.parameters for row in rows] == counts
    found = totals(rows)
    assert (found.parameters, found.trainable, found.non_trainable) == sums


def test_resnets_connections_are_the_studys():
    rows = {row.layer: row for row in table("resnet18", deterministic=True)}
    assert rows["input"].output_shape == (3, 32, 32)
    assert rows["input"].connected_to == ()
    assert rows["stem"].connected_to == ("input",)
    # Table 4: conv2d_1 and Conv_block_I_1 take activation_2, and add_1 takes Conv_block_II_1 and conv2d_1.
    assert rows["block2.conv1"].connected_to == rows["block2.shortcut"].connected_to == ("block1.relu_1",)
    assert rows["block2.add"].connected_to == ("block2.conv2", "block2.shortcut")
    assert (rows["block2.add"].kind, rows["block2.add"].output_shape) == ("Add", (128, 16, 16))
    assert rows["block2.norm2"].connected_to == ("block2.add",)
    assert rows["fc"].connected_to == ("flatten",)


@pytest.mark.parametrize("name", IMAGES)
def test_the_rows_of_modules_are_those_of_the_layer_table(name):
    net, x = build(name), torch.zeros(1, *IMAGES[name])
    plain = layer_table(net, x)
    assert all(row.connected_to is None for row in plain)
    found = {row.layer: row for row in network_table(net, x)}
    for row in plain:
        assert (found[row.layer].kind, found[row.layer].output_shape) == (row.kind, row.output_shape)
    assert totals(list(found.values())) == totals(plain)


def test_connections_are_shown_where_the_network_branches():
    text = render_table(table("resnet18"))
    assert text.splitlines()[0].split("  ")[0] == "Layer (type)"
    for part in ("Output Shape", "Param #", "Connected to", "block1.conv2, block1.shortcut", "9,814,026"):
        assert part in text
    for name in ("vgg16", "bnn-conv", "bnn-fc"):
        text = render_table(table(name))
        assert "Connected to" not in text
        assert "input (Input)" in text
    for part in ("Total parameters:", "Trainable parameters:", "Non-trainable parameters:"):
        assert part in text


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = x.flatten(1)
        one = self.one(x)
        one += x
        return self.three(torch.cat([F.gelu(one), self.two(x) * self.scale], 1))


def test_functions_of_the_networks_own_are_rows_and_a_container_takes_what_its_last_layer_gave():
    rows = network_table(bayesian(Branching()), torch.zeros(2, 2, 2))
    assert [(row.layer, row.kind, row.connected_to) for row in rows] == [
        ("input", "Input", ()),
        ("flatten", "Flatten", ("input",)),
        ("one", "BayesianLinear", ("flatten",)),
        ("add", "Add", ("one", "flatten")),
        ("gelu", "GELU", ("add",)),
        ("two", "BayesianLinear", ("flatten",)),
        ("mul", "Mul", ("two",)),
        ("concatenate", "Concatenate", ("gelu", "mul")),
        ("three", "BayesianLinear", ("concatenate",)),
        ("Branching", "Branching", ("three",)),
    ]
    assert rows[-1].trainable == 4


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.two(torch.from_numpy(2 * self.one(F.relu(x)).numpy()))


def test_a_network_that_cannot_be_followed_has_no_connections():
    rows = network_table(Untraceable(), torch.zeros(1, 4))
    assert [row.layer for row in rows] == ["input", "one", "two"]
    assert all(row.connected_to is None for row in rows)
    assert "Connected to" not in render_table(rows)


def test_a_table_changes_nothing():
    net = build("resnet18", deterministic=True)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    network_table(net, torch.rand(2, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
