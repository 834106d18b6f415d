"""A comparison with several processes that is stopped leaves none of them behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.fault


def children(pid: int) -> list[int]:
    """The training processes of a comparison."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(number) for number in (task / "children").read_text().split()]
    return [number for number in found if b"spawn_main" in command(number)]


def command(pid: int) -> bytes:
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_bytes() if path.exists() else b""


def wait_until(true, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def comparison(masked_run, corpus, tmp_path):
    """A comparison in which two processes are training."""
    arguments = [
        *("compare", str(masked_run), "--task", "classification", "--data", str(corpus.labelled)),
        *("--labels", "8", "--steps", "100000", "--jobs", "2", "--out", str(tmp_path / "c.json")),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "selfsup", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    wait_until(lambda: len(children(process.pid)) == 2)
    workers = children(process.pid)
    # a worker takes SIGTERM into its own hands as soon as it trains
    wait_until(lambda: all(_handles_sigterm(worker) for worker in workers))
    yield process, workers
    process.kill()
    process.communicate()


def _handles_sigterm(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def test_sigint_to_all_of_them(comparison):
    """What Ctrl-C on a terminal does."""
    process, workers = comparison
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.endswith("stopped\n")
    wait_until(lambda: not any(map(command, workers)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_the_end_of_the_parent_ends_the_others(comparison, number):
    process, workers = comparison
    process.send_signal(number)
    assert process.wait(timeout=60) == -number
    wait_until(lambda: not any(map(command, workers)))


def test_the_end_of_a_worker_ends_the_comparison(comparison):
    process, workers = comparison
    os.kill(workers[0], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in said
    assert said.endswith(
        "error: a training process was killed, perhaps for lack of memory; use fewer --jobs\n"
    )
    wait_until(lambda: not any(map(command, workers)))
