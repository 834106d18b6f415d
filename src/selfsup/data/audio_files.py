"""Finding sounds: files, folders, globs and datasets, and what their paths say."""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from selfsup.cores import cores
from selfsup.data import sources
from selfsup.data.sources import HubDataset, Source, Wanted, fetched, opened
from selfsup.errors import DataError

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
WANTED = Wanted(
    what="sound",
    known=" ".join(SUFFIXES),
    reads=lambda path: path.suffix.lower() in SUFFIXES,
    refusal=" gives no sound; looked for",
)
WORKERS = min(8, cores())
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
    return sources.find(source, WANTED)


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
    with opened(dataset) as rows:
        import datasets

        features = rows.features or {}
        audio = [name for name, kind in features.items() if isinstance(kind, datasets.Audio)]
        column = audio[0] if audio else "audio"
        if features and column not in features:
            raise DataError(f"{dataset}: no column of sounds; columns: {', '.join(features)}")
        rows = rows.cast_column(column, datasets.Audio(decode=False))
        for number, row in enumerate(rows, start=1):
            content, path = row[column]["bytes"], row[column]["path"] or ""
            if content is None:
                content = fetched(path)
            yield f"{dataset}: row {number}", content, path
