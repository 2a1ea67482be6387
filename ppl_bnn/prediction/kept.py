"""What a result keeps of each single draw: all of it, or of large data the first examples alone."""

import logging
from typing import Any

from torch import Tensor

from ppl_bnn.prediction.door import positions
from ppl_bnn.prediction.running import Target

# Of data that are not in memory, as much as this is kept of all single draws, of their log likelihoods, and of sketches
# of y, each; where it would be more, the single draws of the first examples alone.
KEPT_BYTES, KEPT_EXAMPLES = 2**30, 1000
# A sketch of one number: 256 stored values.
SKETCH_BYTES = 1024

log = logging.getLogger(__name__)


def what_is_kept(
    target: Target, draws: int, total: int, keep: Any, log_likelihood: bool | None, in_memory: bool
) -> tuple[Tensor, bool, bool]:
    """Positions of the examples whose single draws are kept; whether log likelihoods are, and a sketch of y."""
    if keep is not None or in_memory:
        kept = positions(keep, total)
        return kept, log_likelihood is not False, len(kept) < total
    parts = target.likelihood.parts(target.outputs[:1], **target.latents)
    elements = total * parts["mean"].numel()
    each = parts["mean"].element_size() * (2 if target.likelihood.drawn else 1)
    kept = positions(None, total if draws * elements * each <= KEPT_BYTES else min(total, KEPT_EXAMPLES))
    if log_likelihood is None:
        log_likelihood = 4 * draws * total <= KEPT_BYTES
    if len(kept) < total:
        log.info(
            "single draws are kept of the first %d of %d examples%s; keep= and log_likelihood= keep others", len(kept),
            total, "" if log_likelihood else ", and no log likelihood of each draw",
        )  # fmt: skip
    return kept, log_likelihood, len(kept) < total and elements * SKETCH_BYTES <= KEPT_BYTES
