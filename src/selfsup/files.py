"""Files that are either whole or not there: written aside, flushed, renamed."""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from selfsup.errors import StorageError

T = TypeVar("T")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)
ASIDE = re.compile(r"\..+\.(?P<process>\d+)\.(?P<kind>tmp|old)")
"""The names that `aside_name` gives."""
STALE = 600.0
"""Seconds without a change after which what a process of this number wrote is taken as left."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # constants of renameat2(2)


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals to write `path` into one clear `StorageError`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            where = path if path.is_dir() else path.parent
            while not where.exists():
                where = where.parent
            free = shutil.disk_usage(where).free / 2**20
            raise StorageError(
                f"{path}: no space left on the device ({free:.0f} MiB free). Nothing that was "
                "there before is lost; free some space, or choose another place, and run it again."
            ) from error
        if error.errno in REFUSED:
            raise StorageError(
                f"{path}: cannot be written ({error.strerror}); choose another place."
            ) from error
        raise


def is_full(error: StorageError) -> bool:
    """Whether what failed was a disk without space (or a quota), and not a place that refuses."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL


def flush_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def aside_name(path: Path, kind: str = "tmp") -> Path:
    """What stands beside `path` while it is written or removed; `old`: what it takes the place of.

    A killed process leaves it: `tmp` may go (`sweep`), `old` is put back where nothing took its
    place.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def is_alive(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def sweep(folder: Path) -> None:
    """Removes what killed processes have left half-written in a folder that several may use.

    What has changed in the last ten minutes stays: its process may live on another machine.
    """
    for path in folder.glob(".*.*.tmp"):
        match = ASIDE.fullmatch(path.name)
        if match is None or is_alive(int(match["process"])):
            continue
        with suppress(OSError):  # another one sweeps here too
            newest = max(part.stat().st_mtime for part in (path, *path.rglob("*")))
            if time.time() - newest > STALE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file that appears at `path` only when the block ends well.

    Yields a temporary name beside `path`; what the block wrote there is flushed and renamed.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    aside = aside_name(path)
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        flush_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole: to a temporary name beside it, flushed, renamed.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    with whole_file(path) as aside:
        aside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for JSON, with sorted layout and no NaN; names that are no UTF-8 survive."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))  # a lone surrogate as JSON escapes it


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at `path` only when the block ends well.

    Yields a temporary folder beside `path`; flushes every file in it, then renames it. On an error
    the temporary folder is removed. An older folder at `path` is replaced, on Linux in one step.
    """
    aside = aside_name(path)
    with storage(path):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
            for file in sorted(aside.rglob("*")):
                flush_folder(file)  # a file is flushed in the same way
            flush_folder(aside)
            if not path.exists():
                os.rename(aside, path)
            elif not exchange(aside, path):
                old = aside_name(path, "old")
                os.rename(path, old)
                os.rename(aside, path)
                shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        flush_folder(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    swap = getattr(ctypes.CDLL(None), "renameat2", None)  # musl has none
    if swap is None:
        return False
    return swap(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def remove_folder(path: Path) -> None:
    """Removes a folder that others may be reading: all of it is gone at once for them."""
    with storage(path):
        aside = aside_name(path)
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


def read_steadily(folder: Path, read: Callable[[], T]) -> T:
    """What `read` makes of a folder that a save may replace or remove at the same time.

    It reads again when another folder stands there afterwards than before: the files that it saw
    may be of both, and an error may only say that one of them was gone.
    """
    while True:
        before = _identity(folder)
        try:
            out = read()
        except Exception:
            if _identity(folder) == before:
                raise
            continue
        if _identity(folder) == before:
            return out


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
