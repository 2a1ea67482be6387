"""A run built from its settings: out folder, data, model and guide."""

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppl_bnn.data import DATASETS, Images, Split, first_inputs
from ppl_bnn.data.fingerprints import without_times
from ppl_bnn.devices import usable_device
from ppl_bnn.distributed import Alone, Communicator
from ppl_bnn.errors import FileError, UserError, some
from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.config import Config, ModelConfig
from ppl_bnn.experiment.described import described
from ppl_bnn.experiment.fit_check import checked_reading, fitting, likelihood_and_outputs
from ppl_bnn.experiment.identity import Identity, identity, read_identity
from ppl_bnn.experiment.kinds import kind_of
from ppl_bnn.experiment.out_folder import run_name, saved_settings
from ppl_bnn.experiment.prior_run import PriorRun, read_prior
from ppl_bnn.experiment.run_data import load_data
from ppl_bnn.experiment.trust import code_checksums
from ppl_bnn.guides import MeanFieldNormal
from ppl_bnn.guides.mean_field import InitLoc
from ppl_bnn.inference import checkpoint
from ppl_bnn.inputs import Inputs, mapped
from ppl_bnn.models import Model, build, layer_table, parse_prior
from ppl_bnn.models.likelihoods import Categorical
from ppl_bnn.models.selection import trainable_weights
from ppl_bnn.native.normals import draw_seed
from ppl_bnn.prediction.norm_statistics import batch_norms

log = logging.getLogger(__name__)


class Experiment:
    """What the stages share: settings, folder, data, ranks, and a model and guide built from the settings."""

    def __init__(
        self,
        name: str,
        config: Config,
        out: Path,
        should_stop: Callable[[], bool],
        progress: bool,
        ranks: Communicator | None = None,
    ) -> None:
        self.name, self.config, self.out = name, config, out
        self.should_stop, self.progress = should_stop, progress
        self.ranks = ranks or Alone()
        self._read: tuple[tuple[Path, int], checkpoint.Checkpoint] | None = None
        self.device = device_of(config, self.ranks)
        # Rank 0 downloads what is not there yet.
        with self.ranks.main_first():
            self.train_data, self.validation_data, self.test_data = load_data(config, progress=progress)
        likelihood, num_outputs = likelihood_and_outputs(config, len(self.train_data.classes))
        torch.manual_seed(draw_seed(config.train.seed, 0))
        source = config.model.prior_from
        prior = None if source is None else read_prior(source)
        net = network(config, self.train_data.shape, num_outputs, prior)
        if config.predict.norm_images and not config.model.deterministic:
            batch_norms(net)
        self.model = Model(net, likelihood, len(self.train_data)).to(self.device)
        self._read_targets = checked_reading(config, self.model, self.train_data, self.test_data, num_outputs)
        x = self.example()[0]
        with fitting(config, x):
            self.rows = layer_table(self.model.net, x)
        self.guide = self._build_guide().to(self.device)
        if config.channels_last:
            self.model, self.guide = (part.to(memory_format=torch.channels_last) for part in (self.model, self.guide))
        self.origin = {
            **saved_config.trained_part(config),
            "trained on": self.identity(self.train_data),
        }
        if prior is not None:
            self.origin["model.prior_from"] = prior.origin
        self.code = code_checksums(config)
        # Of shift.ood, by name (`shift_kinds.other_data`).
        self.others: dict[str, Split] = {}

    @cached_property
    def examples(self) -> str:
        """What the log calls the examples: images, rows, sequences or examples."""
        return kind_of(self.train_data)

    @property
    def of_classes(self) -> bool:
        """Whether the predictive is probabilities of classes."""
        return isinstance(self.model.likelihood, Categorical)

    def identity(self, data: Split) -> Identity:
        """What identifies these data: a checksum unless their title tells all, or a fingerprint if they are on disk."""
        settings = self.config.data
        named = settings.file is None and settings.name in DATASETS and isinstance(data, Images)
        return identity(data, checksum=not named)

    def example(self) -> tuple[Any, Tensor]:
        """One input [1, ...] and its target [1], on the run's device."""
        target = self._read_targets(self.train_data.targets[:1])
        return first_inputs(self.train_data, 1, self.device), target.to(self.device)

    def described(self) -> dict[str, Any]:
        """What model and guide can be built from without the data; each checkpoint has it (`ppl_bnn.open_run`)."""
        return described(self.train_data, self.example()[0])

    def saved(self, name: str = "last") -> checkpoint.Checkpoint:
        """A saved step by name, if it is of this run.

        Raises:
            FileError: no such step, a damaged one, or one trained with other settings or on other data.
        """
        path = checkpoint.find(self.out / "checkpoints", name)
        stamp = (path, path.stat().st_mtime_ns)
        # Each stage asks for the same one: it is read and verified once.
        if self._read is None or self._read[0] != stamp:
            self._read = stamp, checkpoint.load(path)
        state = self._read[1]
        if difference := saved_config.first_difference(self.origin, self._origin_of(state)):
            raise FileError(f"{path} belongs to another run: {difference}; choose another folder with --out")
        self._warn_of_other_code(state, path)
        return state

    def _warn_of_other_code(self, state: checkpoint.Checkpoint, path: Path) -> None:
        there = state.meta["origin"].get("code", {})
        if changed := [name for name, found in self.code.items() if there.get(name, found) != found]:
            log.warning("%s changed after %s was trained, and goes on with its numbers", some(changed), path.name)

    def _origin_of(self, state: checkpoint.Checkpoint) -> dict[str, Any]:
        """A checkpoint's origin, completed where an earlier version left something out."""
        origin = dict(state.meta["origin"])
        # Version 0.1.0 kept some of the settings beside the origin alone.
        origin["train"] = {**state.meta["settings"], **origin.get("train", {})}
        for part in ("data", "model", "guide", "train"):
            origin[part] = saved_config.completed(part, origin.get(part, {}))
        if "trained on" in origin:
            there = read_identity(origin["trained on"])
            now = self.origin["trained on"]
            # Trained before files of the user's own were told apart by more than their number of images.
            there = {**there, "checksum": there.get("checksum") or now.get("checksum")}
            # Copies of the files have other times. Training says so.
            if without_times(there.get("fingerprint", "")) == without_times(now.get("fingerprint", "")):
                there["fingerprint"] = now.get("fingerprint")
            origin["trained on"] = there
        return origin

    def restored(self, name: str) -> checkpoint.Checkpoint:
        """Load a saved step by name into the model and the guide. Raises FileError as `saved` does."""
        state = self.saved(name)
        checkpoint.restore(state, model=self.model, guide=self.guide)
        return state

    def norm_inputs(self) -> Any:
        """The training inputs that each draw's batch norm takes its statistics from; None for the running averages."""
        count = self.config.predict.norm_images
        return self._laid_out(first_inputs(self.train_data, count)) if count and self.guide.sites else None

    def examples_of(self, data: Split) -> tuple[Any, Tensor | None]:
        """Some data as `fit` and `predict` take them.

        Inputs and targets on the run's device where they are in memory; else `Examples`, which have the targets, and
        None.
        """
        return self.tensors(data) if data.in_memory else (data.examples(), None)

    def tensors(self, data: Split) -> tuple[Any, Tensor]:
        """Inputs and targets of data in memory, as the model takes them, on the run's device."""
        return self.inputs(data), self._read_targets(data.targets).to(self.device)

    def inputs(self, data: Split) -> Any:
        """Inputs of data in memory, on the run's device."""
        return self._laid_out(data.inputs())

    def _laid_out(self, x: Inputs) -> Any:
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return mapped(x, lambda part: part.to(self.device).contiguous(memory_format=layout))

    def _build_guide(self) -> MeanFieldNormal:
        settings = self.config.guide
        init_loc: InitLoc = settings.init_loc
        # Once there is a checkpoint, the twin has done its part and may be gone. The other ranks start from rank 0's.
        started = not self.ranks.is_main or checkpoint.saved(self.out / "checkpoints")
        if settings.init_from is not None and not started:
            twin = _twin_state(Path(settings.init_from))
            init_loc = {name.removeprefix("net."): tensor for name, tensor in twin.items()}
            own = self.model.state_dict()
            shared = {name: tensor for name, tensor in twin.items() if name in own}
            if difference := checkpoint.shape_difference(shared, {name: own[name] for name in shared}):
                raise FileError(f"guide.init_from {settings.init_from} is from another network: {difference}")
            self.model.load_state_dict({**own, **shared})
        return MeanFieldNormal(
            self.model,
            *self.example(),
            init_loc=init_loc,
            init_scale=settings.init_scale,
            init_jitter=settings.init_jitter,
            init_relative_scale=settings.init_relative_scale,
        )


