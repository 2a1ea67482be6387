"""The scaling study: its table by hand-written points, one real study of two ranks, and hosts in network namespaces."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import yaml

from ppl_bnn.results import netcdf
from ppl_bnn.scaling.__main__ import main
from ppl_bnn.scaling.figures import draw_scaling
from ppl_bnn.scaling.hosts import NotPermitted, rehearsed_hosts, start_ranks
from ppl_bnn.scaling.table import held_out, predictions, table

BYTES = {"bnn": 2 * 4e6, "cnn": 4e6}


def write_point(folder, run, *, deterministic, ranks, seconds, still):
    """What a training of 64 images a rank leaves: the first step is slow, then `seconds` of each."""
    folder.mkdir(parents=True)
    calls = {"gradients": {"count": 2 * (len(seconds) + 1), "bytes": BYTES[run] * (len(seconds) + 1), "seconds": still}}
    content = {"ranks": ranks, "backend": "Gloo", "threads": 1, "rows": [64 * ranks] * (len(seconds) + 1),
               "seconds": [5.0, *seconds], "calls": calls if ranks > 1 else {}}  # fmt: skip
    (folder / "performance.json").write_text(json.dumps(content))
    config = {
        "model": {"name": "bnn-fc", "deterministic": deterministic},
        "data": {"name": "mnist"},
        "train": {"epochs": 3},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "log.csv").write_text("epoch,seconds,accuracy\n1,7.0,0.5\n2,6.0,0.7\n3,6.5,0.8\n")


def points(tmp_path, *, mbit=(0.0,), batch=64):
    """Compute 0.2 s; the wire's ring of two ranks is bytes / bandwidth, all of it exposed but 2/3 of compute."""
    found = []
    random = np.random.default_rng(0)
    for run in BYTES:
        (tmp_path / run).mkdir(exist_ok=True)
        (tmp_path / run / "config.yaml").write_text(yaml.safe_dump({"train": {"epochs": 10}}))
        for ranks, link in [(1, 0.0), *((2, link) for link in mbit)]:
            wire = BYTES[run] / (link * 1e6 / 8 or 1e9) if ranks > 1 else 0.0
            exact = 0.2 + max(0.3 * wire, wire - 0.2 * 2 / 3)
            seconds = exact * np.exp(random.normal(0, 0.01, 12))
            folder = tmp_path / "points" / f"{run}-{batch}-{ranks}-{link}"
            write_point(folder, run, deterministic=run == "cnn", ranks=ranks, seconds=seconds.tolist(), still=0.6)
            setting = {"run": str(tmp_path / run), "device": "cpu", "batch": batch, "ranks": ranks, "mbit": link}
            found.append(({**setting, "latency_ms": 0.0, "repeat": 0}, folder))
    return found


def test_the_table_says_what_the_trainings_did(tmp_path):
    found = points(tmp_path)
    seconds = np.array(json.loads((found[1][1] / "performance.json").read_text())["seconds"])
    rows = table(found, 0.7, whole=True)
    row = rows.sel(point="bnn, cpu, batch 64, 2 ranks")
    assert row["samples_per_second"] == pytest.approx((128 / seconds[1:]).mean())
    assert row["samples_per_second_std"] == pytest.approx((128 / seconds[1:]).std(ddof=1))
    assert row["fixed_epochs_seconds"] == pytest.approx(10 * 60_000 / row["samples_per_second"])
    alone = rows.sel(point="bnn, cpu, batch 64, 1 ranks")
    assert row["efficiency"] == pytest.approx(float(alone["step_seconds"]) / np.median(seconds[1:]))
    assert (alone["efficiency"], alone["communication_share"]) == (1.0, 0.0)
    assert row["communication_share"] == pytest.approx(0.6 / seconds.sum())
    assert row["seconds_to_accuracy"] == 13.0
    gradients = row.sel(kind="gradients")
    assert (gradients["call_count"], gradients["call_mean_bytes"], gradients["call_seconds"]) == (26, 4e6, 0.6)
    assert (row["messages"], row["bytes"]) == (2.0, 8e6)
    assert np.isfinite(row["seconds"].values).sum() == 12
    assert math.isnan(table(found, 0.9, whole=True)["seconds_to_accuracy"][0])
    assert math.isnan(table(found, 0.7, whole=False)["seconds_to_accuracy"][0])
    # Twice the same setting is one row with the steps of both.
    assert table([*found, found[1]], 0.7, whole=True).sizes == {"point": 4, "kind": 5, "step": 24}
    rows = table([*found, *points(tmp_path, batch=32)], 0.7, whole=True)
    assert draw_scaling(rows, predictions(rows, num_samples=3), tmp_path / "figures") == 6
    figures = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert figures == {"throughput", "fixed_epochs", "efficiency", "prediction", "time_to_accuracy", "batch"}


