"""A step that does not fit into memory: what it needs is estimated, the refusal says what fits, nothing is lost."""

import json
import re
import subprocess
import sys

import pytest
import torch
from refusals import assert_refused
from small_training import X, Y, assert_same_state, settings, small, state, timeless

from ppl_bnn import fit
from ppl_bnn.errors import UserError
from ppl_bnn.inference import memory
from ppl_bnn.inference.optimizers import build_optimizer

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process as Linux shows it")
ON_A_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you")
# Two steps of a network in a process of its own: their peak, and the estimate before and after them.
STEP = r"""
import gc, json, re, sys
from functools import partial
import pyro, torch
from torch import nn
from ppl_bnn import Classifier, KLScaledELBO, MeanFieldNormal, bayesian
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.inference.memory import step_memory
from ppl_bnn.inference.optimizers import build_optimizer
from ppl_bnn.inference.updates import Update
from ppl_bnn.native.memory import return_freed_memory

def make(net, x, optimizer, estimator):
    y = torch.randint(10, (len(x),))
    model = Classifier(bayesian(net), 50_000)
    guide = MeanFieldNormal(model, x[:2], y[:2])
    made, elbo = build_optimizer(optimizer, model, guide, lr=1e-3), KLScaledELBO(50_000)
    loss = partial(elbo.differentiable_loss, model, guide)
    def step():
        loss(x, y).backward()
        Update(made)()
    return step, lambda: step_memory(loss, model, guide, made, x, y).of(len(x))

def dense(width, depth):
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), *hidden, nn.Linear(width, 10))

def images():
    block = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*block, nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 1024, 10))

def peak():
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1])

torch.set_num_threads(1)
pyro.enable_validation(False)
kind, optimizer, estimator = sys.argv[1:]
ESTIMATORS[estimator]().__enter__()
make(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 10)), torch.rand(8, 3, 6, 6), optimizer,
     estimator)[0]()
gc.collect()
return_freed_memory()
# The peak so far, of the imports, becomes the present size.
open("/proc/self/clear_refs", "w").write("5")
least = peak()
net, x = {
    "weights": lambda: (dense(1536, 2), torch.rand(16, 64)),
    "examples": lambda: (dense(256, 4), torch.rand(40_000, 64)),
    "images": lambda: (images(), torch.rand(256, 3, 32, 32)),
}[kind]()
step, estimate = make(net, x, optimizer, estimator)
before = estimate()
step()
step()
print(json.dumps([peak() - least, before, estimate()]))
"""

# A training in a process that may take 500 MiB more than a small one of its kind.
LIMITED = r"""
import re, resource, sys, torch
from torch import nn
from ppl_bnn import Classifier, MeanFieldNormal, bayesian, fit
from ppl_bnn.errors import UserError

def train(batch_size, count):
    x, y = torch.rand(count, 64), torch.randint(10, (count,))
    hidden = [layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.ReLU())]
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), *hidden, nn.Linear(256, 10))
    model = Classifier(bayesian(net), count)
    guide = MeanFieldNormal(model, x[:2], y[:2])
    fit(model, guide, x, y, epochs=1, batch_size=batch_size, estimator="plain", progress=False)

torch.set_num_threads(1)
train(10, 20)
size = 1024 * int(re.search(r"VmSize:\s*(\d+) kB", open("/proc/self/status").read())[1])
resource.setrlimit(resource.RLIMIT_AS, (size + 500 * 2**20,) * 2)
try:
    train(int(sys.argv[1]), 100_000)
    print("it fits")
except UserError as error:
    print(error)
"""


class Refusing(torch.nn.Module):
    """A layer that cannot allocate memory from its call number `at` on, for more than `most` examples."""

    def __init__(self, error, at, most=0):
        super().__init__()
        self.error, self.left, self.most = error, at, most

    def forward(self, x):
        self.left -= 1
        if self.left < 0 and len(x) > self.most:
            raise self.error
        return x


def refusing(error, at, most=0):
    model, guide = small()
    model.net.add_module("refusing", Refusing(error, at, most))
    return model, guide


@LINUX
@pytest.mark.parametrize(
    ("kind", "optimizer", "estimator"),
    [
        ("weights", "ivon", "groups"),
        ("examples", "adam", "plain"),
        ("images", "adam", "flipout"),
    ],
)
def test_the_estimate_is_within_a_factor_of_two_of_the_peak(kind, optimizer, estimator):
    command = [sys.executable, "-c", STEP, kind, optimizer, estimator]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    peak, *estimates = json.loads(done.stdout)
    assert peak > 2**26
    for estimate in estimates:
        assert peak / 2 < estimate < peak * 2, (peak, estimates)


