"""From a run to Python: model, posterior, data and results by the run's folder."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ppl_bnn.data import Split
from ppl_bnn.devices import usable_device
from ppl_bnn.errors import FileError, UserError
from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.config import Config
from ppl_bnn.experiment.described import described, example_of
from ppl_bnn.experiment.fit_check import likelihood_and_outputs
from ppl_bnn.experiment.out_folder import saved_settings
from ppl_bnn.experiment.prior_run import read_prior
from ppl_bnn.experiment.provenance import predictive_path, pruned_path
from ppl_bnn.experiment.run_data import RunData, load_data
from ppl_bnn.experiment.setup import network
from ppl_bnn.guides import MeanFieldNormal, StoredPosterior
from ppl_bnn.inference import checkpoint as checkpoints
from ppl_bnn.inference.posterior_file import load_posterior
from ppl_bnn.inputs import Inputs, mapped, shape_of
from ppl_bnn.models import Model
from ppl_bnn.models.evaluating import forked_random
from ppl_bnn.pruning import prune
from ppl_bnn.results.netcdf import read_attrs

if TYPE_CHECKING:
    from ppl_bnn.prediction.result import Predictive


@dataclass(frozen=True)
class Run:
    """A run that `open_run` opened. Data and results are read when they are first asked for.

    ``ppl_bnn.predict(run.model, run.posterior, x)`` predicts, with inputs x [N, ...] as in the run's training: pixels
    from 0 to 1, a table's columns standardized as those of ``run.train_data``.

    Attributes:
        model: the network and its likelihood, with the saved point estimates.
        posterior: the saved posterior of its weights; it has no sites if the network is deterministic.
        settings: the run's settings, those of the saved ``config.yaml``.
        folder: the out folder.
        checkpoint: the name of the saved step.
        step: its number of training steps.
        classes: names of the classes, in the order of the labels; empty for numbers.
        log: one record an epoch of the training until then, as `ppl_bnn.fit` returns them.
    """

    model: Model = field(repr=False)
    posterior: MeanFieldNormal | StoredPosterior = field(repr=False)
    settings: Config = field(repr=False)
    folder: Path
    checkpoint: str
    step: int
    classes: tuple[str, ...]
    log: list[dict[str, float]] = field(repr=False)
    _example: Inputs = field(repr=False)
    _predictive: Path | None = field(repr=False)

    @cached_property
    def _data(self) -> RunData:
        return load_data(self.settings, progress=False)

    @property
    def train_data(self) -> Split:
        """The run's training data. Raises FileError where they cannot be had (`data_dir` if they moved)."""
        return self._data.train

    @property
    def test_data(self) -> Split:
        """The data that the run is evaluated on. Raises FileError as `train_data` does."""
        return self._data.test

    @property
    def metrics(self) -> dict[str, Any]:
        """The numbers of the last report, ``metrics.json``.

        Raises FileError if there is none, it is damaged, or the report was of another step or posterior.
        """
        own = self._own_predictive()
        path = self._written(self.folder / "metrics.json", "report")
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FileError(f"{path} is not valid JSON ({error}); delete it and run the stage report") from None
        with_what = found.get("predicted_with", {"checkpoint": "last", "posterior": None})
        reported = predictive_path(self.folder, replace(self.settings.predict, **with_what))
        if reported.name != own.name:
            raise FileError(
                f"{path} is of {reported.name}, and this posterior's results are {own.name}: run the stages predict "
                "and report with its predict.checkpoint or predict.posterior"
            )
        self._check_step(path, found.get("step", self.step), "stages predict and report")
        return found

    def predictive(self) -> "Predictive":
        """The saved predictive of the test data. Raises FileError if the checkpoint has none, or it is damaged."""
        from ppl_bnn.results.saved_draws import read_predictive

        return read_predictive(self._predictive_path(), self.model.likelihood)

    def inference_data(self) -> Any:
        """The saved predictive as ArviZ has it: InferenceData, or a DataTree from ArviZ 1.0 on. Raises as before."""
        from ppl_bnn.results.idata import load

        return load(self._predictive_path())

    def pruned(self, fraction: float | None = None, *, file: str | Path | None = None, **how: Any) -> "Run":
        """The run with a pruned posterior.

        Args:
            fraction: prune the posterior by this share of its weights, in [0, 1); `how` is as in `ppl_bnn.prune`.
            file: read this posterior file, with the point estimates in it (fine-tuned, maybe). Without `fraction` and
                `file` it is the run's own, ``pruned.safetensors``, which ``pruning.save_fraction`` writes.

        Raises:
            UserError: both fraction and file, or settings of `how` that `ppl_bnn.prune` refuses.
            FileError: no such file, a damaged one, or one of another network.
        """
        if fraction is not None and file is not None:
            raise UserError(f"give either a fraction or a file, got fraction {fraction} and file {file}")
        if fraction is not None:
            posterior = prune(self.posterior, fraction=fraction, **how).guide
            return replace(self, posterior=posterior, _predictive=None)
        if how:
            raise UserError(f"{min(how)} is for a fraction, and a file is pruned already: leave it out")
        if file is None:
            file = pruned_path(self.folder, replace(self.settings.pruning, checkpoint=self.checkpoint))
        model = copy.deepcopy(self.model)
        posterior = load_posterior(file, model, self._example)
        predictive = predictive_path(self.folder, replace(self.settings.predict, posterior=str(file)))
        return replace(self, model=model, posterior=posterior, _predictive=predictive)

    def _predictive_path(self) -> Path:
        path = self._written(self._own_predictive(), "predict")
        self._check_step(path, read_attrs(path).get("step", self.step), "stage predict")
        return path

    def _own_predictive(self) -> Path:
        if self._predictive is None:
            raise FileError("a posterior that was pruned just now has no saved predictive or report: predict with it")
        return self._predictive

    def _check_step(self, path: Path, step: int, stages: str) -> None:
        if step != self.step:
            raise FileError(f"{path} is of step {step}, and this is step {self.step}: run the {stages} again")

    def _written(self, path: Path, stage: str) -> Path:
        if not path.exists():
            raise FileError(f"{path} is not there: python -m ppl_bnn.run {self.folder} --stages {stage} writes it")
        return path


