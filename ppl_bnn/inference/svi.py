"""Stochastic variational inference on mini-batches: `fit`."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from ppl_bnn.data.augmentation import AUGMENTATIONS
from ppl_bnn.distributed import Alone, Communicator, GradientBuckets, first_unequal, shard
from ppl_bnn.errors import Diverged, Interrupted, UserError
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.inference import checkpoint, data_parallel
from ppl_bnn.inference.door import check_training
from ppl_bnn.inference.elbo import KLScaledELBO
from ppl_bnn.inference.log import BatchAccuracy, TrainingLog
from ppl_bnn.inference.optimizers import NonFiniteGradient, build_optimizer, descend, first_gone_bad, set_lr
from ppl_bnn.inference.settings import DECISIVE, check_settings
from ppl_bnn.models.evaluating import forked_random
from ppl_bnn.models.modes import mode_setter
from ppl_bnn.models.param_store import trained_store
from ppl_bnn.native.arithmetic import compiled_arithmetic
from ppl_bnn.native.normals import draw_seed

log = logging.getLogger(__name__)

# Writing every so many minutes is put off until it costs at most this share of the time.
_WRITING_SHARE = 0.05


def fit(
    model: Callable,
    guide: Callable,
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    *,
    epochs: int,
    batch_size: int = 100,
    lr: float = 1e-3,
    optimizer: str = "adam",
    beta2: float = 0.99999,
    lr_schedule: str = "constant",
    lr_warmup: float = 0.0,
    scale_lr_factor: float = 1.0,
    clip_norm: float | None = None,
    estimator: str = "groups",
    kl_weight: float | Callable[[float], float] = 1.0,
    num_particles: int = 1,
    augment: str = "none",
    precision: str = "float32",
    compile: bool = False,
    seed: int = 0,
    progress: bool = True,
    folder: Path | None = None,
    origin: Mapping[str, Any] | None = None,
    checkpoint_every: int = 1,
    checkpoint_minutes: float = 10.0,
    keep_checkpoints: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    communicator: Communicator | None = None,
    lr_per_rank: bool = False,
    bucket_mb: float = 25.0,
    compression: str = "none",
    compare_every: int | None = 50,
) -> list[dict[str, float]]:
    """Train `guide` (and the point estimates in `model`) by SVI on the KL-scaled ELBO.

    Args:
        model: a Pyro model called as model(x, y), such as `Classifier`; a deterministic network in it is trained by
            maximum likelihood (its guide then has no sites).
        guide: a `MeanFieldNormal` of that model, or another guide that `KLScaledELBO` takes, such as one of Pyro's
            autoguides or a function. `estimator` has no effect on these: their draws are used as they are.
        x, y: training inputs [N, ...] and labels or targets [N], tensors or numpy arrays; N is the ELBO's num_data.
        batch_size: examples a step, on each rank.
        lr: learning rate; ivon's is on SGD's scale, about 0.1.
        optimizer: ``adam``, ``rmsprop`` or ``ivon`` (`ppl_bnn.inference.ivon`).
        beta2: decay of ivon's curvature.
        lr_schedule: ``constant``, or ``cosine`` from `lr` to 0 over the training.
        lr_warmup: the learning rate rises in a line over this fraction of training.
        scale_lr_factor: the learning rate of the guide's scales is this times `lr` (not with ivon).
        clip_norm: clip the gradient's total norm to this.
        estimator: ``plain``, ``flipout``, ``flipout-bfloat16``, ``groups`` or ``local`` (`ppl_bnn.guides`).
        kl_weight: a number above 0, or a function of training progress in [0, 1] that stays above 0
            (`ppl_bnn.inference.elbo.kl_schedule`): 0 would drop the prior from the model.
        augment: ``none`` or ``crop_flip`` (`ppl_bnn.data.augmentation`).
        precision: ``bfloat16`` runs the layers under torch.autocast; parameters and the KL stay float32.
        compile: run the weights' arithmetic through torch.compile where it is not C code: on a GPU.
        folder: where to write ``log.csv`` (an epoch a row), ``steps.csv`` (50 steps a row), ``performance.json``
            (`TrainingLog.write_performance`) and ``checkpoints/``: at the start, every `checkpoint_every` epochs, every
            `checkpoint_minutes` (less often where writing would take more than 5% of the time) and at the end. A
            training that was cut off there goes on from its last checkpoint, on a CPU bitwise as if it had not been (on
            a GPU where ``torch.backends.cudnn.deterministic`` is set); other ranks than before share what is left of
            the epoch.
        keep_checkpoints: how many to keep beside the start (``step-00000000``); None keeps all.
        origin: anything JSON about the run, kept in the checkpoints (``meta["origin"]``).
        should_stop: asked after each step; when it says yes, a checkpoint is written and Interrupted is raised.
        communicator: the ranks that train together (`ppl_bnn.distributed.connect`), each calling this alike. They start
            from rank 0's state, draw their own noise, and share each step's `batch_size` times `size` examples; rank 0
            alone reads and writes `folder` and shows progress.
        lr_per_rank: the learning rate is `lr` times the number of ranks.
        bucket_mb: gradients travel in messages of about so many MiB (`ppl_bnn.distributed.GradientBuckets`).
        compression: ``none``, or ``fp16``: they travel in half precision.
        compare_every: after so many steps, and before each checkpoint, the ranks' parameters must be the same to the
            last bit; None never compares.

    Before the first step model and guide are called once with two examples; what would not train is refused
    (`ppl_bnn.inference.door`). Modules that were put in evaluation mode stay in it (`ppl_bnn.models.modes`). Values of
    ``pyro.param`` statements are trained too, and are in the caller's parameter store afterwards.

    Returns:
        One record an epoch: epoch, step, seconds, loss, nll and kl (nats per datum), kl_weight, accuracy (of the
        single draws used in training, for categorical labels), lr, samples_per_second.

    Raises:
        UserError: settings out of range; labels, outputs, sites, parameters or `num_data` that do not fit; `folder`
            holds a training with other settings; fewer examples than ranks, or ranks with other settings, inputs or
            labels than rank 0.
        Diverged: the loss or a gradient is NaN or infinite; the message says where it began. Neither the
            parameters nor the last checkpoint hold any of it. Or a parameter is not the same on all ranks.
        Interrupted: `should_stop` said so, on any rank.
        RankLost: another rank is gone. The last checkpoint is good.
    """
    settings = {
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "optimizer": optimizer, "beta2": beta2,
        "lr_schedule": lr_schedule, "lr_warmup": lr_warmup, "scale_lr_factor": scale_lr_factor, "clip_norm": clip_norm,
        "estimator": estimator, "num_particles": num_particles, "augment": augment, "precision": precision,
        "compile": compile, "checkpoint_every": checkpoint_every, "checkpoint_minutes": checkpoint_minutes,
        "keep_checkpoints": keep_checkpoints, "lr_per_rank": lr_per_rank, "bucket_mb": bucket_mb,
        "compression": compression, "compare_every": compare_every,
    }  # fmt: skip
    check_settings(settings)
    ranks = communicator or Alone()
    ranks.calls.clear()
    model, guide, x, y, params, store = check_training(
        model, guide, x, y, batch_size=batch_size, ranks=ranks.size, seed=data_parallel.rank_seed(seed, ranks.rank),
        precision=precision,
    )  # fmt: skip
    weight_at = kl_weight if callable(kl_weight) else lambda _: float(kl_weight)
    weights = [weight_at(k / 97) for k in range(0, 97, 6)]
    if bad := [weight for weight in weights if not 0 < weight < math.inf]:
        raise UserError(f"kl_weight must be positive and finite throughout training, got {bad[0]}")
    if optimizer == "ivon" and len(set(weights)) > 1:
        raise UserError("ivon reads its curvature off the scale, which a KL schedule would move: use a constant one")
    decisive = {name: settings[name] for name in DECISIVE}
    decisive |= {"seed": seed, "num_data": len(x), "kl_weight": weights, "ranks": ranks.size}
    messages = {name: settings[name] for name in ("bucket_mb", "compare_every")}
    alike: list[bytes | memoryview] = [json.dumps(decisive | messages).encode()]
    if ranks.size > 1:
        alike += [memoryview(part.cpu().contiguous().view(torch.uint8).flatten().numpy()) for part in (x, y)]  # type: ignore[arg-type]
    ranks.check_same("settings, inputs or labels", alike)
    global_batch = batch_size * ranks.size
    torch_optimizer = build_optimizer(
        optimizer, model, guide, params.values(), lr=lr, scale_lr_factor=scale_lr_factor, beta2=beta2
    )
    elbo = KLScaledELBO(len(x), num_particles=num_particles)
    accuracy, records, step, set_mode = BatchAccuracy(), TrainingLog(), 0, mode_setter(model)
    written, cost = time.monotonic(), 0.0

    def compare_ranks() -> None:
        if compare_every and (
            found := first_unequal(ranks, [*model.named_parameters(), *guide.named_parameters(), *params.items()])
        ):
            raise Diverged(f"the ranks are no longer the same at step {step}: {found}. The last checkpoint is good")

    def write_checkpoint() -> None:
        nonlocal written, cost
        compare_ranks()
        data_parallel.average_buffers(ranks, model)
        random = data_parallel.gather_random(ranks, x.device)
        if folder is not None and ranks.is_main:
            started = time.monotonic()
            meta = {**records.state(), "steps": steps, "settings": decisive, "origin": dict(origin or {})}
            checkpoint.save(
                folder / "checkpoints", step, model=model, guide=guide, optimizer=torch_optimizer, meta=meta,
                keep=keep_checkpoints, random=random, params=params,
            )  # fmt: skip
            written = time.monotonic()
            cost = written - started

    def checkpoint_is_due() -> bool:
        return time.monotonic() - written > max(60 * checkpoint_minutes, cost / _WRITING_SHARE)

    # The scopes keep the caller's random state and validation setting, and the parameter store but for `params`.
    with ExitStack() as scopes:
        scopes.callback(model.eval)
        scopes.enter_context(trained_store(store, params))
        scopes.enter_context(forked_random(x))
        scopes.enter_context(pyro.validation_enabled(False))
        torch.manual_seed(data_parallel.rank_seed(seed, ranks.rank))
        saved = checkpoint.saved(folder / "checkpoints") if folder is not None and ranks.is_main else []
        last = checkpoint.load(saved[-1]) if saved else None
        state = data_parallel.resume(
            ranks, last, decisive, model=model, guide=guide, optimizer=torch_optimizer, params=params, device=x.device,
            folder=folder,
        )  # fmt: skip
        if state is not None:
            records, step = TrainingLog(state.meta), state.step
        steps = step + math.ceil((len(x) - records.rows) / global_batch)
        steps += (epochs - len(records.epochs) - 1) * math.ceil(len(x) / global_batch)
        if state is None:
            write_checkpoint()
        begun = step
        # A step adds to the gradients that are there: those of a training that diverged, or of the caller's own.
        torch_optimizer.zero_grad()
        order = [*params.values(), *data_parallel.forward_order(model, guide)] if ranks.size > 1 else []
        buckets = GradientBuckets(order, ranks, bucket_mb=bucket_mb, compression=compression)
        scopes.enter_context(buckets)
        bar = tqdm(total=steps, initial=step, disable=not (progress and ranks.is_main), unit="step", dynamic_ncols=True)
        scopes.enter_context(bar)
        scopes.enter_context(ESTIMATORS[estimator]())
        scopes.enter_context(accuracy)
        if compile:
            scopes.enter_context(compiled_arithmetic())
        # Its cache of parameters in half precision outlives their updates, as long as the context.
        half = torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)
        scopes.enter_context(half)
        while (epoch := len(records.epochs)) < epochs:
            for rows in _batches(len(x), global_batch, epoch, seed, skip=records.rows, device=x.device):
                started = time.perf_counter()
                # In examples, not steps, of which another number of ranks has others.
                done = (epoch * len(x) + records.rows) / (epochs * len(x))
                elbo.kl_weight = weight_at(done)
                torch_optimizer.param_groups[0]["kl_per_datum"] = elbo.kl_weight / len(x)
                set_lr(torch_optimizer, lr_schedule, done, warmup=lr_warmup, factor=ranks.size if lr_per_rank else 1)
                mine, elbo.likelihood_weight = shard(rows, ranks.rank, ranks.size)
                # An example that does not count must not move batch norm's statistics either.
                set_mode(elbo.likelihood_weight > 0)
                batch = _batch(x, mine, augment)
                try:
                    # What pyro.infer.SVI does, without its search for the parameters at every step.
                    elbo.loss_and_grads(model, guide, batch, y[mine])
                    buckets.average()
                    agreed = data_parallel.agree(
                        ranks, elbo.terms, accuracy.correct if elbo.likelihood_weight else 0.0, stop=should_stop(),
                        save=ranks.is_main and checkpoint_is_due(),
                    )  # fmt: skip
                    if not math.isfinite(agreed.terms.loss):
                        raise NonFiniteGradient
                    descend(torch_optimizer, clip_norm)
                except NonFiniteGradient:
                    terms, where = elbo.terms, first_gone_bad(model, guide, batch, y[mine])
                    found = f"(loss {terms.loss}, nll {terms.nll}, kl {terms.kl} nats per datum): {where}"
                    raise Diverged(
                        f"training went bad at step {step + 1} {data_parallel.report(ranks, found, terms.loss)}. "
                        "The last checkpoint is good; try a smaller train.lr, train.clip_norm, or a smaller "
                        "guide.init_scale"
                    ) from None
                step += 1
                records.add(step, agreed.terms, agreed.correct, len(rows), time.perf_counter() - started)
                if bar.update():
                    bar.set_postfix_str(str(records), refresh=False)
                if compare_every and step % compare_every == 0:
                    compare_ranks()
                if records.rows < len(x):
                    if agreed.stop or agreed.save:
                        write_checkpoint()
                    if agreed.stop:
                        # A rank that ends while rank 0 is still writing would have its launcher end rank 0, too.
                        ranks.barrier()
                        raise Interrupted(f"stopped at step {step} of {steps}")
            lr_now = torch_optimizer.param_groups[0]["lr"]
            records.end_epoch(epoch + 1, step, kl_weight=elbo.kl_weight, lr=lr_now)
            # The log first: a training that goes on writes it anew, one that is complete does not.
            if folder is not None and ranks.is_main:
                records.write(folder)
            if (epoch + 1) % checkpoint_every == 0 or epoch + 1 == epochs or agreed.stop:
                write_checkpoint()
            if folder is not None and ranks.is_main:
                records.write_performance(folder, ranks)
            if not progress and ranks.is_main:
                log.info("epoch %d of %d: %s", epoch + 1, epochs, str(records))
            if agreed.stop and epoch + 1 < epochs:
                ranks.barrier()
                raise Interrupted(f"stopped after epoch {epoch + 1} of {epochs}")
    if ranks.size > 1 and ranks.is_main and step > begun:
        sums = [calls for kind, calls in ranks.calls.items() if kind != "broadcast"]
        each, megabytes = (sum(n) / (step - begun) for n in zip(*((c.count, c.bytes / 1e6) for c in sums), strict=True))
        log.info("%d ranks over %s: %.1f allreduces and %.1f MB a step", ranks.size, ranks.name, each, megabytes)
    return records.epochs


def _batches(n: int, size: int, epoch: int, seed: int, *, skip: int, device: torch.device) -> Iterator[Tensor]:
    # The order depends on (seed, epoch) alone: a resumed epoch visits exactly what was left of it, on any ranks.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(draw_seed(seed, epoch))).to(device)
    yield from order[skip:].split(size)


def _batch(x: Tensor, rows: Tensor, augment: str) -> Tensor:
    batch = AUGMENTATIONS[augment](x[rows])
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return batch.contiguous(memory_format=torch.channels_last) if channels_last else batch.contiguous()
