"""Processes that are the ranks of one job, joined over Gloo on this host."""

import multiprocessing
import os
import socket
import time
import traceback

import torch

from ppl_bnn.distributed import Communicator, connect

# Ranks are forked off a process that has imported everything already, what torch imports at its first step included.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["ppl_bnn.run", "ppl_bnn.distributed.torch_backend", "torch._dynamo"])


class Ranks:
    """Processes that run `function(communicator, *arguments)`, or without a communicator, as the ranks of one job."""

    def __init__(self, folder, size, function, *arguments, connected=True):
        self.folder, self.size = folder, size
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.processes = []
        for rank in range(size):
            environment = {
                "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            process = context.Process(target=_rank, args=(folder, environment, function, arguments, connected))
            process.start()
            self.processes.append(process)

    def wait(self, seconds=60):
        """Wait for all; the exit codes. What hangs is killed and fails the test."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert not hanging, f"ranks {hanging} still ran after {seconds} s; {self.errors()}"
        return [process.exitcode for process in self.processes]

    def results(self):
        """What each rank's function returned."""
        codes = self.wait()
        assert codes == [0] * self.size, self.errors()
        return [torch.load(self.folder / f"result-{rank}.pt") for rank in range(self.size)]

    def errors(self):
        """What each rank wrote to standard error."""
        return [(self.folder / f"stderr-{rank}").read_text() for rank in range(self.size)]


def _rank(folder, environment, function, arguments, connected):
    os.environ.update(environment)
    rank = environment["RANK"]
    descriptor = os.open(folder / f"stderr-{rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    try:
        if connected:
            communicator = connect(timeout=60)
            result = function(communicator, *arguments)
            communicator.shutdown()
        else:
            result = function(*arguments)
        torch.save(result, folder / f"result-{rank}.pt")
    except SystemExit as code:
        os._exit(code.code)
    except BaseException:  # noqa: BLE001 -- the parent shows it
        traceback.print_exc()
        os._exit(99)
    os._exit(0)


class OneOfTwo(Communicator):
    """Two ranks of which the other one adds nothing."""

    name = "one of two"

    def __init__(self):
        super().__init__(0, 2, 0, 2)

    def _start_sum(self, tensor, name):
        return lambda: None

    def _broadcast(self, tensor):
        pass

    def shutdown(self):
        pass
