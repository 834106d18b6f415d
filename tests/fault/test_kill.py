"""A run that is killed again and again, often inside a save, ends bit-equal to one left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from selfsup.training.checkpoint import load_newest

CLOCK = {"seconds", "speed_bytes"}
SETTINGS = (
    *("training.checkpoint_every=5", "training.log_every=1"),
    *("training.batch_size=32", "training.keep=best"),
    # weights of about a megabyte: a save takes some milliseconds
    *("model.dim=64", "model.layers=2", "data.tokenizer.vocab_size=300"),
)


def first_change(path: Path, before: int, child) -> None:
    """Waits until training has begun: it opens and cuts metrics.jsonl."""
    end = time.monotonic() + 120
    while (path.stat().st_mtime_ns if path.exists() else 0) == before:
        assert time.monotonic() < end, child.err.read_text()
        time.sleep(0.0005)


def half_written(checkpoints: Path, pid: int) -> bool:
    """Whether that process is in the middle of a save, or died there."""
    return any(checkpoints.glob(f".step-*.{pid}.tmp"))


def kill_in_save(child, run: Path, draw: random.Random) -> None:
    """Waits for a save to begin, then kills at a random moment of it."""
    end = time.monotonic() + 120
    while not half_written(run / "checkpoints", child.pid):
        assert time.monotonic() < end, child.err.read_text()
    time.sleep(draw.uniform(0, 0.004))
    os.kill(child.pid, signal.SIGKILL)


def kill_while_training(child, run: Path, draw: random.Random, before: int) -> None:
    first_change(run / "metrics.jsonl", before, child)
    time.sleep(draw.uniform(0, 0.08))
    os.kill(child.pid, signal.SIGKILL)


def kill_early(child, draw: random.Random) -> None:
    """At any moment of the start: reading, tokenizing, loading."""
    time.sleep(draw.uniform(0, 0.3))
    os.kill(child.pid, signal.SIGKILL)


def torment(start, run: Path, plan: list[str], seed: int) -> int:
    """Starts, kills and resumes by plan, lets the run finish; gives the kills inside a save."""
    draw, in_save = random.Random(seed), 0
    metrics = run / "metrics.jsonl"
    for number, kind in enumerate(plan):
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        child = start(run, *(["--resume"] if number else []))
        if kind == "save":
            kill_in_save(child, run, draw)
        elif kind == "train":
            kill_while_training(child, run, draw, before)
        else:
            kill_early(child, draw)
        assert child.wait() == -signal.SIGKILL, f"kill {number} came too late"
        in_save += half_written(run / "checkpoints", child.pid)
    child = start(run, "--resume")
    assert child.wait() == 0, child.err.read_text()
    return in_save


def equal(run: Path, whole: Path) -> None:
    """Bit-equal, but for the clock, and nothing half-written is left."""
    ours, theirs = load_newest(run / "checkpoints"), load_newest(whole / "checkpoints")
    for got, expected in zip(ours[:3], theirs[:3], strict=True):
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert got[name].dtype == tensor.dtype
            assert got[name].equal(tensor), name
    states = [{k: v for k, v in c.state.items() if k not in CLOCK} for c in (ours, theirs)]
    assert states[0] == states[1]
    names = sorted(str(p.relative_to(whole)) for p in whole.rglob("*"))
    assert sorted(str(p.relative_to(run)) for p in run.rglob("*")) == names
    for name in ("metrics.jsonl", "model/model.safetensors", "model/config.toml", "fills.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def command(corpus, out: Path, steps: int, more) -> list[str]:
    begin = ["pretrain", str(corpus.masked), "--data", str(corpus.text), "--out", str(out)]
    return [*begin, "--set", f"training.steps={steps}", *SETTINGS, *more]


def test_killed_twice(launch, corpus, tmp_path):
    """The short form: children of one prepared process."""

    def start(run: Path, *more: str):
        return launch(*command(corpus, run, 40, more))

    whole = start(tmp_path / "whole")
    in_save = torment(start, tmp_path / "run", ["save", "train"], seed=0)
    assert whole.wait() == 0, whole.err.read_text()
    assert in_save >= 1
    equal(tmp_path / "run", tmp_path / "whole")


@dataclass
class Program:
    """The real command line."""

    process: subprocess.Popen
    err: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self) -> int:
        return self.process.wait(timeout=300)


@pytest.mark.fault
def test_killed_twenty_times(corpus, tmp_path):
    """Twelve kills aimed at a save, five at training, three at the start, in random order."""
    count = iter(range(1000))

    def start(run: Path, *more: str) -> Program:
        err = tmp_path / f"{next(count)}.err"
        with open(err, "wb") as file:
            return Program(
                subprocess.Popen(
                    [sys.executable, "-m", "selfsup", *command(corpus, run, 120, more)],
                    stdout=subprocess.DEVNULL,
                    stderr=file,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                ),
                err,
            )

    plan = ["save"] * 12 + ["train"] * 5 + ["early"] * 3
    random.Random(1).shuffle(plan)
    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.err.read_text()
    in_save = torment(start, tmp_path / "run", plan, seed=2)
    print(f"{len(plan)} kills, {in_save} of them inside a save")
    assert len(plan) == 20
    assert in_save >= 8
    equal(tmp_path / "run", tmp_path / "whole")
