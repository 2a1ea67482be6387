"""The manifest of a posterior: its layers in order, and the names of loc and scale in a checkpoint."""

from typing import Any

from torch import nn

from ppl_bnn.guides.mean_field import MeanFieldNormal
from ppl_bnn.models.layers import priors_of


def manifest(model: nn.Module, guide: MeanFieldNormal) -> dict[str, Any]:
    """Describe the random weights in the model's order, and the point estimates, as JSON.

    Each entry of `layers` has its site, shape, number of weights and prior. It also has the names of its loc and
    unconstrained scale among the tensors of a checkpoint: scale = softplus(unconstrained scale) + 1.2e-7.
    `point_estimates` is {name: shape}.
    """
    priors = {path.removeprefix("net."): prior for path, prior in priors_of(model).items()}
    shapes = {site: guide.loc_scale(site)[0].shape for site in guide.sites}
    return {
        "layers": [
            {
                "site": site,
                "shape": list(shape),
                "weights": shape.numel(),
                "prior": priors.get(site),
                "loc": f"guide.loc.{site}",
                "unconstrained_scale": f"guide.unconstrained_scale.{site}",
            }
            for site, shape in shapes.items()
        ],
        "weights": sum(shape.numel() for shape in shapes.values()),
        "point_estimates": {f"model.{name}": list(value.shape) for name, value in model.state_dict().items()},
    }
