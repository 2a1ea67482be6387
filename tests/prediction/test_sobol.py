"""Sobol points as standard normal noise."""

import torch
from small_posteriors import X, Y, convolutional, dense

from ppl_bnn import predict
from ppl_bnn.prediction.sobol import sobol_normals_by_image


def cells(points, count):
    return (torch.special.ndtr(points.double()) * count).long()


def test_every_dimension_of_every_image_is_stratified_and_normal():
    shared, own = sobol_normals_by_image(2, 3, 50, seed=0)(0, 256)
    assert shared.shape == (256, 2)
    assert own.shape == (256, 50, 3)
    # 256 points of a scrambling have one in each of 256 intervals of equal probability.
    for points in (shared, own.flatten(1)):
        assert all(cells(column, 256).unique().numel() == 256 for column in points.T)
        assert points.mean(0).abs().max() < 0.02
        assert (points.std(0) - 1).abs().max() < 0.03
    # Shifts of their own: about any image the others are spread evenly, each in its own cell.
    assert not torch.isclose(own[:, :1], own[:, 1:]).all(0).any()
    correlation = torch.corrcoef(own[:, :, 0].T)
    assert abs(float(correlation.sum() - 50) / (50 * 49)) < 0.05


def test_points_are_the_same_in_any_order():
    points = sobol_normals_by_image(0, 6, 1, seed=1)
    late, early = points(70, 30)[1], points(0, 70)[1]
    assert torch.equal(torch.cat([early, late]), sobol_normals_by_image(0, 6, 1, seed=1)(0, 100)[1])
    assert not torch.equal(sobol_normals_by_image(0, 6, 1, seed=2)(0, 100)[1], early)


def test_random_convolutions_take_points_too_and_no_error_is_claimed():
    net, guide, x = convolutional()
    options = {"method": "layerwise", "progress": False}
    found = predict(net, guide, x, Y[:6], num_samples=256, sampling="sobol", **options)
    plain = predict(net, guide, x, Y[:6], num_samples=1000, **options)
    assert (found.mean_probs - plain.mean_probs).abs().max() < 5 * plain.mc_error.max() + 0.02
    assert found.mc_error.isnan().all()
    again = predict(net, guide, x, Y[:6], num_samples=256, batch_size=4, sampling="sobol", **options)
    torch.testing.assert_close(again.probs, found.probs, rtol=1e-4, atol=1e-5)


def test_sobol_points_are_unbiased_and_average_better():
    net, guide = dense()
    reference = predict(net, guide, X[:4], Y[:4], num_samples=20_000, method="layerwise", progress=False).mean_probs
    errors = {}
    for sampling in ("independent", "sobol"):
        found = [
            predict(net, guide, X[:4], Y[:4], num_samples=64, seed=seed, method="layerwise", sampling=sampling,
                    progress=False).mean_probs - reference
            for seed in range(1, 41)
        ]  # fmt: skip
        errors[sampling] = torch.stack(found)
    spread = {name: part.square().mean().sqrt() for name, part in errors.items()}
    assert spread["sobol"] < 0.75 * spread["independent"]
    bias = errors["sobol"].mean(0)
    assert (bias.abs() < 4.5 * errors["sobol"].std(0) / 40**0.5 + 0.004).all()


def test_sobol_points_can_be_added_to_and_differ_between_images():
    net, guide = dense()
    same = X[:1].expand(3, *X.shape[1:])
    arguments = {"method": "layerwise", "sampling": "sobol", "progress": False}
    whole = predict(net, guide, same, Y[:3], num_samples=64, **arguments)
    part = predict(net, guide, same, Y[:3], num_samples=24, **arguments)
    assert torch.equal(predict(net, guide, same, Y[:3], num_samples=64, so_far=part, **arguments).probs, whole.probs)
    assert torch.equal(
        predict(net, guide, same, Y[:3], num_samples=64, sampling="sobol", progress=False).probs, whole.probs
    )
    assert not torch.isclose(whole.probs[:, 0], whole.probs[:, 1]).all(-1).any()
