"""What a training says of itself: a record for each epoch (log.csv) and for every few steps (steps.csv)."""

import csv
import dataclasses
import io
import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_bnn.distributed import Communicator
from ppl_bnn.files import write_text
from ppl_bnn.inference.elbo import Terms
from ppl_bnn.models.labels import right_answers

STEPS_A_RECORD = 50
# Number of steps that performance.json keeps one by one, the last.
_LAST_STEPS = 50_000


class TrainingLog:
    """Records of a training, and the sums of those that are not complete yet.

    Attributes:
        epochs: one record an epoch, with means over its steps.
        steps: one record every 50 steps: step, seconds so far, and the means over those steps.

    The mean of kl_weight, in both, is the one by which loss = nll + kl_weight * kl.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self.epochs: list[dict[str, float]] = state.get("history", [])
        self.steps: list[dict[str, float]] = state.get("step_records", [])
        self._last: deque[tuple[int, float, float | None]] = deque(maxlen=_LAST_STEPS)
        self._starts, self._step = [0], 0
        self._epoch: dict[str, float] = state.get("sums", {})
        self._window: dict[str, float] = state.get("window", {})

    @property
    def rows(self) -> int:
        """Examples of the present epoch that are done."""
        return int(self._epoch.get("rows", 0))

    def state(self) -> dict[str, Any]:
        """Everything, as JSON: ``TrainingLog(log.state())`` continues this one."""
        return {"history": self.epochs, "step_records": self.steps, "sums": self._epoch, "window": self._window}

    def add(self, step: int, terms: Terms, correct: float, rows: int, seconds: float, kl_weight: float = 1.0) -> None:
        """Add a step of `rows` examples."""
        self._step = step
        self._last.append((rows, round(seconds, 6), round(correct / rows, 6) if math.isfinite(correct) else None))
        parts = {"loss": terms.loss * rows, "nll": terms.nll * rows, "kl": terms.kl * rows, "correct": correct}
        parts["weighted_kl"] = kl_weight * parts["kl"]
        for sums in (self._epoch, self._window):
            if "weighted_kl" not in sums and "loss" in sums:
                # Of an earlier version.
                sums["weighted_kl"] = sums["loss"] - sums["nll"]
            sums["kl_weight"] = kl_weight
            for name, value in {**parts, "rows": rows, "seconds": seconds}.items():
                sums[name] = sums.get(name, 0.0) + value
        if step % STEPS_A_RECORD == 0:
            before = self.steps[-1]["seconds"] if self.steps else 0.0
            means = _means(self._window)
            self.steps.append({"step": step, "seconds": before + self._window["seconds"], **means})
            self._window = {}

    def end_epoch(self, epoch: int, step: int, *, lr: float) -> None:
        """Close the record of an epoch (counted from 1)."""
        means = _means(self._epoch)
        parts = {name: means[name] for name in ("loss", "nll", "kl", "kl_weight", "accuracy")}
        seconds, speed = self._epoch["seconds"], means["samples_per_second"]
        self.epochs.append(
            {"epoch": epoch, "step": step, "seconds": seconds, **parts, "lr": lr, "samples_per_second": speed}
        )
        self._epoch = {}

    def add_scores(self, scores: Mapping[str, float]) -> None:
        """Add the scores of a validation to the last epoch's record, as ``val_nll`` and so on."""
        self.epochs[-1].update({f"val_{name}": score for name, score in scores.items()})

    def write(self, folder: Path) -> None:
        """Write log.csv and steps.csv."""
        write_text(folder / "log.csv", _as_csv(self.epochs))
        if self.steps:
            write_text(folder / "steps.csv", _as_csv(self.steps))

    def resume(self, folder: Path, step: int) -> None:
        """Keep the steps up to `step` that performance.json has of earlier processes, if it has the last of them."""
        self._starts, self._step = [step], step
        try:
            before = json.loads((folder / "performance.json").read_text(encoding="utf-8"))
            steps = list(zip(before["rows"], before["seconds"], before["accuracy"], strict=True))
            count, starts = step - before["first_step"] + 1, before["starts"]
        except (OSError, ValueError, KeyError):
            # It is missing, damaged or of version 0.1.0. The training does not need it.
            return
        if 0 <= count <= len(steps):
            self._last.extend(steps[:count])
            self._starts = [*(start for start in starts if start < step), step]

    def write_performance(self, folder: Path, communicator: Communicator) -> None:
        """Write performance.json: what each step took and reached, and what the ranks sent each other.

        ``rows``, ``seconds`` and ``accuracy`` (over all ranks; null without class labels) have an entry for each step
        from ``first_step`` (1, or later if there were over 50,000) on, those of a training that was resumed too.
        ``starts`` has the number of steps before each process. Under ``calls`` there is for each kind of
        `Communicator.calls` its ``count``, its ``bytes`` and the ``seconds`` that this rank waited, since this process
        called `fit`.
        """
        if not self._last:
            return
        rows, seconds, accuracy = zip(*self._last, strict=True)
        content = {
            "ranks": communicator.size, "backend": communicator.name, "threads": torch.get_num_threads(),
            "first_step": self._step - len(rows) + 1, "starts": self._starts,
            "rows": rows, "seconds": seconds, "accuracy": accuracy,
            "calls": {kind: dataclasses.asdict(calls) for kind, calls in communicator.calls.items()},
        }  # fmt: skip
        write_text(folder / "performance.json", json.dumps(content) + "\n")

    def __str__(self) -> str:
        means = _means(self._epoch) if self._epoch else self.epochs[-1]
        # Without class labels there is no accuracy.
        shown = [name for name in ("loss", "nll", "kl", "kl_weight", "accuracy") if not math.isnan(means[name])]
        parts = [f"{name} {means[name]:{'.8g' if name == 'kl_weight' else '.4f'}}" for name in shown]
        last = next((record for record in reversed(self.epochs) if "val_nll" in record), {})
        parts += [f"{name} {last[name]:.4f}" for name in ("val_nll", "val_accuracy", "val_rmse") if name in last]
        return f"{', '.join(parts)}, {means['samples_per_second']:.0f} samples/s"


class BatchAccuracy(Messenger):
    """Pyro handler: reads off the last step's correct answers where the observed site is categorical."""

    _correct: Tensor | float = math.nan

    @property
    def correct(self) -> float:
        """Their number, NaN where there was none; reading it waits for a device to have computed it."""
        return float(self._correct)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] and msg["mask"] is None:
            correct = right_answers(msg["fn"], msg["value"])
            if correct is not None:
                self._correct = correct


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    rows = sums["rows"]
    means = {name: sums[name] / rows for name in ("loss", "nll", "kl")}
    weight = sums["weighted_kl"] / sums["kl"] if sums["kl"] else sums["kl_weight"]
    # A constant weight of 0.1 is 0.1, not 0.09999999999999999.
    means["kl_weight"] = float(f"{weight:.12g}")
    return {**means, "accuracy": sums["correct"] / rows, "samples_per_second": rows / sums["seconds"]}


def _as_csv(records: Sequence[Mapping[str, float]]) -> str:
    text = io.StringIO()
    # Not every epoch has a validation, and earlier versions wrote less.
    names = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
