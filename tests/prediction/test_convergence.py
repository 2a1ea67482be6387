import json
import math

import pytest
import torch

from ppl_bnn import metrics
from ppl_bnn.prediction.convergence import convergence


def drawn(count, examples=50):
    generator = torch.Generator().manual_seed(0)
    return torch.softmax(torch.randn(count, examples, 3, generator=generator), -1)


def of(probs, labels, **settings):
    return convergence(
        probs, probs.gather(2, labels.expand(len(probs), -1).unsqueeze(2))[..., 0].log(), labels, **settings
    )


def test_the_error_falls_with_the_root_of_the_draws():
    probs, labels = drawn(2000), torch.zeros(50, dtype=torch.long)
    rows = of(probs, labels)
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
    assert of(pairs, torch.zeros(50, dtype=torch.long), together=2)[0]["standard_error"] < 1e-6


def test_examples_without_all_draws_are_left_out():
    probs, labels = drawn(40), torch.zeros(50, dtype=torch.long)
    probs[20:, 7] = math.nan
    rows = of(probs, labels)
    others = torch.arange(50) != 7
    assert json.dumps(rows) == json.dumps(of(probs[:, others], labels[others]))
    assert of(probs[:1], labels) == []


def test_nll_is_that_of_the_log_likelihood_and_not_of_rounded_probabilities():
    labels = torch.zeros(50, dtype=torch.long)
    logits = torch.randn(40, 50, 3, generator=torch.Generator().manual_seed(0))
    logits[:, :3, 0] -= 20
    exact = logits.log_softmax(-1)
    # As predictive.nc packs them: in steps of 1/65534.
    rounded = (exact.exp() * 65534).round() / 65534
    rows = convergence(rounded, exact[..., 0], labels)
    assert rows[-1]["nll"] == pytest.approx(metrics.nll(exact[:20, :, 0]), rel=1e-6)
    assert rows[-1]["images"] == 50
