"""Labelled pictures: files with labels, read strictly, and turned into batches.

| source                       | label                                                         |
|------------------------------|---------------------------------------------------------------|
| a folder                     | the name of the first-level sub-folder                        |
| .parquet                     | a column                                                      |
| *-images-idx3-ubyte[.gz]     | the file *-labels-idx1-ubyte[.gz] beside it                   |
| .csv .tsv .jsonl             | a column; another holds paths, relative to the table's folder |
"""

import json
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from selfsup.batch import Batch
from selfsup.data.dataset import LabelledDataset
from selfsup.data.image_decoding import Form, decode_items
from selfsup.data.image_files import Picture, columns_of, find, kind_of, pictures
from selfsup.data.label_files import COMPRESSED, find_column, suffix_of, table
from selfsup.data.labels import Labelled, check_known, finite_number, label_numbers, names_of
from selfsup.errors import ConfigError, DataError

TASKS = ("classification", "regression")
TABLES = (".csv", ".tsv", ".jsonl")
TABLE_ENDS = tuple(table + end for table in TABLES for end in ("", *COMPRESSED))
PATH_COLUMNS = ("image", "file", "path", "filename")


def label_text(value: Any) -> str:
    """The label in a cell as text, "" where there is none.

    >>> label_text(7), label_text(" cat"), label_text(None)
    ('7', 'cat', '')
    """
    if isinstance(value, bool | int | float):
        value = json.dumps(value)  # true, 1, 0.5: as JSON writes it
    return value.strip() if isinstance(value, str) else ""


def read_labels(
    path: str | Path,
    task: str,
    *,
    text: str | int | None = None,
    text_b: str | int | None = None,
    label: str | int | None = None,
    names: tuple[str, ...] | None = None,
) -> Labelled:
    """Reads labelled pictures, which stay encoded.

    Args:
        path: a source of the table above.
        task: classification or regression.
        text: the column of pictures, or of paths in a table; its usual names are image, file, path
            and filename.
        text_b: not for pictures.
        label: the column of labels. Numbers, from 1, name the columns of a .csv or .tsv without a
            header row.
        names: the training data's `names`, when this is validation or test data; a label that is
            not among them is an error. None: this is training data; its labels make the names, and
            there must be at least two.

    Raises:
        DataError: the source cannot be read, or a row is not what the task needs.
        ConfigError: another task, or a second text.
    """
    if task not in TASKS:
        raise ConfigError(f"pictures are labelled for {' or '.join(TASKS)}, not for {task!r}")
    if text_b is not None:
        raise ConfigError("pictures are read one by one; leave text_b out")
    path = Path(path).expanduser()
    is_table = path.is_file() and path.name.lower().endswith(TABLE_ENDS)
    rows = _of_table(path, text, label) if is_table else _of_files(path, text, label)
    if not rows:
        raise DataError(f"{path}: it holds no example; give pictures with labels")
    labels: list[Any] = [_label(row, task, names) for row in rows]
    if names is None:
        names = names_of(labels, task, str(path))
    return Labelled(task, [row.content for row in rows], labels, names, str(path))


def _label(row: Picture, task: str, names: tuple[str, ...] | None) -> str | float:
    value = label_text(row.label)
    if not value:
        raise DataError(f"{row.where}: its label is {row.label!r}; expected text or a number")
    if task == "regression":
        return finite_number(value, row.where, "its label")
    if names is not None:
        check_known(value, names, row.where)
    return value


def _of_table(path: Path, text: str | int | None, label: str | int | None) -> list[Picture]:
    given = [str(name) for name in (text, label) if name is not None]
    numbered = suffix_of(path) in (".csv", ".tsv") and bool(given)
    columns, records = table(path, numbered and all(name.isdecimal() for name in given))
    first = _picture_column(path, columns, text)
    answer = find_column(path, columns, "label", label)
    rows = []
    for where, cells in records:
        name = cells.get(first)  # JSON lines may differ in their keys
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where}: {first!r} must be a path, got {name!r}")
        place = path.parent / name.strip()
        if not place.is_file():
            raise DataError(f"{where}: no file {place}")
        rows.append(Picture(where, place, cells.get(answer)))
    return rows


def _of_files(path: Path, text: str | int | None, label: str | int | None) -> list[Picture]:
    if path.is_file() and not kind_of(path):
        raise DataError(
            f"{path}: not labelled pictures by its name; known: a folder with a sub-folder per "
            f"class, .parquet, *-images-idx3-ubyte[.gz], {' '.join(TABLES)} with paths and labels"
        )
    found = find(path, least_classes=1)
    places = [one.place for one in found if isinstance(one.place, Path)]
    parquet = next((place for place in places if kind_of(place) == "parquet"), None)
    image_column, label_column = str(text or "image"), str(label or "label")
    if parquet is not None:
        columns = columns_of(parquet)
        image_column = _picture_column(parquet, columns, text)
        label_column = find_column(parquet, columns, "label", label)
    elif places and (text is not None or label is not None):
        raise ConfigError(f"{path} has no columns to name; leave text and label out")
    rows = list(pictures(found, image_column, label_column))
    bare = next((row.where for row in rows if row.label is None), None)
    if bare is not None:
        raise DataError(
            f"{bare}: has no label; every picture must lie in a sub-folder of {path} that is named "
            "like its class, or have a label in its row or in a file of labels beside it"
        )
    return rows


def _picture_column(path: Path, columns: list[str], given: str | int | None) -> str:
    if given is not None:
        return find_column(path, columns, "text", given)
    usual = [name for name in columns if name.lower() in PATH_COLUMNS]
    # a .parquet often holds the file's name too, beside the picture itself
    usual = [name for name in usual if name.lower() == PATH_COLUMNS[0]] or usual
    if len(usual) != 1:
        raise DataError(
            f"{path}: expected one column of pictures ({', '.join(PATH_COLUMNS)}), found "
            f"{' and '.join(usual) or 'none'}; say which with text=NAME; "
            f"columns: {', '.join(columns)}"
        )
    return usual[0]


@final
class LabelledImages(LabelledDataset):
    """Labelled pictures as batches; everything is decoded once, here, and stays in memory.

    Batches hold `image`, (batch, channel, size, size) uint8, `index`, and `label`: (batch,) int64
    class numbers, or (batch,) float32 for regression.

    Args:
        labelled: paths, or what else `ImagePreprocessor.batches` takes, and their labels.
        form: what they become.

    Attributes:
        labels: (examples,) class numbers (int64) or numbers (float64).
        lengths, truncated: None and 0; pictures have no lengths.

    Raises:
        DataError: a picture cannot be used; it is named.
    """

    fields = ("image", "label", "index")
    lengths = None
    truncated = 0

    def __init__(self, labelled: Labelled, form: Form):
        self.task = labelled.task
        shape = (len(labelled), form.channels, form.size, form.size)
        self.pictures = np.empty(shape, dtype=np.uint8)
        for number, values in enumerate(decode_items(labelled.items, form, labelled.source)):
            self.pictures[number] = values
        self.labels = label_numbers(labelled)

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, numbers: np.ndarray) -> Batch:
        """The examples of those numbers as CPU tensors."""
        numbers = np.asarray(numbers, dtype=np.int64)
        label = torch.from_numpy(self.labels[numbers])
        return {
            "image": torch.from_numpy(self.pictures[numbers]),
            "label": label.float() if self.task == "regression" else label,
            "index": torch.from_numpy(numbers),
        }
