"""Batch norm by each draw's own statistics: the draws, what stays as it is, and what it is not for."""

import copy
import re

import pytest
import torch
from refusals import assert_refused
from run_folders import written
from small_posteriors import Y, convolutional, dense, residual
from torch import nn

from ppl_bnn import MeanFieldNormal, predict, predictor, prune
from ppl_bnn.prediction.norm_statistics import own_statistics
from ppl_bnn.prediction.predictive import draw_outputs

K = torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(7)) * 2 + 1


def by_hand(net, guide, x, num_samples, sign=1):
    """Logits of the draws, batch norm written out."""
    for index in range(num_samples):
        draw = {site: loc + sign * (value - loc) for site, value, loc in _draws(guide, index)}
        bias = [net[layer]._parameters["bias"] for layer in (0, 4, 6)]

        def hidden(images, draw=draw, bias=bias):
            return nn.functional.conv2d(images, draw["0.weight"], bias[0])

        with torch.no_grad():
            seen = hidden(K)
            mean = seen.mean((0, 2, 3), keepdim=True)
            variance = seen.var((0, 2, 3), keepdim=True)
            norm = (hidden(x) - mean) / (variance + net[1].eps).sqrt()
            h = norm * net[1].weight.view(1, -1, 1, 1) + net[1].bias.view(1, -1, 1, 1)
            h = nn.functional.linear(h.relu().flatten(1), draw["4.weight"], bias[1]).relu()
            yield nn.functional.linear(h, draw["6.weight"], bias[2])


def _draws(guide, index):
    return [(site, value, guide.loc_scale(site)[0].detach()) for site, value in guide.draw(index, seed=3).items()]


@pytest.mark.parametrize("pruned", [False, True])
def test_each_draw_is_normalized_by_its_own_statistics(pruned):
    net, guide, x = convolutional()
    guide = prune(guide, fraction=0.5).guide if pruned else guide
    state = copy.deepcopy(net.state_dict())
    found = list(draw_outputs(net, guide, x, num_samples=3, seed=3, batch_size=4, norm_inputs=K))
    for logits, expected in zip(found, by_hand(net, guide, x, 3), strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    # Not what the running averages give, and these are not touched.
    for logits, other in zip(found, draw_outputs(net, guide, x, num_samples=3, seed=3), strict=True):
        assert (logits - other).abs().max() > 0.01
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_predict_has_the_same_draws_one_by_one_added_to_and_mirrored():
    net, guide, x = convolutional()
    how = {"seed": 3, "norm_inputs": K, "progress": False}
    whole = predict(net, guide, x, Y[:6], num_samples=3, **how)
    expected = torch.stack(list(by_hand(net, guide, x, 3))).softmax(-1)
    torch.testing.assert_close(whole.probs, expected, rtol=1e-4, atol=1e-5)
    assert whole.method == "draws"
    first = predict(net, guide, x, Y[:6], num_samples=1, **how)
    rest = predict(net, guide, x, Y[:6], num_samples=3, so_far=first, **how)
    assert torch.equal(rest.probs, whole.probs)
    pair = predict(net, guide, x, Y[:6], num_samples=2, sampling="antithetic", **how).probs
    (mirrored,) = by_hand(net, guide, x, 1, sign=-1)
    torch.testing.assert_close(pair, torch.stack((expected[0], mirrored.softmax(-1))), rtol=1e-4, atol=1e-5)


def test_a_predictor_takes_the_statistics_once():
    net, guide, x = convolutional()
    answer = predictor(net, guide, x[:2], num_samples=4, seed=3, sampling="antithetic", norm_inputs=K)
    how = {"seed": 3, "num_samples": 4, "sampling": "antithetic", "norm_inputs": K, "progress": False}
    expected = predict(net, guide, x, Y[:6], **how)
    with pytest.MonkeyPatch.context() as patch:
        # Of what is measured from here on, no layer would hear.
        patch.setattr(nn.BatchNorm2d, "train", lambda *_: pytest.fail("measured again"))
        probs, entropy = answer(x)
    torch.testing.assert_close(probs.double(), expected.mean_probs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected.mean_entropy, rtol=1e-5, atol=1e-6)


def test_batch_norm_in_front_of_all_that_is_random_has_the_inputs_statistics():
    net, guide, x = residual()
    inputs = torch.randn(50, 5) * 3 + 2
    (found,) = draw_outputs(net, guide, x, num_samples=1, norm_inputs=inputs)
    draw = guide.draw(0)
    h = (x - inputs.mean(0)) / (inputs.var(0) + net.fixed.eps).sqrt()
    first, last = (nn.functional.linear(h, draw["first.weight"], net.first.bias), draw["last.weight"])
    expected = nn.functional.linear(first.relu() + h, last, net.last.bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_scale_that_a_draw_has_of_its_own_is_gone():
    """Behind batch norm a layer's weights count up to a factor, which the running averages know nothing of."""
    layer = nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)).eval().requires_grad_(False)
    x = torch.randn(50, 5)
    normalize = own_statistics(layer, x)
    normalize("first")
    before = layer(x)
    layer[0].weight.mul_(3.0)
    tripled = layer(x)
    assert (tripled - before).abs().max() > 1
    normalize("tripled")
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-3)
    # What was measured once is remembered by its name.
    normalize("first")
    assert torch.equal(layer(x), tripled)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "layerwise"}, "needs method draws, got method layerwise"),
        ({"method": "moments"}, "needs method draws, got method moments"),
        ({"sampling": "sobol"}, "got sampling sobol"),
        ({"norm_inputs": K[:1]}, "at least 2 examples, got 1"),
        ({"norm_inputs": K * torch.nan}, "must be finite"),
    ],
    ids=["layerwise", "moments", "sobol", "one", "nan"],
)
def test_what_it_is_not_for_is_said(changes, message):
    net, guide, x = convolutional()
    with pytest.raises(ValueError, match=message):
        predict(net, guide, x, Y[:6], **{"num_samples": 2, "progress": False, "norm_inputs": K, **changes})


