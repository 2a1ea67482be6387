import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.nn import functional as F

from ppl_bnn import Classifier, GaussianScaleMixture, KLScaledELBO, MeanFieldNormal, bayesian, build, fit
from ppl_bnn.models import layer_table, parse_prior, render_table

DIGITS = torch.zeros(2, 1, 28, 28)


def counts(net, x=DIGITS):
    rows = layer_table(net, x)
    trainable = sum(row.trainable for row in rows)
    return trainable + sum(row.non_trainable for row in rows), trainable


@pytest.mark.parametrize(
    ("name", "deterministic", "total"),
    [
        ("bnn-fc", False, 538_122),
        ("bnn-fc", True, 269_322),
        ("bnn-conv", False, 3_802_122),
        ("bnn-conv", True, 1_901_322),
        ("lenet", False, 861_580),
        ("lenet", True, 431_080),
    ],
)
def test_parameter_counts_are_the_studys(name, deterministic, total):
    net = build(name, deterministic=deterministic)
    assert counts(net) == (total, total)


@pytest.mark.parametrize(
    ("name", "deterministic", "total", "trainable"),
    [
        ("vgg16", False, 18_829_066, 18_823_178),
        ("vgg16", True, 9_421_898, 9_416_010),
        ("resnet18", False, 9_814_026, 9_810_058),
        ("resnet18", True, 4_912_458, 4_908_490),
    ],
)
def test_parameter_counts_of_the_large_networks_are_the_studys(name, deterministic, total, trainable):
    net = build(name, deterministic=deterministic)
    assert counts(net, torch.zeros(2, 3, 32, 32)) == (total, trainable)


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_digits_are_padded_to_32(name):
    net = build(name, image_shape=(1, 28, 28), deterministic=True).eval()
    padded = build(name, image_shape=(1, 32, 32), deterministic=True).eval()
    padded.load_state_dict(net.state_dict())
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(net(x), padded(nn.functional.pad(x, (2, 2, 2, 2))))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vgg16", (3, 64, 64), r"vgg16 takes images of shape \[C, 32, 32\] or \[C, 28, 28\], got \[3, 64, 64\]"),
        ("resnet18", (3, 28, 32), r"resnet18 takes images .*, got \[3, 28, 32\]"),
        ("bnn-fc", (3, 32, 32), r"bnn-fc takes images of shape \[1, 28, 28\], got \[3, 32, 32\]"),
        ("bnn-conv", (3, 28, 28), r"bnn-conv takes images"),
    ],
)
def test_images_that_do_not_fit_a_network(name, shape, message):
    with pytest.raises(ValueError, match=message):
        build(name, image_shape=shape)


@pytest.mark.parametrize("name", ["resnet18", "vgg11"])
def test_torchvisions_networks_become_bayesian_in_one_call(name):
    import torchvision

    net = getattr(torchvision.models, name)(num_classes=10)
    if name == "vgg11":
        # As for small images: its own head is made for 224x224 and holds 120 million weights.
        net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    shape = (2, 3, 32, 32)
    x, y = torch.rand(shape), torch.tensor([0, 1])
    bnn = bayesian(net, dist.Normal(0.0, 0.1))
    weights = {path for path, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    model = Classifier(bnn, 2)
    guide = MeanFieldNormal(model, x, y, init_loc=net.state_dict(), init_relative_scale=0.1)
    assert {site.removesuffix(".weight") for site in guide.sites} == weights
    conditioned = poutine.condition(bnn.eval(), data={site: guide.loc_scale(site)[0] for site in guide.sites})
    torch.testing.assert_close(conditioned(x), net.eval()(x))
    history = fit(model, guide, x, y, epochs=2, estimator="groups", progress=False)
    assert all(math.isfinite(row["loss"]) for row in history)


def test_multiply_adds_are_those_of_the_shapes():
    rows = layer_table(build("vgg16", deterministic=True), torch.zeros(1, 3, 32, 32))
    convolution = sum(
        9 * inputs * outputs * size * size
        for inputs, outputs, size in [
            (3, 64, 32), (64, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8), (256, 256, 8),
            (256, 512, 4), (512, 512, 4), (512, 512, 2), (512, 512, 2),
        ]
    )  # fmt: skip
    assert sum(row.multiply_adds for row in rows) == convolution + 5120
    strided = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Flatten(), nn.Linear(96, 5))
    assert [row.multiply_adds for row in layer_table(strided, torch.zeros(3, 4, 8, 8))] == [16 * 6 * 2 * 9, 0, 480]


