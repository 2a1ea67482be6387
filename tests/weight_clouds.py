"""A posterior in twenty lines: correlated weights, with draws and nothing else; and the same with stored draws."""

import torch

from ppl_bnn.native.normals import draw_seed


class Cloud:
    """Every weight is a direction times one number of the draw, plus noise: no factorized posterior."""

    def __init__(self, shapes, scale=0.3):
        self.shapes, self.scale = dict(shapes), scale
        generator = torch.Generator().manual_seed(1)
        self.centres = {site: torch.randn(shape, generator=generator) for site, shape in self.shapes.items()}

    @property
    def sites(self):
        return list(self.shapes)

    def draw(self, index, *, seed=0):
        generator = torch.Generator().manual_seed(draw_seed(seed, index))
        shared = 1 + self.scale * torch.randn((), generator=generator)
        return {
            site: shared * centre + self.scale * torch.randn(centre.shape, generator=generator)
            for site, centre in self.centres.items()
        }


class StoredCloud(Cloud):
    """The first draws of a cloud, kept as a sampler's are: there are no others, and no seeds."""

    def __init__(self, shapes, num_draws):
        super().__init__(shapes)
        self.num_draws = num_draws
        self.kept = [super(StoredCloud, self).draw(index) for index in range(num_draws)]

    def draw(self, index, *, seed=0):
        return self.kept[index]

    def chain(self, index):
        return index % 2
