"""Files that are either whole or not there: written aside, flushed, renamed."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfsup.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)


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


def flush_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole: to a temporary name beside it, flushed, renamed.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for JSON, with sorted layout and no NaN."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at `path` only when the block ends well.

    Yields a temporary folder beside `path`; flushes every file in it, then renames it. On an error
    the temporary folder is removed. An older folder at `path` is replaced.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage(path):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
            for file in sorted(aside.rglob("*")):
                if file.is_file():
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
            flush_folder(aside)
            if path.exists():
                old = path.with_name(f".{path.name}.{os.getpid()}.old")
                os.rename(path, old)
                os.rename(aside, path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        flush_folder(path.parent)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
