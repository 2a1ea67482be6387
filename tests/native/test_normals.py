"""Normal numbers of a seed are normal, independent, and the same in C and in torch, for any number of threads."""

import math
import platform

import numpy as np
import pytest
import torch
from scipy import stats

from ppl_bnn.native import library as native
from ppl_bnn.native import normals as module
from ppl_bnn.native.arithmetic import OPERATIONS
from ppl_bnn.native.library import library
from ppl_bnn.native.normals import GENERATOR, GROUP, draw_seed, normals, philox, reference, stream_of
from ppl_bnn.prediction.compact import sparse_layers

LIKE = torch.empty(0)
COUNT = 4_000_000


@pytest.fixture(scope="module")
def numbers():
    return normals(11, COUNT, LIKE).double()


@pytest.fixture(params=["C", "torch"])
def form(request, monkeypatch):
    """How the numbers are made."""
    if request.param == "torch":
        monkeypatch.setattr(module, "library", lambda *of: None)
    return request.param


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = torch.tensor([int(word, 16) for word in counter.split()])
    found = philox(words[::2, None], words[1::2, None], tuple(int(word, 16) for word in key.split()))
    assert " ".join(f"{int(word):08x}" for word in torch.cat(found, 1).flatten()) == expected


def test_the_numbers_are_those_of_the_definition_one_by_one(form):
    # In plain Python from the known answers of Random123: counter 0 of key 0 is numbers 0, 16, 32 and 48.
    found, words = normals(0, GROUP, LIKE), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    for w in (0, 2):
        a, b = words[w : w + 2]
        u = (a >> 1) / 2**31 + 2**-32
        angle = (1 + (((b << 2) % 2**32 + 2**31) % 2**32 - 2**31) / 2**31) * math.pi / 4
        radius = math.sqrt(-2 * math.log(u))
        assert abs(found[16 * w] - (-1) ** (b >> 31) * radius * math.cos(angle)) < 1e-6
        assert abs(found[16 * w + 16] - (-1) ** (b >> 30) * radius * math.sin(angle)) < 1e-6


def test_the_numbers_of_a_seed_stay_what_they_are():
    assert GENERATOR == "philox4x32-10/1"
    # Where these change, results made of the numbers before must not be added to: GENERATOR must change too.
    expected = [-1.3546753432613838, 0.019224575001980625, 0.9600668184780301]
    assert reference(0, 3, LIKE.double()).tolist() == pytest.approx(expected, rel=1e-12)
    assert draw_seed(3, 5) == 4895867234429419378
    assert stream_of("0.weight") == 14291418057784981734


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (2**64 - 1, 2**64 - 1), (draw_seed(1, 2), stream_of("a"))])
def test_c_and_torch_agree_in_single_and_double(seed, stream):
    assert library(module._SOURCE, module._agrees) is not None
    count = 300_003
    native = normals(seed, count, LIKE, stream=stream)
    single = reference(seed, count, LIKE, stream=stream)
    double = reference(seed, count, LIKE.double(), stream=stream)
    assert (native.dtype, single.dtype, double.dtype) == (torch.float32, torch.float32, torch.float64)
    for one, other in ((native, double), (single, double), (native, single)):
        assert float(((one - other).abs() / (1 + other.abs())).max()) < 1e-6
    assert not torch.equal(native.double(), double)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(normals(seed, 100, LIKE.to(dtype), stream=stream), native[:100].to(dtype))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx2", "-mno-avx"])
def test_processors_with_shorter_vectors_make_the_same_numbers(without, monkeypatch, tmp_path):
    expected = normals(5, 1001, LIKE)
    monkeypatch.setattr(native, "_libraries", {})
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, without))
    monkeypatch.setenv("PPL_BNN_CACHE", str(tmp_path))
    torch.testing.assert_close(normals(5, 1001, LIKE), expected, rtol=1e-6, atol=1e-6)
    assert native._libraries[module._SOURCE] is not None