def test_a_speed_that_was_held_out_is_predicted(tmp_path):
    rows = table(points(tmp_path, mbit=(0.0, 50.0, 100.0, 400.0)), 0.6, whole=False)
    rows["held_out_step_seconds"] = held_out(rows, num_samples=200)
    low, middle, high = rows["held_out_step_seconds"].values.T
    measured = rows["step_seconds"].values
    limited = rows["mbit"].values > 0
    assert np.isnan(middle[~limited]).all()
    assert ((low < measured) & (measured < high))[limited].sum() >= 5
    # At 400 Mbit/s back-propagation hides the wire, which at the others it cannot: only the band knows of that.
    slow = limited & (rows["mbit"].values < 400)
    assert middle[slow] == pytest.approx(measured[slow], rel=0.1)
    predicted = predictions(rows, mbit=100.0, num_samples=30)
    assert predicted["samples_per_second"].dims == ("workload", "ranks", "quantile")
    assert predicted["ranks"].values.tolist()[-1] == 1024
    on_two = predicted["samples_per_second"].sel(workload="bnn, cpu, batch 64", ranks=2, quantile=0.5)
    measured = rows["samples_per_second"].sel(point="bnn, cpu, batch 64, 2 ranks at 100 Mbit/s")
    assert float(on_two) == pytest.approx(float(measured), rel=0.05)
    assert "time of bnn, cpu, batch 64 over cnn" in predicted.attrs["ratios"]
    draw_scaling(rows, predicted, tmp_path / "figures")
    assert (tmp_path / "figures" / "links.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_study_of_two_ranks_is_launched_once(tmp_path, data_dir, capsys):
    run, out = tmp_path / "bnn", tmp_path / "out"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"dir": str(data_dir)}, "train": {"estimator": "local"}}))

    def study(launcher):
        options = ["--batches", "64", "--steps", "3", "--threads", "1", "--launcher", launcher, "--out", str(out)]
        return main([str(run), *options, "--", "--train.optimizer", "adam"])

    assert study("torch") == 0
    with (out / "scaling.csv").open() as file:
        alone, two = list(csv.DictReader(file))
    assert [(row["ranks"], row["backend"]) for row in (alone, two)] == [("1", "one process"), ("2", "Gloo")]
    # loc and scale of 268,800 weights, and 522 biases.
    assert (float(alone["bytes"]), float(two["bytes"])) == (0, 4 * (2 * 268_800 + 522))
    counts = {kind: float(two[f"{kind}_count"]) for kind in ("gradients", "step_message", "batch_norm", "broadcast")}
    assert counts == {"gradients": 4, "step_message": 4, "batch_norm": 0, "broadcast": 9}
    assert 0 < float(two["communication_share"]) < 1
    assert float(alone["step_seconds"]) / float(two["step_seconds"]) == pytest.approx(float(two["efficiency"]))
    assert netcdf.read_group(out / "scaling.nc", "scaling").sizes["point"] == 2
    figures = {path.stem for path in (out / "figures").iterdir()}
    assert figures == {"throughput", "fixed_epochs", "efficiency", "prediction"}
    # Done again, nothing is launched; with another launcher, only the two ranks are.
    times = {path: path.stat().st_mtime_ns for path in (out / "points").glob("*/performance.json")}
    assert len(times) == 2
    assert study("torch") == 0
    assert times == {path: path.stat().st_mtime_ns for path in (out / "points").glob("*/performance.json")}
    assert study("false {ranks}") == 1
    assert "ranks2-0: failed: exit code 1" in capsys.readouterr().err
    assert len(list((out / "points").glob("*/performance.json"))) == 1


def test_bad_commands_are_told_apart_from_failures(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert main([str(tmp_path), "--steps", "one"]) == 2
    assert main(["runs/mnist-fc", "--ranks", "0"]) == 2
    assert main(["runs/mnist-fc", "elsewhere/mnist-fc"]) == 2
    assert main(["runs/mnist-fc", "--launcher", "srun -n {size} python"]) == 2
    assert "--launcher takes a command with {ranks} in it, got 'srun -n {size} python'" in capsys.readouterr().err
    assert main(["runs/mnist-fc", "--launcher", ""]) == 2
    assert main(["runs/mnist-fc", "--latency_ms", "5"]) == 2
    assert "error: --latency_ms is of rehearsed hosts: give them a bandwidth with --mbit" in capsys.readouterr().err
    with pytest.raises(SystemExit) as code:
        main(["--help"])
    assert code.value.code == 0
    assert "rehearsed hosts" in capsys.readouterr().out


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
