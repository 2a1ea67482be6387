"""A long cable between network namespaces (Linux): it delays the packets that their TUN devices send."""

import fcntl
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# From linux/if_tun.h: set the name; IP packets without a header of the device.
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_LARGEST = 65536


@contextmanager
def long_cable(ends: Mapping[str, int], seconds: float) -> Iterator[None]:
    """Context manager that carries packets between TUN devices, in order, `seconds` after they were sent.

    A thread of this process carries them. Each packet takes some 20 us of a processor, so packets should be large.

    Args:
        ends: for the IPv4 address of each host, the file descriptor of its device (`tun_device`).
    """
    by_address = {socket.inet_aton(address): end for address, end in ends.items()}
    stopped, stop = os.pipe()
    carrier = threading.Thread(target=_carry, args=(by_address, seconds, stopped), daemon=True)
    carrier.start()
    try:
        yield
    finally:
        os.close(stop)
        carrier.join()
        os.close(stopped)


@contextmanager
def tun_device(name: str) -> Iterator[int]:
    """Context manager that yields a TUN device as a non-blocking file descriptor of packets.

    The device may be moved to another namespace.

    Raises:
        OSError: the machine has no such devices, or does not permit them.
    """
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
        yield end
    finally:
        os.close(end)


def _carry(ends: Mapping[bytes, int], seconds: float, stopped: int) -> None:
    under_way: deque[tuple[float, int, bytes]] = deque()
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([*ends.values(), stopped], [], [], wait)
        if stopped in ready:
            return
        for end in ready:
            packet = os.read(end, _LARGEST)
            # The destination in the IPv4 header. Other packets have no receiver and are dropped.
            to = ends.get(packet[16:20])
            if to is not None and packet[0] >> 4 == 4:
                under_way.append((time.monotonic() + seconds, to, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, to, packet = under_way.popleft()
            os.write(to, packet)
