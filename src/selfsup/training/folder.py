"""The run folder, a public format: what one training leaves behind.

run.toml         resolved configuration, command, environment, facts; loading it executes nothing
metrics.jsonl    one row per logged step: bit-equal between equal runs, resumed or not
speed.jsonl      seconds, throughput and data wait of the same steps: never bit-equal
warnings.json    what the guard said
checkpoints/     see checkpoint.py
model/           what a user keeps
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from selfsup import console
from selfsup.errors import CheckpointError, ConfigError
from selfsup.files import ASIDE, storage, write_json


class RunFolder:
    """One run's folder, held by one process at a time.

    Args:
        path: the folder.
        resume: go on in a folder that exists; otherwise it must be new or empty.

    Raises:
        ConfigError: the folder exists and `resume` is not asked for, another process holds it, or
            its path begins with ~.
    """

    def __init__(self, path: Path, resume: bool = False):
        self.path = path
        if path.parts[:1] and path.parts[0].startswith("~"):
            raise ConfigError(f"{path}: ~ is not expanded here; write the whole path")
        if resume and not path.exists():
            console.say(f"{path}: nothing is there to go on with; the run begins")
        with storage(path):
            if path.exists() and not path.is_dir():
                raise ConfigError(f"{path} is a file; --out needs a folder")
            if not resume and path.exists() and any(p.name != ".lock" for p in path.iterdir()):
                raise ConfigError(
                    f"{path} exists already: give --resume to go on with it, or another --out"
                )
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "w")  # noqa: SIM115 (held for the object's life)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ConfigError(f"{path} is in use by another selfsup process") from None
        self._sweep()

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    def _sweep(self) -> None:
        """Removes what a killed process left half-written; nobody else writes here now."""
        for left in left_over(self.path):
            name, _, kind = left.name[1:].rsplit(".", 2)
            if kind == "old" and not left.with_name(name).exists():
                left.rename(left.with_name(name))
            elif left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    def warnings(self, texts: list[str]) -> None:
        """Replaces the list of warnings that the report shows."""
        write_json(self.path / "warnings.json", texts)

    def close(self) -> None:
        """Lets the folder go."""
        self._lock.close()


def left_over(run: Path) -> list[Path]:
    """What stands in a run folder under a name of `files.aside_name`."""
    folders = (run, run / "checkpoints")
    return sorted(p for folder in folders for p in folder.glob(".*.*") if ASIDE.fullmatch(p.name))


class Rows:
    """Append-only JSON lines: in memory always, in a file when there is a folder.

    Args:
        path: the file, or None.
        size: bytes of the file that belong to the checkpoint one resumes from; the rest, rows of
            steps that will be made again, is cut off.
    """

    def __init__(self, path: Path | None, size: int = 0):
        self.path, self.rows = path, list[dict[str, Any]]()
        self.file = None
        if path is None:
            return
        with storage(path):
            self.file = open(path, "ab")  # noqa: SIM115 (open as long as the run)
            try:
                self.rows = read_rows(path, size)
            except CheckpointError:
                self.file.close()
                raise
            self.file.truncate(size)
            self.file.seek(size)

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends one row."""
        self.rows.append(dict(row))
        if self.file is not None and self.path is not None:
            with storage(self.path):
                self.file.write((json.dumps(row, allow_nan=False) + "\n").encode())
                self.file.flush()

    def flushed_size(self) -> int:
        """Makes all rows durable; gives the size of the file in bytes."""
        if self.file is None or self.path is None:
            return 0
        with storage(self.path):
            os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        """Lets the file go; the rows stay."""
        if self.file is not None:
            with suppress(OSError):  # what could not be written was reported by `add`
                self.file.close()


def read_rows(path: Path, size: int | None = None) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, or of its first `size` bytes.

    Raises:
        CheckpointError: it is shorter, or a line is no row; the line is named.
    """
    hint = "put the whole file back, or begin anew with another --out"
    content = path.read_bytes()
    if size is not None and len(content) < size:
        raise CheckpointError(
            f"{path}: shorter than the checkpoint says, so rows were lost; {hint}"
        )
    *lines, rest = content[:size].split(b"\n")
    rows = []
    for number, line in enumerate([*lines, rest] if rest else lines, start=1):
        try:
            rows.append(dict(json.loads(line).items()))
        except (ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}:{number}: not a row of JSON; {hint}") from error
    if rest:
        raise CheckpointError(f"{path}:{len(rows)}: the row is cut at its end; {hint}")
    return rows
