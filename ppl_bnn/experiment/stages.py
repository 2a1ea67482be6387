"""The stages of a run: train, diagnose, predict, shift, prune, report; each works in the run's out folder.

ArviZ and matplotlib take seconds to import. So what draws or writes a result is imported inside the stage that uses it,
and a stage with nothing to do is fast.
"""

import copy
import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ppl_bnn.errors import UserError
from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.provenance import inputs_of, predictive_path, read_inputs, up_to_date
from ppl_bnn.experiment.report import is_posterior_of, report
from ppl_bnn.experiment.scores import SCORES, told
from ppl_bnn.experiment.setup import Experiment
from ppl_bnn.experiment.stage_prune import pruning_study
from ppl_bnn.experiment.stage_shift import shift
from ppl_bnn.files import write_text
from ppl_bnn.guides import MeanFieldNormal
from ppl_bnn.inference import checkpoint
from ppl_bnn.inference.data_parallel import share_state
from ppl_bnn.inference.diagnosis import layer_posteriors, render_diagnosis, verdict
from ppl_bnn.inference.elbo import kl_by_site
from ppl_bnn.inference.posterior_file import load_posterior
from ppl_bnn.inference.schedules import kl_schedule
from ppl_bnn.inference.settings import TrainSettings
from ppl_bnn.inference.svi import fit
from ppl_bnn.inference.tensorboard import TensorBoard
from ppl_bnn.models.likelihoods import Likelihood
from ppl_bnn.native.normals import GENERATOR
from ppl_bnn.prediction.log_density import train_log_likelihood
from ppl_bnn.prediction.predictive import predict as draw_predictive
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.results import netcdf

# What all ranks do together; rank 0 does the others alone.
SHARED = ("train", "predict")
# What a predictive's summary has beside scores.
_HOW = ("num_samples", "seconds")

log = logging.getLogger(__name__)


def train(run: Experiment) -> None:
    """Train, or resume an interrupted training; a complete one is skipped."""
    settings, ranks = run.config.train, run.ranks
    # Rank 0 looks, since it alone writes there.
    if ranks.any(ranks.is_main and _is_trained(run)):
        return
    x, y = run.examples_of(run.train_data)
    history = fit(
        run.model,
        run.guide,
        x,
        y,
        **{known.name: getattr(settings, known.name) for known in dataclasses.fields(TrainSettings)},
        kl_weight=kl_schedule(
            settings.kl_schedule, settings.kl_weight, ramp=settings.kl_ramp, cycles=settings.kl_cycles
        ),
        validation=None if run.validation_data is None else run.examples_of(run.validation_data),
        loggers=[TensorBoard(run.out / "tensorboard")] if settings.tensorboard else [],
        progress=run.progress,
        folder=run.out,
        origin=run.origin | {"run": run.name, "described": run.described(), "code": run.code},
        should_stop=run.should_stop,
        communicator=ranks,
    )
    last, seconds = history[-1], sum(row["seconds"] for row in history)
    log.info(
        "train: %d epochs in %.0f s; loss %.4f, nll %.4f, kl %.4f nats per datum, kl_weight %.8g%s",
        len(history), seconds, last["loss"], last["nll"], last["kl"], last["kl_weight"],
        f", accuracy {last['accuracy']:.4f}" if run.of_classes else "",
    )  # fmt: skip


def _is_trained(run: Experiment) -> bool:
    if saved := checkpoint.saved(run.out / "checkpoints"):
        state = run.saved()
        if state.step == state.meta["steps"]:
            log.info("train: complete already (%d epochs)", len(state.meta["history"]))
            return True
        log.info("train: resuming from %s", saved[-1].name)
    return False


def diagnose(run: Experiment) -> None:
    """Report for each layer how far the posterior has moved from its start; write posterior.json and a figure."""
    if not run.guide.sites:
        log.info("diagnose: skipped, a deterministic network has no posterior")
        return
    if not (run.out / "checkpoints" / "step-00000000.safetensors").exists():
        log.info("diagnose: skipped, there is no step-00000000 to compare with (an imported posterior has none)")
        return
    path, figure = run.out / "posterior.json", run.out / "figures" / "posterior.png"
    state = run.saved(run.config.predict.checkpoint)
    if figure.exists() and is_posterior_of(path, state):
        log.info("diagnose: posterior.json is up to date")
        return
    from ppl_bnn.results.figures.diagnosis import draw_posterior

    run.restored("step-00000000")
    initial = copy.deepcopy(run.guide)
    run.restored(run.config.predict.checkpoint)
    layers = layer_posteriors(run.model, run.guide, initial, *run.example())
    content = {
        "step": state.step,
        "crc32": state.meta["crc32"],
        "verdict": verdict(layers),
        "layers": [dataclasses.asdict(row) for row in layers],
    }
    write_text(path, json.dumps(content, indent=2) + "\n")
    title = f"{run.config.model.name} on {run.train_data.title}, step {state.step}"
    draw_posterior(layers, title, figure)
    log.info("diagnose: at step %d\n%s", state.step, render_diagnosis(layers))


