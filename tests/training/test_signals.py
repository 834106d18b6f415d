"""SIGTERM and SIGINT to a real process: saved, the right exit code, and resumed bit-equally."""

import os
import signal
import time
from pathlib import Path

import pytest

from selfsup.training.checkpoint import load_newest

STEPS = 60
CLOCK = {"seconds", "speed_bytes"}


def steps_done(run: Path) -> int:
    """Steps of the last row of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b'"split": "train"') if path.exists() else 0


def wait_for_steps(child, run: Path, steps: int) -> None:
    end = time.monotonic() + 60
    while steps_done(run) < steps:
        assert time.monotonic() < end, child.err.read_text()
        time.sleep(0.001)


@pytest.fixture(scope="module")
def pretrain(launch, corpus):
    """Starts a run that takes long enough to be interrupted."""

    def pretrain(out: Path, *more: object):
        settings = ["training.log_every=1", f"training.steps={STEPS}", "training.batch_size=32"]
        return launch(
            *("pretrain", corpus.masked, "--data", corpus.text, "--out", out),
            *("--set", *settings, *more),
        )

    return pretrain


@pytest.fixture(scope="module")
def whole(pretrain, tmp_path_factory):
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    child = pretrain(run)
    assert child.wait() == 0, child.err.read_text()
    return run


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_stopped_run_is_saved_and_resumed_bit_equally(pretrain, whole, tmp_path, number, code):
    run = tmp_path / "run"
    child = pretrain(run)
    wait_for_steps(child, run, 3)
    os.kill(child.pid, number)
    assert child.wait() == code
    said = child.err.read_text()
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"error: {number.name} at step ")
    assert said.endswith(f"saved in {run}; go on with --resume\n")
    assert child.out.read_text() == ""
    saved = load_newest(run / "checkpoints").state["step"]
    assert 3 <= saved < STEPS
    assert not (run / "model").exists()

    child = pretrain(run, "--resume")
    assert child.wait() == 0, child.err.read_text()
    assert f"resuming {run} at step {saved}" in child.err.read_text()
    assert child.out.read_text() == f"{run}\n"
    ours, theirs = load_newest(run / "checkpoints"), load_newest(whole / "checkpoints")
    for got, expected in zip(ours[:2], theirs[:2], strict=True):
        assert got.keys() == expected.keys()
        assert all(got[name].equal(expected[name]) for name in got)
    states = [{k: v for k, v in c.state.items() if k not in CLOCK} for c in (ours, theirs)]
    assert states[0] == states[1]
    for name in ("metrics.jsonl", "model/model.safetensors", "fills.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_a_second_process_is_refused_while_the_first_runs_on(pretrain, whole, tmp_path):
    run = tmp_path / "run"
    first = pretrain(run)
    wait_for_steps(first, run, 1)
    os.kill(first.pid, signal.SIGSTOP)  # so that it is surely still there
    second = pretrain(run, "--resume")
    assert second.wait() == 2
    assert f"{run} is in use by another selfsup process" in second.err.read_text()
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait() == 0
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