def device_of(config: Config, ranks: Communicator) -> torch.device:
    """The device that this rank works on. Raises UserError where there is none of that name."""
    return usable_device(config.device, local_rank=ranks.local_rank if ranks.size > 1 else None)


def network(config: Config, shape: Any, num_outputs: int, prior: PriorRun | None = None) -> nn.Module:
    """The run's network for inputs of this shape; with `prior`, the one that the run names.

    Args:
        num_outputs: for a network that can have any number.

    Raises:
        FileError: `prior` is of another network.
    """
    model = config.model
    # A network that is Bayesian already has priors: the default one is not laid over them.
    own = None if model.prior == ModelConfig().prior else parse_prior(model.prior)
    try:
        net = build(
            model.name,
            image_shape=shape,
            num_outputs=num_outputs,
            options=model.options,
            prior=own if prior is None else prior.prior,
            deterministic=model.deterministic,
            bayesian_bias=model.bayesian_bias,
        )
    except UserError as error:
        if prior is None:
            raise
        raise FileError(f"model.prior_from {model.prior_from} does not fit this network: {error}") from None
    # What a mapping of priors does not name is a point estimate.
    if prior is not None and (more := trainable_weights(net)):
        raise FileError(f"model.prior_from {model.prior_from} does not fit this network, which has {min(more)!r} too")
    return net


def opened(out: Path, *, data_dir: str | None = None, trusted: bool = False) -> Experiment:
    """Open a run by its out folder alone, on the CPU; arguments and errors are those of `saved_settings`."""
    config = saved_settings(out, data_dir=data_dir, trusted=trusted)
    return Experiment(run_name(out), config, out, lambda: False, progress=False)


def _twin_state(path: Path) -> dict[str, Tensor]:
    file = checkpoint.located(path)
    return checkpoint.load(file, advice="guide.init_from takes a run's out folder, or one of its checkpoints").part(
        "model"
    )
