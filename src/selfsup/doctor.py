"""What `selfsup doctor` says: is the installation well, is the data readable, is a run whole?"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from selfsup import environment
from selfsup.errors import CheckpointError, DataError


def examine(path: str | None, text_column: str = "text") -> Iterator[str]:
    """One line per finding.

    Args:
        path: a run folder, or data; None: the installation.
        text_column: where the text is, in data with columns.

    Raises:
        DataError: the data cannot be read.
        CheckpointError: the run is damaged.
    """
    if path is None:
        yield from _installation()
    elif (Path(path) / "run.toml").is_file() or (Path(path) / "checkpoints").is_dir():
        yield from _run(Path(path))
    else:
        yield from _data(path, text_column)


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


def _data(path: str, text_column: str) -> Iterator[str]:
    from selfsup.data.reading import documents

    count = characters = empty = 0
    digests: set[int] = set()
    duplicates = 0
    last = -1
    for document in documents(path, text_column=text_column):
        characters += len(document.text)
        if document.number != last:
            count, last = count + 1, document.number
            digest = hash(document.text)
            duplicates += digest in digests
            digests.add(digest)
            empty += not document.text.strip()
    if count == empty:
        raise DataError(f"{path}: {count} documents, all empty")
    yield f"{'readable':<14} yes, all of it"
    yield f"{'documents':<14} {count:,}"
    yield f"{'empty':<14} {empty:,}"
    yield f"{'duplicates':<14} {duplicates:,}"
    yield f"{'characters':<14} {characters:,} (about {characters // 4:,} tokens of English)"


def _run(path: Path) -> Iterator[str]:
    from selfsup.model_folder import load_model
    from selfsup.training.checkpoint import checkpoint_paths, verify

    damaged = []
    paths = checkpoint_paths(path / "checkpoints")
    for checkpoint in paths:
        try:
            verify(checkpoint)
            step = json.loads((checkpoint / "state.json").read_text())["step"]
            yield f"{checkpoint.name:<14} whole, step {step}"
        except CheckpointError as error:
            damaged.append(str(error))
            yield f"{checkpoint.name:<14} DAMAGED: {error}"
    if (path / "model").is_dir():
        load_model(path, "cpu")
        yield f"{'model':<14} loads"
    else:
        yield f"{'model':<14} none yet: the run is not finished; go on with --resume"
    if paths and len(damaged) == len(paths):
        raise CheckpointError(f"{path}: every checkpoint is damaged")
