"""The loop of a training: epochs of steps, with its log, progress bar and checkpoints."""

import logging
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from ppl_bnn.errors import Interrupted
from ppl_bnn.inference.log import TrainingLog
from ppl_bnn.inference.reading import Batch
from ppl_bnn.inference.saving import Checkpoints
from ppl_bnn.inference.step import Step

log = logging.getLogger(__name__)


def train(
    step: Step,
    batches: Iterator[Batch],
    checkpoints: Checkpoints,
    records: TrainingLog,
    bar: tqdm,
    *,
    done: int,
    weight_at: Callable[[float], float],
    should_stop: Callable[[], bool],
) -> None:
    """The training loop, from the step after `done` on.

    Args:
        batches: all those that are left.
    """
    settings, ranks, count = step.settings, step.ranks, len(step.reader.examples)
    number = done
    while (epoch := len(records.epochs)) < settings.epochs:
        rows_done, unread = records.rows, []
        while rows_done < count:
            started = time.perf_counter()
            batch = next(batches)
            # In examples, not steps, of which another number of ranks has others.
            progress = (epoch * count + rows_done) / (settings.epochs * count)
            kl_weight = weight_at(progress)
            number, rows_done = number + 1, rows_done + batch.total
            ends = rows_done == count
            agreed = step(number, batch, progress, kl_weight, stop=should_stop, save=checkpoints.due, read=ends)
            unread.append((number, batch.total, time.perf_counter() - started))
            if agreed is None:
                continue
            # Steps that are read together have their mean time: the last one waited for all of them.
            seconds = sum(own for _, _, own in unread) / len(unread)
            for (one, examples, _), (terms, correct) in zip(unread, agreed.found, strict=True):
                records.add(one, terms, correct, examples, seconds)
            if bar.update(len(unread)):
                bar.set_postfix_str(str(records), refresh=False)
            if settings.compare_every and any(one % settings.compare_every == 0 for one, _, _ in unread):
                step.compare_ranks(number)
            unread.clear()
            if not ends and (agreed.stop or agreed.save):
                checkpoints.write(number, records)
                if agreed.stop:
                    # A rank that ends while rank 0 is still writing would have its launcher end rank 0, too.
                    ranks.barrier()
                    raise Interrupted(f"stopped at step {number} of {bar.total}")
        assert agreed is not None
        records.end_epoch(epoch + 1, number, kl_weight=kl_weight, lr=step.optimizer.param_groups[0]["lr"])
        folder = checkpoints.folder if ranks.is_main else None
        # The log first: a training that resumes writes it anew, one that is complete does not.
        if folder is not None:
            records.write(folder)
        if checkpoints.due_after(epoch + 1) or agreed.stop:
            checkpoints.write(number, records)
        if bar.disable and ranks.is_main:
            log.info("epoch %d of %d: %s", epoch + 1, settings.epochs, str(records))
        if agreed.stop and epoch + 1 < settings.epochs:
            ranks.barrier()
            raise Interrupted(f"stopped after epoch {epoch + 1} of {settings.epochs}")
    if checkpoints.folder is not None and ranks.is_main and number > done:
        # Again, with the messages of the last checkpoint.
        records.write_performance(checkpoints.folder, ranks)
