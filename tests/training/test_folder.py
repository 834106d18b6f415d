"""A run's folder: held by one process, cut back to its checkpoint, gone on with bit-equally."""

import errno
import json
import os
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch

from selfsup.errors import CheckpointError, ConfigError, StorageError
from selfsup.training.checkpoint import checkpoint_paths, load_newest
from selfsup.training.folder import Rows, RunFolder
from selfsup.training.loop import train

CLOCK = {"seconds", "speed_bytes"}


class Stopping:
    """Data that end the program when the batch of step `step` is used."""

    def __init__(self, data, step: int):
        self.data, self.fields, self.lengths = data, data.fields, data.lengths
        self.left = step

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, numbers):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return self.data.batch(numbers)


@pytest.fixture
def run(toy, tmp_path):
    """Trains in a folder; `stop`: the step before which the program ends."""

    def run(name: str, resume: bool = False, stop: int | None = None, seed: int = 0, **keys):
        data = toy.Rows(20) if stop is None else Stopping(toy.Rows(20), stop)
        objective, folder = toy.build(seed, dropout=0.3), RunFolder(tmp_path / name, resume)
        try:
            config = toy.config(**{"steps": 12, "checkpoint_every": 4, "evaluations": 4, **keys})
            train(objective, data, toy.Rows(9, seed=1), config, folder)
        except KeyboardInterrupt:
            assert stop is not None
        finally:
            folder.close()
        return toy.weights(objective)

    return run


