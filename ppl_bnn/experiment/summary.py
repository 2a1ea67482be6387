"""The stage summary: a run's layer table, from its settings alone."""

import torch

from ppl_bnn.data import IMAGE_SETS, described, first_inputs
from ppl_bnn.data.named import Described
from ppl_bnn.experiment.config import Config
from ppl_bnn.experiment.fit_check import fitting, likelihood_and_outputs
from ppl_bnn.experiment.run_data import load_data
from ppl_bnn.experiment.setup import network
from ppl_bnn.inputs import Inputs
from ppl_bnn.models import network_table, render_table


def summary(config: Config) -> str:
    """The layer table with its parameter counts. No data are read for the named images, and those of others are."""
    data, model = config.data, config.model
    if data.name in IMAGE_SETS:
        about = described(data.name, data.dir, file=data.file, progress=False)
        x: Inputs = torch.zeros(1, *about.shape)
    else:
        train = load_data(config, progress=False).train
        about, x = Described(train.title, train.shape, len(train.classes)), first_inputs(train, 1)
    net = network(config, about.shape, likelihood_and_outputs(config, about.num_classes)[1])
    kind = "deterministic" if model.deterministic else "Bayesian"
    with fitting(config, x):
        table = render_table(network_table(net, x))
    return f"{model.name} ({kind}) on {about.title}\n\n{table}"
