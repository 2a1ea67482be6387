import pytest
import torch
from pyro import poutine
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, build
from ppl_bnn.prediction.plain import NotTraceable, plain

SHAPES = {
    "bnn-fc": (1, 28, 28),
    "bnn-conv": (1, 28, 28),
    "lenet": (1, 28, 28),
    "vgg16": (3, 32, 32),
    "resnet18": (3, 32, 32),
}


def disturb_batch_norm(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.add_(torch.rand_like(tensor))


def conditioned(net, guide, x):
    """The network by Pyro with the guide's draw, and by `plain` with the same draw."""
    draw = guide.draw(3, seed=1)
    with torch.no_grad(), poutine.condition(data=draw):
        expected = net.eval()(x)
    found = plain(net)
    for site, weight in draw.items():
        found.parameter(site).copy_(found.place(site, weight, torch.zeros_like(weight))[0])
    return expected, found


@pytest.mark.parametrize("name", SHAPES)
def test_the_plain_network_computes_the_same(name):
    net = build(name, bayesian_bias=name == "vgg16")
    disturb_batch_norm(net)
    x = torch.rand(2, *SHAPES[name])
    guide = MeanFieldNormal(Classifier(net, 2), x, torch.zeros(2, dtype=torch.long), init_loc="he")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    expected, found = conditioned(net, guide, x)
    torch.testing.assert_close(found.net(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    # ResNet's second norm of a block follows a sum, so it stays; every other one is gone.
    norms = [path for path, module in found.net.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms == ([f"block{at}.norm2" for at in range(1, 5)] if name == "resnet18" else [])
    assert {type(module).__module__.split(".")[0] for module in found.net.modules()} == {"torch"}
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_scales_are_folded_with_the_weights():
    net = bayesian(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    disturb_batch_norm(net)
    net[1].weight.data[0] = -0.5
    x = torch.rand(2, 1, 8, 8)
    guide = MeanFieldNormal(net, x)
    found = plain(net)
    with torch.no_grad():
        loc, scale = found.place("0.weight", *guide.loc_scale("0.weight"))
    assert (scale > 0).all()
    draws = torch.stack([found.place("0.weight", *[guide.draw(s)["0.weight"]] * 2)[0] for s in range(4000)])
    torch.testing.assert_close(draws.std(0), scale, rtol=0.06, atol=0)
    torch.testing.assert_close(draws.mean(0), loc, rtol=0, atol=0.06 * float(scale.max()))


def test_a_deterministic_network_is_its_own_plain_network():
    net = build("resnet18", deterministic=True).eval()
    disturb_batch_norm(net)
    x = torch.rand(2, 3, 32, 32)
    found = plain(net)
    assert found.folded == {}
    with torch.no_grad():
        torch.testing.assert_close(found.net(x), net(x), rtol=1e-4, atol=1e-4)


def test_a_layer_used_twice_keeps_its_batch_norm():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.linear(x)) + self.linear(x)

    net = Twice().eval()
    x = torch.rand(5, 3)
    with torch.no_grad():
        torch.testing.assert_close(plain(net).net(x), net(x))


def test_a_forward_pass_that_depends_on_values_is_refused():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x) if x.sum() > 0 else x

    with pytest.raises(NotTraceable, match="Branches has no fixed graph"):
        plain(bayesian(Branches()))


def test_the_graph_is_that_of_evaluation_whatever_the_mode():
    class Dropout(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return nn.functional.dropout(self.linear(x), 0.5, self.training)

    net = Dropout().train()
    x = torch.rand(5, 3)
    with torch.no_grad():
        torch.testing.assert_close(plain(net).net(x), net.linear(x))
    assert net.training


def test_batch_norm_over_points_is_not_taken_for_one_over_features():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5)).eval()
    net[1].running_mean.add_(0.3)
    x = torch.rand(2, 5, 3)
    with torch.no_grad():
        torch.testing.assert_close(plain(net).net(x), net(x))
    # With as many points as features only the input tells.
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    with pytest.raises(ValueError, match=r"sees \[2, 4, 3\], of which BatchNorm1d has dimension 1"):
        plain(net).net(x[:, :4])


def test_a_layer_without_point_estimates_has_its_priors_dtype():
    net = bayesian(nn.Sequential(nn.Linear(3, 4, bias=False)).double())
    assert plain(net).net.get_parameter("0.weight").dtype == torch.float64
