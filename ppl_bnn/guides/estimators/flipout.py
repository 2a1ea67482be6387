"""Flipout: a weight perturbation that is pseudo-independent between the examples of a batch (Wen et al. 2018)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ppl_bnn.guides.estimators.base import Estimator, kept_noise
from ppl_bnn.guides.normal import signs
from ppl_bnn.models.drawn import Use


class Flipout(Estimator):
    """Pyro handler: y_n = loc x_n + r_n * ((w - loc) (s_n * x_n)) + b (Wen et al. 2018, eq. 4).

    w is the guide's draw of the step, so w - loc = scale * eps. s_n in {-1, +1}^in and r_n in {-1, +1}^out are
    independent between examples. Within an example they are constant, over all positions (space, time, tokens) of a
    convolution or of a linear map's input [N, ..., in]. So every example has one weight draw,
    loc + r_n s_n^T * (w - loc), with the distribution of a plain draw: the ELBO's expectation is unchanged, and the
    noise of different examples is uncorrelated. A weight that a forward pass uses twice has the same signs in both
    uses. What it computes, and what has the plain draw, see `ppl_bnn.guides.estimators.base`.

    Correct when q is symmetric around loc and independent between weights, as the mean-field Normal is. A random bias
    is shared by the batch.

    Args:
        noise_dtype: of the second layer, that of the noise (default: x's). With torch.bfloat16 it takes half its time
            where the hardware multiplies bfloat16; rounding is symmetric, so each y_n keeps its mean, and changes the
            noise by less than a hundredth of itself.
    """

    def __init__(self, noise_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.noise_dtype = noise_dtype

    def layer(self, site: str, use: Use) -> Tensor:
        """See `Estimator`."""
        x, weight, bias, function = use.layer_arguments()
        loc, features = self.posterior[site].loc, -1 if use.function is F.linear else 1
        kept = self.kept(site)
        sign_in = _kept_signs(kept, "in", x, x, features)
        mean = function(x, loc, bias)
        sign_out = _kept_signs(kept, "out", mean, x, features)
        flipped, noise_weight = x, weight - loc
        if self.noise_dtype is not None:
            flipped, sign_in, noise_weight = (part.to(self.noise_dtype) for part in (flipped, sign_in, noise_weight))
        return mean.addcmul_(function(flipped * sign_in, noise_weight, None), sign_out)


def _kept_signs(kept: dict[str, Tensor], side: str, values: Tensor, like: Tensor, features: int) -> Tensor:
    """Signs of each example and feature of `values`, which broadcast to them; `kept` has those of the first use."""
    shape = [len(values), *[1] * (values.dim() - 1)]
    shape[features] = values.shape[features]
    return kept_noise(kept, side, lambda: signs(like, (len(values), values.shape[features]))).view(shape)
