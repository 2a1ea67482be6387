"""The stage summary: a run's layer table, from its settings alone."""

import torch

from ppl_bnn.data import described
from ppl_bnn.experiment.config import Config
from ppl_bnn.experiment.fit_check import likelihood_and_outputs
from ppl_bnn.experiment.setup import network
from ppl_bnn.models import network_table, render_table


def summary(config: Config) -> str:
    """The layer table with its parameter counts. No data is read, but for a data function of the user's own."""
    data, model = config.data, config.model
    about = described(data.name, data.dir, file=data.file, progress=False)
    net = network(config, about.shape, likelihood_and_outputs(config, about.num_classes)[1])
    rows = network_table(net, torch.zeros(1, *about.shape))
    kind = "deterministic" if model.deterministic else "Bayesian"
    return f"{model.name} ({kind}) on {about.title}\n\n{render_table(rows)}"
