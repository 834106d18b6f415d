"""Two runs into one folder: the second is refused while the first lives, whoever comes first."""

import os
import signal
import time

import pytest

pytestmark = pytest.mark.fault

SETTINGS = ("training.steps=60", "training.checkpoint_every=10")
TRIALS = 5


def test_the_second_is_refused(pretrain, finished, same_run, faults, tmp_path):
    """Exit code 2, with and without --resume; afterwards --resume finds nothing left to do."""
    whole = tmp_path / "whole"
    finished(pretrain(whole, *SETTINGS))
    for number in range(TRIALS):
        run = tmp_path / f"run{number}"
        with faults.trial("a second run into a folder", "exit code 2; the first is not disturbed"):
            first = pretrain(run, *SETTINGS)
            end = time.monotonic() + 120
            while not (run / "metrics.jsonl").exists():
                assert time.monotonic() < end, first.err.read_text()
                time.sleep(0.001)
            os.kill(first.pid, signal.SIGSTOP)  # so that it is surely still there
            for resume, said in ((True, "in use by another selfsup process"), (False, "exists")):
                second = pretrain(run, *SETTINGS, resume=resume)
                assert second.wait(300) == 2
                assert said in second.err.read_text()
            os.kill(first.pid, signal.SIGCONT)
            finished(first)
            same_run(run, whole)
            before = (run / "metrics.jsonl").stat().st_mtime_ns, os.listdir(run / "checkpoints")
            finished(pretrain(run, *SETTINGS, resume=True))
            assert os.listdir(run / "checkpoints") == before[1]
            same_run(run, whole)


def test_two_that_start_together(pretrain, same_run, faults, tmp_path):
    """One of them wins, the other gets exit code 2."""
    whole = tmp_path / "whole"
    assert pretrain(whole, *SETTINGS).wait(600) == 0
    for number in range(TRIALS):
        run = tmp_path / f"run{number}"
        with faults.trial("two runs that start together", "one wins, the other: exit code 2"):
            both = [pretrain(run, *SETTINGS, resume=bool(number % 2)) for _ in range(2)]
            codes = sorted(child.wait(600) for child in both)
            assert codes == [0, 2], [child.err.read_text() for child in both]
            same_run(run, whole)
