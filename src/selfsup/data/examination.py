"""What a source of data holds, for `selfsup doctor`: every item is read, decoded and counted.

Nothing is kept of an item but some numbers and a hash. Tables and series are in
`table_examination.py`.
"""

import hashlib
import io
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from selfsup import console
from selfsup.data import audio_files, image_files
from selfsup.data.bad_items import BadItems
from selfsup.data.formats import format_of
from selfsup.data.labels import class_order
from selfsup.data.series_files import TIME
from selfsup.data.sources import HubDataset, Wanted, class_folders, find
from selfsup.data.table_files import kind_of
from selfsup.data.unpacking import decoded_text
from selfsup.errors import DataError

KINDS = ("text", "image", "audio", "table", "series")
ANY = Wanted(what="file", known="any extension", reads=Path.is_file)
NAMED = 3  # items of one reason
MANY_CLASSES = 20


def line(name: str, value: object) -> str:
    """One finding."""
    return f"{name:<14} {value}"


# Which kind it is


def guess_kind(source: str, text_column: str) -> tuple[str, str]:
    """The kind of data by the names of its files, and for tables by their columns; and why.

    Raises:
        DataError: nothing is found, or nothing that any kind reads.
    """
    places = list(find(source, ANY))
    if not isinstance(places[0], Path):
        return "text", "as a dataset of the Hub is taken for"
    paths = [place for place in places if isinstance(place, Path)]
    kinds = {path: _kind_by_name(path) for path in paths}
    counts = Counter(kind for kind in kinds.values() if kind)
    if not counts:
        names = ", ".join(path.name for path in paths[:5])
        raise DataError(f"{source}: no kind of data reads files like {names}")
    kind, count = counts.most_common(1)[0]
    if kind != "columns":
        return kind, f"by the names of {count:,} of {len(paths):,} files"
    first = next(path for path in paths if kinds[path] == "columns")
    return _kind_by_columns(first, text_column), f"by the columns of {first.name}"


def _kind_by_name(path: Path) -> str:
    """A kind, "columns" where its columns decide, or ""."""
    suffix, compression = format_of(path)
    if suffix in (".csv", ".tsv") or (suffix == ".parquet" and not compression):
        return "columns"
    if audio_files.WANTED.reads(path):
        return "audio"
    if image_files.WANTED.reads(path):
        return "image"
    if kind_of(path, (".ts",)):
        return "series"
    if kind_of(path, (".npz", ".npy")):
        return "table"
    return "text" if suffix else ""


def _kind_by_columns(path: Path, text_column: str) -> str:
    suffix = format_of(path)[0]
    if suffix == ".parquet":
        columns = image_files.columns_of(path)
    else:
        with decoded_text(path) as stream:
            columns = re.split("," if suffix == ".csv" else "\t", stream.readline().strip())
    names = [name.strip('" ').lower() for name in columns]
    if text_column.lower() in names:
        return "text"
    if suffix == ".parquet" and "image" in names:
        return "image"
    return "series" if set(names) & set(TIME) else "table"


# What is counted of every kind


@dataclass
class Tally:
    """Good and bad items, copies and classes, counted while the items go by."""

    source: str
    total: int = 0
    reasons: dict[str, list[str]] = field(default_factory=dict)
    digests: set[bytes] = field(default_factory=set)
    duplicates: int = 0
    classes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.bad = BadItems(self.source)

    def reject(self, name: str, reason: str) -> None:
        """An item that cannot be used."""
        self.total += 1
        self.bad.add(name, reason)
        # reasons that differ in numbers and in brackets are one
        alike = re.sub(r"(?<!= )(?<![\d.,])\d[\d.,]*", "N", reason.split(" (")[0])
        self.reasons.setdefault(alike, []).append(name)

    def keep(self, content: bytes, label: str = "") -> None:
        """A good item."""
        self.total += 1
        digest = hashlib.blake2b(content, digest_size=8).digest()
        self.duplicates += digest in self.digests
        self.digests.add(digest)
        self.classes[label] += 1

    def lines(self, what: str) -> Iterator[str]:
        """What was counted.

        Args:
            what: the items, in the plural.
        """
        bad = self.bad.count
        good = self.total - bad
        yield line("readable", f"{good:,} of {self.total:,}" if bad else "yes, all of it")
        for reason, names in sorted(self.reasons.items(), key=lambda pair: -len(pair[1])):
            named = ", ".join(names[:NAMED]) + ", ..." * (len(names) > NAMED)
            yield line("not usable", f"{len(names):,}: {reason} ({named})")
        yield line(what, f"{good:,}")
        yield line("duplicates", f"{self.duplicates:,}")
        missing = self.classes.pop("", 0)
        if self.classes:
            yield line("classes", _named_counts(self.classes))
            if missing:
                yield line("without class", f"{missing:,}")


def _named_counts(counts: Counter[str]) -> str:
    names = sorted(counts, key=class_order)
    shown = ", ".join(f"{name} {counts[name]:,}" for name in names[:MANY_CLASSES])
    return f"{len(names):,}: {shown}" + ", ..." * (len(names) > MANY_CLASSES)


