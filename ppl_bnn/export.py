"""A trained posterior's predictive as one ONNX file, for machines without torch.

    ppl_bnn export runs/mnist-fc                                # 32 frozen draws -> out/predictive.onnx
    ppl_bnn export runs/mnist-fc/out --fraction 0.95            # of the posterior with 95% pruned
    ppl_bnn export runs/mnist-fc/out --pruned                   # of its pruned.safetensors, fine-tuned or not
    ppl_bnn export runs/mnist-fc/out --method moments           # no draws: moments through the layers

The file takes `x` as in training: images [N, channels, height, width] with pixels from 0 to 1, or a table's rows
[N, D]. It gives what the run's likelihood answers: `probs` [N, C] of classes, `mean` and `std` [N] of numbers.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from ppl_bnn.errors import UserError
from ppl_bnn.experiment.command import command_parser, guarded

if TYPE_CHECKING:
    from ppl_bnn.guides.posterior import Posterior

log = logging.getLogger("ppl_bnn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 bad command, settings or data."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _run(_parser().parse_args(arguments)), debug="--debug" in arguments)


def _run(options: Namespace) -> None:
    # Not for --help: what they bring along takes seconds to import.
    from ppl_bnn.data import first_inputs
    from ppl_bnn.experiment import saved_config
    from ppl_bnn.experiment.provenance import pruned_path
    from ppl_bnn.experiment.setup import opened
    from ppl_bnn.inference.posterior_file import load_posterior
    from ppl_bnn.prediction.onnx import export
    from ppl_bnn.pruning import prune

    if sum([bool(options.fraction), options.pruned, options.posterior is not None]) > 1:
        raise UserError("give one of --fraction, --pruned and --posterior: each says which posterior it is")
    out = Path(options.run)
    # An out folder with damaged settings is one too.
    if not (out / "checkpoints").exists():
        out = saved_config.out_of(out)
    run = opened(out, data_dir=options.data_dir, trusted=options.trust)
    step = run.restored(options.checkpoint).step
    file = str(pruned_path(out, run.config.pruning)) if options.pruned else options.posterior
    guide: Posterior = run.guide
    if file is not None:
        guide = load_posterior(file, run.model, *run.example())
    elif options.fraction:
        guide = prune(run.guide, fraction=options.fraction).guide
    x = first_inputs(run.test_data, 8)
    path = Path(options.file) if options.file else out / "predictive.onnx"
    num_samples = options.draws if guide.sites else 1
    export(
        path, run.model, guide, x,
        method=options.method, num_samples=num_samples, seed=options.seed,
        each_draw=options.each_draw, norm_inputs=run.norm_inputs() if options.method == "draws" else None,
        opset=options.opset,
    )  # fmt: skip
    what = f"{num_samples} draw{'s' * (num_samples > 1)}" if options.method == "draws" else "moments"
    log.info("export: %s of step %d, %.1f MB, in %s", what, step, path.stat().st_size / 1e6, path)


def _parser() -> ArgumentParser:
    parser = command_parser("export", __doc__, trust=True)
    parser.add_argument("run", type=str, help="run folder whose results are in <run>/out, or a run's out folder")
    parser.add_argument("--file", type=str | None, default=None, help="file to write (default: <out>/predictive.onnx)")
    parser.add_argument("--method", type=str, default="draws", help="draws or moments")
    parser.add_argument("--draws", type=int, default=32, help="number of frozen weight draws")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    each_draw = "add the output of each draw: draw_probs [S, N, C] or draw_mean [S, N]"
    parser.add_argument("--each_draw", action="store_true", help=each_draw)
    parser.add_argument("--fraction", type=float, default=0.0, help="prune this share of the weights first")
    parser.add_argument("--pruned", action="store_true", help="of <out>/pruned.safetensors")
    parser.add_argument(
        "--posterior", type=str | None, default=None, help="of this posterior file, such as a pruned.safetensors"
    )
    parser.add_argument("--checkpoint", type=str, default="last", help="saved step to use")
    parser.add_argument("--opset", type=int, default=20, help="ONNX operator set, 18 or newer")
    parser.add_argument(
        "--data_dir", type=str | None, default=None, help="folder of the data, if they moved (default: the run's)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
