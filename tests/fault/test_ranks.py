"""Several processes, as torchrun starts them: stopped, killed, gone on with, on two machines."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfsup.training.checkpoint import load_newest

pytestmark = pytest.mark.fault
ADDRESSES = ("10.77.0.1", "10.77.0.2")
SETTINGS = (
    "training.batch_size=16",
    "training.accumulate=2",
    "training.log_every=5",
    "training.warmup=0.0",
)


def command(corpus, out: Path, steps: int, *more: str) -> list[str]:
    begin = ["pretrain", str(corpus.masked), "--data", str(corpus.text), "--out", str(out), *more]
    return [*begin, "--set", f"training.steps={steps}", "training.schedule=constant", *SETTINGS]


def start(ranks: int, arguments: list[str]) -> subprocess.Popen:
    """torchrun on this machine, at a port of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "selfsup", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def rows(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == "train"]


def wait_for_rows(run: Path, count: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 240
    path = run / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b'"train"') < count:
        assert time.monotonic() < end
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def members(process: subprocess.Popen) -> list[int]:
    """The training processes, in the order of their ranks."""
    found = {}
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            rank = [line for line in environment if line.startswith(b"RANK=")]
            if rank:
                found[int(rank[0].removeprefix(b"RANK="))] = child
    return [found[rank] for rank in sorted(found)]


def test_two_are_stopped_and_one_goes_on(corpus, faults, tmp_path):
    """The rows are those of one process that was left alone."""
    with faults.trial("SIGTERM to two ranks, resumed by one", "losses within 1e-4"):
        stop_and_go_on(corpus, tmp_path)


def stop_and_go_on(corpus, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = start(2, command(corpus, run, 400))
    wait_for_rows(run, 3, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert "SIGTERM at step" in said, said
    stopped = int(re.search(r"SIGTERM at step (\d+): saved", said)[1])
    steps = str(stopped + 10 - stopped % 5)
    one = [sys.executable, "-m", "selfsup"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for out, more in ((run, ["--resume"]), (whole, [])):
        arguments = command(corpus, out, int(steps), *more)
        subprocess.run([*one, *arguments], check=True, capture_output=True, env=environment)
    assert len(rows(run)) == len(rows(whole))
    for got, expected in zip(rows(run), rows(whole), strict=True):
        assert got["step"] == expected["step"]
        assert got["loss"] == pytest.approx(expected["loss"], abs=1e-4)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all_and_is_named(victim, corpus, faults, tmp_path):
    with faults.trial("a rank killed", "all end within 60 s, the rank is named"):
        kill_one(victim, corpus, tmp_path / "run")


def kill_one(victim: int, corpus, run: Path) -> None:
    process = start(2, command(corpus, run, 100_000))
    wait_for_rows(run, 2, process)
    pids = members(process)
    assert len(pids) == 2
    os.kill(pids[victim], signal.SIGKILL)
    began = time.monotonic()
    said, _ = process.communicate(timeout=90)
    assert time.monotonic() - began < 60
    assert process.returncode != 0
    assert re.search(rf"local_rank: {victim}\b", said), said
    assert "Signal 9 (SIGKILL)" in said, said
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Names of two namespaces that reach each other at `ADDRESSES`, and nothing else."""
    names = [f"selfsup{os.getpid()}{end}" for end in "ab"]
    if shutil.which("ip") is None or ip("netns", "add", names[0]).returncode:
        pytest.skip("network namespaces need `ip` and the right to make them")
    try:
        cable = ("cable0", "cable1")
        assert ip("netns", "add", names[1]).returncode == 0
        for name, end, address in zip(names, cable, ADDRESSES, strict=True):
            if end == cable[0]:
                made = ip("link", "add", end, "netns", name, "type", "veth", "peer", "name",
                          cable[1], "netns", names[1])  # fmt: skip
                assert made.returncode == 0, made.stderr
            assert ip("-n", name, "addr", "add", f"{address}/24", "dev", end).returncode == 0
            for link in ("lo", end):
                assert ip("-n", name, "link", "set", link, "up").returncode == 0
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def test_two_machines_learn_what_one_learns(machines, corpus, tmp_path):
    """Neither sees the other's cache, and the second not the run folder."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    started = []
    for rank, (name, out) in enumerate(zip(machines, (run, tmp_path / "unused"), strict=True)):
        launcher = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
            *("--nproc-per-node", "1", "--node-rank", str(rank)),
            *("--master-addr", ADDRESSES[0], "--master-port", "29431"),
        ]
        own = {
            "SELFSUP_CACHE": str(tmp_path / f"cache{rank}"),
            "GLOO_SOCKET_IFNAME": f"cable{rank}",
            "OMP_NUM_THREADS": "1",
        }
        started.append(
            subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    name,
                    *launcher,
                    "-m",
                    "selfsup",
                    *command(corpus, out, 10),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **own},
            )
        )
    for process in started:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
    assert not (tmp_path / "unused").exists()
    alone = [sys.executable, "-m", "selfsup", *command(corpus, whole, 10)]
    subprocess.run(alone, check=True, capture_output=True)
    assert [row["step"] for row in rows(run)] == [5, 10]
    for got, expected in zip(rows(run), rows(whole), strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    ours, theirs = (load_newest(Path(path) / "checkpoints").weights for path in (run, whole))
    for name, weight in theirs.items():
        assert ours[name].allclose(weight, atol=1e-4), name