def test_a_network_without_batch_norm_or_draws_is_refused():
    net, guide = dense()
    x = torch.randn(6, 5)
    with pytest.raises(ValueError, match="no batch norm"):
        predict(net, guide, x, Y[:6], num_samples=2, norm_inputs=x, progress=False)
    twin = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).eval()
    with pytest.raises(ValueError, match="deterministic"):
        predict(twin, MeanFieldNormal(twin, x), x, Y[:6], num_samples=1, norm_inputs=x, progress=False)


@pytest.mark.slow
def test_a_run_uses_it_in_every_stage_that_draws(call, tmp_path, data_dir):
    config = {
        "data": {"dir": str(data_dir), "num_train": 64, "num_test": 20},
        "model": {"name": "resnet18", "prior": "normal(0, 0.316)"},
        "guide": {"init_loc": "he", "init_scale": 0.01},
        "train": {"epochs": 1, "batch_size": 32, "optimizer": "adam"},
        "predict": {"num_samples": 2, "norm_images": 64, "train_log_likelihood": True},
        "shift": {"num_samples": 2, "rotation": [15.0], "noise": [], "blur": [], "ood": []},
        "pruning": {"num_samples": 2, "threshold": [], "fractions": [0.0]},
    }
    folder = written(tmp_path / "resnet", config)
    stages = ("--stages", "train,predict,shift,prune")
    code, own = call(*stages, run=folder)
    assert code == 0
    code, averages = call(*stages, "--predict.norm_images", "0", run=folder)
    assert code == 0
    for part in (
        "recomputing predictive.nc (settings.norm_images: saved",
        "recomputing shift.nc",
        "recomputing pruning.nc",
    ):
        assert any(part in line for line in averages), averages
    # Without a shift and with nothing pruned the three stages say the same.
    found = [
        re.findall(r"^(predict|shift|prune): .*nll (\d+\.\d+)", "\n".join(lines), re.M) for lines in (own, averages)
    ]
    assert [stage for stage, _ in found[0]] == ["predict", "shift", "shift", "prune"]
    assert found[0][0][1] == found[0][1][1] == found[0][3][1]
    # After two steps the running averages are not yet those of any network.
    assert all(float(own[1]) < float(average[1]) for own, average in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--predict.norm_images", "100"], "the network has no batch norm"),
        (["--predict.norm_images", "1"], "predict.norm_images must be 0 or at least 2, got 1"),
        (["--predict.norm_images", "9", "--predict.method", "moments"], "needs predict.method draws"),
    ],
)
def test_the_command_line_refuses_before_any_training(call, run_folder, arguments, part):
    assert_refused(call(*arguments), part)
    assert not (run_folder / "out" / "checkpoints").exists()


@pytest.mark.parametrize("how", [{"method": "layerwise"}, {"sampling": "sobol"}])
def test_single_logits_refuse_it_as_predict_does(how):
    net, guide, x = convolutional()
    with pytest.raises(ValueError, match=r"it needs method draws, got|sobol is for the method layerwise"):
        next(draw_outputs(net, guide, x, num_samples=2, norm_inputs=K, **how))
