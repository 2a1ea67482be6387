"""Several ranks train as one: the same update, the same stop and the same state, in real processes over Gloo."""

import contextlib
import math
import time
from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch
from ranks import Ranks
from small_ranks import X, Y, assert_same, settings, small
from small_training import state, timeless
from torch import nn
from torch.distributions import constraints

from ppl_bnn import MeanFieldNormal, bayesian, fit
from ppl_bnn.data.examples import batches
from ppl_bnn.distributed import shard
from ppl_bnn.errors import Diverged, Interrupted, UserError
from ppl_bnn.inference import checkpoint, data_parallel

# -- what each rank works on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(("n", "batch"), [(50, 8), (7, 4), (64, 1), (11, 3)])
def test_an_epoch_visits_each_example_once_in_one_ranks_order(size, n, batch):
    seen = Counter()
    for rows in batches(n, batch * size, epoch=2, seed=5):
        parts = [shard(rows, rank, size) for rank in range(size)]
        assert torch.equal(torch.cat([part for part, weight in parts if weight]), rows)
        seen.update(int(row) for part, weight in parts if weight for row in part)
        values = torch.arange(n, dtype=torch.float64)
        mean = sum(weight * values[part].mean() for part, weight in parts) / size
        torch.testing.assert_close(mean, values[rows].mean())
    assert seen == Counter(range(n))


def test_noise_seeds_differ_by_rank_and_rank_0_has_that_of_one_process():
    seeds = [data_parallel.rank_seed(seed, rank) for seed in (0, 1, 7) for rank in range(64)]
    assert len(set(seeds)) == len(seeds)
    assert data_parallel.rank_seed(7, 0) == 7


# -- the update --------------------------------------------------------------------------------------------------


def train_with_one_noise(communicator, folder, changes):
    data_parallel.rank_seed = lambda seed, rank: seed
    model, guide = small(seed=communicator.rank)
    history = fit(model, guide, X, Y, **settings(**changes), communicator=communicator, folder=folder)
    return {"state": state(model, guide), "history": timeless(history)}


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),
        # 50 = 24 + 24 + 2: parts of 8, 8, 8, then of 1, 1 and none at all.
        (3, {"clip_norm": 0.05, "kl_weight": 0.3}),
        (2, {"optimizer": "ivon", "num_particles": 2, "lr_per_rank": True, "lr": 0.05}),
    ],
)
def test_ranks_of_batch_b_make_the_update_of_one_with_all_of_it(tmp_path, size, changes):
    """With the same weight noise everywhere; parts of unequal size and an empty one included. The KL counts once."""
    found = Ranks(tmp_path / "ranks", size, train_with_one_noise, tmp_path / "out", changes).results()
    assert_same([one["state"] for one in found])
    assert all(one["history"] == found[0]["history"] for one in found)

    model, guide = small(seed=0)
    one_rank = {**changes, "batch_size": 8 * size}
    if one_rank.pop("lr_per_rank", False):
        one_rank["lr"] *= size
    history = fit(model, guide, X, Y, **settings(**one_rank))
    assert_same([state(model, guide), found[0]["state"]], tolerance=1e-12)
    for expected, got in zip(timeless(history), found[0]["history"], strict=True):
        assert got == pytest.approx(expected, rel=1e-10)
    assert len((tmp_path / "out" / "log.csv").read_text().splitlines()) == 4


def train_with_own_noise(communicator):
    model, guide = small(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), num_data=48)
    draws = []
    guide.register_forward_hook(lambda module, inputs, draw: draws.append(draw["1.weight"].detach().clone()))
    fit(model, guide, X[:48], Y[:48], **settings(epochs=1, batch_size=24), communicator=communicator)
    return {"state": state(model, guide), "draw": draws[0]}


def test_ranks_draw_their_own_noise_and_stay_equal(tmp_path):
    found = Ranks(tmp_path, 2, train_with_own_noise).results()
    assert_same([one["state"] for one in found])
    assert not torch.allclose(found[0]["draw"], found[1]["draw"])
    # Batch norm's running mean after one step: a tenth of the mean over both halves of the data.
    torch.testing.assert_close(found[0]["state"]["m.net.0.running_mean"], 0.1 * X[:48].mean(0))


