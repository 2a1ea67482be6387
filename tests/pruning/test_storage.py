import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, build, prune
from ppl_bnn.errors import FileError
from ppl_bnn.models.random_network import point_state
from ppl_bnn.pruning.storage import load_pruned, save_pruned
from ppl_bnn.safe_tensors import read_verified

pytestmark = pytest.mark.any_python


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
    save_pruned(path, model=model, guide=pruned.guide)
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    index = sum(part["data_offsets"][1] - part["data_offsets"][0] for name, part in header.items() if "index" in name)
    nonzero = sum(pruned.nonzero.values())
    assert index <= 268_800 / 8 + 3
    if fraction < 0.99:
        assert path.stat().st_size <= 1.3 * (nonzero * 8 + index)
    torch.manual_seed(1)
    other = Classifier(build("bnn-fc"), 2)
    loaded = load_pruned(
        path, model=other, guide=MeanFieldNormal(other, torch.rand(2, 1, 28, 28), torch.zeros(2).long())
    )
    for (site, here), there in zip(pruned.guide.draw(3).items(), loaded.draw(3).values(), strict=True):
        assert torch.equal(here, there), site
    assert all(torch.equal(value, point_state(other)[name]) for name, value in point_state(model).items())


def test_distances_beyond_255_and_no_weight_at_all(tmp_path):
    model, guide = small()
    keep = {site: torch.zeros_like(guide.loc_scale(site)[0], dtype=torch.bool) for site in guide.sites}
    keep["net.0.weight" if "net.0.weight" in keep else "0.weight"].view(-1)[[0, 255, 256, 1200, 2399]] = True
    save_pruned(tmp_path / "p", model=model, guide=guide.pruned(keep))
    loaded = load_pruned(tmp_path / "p", model=model, guide=guide)
    assert all(torch.equal(loaded.loc_scale(site)[1] > 0, keep[site]) for site in guide.sites)


def saved(folder):
    model, guide = small()
    save_pruned(folder / "p", model=model, guide=prune(guide, fraction=0.8).guide)
    return model, guide, (folder / "p").read_bytes()


def test_a_truncated_altered_or_foreign_file_is_one_clear_line(tmp_path):
    model, guide, content = saved(tmp_path)
    broken = [content[:at] for at in (0, 7, 100, len(content) // 2, len(content) - 1)]
    flipped = (3, 50, len(content) // 2, len(content) - 2)
    broken += [content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] for at in flipped]
    for part in [*broken, b"something else " * 40]:
        (tmp_path / "p").write_bytes(part)
        with pytest.raises(FileError, match=r"truncated or not a pruned posterior|altered") as error:
            load_pruned(tmp_path / "p", model=model, guide=guide)
        assert "\n" not in str(error.value)
    with pytest.raises(FileError, match="not there"):
        load_pruned(tmp_path / "q", model=model, guide=guide)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_what_is_read_lies_in_the_mapped_file_and_is_not_copied(tmp_path):
    saved(tmp_path)
    tensors, _ = read_verified(tmp_path / "p", "pruned", name="p", kind="pruned posterior", advice="")
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(tmp_path / "p"))]
    first, last = (int(end, 16) for end in lines[0].split()[0].split("-"))
    assert all(first <= value.data_ptr() < last for value in tensors.values())


def test_another_network_is_refused_by_site_and_shapes(tmp_path):
    saved(tmp_path)
    model, guide = small(hidden=41)
    with pytest.raises(FileError, match=r"site '\S*weight': saved \[40, 60\], now \[41, 60\]"):
        load_pruned(tmp_path / "p", model=model, guide=guide)
