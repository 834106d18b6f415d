"""Documents out of files, folders, globs and Hugging Face datasets, streamed with flat memory.

What a document is in which format stands in `formats.py`; a dataset gives a document per row.
"""

import glob
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from selfsup import console
from selfsup.data.formats import KNOWN, Split, format_of, fragments, text_of
from selfsup.errors import DataError, nearest

PART_CHARS = 100_000  # a longer document comes in parts, so that memory stays flat
HUB_PREFIX = "hf:"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Document:
    """A document, or one part of a long one.

    Attributes:
        text: its characters; empty documents are given too, so that they can be counted.
        origin: "file:place", place being the line, row or element from 1; "file" where the file
            is the document.
        number: number of the document in the source, from 0.
        part: 0, 1, ... inside a long document; the parts joined are the document.
    """

    text: str
    origin: str
    number: int
    part: int = 0


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hugging Face Hub, written "hf:owner/name[:config][:split]"."""

    name: str
    config: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        return ":".join([f"{HUB_PREFIX}{self.name}", self.config or "", self.split])


Item = str | Path | HubDataset
Source = Item | Sequence[Item]


def documents(
    source: Source,
    *,
    text_column: str = "text",
    split: Split = "file",
    part_chars: int = PART_CHARS,
) -> Iterator[Document]:
    """Every document of a source, in the order of the sorted file names.

    Args:
        source: a file, a folder (searched through), a glob, a dataset name, or a list of those.
        text_column: where the text is, in formats that have columns.
        split: what a document is in .txt files.
        part_chars: documents longer than that come in parts, cut at white space.

    Raises:
        DataError: nothing is found, or a file cannot be read; see `resolve`.
    """
    number = 0
    for item in resolve(source):
        if isinstance(item, HubDataset):
            pieces = _hub(item, text_column)
        else:
            pieces = fragments(item, text_column, split)
        for place, group in itertools.groupby(pieces, key=itemgetter(0)):
            origin = f"{item}:{place}" if place else str(item)
            texts = (text for _, text in group)
            for part, text in enumerate(_parts(texts, part_chars)):
                yield Document(text, origin, number, part)
            number += 1


def resolve(source: Source) -> list[Path | HubDataset]:
    """The files and datasets that a source names, each once; a warning names what is passed over.

    Raises:
        DataError: nothing is found, or a file has an unknown extension.
    """
    items = [source] if isinstance(source, Item) else list(source)
    found = [one for item in items for one in _resolve_one(item)]
    if not found:
        raise DataError(f"no data: the list of sources is empty; give files ({KNOWN})")
    return list(dict.fromkeys(found))


def _resolve_one(item: Item) -> list[Path | HubDataset]:
    if isinstance(item, HubDataset):
        return [item]
    text, path = str(item), Path(item).expanduser()
    if text.startswith(HUB_PREFIX):
        return [_hub_dataset(text.removeprefix(HUB_PREFIX))]
    if path.is_dir():
        inside = (p for p in sorted(path.rglob("*")) if p.is_file())
        visible = (p for p in inside if not _is_hidden(p.relative_to(path)))
        return _readable(visible, f"the folder {path}")
    if path.exists():
        if not format_of(path)[0]:
            raise DataError(f"{path}: unknown extension; known: {KNOWN}")
        return [path]
    if glob.has_magic(text):
        matches = sorted(glob.glob(str(path), recursive=True))
        return _readable((p for p in map(Path, matches) if p.is_file()), f"the pattern {text}")
    inside_folder = path.parent.name and path.parent.is_dir()  # rather a path with a slip
    if HUB_NAME.fullmatch(text) and not format_of(path)[0] and not inside_folder:
        return [_hub_dataset(text)]
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, siblings) if 0 < len(siblings) <= 20 else ""
    raise DataError(f"no file or folder {path}{hint}")


def _readable(paths: Iterable[Path], what: str) -> list[Path | HubDataset]:
    known: list[Path | HubDataset] = []
    other: list[Path] = []
    for path in paths:
        (known if format_of(path)[0] else other).append(path)
    names = ", ".join(path.name for path in other[:5]) + (", ..." if len(other) > 5 else "")
    if not known:
        others = f"; it gives {len(other)} other files: {names}" if other else ""
        raise DataError(f"{what} gives no file to read; looked for {KNOWN}{others}")
    if other:
        console.warn(f"{what}: {len(other)} files are not read (unknown extension): {names}")
    return known


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _parts(pieces: Iterable[str], limit: int) -> Iterator[str]:
    """The joined pieces again, in parts of at most `limit` characters cut at white space."""
    held, given = "", False
    for piece in pieces:
        held += piece
        while len(held) > limit:
            cut = max(held.rfind(space, limit // 2, limit) for space in " \n\t\u3000")
            if cut < 0:  # Chinese has no spaces, but sentences end
                cut = 1 + max(held.rfind(stop, limit // 2, limit) for stop in "。！？")
            cut = cut or limit
            yield held[:cut]
            held, given = held[cut:], True
    if held or not given:
        yield held


def _hub_dataset(text: str) -> HubDataset:
    name, *rest = text.split(":")
    if not name or len(rest) > 2:
        raise DataError(f"{HUB_PREFIX}{text}: write hf:owner/name, or hf:owner/name:config:split")
    config, split = [*rest, "", ""][:2]
    return HubDataset(name, config or None, split or "train")


def _hub(dataset: HubDataset, column: str) -> Iterator[tuple[int, str]]:
    what = f"no file or folder {dataset.name!r}, and the dataset {dataset}"
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{what} needs the package `datasets`: pip install 'selfsup[hub]'"
        ) from error
    try:
        rows = datasets.load_dataset(
            dataset.name, dataset.config, split=dataset.split, streaming=True
        )
        for number, row in enumerate(rows, start=1):
            yield number, text_of(row, column, f"{dataset}: row {number}")
    except DataError:
        raise
    except Exception as error:  # every layer below raises its own: network, hub, formats
        raise DataError(
            f"{what} cannot be opened ({type(error).__name__}: {error}). Check the name "
            "and the network, or give a path to files on this machine."
        ) from error
