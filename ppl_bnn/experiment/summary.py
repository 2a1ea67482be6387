"""The stage summary: a run's layer table, from its settings alone."""

import torch

from ppl_bnn.data import title_and_shape
from ppl_bnn.experiment.config import Config
from ppl_bnn.experiment.setup import network
from ppl_bnn.models import network_table, render_table


def summary(config: Config) -> str:
    """The layer table with its parameter counts. No data is read, but for a data function of the user's own."""
    data, model = config.data, config.model
    title, shape = title_and_shape(data.name, data.dir, file=data.file, progress=False)
    rows = network_table(network(config, shape), torch.zeros(1, *shape))
    kind = "deterministic" if model.deterministic else "Bayesian"
    return f"{model.name} ({kind}) on {title}\n\n{render_table(rows)}"
