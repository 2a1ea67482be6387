"""Where named data sets are kept, if no folder is given."""

from pathlib import Path

import pytest

from ppl_bnn.data.cache import data_folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PPL_BNN_DATA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path / "home"


def test_the_folder_given_comes_first_then_the_environment_then_a_checkout_then_the_cache(home, monkeypatch):
    assert data_folder() == home / ".cache" / "ppl_bnn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    assert data_folder() == home / "cache" / "ppl_bnn"
    # A folder of the user's own files.
    Path("data", "photos").mkdir(parents=True)
    assert data_folder() == home / "cache" / "ppl_bnn"
    Path("data", "mnist").mkdir()
    assert data_folder() == Path("data")
    monkeypatch.setenv("PPL_BNN_DATA", "~/sets")
    assert data_folder() == home / "sets"
    assert data_folder("elsewhere") == Path("elsewhere")
