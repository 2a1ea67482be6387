"""The stages of a run: summary, train, predict, prune, report. Each reads and writes the run's out folder."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppl_bnn import checkpoint, inference_data, plots
from ppl_bnn import config as configs
from ppl_bnn.config import Config
from ppl_bnn.data import Images, load
from ppl_bnn.elbo import kl_by_site, kl_schedule
from ppl_bnn.files import FileError, write_text
from ppl_bnn.guides import MeanFieldNormal
from ppl_bnn.guides.mean_field import InitLoc, draw_seed
from ppl_bnn.models import Classifier, build, layer_table, parse_prior, render
from ppl_bnn.models.summary import Row
from ppl_bnn.predictive import predict as draw_predictive
from ppl_bnn.pruning import sweep
from ppl_bnn.training import fit

STAGES = ("summary", "train", "predict", "prune", "report")

log = logging.getLogger(__name__)


class Run:
    """What the stages share: settings, folder, data, and a model and guide as the settings start them."""

    def __init__(self, name: str, config: Config, out: Path, should_stop: Callable[[], bool], progress: bool) -> None:
        self.name, self.config, self.out = name, config, out
        self.should_stop, self.progress = should_stop, progress
        self.train_images, self.test_images = _load_data(config)
        self.device = _device(config.device)
        torch.manual_seed(draw_seed(config.train.seed, 0))
        net = build(
            config.model.name,
            prior=parse_prior(config.model.prior),
            deterministic=config.model.deterministic,
            bayesian_bias=config.model.bayesian_bias,
        )
        self.model = Classifier(net, len(self.train_images)).to(self.device)
        self.rows = _checked_table(self.model.net, self.example()[0], config)
        self.guide = self._build_guide().to(self.device)

    def example(self) -> tuple[Tensor, Tensor]:
        """One input [1, ...] and its label [1], on the run's device."""
        first = self.train_images.first(1)
        return first.inputs().to(self.device), first.labels.to(self.device)

    def restored(self, name: str) -> checkpoint.Checkpoint:
        """Load a saved step by name into the model and the guide."""
        state = checkpoint.load(checkpoint.find(self.out / "checkpoints", name))
        checkpoint.restore(state, model=self.model, guide=self.guide)
        return state

    def test_tensors(self) -> tuple[Tensor, Tensor]:
        """The test inputs and labels on the run's device."""
        return self.test_images.inputs().to(self.device), self.test_images.labels.to(self.device)

    def _build_guide(self) -> MeanFieldNormal:
        settings = self.config.guide
        init_loc: InitLoc = settings.init_loc
        if settings.init_from is not None:
            twin = _twin_state(Path(settings.init_from))
            init_loc = {name.removeprefix("net."): tensor for name, tensor in twin.items()}
            own = self.model.state_dict()
            shared = {name: tensor for name, tensor in twin.items() if name in own}
            self.model.load_state_dict({**own, **shared})
        return MeanFieldNormal(
            self.model,
            *self.example(),
            init_loc=init_loc,
            init_scale=settings.init_scale,
            init_jitter=settings.init_jitter,
        )


def summary(run: Run) -> None:
    """Print the layer table with its parameter counts."""
    kind = "deterministic" if run.config.model.deterministic else "Bayesian"
    print(f"{run.config.model.name} ({kind}) on {run.train_images.title}\n\n{render(run.rows)}")


def train(run: Run) -> None:
    """Train, or go on with a training that was cut off; nothing is done where it is complete."""
    folder, settings = run.out / "checkpoints", run.config.train
    if saved := checkpoint.saved(folder):
        state = checkpoint.load(saved[-1])
        if state.step == state.meta["steps"]:
            log.info("train: complete already (%d epochs)", len(state.meta["history"]))
            return
        log.info("train: going on from %s", saved[-1].name)
    x, y = run.train_images.inputs().to(run.device), run.train_images.labels.to(run.device)
    history = fit(
        run.model,
        run.guide,
        x,
        y,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        optimizer=settings.optimizer,
        lr_schedule=settings.lr_schedule,
        scale_lr_factor=settings.scale_lr_factor,
        clip_norm=settings.clip_norm,
        estimator=settings.estimator,
        kl_weight=kl_schedule(
            settings.kl_schedule, settings.kl_weight, ramp=settings.kl_ramp, cycles=settings.kl_cycles
        ),
        num_particles=settings.num_particles,
        seed=settings.seed,
        progress=run.progress,
        folder=run.out,
        checkpoint_every=settings.checkpoint_every,
        should_stop=run.should_stop,
    )
    last, seconds = history[-1], sum(row["seconds"] for row in history)
    log.info(
        "train: %d epochs in %.0f s; loss %.4f, nll %.4f, kl %.4f nats per datum, accuracy %.4f",
        len(history), seconds, last["loss"], last["nll"], last["kl"], last["accuracy"],
    )  # fmt: skip


