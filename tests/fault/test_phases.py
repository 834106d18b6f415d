"""SIGTERM in every phase of a run: exit code 143, the run is saved, and resumed bit-equally.

The process itself says when it enters a phase, and stays there until the signal was sent: it came
inside that phase on any machine, however slow.
"""

import os
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.fault

# The NUMBERth time that one of these functions is called, it waits for the signal.
HELD = """
import time
from pathlib import Path
from selfsup.methods.generative.masked_language import MaskedLanguage
from selfsup.training import loop
entered, sent, left = Path({entered!r}), Path({sent!r}), [{number}]

def hold():
    left[0] -= 1
    if left[0] == 0:
        entered.touch()
        while not sent.exists():
            time.sleep(0.001)

def holding(function, when=lambda *arguments: True):
    def wrapper(*arguments, **keys):
        if when(*arguments):
            hold()
        return function(*arguments, **keys)
    return wrapper
"""
PHASES = {
    "the first forward pass": (
        "MaskedLanguage.loss = holding(MaskedLanguage.loss, lambda self, *_: self.training)"
    ),
    "a step": "MaskedLanguage.after_step = holding(MaskedLanguage.after_step)",
    "an evaluation": "loop.evaluate = holding(loop.evaluate)",
    # a thread of its own builds the batches; the loop waits for it
    "a wait for data": """
import threading
from selfsup.data.rows import PackedRows
PackedRows.batch = holding(
    PackedRows.batch, lambda *_: threading.current_thread().name.startswith("data")
)
""",
    # between the bytes of a file of the checkpoint and its name
    "a save": """
import os
os.fsync = holding(
    os.fsync, lambda number: "/checkpoints/.step-" in os.readlink(f"/proc/self/fd/{number}")
)
""",
    "compilation": """
from torch._dynamo.callback import callback_handler
callback_handler.register_start_callback(lambda *_: hold())
""",
}
NUMBERS = {
    "the first forward pass": [1] * 5,
    "a step": [1, 2, 7, 9, 11],  # later ones would leave another pair of checkpoints
    "an evaluation": [1, 2, 3, 4, 5],
    "a wait for data": [2, 3, 8, 9, 11],
    "a save": [1, 2, 4, 7, 10],
    "compilation": [1] * 5,
}
SETTINGS = ("training.steps=16", "training.checkpoint_every=4", "training.evaluations=8")


def interrupted(child, entered: Path, sent: Path) -> None:
    """Sends SIGTERM once the process says that it is there."""
    end = time.monotonic() + 300
    while not entered.exists():
        assert time.monotonic() < end, child.err.read_text()
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGTERM)
    sent.touch()


@pytest.fixture(scope="module")
def whole(pretrain, finished, tmp_path_factory):
    """Undisturbed runs, by their settings."""
    made: dict[tuple[str, ...], Path] = {}

    def whole(*settings: str) -> Path:
        if settings not in made:
            made[settings] = tmp_path_factory.mktemp("whole") / "run"
            finished(pretrain(made[settings], *settings))
        return made[settings]

    return whole


@pytest.mark.parametrize("phase", PHASES)
def test_sigterm(pretrain, finished, whole, same_run, faults, tmp_path, phase):
    more = ("training.compile=true",) if phase == "compilation" else ()
    for trial, number in enumerate(NUMBERS[phase]):
        run, entered, sent = (tmp_path / f"{trial}{name}" for name in ("run", ".in", ".sent"))
        setup = HELD.format(entered=str(entered), sent=str(sent), number=number) + PHASES[phase]
        with faults.trial(f"SIGTERM in {phase}", "exit code 143; resumed bit-equally"):
            child = pretrain(run, *SETTINGS, *more, setup=setup)
            interrupted(child, entered, sent)
            assert child.wait(300) == 143, child.err.read_text()
            said = child.err.read_text()
            assert "Traceback" not in said
            assert said.endswith(f"saved in {run}; go on with --resume\n")
            finished(pretrain(run, *SETTINGS, *more, resume=True))
            same_run(run, whole(*SETTINGS, *more))
