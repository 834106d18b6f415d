"""What `selfsup doctor RUN` finds in a run folder: every file is read, every hash is compared."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from selfsup.config import read_toml
from selfsup.errors import CheckpointError, ConfigError, SelfsupError
from selfsup.files import ASIDE, is_alive
from selfsup.model_folder import load_model
from selfsup.training.checkpoint import Checkpoint, checkpoint_paths, load_checkpoint
from selfsup.training.folder import left_over, read_rows


class Finding(NamedTuple):
    """One line: about what, what is found, and whether it is damage."""

    name: str
    said: str
    damaged: bool = False


def examine_run(path: Path) -> Iterator[Finding]:
    """Every part of the run folder `path`; damage is named together with what to do about it."""
    yield _description(path)
    state: dict[str, Any] = {}
    checkpoints = checkpoint_paths(path / "checkpoints")
    if not checkpoints and not (path / "model").is_dir():
        state = {"metrics_bytes": 0, "speed_bytes": 0}  # it begins again
    for checkpoint in checkpoints:
        try:
            found = load_checkpoint(checkpoint)
            _check_names(checkpoint, found)
        except CheckpointError as error:
            if checkpoint.exists():  # or else a save removed it meanwhile
                said = f"{error}; remove this folder: --resume uses the newest one that is whole"
                yield Finding(checkpoint.name, said, True)
            continue
        state = found.state
        yield Finding(checkpoint.name, f"whole, step {state['step']}")
    if checkpoints and not state:
        said = f"{path}: every checkpoint is damaged; begin anew with another --out"
        yield Finding("checkpoints", said, True)
    for key in ("metrics", "speed"):
        yield from _rows(path / f"{key}.jsonl", state.get(f"{key}_bytes"), state.get("step"))
    yield _model(path)
    for file in sorted(path.glob("*.json")):
        yield from _json(file)
    for left in left_over(path):
        yield _left_over(left)


def _description(path: Path) -> Finding:
    try:
        values = read_toml(path / "run.toml")
        if not values:
            raise ConfigError(f"{path / 'run.toml'}: empty")
    except ConfigError as error:
        hint = "the command that made it, with --resume, writes it again"
        return Finding("run.toml", f"{error}; {hint}", True)
    return Finding("run.toml", f"readable, sections {', '.join(values)}")


def _check_names(path: Path, found: Checkpoint) -> None:
    """Moments of no weight: files of different runs that were put together."""
    strange = [n for n in found.optimizer if n.rpartition("|")[0] not in found.weights]
    if strange:
        raise CheckpointError(f"{path}: optimizer.safetensors: {strange[0]!r} is of no weight")


def _rows(path: Path, size: int | None, step: int | None) -> Iterator[Finding]:
    """A file of rows, `size` bytes of which belong to the newest whole checkpoint, of `step`."""
    if not path.exists() and not size:
        return
    try:
        rows = read_rows(path, size)
        _check_rows(path, rows, step)
    except OSError as error:
        yield Finding(path.name, f"{path}: cannot be read ({error.strerror})", True)
    except CheckpointError as error:
        yield Finding(path.name, str(error), True)
    else:
        later = path.stat().st_size - size if size is not None else 0
        more = f"; {later:,} bytes after the newest checkpoint, which --resume makes again"
        yield Finding(path.name, f"{len(rows):,} rows{more if later else ''}")


def _check_rows(path: Path, rows: list[dict[str, Any]], last: int | None) -> None:
    """Every row has a step, later than that of the row before of its split, and finite numbers."""
    before: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        step, split = row.get("step"), str(row.get("split"))
        if not isinstance(step, int):
            raise CheckpointError(f"{path}:{number}: a row without a step")
        if step <= before.get(split, -1):
            raise CheckpointError(f"{path}:{number}: step {step} comes after {before[split]}")
        if last is not None and step > last:
            raise CheckpointError(f"{path}:{number}: step {step}, and the checkpoint is of {last}")
        strange = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
        if strange:
            raise CheckpointError(f"{path}:{number}: {strange[0]} is not finite")
        before[split] = step


def _model(path: Path) -> Finding:
    if not (path / "model").is_dir():
        return Finding("model", "none yet: the run is not finished; go on with --resume")
    try:
        load_model(path, "cpu")
    except SelfsupError as error:
        hint = "the command that made it, with --resume, writes it again"
        return Finding("model", f"{error}; {hint}", True)
    return Finding("model", "loads")


def _json(path: Path) -> Iterator[Finding]:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        said = f"{path}: not JSON ({error}); remove it and give the command that made it again"
        yield Finding(path.name, said, True)


def _left_over(path: Path) -> Finding:
    match = ASIDE.fullmatch(path.name)
    assert match is not None
    if is_alive(int(match["process"])):
        said = f"{path}: being written by process {match['process']}"
    else:
        said = f"{path}: left by a process that was killed; --resume removes it, or do so yourself"
    return Finding("left over", said)