def predict(run: Run) -> None:
    """Draw the posterior predictive of the test set and write predictive.nc."""
    settings, path = run.config.predict, run.out / "predictive.nc"
    state = run.restored(settings.checkpoint)
    inputs = _inputs(run, state, dataclasses.asdict(settings))
    if _up_to_date(path, inputs, "predict"):
        return
    x, y = run.test_tensors()
    draws = settings.num_samples if run.guide.sites else 1
    predictive = draw_predictive(
        run.model.net, run.guide, x, y,
        num_samples=draws, seed=settings.seed, progress=run.progress, should_stop=run.should_stop,
    )  # fmt: skip
    attrs = {"run": run.name, "inputs": inputs, "step": state.step}
    kl = kl_by_site(run.model, run.guide, *run.example())
    idata = inference_data.to_inference_data(
        predictive, run.test_images, guide=run.guide, kl=kl, history=state.meta["history"], attrs=attrs
    )
    inference_data.save(idata, path)
    found = predictive.summary()
    log.info(
        "predict: %d draws of %d images in %.1f s; accuracy %.4f, nll %.4f, ece %.4f, brier %.4f",
        draws, len(x), found["seconds"], found["accuracy"], found["nll"], found["ece"], found["brier"],
    )  # fmt: skip


def prune(run: Run) -> None:
    """Sweep over the pruning levels and write pruning.nc."""
    settings, path = run.config.pruning, run.out / "pruning.nc"
    if not run.guide.sites:
        log.info("prune: skipped, a deterministic network has no signal-to-noise ratio to prune by")
        return
    state = run.restored(settings.checkpoint)
    inputs = _inputs(run, state, dataclasses.asdict(settings))
    if _up_to_date(path, inputs, "prune"):
        return
    x, y = run.test_tensors()
    levels = sweep(
        run.model.net, run.guide, x, y,
        thresholds=settings.thresholds(), fractions=settings.fractions, scope=settings.scope,
        num_samples=settings.num_samples, seed=settings.seed, keep=_images_to_keep(run),
        progress=run.progress, should_stop=run.should_stop,
    )  # fmt: skip
    for level in levels:
        for site, nonzero in level.pruned.nonzero.items():
            if nonzero == 0:
                log.warning("prune: threshold %.3g leaves no weight in %s", level.pruned.threshold, site)
    attrs = {"run": run.name, "inputs": inputs, "step": state.step}
    idata = inference_data.sweep_to_inference_data(levels, run.test_images, guide=run.guide, attrs=attrs)
    inference_data.save(idata, path)
    for level in levels:
        found = level.predictive.summary()
        log.info(
            "prune: %5.1f%% pruned (snr < %.3g), %d weights left: accuracy %.4f, nll %.4f, ece %.4f, %.1f s",
            100 * level.pruned.fraction, level.pruned.threshold, sum(level.pruned.nonzero.values()),
            found["accuracy"], found["nll"], found["ece"], found["seconds"],
        )  # fmt: skip


