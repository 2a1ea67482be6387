"""The canary for the private parts of Pyro that `ppl_bnn.models.listeners` relies on."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger

from ppl_bnn import Classifier, bayesian
from ppl_bnn.models.listeners import heard

kinds = ("sample", "param", "bayes_linear")


class Before(Messenger):
    def _pyro_bayes_linear(self, msg):
        msg["seen"] = True


class After(Messenger):
    def _pyro_post_bayes_linear(self, msg):
        msg["seen"] = True


class AllBefore(Messenger):
    def _process_message(self, msg):
        msg["seen"] = True


class AllAfter(Messenger):
    def _postprocess_message(self, msg):
        msg["seen"] = True


class Own(Messenger):
    def __init__(self):
        super().__init__()
        self._pyro_bayes_linear = lambda msg: msg.update(seen=True)


@pytest.mark.parametrize("handler", [Messenger, Before, After, AllBefore, AllAfter, Own])
@pytest.mark.parametrize("kind", kinds)
def test_pyro_asks_exactly_the_handlers_that_are_said_to_listen(handler, kind):
    """If this fails, Pyro calls its handlers in another way than `listeners` believes."""
    msg = {"type": kind, "name": "w", "fn": lambda: torch.zeros(()), "args": (), "kwargs": {}, "value": torch.zeros(())}
    msg |= {"done": True, "stop": False, "is_observed": True, "continuation": None, "infer": {}, "cond_indep_stack": ()}
    with handler():
        said = heard(kind)
        runtime.apply_stack(msg)
    assert msg.get("seen", False) == said


def test_pyros_own_handlers_are_known():
    with poutine.trace():
        assert heard("sample")
        assert heard("param")
    with poutine.block():
        assert all(heard(kind) for kind in kinds)
    with poutine.condition(data={}):
        assert heard("sample")
        assert not heard("param")
        assert not heard("bayes_linear")
    assert not any(heard(kind) for kind in kinds)


def test_the_list_of_handlers_is_the_one_that_pyro_walks():
    assert runtime._PYRO_STACK == []
    with Messenger() as outer, Before() as inner:
        assert [outer, inner] == runtime._PYRO_STACK
        assert heard("bayes_linear")
    assert runtime._PYRO_STACK == []


def test_a_trace_has_every_parameter_whoever_listens():
    model = Classifier(bayesian(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))), 4)
    with poutine.condition(data={}):
        trace = poutine.trace(model).get_trace(torch.zeros(4, 3))
    assert trace.param_nodes == ["0.bias", "1.weight", "1.bias"]
    assert Predictive(model, num_samples=2)(torch.zeros(4, 3))["0.weight"].shape[0] == 2
    assert {"0.bias", "1.weight", "1.bias"} <= set(pyro.get_param_store())
