"""Data sets: what is verified, what is cached, and every way a source or a file can fail."""

import hashlib
import io
import subprocess

import numpy as np
import pytest
import torch
from idx_files import md5s, small_idx
from jpeg_files import jpegs

from ppl_bnn.data import named as data
from ppl_bnn.data import sources as data_sources
from ppl_bnn.errors import FileError


@pytest.fixture
def fake_mnist(monkeypatch, tmp_path):
    """Small IDX files under MNIST's names, with their own checksums, that torchvision seems to download."""
    files = small_idx()
    monkeypatch.setitem(data_sources._IDX_MD5, "mnist", md5s(files))
    calls = []

    def serve(name, target):
        calls.append(name)
        for file, content in files.items():
            (target / file).write_bytes(content)
        return target

    monkeypatch.setattr(data_sources, "_from_torchvision", serve)
    return files, calls, serve


def refuse(name, target):
    raise RuntimeError("no network\nTried https://example.invalid")


def test_mnist_is_mnist(mnist):
    train, test = mnist
    assert train.pixels.shape == (60_000, 1, 28, 28)
    assert train.pixels.dtype == torch.uint8
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.title == "MNIST"
    assert train.inputs().min() == 0
    assert train.inputs().max() == 1


def test_a_download_is_kept(fake_mnist, tmp_path):
    files, calls, _ = fake_mnist
    train, test = data.load("mnist", tmp_path)
    assert calls == ["mnist"]
    assert len(train) == 20
    np.testing.assert_array_equal(test.labels, np.arange(10))
    data.load("mnist", tmp_path)
    assert calls == ["mnist"]
    assert {path.name for path in (tmp_path / "mnist").iterdir()} == set(files)


def test_a_download_of_rubbish_is_not_kept(fake_mnist, tmp_path, monkeypatch):
    _, _, serve = fake_mnist

    def rubbish(name, target):
        serve(name, target)
        (target / "train-images-idx3-ubyte").write_bytes(b"<html>404</html>")
        return target

    monkeypatch.setattr(data_sources, "_from_torchvision", rubbish)
    with pytest.raises(FileError, match=r"by torchvision \(train-images-idx3-ubyte is corrupt: 16 bytes"):
        data.load("mnist", tmp_path)
    assert list((tmp_path / "mnist").iterdir()) == []


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
    monkeypatch.setattr(data_sources, "_from_torchvision", refuse)
    rows = np.column_stack([np.random.default_rng(0).integers(0, 256, (5000, 784)), np.arange(5000) // 500])
    text = io.StringIO()
    np.savetxt(text, rows, delimiter=",", fmt="%d")
    raw = text.getvalue().encode()
    monkeypatch.setattr(data_sources, "_SUBSET_MD5", hashlib.md5(raw).hexdigest())
    data_sources.keep_digits_subset(raw, tmp_path / "mnist")
    train, test = data.load("mnist", tmp_path)
    assert train.title == test.title == "MNIST (5,000-digit subset)"
    assert "could not be downloaded by torchvision (no network)" in caplog.text
    assert "5,000 MNIST digits" in caplog.text
    assert train.labels.bincount().tolist() == [400] * 10
    assert test.labels.bincount().tolist() == [100] * 10
    # Training digits are not in order of class, or batches would be.
    assert train.labels[:50].unique().numel() > 5
    np.testing.assert_array_equal(test.pixels[0].flatten(), rows[4, :-1])
    (tmp_path / "mnist" / "mnist_5k.csv").write_bytes(raw[:-1])
    with pytest.raises(FileError, match=r"mnist_5k.csv is corrupt"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_without_a_download_the_message_tells_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setattr(data_sources, "_from_torchvision", refuse)
    with pytest.raises(
        FileError,
        match=rf"^{name} could not be downloaded by torchvision \(no network\); put the raw files train-images-idx3-"
        r"ubyte, .* into .*, or run tools/fetch_data.py",
    ):
        data.load(name, tmp_path)


def test_the_library_starts_no_other_program(fake_mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(data_sources, "_from_torchvision", refuse)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(FileError, match="could not be downloaded"):
        data.load("mnist", tmp_path)


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
        ("is_test", np.arange(12), "is_test must be a vector of 0 and 1"),
        ("is_test", np.zeros(12, bool), "with both in it"),
        ("labels", np.arange(12), "integers from 0 to 9"),
        ("labels", np.zeros((12, 1), int), "labels must be a vector"),
        ("labels", np.full(12, 0.5), "labels must be a vector of integers"),
        ("offsets", np.linspace(0, 1, 13), "offsets must be integers, got float64"),
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
