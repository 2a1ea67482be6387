"""The process in which the parts of benchmarks/gpu.py run, and its end in the process that records them.

A part may hang, crash or leave the GPU unusable. The recording process then ends the worker and starts another.
"""

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from gpu_cells import Clock, NotHere, Plan, why

# A worker that has to import torch and start CUDA is not started with less time left, in seconds.
SMALLEST_START = 8.0


class Worker:
    """A worker process, started when it is needed: `run` makes it run a part, and `listen` returns its messages."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._context = get_context("spawn")
        self._process: SpawnProcess | None = None

    def run(self, module: str, deadline: float, done: Iterable[str]) -> None:
        """Start the cells of a part, but for those named in `done`."""
        if self._process is None:
            self._messages, theirs = self._context.Pipe()
            # Nothing is ever sent through it. It is closed when this process ends, however it ends.
            read, self._lifeline = self._context.Pipe(duplex=False)
            self._process = self._context.Process(target=_work, args=(theirs, read, self._settings))
            self._process.start()
            theirs.close()
            read.close()
        self._messages.send((module, deadline, set(done)))

    def listen(self, until: float) -> tuple[str, ...] | None:
        """Return the next message, or None if none came until then (of ``time.monotonic()``).

        Raises:
            EOFError: the process has ended.
            ConnectionError: likewise.
        """
        if not self._messages.poll(max(0.0, until - time.monotonic())):
            return None
        return self._messages.recv()  # type: ignore[no-any-return]

    def end(self, patience: float = 0.5) -> int | None:
        """End the process and all that it started; return its exit code, negative for a signal.

        Args:
            patience: seconds to wait first for it to end by itself. A process without work does so.
        """
        if self._process is None:
            return None
        self._messages.close()
        self._process.join(patience)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        code, self._process = self._process.exitcode, None
        self._lifeline.close()
        return code


def _work(messages: Connection, lifeline: Connection, settings: dict[str, Any]) -> None:
    os.setsid()
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    plan = Plan(**settings)
    if plan.toy:
        os.environ["OMP_NUM_THREADS"] = "1"
    if plan.device == "cuda":
        # Not at the top: what records the results needs no torch.
        import torch

        if not torch.cuda.is_available():
            build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            messages.send(("refused", f"torch {torch.__version__}, {build}, finds no GPU"))
            return
    with suppress(EOFError, BrokenPipeError):
        while True:
            module, deadline, done = messages.recv()
            _run_part(messages, module, plan, deadline, done)


def _run_part(messages: Connection, module: str, plan: Plan, deadline: float, done: set[str]) -> None:
    clock = Clock(deadline, lambda text: messages.send(("doing", text)))
    try:
        cells = [cell for cell in import_module(module).cells(plan) if cell.name not in done]
    except Exception as error:  # noqa: BLE001 -- whatever it is, the other parts run
        messages.send(("failed", why(error)))
        return
    messages.send(("cells", [cell.name for cell in cells]))
    for cell in cells:
        # At toy size everything is quick.
        if clock.left() < cell.minimum * (0.1 if plan.toy else 1):
            messages.send(("cell", cell.name, "no time", f"needs {cell.minimum:.0f} s"))
            continue
        messages.send(("start", cell.name))
        status, note = "finished", ""
        try:
            for row in cell.run(clock):
                messages.send(("row", cell.name, row))
        except Exception as error:  # noqa: BLE001 -- whatever it is, the other cells run
            status, note = "not here" if isinstance(error, NotHere) else "failed", why(error)
        messages.send(("cell", cell.name, status, note))
        _clean(plan)
    messages.send(("done",))


def _clean(plan: Plan) -> None:
    """Free what the cell left. If the device no longer works, the error ends this process, and another is started."""
    if pyro := sys.modules.get("pyro"):
        pyro.clear_param_store()
    gc.collect()
    if plan.device == "cuda" and (torch := sys.modules.get("torch")):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _end_with_parent(lifeline: Connection) -> None:
    with suppress(EOFError, OSError):
        lifeline.recv()
    os.killpg(os.getpgid(0), signal.SIGKILL)
