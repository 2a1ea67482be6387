"""Rehearses several hosts on one (Linux): a network namespace for each, and links of limited bandwidth between them."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any

from ppl_bnn.scaling.long_cable import long_cable, tun_device

INTERFACE = "eth0"
# Packet size of a long cable. It carries packets one by one, so they should be large.
_MTU = 9000


class NotPermitted(RuntimeError):
    """Hosts cannot be rehearsed on this machine. The message says why."""


@dataclass(frozen=True)
class Host:
    """A rehearsed host: the prefix of a command that runs there, and the IPv4 address of the host."""

    prefix: tuple[str, ...]
    address: str


@contextmanager
def rehearsed_hosts(count: int, *, mbit: float, latency_ms: float = 0.0) -> Iterator[list[Host]]:
    """Context manager that yields hosts that reach only each other. They share this machine's processors and files.

    Args:
        count: number of hosts.
        mbit: most megabits a second that a host sends (a token bucket, tc-tbf).
        latency_ms: one-way latency in ms. Above 0, TUN devices and a thread of this process (`long_cable`) join the
            hosts; at 0, veth and a bridge do.

    Raises:
        NotPermitted: one of these is missing: Linux, root, ip, tc; in the kernel namespaces, tbf, and veth and bridge
            or TUN.
    """
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        raise NotPermitted(f"hosts cannot be rehearsed here: no {' and '.join(missing)} (Debian: iproute2)")
    hosts = {f"ppl{os.getpid()}-{number}": f"10.99.0.{number + 1}" for number in range(count)}
    with ExitStack() as made:
        for name in hosts:
            _namespace(name, made)
        if latency_ms:
            _join_by_cable(hosts, latency_ms, made)
        else:
            _join_by_switch(hosts, made)
        for name, address in hosts.items():
            _ip(f"-n {name} address add {address}/24 dev {INTERFACE}")
            for interface in ("lo", INTERFACE):
                _ip(f"-n {name} link set {interface} up")
            # The token bucket holds 5 ms of data, but at least one large segment.
            burst = max(65536, int(mbit * 1e6 / 8 * 0.005))
            _run("tc", f"-n {name} qdisc add dev {INTERFACE} root tbf rate {mbit}mbit burst {burst} latency 100ms")
        yield [Host(("ip", "netns", "exec", name), address) for name, address in hosts.items()]


def start_ranks(
    hosts: list[Host], command: list[str], output: IO[Any], *, port: int = 29400
) -> list[subprocess.Popen[bytes]]:
    """Start a command on each host, as one rank of torch.distributed. Output and errors go to `output`."""
    processes = []
    for rank, host in enumerate(hosts):
        settings = {
            "RANK": rank, "WORLD_SIZE": len(hosts), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
            "MASTER_ADDR": hosts[0].address, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": INTERFACE,
        }  # fmt: skip
        environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
        whole = [*host.prefix, *command]
        # In a session of its own, so that Ctrl-C comes once and through this process.
        processes.append(
            subprocess.Popen(whole, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        )
    return processes


def _join_by_switch(hosts: Mapping[str, str], made: ExitStack) -> None:
    switch = f"ppl{os.getpid()}-switch"
    _namespace(switch, made)
    _ip(f"-n {switch} link add name switch type bridge")
    _ip(f"-n {switch} link set switch up")
    for number, name in enumerate(hosts):
        _ip(f"-n {name} link add {INTERFACE} type veth peer name port{number} netns {switch}")
        _ip(f"-n {switch} link set port{number} master switch up")


def _join_by_cable(hosts: Mapping[str, str], latency_ms: float, made: ExitStack) -> None:
    ends = {}
    for name, address in hosts.items():
        try:
            ends[address] = made.enter_context(tun_device(name))
        except OSError as error:
            raise NotPermitted(f"a latency cannot be rehearsed here: /dev/net/tun: {error.strerror}") from None
        _ip(f"link set {name} netns {name}")
        _ip(f"-n {name} link set {name} name {INTERFACE} mtu {_MTU}")
    made.enter_context(long_cable(ends, latency_ms / 1e3))


def _namespace(name: str, made: ExitStack) -> None:
    _ip(f"netns add {name}")
    made.callback(subprocess.run, ["ip", "netns", "del", name], check=False)


def _ip(arguments: str) -> None:
    _run("ip", arguments)


def _run(program: str, arguments: str) -> None:
    result = subprocess.run([program, *arguments.split()], capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr or result.stdout).strip().splitlines() or ["no reason given"]
        raise NotPermitted(f"hosts cannot be rehearsed here: {program} {arguments}: {reason[-1]}")