def test_summary_shows_shapes_and_totals():
    text = render_table(layer_table(build("bnn-conv"), DIGITS))
    assert "256 x 10 x 10" in text
    assert "3,802,122" in text
    assert "Non-trainable parameters:" in text


def test_batch_norm_counts_four_a_channel_two_not_trainable():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
    assert counts(net) == (8 * 9 + 8 + 32, 8 * 9 + 8 + 16)
    assert counts(bayesian(net)) == (2 * 8 * 9 + 8 + 32, 2 * 8 * 9 + 8 + 16)


def test_a_conditioned_bnn_is_its_twin():
    twin = build("bnn-conv", deterministic=True)
    net = bayesian(twin)
    x = torch.rand(3, 1, 28, 28)
    weights = {name: value for name, value in twin.state_dict().items() if name.endswith("weight")}
    with poutine.condition(data=weights):
        torch.testing.assert_close(net(x), twin(x))


def test_sites_are_module_paths():
    trace = poutine.trace(build("bnn-fc")).get_trace(DIGITS)
    assert trace.stochastic_nodes == ["fc1.weight", "fc2.weight", "fc3.weight"]
    trace = poutine.trace(build("bnn-fc", bayesian_bias=True)).get_trace(DIGITS)
    assert "fc2.bias" in trace.stochastic_nodes


def test_layers_stand_alone():
    linear = bayesian(nn.Linear(3, 2), dist.Laplace(0.0, 1.0))
    assert poutine.trace(linear).get_trace(torch.zeros(1, 3)).nodes["weight"]["fn"].event_shape == (2, 3)
    conv = bayesian(nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False, padding_mode="reflect"))
    assert conv(torch.zeros(2, 1, 8, 8)).shape == (2, 4, 4, 4)


def test_conversion_keeps_the_original_and_the_settings():
    twin = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=1, groups=2), nn.Flatten(), nn.Linear(36, 3))
    net = bayesian(twin)
    assert type(twin[0]) is nn.Conv2d
    x = torch.rand(2, 2, 6, 6)
    weights = {"0.weight": twin[0].weight, "2.weight": twin[2].weight}
    with poutine.condition(data=weights):
        torch.testing.assert_close(net(x), twin(x))


def test_a_layer_used_twice_has_one_draw():
    shared = nn.Linear(3, 3)
    net = bayesian(nn.Sequential(shared, nn.ReLU(), shared))
    trace = poutine.trace(net).get_trace(torch.ones(1, 3))
    assert trace.stochastic_nodes == ["0.weight"]
    weight = trace.nodes["0.weight"]["value"]
    hidden = torch.nn.functional.linear(torch.ones(1, 3), weight, shared.bias).relu()
    expected = torch.nn.functional.linear(hidden, weight, shared.bias)
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], expected)


def test_conversion_refuses_a_network_without_weights():
    with pytest.raises(ValueError, match=r"Sequential has no parameter to make random"):
        bayesian(nn.Sequential(nn.ReLU()))


def test_prior_forms():
    narrow, wide = dist.Normal(0.0, 0.1), dist.Normal(0.0, 1.0)

    def scale(net, site):
        return poutine.trace(net).get_trace(DIGITS).nodes[site]["fn"].base_dist.base_dist.scale.item()

    assert scale(build("bnn-fc", prior=narrow), "fc1.weight") == pytest.approx(0.1)
    by_pattern = build("bnn-fc", prior={"fc1.*": narrow, "*": wide})
    assert scale(by_pattern, "fc1.weight") == pytest.approx(0.1)
    assert scale(by_pattern, "fc3.weight") == 1.0
    by_function = build("bnn-fc", prior=lambda site, shape: dist.Normal(0.0, float(shape[1]) ** -0.5))
    assert scale(by_function, "fc1.weight") == pytest.approx(1 / 28)


