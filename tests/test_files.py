"""Files are whole or not there, whatever goes wrong while they are written."""

import errno
import json
import os
import subprocess
import sys

import pytest

from selfsup import files
from selfsup.errors import StorageError
from selfsup.files import (
    exchange,
    read_steadily,
    remove_folder,
    sha256,
    whole_folder,
    write_bytes,
    write_json,
    write_text,
)


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def full_disk(tmp_path):
    """A real file system with 64 KiB of room."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def failing_fsync(number: int, after: int = 0):
    """An `os.fsync` that fails with `number` after so many calls."""
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))

    return fsync


def test_bytes_text_and_json_are_written(tmp_path):
    write_bytes(tmp_path / "new" / "folder" / "a.bin", b"\x00\xff")
    assert (tmp_path / "new" / "folder" / "a.bin").read_bytes() == b"\x00\xff"
    write_text(tmp_path / "b.txt", "søk")
    assert (tmp_path / "b.txt").read_bytes() == "søk".encode()
    write_json(tmp_path / "c.json", {"b": [1, 2.5], "a": "søk"})
    assert json.loads((tmp_path / "c.json").read_text()) == {"b": [1, 2.5], "a": "søk"}
    assert (tmp_path / "c.json").read_text().endswith("}\n")
    assert names(tmp_path) == ["b.txt", "c.json", "new"]


def test_the_name_of_a_file_that_is_no_utf8_survives_in_json(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xc3\xb8")
    write_json(tmp_path / "a.json", [name])
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == [name]
    assert "ø" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_nan_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert names(tmp_path) == []


def test_a_new_file_replaces_the_old_one(tmp_path):
    write_text(tmp_path / "a", "old and long")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch, number):
    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", failing_fsync(number))
    with pytest.raises(StorageError, match="a: "):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_is_a_storage_error_that_says_what_to_do(full_disk):
    write_text(full_disk / "a", "old")
    with pytest.raises(StorageError, match=r"a: no space left.*MiB free.*free some space"):
        write_bytes(full_disk / "a", b"x" * 200_000)
    assert (full_disk / "a").read_text() == "old"
    assert names(full_disk) == ["a"]


def test_a_full_disk_leaves_the_old_folder(full_disk):
    with whole_folder(full_disk / "run") as aside:
        (aside / "a").write_text("old")
    with (
        pytest.raises(StorageError, match="run: no space left"),
        whole_folder(full_disk / "run") as aside,
    ):
        (aside / "a").write_text("new")
        (aside / "b").write_bytes(b"x" * 200_000)
    assert names(full_disk) == ["run"]
    assert names(full_disk / "run") == ["a"]
    assert (full_disk / "run" / "a").read_text() == "old"


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda folder: (folder / "file").write_text(""), "file/a"),
        (lambda folder: (folder / "file").write_text(""), "file/deeper/a"),
        (lambda folder: (folder / "taken").mkdir(), "taken"),
        (lambda folder: None, "long" * 100),
    ],
    ids=["below a file", "far below a file", "a folder", "a name too long"],
)
def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path, make, path):
    make(tmp_path)
    before = names(tmp_path)
    with pytest.raises(StorageError, match="cannot be written"):
        write_text(tmp_path / path, "x")
    assert names(tmp_path) == before


def test_a_folder_appears_whole(tmp_path):
    with whole_folder(tmp_path / "run") as aside:
        (aside / "inside").mkdir()
        (aside / "inside" / "a").write_text("1")
        assert not (tmp_path / "run").exists()
    assert (tmp_path / "run" / "inside" / "a").read_text() == "1"
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_replaces_the_old_one(tmp_path, monkeypatch, exchanges):
    if not exchanges:  # a system or a file system that cannot swap two names
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    for content in ("old", "new"):
        with whole_folder(tmp_path / "run") as aside:
            (aside / content).write_text(content)
    assert names(tmp_path / "run") == ["new"]
    assert names(tmp_path) == ["run"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_two_folders_swap_names_or_stay(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == (["b"], ["a"])
    assert not exchange(tmp_path / "a", tmp_path / "none")
    assert names(tmp_path / "a") == ["b"]


def test_a_removed_folder_is_gone(tmp_path):
    (tmp_path / "run" / "inside").mkdir(parents=True)
    remove_folder(tmp_path / "run")
    assert names(tmp_path) == []
    with pytest.raises(StorageError, match="run: cannot be written"):
        remove_folder(tmp_path / "run")


@pytest.mark.parametrize("fails", [True, False])
def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(tmp_path, fails):
    """What was read of both is thrown away, and so is the error that came of it."""
    reads = []

    def write(content: str) -> None:
        with whole_folder(tmp_path / "run") as aside:
            (aside / "a").write_text(content)
            (aside / "b").write_text(content)

    def read() -> str:
        first = (tmp_path / "run" / "a").read_text()
        reads.append(first)
        if len(reads) < 3:
            write(str(len(reads)))
            if fails:
                raise ValueError(first)
        return first + (tmp_path / "run" / "b").read_text()

    write("0")
    assert read_steadily(tmp_path / "run", read) == "22"
    assert reads == ["0", "1", "2"]
    with pytest.raises(FileNotFoundError):
        read_steadily(tmp_path / "none", lambda: (tmp_path / "none" / "a").read_text())


class Stop(BaseException):
    """Comes from outside, like a KeyboardInterrupt."""


@pytest.mark.parametrize("error", [ValueError, Stop])
def test_an_error_inside_leaves_the_old_folder(tmp_path, error):
    with whole_folder(tmp_path / "run") as aside:
        (aside / "a").write_text("old")
    with pytest.raises(error), whole_folder(tmp_path / "run") as aside:
        (aside / "b").write_text("half")
        raise error
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["a"]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_failed_flush_leaves_no_half_folder(tmp_path, monkeypatch, after):
    """The disk fills at the first file, at the second, at the folder itself."""
    monkeypatch.setattr(os, "fsync", failing_fsync(errno.ENOSPC, after))
    with pytest.raises(StorageError), whole_folder(tmp_path / "run") as aside:
        (aside / "a").write_text("1")
        (aside / "b").write_text("2")
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_swept(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    kinds = {"mine": os.getpid(), "young": gone.pid, "old": gone.pid, "filled": gone.pid}
    for name, process in kinds.items():
        aside = tmp_path / f".{name}.{process}.tmp"
        aside.mkdir()
        (aside / "train.bin").write_bytes(b"half")
        age = 10_000_000_000 if name == "young" else 0  # of the folder
        os.utime(aside / "train.bin", (age, age))
        os.utime(aside, (0, 0))
    os.utime(tmp_path / f".filled.{gone.pid}.tmp" / "train.bin")  # it is still written
    (tmp_path / f".file.{gone.pid}.tmp").write_bytes(b"half")
    os.utime(tmp_path / f".file.{gone.pid}.tmp", (0, 0))
    for name in (".mine.tmp", "mine.1.tmp", f".whole.{gone.pid}.old"):
        (tmp_path / name).write_bytes(b"other")
        os.utime(tmp_path / name, (0, 0))
    files.sweep(tmp_path)
    left = {f".{name}.{kinds[name]}.tmp" for name in ("mine", "young", "filled")}
    assert {*names(tmp_path)} == left | {".mine.tmp", "mine.1.tmp", f".whole.{gone.pid}.old"}
    files.sweep(tmp_path / "none")


def test_sha256_is_the_usual_one(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "a") == expected


def test_files_needs_no_heavy_import():
    code = "import sys, selfsup.files; print({'torch', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
