"""Scrambled Sobol points as standard normal noise: they fill the space more evenly than independent numbers do.

Every point is uniformly distributed, so an average over any number of them is unbiased; its error is smaller the less
the integrand depends on many numbers at once (Owen 1997; L'Ecuyer and Lemieux 2002, section 2).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from ppl_bnn.errors import UserError
from ppl_bnn.native.normals import draw_seed

_BITS = SobolEngine.MAXBIT


def sobol_normals_by_image(
    shared: int, own: int, images: int, *, seed: int, what: str = "numbers"
) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """A function (first, count) -> points first to first + count - 1 of one scrambled sequence.

    They have `shared` dimensions, [count, shared], and `own` ones for each image, [count, images, own].
    Every image gets a digital shift of its own (random bits added without carry to all its points), so that for
    each the points are a randomized Sobol sequence like any other's, and images differ as if drawn apart.

    Raises:
        UserError: more dimensions than torch has directions for; the message calls them `what`.
    """
    points = _points(shared + own, seed, what)
    generator = torch.Generator().manual_seed(draw_seed(seed, 1))
    shifts = torch.randint(2**_BITS, (images, own), generator=generator, dtype=torch.int32)

    def normals(first: int, count: int) -> tuple[Tensor, Tensor]:
        both = points(first, count)
        return _normal(both[:, :shared]), _normal(both[:, None, shared:] ^ shifts)

    return normals


def _points(dimensions: int, seed: int, what: str) -> Callable[[int, int], Tensor]:
    if dimensions > SobolEngine.MAXDIM:
        raise UserError(
            f"sampling sobol is for at most {SobolEngine.MAXDIM:,} random {what} a draw, got {dimensions:,}; "
            "use antithetic"
        )
    engine = SobolEngine(dimensions, scramble=True, seed=draw_seed(seed, 0))

    def points(first: int, count: int) -> Tensor:
        engine.reset()
        engine.fast_forward(first)
        return (engine.draw(count, dtype=torch.float64) * 2**_BITS).to(torch.int32)

    return points


def _normal(points: Tensor) -> Tensor:
    # The middle of the point's cell: neither 0 nor 1, whose normals are infinite.
    return torch.special.ndtri((points.double() + 0.5) / 2**_BITS).float()
