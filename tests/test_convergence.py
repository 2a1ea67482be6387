import json
import math

import pytest
import torch

from ppl_bnn.convergence import convergence


def drawn(count, examples=50):
    generator = torch.Generator().manual_seed(0)
    return torch.softmax(torch.randn(count, examples, 3, generator=generator), -1)


def test_the_error_falls_with_the_root_of_the_draws():
    probs, labels = drawn(2000), torch.zeros(50, dtype=torch.long)
    rows = convergence(probs, labels)
    assert [row["draws"] for row in rows] == [10, 20, 50, 100, 200, 400, 1000]
    top = probs.mean(0).argmax(1)
    std = probs.gather(2, top.expand(2000, -1).unsqueeze(2)).double().std(0).square().mean().sqrt()
    for row in rows:
        expected = float(std) / math.sqrt(row["draws"])
        assert row["standard_error"] == pytest.approx(expected, rel=0.15)
        assert row["error"] == pytest.approx(expected, rel=0.3)
        assert row["worst"] >= row["standard_error"]
    assert rows[-1]["nll_error"] < rows[0]["nll_error"]
    mean = probs[:100].mean(0)
    assert rows[3]["nll"] == pytest.approx(-mean[:, 0].log().mean().item(), rel=1e-6)


def test_pairs_count_as_one_draw_of_their_mean():
    half = drawn(200)
    pairs = torch.stack([half, (2 / 3 - half)], 1).flatten(0, 1)
    assert convergence(pairs, torch.zeros(50, dtype=torch.long), together=2)[0]["standard_error"] < 1e-6


def test_examples_without_all_draws_are_left_out():
    probs, labels = drawn(40), torch.zeros(50, dtype=torch.long)
    probs[20:, 7] = math.nan
    rows = convergence(probs, labels)
    others = torch.arange(50) != 7
    assert json.dumps(rows) == json.dumps(convergence(probs[:, others], labels[others]))
    assert convergence(probs[:1], labels) == []
