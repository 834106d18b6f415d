"""Documents out of files, folders, globs, addresses and Hub datasets, streamed with flat memory.

What a document is in which format stands in `formats.py`; a dataset gives a document per row.

What cannot be read of a corpus (a line, row or element that is damaged, not UTF-8 or without its
text) is an error, or is counted and left out, as the caller wishes.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from selfsup.data.bad_items import BadItems
from selfsup.data.formats import (
    KNOWN,
    Split,
    Take,
    format_of,
    fragments,
    or_error,
    record_of,
    records,
    text_of,
)
from selfsup.data.sources import HubDataset, Place, Source, Wanted, find_anywhere, opened
from selfsup.errors import DataError

PART_CHARS = 100_000  # a longer document comes in parts, so that memory stays flat
HOPELESS = 100  # with so many bad records and no good one at its beginning, a file is refused
WANTED = Wanted(what="file to read", known=KNOWN, reads=lambda path: bool(format_of(path)[0]))


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


def documents(
    source: Source,
    *,
    text_column: str = "text",
    split: Split = "file",
    part_chars: int = PART_CHARS,
    bad: BadItems | None = None,
) -> Iterator[Document]:
    """Every document of a source, in the order of the sorted file names.

    Args:
        source: a file, a folder (searched through), a glob, an address, a dataset name, or a list.
        text_column: where the text is, in formats that have columns.
        split: what a document is in .txt files.
        part_chars: documents longer than that come in parts, cut at white space.
        bad: counts what cannot be used, which is left out: lines of .txt files, elsewhere
            documents; None: the first one is an error.

    Raises:
        DataError: nothing is found, or a file cannot be read; see `resolve`. Of a file with columns
            the first 100 records or all are bad: then the column is wrong, or the format.
    """
    number = 0
    for item in resolve(source):
        if isinstance(item, HubDataset):
            pieces = _hub(item, text_column, text_of)
        else:
            pieces = fragments(item, text_column, split)
        for place, group in itertools.groupby(_sound(item, pieces, bad), key=itemgetter(0)):
            origin = f"{item}:{place}" if place else str(item)
            texts = (text for _, text in group)
            for part, text in enumerate(_parts(texts, part_chars)):
                yield Document(text, origin, number, part)
            number += 1


def document_records(
    source: Source,
    *,
    text_column: str = "text",
    split: Split = "file",
    bad: BadItems | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every document with all its columns, whole: (origin, record), in the order of `documents`.

    Raises:
        DataError: as `documents`.
    """
    for item in resolve(source):
        if isinstance(item, HubDataset):
            found = _hub(item, text_column, record_of)
        elif _has_columns(item):
            found = records(item, text_column)
        else:
            pieces = _sound(item, fragments(item, text_column, split), bad)
            for place, group in itertools.groupby(pieces, key=itemgetter(0)):
                record = {text_column: "".join(text for _, text in group)}
                yield f"{item}:{place}" if place else str(item), record
            continue
        for place, record in _sound(item, found, bad):
            yield f"{item}:{place}", record


def resolve(source: Source) -> list[Place]:
    """The files and datasets that a source names, each once; a warning names what is passed over.

    Raises:
        DataError: nothing is found, or a file has an unknown extension.
    """
    return list(find_anywhere(source, WANTED))


def _has_columns(item: Place) -> bool:
    return isinstance(item, HubDataset) or format_of(item)[0] != ".txt"


def _sound(
    item: Place, pieces: Iterator[tuple[int, Any]], bad: BadItems | None
) -> Iterator[tuple[int, Any]]:
    """The pieces of one file or dataset that can be used; the others are counted, or raised."""
    has_columns = _has_columns(item)
    good = lost = 0
    first: DataError | None = None
    for place, piece in pieces:
        if not isinstance(piece, DataError):
            good += 1
            if bad is not None:  # place 0: a stretch of many lines
                bad.total += 1 if place else piece.count("\n") + (not piece.endswith("\n"))
            yield place, piece
            continue
        if bad is None:
            raise piece
        bad.total += 1
        bad.more(1, [str(piece).partition("; ")[0]])  # without what is to be done
        first, lost = first or piece, lost + 1
        if has_columns and not good and lost == HOPELESS:
            break
    if has_columns and not good and first is not None:
        raise first


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


def _hub(dataset: HubDataset, column: str, take: Take) -> Iterator[tuple[int, Any]]:
    with opened(dataset) as rows:
        for number, row in enumerate(rows, start=1):
            yield number, or_error(take, row, column, f"{dataset}: row {number}")
