"""Stored draws as a `Posterior`: samples of MCMC, or members of an ensemble."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ppl_bnn.errors import UserError


class StoredPosterior:
    """Draws that another program made, by number: ``StoredPosterior(mcmc.get_samples(), latents=["sigma"])``.

    Args:
        samples: {site: [S, *shape]}, as Pyro's ``MCMC.get_samples()`` returns them.
        latents: the sites that are no weights of the network, such as a noise scale.
        num_chains: the samples are those of this many chains of equal length, one chain after the other.

    Raises:
        UserError: no samples; sites with other numbers of them; a latent that has none; chains of unequal length.
    """

    def __init__(self, samples: Mapping[str, Tensor], *, latents: Sequence[str] = (), num_chains: int = 1) -> None:
        counts = {site: len(values) for site, values in samples.items()}
        if not counts or len(set(counts.values())) > 1 or 0 in counts.values():
            raise UserError(f"each site needs the same number of samples, at least 1; got {counts}")
        if unknown := [site for site in latents if site not in samples]:
            raise UserError(f"the latent {unknown[0]!r} has no samples; the sites are {list(samples)}")
        self.num_draws: int = next(iter(counts.values()))
        if num_chains < 1 or self.num_draws % num_chains:
            raise UserError(f"{self.num_draws} samples are not those of {num_chains} chains of equal length")
        self.samples, self.num_chains = dict(samples), num_chains
        self.latents = list(latents)
        self.sites = [site for site in samples if site not in self.latents]

    def draw(self, index: int, *, seed: int = 0) -> dict[str, Tensor]:
        """Sample number `index` of all sites, {site: [*shape]}; it does not depend on `seed`."""
        return {site: values[index] for site, values in self.samples.items()}

    def draw_latents(self, index: int, *, seed: int = 0, sign: float = 1.0) -> dict[str, Tensor]:
        """The latents of sample number `index`.

        Raises:
            UserError: sign is not 1: a sample has no mirror image.
        """
        if sign != 1:
            raise UserError("a mirror image needs a posterior with noise; stored draws have none: draw independently")
        return {site: self.samples[site][index] for site in self.latents}

    def chain(self, index: int) -> int:
        """The chain of sample number `index`, from 0."""
        return index // (self.num_draws // self.num_chains)
