"""A disk that fills up in the middle of a save: what was there stays, and the run goes on later."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from selfsup.training.checkpoint import load_newest, verify

pytestmark = pytest.mark.fault

OFFSETS = 10
PAGE = 4096
SMALL = 12 * 2**20
SETTINGS = ("training.steps=30", "training.checkpoint_every=10", "training.checkpoints=1")
INNER = "SELFSUP_TESTS_MAY_MOUNT"


def mounted(folder: Path) -> bool:
    """Makes `folder` a file system of its own, 12 MiB large; whether that is allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(request, tmp_path):
    """A small file system.

    Where only a name space of its own may mount, the test runs again in one; None: it ran there.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    if mounted(folder):
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        return
    inside = ["unshare", "--map-root-user", "--mount"]
    allowed = shutil.which("unshare") and subprocess.run([*inside, "true"]).returncode == 0
    if INNER in os.environ or not allowed:
        pytest.skip("mounting a small file system needs root, or name spaces of one's own")
    test = f"{request.path}::{request.node.name}"
    again = [*inside, sys.executable, "-m", "pytest", "-m", "fault", test]
    done = subprocess.run(again, env={**os.environ, INNER: "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
    yield None


def fill(disk: Path, room: int) -> Path:
    """A file that leaves `room` bytes of the disk, rounded up to pages."""
    path = disk / "other"
    free = shutil.disk_usage(disk).free
    path.write_bytes(bytes(free - -(-room // PAGE) * PAGE))
    return path


# The process ends, as if killed, some steps after the checkpoint of step 10 was written.
STOP_AFTER_10 = """
import os, time
from pathlib import Path
from selfsup.methods.generative.masked_language import MaskedLanguage

def after_step(self, step, total):
    if step == 14:
        while not Path({checkpoint!r}).exists():
            time.sleep(0.01)
        os._exit(9)

MaskedLanguage.after_step = after_step
"""
QUICKLY = "from selfsup.training import checkpoint; checkpoint.WAITS = (0.1, 0.1, 0.1)"


def test_at_ten_offsets_of_a_save(pretrain, finished, same_run, faults, small_disk, tmp_path):
    """Space ends after 0, 10, ... 90% of the bytes of the next checkpoint."""
    kind, note = "disk full inside a save", "exit code 5; the older checkpoint is whole; resumed"
    if small_disk is None:
        for _ in range(OFFSETS):
            with faults.trial(kind, note):
                pass  # counted in the other name space
        return
    whole, begun, run = tmp_path / "whole", tmp_path / "begun", small_disk / "run"
    finished(pretrain(whole, *SETTINGS))
    checkpoint = begun / "checkpoints" / "step-00000010"
    child = pretrain(begun, *SETTINGS, setup=STOP_AFTER_10.format(checkpoint=str(checkpoint)))
    assert child.wait(600) == 9, child.err.read_text()
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    for number in range(OFFSETS):
        shutil.copytree(begun, run)
        # run.toml and the rows of the steps before need some pages too
        other = fill(small_disk, 4 * PAGE + number * size // OFFSETS)
        with faults.trial(kind, note):
            child = pretrain(run, *SETTINGS, resume=True, setup=QUICKLY)
            assert child.wait(600) == 5, child.err.read_text()
            said = child.err.read_text()
            assert "Traceback" not in said
            assert "checkpoints/step-00000020: no space left on the device" in said
            assert said.count("step-00000020: no space left on the device; trying again in") == 3
            assert [p.name for p in (run / "checkpoints").iterdir()] == [checkpoint.name]
            assert not [p for p in run.rglob("*") if p.name.endswith((".tmp", ".old"))]
            verify(run / "checkpoints" / checkpoint.name)
            found = load_newest(run / "checkpoints")
            assert found is not None
            assert found.state["step"] == 10
            other.unlink()
            finished(pretrain(run, *SETTINGS, resume=True))
            same_run(run, whole)
        shutil.rmtree(run)
