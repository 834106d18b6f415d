"""Finding sounds: files, folders, globs and datasets, and what their paths say."""

import glob
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import NamedTuple, TypeVar

from selfsup import console
from selfsup.data import reading
from selfsup.data.reading import HUB_PREFIX, HubDataset, Source
from selfsup.errors import DataError, nearest

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
WORKERS = min(8, cpu_count() or 1)
T = TypeVar("T")
R = TypeVar("R")


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]
) -> Iterator[R]:
    """As `map`, in threads, but it takes items only as results are taken: memory stays flat."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > 2 * WORKERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Item(NamedTuple):
    """A sound that was found: its name for messages, where it lies, what its path says."""

    name: str
    content: Path | bytes
    folder: str = ""
    label: str = ""
    group: str = ""


def find(source: Source) -> dict[Path | HubDataset, str]:
    """The files and datasets that a source names, each with its path relative to the source.

    Raises:
        DataError: nothing is found, or a file has an unknown extension.
    """
    sources = [source] if isinstance(source, reading.Item) else list(source)
    found: dict[Path | HubDataset, str] = {}
    for one in sources:
        for item, relative in _find_one(one):
            found.setdefault(item, relative)
    if not found:
        raise DataError(f"no data: the list of sources is empty; give files ({' '.join(SUFFIXES)})")
    return found


def _find_one(source: reading.Item) -> list[tuple[Path | HubDataset, str]]:
    if isinstance(source, HubDataset) or str(source).startswith(HUB_PREFIX):
        return [(item, "") for item in reading.resolve(source)]
    path = Path(source).expanduser()
    if path.is_dir():
        inside = [p for p in sorted(path.rglob("*")) if p.is_file()]
        visible = [p for p in inside if not any(s[0] == "." for s in p.relative_to(path).parts)]
        return _sounds(visible, path, f"the folder {path}")
    if path.exists():
        return _sounds([path], path.parent, str(path))
    if glob.has_magic(str(source)):
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        matches = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        return _sounds([p for p in matches if p.is_file()], Path(*fixed), f"the pattern {source}")
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, siblings) if 0 < len(siblings) <= 20 else ""
    raise DataError(
        f"no file or folder {path}{hint}; a dataset of the Hugging Face Hub is written "
        f"{HUB_PREFIX}owner/name"
    )


def _sounds(paths: list[Path], root: Path, what: str) -> list[tuple[Path | HubDataset, str]]:
    known = [path for path in paths if path.suffix.lower() in SUFFIXES]
    other = [path.name for path in paths if path.suffix.lower() not in SUFFIXES]
    names = ", ".join(other[:5]) + (", ..." if len(other) > 5 else "")
    if not known:
        others = f"; it gives {len(other)} other files: {names}" if other else ""
        raise DataError(f"{what} gives no sound; looked for {' '.join(SUFFIXES)}{others}")
    if other:
        console.warn(f"{what}: {len(other)} files are not read (unknown extension): {names}")
    return [(path, path.relative_to(root).as_posix()) for path in known]


def path_says(pattern: re.Pattern[str] | None, relative: str, name: str) -> dict[str, str]:
    """What the pattern finds in a path: `label` and `group`, "" for what did not take part."""
    if pattern is None:
        return {}
    match = pattern.search(relative)
    if match is None:
        raise DataError(
            f"{name}: its path {relative!r} does not match the pattern {pattern.pattern!r}; "
            "mend the pattern, or give only files that match"
        )
    return {key: value or "" for key, value in match.groupdict().items()}


def found_items(found: dict[Path | HubDataset, str], pattern: str) -> Iterator[Item]:
    """Every sound of what was found, with what the pattern finds in its path."""
    compiled = re.compile(pattern) if pattern else None
    for item, relative in found.items():
        if isinstance(item, HubDataset):
            for name, content, path in _hub_rows(item):
                yield Item(name, content, str(item), **path_says(compiled, path, name))
        else:
            says = path_says(compiled, relative, str(item))
            yield Item(str(item), item, str(item.parent), **says)


def _hub_rows(dataset: HubDataset) -> Iterator[tuple[str, bytes, str]]:
    """(name, content, path) of every row of a dataset with an audio column."""
    try:
        import datasets
        import fsspec
    except ImportError as error:
        raise DataError(
            f"the dataset {dataset} needs the package `datasets`: pip install 'selfsup[hub]'"
        ) from error
    try:
        rows = datasets.load_dataset(
            dataset.name, dataset.config, split=dataset.split, streaming=True
        )
        columns = rows.features or {}
        audio = [name for name, kind in columns.items() if isinstance(kind, datasets.Audio)]
        column = audio[0] if audio else "audio"
        rows = rows.cast_column(column, datasets.Audio(decode=False))
        for number, row in enumerate(rows, start=1):
            content, path = row[column]["bytes"], row[column]["path"] or ""
            if content is None:
                with fsspec.open(path, "rb") as file:
                    content = file.read()
            yield f"{dataset}: row {number}", content, path
    except Exception as error:  # every layer below raises its own: network, hub, formats
        raise DataError(
            f"the dataset {dataset} cannot be opened ({type(error).__name__}: {error}). It needs "
            "a column of sounds. Check the name and the network, or give a path to files on this "
            "machine."
        ) from error
