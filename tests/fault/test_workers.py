"""Several processes that work for one: one dies, or the one; none is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import active_children
from pathlib import Path

import pytest

from selfsup.data import sharded
from selfsup.data.store import StoreConfig, build_or_open
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import SelfsupError
from selfsup.workers import Workers

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
        # what a shell starts in the background ignores SIGINT, and hands that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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


def test_sigint_to_all_of_them(comparison, faults):
    """What Ctrl-C on a terminal does."""
    process, workers = comparison
    with faults.trial("SIGINT to a comparison and its processes", "exit code 130; none is left"):
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in said
        assert said.endswith("stopped\n")
        wait_until(lambda: not any(map(command, workers)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_the_end_of_the_parent_ends_the_others(comparison, faults, number):
    process, workers = comparison
    with faults.trial("a comparison killed", "its processes end within 60 s"):
        process.send_signal(number)
        assert process.wait(timeout=60) == -number
        wait_until(lambda: not any(map(command, workers)), 60)


def test_the_end_of_a_worker_ends_the_comparison(comparison, faults):
    process, workers = comparison
    with faults.trial("a process of a comparison killed", "all end within 60 s; exit code 2"):
        os.kill(workers[0], signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "Traceback" not in said
        assert said.endswith(
            "error: a training process was killed, perhaps for lack of memory; use fewer --jobs\n"
        )
        wait_until(lambda: not any(map(command, workers)))


# Processes that prepare data


@pytest.fixture
def killed():
    """Kills so many of this process's children as they appear; gives their ids and the time."""
    found: list[int] = []
    times: list[float] = []
    ended = threading.Event()

    def kill(count: int) -> None:
        while len(found) < count and not ended.is_set():
            for child in active_children():
                if child.pid is not None and child.pid not in found and len(found) < count:
                    found.append(child.pid)
                    child.kill()
                    times.append(time.monotonic())
            time.sleep(0.01)

    def begin(count: int) -> tuple[list[int], list[float]]:
        threading.Thread(target=kill, args=(count,)).start()
        return found, times

    yield begin
    ended.set()


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """A corpus of three files, each a shard, and how it is tokenized by two processes."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        lines = [f"the film of row {row} of {number} was great\n" for row in range(200)]
        (folder / f"{number}.txt").write_text("".join(lines))
    monkeypatch.setattr(sharded, "SHARD_BYTES", 1)
    tokenizer = Tokenizer.train(TokenizerConfig(vocab_size=100), ["the film of row was great"])

    def shards(cache: str, jobs: int = 2):
        config = StoreConfig(split_documents="line")
        return build_or_open(folder, tokenizer, config, tmp_path / cache, Workers(jobs=jobs))

    return shards


def test_a_killed_process_of_a_preparation(shards, killed, faults, capsys):
    """What it was to make is made again; the result is that of one process."""
    with faults.trial("a process that prepares data killed", "named; its work is done again"):
        pids, _ = killed(1)
        store = shards("cache")
        assert f"its process {pids[0]} was killed by signal 9" in capsys.readouterr().err
        alone = shards("alone", jobs=1)
        assert store.meta == alone.meta
        assert store.train[:].tolist() == alone.train[:].tolist()


def test_every_process_of_a_preparation_is_killed(shards, killed, faults):
    said = r"3 of 3 shards failed twice: shard \d of 3.* its process \d+ was killed by signal 9"
    note = "all end within 60 s; the first one named"
    with faults.trial("every process that prepares data killed", note):
        pids, times = killed(6)
        with pytest.raises(SelfsupError, match=said):
            shards("cache")
        assert time.monotonic() - times[-1] < 60
        assert len(pids) == 6
        assert not active_children()
