"""Hosts rehearsed in network namespaces: their links have the bandwidth and the latency that were asked for."""

import subprocess
import sys

import pytest

from ppl_bnn.scaling.hosts import NotPermitted, rehearsed_hosts, start_ranks

CONNECTED = """
import os, socket, time
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
first = os.environ["RANK"] == "0"
if first:
    with socket.create_server(address) as server:
        connection, _ = server.accept()
else:
    while True:
        try:
            connection = socket.create_connection(address)
            break
        except OSError:
            time.sleep(0.05)
"""
SEND = """
if first:
    received = len(connection.recv(1))
    started = time.perf_counter()
    while part := connection.recv(1 << 20):
        received += len(part)
    print(received, time.perf_counter() - started)
else:
    connection.sendall(bytes(2_000_000))
"""
PING = """
if first:
    for _ in range(10):
        started = time.perf_counter()
        connection.sendall(b"?")
        connection.recv(1)
        print(time.perf_counter() - started)
    connection.sendall(b".")
    received = 0
    while part := connection.recv(1 << 20):
        assert set(part) == {7}
        received += len(part)
    print(received)
else:
    while connection.recv(1) == b"?":
        connection.sendall(b"!")
    connection.sendall(bytes([7]) * 3_000_000)
"""


def printed_by_two_hosts(tmp_path, code, **link):
    """The numbers that one of two connected hosts prints."""
    output = tmp_path / "output"
    try:
        with rehearsed_hosts(2, **link) as hosts, output.open("w") as file:
            processes = start_ranks(hosts, [sys.executable, "-c", CONNECTED + code], file)
            assert [process.wait(60) for process in processes] == [0, 0], output.read_text()
    except NotPermitted as reason:
        pytest.skip(str(reason))
    return [float(number) for number in output.read_text().split()]


def test_rehearsed_hosts_have_no_more_than_their_bandwidth(tmp_path):
    received, seconds = printed_by_two_hosts(tmp_path, SEND, mbit=40)
    assert received == 2_000_000
    # 2 MB at 5 MB/s; the bucket lets 64 kB through at once, and some are under way when the clock starts.
    assert seconds > 0.35
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in names if name.startswith("ppl")]


def test_what_rehearsed_hosts_send_arrives_later(tmp_path):
    *there_and_back, received = printed_by_two_hosts(tmp_path, PING, mbit=400, latency_ms=20)
    assert received == 3_000_000
    assert min(there_and_back) >= 0.04
    assert sorted(there_and_back)[1] < 0.06


def test_a_machine_that_does_not_let_hosts_be_rehearsed_says_so(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(NotPermitted, match="no ip and tc"), rehearsed_hosts(2, mbit=10):
        pass
