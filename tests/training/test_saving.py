"""Saves in the background: the same files, never half, and their errors reach the loop."""

import errno
import os
import signal
import threading
from contextlib import closing

import pytest
import torch

from selfsup.errors import CheckpointError, Interrupted, StorageError
from selfsup.training import saving
from selfsup.training.checkpoint import (
    Checkpoint,
    checkpoint_paths,
    load_checkpoint,
    load_newest,
    on_host,
    save_checkpoint,
)
from selfsup.training.folder import RunFolder
from selfsup.training.loop import train
from selfsup.training.saving import Saver

PATIENCE = 30  # seconds that a test waits at most
CLOCK = {"seconds", "speed_bytes"}


def checkpoint(step: int) -> Checkpoint:
    weights = {"a": torch.full((50,), float(step)), "turned": torch.rand(3, 2).T}
    return Checkpoint(weights, {"a|exp_avg": torch.rand(50)}, None, {"step": step})


@pytest.fixture
def gate(monkeypatch):
    """Holds every background save at its beginning until `go` is set; `begun`: one is there."""

    class Gate:
        begun, go = threading.Event(), threading.Event()
        error: Exception | None = None

    def held(*arguments):
        Gate.begun.set()
        assert Gate.go.wait(PATIENCE)
        if Gate.error is not None:
            raise Gate.error
        return save_checkpoint(*arguments)

    monkeypatch.setattr(saving, "save_checkpoint", held)
    yield Gate
    Gate.go.set()


def test_the_files_are_those_of_a_save_at_once(tmp_path):
    for background in (False, True):
        with closing(Saver(tmp_path / str(background), 2, 0, background)) as saver:
            for step in (1, 2, 3):
                torch.manual_seed(step)
                saver.save(step, checkpoint(step))
    names = [p.name for p in checkpoint_paths(tmp_path / "True")]
    assert names == ["step-00000002", "step-00000003"]
    for name in names:
        for file in (tmp_path / "False" / name).iterdir():
            assert (tmp_path / "True" / name / file.name).read_bytes() == file.read_bytes()


def test_what_training_changes_meanwhile_is_not_written(tmp_path, gate):
    given = checkpoint(1)
    expected = given.weights["a"].clone()
    with closing(Saver(tmp_path, 2, 0, background=True)) as saver:
        saver.save(1, given)
        assert gate.begun.wait(PATIENCE)
        for x in (*given.weights.values(), *given.optimizer.values()):
            x.fill_(-1)
        saver.check()  # under way: nothing to say
        assert checkpoint_paths(tmp_path) == []
        gate.go.set()
        saver.wait()
        assert torch.equal(load_newest(tmp_path).weights["a"], expected)
        assert (load_newest(tmp_path).optimizer["a|exp_avg"] >= 0).all()


def test_a_save_waits_for_the_one_before(tmp_path, gate):
    with closing(Saver(tmp_path, 2, 0, background=True)) as saver:
        saver.save(1, checkpoint(1))
        second = threading.Thread(target=saver.save, args=(2, checkpoint(2)))
        second.start()
        second.join(0.1)
        assert second.is_alive(), "there may be one copy of the weights, not two"
        gate.go.set()
        second.join(PATIENCE)
    assert len(checkpoint_paths(tmp_path)) == 2


def full() -> StorageError:
    error = StorageError("no space left on the device")
    error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return error


@pytest.mark.parametrize("way", ["check", "wait", "save"])
def test_an_error_is_said_once(tmp_path, gate, capsys, way):
    gate.error = full()
    gate.go.set()
    with closing(Saver(tmp_path, 2, 0, background=True)) as saver:
        saver.save(1, checkpoint(1))
        while not saver.pending.done():
            pass
        with pytest.raises(StorageError, match="no space left"):
            {"check": saver.check, "wait": saver.wait}.get(
                way, lambda: saver.save(2, checkpoint(2))
            )()
        saver.check()
    assert capsys.readouterr().err == ""


def test_an_error_after_the_end_is_a_warning(tmp_path, gate, capsys):
    gate.error = full()
    gate.go.set()
    saver = Saver(tmp_path, 2, 0, background=True)
    saver.save(1, checkpoint(1))
    saver.close()
    assert capsys.readouterr().err == "warning: no space left on the device\n"


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with closing(Saver(None, 2, 0, background=True)) as saver:
        saver.save(1, checkpoint(1))
    assert list(tmp_path.iterdir()) == []


