"""Files that cannot be read as arrays, or could run code, are refused by name."""

import numpy as np
import pytest
import torch

from ppl_bnn.data import load
from ppl_bnn.errors import FileError


@pytest.mark.parametrize("kind", ["npz", "h5", "torch"])
def test_a_file_of_another_kind_is_refused(tmp_path, kind):
    path = tmp_path / "rows"
    with pytest.raises(FileError, match=r"data.file .*rows is not there"):
        load(kind, file=path)
    path.write_text("size,price\n1,2\n")
    with pytest.raises(FileError, match=f"data.file .*rows cannot be read as {kind}: ") as refusal:
        load(kind, file=path)
    assert "\n" not in str(refusal.value)


def test_a_file_that_could_run_code_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(FileError, match="cannot be read as npz"):
        load("npz", file=tmp_path)
    torch.save({"x": print}, tmp_path / "data.pt")
    with pytest.raises(FileError, match="cannot be read as torch"):
        load("torch", file=tmp_path / "data.pt")


def test_what_holds_no_arrays_is_refused(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "data.pt")
    with pytest.raises(FileError, match="must hold a dict of tensors, such as x and y"):
        load("torch", file=tmp_path / "data.pt")
    np.save(tmp_path / "x.npy", np.zeros((5, 4)))
    with pytest.raises(FileError, match=r"is one array: give a folder with x.npy and y.npy"):
        load("npz", file=tmp_path / "x.npy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="empty has no arrays"):
        load("npz", file=tmp_path / "empty")