# Kinds


def examine_text(source: str, text_column: str) -> Iterator[str]:
    """Counts of documents and characters.

    Raises:
        DataError: a file cannot be read, more than 2% of the items cannot, or every document is
            empty.
    """
    from selfsup.data.reading import documents

    count = characters = empty = duplicates = 0
    digests: set[bytes] = set()
    bad = BadItems(source)
    stream = documents(source, text_column=text_column, bad=bad)
    for _, parts in itertools.groupby(stream, key=lambda document: document.number):
        digest, blank = hashlib.blake2b(digest_size=8), True
        for document in parts:
            digest.update(document.text.encode())
            characters += len(document.text)
            blank = blank and not document.text.strip()
        count, empty = count + 1, empty + blank
        duplicates += digest.digest() in digests
        digests.add(digest.digest())
    if count == empty:
        bad.check()
        raise DataError(f"{source}: {count} documents, all empty")
    good = bad.total - bad.count
    yield line("readable", f"{good:,} of {bad.total:,}" if bad.count else "yes, all of it")
    for example in bad.examples:
        yield line("not usable", example)
    yield line("documents", f"{count:,}")
    yield line("empty", f"{empty:,}")
    yield line("duplicates", f"{duplicates:,}")
    yield line("characters", f"{characters:,} (about {characters // 4:,} tokens of English)")
    bad.check()


def examine_images(source: str) -> Iterator[str]:
    """Counts of pictures, their sides in pixels and their modes.

    Two are duplicates if they are equal at the size that pre-training decodes to by default.

    Raises:
        DataError: more than 2% of the pictures cannot be used.
    """
    from selfsup.data.image import Config
    from selfsup.data.image_decoding import decode_all
    from selfsup.data.labelled_image import label_text

    config, tally = Config(), Tally(source)
    found = image_files.find(source)
    sides: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    animated = 0
    stream = image_files.pictures(found, config.image_column, config.label_column)
    with console.progress("reading pictures", image_files.num_pictures(found)) as progress:
        for picture, result in decode_all(stream, config.form):
            progress.advance(1, f"{tally.total:,} pictures")
            if isinstance(result, DataError):
                tally.reject(picture.where, str(result))
                continue
            label = "" if isinstance(picture.label, float) else label_text(picture.label)
            tally.keep(result.pixels.tobytes(), label)
            width, height, mode = _header(picture.content)
            sides[width, height] += 1
            modes[mode] += 1
            animated += result.animated
    yield from tally.lines("pictures")
    if sides:
        for name, lengths in zip(("width", "height"), zip(*sides, strict=True), strict=True):
            yield line(name, f"{min(lengths):,} to {max(lengths):,} pixels")
        yield line("sizes", f"{len(sides):,} different")
        yield line("modes", ", ".join(f"{mode} {n:,}" for mode, n in modes.most_common()))
        yield line("animated", f"{animated:,}")
    tally.bad.check(tally.total)


def _header(content: image_files.Content) -> tuple[int, int, str]:
    """Width, height and mode of a picture as it is stored."""
    from PIL import Image

    if isinstance(content, np.ndarray):
        return content.shape[1], content.shape[0], "RGB" if content.shape[2:] == (3,) else "L"
    if isinstance(content, Image.Image):
        return *content.size, content.mode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is our limit
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        with Image.open(file) as image:
            return *image.size, image.mode


def examine_sounds(source: str) -> Iterator[str]:
    """Counts of sounds, their seconds and their rates in Hz.

    Raises:
        DataError: more than 2% of the sounds cannot be used.
    """
    from selfsup.data.audio_features import Config, Decoded, decode

    config, tally = Config(), Tally(source)
    found = audio_files.find(source)
    labels = class_folders(found)
    seconds: list[float] = []
    rates: Counter[int] = Counter()

    def read(item: audio_files.Item) -> tuple[audio_files.Item, Decoded | DataError]:
        try:
            return item, decode(item.content, config)
        except DataError as error:
            return item, error

    total = None if any(isinstance(place, HubDataset) for place in found) else len(found)
    with (
        console.progress("reading sounds", total) as progress,
        ThreadPoolExecutor(audio_files.WORKERS) as pool,
    ):
        for item, result in audio_files.in_order(pool, read, audio_files.found_items(found, "")):
            progress.advance(1, f"{tally.total:,} sounds")
            if isinstance(result, DataError):
                tally.reject(item.name, str(result))
                continue
            of_file = labels.get(item.content, "") if isinstance(item.content, Path) else ""
            tally.keep(result.digest, of_file)
            seconds.append(len(result.sound) / config.rate)
            rates[result.rate] += 1
    yield from tally.lines("sounds")
    if seconds:
        yield line("seconds", f"{sum(seconds):,.1f} in all ({sum(seconds) / 3600:,.2f} hours)")
        yield line("length", f"{min(seconds):.2f} to {max(seconds):,.2f} seconds")
        found_rates = ", ".join(f"{rate:,} Hz {count:,}" for rate, count in rates.most_common())
        yield line("rates", found_rates)
    tally.bad.check(tally.total)
