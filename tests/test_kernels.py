"""benchmarks/kernels.py: what a training step asks of an accelerator stays within limits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pretend_device import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs a torch that can stand in for a device")
ROOT = Path(__file__).parent.parent
# The most kernels and host reads of a step of ResNet-18, by contender.
LIMITS = {"plain": (180, 0), "ivon": (200, 0), "groups": (320, 0)}


def counted(*arguments):
    command = [sys.executable, "kernels.py", *arguments]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", check=True, capture_output=True, text=True, timeout=120)
    return [line.split() for line in done.stdout.splitlines() if line.strip()]


def test_a_step_of_resnet18_stays_within_the_limits():
    _, *rows = counted("--networks", "resnet18", "--contenders", ",".join(LIMITS))
    assert [row[1] for row in rows] == list(LIMITS)
    for _, name, *found in rows:
        assert all(int(own) <= most for own, most in zip(found, LIMITS[name], strict=True)), (name, found)


def test_a_deterministic_step_has_the_kernels_that_its_layers_say():
    rows = counted("--networks", "tabular", "--contenders", "mlp", "--by_operation")
    # Three layers, two ReLUs, the loss's two; of each backward one, two for the weights and inputs of all but the first
    # layer, and the biases' sums; the loss's gradient, 1; the optimizer's counts, and its update.
    assert rows[1] == ["tabular", "mlp", str((3 + 2 + 2) + (1 + 2 * 2 + 3 + 2 + 2) + 1 + 2), "0"]
    found = {row[2]: int(row[3]) for row in rows[3:]}
    assert (found["addmm"], found["mm"], found["threshold_backward"], found["_fused_adam_"]) == (3, 5, 2, 1)


CODE = """
import json, sys
import torch
from kernels import Counted
sys.path.append("../tests")
from pretend_device import pretend_device

def counts(work):
    with Counted() as found:
        work()
    return found.kernels.total(), found.reads.total()

with pretend_device():
    x, there = torch.rand(6), torch.rand(6, device="pretend")
    many = [there] * 111
    work = {
        "on the CPU": lambda: (x + 1).sum().item(),
        "views": lambda: torch.empty_like(there).view(2, 3).t()[0].detach(),
        "two": lambda: there.add_(1).view(2, 3).sum(),
        "item": lambda: there.sum().item(),
        "tolist": lambda: there.tolist(),
        "to the device": lambda: x.to("pretend"),
        "without a wait": lambda: x.to("pretend", non_blocking=True),
        "nonzero": lambda: there.nonzero(),
        "by booleans": lambda: there[there > 2],
        "by numbers": lambda: there[torch.zeros(2, dtype=torch.int64, device="pretend")],
        "a list": lambda: torch._foreach_add(many, 1),
    }
    print(json.dumps({name: counts(one) for name, one in work.items()}))
"""


def test_kernels_and_host_reads_are_what_the_help_says():
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", check=True, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout) == {
        "on the CPU": [0, 0],
        "views": [0, 0],
        "two": [2, 0],
        "item": [1, 1],
        "tolist": [0, 1],
        "to the device": [0, 1],
        "without a wait": [1, 0],
        "nonzero": [0, 1],
        "by booleans": [1, 1],
        "by numbers": [2, 0],
        "a list": [2, 0],
    }
