"""Predicting from data that are not in memory: in chunks, each example read once, with the draws of its tensors."""

import math

import numpy as np
import pytest
import torch
from items_read import Items, N, X, Y, check_same, drawn
from ranks import Ranks
from small_posteriors import dense
from small_regressions import regression
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ppl_bnn import (
    Classifier,
    MeanFieldNormal,
    as_examples,
    bayesian,
    prune,
    sweep,
    to_inference_data,
)
from ppl_bnn.errors import UserError
from ppl_bnn.prediction import chunks, kept
from ppl_bnn.prediction.log_density import train_log_likelihood
from ppl_bnn.pruning.finetuning import finetune
from ppl_bnn.results import idata, netcdf


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 40 examples for a batch_size of 10 or 20, read 16 at a time."""
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 40)
    monkeypatch.setattr(chunks, "PART_ROWS", 16)


def mapped_files(folder):
    for name, values in (("x", X), ("y", Y)):
        np.save(folder / f"{name}.npy", values.numpy())
    return tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("x", "y"))


@pytest.mark.parametrize(
    "data",
    [
        mapped_files,
        lambda folder: Items(),
        lambda folder: DataLoader(Items(), batch_size=7, shuffle=True),
        lambda folder: DataLoader(Items(), batch_size=7, num_workers=2),
        lambda folder: as_examples(Stream(), length=N),
        lambda folder: as_examples(Items(), transform=lambda x: x),
    ],
    ids=["memory-mapped", "Dataset", "DataLoader", "workers", "iterable", "transform"],
)
def test_any_data_give_what_their_tensors_give(data, tmp_path):
    net, guide = dense()
    expected = drawn(net, guide, X, Y)
    found = drawn(net, guide, data(tmp_path))
    check_same(found, expected)
    assert found.scores() == expected.scores()


def test_arrays_in_memory_are_predicted_as_their_tensors_are():
    net, guide = dense()
    check_same(drawn(net, guide, X.numpy(), Y.numpy()), drawn(net, guide, X, Y))
    check_same(drawn(net, guide, X.double().numpy(), Y.numpy()), drawn(net, guide, X, Y))


def test_each_example_is_read_once_however_many_draws_there_are():
    net, guide = dense()
    items = Items()
    drawn(net, guide, items, num_samples=9)
    assert items.read == [1] * N


@pytest.mark.parametrize("settings", [{"sampling": "antithetic"}, {"method": "moments"}], ids=str)
def test_each_way_to_predict_gives_the_same_in_chunks(settings):
    net, guide = dense(scale=0.1)
    check_same(drawn(net, guide, Items(), **settings), drawn(net, guide, X, Y, **settings))


def test_a_tolerance_leaves_out_the_same_examples():
    net, guide = dense(scale=0.1)
    settings = {"tolerance": 0.03, "num_samples": 200}
    found, expected = drawn(net, guide, Items(), **settings), drawn(net, guide, X, Y, **settings)
    assert len(expected.draws.unique()) > 1
    assert torch.equal(found.draws, expected.draws)
    torch.testing.assert_close(found.means, expected.means, equal_nan=True)
    torch.testing.assert_close(found.draw_scores, expected.draw_scores, equal_nan=True)


def test_numbers_are_drawn_with_noise_of_their_own_in_each_chunk():
    model, guide, x, y = regression()
    x, y = x.repeat(8, 1)[:N], y.repeat(8)[:N]
    found, expected = drawn(model, guide, Items(x, y)), drawn(model, guide, x, y)
    check_same(found, expected, but=("samples", "below", "up_to"))
    noise = found.samples - found.means
    assert not torch.equal(noise[:, :40], noise[:, 40:80])
    correlation = torch.corrcoef(torch.stack([noise[:, :40].flatten(), noise[:, 40:80].flatten()]))[0, 1]
    assert abs(float(correlation)) < 4 / math.sqrt(240)


def test_auto_is_draws_for_several_chunks_and_as_ever_for_one(monkeypatch):
    net = bayesian(nn.Sequential(nn.Linear(5, 400), nn.ReLU(), nn.Linear(400, 3)))
    guide = MeanFieldNormal(Classifier(net, N), X[:1], Y[:1])
    assert drawn(net, guide, Items(X[:3], Y[:3]), method="auto").method == "layerwise"
    check_same(drawn(net, guide, Items(X[:3], Y[:3]), method="auto"), drawn(net, guide, X[:3], Y[:3], method="auto"))
    assert drawn(net, guide, Items(), method="auto").method == "draws"


@pytest.mark.parametrize("sampling", ["independent", "sobol"])
def test_layerwise_draws_of_each_chunk_have_numbers_of_their_own(sampling):
    net, guide = dense()
    x = X[:1].expand(N, 5)
    found = drawn(net, guide, Items(x), method="layerwise", sampling=sampling, num_samples=400)
    expected = drawn(net, guide, x, Y, method="draws", num_samples=4000)
    assert not torch.equal(found.probs[:, :40], found.probs[:, 40:80])
    torch.testing.assert_close(found.mean_probs.mean(0), expected.mean_probs.mean(0), rtol=0, atol=0.02)


def test_data_without_labels_are_predicted():
    net, guide = dense()
    found = drawn(net, guide, Items(y=None))
    assert found.y is None
    check_same(found, drawn(net, guide, X))


def test_sequences_padded_to_their_batch_are_predicted_batch_by_batch():
    class Words(Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, row):
            return torch.arange(1, 2 + row % 7), row % 3

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 3)

        def forward(self, tokens, mask):
            return self.out((self.words(tokens) * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))

    def padded(items):
        tokens = nn.utils.rnn.pad_sequence([tokens for tokens, _ in items], batch_first=True)
        return {"tokens": tokens, "mask": (tokens > 0).float(), "y": torch.tensor([y for _, y in items])}

    whole = padded([Words()[row] for row in range(60)])
    y = whole.pop("y")
    net = bayesian(Net())
    guide = MeanFieldNormal(Classifier(net, 60), {name: part[:1] for name, part in whole.items()}, y[:1])
    found = drawn(net, guide, as_examples(DataLoader(Words(), batch_size=5, collate_fn=padded)))
    expected = drawn(net, guide, whole, y)
    torch.testing.assert_close(found.probs, expected.probs)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood)


def test_of_large_data_the_first_draws_are_kept_and_scores_are_of_all(monkeypatch, tmp_path):
    monkeypatch.setattr(kept, "KEPT_BYTES", 1000)
    monkeypatch.setattr(kept, "KEPT_EXAMPLES", 30)
    net, guide = dense()
    found, whole = drawn(net, guide, Items()), drawn(net, guide, X, Y)
    assert found.kept.tolist() == list(range(30))
    assert found.log_likelihood is None
    check_same(found, whole, but=("means", "kept", "log_likelihood", "log_sum"))
    torch.testing.assert_close(found.probs, whole.probs[:, :30], rtol=0, atol=0)
    assert found.nll == pytest.approx(whole.nll, abs=1e-6)
    netcdf.save(to_inference_data(found, guide=guide), tmp_path / "found.nc")
    saved = idata.load(tmp_path / "found.nc")
    assert saved.observed_data["y"].shape == (1, N) or saved.observed_data["y"].shape == (N,)
    assert saved.posterior_predictive["probs"].shape == (1, 6, 30, 3)
    # What the caller asks for is kept.
    check_same(drawn(net, guide, Items(), keep=range(N), log_likelihood=True), whole)


def test_intervals_of_large_data_are_scored_on_the_examples_that_are_kept(monkeypatch):
    monkeypatch.setattr(kept, "KEPT_BYTES", 1000)
    monkeypatch.setattr(kept, "KEPT_EXAMPLES", 30)
    model, guide, x, y = regression()
    x, y = x.repeat(8, 1)[:N], y.repeat(8)[:N]
    found = drawn(model, guide, Items(x, y), num_samples=50)
    assert found.sketch is None
    scores, whole = found.scores(), drawn(model, guide, x, y, num_samples=50)
    lower, upper = found.samples.quantile(torch.tensor([0.05, 0.95]), 0).unbind()
    assert scores["coverage_90"] == pytest.approx(float(((y[:30] >= lower) & (y[:30] <= upper)).double().mean()))
    assert scores["width_90"] == pytest.approx(float((upper - lower).mean()))
    assert scores["rmse"] == pytest.approx(whole.scores()["rmse"])
    assert found.quantiles([0.5]).isnan().sum() == N - 30


def test_what_is_wrong_names_the_example():
    net, guide = dense()
    saved = []
    with pytest.raises(UserError, match=r"data set Items raised at index 57: OSError: cannot be decoded"):
        drawn(net, guide, Items(bad=57), save=saved.append)
    # What was drawn before is not lost.
    assert len(saved[-1].draws) == 40
    with pytest.raises(UserError, match=r"^x must be finite; 1 examples have NaN.*the first is 57$"):
        drawn(net, guide, Items(X.index_fill(0, torch.tensor([57]), math.nan)))
    with pytest.raises(UserError, match=r"of the examples 80 to 94.*the labels y are from 0 to 3"):
        drawn(net, guide, Items(y=Y.index_fill(0, torch.tensor([90]), 3)))


def test_a_sweep_and_a_fine_tuning_take_the_same_data():
    net, guide = dense()
    model = Classifier(net, N)
    expected = sweep(net, guide, X, Y, thresholds=(), fractions=(0.0, 0.5), num_samples=4, progress=False)
    found = sweep(net, guide, Items(), thresholds=(), fractions=(0.0, 0.5), num_samples=4, progress=False)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own.predictive.probs, other.predictive.probs)
    pruned = prune(guide, fraction=0.5)
    settings = {"epochs": 1, "batch_size": 20, "progress": False}
    _, one = finetune(model, pruned, Items(), **settings)
    _, other = finetune(model, pruned, X, Y, **settings)
    for name, value in one.guide.named_parameters():
        assert torch.equal(value, other.guide.get_parameter(name)), name


def test_the_training_log_likelihood_is_that_of_the_tensors():
    net, guide = dense()
    model = Classifier(net, N)
    found, expected = (
        train_log_likelihood(model, guide, *data, num_samples=5, batch_size=10, progress=False)
        for data in ((Items(),), (X, Y))
    )
    for name in ("log_likelihood", "log_prior", "log_q"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def predicted(ranks):
    chunks.CHUNK_ROWS, chunks.PART_ROWS = 40, 16
    net, guide = dense()
    found = drawn(net, guide, Items(), communicator=ranks, num_samples=7, keep=[5, 60])
    return {"mean": found.mean, "log_likelihood": found.log_likelihood, "means": found.means, "nll": found.nll}


def test_two_ranks_give_what_one_gives(tmp_path):
    one = drawn(*dense(), Items(), num_samples=7, keep=[5, 60])
    main, other = Ranks(tmp_path, 2, predicted).results()
    for name in ("mean", "log_likelihood"):
        assert torch.equal(main[name], getattr(one, name))
        assert torch.equal(other[name], getattr(one, name))
    assert torch.equal(main["means"], one.means)
    assert main["nll"] == other["nll"] == one.nll