def predict(run: Experiment) -> None:
    """Draw the posterior predictive of the test set and write predictive.nc; saved draws are reused."""
    settings, ranks = run.config.predict, run.ranks
    # Only rank 0 needs to see the folder of checkpoints.
    path = predictive_path(run.out, settings) if ranks.is_main else run.out / "predictive.nc"
    partial = path.with_suffix(".partial.nc")
    inputs: dict[str, Any] = {}
    state, before, done, guide = None, None, False, run.guide
    if ranks.is_main:
        state = run.restored(settings.checkpoint)
        if settings.posterior is not None:
            guide = _of_file(run, settings.posterior)
        inputs = inputs_of(run, state, settings)
        before = _draws_so_far((partial, path), inputs, run.model.likelihood)
        done = up_to_date(path, inputs, "predict")
        if settings.train_log_likelihood:
            _predict_training(run, state)
    if ranks.any(done):
        return
    if ranks.any(guide.is_masked) and not guide.is_masked:
        # Where to receive the masks that rank 0 has read.
        guide = guide.pruned({site: torch.ones_like(guide.loc_scale(site)[0]) for site in guide.sites})
    share_state(ranks, None, run.model, guide, {})
    x, y = run.examples_of(run.test_data)

    def save(predictive: Predictive, to: Path = partial) -> None:
        from ppl_bnn.results.predictive import to_inference_data

        assert state is not None
        found = predictive.summary()
        count = found["num_samples"]
        of = {**inputs, "settings": {**inputs["settings"], "num_samples": count}} if to == partial else inputs
        attrs = {
            "run": run.name,
            "inputs": of,
            "step": state.step,
            SCORES: [name for name in found if name not in _HOW],
        }
        idata = to_inference_data(
            predictive, run.test_data.first(len(predictive.draws)), attrs=attrs, guide=guide,
            kl=kl_by_site(run.model, guide, *run.example()), history=state.meta["history"],
            # They take all draws of the weights once more: once is enough.
            norms=to != partial,
        )  # fmt: skip
        netcdf.save(idata, to)

    predictive = draw_predictive(
        run.model, guide, x, y,
        num_samples=settings.num_samples if guide.sites else 1, seed=settings.seed,
        method=settings.method, sampling=settings.sampling if guide.sites else "independent",
        tolerance=settings.tolerance, compact=settings.compact if guide.sites else "no",
        norm_inputs=run.norm_inputs(), progress=run.progress, should_stop=run.should_stop, communicator=ranks,
        so_far=before, save=save,
    )  # fmt: skip
    if not ranks.is_main:
        return
    save(predictive, path)
    partial.unlink(missing_ok=True)
    found = predictive.summary()
    how = f"{found['num_samples']} draws ({predictive.method}, {predictive.sampling}; on average "
    how += f"{predictive.draws.double().mean():.0f})"
    log.info(
        "predict: %s of %d %s in %.1f s; %s",
        "moments, no draws," if predictive.method == "moments" else how,
        len(run.test_data), run.examples, found["seconds"], told(found),
    )  # fmt: skip
    if settings.tolerance is not None and predictive.method != "moments":
        used = predictive.draws.double()
        log.info(
            "predict: draws per %s: mean %.0f, median %.0f, maximum %.0f; %.1f%% of the %s stopped early, which "
            "saved %.1f%% of %d draws for each; standard error %.4f at most",
            run.examples[:-1], used.mean(), used.median(), used.max(),
            100 * (used < settings.num_samples).double().mean(), run.examples,
            100 * (1 - used.mean() / settings.num_samples), settings.num_samples, predictive.mc_error.amax(),
        )  # fmt: skip


def _of_file(run: Experiment, file: str) -> MeanFieldNormal:
    posterior = load_posterior(file, run.model, *run.example())
    if not isinstance(posterior, MeanFieldNormal):
        raise UserError(f"predict.posterior takes a mean-field posterior, and {file} holds stored draws; use Python")
    return posterior


def _draws_so_far(paths: Sequence[Path], inputs: dict[str, Any], likelihood: Likelihood) -> Predictive | None:
    """The result with the most draws among those with the same inputs, if it is not complete.

    The first of the paths, of a prediction that was stopped, may have all draws of the first examples alone.
    """
    most, wanted = None, inputs["settings"]["num_samples"]
    for path in (path for path in paths if path.exists()):
        there = netcdf.read_attrs(path)
        if "method" not in there or "inputs" not in there:
            continue
        count, of = there["num_samples"], read_inputs(there["inputs"])
        alike = {**of, "settings": {**of["settings"], "num_samples": wanted}}
        complete = count > wanted or (count == wanted and path != paths[0])
        if complete or saved_config.first_difference(inputs, alike) is not None:
            continue
        if there.get("generator") == GENERATOR:
            most = max(most or (0, path), (count, path))
        else:
            log.info("predict: the draws in %s are of another generator than %s; starting again", path.name, GENERATOR)
    if most is None:
        return None
    from ppl_bnn.results.saved_draws import read_predictive

    log.info("predict: resuming from the %d draws in %s", most[0], most[1].name)
    return read_predictive(most[1], likelihood)


def _predict_training(run: Experiment, state: checkpoint.Checkpoint) -> None:
    settings = run.config.predict
    path = predictive_path(run.out, settings)
    path = path.with_name(path.name.replace("predictive", "train_log_likelihood", 1))
    inputs = inputs_of(run, state, settings) | {"data": run.origin["trained on"]}
    if up_to_date(path, inputs, "predict"):
        return
    from ppl_bnn.results.training import train_to_inference_data

    found = train_log_likelihood(
        run.model, run.guide, *run.examples_of(run.train_data),
        num_samples=settings.num_samples, seed=settings.seed, norm_inputs=run.norm_inputs(), progress=run.progress,
        should_stop=run.should_stop,
    )  # fmt: skip
    attrs = {
        "run": run.name,
        "inputs": inputs,
        "step": state.step,
        "generator": GENERATOR,
        "kl_weight": run.config.train.kl_weight,
    }
    netcdf.save(train_to_inference_data(found, run.train_data, attrs=attrs), path)
    num_draws, count = found.log_likelihood.shape
    log.info("predict: log likelihood of %d training %s under %d draws", count, run.examples, num_draws)


STAGES: dict[str, Callable[[Experiment], None]] = {
    "train": train,
    "diagnose": diagnose,
    "predict": predict,
    "shift": shift,
    "prune": pruning_study,
    "report": report,
}