class Noisy(nn.Module):
    """A regression whose noise is a pyro.param, which no module holds."""

    def __init__(self):
        super().__init__()
        self.net = bayesian(nn.Linear(6, 1)).double()

    def forward(self, x, y=None):
        # Each rank starts from its own.
        scale = pyro.param("noise", lambda: 2 + torch.rand(()).double(), constraint=constraints.positive)
        mean = self.net(x).squeeze(1)
        with pyro.plate("data", 50, subsample=x):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)


def train_a_pyro_param(communicator, folder):
    torch.manual_seed(communicator.rank)
    model = Noisy()
    guide = MeanFieldNormal(model, X[:1], X[:1, 0]).double()
    fit(model, guide, X, X[:, 0], **settings(), communicator=communicator, folder=folder)
    return {**state(model, guide), "noise": pyro.param("noise").detach()}


def test_pyro_params_stay_equal_on_all_ranks(tmp_path):
    found = Ranks(tmp_path / "ranks", 2, train_a_pyro_param, tmp_path / "out").results()
    assert_same(found)
    start = checkpoint.load(checkpoint.find(tmp_path / "out" / "checkpoints", "0")).tensors["params.noise"].exp()
    assert found[0]["noise"] < start - 0.05


# -- stopping together -------------------------------------------------------------------------------------------


def train_in_two_goes(communicator, folder, stop_at):
    # Only rank 0 has the folder; groups draw signs, so each rank's random state has to come back too.
    folder = folder if communicator.is_main else folder / "not here"
    changes = settings(estimator="groups")
    whole = small()
    fit(*whole, X, Y, **changes, communicator=communicator, folder=folder / "whole")
    asked = iter(range(1, 1000))
    stopping = {"should_stop": lambda: communicator.rank == 1 and next(asked) >= stop_at}
    with pytest.raises(Interrupted, match=f"stopped at step {stop_at} of 12"):
        fit(*small(), X, Y, **changes, **stopping, communicator=communicator, folder=folder / "cut")
    cut = small(seed=5 + communicator.rank)
    fit(*cut, X, Y, **changes, communicator=communicator, folder=folder / "cut")
    return {"whole": state(*whole), "cut": state(*cut), "there": folder.exists()}


def test_a_stop_on_any_rank_stops_all_at_the_same_step_and_they_go_on_bitwise(tmp_path):
    found = Ranks(tmp_path / "ranks", 2, train_in_two_goes, tmp_path / "out", 6).results()
    assert_same([one[name] for one in found for name in ("whole", "cut")])
    assert [one["there"] for one in found] == [True, False]
    steps = [checkpoint.step_of(path) for path in checkpoint.saved(tmp_path / "out" / "cut" / "checkpoints")]
    assert steps == [0, 4, 6, 8, 12]


def train_and_count(communicator, folder, stop_at):
    """The examples of each step that counted here, up to a stop."""
    model, guide = small()
    seen, steps, asked, agree_really = [], [], iter(range(1, 1000)), data_parallel.agree
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    def agree(ranks, *arguments, **keywords):
        # Examples of a part that is empty do not count: the model is then in evaluation mode.
        steps.append([row.tolist() for row in seen.pop()] if model.training else [])
        return agree_really(ranks, *arguments, **keywords)

    data_parallel.agree = agree
    changes = settings(lr_schedule="cosine", lr_per_rank=True, epochs=2)
    stopping = {"should_stop": lambda: next(asked) >= stop_at}
    history = None
    with contextlib.suppress(Interrupted):
        history = fit(model, guide, X, Y, **changes, **stopping, communicator=communicator, folder=folder)
    return {"steps": steps, "history": history, "state": state(model, guide)}


