"""What `selfsup doctor` says: is the installation well, are data readable, is a run whole?"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from selfsup import environment
from selfsup.errors import CheckpointError, ConfigError, nearest

PARTS = ("run.toml", "checkpoints", "metrics.jsonl", "model/config.toml")
"""Any of these makes a folder a run."""


def examine(path: str | None, text_column: str = "text", kind: str | None = None) -> Iterator[str]:
    """One line per finding.

    Args:
        path: the folder of a run or an index, or data; None: the installation.
        text_column: where the text is, in data with columns.
        kind: of the data: text, image, audio, table or series; None: guessed.

    Raises:
        DataError: the data cannot be read, or too much of them cannot be used.
        ConfigError: another kind.
        CheckpointError: a part of the run is damaged; all are named before. Or the index is.
    """
    if path is None:
        yield from _installation()
    elif any((Path(path) / name).exists() for name in PARTS):
        yield from _run(Path(path))
    elif (Path(path) / "index.toml").exists():
        yield _index(path)
    else:
        yield from _data(path, text_column, kind)


def _installation() -> Iterator[str]:
    import torch

    from selfsup.data.store import default_cache
    from selfsup.training.device import pick_device, pick_dtype

    for name, version in environment.versions().items():
        yield f"{name:<14} {version}"
    for name, fact in environment.machine().items():
        yield f"{name:<14} {fact}"
    device = pick_device("auto")
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    yield f"{'trains on':<14} {device} in {dtype}"
    cache = default_cache()
    where = cache
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free / 2**30
    writable = "" if os.access(where, os.W_OK) else ", NOT WRITABLE: set SELFSUP_CACHE"
    yield f"{'cache':<14} {cache} ({free:.0f} GiB free{writable})"
    total = float(torch.ones(8).sum())
    yield f"{'torch':<14} {'computes' if total == 8 else 'gives wrong sums'}"


def _data(path: str, text_column: str, kind: str | None) -> Iterator[str]:
    from selfsup.data import examination, table_examination

    if kind not in (None, *examination.KINDS):
        raise ConfigError(f"--kind {kind}: unknown{nearest(str(kind), examination.KINDS)}")
    said = f"{kind}, as given"
    if kind is None:
        kind, reason = examination.guess_kind(path, text_column)
        said = f"{kind}, {reason}; for another one say --kind"
    if kind == "text":
        lines = examination.examine_text(path, text_column)
    elif kind == "image":
        lines = examination.examine_images(path)
    elif kind == "audio":
        lines = examination.examine_sounds(path)
    elif kind == "table":
        lines = table_examination.examine_tables(path)
    else:
        lines = table_examination.examine_series(path)
    first = next(lines)  # what cannot be read at all ends here, before anything is said
    yield f"{'kind':<14} {said}"
    yield first
    yield from lines


def _index(path: str) -> str:
    from selfsup.vector_index import VectorIndex

    index = VectorIndex(path)
    items, dim = index.vectors.shape
    return f"{'index':<14} whole, {index.kind}, {items:,} vectors of {dim} numbers"


def _run(path: Path) -> Iterator[str]:
    from selfsup.run_examination import examine_run

    damage = []
    for name, said, damaged in examine_run(path):
        yield f"{name:<14} {'DAMAGED: ' if damaged else ''}{said}"
        damage += [said] if damaged else []
    if len(damage) == 1:
        raise CheckpointError(damage[0])
    if damage:
        raise CheckpointError(f"{path}: {len(damage)} parts are damaged: the lines above name them")
