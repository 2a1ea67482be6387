"""The loop of a training: epochs of steps, with its log, progress bar, validation and checkpoints."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tqdm import tqdm

from ppl_bnn.errors import CallbackFailed, Interrupted
from ppl_bnn.inference.callbacks import Onlookers
from ppl_bnn.inference.log import TrainingLog
from ppl_bnn.inference.own_optimizer import Rates
from ppl_bnn.inference.reading import Batch
from ppl_bnn.inference.saving import Checkpoints
from ppl_bnn.inference.step import Step
from ppl_bnn.inference.validation import Validation

log = logging.getLogger(__name__)


@dataclass
class Loop:
    """The training loop and what it drives.

    Attributes:
        batches: all those that are left.
        weight_at: the KL weight for a progress in [0, 1].
        validation: None where there are no data for it.
    """

    step: Step
    batches: Iterator[Batch]
    checkpoints: Checkpoints
    records: TrainingLog
    bar: tqdm
    rates: Rates
    onlookers: Onlookers
    validation: Validation | None
    weight_at: Callable[[float], float]
    should_stop: Callable[[], bool]

    def run(self, done: int) -> None:
        """Train, from the step after `done` on."""
        step, ranks, number = self.step, self.step.ranks, done
        self.onlookers.start(done)
        ended = "ended" in self.checkpoints.meta
        while not ended and len(self.records.epochs) < step.settings.epochs:
            number, stop, ended = self._steps(number)
            ended = self._end_epoch(number, stop=stop) if not ended else self._end(number, "callback")
        if self.checkpoints.folder is not None and ranks.is_main and number > done:
            # Again, with the messages of the last checkpoint.
            self.records.write_performance(self.checkpoints.folder, ranks)
        self.onlookers.end()

    def _steps(self, number: int) -> tuple[int, bool, bool]:
        """The steps that are left of an epoch, after step `number`.

        Returns:
            The last step's number, whether to stop, and whether a callback ended the training.
        """
        step, settings, ranks, records = self.step, self.step.settings, self.step.ranks, self.records
        count, epoch = len(step.reader.examples), len(records.epochs)
        rows_done, unread, agreed = records.rows, [], None
        while rows_done < count:
            started = time.perf_counter()
            batch = next(self.batches)
            # In examples, not steps, of which another number of ranks has others.
            progress = (epoch * count + rows_done) / (settings.epochs * count)
            kl_weight = self.weight_at(progress)
            number, rows_done = number + 1, rows_done + batch.total
            ends = rows_done == count
            agreed = step(
                number, batch, progress, kl_weight, stop=self.should_stop, save=self.checkpoints.due, read=ends
            )
            self.rates.after_step()
            unread.append((number, batch.total, time.perf_counter() - started, kl_weight))
            if agreed is None:
                self.onlookers.step(number)
                continue
            # Steps that are read together have their mean time: the last one waited for all of them.
            seconds = sum(own for _, _, own, _ in unread) / len(unread)
            for (one, examples, _, weight), (terms, correct) in zip(unread, agreed.found, strict=True):
                records.add(one, terms, correct, examples, seconds, weight)
            if self.bar.update(len(unread)):
                self.bar.set_postfix_str(str(records), refresh=False)
            if settings.compare_every and any(one % settings.compare_every == 0 for one, *_ in unread):
                step.compare_ranks(number)
            unread.clear()
            self.onlookers.step(number)
            if self.onlookers.end_now() and not ends:
                return number, False, True
            if not ends and (agreed.stop or agreed.save):
                self.checkpoints.write(number, records)
                if agreed.stop:
                    # A rank that ends while rank 0 is still writing would have its launcher end rank 0, too.
                    ranks.barrier()
                    raise Interrupted(f"stopped at step {number} of {self.bar.total}")
        assert agreed is not None
        return number, agreed.stop, False

    def _end_epoch(self, number: int, *, stop: bool) -> bool:
        """Close an epoch after its last step; returns whether the training ends early.

        Args:
            stop: raise Interrupted once all is saved.
        """
        step, settings, ranks, records = self.step, self.step.settings, self.step.ranks, self.records
        epoch, score = len(records.epochs) + 1, None
        records.end_epoch(epoch, number, lr=step.optimizer.param_groups[0]["lr"])
        if self.validation is not None and self.validation.due_after(epoch):
            score = self.validation(number, records)
            self.bar.set_postfix_str(str(records), refresh=False)
        self.rates.after_epoch(score)
        # The log first: a training that resumes writes it anew, one that is complete does not.
        if self.checkpoints.folder is not None and ranks.is_main:
            records.write(self.checkpoints.folder)
        if self.bar.disable and ranks.is_main:
            log.info("epoch %d of %d: %s", epoch, settings.epochs, str(records))
        try:
            self.onlookers.epoch(records.epochs[-1])
        except CallbackFailed:
            if ranks.size == 1:
                self.checkpoints.write(number, records)
            raise
        if epoch == settings.epochs:
            return self._end(number, None)
        if self.onlookers.end_now():
            return self._end(number, "callback")
        if self.validation is not None and self.validation.gives_up:
            return self._end(number, "patience")
        if self.checkpoints.due_after(epoch) or stop:
            self.checkpoints.write(number, records)
        if stop:
            ranks.barrier()
            raise Interrupted(f"stopped after epoch {epoch} of {settings.epochs}")
        return False

    def _end(self, number: int, why: str | None) -> bool:
        """End a training, complete or because of a callback or want of patience; returns True."""
        if why is not None:
            self.checkpoints.meta.update(steps=number, ended=why)
            if self.step.ranks.is_main:
                log.info("the training ended at step %d of %d: %s", number, self.bar.total, why)
        if self.validation is not None and self.step.settings.patience is not None:
            self.validation.restore_best()
        self.checkpoints.write(number, self.records)
        return True
