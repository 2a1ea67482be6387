"""Devices and precisions that are not here: refused in one line, before any data is read."""

import logging

import pytest
import torch
from refusals import assert_refused
from small_training import X, Y, settings, small

from ppl_bnn import devices, fit
from ppl_bnn.devices import check_precision, devices_here, usable_device
from ppl_bnn.errors import UserError
from ppl_bnn.experiment import run_data

NO_ACCELERATOR = pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")


@pytest.fixture
def no_bfloat16(monkeypatch):
    """A machine that multiplies no two matrices of bfloat16, as an old GPU."""
    multiply = torch.Tensor.__matmul__

    def refuse(one, other):
        if one.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'. More about that")
        return multiply(one, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", refuse)


@pytest.fixture
def no_data(monkeypatch):
    def load(*_, **__):
        raise AssertionError("the data was read")

    monkeypatch.setattr(run_data, "load", load)


@NO_ACCELERATOR
@pytest.mark.parametrize("name", ["cuda", "cuda:3", "mps", "xpu", "cdua", "cpu:x", ""])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(call, no_data, name):
    with pytest.raises(UserError, match=rf"^device '{name}' cannot be used: .+; choose another: this machine has cpu$"):
        usable_device(name)
    assert_refused(call(f"--device={name}"), f"device '{name}' cannot be used: ", "; choose another: this machine has")


def test_every_device_here_is_named_and_usable(monkeypatch):
    assert [usable_device(name).type for name in devices_here()] == [name.partition(":")[0] for name in devices_here()]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert devices_here() == ["cpu", "cuda:0", "cuda:1"]
    # A torch built for GPUs on a machine without one.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert devices_here() == ["cpu"]


def test_a_precision_that_the_device_has_not_is_refused(call, no_bfloat16, no_data):
    parts = ["cannot compute in bfloat16", "not implemented for 'BFloat16'", "use precision float32"]
    assert_refused(call("--train.precision", "bfloat16", "--stages", "train"), *parts)
    check_precision(torch.device("cpu"), "float32")
    with pytest.raises(UserError, match="the device cpu cannot compute in bfloat16"):
        fit(*small(), X, Y, **settings(precision="bfloat16"))
    with pytest.raises(UserError, match="the device meta cannot compute in bfloat16"):
        check_precision(torch.device("meta"), "bfloat16")


def test_emulated_bfloat16_is_warned_of_once(caplog, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(devices.platform, "machine", lambda: "x86_64")
    devices._warn_of_emulation.cache_clear()
    with caplog.at_level(logging.WARNING, "ppl_bnn"):
        fit(*small(), X, Y, **settings(precision="float32"))
        assert not caplog.records
        for _ in range(2):
            fit(*small(), X, Y, **settings(precision="bfloat16"))
    assert len(caplog.records) == 1
    assert "device cpu has no bfloat16" in caplog.text
    devices._warn_of_emulation.cache_clear()
