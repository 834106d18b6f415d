"""Labelled series of .ts files: reading them, strictly, and as batches."""

from pathlib import Path
from typing import final

import numpy as np
import torch

from selfsup.batch import Batch
from selfsup.data.dataset import LabelledDataset
from selfsup.data.labelled_table import label_numbers, labelled_by
from selfsup.data.labels import Labelled
from selfsup.data.series_files import read_ts
from selfsup.data.series_windows import Windows
from selfsup.data.table_files import kind_of
from selfsup.errors import ConfigError, DataError


def read_labels(
    path: str | Path,
    task: str,
    *,
    text: str | int | None = None,
    text_b: str | int | None = None,
    label: str | int | None = None,
    names: tuple[str, ...] | None = None,
) -> Labelled:
    """Reads one labelled .ts file; items are (time, channel) lists of numbers.

    Args:
        path: a .ts file.
        task: classification or regression.
        text, text_b, label: must be None: a .ts file has one place for each.
        names: the training data's `names`; a label that is not among them is an error. None: this
            is training data.

    Raises:
        DataError: the file cannot be read, or a label is missing or wrong.
        ConfigError: an unknown task, or a column is given.
    """
    path = Path(path)
    if (text, text_b, label) != (None, None, None):
        raise ConfigError("a .ts file has one place for series and label; leave the columns out")
    if kind_of(path, (".ts",)) != ".ts":
        raise DataError(f"{path}: labelled series are read from .ts files; this is none")
    cases = read_ts(path)
    items = [series.tolist() for series in cases.series]
    return labelled_by(path, task, items, cases.where, cases.labels, names)


@final
class LabelledSeries(LabelledDataset):
    """Whole series with labels.

    Attributes:
        fields, lengths, task, labels, truncated: see `LabelledDataset`; nothing is cut, so
            `truncated` is 0.
    """

    def __init__(self, series: list[np.ndarray], labelled: Labelled):
        self.series = Windows(series)
        self.fields, self.lengths = (*self.series.fields, "label"), self.series.lengths
        self.task, self.labels = labelled.task, label_numbers(labelled)
        self.truncated = 0

    def __len__(self) -> int:
        return len(self.series)

    def batch(self, numbers: np.ndarray) -> Batch:
        """As `Windows.batch`, with `label`: (batch,) int64 class numbers, or float32."""
        label = torch.from_numpy(self.labels[numbers])
        typed = label.float() if self.task == "regression" else label
        return {**self.series.batch(numbers), "label": typed}
