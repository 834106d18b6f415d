"""Table rows: from files to rows of numbers that a model can learn from.

A column is numeric when at least 98% of its filled training cells are finite numbers, else it holds
categories; between 90% and 98% it must be said (`data.categorical`) or mended. An encoded row is

    numeric columns | one column per category, and one for all others | missing?
    -0.31  0.87     | 0 1 0                                            | 0

Means, deviations, quantiles and categories come from the training part alone. Tables are small: all
is read at once, and encoded rows stay in memory as float32.

| suffix           | what                                                                   |
|------------------|------------------------------------------------------------------------|
| .csv             | commas, quotes as in spreadsheets                                      |
| .tsv             | tabs, no quoting                                                       |
| .txt             | tabs, or where there is none commas; no quoting                        |
| .parquet         | as it is                                                               |
| .npz .npy        | a (row, column) array; columns are called "1", "2", ...                |

Text files may end in .gz, .xz or .zst too. Empty cells, NA, NaN, null and ? are missing values.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch

from selfsup import files
from selfsup.batch import Batch, TableSpec
from selfsup.data.bad_items import BadItems
from selfsup.data.dataset import Prepared
from selfsup.data.labelled_table import LabelledRows
from selfsup.data.labelled_table import read_labels as read_labels
from selfsup.data.labels import Labelled
from selfsup.data.table_columns import (
    CategoricalColumn,
    Column,
    NumericColumn,
    Rows,
    fit_column,
    holds_numbers,
    learned_columns,
    without_text,
)
from selfsup.data.table_files import (
    KNOWN,
    Value,
    digest,
    files_of,
    fingerprint,
    held_out,
    normal_rows,
    parsed,
    parsed_column,
    read_all,
    read_table,
)
from selfsup.errors import ConfigError, DataError, nearest

Item = dict[str, Any] | Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a table becomes rows of numbers.

    Attributes:
        leave_out: columns that are not learned from: ids, labels.
        categorical: columns whose numbers are names of categories.
        header: the first line of a text file names the columns; False: "1", "2", ...
        max_categories: most categories of one column that have a column of their own, the most
            frequent ones; all others share one.
        valid_fraction: share of the rows that is held out.
        array: which array of an .npz file holds the rows.
        normal: "column=value": learn only from rows with that value, and not from that column. In
            an .npz file it may name a second array with one value per row, "y=0".
        scale: "standard" gives numeric columns mean 0 and deviation 1; "quantile" maps their ranks
            to a normal distribution, for columns with heavy tails.
        fitted: folder of a model whose columns, means and categories are taken; "": they are found
            and fitted here.
    """

    leave_out: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    header: bool = True
    max_categories: int = 64
    valid_fraction: float = 0.1
    array: str = "X"
    normal: str = ""
    scale: Literal["standard", "quantile"] = "standard"
    fitted: str = ""

    def __post_init__(self) -> None:
        if self.max_categories < 1:
            raise ConfigError(f"data.max_categories must be at least 1, got {self.max_categories}")
        if not 0 < self.valid_fraction <= 0.5:
            raise ConfigError(
                f"data.valid_fraction must be above 0 and at most 0.5, got {self.valid_fraction}"
            )
        if self.normal and self.normal.find("=") < 1:
            raise ConfigError(f"data.normal must be column=value, got {self.normal!r}")


