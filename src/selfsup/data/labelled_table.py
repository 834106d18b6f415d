"""Labelled table rows: reading them, strictly, and as batches.

`labelled_by` also checks the labels of series.
"""

from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from selfsup.batch import Batch
from selfsup.data.dataset import LabelledDataset
from selfsup.data.label_files import find_column
from selfsup.data.labels import Labelled, check_known, label_numbers, names_of
from selfsup.data.table_columns import Rows
from selfsup.data.table_files import KNOWN, category, kind_of, parsed, read_table
from selfsup.errors import ConfigError, DataError, nearest

TASKS = ("classification", "regression")


def read_labels(
    path: str | Path,
    task: str,
    *,
    text: str | int | None = None,
    text_b: str | int | None = None,
    label: str | int | None = None,
    names: tuple[str, ...] | None = None,
) -> Labelled:
    """Reads one labelled table; items are dictionaries of all columns but the label's.

    Args:
        path: a file of one of the kinds that `table.prepare` reads.
        task: classification or regression.
        text, text_b: must be None; a row is read whole.
        label: the column with the labels, found by its usual names where not given. A number, from
            1, means that a text file has no header line. In an .npz file the array, "y" by default.
        names: the training data's `names`; a label that is not among them is an error. None: this
            is training data.

    Raises:
        DataError: the file cannot be read, has no such column, or a label is missing or wrong.
        ConfigError: an unknown task, or `text` is given.
    """
    path = Path(path)
    if text is not None or text_b is not None:
        raise ConfigError("rows of a table are read whole; leave text and text_b out")
    numbered = kind_of(path, KNOWN) in (".csv", ".tsv", ".txt") and str(label).isdecimal()
    content = read_table(path, header=not numbered)
    columns, rows = content.columns, content.rows
    if kind_of(path, KNOWN) in (".npz", ".npy"):
        name = str(label or "y")
        if name not in content.beside:
            hint = nearest(name, content.beside)
            raise DataError(f"{path}: no array {name!r} with a label for each row{hint}")
        answers = content.beside[name]
    else:
        place = columns.index(find_column(path, columns, "label", label))
        answers = [row[place] for row in rows]
        rows = [row[:place] + row[place + 1 :] for row in rows]
        columns = columns[:place] + columns[place + 1 :]
    items = [dict(zip(columns, row, strict=True)) for row in rows]
    return labelled_by(path, task, items, content.where, answers, names)


def labelled_by(
    path: Path,
    task: str,
    items: list[Any],
    where: list[str],
    answers: list[Any],
    names: tuple[str, ...] | None,
) -> Labelled:
    """Items with checked labels.

    Args:
        path: the file, for messages.
        task: classification or regression.
        items: of any kind.
        where: the place of each item, for messages.
        answers: one cell for each item: text or a number.
        names: see `read_labels`.

    Raises:
        DataError: a label is missing, no number or not in `names`, or all labels are equal.
        ConfigError: an unknown task.
    """
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}{nearest(task, TASKS)}")
    labels: list[Any] = []
    for place, cell in zip(where, answers, strict=True):
        value = parsed(cell)
        if value is None:
            raise DataError(f"{place}: the label is missing; fill it in or remove the line")
        if task == "regression" and isinstance(value, str):
            raise DataError(f"{place}: the label must be a finite number, got {value!r}")
        if task == "classification":
            value = cell.strip() if isinstance(cell, str) else category(value)
            if names is not None:
                check_known(value, names, place)
        labels.append(value)
    if names is None:
        names = names_of(labels, task, str(path))
    return Labelled(task, items, labels, names, str(path))


@final
class LabelledRows(LabelledDataset):
    """Encoded rows with labels.

    Attributes:
        fields, lengths, task, labels, truncated: see `LabelledDataset`; a row has no end
            to cut.
    """

    def __init__(self, rows: np.ndarray, labelled: Labelled):
        self.rows, self.fields, self.lengths = Rows(rows), ("row", "label", "index"), None
        self.task, self.labels = labelled.task, label_numbers(labelled)
        self.truncated = 0

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: np.ndarray) -> Batch:
        """`row`, `index` and `label`: (batch,) int64 class numbers, or float32."""
        label = torch.from_numpy(self.labels[numbers])
        typed = label.float() if self.task == "regression" else label
        return {**self.rows.batch(numbers), "label": typed}
