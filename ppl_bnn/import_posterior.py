"""Make a run out of a mean-field posterior that was trained elsewhere.

    ppl_bnn import weights.npz --run runs/mnist-fc --out results/theirs --layout tfp
    ppl_bnn run results/theirs --stages predict,prune,report

FILE holds plain arrays named <layer>/<name> or <layer>.<name>, for each layer with weights:

    loc, scale              of the weights; or unconstrained_scale, with scale = softplus(unconstrained_scale)
    bias                    where the layer has one; bias_scale too where the run has model.bayesian_bias
    weight, bias, running_mean, running_var      of batch norm

TensorFlow Probability's, Keras's and bayesian-torch's own names are known too (kernel_posterior_loc, gamma, mu_kernel,
rho_weight, ...), so a bayesian-torch state_dict (.pt) is read as it is. The kinds: .npz, .h5, .safetensors, .pt, .pth.
Nothing in the file is run.

    --layout tfp            kernels [in, out] and [height, width, in, out]; images flatten to [height, width, channel]
    --layout torch          kernels [out, in] and [out, in, height, width]; images flatten to [channel, height, width]

The run's config.yaml says which network, prior and data set it is; its settings can be overridden as in ppl_bnn run,
and are kept in the new folder.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ppl_bnn.errors import FileError
from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.command import command_parser, guarded, parse_run
from ppl_bnn.experiment.config import Config
from ppl_bnn.experiment.config_check import check
from ppl_bnn.experiment.out_folder import check_out, run_name
from ppl_bnn.experiment.setup import Experiment
from ppl_bnn.files import alone_in
from ppl_bnn.guides.importers import LAYOUTS, Layers, put_in_place, read_layers
from ppl_bnn.inference import checkpoint
from ppl_bnn.inference.manifest import write_manifest

log = logging.getLogger("ppl_bnn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 not written, 2 bad command, file or settings."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _import(*parse_run(_parser, arguments)), debug="--debug" in arguments)


def _import(parsed: Namespace, config: Config) -> None:
    check(config)
    file, out = Path(parsed.file), Path(parsed.out)
    layers = read_layers(file)
    if saved := checkpoint.saved(out / "checkpoints"):
        raise FileError(f"{out} holds {saved[-1].name} already; choose another folder with --out")
    check_out(config, out, Path(parsed.run))
    with alone_in(out):
        _write(layers, config, parsed, out)


def _write(layers: Layers, config: Config, parsed: Namespace, out: Path) -> None:
    run = Experiment(run_name(Path(parsed.run)), config, out, lambda: False, progress=False)
    names = [name.strip() for name in parsed.layers.split(",")] if parsed.layers else None
    notes = put_in_place(
        layers, run.model.net, run.guide, run.example()[0], layout=parsed.layout, names=names,
        batch_norm_eps=parsed.batch_norm_eps,
    )  # fmt: skip
    for note in notes:
        log.warning("import: %s", note)
    saved_config.save(config, out / "config.yaml")
    write_manifest(out, run.model, run.guide)
    meta = {
        "history": [],
        "steps": 1,
        "settings": {},
        "origin": {
            **run.origin,
            "run": run.name,
            "described": run.described(),
            "imported from": Path(parsed.file).name,
        },
    }
    written = checkpoint.save(out / "checkpoints", 1, model=run.model, guide=run.guide, meta=meta)
    weights = sum(run.guide.loc_scale(site)[0].numel() for site in run.guide.sites)
    log.info("import: %d layers with %d random weights from %s in %s", len(layers), weights, parsed.file, written)


def _parser() -> ArgumentParser:
    parser = command_parser(
        "import", __doc__, trust=True, usage="FILE --run RUN --out FOLDER --layout tfp|torch [--layers A,B,...]"
    )
    parser.add_argument("file", type=str, help="the posterior: .npz, .h5, .safetensors, .pt or .pth")
    parser.add_argument("--run", type=str, required=True, help="run folder whose config.yaml names the network")
    parser.add_argument("--out", type=str, required=True, help="where the run's results go: a new folder")
    parser.add_argument("--layout", choices=LAYOUTS, required=True, help="layout of the kernels (see above)")
    parser.add_argument(
        "--layers", type=str, help="the file's layers in the run's order, separated by commas, if the names differ"
    )
    parser.add_argument(
        "--batch_norm_eps", type=float | None, default=None,
        help="what the file's batch norm adds to the variance (default: 0.001 for tfp, 0.00001 for torch)",
    )  # fmt: skip
    parser.add_class_arguments(Config, help="settings")
    return parser


if __name__ == "__main__":
    sys.exit(main())
