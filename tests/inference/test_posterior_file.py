"""A posterior's file: what is read draws what was saved, and what does not fit is refused."""

import json
import struct
from pathlib import Path

import pytest
import torch
from pyro.distributions import LogNormal
from pyro.infer.autoguide import AutoMultivariateNormal
from safetensors.torch import save_file
from torch import nn

from ppl_bnn import (
    Classifier,
    MeanFieldNormal,
    Model,
    Normal,
    StoredPosterior,
    as_posterior,
    bayesian,
    build,
    fit,
    predict,
    prune,
)
from ppl_bnn.errors import FileError, UserError
from ppl_bnn.inference.posterior_file import load_posterior, save_posterior
from ppl_bnn.models.random_network import point_state
from ppl_bnn.safe_tensors import checksum, read_verified

X = torch.zeros(1, 60)


def small(hidden=40):
    net = bayesian(nn.Sequential(nn.Linear(60, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 3)))
    model = Classifier(net, 2)
    return model, MeanFieldNormal(model, torch.rand(2, 60), torch.zeros(2).long())


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9, 0.95, 0.98, 0.999])
def test_the_file_holds_little_more_than_the_non_zeros_and_draws_the_same(tmp_path, fraction):
    path = tmp_path / "pruned.safetensors"
    model = Classifier(build("bnn-fc"), 2)
    guide = MeanFieldNormal(model, torch.rand(2, 1, 28, 28), torch.zeros(2).long())
    pruned = prune(guide, fraction=fraction)
    save_posterior(path, model, pruned.guide)
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    index = sum(part["data_offsets"][1] - part["data_offsets"][0] for name, part in header.items() if "index" in name)
    nonzero = sum(pruned.nonzero.values())
    assert index <= 268_800 / 8 + 3
    if fraction < 0.99:
        assert path.stat().st_size <= 1.3 * (nonzero * 8 + index)
    torch.manual_seed(1)
    other = Classifier(build("bnn-fc"), 2)
    loaded = load_posterior(path, other, torch.rand(2, 1, 28, 28), torch.zeros(2).long())
    for (site, here), there in zip(pruned.guide.draw(3).items(), loaded.draw(3).values(), strict=True):
        assert torch.equal(here, there), site
    assert all(torch.equal(value, point_state(other)[name]) for name, value in point_state(model).items())


def test_distances_beyond_255_and_no_weight_at_all(tmp_path):
    model, guide = small()
    keep = {site: torch.zeros_like(guide.loc_scale(site)[0], dtype=torch.bool) for site in guide.sites}
    keep["net.0.weight" if "net.0.weight" in keep else "0.weight"].view(-1)[[0, 255, 256, 1200, 2399]] = True
    save_posterior(tmp_path / "p", model, guide.pruned(keep))
    loaded = load_posterior(tmp_path / "p", model, X)
    assert all(torch.equal(loaded.loc_scale(site)[1] > 0, keep[site]) for site in guide.sites)


def saved(folder):
    model, guide = small()
    save_posterior(folder / "p", model, prune(guide, fraction=0.8).guide)
    return model, (folder / "p").read_bytes()


def test_a_truncated_altered_or_foreign_file_is_one_clear_line(tmp_path):
    model, content = saved(tmp_path)
    broken = [content[:at] for at in (0, 7, 100, len(content) // 2, len(content) - 1)]
    flipped = (3, 50, len(content) // 2, len(content) - 2)
    broken += [content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] for at in flipped]
    for part in [*broken, b"something else " * 40]:
        (tmp_path / "p").write_bytes(part)
        with pytest.raises(FileError, match=r"truncated or not a posterior|altered") as error:
            load_posterior(tmp_path / "p", model, X)
        assert "\n" not in str(error.value)
    with pytest.raises(FileError, match="not there"):
        load_posterior(tmp_path / "q", model, X)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_what_is_read_lies_in_the_mapped_file_and_is_not_copied(tmp_path):
    saved(tmp_path)
    tensors, _ = read_verified(tmp_path / "p", "pruned", name="p", kind="pruned posterior", advice="")
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(tmp_path / "p"))]
    first, last = (int(end, 16) for end in lines[0].split()[0].split("-"))
    assert all(first <= value.data_ptr() < last for value in tensors.values())


def test_another_network_is_refused_by_site_and_shapes(tmp_path):
    saved(tmp_path)
    model, _ = small(hidden=41)
    with pytest.raises(FileError, match=r"site '\S*weight': saved \[40, 60\], now \[41, 60\]"):
        load_posterior(tmp_path / "p", model, X)


