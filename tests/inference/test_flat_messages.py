"""Gradients in flat buffers travel between ranks as they lie there, while back-propagation runs."""

import pytest
import torch
from ranks import OneOfTwo, Ranks
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, build
from ppl_bnn.errors import UserError
from ppl_bnn.guides import GroupedFlips
from ppl_bnn.inference.direct import DirectELBO
from ppl_bnn.inference.objective import gradient_buckets


class Watching(OneOfTwo):
    """Notes the address and size of each message."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def _start_sum(self, tensor, name):
        self.sent.append((tensor.data_ptr(), tensor.numel()))
        return super()._start_sum(tensor, name)


def images():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 2)]
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    model = Classifier(bayesian(nn.Sequential(*layers)), 4)
    return model, MeanFieldNormal(model, x[:1], y[:1]), x, y


def buckets_of(model, guide, elbo, ranks, **settings):
    settings = {"bucket_mb": 25.0, "compression": "none", **settings}
    return gradient_buckets(model, guide, elbo.flat, ranks, **settings)


def together(communicator):
    """Gradients of three steps, averaged over ranks with their own noise, and each rank's own."""
    found = {}
    for compression in ("none", "fp16"):
        for estimator in (None, GroupedFlips(2)):
            model, guide, x, y = images()
            elbo = DirectELBO(model, guide, 4, estimator, gathers=False)
            with buckets_of(model, guide, elbo, communicator, bucket_mb=0.02, compression=compression) as buckets:
                for step in range(3):
                    means, own = [], []
                    for gathers in (True, False):
                        elbo.gathers = gathers
                        torch.manual_seed(10 * step + communicator.rank)
                        if gathers:
                            buckets.__exit__(None, None, None)
                        numbers = elbo.add(x, y, kl_weight=0.5)
                        if gathers:
                            buckets.__enter__()
                        else:
                            buckets.average()
                        numbers = elbo.completed(numbers, 0.5)
                        flat = elbo.flat.arithmetic
                        bias = model.net[0].bias
                        (own if gathers else means).extend([flat.to_loc.clone(), flat.to_u.clone(), bias.grad.clone()])
                        for parameter in model.parameters():
                            parameter.grad = None
            found[compression, estimator is None] = own, means, float(numbers.squares)
    return found


def test_what_ranks_get_is_the_mean_of_what_each_had(tmp_path):
    ranks = Ranks(tmp_path, 3, together).results()
    for key in ranks[0]:
        expected = [sum(parts) / 3 for parts in zip(*(rank[key][0] for rank in ranks), strict=True)]
        for own, means, squares in (rank[key] for rank in ranks):
            assert not torch.equal(own[0], means[0])
            for one, other in zip(means, expected, strict=True):
                close = {"rtol": 2e-3, "atol": 1e-5} if key[0] == "fp16" else {"rtol": 1e-5, "atol": 1e-7}
                torch.testing.assert_close(one, other, **close)
            assert squares == pytest.approx(float(means[0].square().sum() + means[1].square().sum()), rel=1e-4)


def test_messages_are_parts_of_the_buffers_and_leave_before_the_first_layers_gradient():
    model, guide, x, y = images()
    elbo, ranks, there = DirectELBO(model, guide, 4, gathers=False), Watching(), []
    elbo.flat.values["0.weight"].register_post_accumulate_grad_hook(lambda _: there.append(len(ranks.sent)))
    with buckets_of(model, guide, elbo, ranks, bucket_mb=1e-3) as buckets:
        for _ in range(2):
            ranks.sent.clear()
            numbers = elbo.add(x, y, kl_weight=1.0)
            buckets.average()
            elbo.completed(numbers, 1.0)
    # Loc and unconstrained scale of three layers; then all biases.
    assert len(ranks.sent) == 3 * 2 + 1
    begins = elbo.flat.arithmetic.to_loc.data_ptr()
    inside = [address for address, _ in ranks.sent if 0 <= address - begins < 2 * elbo.flat.arithmetic.to_loc.nbytes]
    assert len(inside) == 6
    # What has gradients is not known before the first step.
    assert there[0] == 0
    assert there[1] == 4


def test_a_step_of_vgg16_needs_a_handful_of_messages():
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    model = Classifier(build("vgg16", image_shape=(3, 32, 32)), 50_000)
    guide = MeanFieldNormal(model, x, y)
    elbo, ranks = DirectELBO(model, guide, 50_000, gathers=False), Watching()
    with buckets_of(model, guide, elbo, ranks) as buckets:
        elbo.add(x, y, kl_weight=1.0)
        buckets.average()
    assert len(ranks.sent) <= 9
    assert sum(count for _, count in ranks.sent) == 18_823_178


class Changing(nn.Module):
    """A network whose second use of a weight begins in its second step."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.uses = nn.Linear(4, 4), nn.Linear(4, 2), 0

    def forward(self, x):
        self.uses += 1
        x = self.first(x)
        return self.last(x) if self.uses < 2 else self.last(x) * self.first.weight.sum()


def test_a_gradient_that_comes_after_its_message_is_refused():
    torch.manual_seed(0)
    model = Classifier(bayesian(Changing()), 8)
    x, y = torch.rand(8, 4), torch.arange(8) % 2
    guide = MeanFieldNormal(model, x[:1], y[:1])
    model.net.uses = 0
    elbo, ranks = DirectELBO(model, guide, 8, gathers=False), Watching()
    loc = guide.loc.get_parameter("last.weight")
    with buckets_of(model, guide, elbo, ranks, bucket_mb=1e-6) as buckets:
        numbers = elbo.add(x, y, kl_weight=1.0)
        buckets.average()
        elbo.completed(numbers, 1.0)
        elbo.add(x, y, kl_weight=1.0)
        with pytest.raises(UserError, match="train it on one rank"):
            loc.sum().backward()
