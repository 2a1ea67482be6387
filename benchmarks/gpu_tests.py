"""The tests of the device, run on it by pytest in a process of its own."""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from gpu_cells import Cell, Clock, Plan, Row

ROOT = Path(__file__).resolve().parent.parent
FILE = "tests/test_device.py"
# At toy size: quick tests that need no device.
TOY_FILE = "tests/data/test_augmentation.py"
# Failures whose messages are kept.
MOST_FAILURES = 5


def cells(plan: Plan) -> Iterator[Cell]:
    """Run the quick tests, then the slow ones."""
    if plan.toy:
        yield Cell("tests of data", 10, partial(tests, plan, (TOY_FILE,)))
        return
    yield Cell("quick tests", 10, partial(tests, plan, (FILE, "-m", "not slow")))
    yield Cell("slow tests", 25, partial(tests, plan, (FILE, "-m", "slow")))


def tests(plan: Plan, chosen: tuple[str, ...], clock: Clock) -> Iterator[Row]:
    """Count what passed, failed and was skipped, until the part's deadline."""
    # What this machine's versions of libraries warn of is not the device's.
    shown = "-v", "-rfE", "--tb=no", "-W", "default", "-p", "no:cacheprovider"
    command = [sys.executable, "-m", "pytest", *chosen, *shown]
    # Importing from here too, where the package is not installed.
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "PPL_BNN_DATA": str(plan.data_dir.resolve()), "COLUMNS": "400"}
    log, note = plan.out / "gpu-tests.log", ""
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        try:
            process.wait(timeout=max(1.0, clock.left()))
        except subprocess.TimeoutExpired:
            process.kill()
            note = "cut off: the time was up"
    text = log.read_text(encoding="utf-8", errors="replace")
    found = Counter(re.findall(r"^\S+::.* (PASSED|FAILED|SKIPPED|ERROR)\b", text, flags=re.MULTILINE))
    if not found and not note:
        last = [line for line in text.splitlines() if line.strip()][-1:]
        raise RuntimeError(f"pytest ended with code {process.returncode}: {' '.join(last)}")
    failed = found["FAILED"] + found["ERROR"]
    counts = {"passed": found["PASSED"], "failed": failed, "skipped": found["SKIPPED"]}
    yield {"tests": " ".join(chosen), **counts, "note": note}
    for line in re.findall(r"^(?:FAILED|ERROR) (\S+.*)", text, flags=re.MULTILINE)[:MOST_FAILURES]:
        test, _, message = line.partition(" - ")
        yield {"tests": test, "note": message[:300]}