def fitted(model, *data, epochs=3):
    guide = MeanFieldNormal(model, *(part[:1] for part in data))
    fit(model, guide, *data, epochs=epochs, batch_size=20, seed=1, progress=False)
    return guide


def network():
    return bayesian(nn.Sequential(nn.Linear(4, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 1)))


def regression(x, y):
    model = Model(network(), Normal(scale=LogNormal(-1.0, 1.0)), len(x))
    return model, fitted(model, x, y)


@pytest.mark.parametrize("fraction", [None, 0.5])
def test_a_noise_scale_and_batch_norm_come_back_and_predictions_are_the_same(tmp_path, fraction):
    x, y = torch.randn(60, 4), torch.randn(60)
    model, guide = regression(x, y)
    guide = guide if fraction is None else prune(guide, fraction=fraction).guide
    assert guide.latents == ["noise_scale"]
    save_posterior(tmp_path / "p", model, guide)
    other = Model(network(), Normal(scale=LogNormal(-1.0, 1.0)), 60)
    state = torch.get_rng_state()
    loaded = load_posterior(tmp_path / "p", other, x[:1], y[:1])
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.is_masked is (fraction is not None)
    for site, values in guide.draw(7, seed=3).items():
        assert torch.equal(loaded.draw(7, seed=3)[site], values), site
    here, there = (predict(*pair, x, y, num_samples=5, progress=False) for pair in ((model, guide), (other, loaded)))
    assert torch.equal(here.mean, there.mean)
    assert here.scores() == there.scores()


def test_a_file_of_the_first_format_that_lacks_a_latent_is_refused(tmp_path):
    x, y = torch.randn(20, 4), torch.randn(20)
    model, guide = regression(x, y)
    save_posterior(tmp_path / "p", model, guide)
    tensors, content = read_verified(tmp_path / "p", "pruned", name="p", kind="posterior", advice="")
    kept = {name: value for name, value in tensors.items() if "latent/" not in name}
    text = json.dumps({"format": "ppl_bnn pruned posterior 1", "sites": content["sites"]})
    save_file(kept, tmp_path / "p", metadata={"pruned": text, "crc32": str(checksum(kept, text))})
    with pytest.raises(FileError, match=r"left out the latent 'noise_scale': write it again"):
        load_posterior(tmp_path / "p", model, x[:1], y[:1])


def test_stored_draws_come_back_with_their_chains_and_latents(tmp_path):
    model = Model(network(), Normal(scale=LogNormal(-1.0, 1.0)), 60)
    shapes = {"0.weight": (20, 4), "3.weight": (1, 20), "noise_scale": ()}
    samples = {site: torch.rand(6, *shape) for site, shape in shapes.items()}
    posterior = StoredPosterior(samples, latents=["noise_scale"], num_chains=2)
    save_posterior(tmp_path / "p", model, posterior)
    torch.manual_seed(5)
    other = Model(network(), Normal(scale=LogNormal(-1.0, 1.0)), 60)
    loaded = load_posterior(tmp_path / "p", other)
    assert (loaded.sites, loaded.latents, loaded.chain(5)) == (posterior.sites, posterior.latents, 1)
    assert all(torch.equal(loaded.draw(4)[site], samples[site][4]) for site in samples)
    x = torch.randn(9, 4)
    here, there = (predict(*pair, x, num_samples=6, progress=False) for pair in ((model, posterior), (other, loaded)))
    assert torch.equal(here.mean, there.mean)
    wider = bayesian(nn.Sequential(nn.Linear(5, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 1)))
    with pytest.raises(FileError, match=r"site '0.weight': saved \[20, 4\], now \[20, 5\]"):
        load_posterior(tmp_path / "p", Model(wider, Normal(scale=LogNormal(-1.0, 1.0)), 60))


def test_other_point_estimates_are_refused_and_nothing_is_changed(tmp_path):
    saved(tmp_path)
    net = bayesian(nn.Sequential(nn.Linear(60, 40), nn.LayerNorm(40), nn.ReLU(), nn.Linear(40, 3)))
    model = Classifier(net, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FileError, match=r"another network: 'net.1.num_batches_tracked': saved \[\], now absent"):
        load_posterior(tmp_path / "p", model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_kind_of_posterior_is_told_how_to_be_kept(tmp_path):
    model, _ = small()
    posterior = as_posterior(AutoMultivariateNormal(model), torch.rand(2, 60), torch.zeros(2).long(), model=model)
    with pytest.raises(UserError, match="takes a MeanFieldNormal or a StoredPosterior, got PyroGuide: keep draws"):
        save_posterior(tmp_path / "p", model, posterior)
    assert not (tmp_path / "p").exists()