def report(run: Run) -> None:
    """Write metrics.json and every figure from predictive.nc and pruning.nc."""
    predictive, pruning = run.out / "predictive.nc", run.out / "pruning.nc"
    attrs = inference_data.read_attrs(predictive)
    groups = inference_data.groups_of(inference_data.load(predictive))
    metrics: dict[str, Any] = {
        "run": run.name,
        "data": {
            "title": run.test_images.title,
            "train": len(run.train_images),
            run.test_images.split: len(run.test_images),
        },
        "model": {
            "parameters": sum(row.trainable + row.non_trainable for row in run.rows),
            "trainable": sum(row.trainable for row in run.rows),
        },
    }
    if "training" in groups:
        history = groups["training"]
        seconds = float(history["seconds"].sum())
        metrics["train"] = {
            "epochs": history.sizes["epoch"],
            "seconds": seconds,
            "samples_per_second": len(run.train_images) * history.sizes["epoch"] / seconds,
            "accuracy": float(history["accuracy"][-1]),
        }
    metrics["test"] = {name: attrs[name] for name in ("num_samples", "seconds", "accuracy", "nll", "ece", "brier")}
    metrics["pruning"] = []
    if pruning.exists():
        levels = inference_data.groups_of(inference_data.load(pruning))["pruning"]
        names = ("threshold", "pruned_fraction", "nonzero", "accuracy", "nll", "ece", "seconds")
        metrics["pruning"] = [
            {name: levels[name].values[at].item() for name in names} for at in range(levels.sizes["level"])
        ]
    write_text(run.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    figures = plots.draw_figures(predictive, pruning if pruning.exists() else None, run.out / "figures")
    log.info("report: %s and %d figures in %s", run.out / "metrics.json", len(figures), run.out / "figures")


def prepare_out(config: Config, out: Path) -> None:
    """Make the out folder, refuse one that holds another run, and save the settings there.

    Raises:
        FileError: it holds a run trained with other settings (the message names the first), or cannot be written.
    """
    path = out / "config.yaml"
    if path.exists():
        there = configs.read(path)
        trained = {name: dict(there.get(name, {})) for name in ("data", "model", "guide", "train")}
        trained["data"].pop("dir", None)
        trained["train"].pop("checkpoint_every", None)
        # From here to the saved text and back, so that both sides have YAML's types.
        here = json.loads(json.dumps(configs.trained_part(config)))
        if difference := configs.first_difference(here, json.loads(json.dumps(trained))):
            raise FileError(
                f"{out} holds a run with other settings: {difference}; "
                "choose another folder with --out, or delete that one"
            )
    try:
        configs.save(config, path)
    except OSError as error:
        raise FileError(f"the out folder {out} cannot be written: {error.strerror or error}") from None


def _load_data(config: Config) -> tuple[Images, Images]:
    settings = config.data
    try:
        train_images, test_images = load(settings.name, settings.dir, file=settings.file, holdout=settings.holdout)
    except OSError as error:
        raise FileError(f"the data folder {settings.dir} cannot be used: {error.strerror or error}") from None
    return train_images.first(settings.num_train), test_images.first(settings.num_test)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _checked_table(net: nn.Module, x: Tensor, config: Config) -> list[Row]:
    try:
        return layer_table(net, x)
    except RuntimeError as error:
        raise ValueError(
            f"{config.model.name} cannot take {config.data.name}'s images of shape {list(x.shape[1:])}: "
            f"{str(error).splitlines()[0]}"
        ) from None


def _twin_state(path: Path) -> dict[str, Tensor]:
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    state = checkpoint.load(checkpoint.find(folder) if folder.is_dir() else folder)
    return state.part("model")


def _inputs(run: Run, state: checkpoint.Checkpoint, settings: dict[str, Any]) -> dict[str, Any]:
    return {"checkpoint": state.step, "crc32": state.meta["crc32"], "settings": settings, "data": run.test_images.title}


def _up_to_date(path: Path, inputs: dict[str, Any], stage: str) -> bool:
    if not path.exists():
        return False
    before = inference_data.read_attrs(path).get("inputs", {})
    if difference := configs.first_difference(json.loads(json.dumps(inputs)), before):
        log.info("%s: doing %s again, because %s", stage, path.name, difference)
        return False
    log.info("%s: %s is up to date", stage, path.name)
    return True


def _images_to_keep(run: Run) -> Tensor:
    # Of each class the first image and, where the predictive is there, the ten with the most epistemic uncertainty.
    labels = run.test_images.labels
    order = torch.arange(len(labels))
    path = run.out / "predictive.nc"
    if path.exists():
        epistemic = inference_data.groups_of(inference_data.load(path))["uncertainty"]["epistemic"].values
        if len(epistemic) == len(labels):
            order = torch.from_numpy(epistemic).argsort(descending=True, stable=True)
    kept = set()
    for label in labels.unique().tolist():
        kept.add(int((labels == label).nonzero()[0]))
        kept.update(order[labels[order] == label][:10].tolist())
    return torch.tensor(sorted(kept))
