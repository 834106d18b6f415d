"""Shards by other processes. Their work is of Python's own library: no test must be imported."""

import os
import shutil
import signal
import subprocess
import time

import pytest

from selfsup import console, workers
from selfsup.errors import ConfigError, DataError, SelfsupError, StorageError
from selfsup.workers import Workers


def test_every_shard_is_done_by_another_process(tmp_path):
    (tmp_path / "a").write_text("x")
    shards = {str(n): (tmp_path / "a", tmp_path / f"b{n}") for n in range(3)}
    Workers(jobs=2).run(shutil.copyfile, shards.items(), "copying")
    assert len(list(tmp_path.iterdir())) == 4
    Workers(jobs=2).run(shutil.copyfile, {}.items(), "copying")


def test_few_processes_share_the_processors_and_do_many_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    line = f"echo $PPID $SELFSUP_WORKER $OMP_NUM_THREADS > {tmp_path}/"
    shards = ((str(n), (["sh", "-c", f"{line}{n}"],)) for n in range(5))
    Workers(jobs=2).run(subprocess.check_call, shards, "saying")
    said = {path.read_text() for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 5
    assert {tuple(line.split()[1:]) for line in said} == {("0", "3"), ("1", "3")}
    assert len(said) == 2


def test_warnings_of_another_process_come_with_the_name_of_the_shard(capsys):
    Workers(jobs=2).run(console.warn, [("a", ("cut",)), ("b", ("cut too",))], "warning")
    said = capsys.readouterr().err.splitlines()
    assert sorted(said) == ["warning: a: cut", "warning: b: cut too"]


@pytest.mark.parametrize(
    ("work", "number", "death"),
    [
        (signal.raise_signal, 9, r"its process \d+ was killed by signal 9"),
        (os._exit, 7, r"its process \d+ ended without a word, with exit code 7"),
    ],
)
def test_a_process_that_dies_is_named_soon_after_two_tries(work, number, death, capsys):
    started = time.monotonic()
    with pytest.raises(SelfsupError, match=f"1 of 1 shards failed twice: bad;.*{death}"):
        Workers(jobs=2).run(work, {"bad": (number,)}.items(), "dying")
    assert time.monotonic() - started < 60
    said = capsys.readouterr().err
    assert said.count("warning: bad: its process") == 2


def test_other_errors_of_a_process_come_with_their_traceback(tmp_path):
    with pytest.raises(SelfsupError, match="FileNotFoundError"):
        Workers(jobs=2).run(os.rmdir, {"gone": (tmp_path / "gone",)}.items(), "removing")


def fails(times, error):
    """Work that fails so many times for each shard, and what it did."""
    done = []

    def work(name):
        done.append(name)
        if name != "good" and done.count(name) <= times:
            raise error

    return work, done


def test_a_shard_that_fails_is_tried_again_after_the_others(capsys):
    work, done = fails(1, DataError("no line 3"))
    Workers().run(work, {name: (name,) for name in ("bad", "good", "ugly")}.items(), "trying")
    assert done == ["bad", "good", "ugly", "bad", "ugly"]
    assert "warning: bad: no line 3; it is tried again at the end" in capsys.readouterr().err


def test_shards_that_fail_twice_are_all_named():
    work, done = fails(2, DataError("no line 3"))
    with pytest.raises(DataError, match=r"2 of 3 shards failed twice: bad, ugly; .*bad: no line 3"):
        Workers().run(work, {name: (name,) for name in ("bad", "good", "ugly")}.items(), "trying")
    assert done.count("good") == 1


def test_many_that_fail_come_again_before_others_begin(monkeypatch):
    monkeypatch.setattr(workers, "HELD", 2)
    work, done = fails(1, DataError("no line 3"))
    Workers().run(work, [(name, (name,)) for name in ("a", "b", "good", "c")], "trying")
    assert done == ["a", "b", "a", "b", "good", "c", "c"]
    work, done = fails(9, DataError("no line 3"))
    with pytest.raises(DataError, match=r"2 of 3 shards failed twice: a, b;"):
        Workers().run(work, ((name, (name,)) for name in ("good", "a", "b", "c", "d")), "trying")
    assert done == ["good", "a", "b", "a", "b"]


@pytest.mark.parametrize("error", [StorageError("full"), ConfigError("no such layer")])
def test_a_full_disk_and_wrong_use_stop_at_once(error):
    work, done = fails(9, error)
    with pytest.raises(type(error), match=str(error)):
        Workers().run(work, {"bad": ("bad",), "good": ("good",)}.items(), "trying")
    assert done == ["bad"]


def test_an_unknown_engine_is_refused():
    with pytest.raises(ConfigError, match="engine must be local or ray, got 'spark'"):
        Workers(engine="spark")
    with pytest.raises(ConfigError, match="jobs must be at least 1, got 0"):
        Workers(jobs=0)
