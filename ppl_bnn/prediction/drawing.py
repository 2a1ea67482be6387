"""The draws of a chunk of examples, added to a tally block after block, on all ranks."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_bnn.distributed import Communicator
from ppl_bnn.guides.posterior import Posterior
from ppl_bnn.inputs import count, rows
from ppl_bnn.native.normals import draw_seed
from ppl_bnn.prediction.chunks import Chunk
from ppl_bnn.prediction.draws import Blocks
from ppl_bnn.prediction.methods import Prepared, drawn_blocks, mirrored
from ppl_bnn.prediction.observed_site import site_blocks
from ppl_bnn.prediction.running import Target, latents_of_draw
from ppl_bnn.prediction.stopping import is_look, precise, schedule
from ppl_bnn.prediction.tally import Tally


@dataclass(frozen=True)
class Drawing:
    """How draws are made, whatever they are of; the attributes are as `predict` has them."""

    target: Target
    posterior: Posterior
    prepared: Prepared
    seed: int
    sampling: str
    tolerance: float | None
    batch_size: int | None
    ranks: Communicator

    def of(self, chunk: Chunk, tally: Tally) -> Iterator[None]:
        """Add draws of a chunk to the tally until it has all, a block on each rank at a time; yield after each."""
        ranks, tolerance = self.ranks, self.tolerance
        while tally.done < tally.num_samples and len(tally.active):
            if tolerance is not None and is_look(tally.done):
                tally.leave_out(precise(tally.chunk(), tolerance))
                if not len(tally.active):
                    return
            # Layers in front of the first random one are computed here: all of a deterministic network.
            started = time.perf_counter()
            blocks = self._blocks(chunk, tally)
            tally.seconds += time.perf_counter() - started
            # Posteriors with stored draws have none behind the last.
            last = (tally.num_samples - 1) // blocks.size
            for first, new in schedule(tally.done, tally.num_samples, blocks.size, ranks.size, tolerance is not None):
                started = time.perf_counter()
                outputs = blocks.logits(min(first + ranks.rank, last), 1.0)
                outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
                if not outputs.is_cpu:
                    torch.get_device_module(outputs.device).synchronize(outputs.device)
                outputs = ranks.gather(outputs).flatten(0, 1)[new]
                tally.seconds += time.perf_counter() - started
                tally.add(outputs, [self._latents(tally.done + at) for at in range(len(outputs))])
                yield

    def _blocks(self, chunk: Chunk, tally: Tally) -> Blocks:
        """Blocks of the examples that get further draws."""
        active = tally.active - chunk.first
        rest = chunk.x if len(active) == count(chunk.x) else rows(chunk.x, active)
        # Another chunk has other examples, whose own noise must not be the same.
        own_seed = draw_seed(self.seed, chunk.first) if chunk.first else self.seed
        if self.target.site is not None:
            some = None if chunk.y is None else torch.as_tensor(chunk.y)[active]
            made = site_blocks(
                self.target, self.posterior, rest, some, seed=self.seed, own_seed=own_seed, batch_size=self.batch_size
            )
            return mirrored(made) if self.sampling == "antithetic" else made
        if self.prepared.method != "layerwise":
            own_seed = self.seed
        elif len(active) < count(chunk.x):
            # Blocks of fewer examples have another size, and their numbers start anew: with the same seed some would
            # come again.
            own_seed = draw_seed(own_seed, len(active))
        return drawn_blocks(
            self.target.net, self.posterior, rest, own_seed, self.prepared, self.sampling, self.batch_size
        )

    def _latents(self, draw: int) -> dict[str, Tensor]:
        """What the likelihood takes beside the outputs of this draw."""
        if not self.target.latents:
            return {}
        return latents_of_draw(self.target.likelihood, self.posterior, draw, seed=self.seed, sampling=self.sampling)
