"""Normal numbers of a seed are normal, independent, and the same for any number of threads."""

import math

import pytest
import torch
from scipy import stats

from ppl_bnn.native.normals import normals

LIKE = torch.empty(0)
COUNT = 4_000_000


@pytest.fixture(scope="module")
def numbers():
    return normals(11, COUNT, LIKE).double()


def test_the_moments_are_those_of_a_normal(numbers):
    for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        # The variance of z^p is E z^2p - (E z^p)^2, with E z^2p = (2p - 1)!!.
        spread = math.prod(range(1, 2 * power, 2)) - expected**2
        assert abs(float((numbers**power).mean()) - expected) < 4.5 * math.sqrt(spread / COUNT)


def test_the_distribution_is_normal_into_its_tails(numbers):
    assert stats.kstest(numbers[:1_000_000].numpy(), "norm").pvalue > 1e-3
    for bound in (2, 3, 4, 4.5):
        expected = COUNT * stats.norm.sf(bound)
        for tail in (numbers > bound, numbers < -bound):
            assert abs(float(tail.sum()) - expected) < 4.5 * math.sqrt(expected) + 1
    assert numbers.isfinite().all()


@pytest.mark.parametrize("lag", [1, 2, 15, 16, 17, 32, 64, 4096])
def test_neighbours_lanes_and_chunks_are_independent(numbers, lag):
    one, other = numbers[:-lag], numbers[lag:]
    bound = 4.5 / math.sqrt(len(one))
    assert abs(float((one * other).mean())) < bound
    assert abs(float(((one.square() - 1) * (other.square() - 1)).mean())) < 2 * bound


def test_seeds_are_independent(numbers):
    # Of neighbouring seeds, and of seeds that differ by what a chunk adds.
    for seed in (10, 12, 11 + 2**32, 2**64 - 1):
        other = normals(seed, COUNT, LIKE).double()
        assert abs(float((numbers * other).mean())) < 4.5 / math.sqrt(COUNT)
        chunks = other.split(4096)[1:], numbers.split(4096)
        assert abs(float((torch.cat(chunks[0]) * torch.cat(chunks[1][:-1])[: COUNT - 4096]).mean())) < 2.5e-3


def test_a_number_depends_on_seed_and_position_alone():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = normals(3, 10_001, LIKE)
        torch.set_num_threads(3)
        assert torch.equal(alone, normals(3, 10_001, LIKE))
    finally:
        torch.set_num_threads(threads)
    for count in (0, 1, 31, 33, 4096, 4097):
        assert torch.equal(alone[:count], normals(3, count, LIKE))
    assert not torch.equal(alone, normals(4, 10_001, LIKE))


def test_without_a_compiler_and_in_double_torch_makes_them(monkeypatch):
    expected = torch.randn(1000, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr("ppl_bnn.native.normals.library", lambda *of: None)
    assert torch.equal(normals(5, 1000, LIKE), expected)
    assert normals(5, 10, LIKE.double()).dtype == torch.float64