def prepare(
    config: Config, source: str | Path | Sequence[str | Path], cache: Path | None = None
) -> Prepared:
    """Reads tables with equal columns, splits their rows and encodes them.

    Which part a row falls on is decided by a hash of what is learned from it, so equal rows fall on
    one side (see `held_out`). A row with a text in a numeric column is left out, counted
    and named.

    Args:
        config: see `Config`.
        source: files, folders, globs, or a list of those.
        cache: not used: reading a table again is as fast as reading a cache.

    Raises:
        DataError: nothing is found, a file cannot be read, columns differ between files, more than
            2% of the rows have a text in a numeric column, or there are too few rows.
        ConfigError: a key names a column that is not there, or no column is left.
    """
    paths = files_of(source, KNOWN)
    content, num_abnormal = normal_rows(read_all(paths, config.header, config.array), config.normal)
    preprocessor = load_preprocessor(config.fitted) if config.fitted else None
    if preprocessor is None:
        names = learned_columns(content, config.leave_out, config.categorical, config.normal)
    else:
        names = preprocessor.spec.columns
    cells = [parsed_column(content, name) for name in names]
    digests = np.array([digest(row) for row in zip(*cells, strict=True)], dtype=np.uint64)
    valid = held_out(digests, config.valid_fraction, str(source))
    if preprocessor is None:
        train_cells = [_at(column, ~valid) for column in cells]
        numeric = [
            holds_numbers(name, values, config.categorical)
            for name, values in zip(names, train_cells, strict=True)
        ]
    else:
        numeric = [isinstance(column, NumericColumn) for column in preprocessor.columns]
    bad = BadItems(str(source))
    good = without_text(bad, names, numeric, cells, content.where)
    train_cells, valid_cells = (
        [_at(column, good & side) for column in cells] for side in (~valid, valid)
    )
    if preprocessor is None:
        fits = zip(names, numeric, train_cells, strict=True)
        preprocessor = TablePreprocessor(
            tuple(fit_column(*column, config.max_categories, config.scale) for column in fits)
        )
    train, held = (Rows(preprocessor.assemble(part)) for part in (train_cells, valid_cells))
    if not len(train) or not len(held):
        raise DataError(f"{source}: too few rows that can be used for two parts; give more")
    facts = {
        "files": len(paths),
        "rows": len(content.rows),
        "left_out_by_normal": num_abnormal,
        "duplicates": len(digests) - len(np.unique(digests)),
        "missing_cells": sum(value is None for column in cells for value in column),
        **bad.facts(),
        **preprocessor.facts(),
        "train_rows": len(train),
        "valid_rows": len(held),
        "fingerprint": fingerprint(train.rows.numpy(), config, names),
        "tokenizer": "",
    }
    return Prepared(train, held, preprocessor.spec, preprocessor, facts)


def _at(column: list[Value], mask: np.ndarray) -> list[Value]:
    return [value for value, here in zip(column, mask.tolist(), strict=True) if here]


