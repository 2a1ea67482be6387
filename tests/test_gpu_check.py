"""benchmarks/gpu.py at toy size on a CPU: it measures every part, and loses nothing to a failure or a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from jpeg_files import jpegs

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PARTS = ["where", "tests", "agreement", "steps", "digits", "draws", "memory", "training"]
# Cells: one that measures, one that raises, one that is not for this machine, one that ends its process, one that
# hangs, and more that measure, the last one too late.
TROUBLE = """
import os, time
from gpu_cells import Cell, NotHere

def good(clock):
    yield {"number": 1.5, "nothing": float("nan")}

def bad(clock):
    yield {"number": 2}
    raise ValueError("two\\n lines")

def other(clock):
    raise NotHere("needs another machine")
    yield

def crash(clock):
    clock.say("crashing")
    os._exit(7)
    yield

def hang(clock):
    clock.say("sleeping")
    time.sleep(60)
    yield

def cells(plan):
    for run in (good, bad, other, crash, good, hang, good):
        yield Cell(f"{run.__name__} {plan.device}" if run is not good else f"good {len(seen)}", 0, run)
        seen.append(run)

seen = []
"""


def command(out, *arguments):
    return [sys.executable, str(BENCHMARKS / "gpu.py"), "--toy", "--device", "cpu", "--out", str(out), *arguments]


def content(out):
    return json.loads((out / "gpu.json").read_text(encoding="utf-8"))


def test_every_part_is_measured_and_written_and_what_fails_stops_nothing(tmp_path, data_dir):
    arrays, _ = jpegs(24)
    np.savez(tmp_path / "cifar.npz", **arrays)
    arguments = ["--data", str(tmp_path / "cifar.npz"), "--data_dir", str(data_dir.absolute())]
    subprocess.run(command(tmp_path, *arguments), check=True, capture_output=True, timeout=200)
    found, text = content(tmp_path), (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert found["finished"]
    assert list(found["parts"]) == PARTS
    for name, part in found["parts"].items():
        assert part["status"] == "finished", part
        assert f"## {part['title']}\n" in text
        for cell in part["cells"].values():
            on_gpu_only = cell["status"] == "not here" and cell["note"] == "needs CUDA"
            assert cell["rows"] if cell["status"] == "finished" else on_gpu_only, (name, cell)
    rows = {
        name: [row for cell in part["cells"].values() for row in cell["rows"]] for name, part in found["parts"].items()
    }
    assert rows["tests"][0]["passed"] > 0 == rows["tests"][0]["failed"]
    assert all(row["all"] < 1e-5 for row in rows["agreement"] if row["precision"].startswith("float32 on"))
    assert {row["step"] for row in rows["steps"]} >= {"deterministic", "plain", "groups", "flipout", "ivon"}
    assert all(row["ratio"] == 1 for row in rows["steps"] if row["step"] == "deterministic")
    assert all(row["images/s"] > 0 for row in rows["digits"])
    assert all(row["a second"] > 0 for row in rows["draws"])
    # In two slices, by turns: the second one resumes the first.
    turns = [("deterministic", 2), ("Bayesian", 2), ("deterministic", 4), ("Bayesian", 4)]
    assert [(row["network"], row["epochs"]) for row in rows["training"][:-1]] == turns
    assert rows["training"][-1]["note"] == "gpu-training.png"
    assert (tmp_path / "gpu-training.png").stat().st_size > 10_000
    assert "| deterministic |" in text
    assert not list(tmp_path.glob(".training-*"))


@pytest.fixture
def troubled(tmp_path, monkeypatch):
    """Runs parts of cells that go wrong, in this process: (its record's parts, seconds) for the seconds it may take."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "gpu_trouble.py").write_text(TROUBLE)
    import gpu
    from gpu_record import Record

    monkeypatch.setattr(gpu, "SMALLEST_START", 0.0)
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    parts = {
        "trouble": gpu.Part("gpu_trouble", 0.4, 1, "Trouble", "What goes wrong."),
        "missing": gpu.Part("gpu_no_such_part", 0.5, 1, "Missing", "It does not exist."),
        "after": gpu.Part("gpu_one_number", 0.5, 1, "After", "One number."),
        "long": gpu.Part("gpu_one_number", 1.0, 1000, "Long", "It needs more time."),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    (tmp_path / "gpu_one_number.py").write_text(
        "from gpu_cells import Cell\ndef cells(plan):\n    yield Cell('one', 0, lambda clock: iter([{'number': 3}]))\n"
    )

    def _run(seconds):
        started = time.monotonic()
        settings = {"device": "cpu", "toy": True, "out": tmp_path, "data_dir": tmp_path, "data": None}
        gpu.run(list(parts), settings, Record(tmp_path, {}), started + seconds)
        return content(tmp_path)["parts"], time.monotonic() - started

    return _run


def test_a_cell_that_fails_crashes_or_hangs_is_recorded_and_the_others_run(troubled, tmp_path):
    parts, seconds = troubled(16)
    cells = parts["trouble"]["cells"]
    assert {name: cell["status"] for name, cell in cells.items()} == {
        "good 0": "finished", "bad cpu": "failed", "other cpu": "not here", "crash cpu": "failed", "good 4": "finished",
        "hang cpu": "failed", "good 6": "no time",
    }  # fmt: skip
    assert cells["good 0"]["rows"] == [{"number": 1.5, "nothing": None}]
    assert cells["bad cpu"]["rows"] == [{"number": 2}]
    assert cells["bad cpu"]["note"] == "ValueError: two lines"
    assert cells["other cpu"]["note"] == "needs another machine"
    assert cells["crash cpu"]["note"] == "its process ended with code 7, crashing"
    assert cells["hang cpu"]["note"] == "cut off: the time was up, sleeping"
    assert parts["missing"]["status"] == "failed"
    assert "gpu_no_such_part" in parts["missing"]["note"]
    assert parts["after"]["cells"]["one"]["rows"] == [{"number": 3}]
    assert parts["long"]["status"] == "no time"
    assert seconds < 16
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "- bad cpu: failed: ValueError: two lines\n" in text
    assert "This part: no time." in text


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_that_is_killed_keeps_the_parts_that_are_finished_and_leaves_no_process(tmp_path):
    parts = ["--parts", "where,agreement"]
    with subprocess.Popen(command(tmp_path, *parts), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while time.monotonic() < until and not cells_of(tmp_path, "agreement"):
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    found = content(tmp_path)
    assert found["parts"]["where"]["status"] == "finished"
    assert found["parts"]["where"]["cells"]["machine"]["rows"]
    assert found["parts"]["agreement"]["status"] == "running"
    assert not found["finished"]
    assert "## Where" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert children
    until = time.monotonic() + 10
    while time.monotonic() < until and (alive := [child for child in children if runs(child)]):
        time.sleep(0.05)
    assert not alive


def test_a_part_that_does_not_exist_is_refused(tmp_path):
    done = subprocess.run(command(tmp_path, "--parts", "where,speed"), check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no part 'speed'" in done.stderr


def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    arguments = command(tmp_path, "--device", "cuda")
    done = subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=100, env=hidden)
    assert done.returncode == 2
    assert "--device cuda: torch" in done.stderr
    assert "finds no GPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert not content(tmp_path)["finished"]


def cells_of(out, part):
    return content(out)["parts"].get(part, {}).get("cells") if (out / "gpu.json").exists() else None


def runs(pid):
    """Whether a process runs: it is there, and not merely waiting for its parent to learn that it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
