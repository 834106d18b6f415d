"""Pictures in files, found and read one after another; image_decoding.py decodes them.

| source                         | a picture is                         | its label                |
|--------------------------------|--------------------------------------|--------------------------|
| .jpg .png .webp .bmp .gif .tif | the file                             | the first-level folder   |
| .parquet, Hugging Face dataset | a row: bytes, or {"bytes", "path"}   | another column           |
| *-images-idx3-ubyte[.gz]       | a row of bytes, as in MNIST          | *-labels-idx1-ubyte[.gz] |
"""

import gzip
import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from selfsup.data import sources
from selfsup.data.sources import HubDataset, Source, Wanted, class_folders, fetched, listed, opened
from selfsup.errors import DataError, nearest

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
KNOWN = f"{' '.join(PICTURES)} .parquet and *-images-idx3-ubyte[.gz]"
IDX = re.compile(r"idx([134])(-ubyte)?(\.gz)?$", re.IGNORECASE)
IDX_RANKS = {0x0803: 3, 0x0804: 4}  # magic numbers of unsigned bytes
Content = Path | bytes | np.ndarray | Image.Image


@dataclass(frozen=True)
class Found:
    """A file or a dataset, and the label of everything in it, where its folder gives one."""

    place: Path | HubDataset
    label: str | None = None


class Picture(NamedTuple):
    """One picture before it is decoded.

    Attributes:
        where: the file, and the row in it, for messages.
        content: a path, encoded bytes, (height, width[, channel]) uint8 values, or Pillow's own.
        label: a class name, or a number; None where there is none.
    """

    where: str
    content: Content
    label: Any = None


def kind_of(path: Path) -> str:
    """picture, parquet, idx, labels (of an idx file), or "" for what is not read."""
    name = path.name.lower()
    if name.endswith(PICTURES):
        return "picture"
    if name.endswith(".parquet"):
        return "parquet"
    idx = IDX.search(name)
    return ("labels" if idx[1] == "1" else "idx") if idx else ""


WANTED = Wanted(
    what="picture",
    known=KNOWN,
    reads=lambda path: kind_of(path) not in ("", "labels"),
    beside=lambda path: kind_of(path) == "labels",  # read together with their pictures
    refusal=": not a file of pictures by its name; known:",
)


def find(source: Source, least_classes: int = 2) -> list[Found]:
    """The files and datasets that a source names, each once; a warning names what is passed over.

    Args:
        source: files, folders (searched through), globs, dataset names, or a list of those.
        least_classes: in a folder whose pictures all lie in sub-folders, at least so many of them,
            their names are labels.

    Raises:
        DataError: nothing is found, or a file has an unknown extension.
    """
    found: dict[Path | HubDataset, Found] = {}
    for item in listed(source, WANTED):
        places = sources.find(item, WANTED)
        labels: dict[Path | HubDataset, str] = {}
        if isinstance(item, str | Path) and Path(item).expanduser().is_dir():
            labels = _labels(places, least_classes)
        for place in places:
            found.setdefault(place, Found(place, labels.get(place)))
    return list(found.values())


def _labels(
    places: dict[Path | HubDataset, str], least_classes: int
) -> dict[Path | HubDataset, str]:
    """The classes of single pictures; files of many have labels of their own."""
    single = all(isinstance(place, Path) and kind_of(place) == "picture" for place in places)
    return class_folders(places, least_classes) if single else {}


def num_pictures(found: list[Found]) -> int | None:
    """How many pictures there are, good or bad, where that is quickly known."""
    from pyarrow import parquet

    total = 0
    for one in found:
        if isinstance(one.place, HubDataset) or kind_of(one.place) == "idx":
            return None
        if kind_of(one.place) == "picture":
            total += 1
        else:
            with reading(one.place):
                total += parquet.read_metadata(one.place).num_rows
    return total


def columns_of(path: Path) -> list[str]:
    """The columns of a .parquet file."""
    from pyarrow import parquet

    with reading(path):
        return parquet.read_schema(path).names


