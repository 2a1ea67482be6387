"""Each operation of the table computes what its torch reference defines."""

import pytest
import torch

from ppl_bnn.native import arithmetic as arithmetic_module
from ppl_bnn.native.arithmetic import OPERATIONS, Operation, compiled_arithmetic, difference
from ppl_bnn.native.library import library


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("count", [37, 4096 + 5])
def test_the_c_code_of_each_operation_is_its_reference_to_a_floats_rounding(name, count):
    native = library(arithmetic_module._SOURCE, arithmetic_module._agrees)
    assert native is not None
    assert hasattr(native, OPERATIONS[name].symbol)
    assert difference(OPERATIONS[name], count) < 1e-6


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("way", ["blocks", "compiled"])
def test_torchs_other_forms_of_each_operation_are_its_reference(name, way, monkeypatch):
    monkeypatch.setattr(arithmetic_module, "library", lambda *of: None)
    if way == "compiled":
        with compiled_arithmetic():
            assert difference(OPERATIONS[name], 37) < 1e-5  # the compiler's sigmoid has fewer digits
    else:
        monkeypatch.setattr(arithmetic_module, "_BLOCK", 20)
        assert difference(OPERATIONS[name], 137) < 2e-6


def test_the_name_of_a_python_function_decides_nothing(monkeypatch):
    called = []

    def renamed(scale, u, loc):
        called.append("torch")
        return OPERATIONS["scale"].reference(scale, u, loc)

    u, loc, scale = torch.linspace(-3, 3, 50), torch.linspace(-1, 1, 50), torch.empty(50)
    sums = Operation(renamed, "scale", tensors=3)(scale, u, loc)
    assert not called
    assert torch.equal(sums, OPERATIONS["scale"](torch.empty(50), u, loc))
    Operation(renamed, None, tensors=3)(scale, u, loc)
    assert called == ["torch"]


def test_arguments_that_are_not_those_of_the_table_do_not_reach_the_c_code():
    x = [torch.ones(5) for _ in range(9)]
    with pytest.raises(TypeError, match=r"draw takes 4 tensors, .* in this order; got Tensor, Tensor, Tensor$"):
        OPERATIONS["draw"](*x[:3])
    with pytest.raises(TypeError, match="scale_gradients takes 5 tensors, 0 lists of one length and 2 scalars"):
        OPERATIONS["scale_gradients"](*x[:5], torch.tensor(1.0))
    with pytest.raises(TypeError, match="flipped takes 3 tensors, 3 lists"):
        OPERATIONS["flipped"](*x[:6])
    with pytest.raises(TypeError, match="got Tensor, Tensor, Tensor, list of 2, list of 2, list of 1"):
        OPERATIONS["flipped"](*x[:3], x[3:5], x[5:7], x[7:8])
    with pytest.raises(RuntimeError, match="expanded size"):
        OPERATIONS["draw"](x[0], x[1], torch.ones(6), x[2])
    with pytest.raises((RuntimeError, ValueError), match=r"[Ss]calar"):
        OPERATIONS["scale_gradients"](*x[:5], torch.ones(5), torch.tensor(1.0))


def test_no_flips_leave_the_opposite_alone():
    opposite, weight, loc = torch.empty(7), torch.randn(7), torch.randn(7)
    OPERATIONS["flipped"](opposite, weight, loc, [], [], [])
    torch.testing.assert_close(opposite, 2 * loc - weight)