@pytest.mark.parametrize("sizes", [(2, 3), (3, 1), (1, 2)])
def test_on_another_number_of_ranks_each_example_of_the_epoch_is_still_seen_once(tmp_path, sizes):
    before = Ranks(tmp_path / "before", sizes[0], train_and_count, tmp_path / "out", 2).results()
    after = Ranks(tmp_path / "after", sizes[1], train_and_count, tmp_path / "out", 1000).results()
    assert_same([one["state"] for one in after])
    rows = [tuple(row) for one in (*before, *after) for step in one["steps"] for row in step]
    # Two epochs, of which the first was cut in two.
    assert Counter(rows) == Counter({tuple(row): 2 for row in X.tolist()})
    first = [tuple(row) for one in before for step in one["steps"] for row in step]
    assert len(first) == len(set(first)) == 2 * 8 * sizes[0] < len(X)
    history = after[0]["history"]
    left = math.ceil((len(X) - len(first)) / (8 * sizes[1]))
    an_epoch = math.ceil(len(X) / (8 * sizes[1]))
    assert [row["step"] for row in history] == [2 + left, 2 + left + an_epoch]
    # The schedule counts examples: its last step begins before the last, smaller, batch.
    done = 1 - (len(X) - (an_epoch - 1) * 8 * sizes[1]) / (2 * len(X))
    assert history[-1]["lr"] == pytest.approx(0.01 * sizes[1] * 0.5 * (1 + math.cos(math.pi * done)))
    with pytest.raises(ValueError, match="holds a training with epochs 2, this one has 3"):
        fit(*small(), X, Y, **settings(lr_schedule="cosine", lr_per_rank=True), folder=tmp_path / "out")


def train_until_rank_1_goes_bad(communicator, folder):
    model, guide = small()
    # The first call is the look before the first step.
    asked = iter(range(-1, 1000))

    def spoil(module, inputs, output):
        return output * (math.nan if communicator.rank == 1 and next(asked) >= 5 else 1.0)

    model.net.get_submodule("1").register_forward_hook(spoil)
    with pytest.raises(Diverged) as bad:
        fit(model, guide, X, Y, **settings(), communicator=communicator, folder=folder)
    with pytest.raises(UserError) as not_finite:
        fit(*small(), X.index_fill(0, torch.tensor([5, 6]), math.nan), Y, **settings(), communicator=communicator)
    return {"state": state(model, guide), "message": str(bad.value), "example": str(not_finite.value)}


def test_a_bad_number_on_one_rank_stops_all_before_the_update(tmp_path):
    found = Ranks(tmp_path / "ranks", 2, train_until_rank_1_goes_bad, tmp_path / "out").results()
    assert found[0]["message"] == found[1]["message"]
    assert "at step 6 (loss nan" in found[0]["message"]
    assert found[0]["example"] == found[1]["example"]
    assert found[0]["example"].startswith(("example 5: its inputs have NaN", "example 6: its inputs have NaN"))
    assert "output of layer net.1 is the first that is not finite, on rank 1 of 2" in found[0]["message"]
    assert_same([one["state"] for one in found])
    assert all(value.isfinite().all() for value in found[0]["state"].values())
    assert checkpoint.step_of(checkpoint.find(tmp_path / "out" / "checkpoints")) == 4


def train_until_rank_1_changes(communicator, folder):
    model, guide = small()
    asked = iter(range(1, 1000))

    def spoil():
        if communicator.rank == 1 and next(asked) == 6:
            # The last bit of one number.
            number = next(iter(guide.state_dict().values()))
            number.view(torch.int64).view(-1)[3] ^= 1
        return False

    with pytest.raises(Diverged) as bad:
        fit(
            model, guide, X, Y, **settings(compare_every=5), should_stop=spoil, communicator=communicator, folder=folder
        )
    return {"message": str(bad.value), "name": next(iter(dict(guide.named_parameters())))}


def test_a_parameter_that_changes_on_one_rank_is_found_and_named(tmp_path):
    found = Ranks(tmp_path / "ranks", 3, train_until_rank_1_changes, tmp_path / "out").results()
    assert len({one["message"] for one in found}) == 1
    # Three ranks take 3 steps an epoch: the end of the second comes before step 10.
    assert "no longer the same at step 6: " in found[0]["message"]
    assert f"{found[0]['name']} of rank 1 is not rank 0's" in found[0]["message"]
    assert checkpoint.step_of(checkpoint.find(tmp_path / "out" / "checkpoints")) == 3


def stop_while_rank_0_writes_slowly(communicator, folder):
    save, ended = checkpoint.save, 0.0

    def slowly(*args, **keywords):
        nonlocal ended
        time.sleep(1)
        path = save(*args, **keywords)
        ended = time.time()
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", slowly)
        with pytest.raises(Interrupted):
            fit(*small(), X, Y, **settings(), communicator=communicator, folder=folder, should_stop=lambda: True)
    return ended, time.time()


def test_no_rank_ends_while_rank_0_writes_the_checkpoint(tmp_path):
    (written, _), (_, over) = Ranks(tmp_path, 2, stop_while_rank_0_writes_slowly, tmp_path / "out").results()
    assert 0 < written <= over
