"""The noise of a guide's draw: one number for each (seed, index, site, position), whatever the tensors look like."""

import pytest
import torch
from scipy import stats
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian
from ppl_bnn.guides.normal import standard_normal
from ppl_bnn.native import normals as module
from ppl_bnn.native.normals import draw_seed, normals, reference, stream_of


def guided(*layers):
    x, y = torch.zeros(1, 3, 6, 6), torch.zeros(1, dtype=torch.long)
    return MeanFieldNormal(Classifier(bayesian(nn.Sequential(*layers)), 10), x, y)


def layers():
    return nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(80, 2)


def test_a_sites_noise_is_that_of_its_seed_index_and_name():
    guide = guided(*layers())
    found = dict(guide.noise(4, seed=2))
    assert set(found) == set(guide.sites) == {"0.weight", "2.weight"}
    for site, noise in found.items():
        assert noise.shape == guide.loc_scale(site)[0].shape
        expected = reference(draw_seed(2, 4), noise.numel(), noise, stream=stream_of(site))
        torch.testing.assert_close(noise.flatten(), expected, rtol=1e-6, atol=1e-6)


def test_a_memory_layout_or_a_dtype_does_not_change_a_draw():
    torch.manual_seed(0)
    guide = guided(*layers())
    expected = guide.draw(1, seed=3)
    torch.manual_seed(0)
    other = guided(*layers()).to(memory_format=torch.channels_last)
    loc = other.loc.get_submodule("0").weight
    assert loc.stride() != loc.contiguous().stride()
    for site, weight in other.draw(1, seed=3).items():
        assert torch.equal(weight, expected[site])
    for site, weight in other.double().draw(1, seed=3).items():
        torch.testing.assert_close(weight.float(), expected[site], rtol=1e-5, atol=1e-6)


def test_a_draw_without_a_compiler_is_the_same(monkeypatch):
    guide = guided(*layers())
    expected = guide.draw(7, seed=1)
    monkeypatch.setattr(module, "library", lambda *of: None)
    for site, weight in guide.draw(7, seed=1).items():
        torch.testing.assert_close(weight, expected[site], rtol=1e-6, atol=1e-6)


def test_a_site_has_the_same_noise_whatever_other_sites_there_are():
    deeper = guided(*layers(), nn.ReLU(), nn.Linear(2, 2))
    expected = dict(guided(*layers()).noise(0))
    found = dict(deeper.noise(0))
    for site in expected:
        assert torch.equal(found[site], expected[site])


def test_the_training_noise_is_of_one_definition_for_every_dtype_and_shape():
    made, after = {}, set()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.manual_seed(8)
        made[dtype] = standard_normal(torch.empty(40, 50, dtype=dtype))
        assert made[dtype].dtype == dtype
        # The global generator is asked for one seed, whatever is made of it.
        after.add(int(torch.randint(2**40, ())))
    assert len(after) == 1
    torch.testing.assert_close(made[torch.float32].double(), made[torch.float64], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made[torch.bfloat16], made[torch.float32].bfloat16())
    torch.manual_seed(8)
    assert torch.equal(standard_normal(torch.empty(50), torch.Size([40])), made[torch.float32])


def test_the_training_noise_follows_the_memory():
    torch.manual_seed(8)
    like = torch.empty(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    noise = standard_normal(like)
    assert noise.stride() == like.stride()
    torch.manual_seed(8)
    seed = int(torch.randint(2**63 - 1, ()))
    assert torch.equal(noise.permute(0, 2, 3, 1).flatten(), normals(seed, like.numel(), like))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_of_a_weight_are_normal_and_independent_of_their_neighbours(dtype):
    guide = guided(*layers()).to(dtype)
    draws = torch.stack([torch.cat([noise.flatten()[:20] for _, noise in guide.noise(index)]) for index in range(600)])
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = torch.corrcoef(draws.T.double()) - torch.eye(draws.shape[1]).double()
    # 40 weights: 780 pairs.
    assert float(correlation.abs().max()) < 4.5 / 600**0.5