@final
class TablePreprocessor:
    """A user's rows as encoded rows for a trained model.

    Args:
        columns: the fitted columns that are learned from, in the table's order.

    >>> age = NumericColumn("age", mean=40.0, std=10.0, missing=False)
    >>> city = CategoricalColumn("city", ("Bonn",), missing=False)
    >>> TablePreprocessor((age, city)).encode([{"age": 50, "city": "Bonn"}, ["30", "Rom"]]).tolist()
    [[1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]
    """

    FILE_NAME = "preprocessor.json"

    def __init__(self, columns: tuple[Column, ...]):
        self.columns = columns

    @property
    def spec(self) -> TableSpec:
        """What a model must know of its input."""
        numeric = [i for i, c in enumerate(self.columns) if isinstance(c, NumericColumn)]
        categories = [
            i
            for i, column in enumerate(self.columns)
            if isinstance(column, CategoricalColumn)
            for _ in range(column.width)
        ]
        indicators = [i for i in numeric if self.columns[i].missing]
        names = tuple(column.name for column in self.columns)
        return TableSpec(columns=names, source=(*numeric, *categories, *indicators))

    def facts(self) -> dict[str, int]:
        """Numbers of columns and categories, for people."""
        kinds = [c for c in self.columns if isinstance(c, CategoricalColumn)]
        return {
            "columns": len(self.columns),
            "numeric_columns": len(self.columns) - len(kinds),
            "categorical_columns": len(kinds),
            "categories": sum(len(column.values) for column in kinds),
            "encoded_columns": len(self.spec.source),
        }

    def save(self, folder: Path) -> None:
        """Writes preprocessor.json; numbers come back to the last bit.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        files.write_json(Path(folder) / self.FILE_NAME, {"columns": [*map(asdict, self.columns)]})

    @staticmethod
    def load(folder: str | Path) -> "TablePreprocessor":
        """Reads what `save` wrote.

        Raises:
            DataError: the file is missing or damaged.
        """
        path = Path(folder) / TablePreprocessor.FILE_NAME
        columns: list[Column] = []
        try:
            for values in json.loads(path.read_text(encoding="utf-8"))["columns"]:
                if "mean" in values:
                    columns.append(NumericColumn(**_with_tuple(values, "quantiles")))
                else:
                    columns.append(CategoricalColumn(**_with_tuple(values, "values")))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not the preprocessor of a table model ({error})") from error
        return TablePreprocessor(tuple(columns))

    def assemble(self, cells: Sequence[Sequence[Value]]) -> np.ndarray:
        """Parsed cells, by column, as (rows, width) float32; numeric columns hold no text."""
        numeric, categories, indicators = [], [], []
        for column, values in zip(self.columns, cells, strict=True):
            if isinstance(column, CategoricalColumn):
                categories.append(column.encode(values))
                continue
            numeric.append(column.encode(values)[:, None])
            if column.missing:
                indicators.append(np.array([value is None for value in values])[:, None])
        return np.concatenate([*numeric, *categories, *indicators], axis=1).astype(np.float32)

    def encode(self, rows: Sequence[Item], first: int = 0) -> np.ndarray:
        """Rows as (rows, width) float32.

        Args:
            rows: dictionaries of cells by column name, where other names are passed over; or
                sequences of the cells of `spec.columns`.
            first: number of the first row, for messages.

        Raises:
            DataError: a column is missing in a row, or a text stands in a numeric column.
        """
        parsed_rows = [self._parse(row, number) for number, row in enumerate(rows, start=first)]
        return self.assemble([*zip(*parsed_rows, strict=True)] or [()] * len(self.columns))

    def _parse(self, row: Item, number: int) -> list[Value]:
        if not isinstance(row, dict):
            if isinstance(row, str) or len(row) != len(self.columns):
                raise DataError(
                    f"item {number}: {row!r} is not a sequence of {len(self.columns)} cells: "
                    f"{', '.join(self.spec.columns)}"
                )
            row = dict(zip(self.spec.columns, row, strict=True))
        values = []
        for column in self.columns:
            if column.name not in row:
                hint = nearest(column.name, map(str, row))
                raise DataError(
                    f"item {number}: no column {column.name!r}{hint}; the model reads it. If it is "
                    f"the label, pre-train with data.leave_out = [{column.name!r}]"
                )
            value = parsed(row[column.name])
            if isinstance(value, str) and isinstance(column, NumericColumn):
                raise DataError(
                    f"item {number}: column {column.name!r} must be a finite number, got {value!r}"
                )
            values.append(value)
        return values

    def batches(self, items: Iterable[Item], batch_size: int) -> Iterator[tuple[list[int], Batch]]:
        """Batches of items in their order: (numbers of the items, `row`).

        Raises:
            ConfigError: `batch_size` is below 1.
            DataError: see `encode`.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        stream, done = iter(items), 0
        while some := list(islice(stream, batch_size)):
            rows = torch.from_numpy(self.encode(some, done))
            yield list(range(done, done + len(some))), {"row": rows}
            done += len(some)

    def labelled(self, labelled: Labelled, max_length: int | None = None) -> LabelledRows:
        """Labelled rows as a data set; `max_length` means nothing here.

        Raises:
            DataError: see `encode`; names the file.
        """
        try:
            return LabelledRows(self.encode(labelled.items), labelled)
        except DataError as error:
            raise DataError(f"{labelled.source}: {error}") from error

    def raw(self) -> "TablePreprocessor":
        """Itself: single items are not normalised."""
        return self

    def limited(self, max_length: int | None) -> "TablePreprocessor":
        """Itself: rows have one length."""
        return self


def _with_tuple(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {**values, key: tuple(values[key])}


load_preprocessor = TablePreprocessor.load


def read_items(
    source: str | Path | Sequence[str | Path], column: str | None, preprocessor: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, cells by column) of every row of a source; `column` has no meaning here.

    Files have no header row if those that the model learned from had none.
    """
    numbered = all(name.isdecimal() for name in preprocessor.spec.columns)
    for path in files_of(source, KNOWN):
        content = read_table(path, header=not numbered)
        for where, row in zip(content.where, content.rows, strict=True):
            yield where, dict(zip(content.columns, row, strict=True))


def with_preprocessor(config: Config, folder: Path) -> Config:
    """The configuration for reading other data as the model in `folder` reads it."""
    return replace(config, fitted=str(folder))
