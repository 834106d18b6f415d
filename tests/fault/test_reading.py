"""A model folder is read while a run saves into it: no reader ever fails."""

import time

import numpy as np
import pytest

from selfsup.model_folder import load_model

pytestmark = pytest.mark.fault

TEXTS = ["the film was great", "the book was dull and the end of the book was awful"]

# Instead of training: it writes one of two model folders again and again, whole as a run does.
WRITER = """
import random, shutil, sys, time
from pathlib import Path
from selfsup.files import whole_folder
draw = random.Random(0)
for number in range({times}):
    with whole_folder(Path({model!r})) as aside:
        shutil.copytree(({one!r}, {other!r})[number % 2], aside, dirs_exist_ok=True)
    time.sleep(draw.uniform(0, 0.2))
sys.exit(0)
"""


def run_of(pretrain, finished, run, seed: int):
    """A run of a few steps."""
    finished(pretrain(run, "training.steps=6", f"training.seed={seed}"))
    return run


def test_while_a_run_is_prolonged(pretrain, finished, faults, tmp_path):
    """Each prolongation replaces the model folder; a reader sees the old one or the new one."""
    run = run_of(pretrain, finished, tmp_path / "run", 0)
    reads = 0
    for steps in (12, 18, 24):
        more = (f"training.steps={steps}", "training.checkpoint_every=1")
        writer = pretrain(run, *more, resume=True)
        while True:
            ended = writer.ask({"pid": writer.pid})
            with faults.trial("model read while its run trains on", "never fails"):
                vectors = load_model(run, "cpu").embed(TEXTS)
                assert np.isfinite(vectors).all()
            reads += 1
            if ended is not None:
                assert ended == 0, writer.err.read_text()
                break
    assert reads >= 6


def test_while_it_is_replaced_all_the_time(pretrain, launch, finished, faults, tmp_path):
    """What is read is one of the two models, never a mixture, and the command line agrees."""
    runs = [run_of(pretrain, finished, tmp_path / f"run{seed}", seed) for seed in (0, 1)]
    both = [load_model(run, "cpu").embed(TEXTS) for run in runs]
    assert not np.allclose(*both)
    one, other = (tmp_path / name for name in ("one", "other"))
    for run, copy in zip(runs, (one, other), strict=True):
        (run / "model").rename(copy)
    model = runs[0] / "model"
    setup = WRITER.format(times=150, model=str(model), one=str(one), other=str(other))
    writer = launch("--version", setup=setup)
    end = time.monotonic() + 120
    while not model.exists():
        assert time.monotonic() < end, writer.err.read_text()
        time.sleep(0.001)
    seen, ended = [0, 0], None
    while ended is None:
        ended = writer.ask({"pid": writer.pid})
        with faults.trial("model read while it is replaced", "never fails; never a mixture"):
            vectors = load_model(runs[0], "cpu").embed(TEXTS)
            which = [np.array_equal(vectors, one) for one in both]
            assert sum(which) == 1
            seen[which.index(True)] += 1
        child = launch("fill", runs[0], "the [MASK] was great") if sum(seen) % 10 == 1 else None
        if child is not None:
            with faults.trial("model read while it is replaced", "never fails; never a mixture"):
                assert child.wait(120) == 0, child.err.read_text()
    assert ended == 0, writer.err.read_text()
    assert min(seen) >= 3