def test_the_copy_shares_no_memory():
    given = checkpoint(1)._replace(best={"a": torch.ones(2)})
    copy = on_host(given)
    for name, x in given.weights.items():
        assert torch.equal(copy.weights[name], x)
        assert copy.weights[name].data_ptr() != x.data_ptr()
    assert copy.optimizer["a|exp_avg"].data_ptr() != given.optimizer["a|exp_avg"].data_ptr()
    assert copy.best is given.best


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_run_is_bit_equal_to_one_that_saves_at_once(toy, tmp_path, keep):
    for background in (False, True):
        objective = toy.build(dropout=0.3)
        config = toy.config(
            steps=12, checkpoint_every=2, evaluations=4, keep=keep, async_save=background
        )
        with closing(RunFolder(tmp_path / str(background))) as folder:
            train(objective, toy.Rows(20), toy.Rows(9, seed=1), config, folder)
    one, other = tmp_path / "False", tmp_path / "True"
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for ours, theirs in zip(*(checkpoint_paths(p / "checkpoints") for p in (one, other)), strict=1):
        assert ours.name == theirs.name
        assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}
        for file in ours.glob("*.safetensors"):
            assert file.read_bytes() == (theirs / file.name).read_bytes()
        states = [load_checkpoint(path).state for path in (ours, theirs)]
        assert len({str({k: v for k, v in s.items() if k not in CLOCK}) for s in states}) == 1


class Acting:
    """Data that do something when the batch of step `step` is built."""

    def __init__(self, data, step: int, act):
        self.data, self.fields, self.lengths = data, data.fields, data.lengths
        self.left, self.act = step, act

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, numbers):
        if self.left == 0:
            self.act()
        self.left -= 1
        return self.data.batch(numbers)


def test_training_goes_on_and_an_error_ends_it_at_the_next_step(toy, tmp_path, gate):
    gate.error = full()

    def let_fail() -> None:
        assert gate.begun.is_set(), "steps are made while the save is under way"
        gate.go.set()

    objective = toy.build()
    data = Acting(toy.Rows(20), 8, let_fail)
    with closing(RunFolder(tmp_path / "run")) as folder, pytest.raises(StorageError) as caught:
        train(objective, data, None, toy.config(steps=100_000, checkpoint_every=4), folder)
    assert caught.value.exit_code == 5
    assert 7 <= objective.seen < 1000
    assert list((tmp_path / "run").glob("checkpoints/*")) == []


def test_a_signal_waits_for_both_saves(toy, tmp_path, gate):
    """The one under way, and the one of the step at which the run stops."""
    data = Acting(toy.Rows(20), 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    opener = threading.Timer(0.2, gate.go.set)
    opener.start()
    with closing(RunFolder(tmp_path / "run")) as folder, pytest.raises(Interrupted) as caught:
        train(toy.build(), data, None, toy.config(steps=100_000, checkpoint_every=4), folder)
    opener.join()
    assert caught.value.exit_code == 143
    first, last = checkpoint_paths(tmp_path / "run" / "checkpoints")
    assert first.name == "step-00000004"
    assert load_newest(last.parent).state["step"] > 4
    assert f"at step {load_newest(last.parent).state['step']}" in str(caught.value)


def test_a_checkpoint_of_another_program_is_refused(toy, tmp_path):
    """Its state has keys that the loop does not know."""
    config = toy.config(steps=2)
    with closing(RunFolder(tmp_path / "run")) as folder:
        train(toy.build(), toy.Rows(9), None, config, folder)
        found = load_newest(folder.checkpoints)
        state = {**found.state, "cursor": 3}
        save_checkpoint(folder.checkpoints, 2, found._replace(state=state), keep=1)
        with pytest.raises(CheckpointError, match="cursor"):
            train(toy.build(), toy.Rows(9), None, config, folder)


def test_what_stays_for_good_must_be_a_checkpoint(toy):
    assert toy.config(checkpoint_every=50, keep_every=100).keep_every == 100
    with pytest.raises(ValueError, match=r"multiple of checkpoint_every \(50\), got 120"):
        toy.config(checkpoint_every=50, keep_every=120)