def test_priors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"fc2.weight.*has shape \[3\]"):
        build("bnn-fc", prior={"fc2.*": dist.Normal(torch.zeros(3), 1.0), "*": dist.Normal(0.0, 1.0)})
    with pytest.raises(ValueError, match="matches none of the patterns"):
        bayesian(build("bnn-fc", deterministic=True), {"fc1.*": dist.Normal(0.0, 1.0)}, select="fc?.weight")
    with pytest.raises(ValueError, match=r"'conv.*' matches no parameter"):
        build("bnn-fc", prior={"conv.*": dist.Normal(0.0, 1.0), "*": dist.Normal(0.0, 1.0)})
    with pytest.raises(ValueError, match="prior over all real numbers"):
        build("bnn-fc", prior=dist.HalfNormal(1.0))
    with pytest.raises(ValueError, match="must be a Pyro distribution"):
        build("bnn-fc", prior=lambda site, shape: 1.0)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("normal(0, 0.1)", dist.Normal),
        ("laplace(0, 1)", dist.Laplace),
        ("student_t(2, 0, 1e-2)", dist.StudentT),
        ("scale_mixture(0.5, 1, 0.0025)", GaussianScaleMixture),
    ],
)
def test_priors_as_configurations_write_them(text, kind):
    assert isinstance(parse_prior(text), kind)
    assert isinstance(parse_prior({"*": text})["*"], kind)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gauss(0, 1)", "write one of"),
        ("normal", "write one of"),
        ("normal(0, one)", "not a number"),
        ("normal(0)", "1 arguments"),
        ("normal(0, -1)", "outside its family's range"),
        ("normal(0, inf)", "not finite"),
        ("scale_mixture(2, 1, 1)", "outside its family's range"),
    ],
)
def test_priors_that_are_not_understood(text, message):
    with pytest.raises(ValueError, match=message):
        parse_prior(text)


def test_scale_mixture_is_torchs_mixture():
    ours = GaussianScaleMixture(0.3, 1.0, 0.05)
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(torch.zeros(2), torch.tensor([1.0, 0.05]))
    )
    at = torch.linspace(-3, 3, 61)
    torch.testing.assert_close(ours.log_prob(at), mixture.log_prob(at))
    sample = ours.sample((200_000,))
    variance = 0.3 * 1.0 + 0.7 * 0.05**2
    # The variance of the sample variance, from the mixture's fourth moment.
    deviation = ((3 * (0.3 + 0.7 * 0.05**4) - variance**2) / len(sample)) ** 0.5
    assert abs(sample.var().item() - variance) < 5 * deviation


def test_priors_follow_dtype():
    net = build("bnn-fc", prior=dist.Normal(0.0, 0.1)).double()
    trace = poutine.trace(net).get_trace(DIGITS.double())
    assert trace.nodes["fc1.weight"]["value"].dtype == torch.float64
    assert trace.nodes["fc1.weight"]["fn"].base_dist.base_dist.scale.dtype == torch.float64


def test_the_classifier_scales_the_likelihood_and_nothing_else():
    model = Classifier(build("bnn-fc"), num_data=1000)
    trace = poutine.trace(model).get_trace(torch.rand(10, 1, 28, 28), torch.zeros(10, dtype=torch.long))
    assert trace.nodes["y"]["scale"] == 100
    assert trace.nodes["fc1.weight"]["scale"] == 1
    with pytest.raises(ValueError, match="num_data"):
        Classifier(build("bnn-fc"), 0)


def test_the_likelihood_of_layers_in_half_precision_keeps_its_digits():
    net = build("bnn-fc", deterministic=True)
    with torch.no_grad():
        net.fc3.weight.mul_(50)
    x, y = torch.rand(200, 1, 28, 28), torch.arange(200) % 10
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
        elbo = KLScaledELBO(200)
        elbo.loss(Classifier(net, 200), lambda *_: None, x, y)
    assert logits.dtype == torch.bfloat16
    assert elbo.terms.nll == pytest.approx(F.cross_entropy(logits.double(), y).item(), rel=1e-6)


def test_pyro_draws_from_the_model():
    model = Classifier(build("bnn-fc", prior=dist.Normal(0.0, 0.1)), num_data=5)
    draws = pyro.infer.Predictive(model, num_samples=7)(torch.rand(5, 1, 28, 28))
    assert draws["y"].shape == (7, 5)
    assert draws["fc1.weight"].shape[0] == 7


def test_unknown_network():
    with pytest.raises(ValueError, match=r"the network must be one of bnn-fc, bnn-conv, .*; got 'alexnet'"):
        build("alexnet")