def test_another_default_dtype_changes_nothing(monkeypatch):
    expected = normals(3, 100, LIKE)
    monkeypatch.setattr(native, "_libraries", {})
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(normals(3, 100, LIKE), expected)
        assert sparse_layers._native() is not None
        assert OPERATIONS["scale"](LIKE.new_empty(9), LIKE.new_ones(9), LIKE.new_ones(9)).dtype == torch.float32
        assert None not in native._libraries.values()
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_counter_has_more_than_32_bits():
    # Counter 2^32 + 5 has other words than counter 5.
    odd = torch.tensor([[0, 1], [0, 0]])
    for words in philox(torch.tensor([[5, 5], [0, 0]]), odd, (1, 2)):
        assert (words[:, 0] != words[:, 1]).all()


def test_the_extreme_words_give_finite_numbers():
    for a in (0, 1, 2, 2**32 - 1):
        for b in (0, 2**29 - 1, 2**29, 2**30 - 1, 2**31, 2**32 - 1):
            for dtype in (torch.float32, torch.float64):
                pair = module._pair(torch.tensor([a]), torch.tensor([b]), dtype)
                assert all(number.isfinite() and number.abs() < 6.661 for number in pair)


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


def test_the_tails_beyond_five_deviations_have_their_numbers():
    found, count = [0, 0], 1 << 26
    for stream in range(4):
        part = normals(7, count // 4, LIKE, stream=stream)
        found = [found[0] + int((part > 5).sum()), found[1] + int((part < -5).sum())]
    # 19.2 on each side.
    expected = count * stats.norm.sf(5)
    for number in found:
        assert 1e-4 < stats.poisson.cdf(number, expected) < 1 - 1e-4


def test_torchs_form_is_normal_too():
    numbers = reference(5, 500_000, LIKE).double()
    assert stats.kstest(numbers.numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("lag", [1, 2, 15, 16, 17, 32, 48, 64, 128, 4096])
def test_neighbours_lanes_words_and_chunks_are_independent(numbers, lag):
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


def test_draws_by_seed_index_and_site_are_independent():
    sites = [stream_of(name) for name in ("0.weight", "1.weight", "0.bias")]
    made = {(seed, index, at): normals(draw_seed(seed, index), 200_000, LIKE, stream=site).double()
            for seed in (0, 1) for index in (0, 1, 2) for at, site in enumerate(sites)}  # fmt: skip
    draws = torch.stack([*made.values()])
    correlation = draws @ draws.T / draws.shape[1] - torch.eye(len(draws)).double()
    # 18 draws: 153 pairs.
    assert float(correlation.triu(1).abs().max()) < 4.5 / math.sqrt(draws.shape[1])
    assert float((draws.square() - 1).mean(1).abs().max()) < 4.5 * math.sqrt(2 / draws.shape[1])


def test_one_number_over_many_draws_is_normal():
    # What a Monte Carlo average over draws sees: one position, another key each time.
    numbers = [float(normals(draw_seed(0, index), 1, LIKE, stream=9)) for index in range(3000)]
    assert stats.kstest(numbers, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4.5 / math.sqrt(3000)


def test_a_number_depends_on_seed_stream_and_position_alone(form):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = normals(3, 10_001, LIKE)
        torch.set_num_threads(3)
        assert torch.equal(alone, normals(3, 10_001, LIKE))
    finally:
        torch.set_num_threads(threads)
    for count in (0, 1, 31, 33, 63, 65, 129, 4096, 4097):
        assert torch.equal(alone[:count], normals(3, count, LIKE))
    assert not torch.equal(alone, normals(4, 10_001, LIKE))
    assert not torch.equal(alone, normals(3, 10_001, LIKE, stream=1))


def test_blocks_of_the_torch_form_fit_together(monkeypatch):
    whole = reference(3, 10_001, LIKE)
    monkeypatch.setattr(module, "_BLOCK_ON_CPU", 64)
    assert torch.equal(reference(3, 10_001, LIKE), whole)
