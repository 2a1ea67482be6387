"""Training mode that respects what its user has put into evaluation mode."""

from collections.abc import Callable

from torch import nn


def mode_setter(model: nn.Module) -> Callable[[bool], None]:
    """``model.train``, but modules that are to stay in evaluation mode (a frozen backbone's batch norm) do.

    These are the ones that are in evaluation mode now, while the model as a whole is in training mode. A model that is
    in evaluation mode as a whole, as after a training or a prediction, was put there in passing: of it those stay
    whose parameters are all frozen, with everything in them.
    """
    kept: dict[nn.Module, None] = {}
    for module in model.modules():
        parameters = list(module.parameters())
        frozen = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
        if not module.training and (model.training or frozen):
            kept |= dict.fromkeys(inner for inner in module.modules() if not inner.training)

    def set_mode(training: bool) -> None:
        model.train(training)
        for module in kept:
            module.training = False

    return set_mode
