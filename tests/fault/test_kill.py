"""A run that is killed again and again, often inside a save, ends bit-equal to one left alone."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

SETTINGS = (
    *("training.checkpoint_every=5", "training.batch_size=32", "training.keep=best"),
    # weights of about a megabyte: a save takes some milliseconds
    *("model.dim=64", "model.layers=2", "data.tokenizer.vocab_size=300"),
)


def first_change(path: Path, before: int, child) -> None:
    """Waits until training has begun: it opens and cuts metrics.jsonl."""
    end = time.monotonic() + 120
    while (path.stat().st_mtime_ns if path.exists() else 0) == before:
        assert time.monotonic() < end, child.err.read_text()
        time.sleep(0.0005)


def in_a_save(run: Path, pid: int) -> bool:
    """Whether that process is in the middle of a save, or died there."""
    return any((run / "checkpoints").glob(f".step-*.{pid}.tmp"))


def kill_in_save(child, run: Path, draw: random.Random) -> None:
    """Waits for a save to begin, stops the process at a random moment of it, and kills it there.

    Where the save had ended before the process stood still, it goes on to another one.
    """
    end = time.monotonic() + 120
    while True:
        while not in_a_save(run, child.pid):
            assert time.monotonic() < end, child.err.read_text()
        time.sleep(draw.uniform(0, 0.004))
        os.kill(child.pid, signal.SIGSTOP)
        if in_a_save(run, child.pid):
            return os.kill(child.pid, signal.SIGKILL)
        os.kill(child.pid, signal.SIGCONT)


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
        child = start(run, resume=number > 0)
        if kind == "save":
            kill_in_save(child, run, draw)
        elif kind == "train":
            kill_while_training(child, run, draw, before)
        else:
            kill_early(child, draw)
        assert child.wait() == -signal.SIGKILL, f"kill {number} came too late"
        in_save += in_a_save(run, child.pid)
    child = start(run, resume=True)
    assert child.wait() == 0, child.err.read_text()
    return in_save


@pytest.fixture
def start(pretrain):
    """Starts a run of 200 steps, with a save every fifth."""

    def start(run: Path, steps: int = 200, resume: bool = False):
        return pretrain(run, f"training.steps={steps}", *SETTINGS, resume=resume)

    return start


def test_killed_twice(start, same_run, tmp_path):
    """The short form of the tests below."""
    whole = start(tmp_path / "whole", steps=40)
    in_save = torment(
        lambda run, resume: start(run, 40, resume), tmp_path / "run", ["save", "train"], seed=0
    )
    assert whole.wait() == 0, whole.err.read_text()
    assert in_save == 1
    same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.fault
def test_killed_fifty_times(start, finished, same_run, faults, tmp_path):
    """Two runs: each 15 kills inside a save, 7 in training, 3 at the start, in random order."""
    finished(start(tmp_path / "whole"))
    for seed in (1, 2):
        plan = ["save"] * 15 + ["train"] * 7 + ["early"] * 3
        random.Random(seed).shuffle(plan)
        run = tmp_path / f"run{seed}"
        in_save = torment(start, run, plan, seed)
        assert in_save >= 15
        same_run(run, tmp_path / "whole")
        for kind in plan:
            where = {"save": "inside a save", "train": "in training", "early": "at the start"}[kind]
            with faults.trial(f"SIGKILL {where}", "resumed to the end: bit-equal"):
                pass  # what held for the whole run held for each of its kills


@pytest.mark.fault
def test_three_resumes_in_a_row(start, finished, same_run, faults, tmp_path):
    """Each is ended by SIGTERM after some steps."""
    finished(start(tmp_path / "whole", steps=40))
    draw = random.Random(3)
    for number in range(3):
        run = tmp_path / f"run{number}"
        with faults.trial("three resumes in a row", "bit-equal"):
            for leg in range(3):
                path = run / "metrics.jsonl"
                before = path.stat().st_mtime_ns if path.exists() else 0
                child = start(run, 40, resume=leg > 0)
                first_change(path, before, child)
                time.sleep(draw.uniform(0, 0.03))
                os.kill(child.pid, signal.SIGTERM)
                assert child.wait() == 143, child.err.read_text()
            finished(start(run, 40, resume=True))
            same_run(run, tmp_path / "whole")
