"""Several batches an update are one batch as large: its loss, its gradient, and one KL."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from ranks import OneOfTwo, Ranks
from small_training import X, Y, assert_same_state, settings, small, state, timeless

from ppl_bnn import TrainingStep, fit
from ppl_bnn.distributed import GradientBuckets
from ppl_bnn.errors import Interrupted


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=2e-4, atol=2e-6, msg=name)


def rows_close(one, other):
    for row, expected in zip(one, other, strict=True):
        assert row["step"] == expected["step"]
        for name in ("loss", "nll", "kl", "accuracy"):
            assert row[name] == pytest.approx(expected[name], rel=1e-5), name


# Of 50 examples, the last update has fewer batches, and these other sizes.
@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("optimizer", ["adam", "torch.optim:SGD", "ivon"])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 4), (7, 3), (50, 2)])
def test_a_training_is_that_of_the_large_batch(batch_size, accumulate, optimizer, clip_norm):
    found = []
    for sizes in ((batch_size, accumulate), (batch_size * accumulate, 1)):
        model, guide = small()
        changes = {"batch_size": sizes[0], "accumulate": sizes[1], "optimizer": optimizer, "clip_norm": clip_norm}
        history = fit(model, guide, X, Y, **settings(estimator="plain", kl_weight=0.3, **changes))
        found.append((history, state(model, guide)))
    rows_close(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("prior", [None, dist.StudentT(3.0, 0.0, 1.0)])
def test_with_any_prior_and_with_weights_of_the_examples(prior):
    found = []
    weights = torch.rand(50, generator=torch.Generator().manual_seed(3))
    for batch_size, accumulate in ((5, 4), (20, 1)):
        model, guide = small(prior=prior)
        # This site is not in the flat buffers.
        guide.get_parameter("loc.0.weight").requires_grad_(False)
        changes = settings(estimator="plain", batch_size=batch_size, accumulate=accumulate, weights=weights)
        found.append((fit(model, guide, X, Y, **changes), state(model, guide)))
    rows_close(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1])


def linear(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(6), 1.0).to_event(1))
    with pyro.plate("data", 50, subsample_size=len(x)):
        return pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


@pytest.mark.parametrize("num_particles", [1, 2])
def test_through_pyro_too(num_particles):
    found = []
    for batch_size, accumulate in ((5, 4), (20, 1)):
        torch.manual_seed(0)
        pyro.clear_param_store()
        guide = pyro.infer.autoguide.AutoNormal(linear)
        changes = settings(
            estimator="plain", batch_size=batch_size, accumulate=accumulate, num_particles=num_particles, kl_weight=0.3
        )
        history = fit(linear, guide, X, Y.float(), **changes)
        found.append((history, {name: value.clone() for name, value in guide.state_dict().items()}))
    rows_close([{**row, "accuracy": 0.0} for row in found[0][0]], [{**row, "accuracy": 0.0} for row in found[1][0]])
    assert_close(found[0][1], found[1][1])


def test_groups_are_those_of_the_large_batch_with_the_examples_in_another_order():
    # Batch k of 8 has 2 examples in each of 4 groups; the large batch has the first 8 of 32 in group 1.
    order = torch.arange(32).view(4, 4, 2).transpose(0, 1).reshape(32)
    found = []
    for batches in (torch.arange(32).split(8), (order,)):
        model, guide = small()
        step = TrainingStep(model, guide, X[:4], Y[:4], num_data=50, optimizer="torch.optim:SGD", lr=0.1)
        torch.manual_seed(5)
        for rows in batches:
            step.gradients(X[rows], Y[rows], share=len(rows) / 32, kl_weight=0.3)
        terms = step.update()
        step.release()
        found.append((terms, state(model, guide)))
    assert found[0][0][:4] == pytest.approx(found[1][0][:4], rel=1e-5)
    assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("estimator", ["groups", "flipout", "local"])
def test_every_estimator_learns_with_several_batches_an_update(estimator):
    model, guide = small(prior=dist.Normal(0.0, 3.0))
    changes = {"epochs": 120, "batch_size": 4, "accumulate": 2, "kl_weight": 0.1, "lr": 0.02}
    history = fit(model, guide, X, Y, **settings(estimator=estimator, **changes))
    assert history[-1]["accuracy"] > 0.85
    assert history[-1]["step"] == 120 * 7


def test_an_interrupted_training_ends_bitwise_the_same(tmp_path):
    changes = settings(batch_size=4, accumulate=3, estimator="groups")
    model, guide = small()
    whole, asked = fit(model, guide, X, Y, **changes), iter(range(1, 1000))
    expected = state(model, guide)
    with pytest.raises(Interrupted, match="stopped at step 7 of 20"):
        fit(*small(), X, Y, **changes, folder=tmp_path, should_stop=lambda: next(asked) >= 7)
    model, guide = small(seed=5)
    assert timeless(fit(model, guide, X, Y, **changes, folder=tmp_path)) == timeless(whole)
    assert_same_state(expected, state(model, guide))


def accumulated(communicator, batch_size, accumulate, compression):
    from small_ranks import X, Y
    from small_ranks import settings as rank_settings
    from small_ranks import small as small_for_ranks

    model, guide = small_for_ranks()
    changes = rank_settings(batch_size=batch_size, accumulate=accumulate, clip_norm=0.5, optimizer="torch.optim:SGD")
    history = fit(model, guide, X, Y, **changes, communicator=communicator, compression=compression)
    return [[row["loss"], row["nll"], row["kl"]] for row in history], state(model, guide)


def test_on_ranks_it_is_the_large_batch_too(tmp_path):
    found = [Ranks(tmp_path / str(sizes), 2, accumulated, *sizes, "none").results() for sizes in ((4, 3), (12, 1))]
    for rank in range(2):
        assert found[0][rank][0] == [pytest.approx(row, rel=1e-9) for row in found[1][rank][0]]
        for name, value in found[0][rank][1].items():
            torch.testing.assert_close(value, found[1][rank][1][name], rtol=1e-9, atol=1e-12, msg=name)
    assert_same_state(found[0][0][1], found[0][1][1])


def test_a_gradient_of_an_earlier_batch_alone_is_averaged_too():
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    with GradientBuckets([first, second], OneOfTwo()) as buckets:
        for _ in range(2):
            with buckets.waiting():
                (2 * first).sum().backward()
            (4 * second).sum().backward()
            buckets.average()
            # The other rank has none.
            assert torch.equal(first.grad, torch.ones(3))
            assert torch.equal(second.grad, 2 * torch.ones(3))
            first.grad = second.grad = None
