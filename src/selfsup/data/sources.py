"""Where data lie: files, folders, globs and Hugging Face datasets, found alike for every kind.

| a source                    | what it gives                                                    |
|-----------------------------|------------------------------------------------------------------|
| a file                      | itself                                                           |
| a folder                    | every file below it that the kind reads, but no hidden ones      |
| a glob, say "in/**/*.txt"   | every file that matches and that the kind reads                  |
| s3://bucket/in/*.jsonl.zst  | text at an address that fsspec reads: a file, folder or pattern  |
| hf:owner/name:config:split  | a dataset of the Hugging Face Hub; config and split may be empty |
| owner/name                  | the same, where no such path exists                              |
| a list                      | all of these, in its order, each file once                       |

What a kind of data reads stands in its `Wanted` (`reading.py`, `image_files.py`, ...).
"""

import glob
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from selfsup import console
from selfsup.data.remote import HERE, RemoteFile, is_address, listing
from selfsup.errors import DataError, nearest

HUB_PREFIX = "hf:"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
FEW_SIBLINGS = 20  # with more files beside a missing one, its nearest name is mostly no slip


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hugging Face Hub, written "hf:owner/name[:config][:split]"."""

    name: str
    config: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        return ":".join([f"{HUB_PREFIX}{self.name}", self.config or "", self.split])


Item = str | Path | HubDataset | RemoteFile
Source = Item | Sequence[Item]
Place = Path | HubDataset | RemoteFile


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which files a kind of data reads, and how messages call them.

    Attributes:
        what: one of them: "sound".
        known: the extensions.
        reads: whether a file is read, by its name.
        beside: whether a file that is not read belongs to one that is, and needs no warning.
        refusal: what is said between the name of a single file that is not read and `known`.
        hub: datasets of the Hugging Face Hub are read too.
    """

    what: str
    known: str
    reads: Callable[[Any], bool]
    beside: Callable[[Any], bool] = lambda path: False
    refusal: str = ": unknown extension; known:"
    hub: bool = True


def listed(source: Source, wanted: Wanted) -> list[Item]:
    """A source as a list.

    Raises:
        DataError: the list is empty.
    """
    items = [source] if isinstance(source, Item) else list(source)
    if not items:
        raise DataError(f"no data: the list of sources is empty; give files ({wanted.known})")
    return items


def find(source: Source, wanted: Wanted) -> dict[Path | HubDataset, str]:
    """`find_anywhere` for kinds of data that are not read from addresses.

    Raises:
        DataError: as there; or a source is an address.
    """
    found: dict[Path | HubDataset, str] = {}
    for place, relative in find_anywhere(source, wanted).items():
        if isinstance(place, RemoteFile):
            raise DataError(f"{place}: only text is read from addresses; copy the files here first")
        found[place] = relative
    return found


def find_anywhere(source: Source, wanted: Wanted) -> dict[Place, str]:
    """The files and datasets that a source names, each once; a warning names what is passed over.

    Returns:
        by file its path relative to the folder, to what stands before a glob's first wildcard, or
        to its own folder; "" for a dataset.

    Raises:
        DataError: nothing is found, or a file has an unknown extension.
    """
    found: dict[Place, str] = {}
    for item in listed(source, wanted):
        for place, relative in _find_one(item, wanted):
            found.setdefault(place, relative)
    return found


def class_folders(
    found: dict[Path | HubDataset, str], least: int = 2
) -> dict[Path | HubDataset, str]:
    """The first-level folder of each file, its class; {} where a file lies in none.

    Args:
        found: as `find` gives it.
        least: fewer folders than that are no classes.
    """
    parts = {place: PurePath(relative).parts for place, relative in found.items()}
    if any(len(names) < 2 for names in parts.values()):
        return {}
    folders = {place: names[0] for place, names in parts.items()}
    return folders if len(set(folders.values())) >= least else {}


def size_of(place: Place) -> int | None:
    """Bytes of a file as it lies, packed or not; None where nobody says."""
    if isinstance(place, HubDataset):
        return None
    return place.size if isinstance(place, RemoteFile) else place.stat().st_size


def source_fingerprint(places: Iterable[Place], key: dict[str, Any]) -> str:
    """32 hexadecimal digits for these files (names, sizes, times or versions) and settings."""
    described: list[Any] = []
    for place in places:
        if isinstance(place, HubDataset):
            described.append(str(place))
        elif isinstance(place, RemoteFile):
            described.append([place.address, place.size, place.version])
        else:
            state = place.stat()
            described.append([str(place.resolve()), state.st_size, state.st_mtime_ns])
    return hashlib.sha256(json.dumps([described, key]).encode()).hexdigest()[:32]