def open_run(
    folder: str | Path,
    *,
    device: str = "cpu",
    checkpoint: str = "last",
    data_dir: str | None = None,
    trust: bool = False,
) -> Run:
    """Open a trained run: its model and posterior, and its data and results once they are asked for.

    The data are not needed, unless an earlier version of this library wrote the checkpoint.

    Args:
        folder: a run folder, or the out folder of a run.
        device: where model and posterior are put, such as ``cuda``.
        checkpoint: the saved step: ``last``, ``best``, or a name such as ``step-00006000``.
        data_dir: the folder of the data sets, if it is another than in the run's settings; a file of your own that is
            no longer where it was is looked for there by its name.
        trust: whether code that the settings name by its import path may run although the folder is not yours.

    Raises:
        FileError: the folder is no run's, or not trained yet; there is no such checkpoint, or it is damaged or of
            another network than its settings.
        UserError: there is no such device.
    """
    out = saved_config.out_of(Path(folder))
    if not out.is_dir():
        raise FileError(f"there is no folder {out}: give a run folder that was trained, or a run's out folder")
    state = checkpoints.load(checkpoints.find(out / "checkpoints", checkpoint))
    config = saved_settings(out, device=device, data_dir=data_dir, trusted=trust)
    of_data = state.meta.get("origin", {}).get("described") or _described_by_data(config)
    place = usable_device(device)
    # What is drawn here is replaced by what was saved.
    with forked_random(torch.empty(0, device=place)):
        model, guide, example = _built(config, of_data, place)
    checkpoints.restore(state, model=model, guide=guide)
    return Run(
        model, guide, config, out, checkpoint, state.step, tuple(of_data["classes"]), state.history, example,
        predictive_path(out, replace(config.predict, checkpoint=checkpoint, posterior=None)),
    )  # fmt: skip


def _described_by_data(config: Config) -> dict[str, Any]:
    train = load_data(config, progress=False).train
    return described(train, train.first(1).inputs())


def _built(config: Config, of_data: Mapping[str, Any], device: torch.device) -> tuple[Model, MeanFieldNormal, Inputs]:
    example = mapped(example_of(of_data["inputs"]), lambda part: part.to(device))
    likelihood, num_outputs = likelihood_and_outputs(config, len(of_data["classes"]))
    source = config.model.prior_from
    net = network(config, shape_of(example), num_outputs, None if source is None else read_prior(source))
    model = Model(net, likelihood, of_data["num_data"]).to(device)
    guide = MeanFieldNormal(model, example).to(device)
    if config.channels_last:
        model, guide = (part.to(memory_format=torch.channels_last) for part in (model, guide))
    return model, guide, example