def equal(toy, one, other) -> None:
    """Two run folders hold the same run, but for the clock."""
    ours, theirs = (load_newest(path / "checkpoints") for path in (one, other))
    toy.same(ours.weights, theirs.weights)
    toy.same(ours.optimizer, theirs.optimizer)
    states = [{k: v for k, v in c.state.items() if k not in CLOCK} for c in (ours, theirs)]
    assert states[0] == states[1]
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("keys", [{}, {"tokens": 200, "steps": None}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_run_that_was_cut_twice_is_bit_equal(toy, run, tmp_path, keys, keep):
    keys = {**keys, "keep": keep, "log_every": 3}
    accumulate = keys.get("accumulate", 1)
    expected = run("whole", **keys)
    run("cut", stop=6 * accumulate, **keys)
    assert [p.name for p in checkpoint_paths(tmp_path / "cut" / "checkpoints")] == ["step-00000004"]
    run("cut", resume=True, stop=5 * accumulate, seed=1, **keys)
    got = run("cut", resume=True, seed=2, **keys)
    equal(toy, tmp_path / "whole", tmp_path / "cut")
    toy.same(got, expected)


def test_the_best_weights_survive_a_cut(toy, tmp_path):
    """The best evaluation, at step 3, comes before the checkpoint at step 4; no later one is."""

    class BestAtThree(toy.Largest):
        def loss(self, batch, generator):
            out = super().loss(batch, generator)
            return out if self.training else out._replace(loss=(self.seen - 3.0).abs())

    config = toy.config(steps=12, checkpoint_every=4, evaluations=4, keep="best")
    for stop, resume in ((6, False), (99, True)):
        objective = toy.build(kind=BestAtThree)
        with closing(RunFolder(tmp_path / "run", resume)) as folder, suppress(KeyboardInterrupt):
            train(objective, Stopping(toy.Rows(20), stop), toy.Rows(9), config, folder)
    assert objective.seen == 3
    assert load_newest(tmp_path / "run" / "checkpoints").weights["seen"] == 12


@pytest.mark.parametrize(("every", "expected"), [(None, []), (0, [0]), (4, [0, 4, 8])])
def test_refresh_comes_when_it_should_and_survives_a_cut(toy, tmp_path, every, expected):
    """It sees all data in order, and its randomness, dropout too, is that of its step."""

    class Refreshing(toy.Largest):
        refresh_every = every

        def __init__(self):
            super().__init__(dropout=0.5)
            self.register_buffer("drawn", torch.zeros(2))
            self.refreshed = []

        def refresh(self, batches, generator):
            seen = torch.cat([batch["index"] for batch in batches])
            assert seen.tolist() == list(range(20))
            self.refreshed.append(len(self.steps))
            self.drawn[0] += torch.rand((), generator=generator)
            self.drawn[1] += self.dropout(torch.ones(50)).sum()

    config = toy.config(steps=12, checkpoint_every=4)
    whole = toy.build(kind=Refreshing)
    train(whole, toy.Rows(20), None, config)
    assert whole.refreshed == expected
    for stop, resume in ((7, False), (99, True)):
        objective = toy.build(kind=Refreshing)
        data = Watched(toy.Rows(20), stop)
        with torch.random.fork_rng():
            torch.rand(stop)  # another process has another global state
            with (
                closing(RunFolder(tmp_path / "run", resume)) as folder,
                suppress(KeyboardInterrupt),
            ):
                train(objective, data, None, config, folder)
    toy.same(toy.weights(objective), toy.weights(whole))


class Watched(Stopping):
    """As `Stopping`, but a whole pass over the data in order does not count."""

    def batch(self, numbers):
        if list(numbers) == list(range(numbers[0], numbers[0] + len(numbers))):
            return self.data.batch(numbers)
        return super().batch(numbers)


def test_a_budget_in_minutes_counts_the_time_before_a_cut(toy, tmp_path):
    config = toy.config(minutes=0.01, checkpoint_every=1)
    with closing(RunFolder(tmp_path / "run")) as folder, suppress(KeyboardInterrupt):
        train(toy.build(), Stopping(toy.Rows(20), 5), None, config, folder)
    time.sleep(0.7)  # a pause of more than the budget costs nothing of it
    with closing(RunFolder(tmp_path / "run", resume=True)) as folder:
        train(toy.build(), toy.Rows(20), None, config, folder)
    rows = [json.loads(x) for x in (tmp_path / "run" / "speed.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) > 5  # it went on; how far depends on the machine
    assert seconds == sorted(seconds)
    assert seconds[-2] <= 0.6 <= seconds[-1]  # written to a thousandth


def test_a_run_that_was_cut_before_its_first_checkpoint_begins_again(toy, run, tmp_path):
    run("whole")
    run("cut", stop=2)
    assert (tmp_path / "cut" / "metrics.jsonl").stat().st_size > 0
    run("cut", resume=True)
    equal(toy, tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_is_left_as_it_is(toy, run, tmp_path):
    expected = run("run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    toy.same(run("run", resume=True, seed=5), expected)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_prolonged_run_goes_on_and_is_evaluated(run, tmp_path):
    run("run", steps=6)
    run("run", steps=12, resume=True)
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["split"] == "train"] == list(range(1, 13))
    assert [r["step"] for r in rows if r["split"] == "valid"] == [0, 2, 3, 5, 6, 9, 12]


def test_a_damaged_newest_checkpoint_costs_only_its_steps(toy, run, tmp_path, capsys):
    run("whole")
    run("cut", stop=10)
    newest = tmp_path / "cut" / "checkpoints" / "step-00000008" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    capsys.readouterr()
    run("cut", resume=True)
    said = capsys.readouterr().err
    assert "step-00000008: optimizer.safetensors is damaged" in said
    assert "at step 4" in said
    equal(toy, tmp_path / "whole", tmp_path / "cut")


def test_a_folder_that_exists_is_refused(run, tmp_path):
    run("run", steps=1)
    with pytest.raises(ConfigError, match=r"run exists already: give --resume"):
        RunFolder(tmp_path / "run")


def test_a_folder_that_only_holds_a_lock_is_new(tmp_path):
    RunFolder(tmp_path / "run").close()
    RunFolder(tmp_path / "run").close()


def test_resuming_nothing_is_said(tmp_path, capsys):
    RunFolder(tmp_path / "run", resume=True).close()
    assert "run: nothing is there to go on with; the run begins" in capsys.readouterr().err
    RunFolder(tmp_path / "run", resume=True).close()
    assert not capsys.readouterr().err


def test_a_home_that_nobody_expands_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="write the whole path"):
        RunFolder(Path("~/runs/mine"))
    assert not [*tmp_path.iterdir()]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file; --out needs a folder"):
        RunFolder(tmp_path / "run")


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run")


def test_two_processes_cannot_hold_one_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    code = (
        "import sys; from pathlib import Path; from selfsup.training.folder import RunFolder; "
        "RunFolder(Path(sys.argv[1]), resume=True)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode != 0
    assert "ConfigError" in second.stderr
    assert "is in use by another selfsup process" in second.stderr
    folder.close()
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / ".step-00000005.77.tmp").mkdir(parents=True)
    (checkpoints / ".step-00000005.77.tmp" / "weights.safetensors").write_bytes(b"half")
    (checkpoints / ".step-00000004.77.old").mkdir()
    (checkpoints / "step-00000004").mkdir()
    (tmp_path / "run" / ".run.toml.77.tmp").write_text("half")
    (tmp_path / "run" / ".mine").write_text("not ours")
    (tmp_path / "run" / ".mine.tmp").write_text("nor this")
    RunFolder(tmp_path / "run", resume=True).close()
    assert [p.name for p in checkpoints.iterdir()] == ["step-00000004"]
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == [".lock", ".mine", ".mine.tmp", "checkpoints"]


def test_what_was_about_to_be_replaced_is_put_back(tmp_path):
    """Killed between the two renames of a file system that cannot exchange names."""
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / ".step-00000005.77.old").mkdir(parents=True)
    (checkpoints / ".step-00000005.77.old" / "weights.safetensors").write_bytes(b"whole")
    (checkpoints / ".step-00000005.77.tmp").mkdir()
    RunFolder(tmp_path / "run", resume=True).close()
    assert [p.name for p in checkpoints.iterdir()] == ["step-00000005"]
    assert (checkpoints / "step-00000005" / "weights.safetensors").read_bytes() == b"whole"


def test_rows_are_cut_back_to_the_checkpoint(tmp_path):
    rows = Rows(tmp_path / "rows")
    rows.add({"step": 1})
    size = rows.flushed_size()
    rows.add({"step": 2})
    rows.close()
    with open(tmp_path / "rows", "ab") as file:
        file.write(b'{"st')
    again = Rows(tmp_path / "rows", size)
    assert again.rows == [{"step": 1}]
    again.add({"step": 3})
    again.close()
    assert (tmp_path / "rows").read_text() == '{"step": 1}\n{"step": 3}\n'


def test_rows_that_were_lost_are_an_error(tmp_path):
    (tmp_path / "rows").write_text('{"step": 1}\n')
    with pytest.raises(CheckpointError, match="rows were lost; put the whole file back"):
        Rows(tmp_path / "rows", 13)


@pytest.mark.parametrize(
    ("content", "place"),
    [(b'{"step": 1}\n{"st\n', 2), (b'{"step": 1}\n{"step": 2}', 2), (b"\n", 1), (b"[1]\n", 1)],
)
def test_rows_that_are_damaged_are_named_and_left_alone(tmp_path, content, place):
    path = tmp_path / "rows"
    path.write_bytes(content + b'{"step": 3}\n')
    with pytest.raises(CheckpointError, match=f"rows:{place}: .*put the whole file back"):
        Rows(path, len(content))
    assert path.read_bytes() == content + b'{"step": 3}\n'


def test_the_best_begins_anew_where_the_last_was_kept(toy, tmp_path):
    """And the last weights are given again when it is the other way round."""

    class BestAtSix(toy.Largest):
        def loss(self, batch, generator):
            out = super().loss(batch, generator)
            return out if self.training else out._replace(loss=(self.seen - 6.0).abs())

    def run(steps: int, keep: str, resume: bool = True):
        objective = toy.build(kind=BestAtSix)
        config = toy.config(steps=steps, checkpoint_every=4, evaluations=steps // 3, keep=keep)
        with closing(RunFolder(tmp_path / "run", resume)) as folder:
            train(objective, toy.Rows(20), toy.Rows(9), config, folder)
        return int(objective.seen)

    assert run(9, "last", resume=False) == 9
    assert run(18, "best") == 12  # worse than at 6, which nobody kept
    assert run(21, "best") == 12
    assert run(24, "last") == 24


@pytest.mark.parametrize(
    ("room", "every", "last"), [(0, 1000, 20), (12, 3, 6)], ids=["a row", "a checkpoint"]
)
def test_a_full_disk_stops_the_run_and_leaves_it_resumable(toy, tmp_path, room, every, last):
    """A real file system that another program fills up to `room` KiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")

    def go_on(data, every: int = 3, resume: bool = True) -> list[dict]:
        config = toy.config(steps=60, checkpoint_every=every, checkpoints=1)
        with closing(RunFolder(tmp_path / "run", resume)) as folder:
            return train(toy.build(), data, None, config, folder)

    try:
        with pytest.raises(KeyboardInterrupt):
            go_on(Stopping(toy.Rows(20), 4), resume=False)
        _fill(tmp_path / "other", room)
        with pytest.raises(StorageError, match="no space left"):
            go_on(toy.Rows(20), every)
        rows = (tmp_path / "run" / "metrics.jsonl").read_bytes().count(b"\n")
        assert last <= rows < last + 30
        assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000003"]
        (tmp_path / "other").unlink()
        assert [row["step"] for row in go_on(toy.Rows(20))] == list(range(1, 61))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def _fill(path, room: int) -> None:
    """Writes zeros to the end of the disk, then gives `room` KiB back."""
    with open(path, "wb", buffering=0) as file:
        while file.tell() < 2**20:
            try:
                file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017
                break
        file.truncate(file.tell() - 1024 * room)


def test_training_without_a_folder_writes_nothing(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    train(toy.build(), toy.Rows(9), toy.Rows(9), toy.config(checkpoint_every=1))
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), before)