def _find_one(item: Item, wanted: Wanted) -> list[tuple[Place, str]]:
    if isinstance(item, RemoteFile):
        return [(item, item.name)]
    if isinstance(item, str) and item.startswith(HERE):
        item = item.removeprefix(HERE)
    if is_address(item):
        return _at_address(str(item), wanted)
    if isinstance(item, HubDataset) or str(item).startswith(HUB_PREFIX):
        return [(_hub_dataset(item, wanted), "")]
    text, path = str(item), Path(item).expanduser()
    if path.is_dir():
        inside = [p for p in sorted(path.rglob("*")) if p.is_file()]
        visible = [(p, p.relative_to(path).as_posix()) for p in inside]
        visible = [(p, relative) for p, relative in visible if not _is_hidden(relative)]
        return _readable(visible, f"the folder {path}", wanted)
    if path.exists():
        if not wanted.reads(path):
            raise DataError(f"{path}{wanted.refusal} {wanted.known}")
        return [(path, path.name)]
    if glob.has_magic(text):
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        root = Path(*fixed)
        files = [(m, m.relative_to(root).as_posix()) for m in matches if m.is_file()]
        return _readable(files, f"the pattern {text}", wanted)
    inside_folder = path.parent.name and path.parent.is_dir()  # rather a path with a slip
    if wanted.hub and HUB_NAME.fullmatch(text) and not wanted.reads(path) and not inside_folder:
        return [(_hub_dataset(text, wanted), "")]
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, siblings) if 0 < len(siblings) <= FEW_SIBLINGS else ""
    raise DataError(f"no file or folder {path}{hint}")


def _at_address(address: str, wanted: Wanted) -> list[tuple[Place, str]]:
    found, is_file = listing(address)
    if is_file and not wanted.reads(found[0][0]):
        raise DataError(f"{address}{wanted.refusal} {wanted.known}")
    visible = [(file, relative) for file, relative in found if not _is_hidden(relative)]
    return _readable(visible, f"the address {address}", wanted)


def _readable(
    found: Sequence[tuple[Path | RemoteFile, str]], what: str, wanted: Wanted
) -> list[tuple[Place, str]]:
    known: list[tuple[Place, str]] = [pair for pair in found if wanted.reads(pair[0])]
    other = [f.name for f, _ in found if not wanted.reads(f) and not wanted.beside(f)]
    names = ", ".join(other[:5]) + (", ..." if len(other) > 5 else "")
    if not known:
        others = f"; it gives {len(other)} other files: {names}" if other else ""
        raise DataError(f"{what} gives no {wanted.what}; looked for {wanted.known}{others}")
    if other:
        console.warn(f"{what}: {len(other)} files are not read (unknown extension): {names}")
    return known


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


# The Hugging Face Hub


def _hub_dataset(item: Item, wanted: Wanted) -> HubDataset:
    if not wanted.hub:
        raise DataError(f"{item}: datasets of the Hub are not read here; give {wanted.known} files")
    if isinstance(item, HubDataset):
        return item
    name, *rest = str(item).removeprefix(HUB_PREFIX).split(":")
    if not name or len(rest) > 2:
        raise DataError(f"{item}: write hf:owner/name, or hf:owner/name:config:split")
    config, split = [*rest, "", ""][:2]
    return HubDataset(name, config or None, split or "train")


@contextmanager
def opened(dataset: HubDataset) -> Iterator[Any]:
    """The rows of a dataset, streamed; what goes wrong while they are read becomes a `DataError`.

    Raises:
        DataError: the package is missing, or the dataset cannot be opened or read.
    """
    what = f"no file or folder {dataset.name!r}, and the dataset {dataset}"
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{what} needs the package `datasets`: pip install 'selfsup[hub]'"
        ) from error
    try:
        yield datasets.load_dataset(
            dataset.name, dataset.config, split=dataset.split, streaming=True
        )
    except DataError:
        raise
    except Exception as error:  # every layer below raises its own: network, hub, formats
        raise DataError(
            f"{what} cannot be opened ({type(error).__name__}: {error}). Check the name "
            "and the network, or give a path to files on this machine."
        ) from error


def fetched(path: str) -> bytes:
    """The content of a file of a dataset, which often lies inside an archive."""
    import fsspec

    with fsspec.open(path, "rb") as file:
        return file.read()