def pictures(found: Iterable[Found], image_column: str, label_column: str) -> Iterator[Picture]:
    """Every picture, in order, not decoded yet; memory stays flat.

    Raises:
        DataError: a file of many pictures cannot be read, or lacks the image column.
    """
    for one in found:
        if isinstance(one.place, HubDataset):
            yield from _hub(one.place, image_column, label_column)
        elif kind_of(one.place) == "parquet":
            yield from _parquet(one.place, image_column, label_column)
        elif kind_of(one.place) == "idx":
            yield from _idx(one.place)
        else:
            yield Picture(str(one.place), one.place, one.label)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what libraries raise about a damaged file of many pictures into a `DataError`."""
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    except (gzip.BadGzipFile, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"{path}: not a whole idx file ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _parquet(path: Path, image_column: str, label_column: str) -> Iterator[Picture]:
    from pyarrow import parquet

    with reading(path), parquet.ParquetFile(path) as table:
        schema = table.schema_arrow
        if image_column not in schema.names:
            hint = nearest(image_column, schema.names)
            raise DataError(f"{path}: no column {image_column!r}{hint}")
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = described.get("info", {}).get("features", {}).get(label_column)
        names = feature.get("names") if isinstance(feature, dict) else None
        columns = [c for c in (image_column, label_column) if c in schema.names]
        number = 0
        for batch in table.iter_batches(batch_size=100, columns=columns):
            for row in batch.to_pylist():
                number += 1
                where = f"{path}: row {number}"
                value = _content(row[image_column], where, image_column)
                content = path.parent / value if isinstance(value, str) else value
                yield Picture(where, content, _named(row.get(label_column), names))


def _content(value: Any, where: str, column: str) -> bytes | str:
    """The encoded bytes in a cell, or the path that stands in their place."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None:
        return b""
    if not isinstance(value, bytes | str):
        raise DataError(
            f"{where}: {column!r} holds {type(value).__name__}; expected the bytes of an encoded "
            'picture, or a struct of "bytes" and "path"'
        )
    return value


def _named(label: Any, names: list[str] | None) -> Any:
    """The class name of a number in a Hugging Face dataset, where -1 stands for no label."""
    if not names or not isinstance(label, int):
        return label
    return names[label] if 0 <= label < len(names) else None


def _hub(dataset: HubDataset, image_column: str, label_column: str) -> Iterator[Picture]:
    with opened(dataset) as rows:
        import datasets

        features = rows.features or {}
        if features and image_column not in features:
            hint = nearest(image_column, features)
            raise DataError(f"{dataset}: no column {image_column!r}{hint}")
        if isinstance(features.get(image_column), datasets.Image):
            rows = rows.cast_column(image_column, datasets.Image(decode=False))
        names = getattr(features.get(label_column), "names", None)
        for number, row in enumerate(rows, start=1):
            where = f"{dataset}: row {number}"
            content = _content(row.get(image_column), where, image_column)
            if isinstance(content, str):
                content = fetched(content)
            yield Picture(where, content, _named(row.get(label_column), names))


def idx_labels(path: Path) -> Path:
    """Where the labels of an idx file of pictures lie, if there are any."""
    name = re.sub("images", "labels", path.name, flags=re.IGNORECASE)
    return path.with_name(re.sub("idx[34]", "idx1", name, flags=re.IGNORECASE))


def _idx(path: Path) -> Iterator[Picture]:
    """The layout is http://yann.lecun.com/exdb/mnist: a magic number, sizes, unsigned bytes."""
    labels: list[int] | None = None
    beside = idx_labels(path)
    if beside.exists():
        with reading(beside), _unpacked(beside) as file:
            magic, count = struct.unpack(">II", file.read(8))
            labels = list(file.read())
        if magic != 0x0801 or len(labels) != count:
            raise DataError(f"{beside}: not the labels of an idx file; fetch it again")
    with reading(path), _unpacked(path) as file:
        (magic,) = struct.unpack(">I", file.read(4))
        if magic not in IDX_RANKS:
            raise DataError(f"{path}: not an idx file of pictures (magic number {magic:#010x})")
        rank = IDX_RANKS[magic]
        count, *sides = struct.unpack(f">{rank}I", file.read(4 * rank))
        if rank == 4 and sides[-1] not in (1, 3):
            raise DataError(f"{path}: pictures of {sides}; expected height, width, 1 or 3 channels")
        if labels is not None and len(labels) != count:
            raise DataError(f"{path}: {count} pictures, but {len(labels)} labels in {beside.name}")
        for number in range(count):
            row = file.read(int(np.prod(sides)))
            if len(row) != np.prod(sides):
                raise EOFError(f"it ends in row {number + 1} of {count}")
            values = np.frombuffer(row, np.uint8).reshape(sides)
            where = f"{path}: row {number + 1}"
            yield Picture(where, values, labels[number] if labels is not None else None)


def _unpacked(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")