@pytest.mark.parametrize(("optimizer", "bytes_a_weight", "bytes_a_point"), [("adam", 44, 16), ("ivon", 32, 12)])
def test_a_weight_and_a_point_estimate_count_what_a_step_holds_of_them(optimizer, bytes_a_weight, bytes_a_point):
    model, guide = small()
    made = build_optimizer(optimizer, model, guide, lr=0.1)
    weights, points = 6 * 8 + 8 * 2, 8 + 2
    need = memory.step_memory(lambda x, _: x.sum(), model, guide, made, X, Y)
    assert (need.fixed, need.example) == (bytes_a_weight * weights + bytes_a_point * points, 0)


def test_an_example_counts_what_back_propagation_keeps():
    model, guide = small(deterministic=True)
    made = build_optimizer("adam", model, guide, lr=0.1)

    def loss(x, y):
        # The weights, shared by all examples, and 5 and 7 numbers of each.
        hidden = x @ torch.ones(6, 5, requires_grad=True)
        return (hidden.exp() @ torch.ones(5, 7, requires_grad=True)).exp().sum()

    need = memory.step_memory(loss, model, guide, made, X, Y)
    # The inputs, both results of exp, and two gradients as large as the larger.
    assert need.example == 4 * (6 + 5 + 7 + 2 * 7)
    # 1 for the first product's weights, whose other factor has no gradient.
    points = 6 * 8 + 8 + 8 * 2 + 2
    assert need.fixed == 16 * points + 4 * 5 * 7


@pytest.mark.parametrize(
    "error", [ON_A_CPU, torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError("std::bad_alloc")]
)
def test_a_batch_too_large_is_refused_with_the_largest_that_fits_and_nothing_is_lost(tmp_path, error):
    whole = small()
    history = fit(*whole, X, Y, **settings())
    # The door calls it three times; it fails in the second epoch.
    model, guide = refusing(error, at=3 + 9, most=memory._MORE - 1)
    with pytest.raises(UserError) as refused:
        fit(model, guide, X, Y, **settings(), folder=tmp_path)
    assert str(refused.value).startswith("a step with train.batch_size 8 does not fit into the memory of cpu")
    assert "The last checkpoint is good" in str(refused.value)
    resumed = small()
    assert timeless(fit(*resumed, X, Y, **settings(), folder=tmp_path)) == timeless(history)
    assert_same_state(state(*whole), state(*resumed))


def test_the_refusal_says_what_is_needed_what_there_is_and_what_fits(monkeypatch):
    def refusal(there):
        monkeypatch.setattr(memory, "free_memory", lambda device: there)
        with pytest.raises(UserError) as refused:
            fit(*refusing(ON_A_CPU, at=3, most=8), X, Y, **settings(batch_size=40))
        return str(refused.value)

    model, guide = small()
    made = build_optimizer("adam", model, guide, lr=0.1)
    held = memory.held_now(made)
    elsewhere = refusal(None)
    assert ": it needs about 0 MiB. The last checkpoint" in elsewhere
    assert "not even one example fits" in refusal(0)
    assert refusal(10 * 2**30).count(
        "it needs about 0 MiB and can have 10.0 GiB; the largest batch that fits is about 39"
    )
    seen = [int(refusal(there - held).split("about ")[2].split(".")[0]) for there in (8_000, 12_000)]
    assert 0 < seen[0] < seen[1] < 39


@LINUX
@pytest.mark.slow
def test_the_largest_batch_that_fits_does_fit():
    def run(batch_size):
        command = [sys.executable, "-c", LIMITED, str(batch_size)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    refused = run(100_000)
    assert refused.startswith("a step with train.batch_size 100000 does not fit into the memory of cpu: it needs about")
    largest = int(re.search(r"the largest batch that fits is about (\d+)\.", refused)[1])
    assert 10_000 < largest < 100_000
    assert run(largest) == "it fits\n"


def test_what_no_few_examples_can_show_is_left_out():
    with pytest.raises(UserError, match=r"does not fit into the memory of cpu\. The last checkpoint is good"):
        fit(*refusing(ON_A_CPU, at=3), X, Y, **settings())


def test_out_of_memory_is_told_from_other_errors():
    found = [ON_A_CPU, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
             RuntimeError("CUDA error: out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"),
             RuntimeError("MPS backend out of memory (MPS allocated")]  # fmt: skip
    assert all(map(memory.is_out_of_memory, found))
    assert not any(map(memory.is_out_of_memory, [RuntimeError("mat1 and mat2"), ValueError("out of memory")]))


def test_another_error_of_a_step_stays_what_it_is():
    with pytest.raises(RuntimeError, match=r"^size mismatch$") as error:
        fit(*refusing(RuntimeError("size mismatch"), at=3), X, Y, **settings())
    assert not isinstance(error.value, UserError)


def test_on_the_command_line_it_is_one_line(call, monkeypatch):
    forward = torch.nn.Linear.forward

    def refuse(layer, x):
        if len(x) == 100:
            raise ON_A_CPU
        return forward(layer, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", refuse)
    result = call("--stages", "train", "--quiet")
    assert_refused(result, "a step with train.batch_size 100 does not fit into the memory of cpu: it needs about ")
