"""Training mode that respects what its user has put into evaluation mode."""

from collections.abc import Callable
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from ppl_bnn.models.random_network import random_ids

# Of each model, what stayed in evaluation mode.
_stayed: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()


def mode_setter(model: nn.Module) -> Callable[[bool], None]:
    """``model.train``, but modules that are to stay in evaluation mode (a frozen backbone's batch norm) do.

    These are the ones that are in evaluation mode now, while the model as a whole is in training mode. A model that is
    in evaluation mode as a whole, as after a training or a prediction, was put there in passing: of it those stay
    whose parameters are all frozen, with everything in them, and those that stayed the last time.
    """
    kept: dict[nn.Module, None] = {}
    before = _stayed.get(model, ())
    random = random_ids(model)
    for module in model.modules():
        parameters = list(module.parameters())
        frozen = bool(parameters) and not any(one.requires_grad or id(one) in random for one in parameters)
        if not module.training and (model.training or frozen or module in before):
            kept |= dict.fromkeys(inner for inner in module.modules() if not inner.training)

    _stayed[model] = WeakSet(kept)

    def set_mode(training: bool) -> None:
        model.train(training)
        for module in kept:
            module.training = False

    return set_mode
