"""Networks of the user's own by import path: what they are given, and what they may return."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppl_bnn import Categorical, MeanFieldNormal, Model, bayesian, build
from ppl_bnn.errors import UserError
from ppl_bnn.models import parse_prior
from ppl_bnn.models.random_network import random_sites


class Two(nn.Module):
    def __init__(self, shapes, width=4, num_outputs=2):
        super().__init__()
        self.shapes = shapes
        self.left, self.right = nn.Linear(*shapes["left"], width), nn.Linear(*shapes["right"], width)
        self.out = nn.Linear(width, num_outputs)

    def forward(self, left, right):
        return self.out((self.left(left) + self.right(right)).relu())


def sized(width=4):
    return nn.Linear(width, 2)


def of_outputs(num_outputs):
    return nn.Linear(3, num_outputs)


def any_options(shape, **options):
    return nn.Linear(shape[0], options["units"])


def starred(*shape):
    return nn.Linear(*shape[0], 2)


def narrow(shape):
    return bayesian(nn.Linear(*shape, 2), dist.Normal(0.0, 0.1))


def site_prior(site, shape):
    return dist.Normal(0.0, 1.0 / shape[1])


def no_prior():
    return 3


def own(name):
    return f"{__name__}:{name}"


def test_a_network_of_several_inputs_gets_their_shapes():
    net = build(own("Two"), image_shape={"left": (3,), "right": (5,)}, num_outputs=6, options={"width": 7})
    assert net.shapes == {"left": (3,), "right": (5,)}
    assert {site: tuple(random.point.shape) for site, (_, random) in random_sites(net).items()} == {
        "left.weight": (7, 3), "right.weight": (7, 5), "out.weight": (6, 7),
    }  # fmt: skip
    x, y = {"left": torch.randn(4, 3), "right": torch.randn(4, 5)}, torch.tensor([0, 1, 2, 5])
    assert len(MeanFieldNormal(Model(net, Categorical(), 4), x, y).sites) == 3


@pytest.mark.parametrize(
    ("name", "given", "weight"),
    [
        ("sized", {}, (2, 4)),
        ("sized", {"options": {"width": 5}}, (2, 5)),
        ("of_outputs", {"num_outputs": 4}, (4, 3)),
        ("any_options", {"options": {"units": 6}}, (6, 8)),
        ("starred", {}, (2, 8)),
        ("narrow", {}, (2, 8)),
    ],
)
def test_what_a_function_is_given_follows_its_parameters(name, given, weight):
    net = build(own(name), image_shape=(8,), **given)
    assert {tuple(random.point.shape) for _, random in random_sites(net).values()} == {weight}


def test_options_stand_before_the_number_of_outputs_that_the_data_have():
    assert build("mlp", image_shape=(3,), num_outputs=2, options={"num_outputs": 5}).fc3.out_features == 5


def test_a_network_that_is_bayesian_already_keeps_its_prior():
    net = build(own("narrow"), image_shape=(8,))
    ((_, random),) = random_sites(net).values()
    torch.testing.assert_close(random.prior.stddev, torch.full((2, 8), 0.1))
    for given in ({"prior": dist.Normal(0.0, 1.0)}, {"deterministic": True}, {"bayesian_bias": True}):
        with pytest.raises(UserError, match="is Bayesian already, with priors of its own"):
            build(own("narrow"), image_shape=(8,), **given)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("Two", {"options": {"widht": 3}}, r"model.options has 'widht' \(did you mean width\?\)"),
        ("sized", {"options": {"depth": 3}}, "model.options has 'depth'.*, and .*:sized takes width"),
        ("any_options", {"options": {"unit": 3}}, r"any_options\(\(8,\), unit=3\) cannot be made: KeyError: 'units'"),
        ("no_prior", {}, "must be a torch.nn.Module or return one, got 3"),
    ],
)
def test_what_cannot_be_a_network_is_told_in_one_line(name, given, message):
    with pytest.raises(UserError, match=message):
        build(own(name), image_shape=(8,), **given)


@pytest.mark.parametrize(("name", "advice"), [("mlp", "takes one tensor"), ("lenet", "takes images of shape")])
def test_a_named_network_takes_one_tensor(name, advice):
    with pytest.raises(UserError, match=advice):
        build(name, image_shape=((3,), (1, 28, 28)))


@pytest.mark.parametrize(
    ("shape", "flat"), [((1, 28, 28), 800), ((3, 32, 32), 1250), ((1, 16, 16), 50), ((3, 20, 40), 700)]
)
def test_lenet_takes_images_of_any_size(shape, flat):
    net = build("lenet", image_shape=shape, num_outputs=3, deterministic=True)
    assert net.fc1.in_features == flat
    assert net(torch.zeros(2, *shape)).shape == (2, 3)


def test_the_image_networks_have_an_output_for_each_class():
    for name in ("resnet18", "vgg16"):
        assert build(name, image_shape=(1, 28, 28), num_outputs=3, deterministic=True).fc.out_features == 3


def test_a_prior_of_ones_own_by_its_import_path():
    prior = parse_prior({"out.*": own("site_prior"), "*": "normal(0, 1)"})
    net = build(own("Two"), image_shape={"left": (3,), "right": (5,)}, prior=prior)
    assert float(random_sites(net)["out.weight"][1].prior.stddev.max()) == pytest.approx(0.25)
    for text, message in (
        (own("no_prior"), "must return a distribution, a mapping or a function, got 3"),
        (own("missing"), "model.prior must be importable"),
        ('{fc1*:"normal(0, 1)"}', "is not understood; write one of .*, or the import path of your own"),
    ):
        with pytest.raises(UserError, match=message):
            parse_prior(text)
