"""Several hosts rehearsed on one: a network namespace for each, and links of limited bandwidth between them (Linux)."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any

INTERFACE = "eth0"


class NotPermitted(RuntimeError):
    """This machine does not let hosts be rehearsed; the message says why."""


@dataclass(frozen=True)
class Host:
    """A rehearsed host: what a command is prefixed with to run there, and the host's address."""

    prefix: tuple[str, ...]
    address: str


@contextmanager
def rehearsed_hosts(count: int, *, mbit: float, latency_ms: float = 0.0) -> Iterator[list[Host]]:
    """Hosts that reach each other through a switch alone; they share this machine's processors and files.

    Args:
        mbit: megabits a second that a host sends at most (a token bucket, tc-tbf).
        latency_ms: added to what each host sends (tc-netem).

    Raises:
        NotPermitted: it needs Linux, root, ip and tc, and of the kernel namespaces, veth, bridge, tbf, and netem for a
            latency.
    """
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        raise NotPermitted(f"hosts cannot be rehearsed here: no {' and '.join(missing)} (Debian: iproute2)")
    names = [f"ppl{os.getpid()}-{number}" for number in range(count + 1)]
    switch = names[-1]
    with ExitStack() as made:
        for name in names:
            _ip(f"netns add {name}")
            made.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
        _ip(f"-n {switch} link add name switch type bridge")
        _ip(f"-n {switch} link set switch up")
        hosts = []
        for number, name in enumerate(names[:-1]):
            port, address = f"port{number}", f"10.99.0.{number + 1}"
            _ip(f"-n {name} link add {INTERFACE} type veth peer name {port} netns {switch}")
            _ip(f"-n {switch} link set {port} master switch up")
            _ip(f"-n {name} address add {address}/24 dev {INTERFACE}")
            for interface in ("lo", INTERFACE):
                _ip(f"-n {name} link set {interface} up")
            # A token bucket of 5 ms, but at least one large segment.
            burst = max(65536, int(mbit * 1e6 / 8 * 0.005))
            qdisc = f"-n {name} qdisc add dev {INTERFACE}"
            _run("tc", f"{qdisc} root handle 1: tbf rate {mbit}mbit burst {burst} latency 100ms")
            if latency_ms:
                _run("tc", f"{qdisc} parent 1:1 netem delay {latency_ms}ms")
            hosts.append(Host(("ip", "netns", "exec", name), address))
        yield hosts


def start_ranks(
    hosts: list[Host], command: list[str], output: IO[Any], *, port: int = 29400
) -> list[subprocess.Popen[bytes]]:
    """Start a command as one rank of torch.distributed on each host; all of them write to `output`, errors too."""
    processes = []
    for rank, host in enumerate(hosts):
        settings = {
            "RANK": rank, "WORLD_SIZE": len(hosts), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
            "MASTER_ADDR": hosts[0].address, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": INTERFACE,
        }  # fmt: skip
        environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
        whole = [*host.prefix, *command]
        processes.append(subprocess.Popen(whole, env=environment, stdout=output, stderr=subprocess.STDOUT))
    return processes


def _ip(arguments: str) -> None:
    _run("ip", arguments)


def _run(program: str, arguments: str) -> None:
    result = subprocess.run([program, *arguments.split()], capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr or result.stdout).strip().splitlines() or ["no reason given"]
        raise NotPermitted(f"hosts cannot be rehearsed here: {program} {arguments}: {reason[-1]}")
