"""Columns of a table: which are learned from, fitting and encoding them, and the encoded rows."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy
import torch

from selfsup import console
from selfsup.batch import Batch
from selfsup.data.bad_items import BadItems
from selfsup.data.dataset import Dataset
from selfsup.data.table_files import MOSTLY_NUMERIC, NUMERIC, Table, Value, category
from selfsup.errors import ConfigError, DataError, nearest

MAX_QUANTILES = 1000


def learned_columns(
    content: Table, leave_out: tuple[str, ...], categorical: tuple[str, ...], normal: str
) -> tuple[str, ...]:
    """The names of the columns to learn from; the arguments are keys of `data.table.Config`."""
    for key, given in (("leave_out", leave_out), ("categorical", categorical)):
        for name in given:
            if name not in content.columns:
                hint = nearest(name, content.columns)
                raise ConfigError(f"data.{key}: no column {name!r}{hint}")
    left_out = {*leave_out, normal.partition("=")[0]}
    learned = tuple(name for name in content.columns if name not in left_out)
    if not learned:
        raise ConfigError("data.leave_out leaves no column to learn from")
    return learned


def holds_numbers(name: str, values: list[Value], categorical: tuple[str, ...]) -> bool:
    """Whether a column of the training part holds numbers.

    Raises:
        DataError: it is not clear.
    """
    texts = [value for value in values if isinstance(value, str)]
    num_filled = sum(value is not None for value in values)
    share = 1 - len(texts) / max(1, num_filled)
    if name in categorical or share < MOSTLY_NUMERIC:
        return False
    if share < NUMERIC:
        raise DataError(
            f"column {name!r}: {share:.1%} of the cells are numbers, the others are text such as "
            f"{texts[0]!r}; mend them, or name the column in data.categorical or data.leave_out"
        )
    return True


def without_text(
    bad: BadItems,
    names: Sequence[str],
    numeric: list[bool],
    cells: list[list[Value]],
    where: list[str],
) -> np.ndarray:
    """Which rows have no text in a numeric column, (rows,) bool; the others go to `bad`."""
    good = np.ones(len(where), dtype=bool)
    for name, is_numeric, column in zip(names, numeric, cells, strict=True):
        for i, value in enumerate(column if is_numeric else ()):
            if isinstance(value, str) and good[i]:
                good[i] = False
                bad.add(where[i], f"column {name!r} is numeric and holds {value!r}")
    bad.check(len(where))
    return good


# Fitting and encoding


@dataclass(frozen=True)
class NumericColumn:
    """A fitted column of numbers.

    Attributes:
        name: of the table column.
        mean, std: over the training part; std 0.0 marks a column that was constant there.
        missing: the training part has missing values, so the column has an indicator.
        quantiles: ascending, of the training part, for scale = "quantile"; else empty.
    """

    name: str
    mean: float
    std: float
    missing: bool
    quantiles: tuple[float, ...] = ()

    def encode(self, values: Sequence[Value]) -> np.ndarray:
        """(rows,) float64, 0 where missing; what is no number is not expected here."""
        if self.std == 0:
            return np.zeros(len(values))
        x = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
        if self.quantiles:
            scaled = to_normal(x, np.array(self.quantiles))
        else:
            scaled = (x - self.mean) / self.std
        return np.nan_to_num(scaled, nan=0.0)


@dataclass(frozen=True)
class CategoricalColumn:
    """A fitted column of categories.

    Attributes:
        name: of the table column.
        values: categories that have a column of their own, the most frequent first.
        missing: the training part has missing values, which are a category too.
    """

    name: str
    values: tuple[str, ...]
    missing: bool

    @property
    def width(self) -> int:
        """Number of encoded columns; the last one is for all other categories."""
        return len(self.values) + self.missing + 1

    def encode(self, values: Sequence[Value]) -> np.ndarray:
        """(rows, width) float64, one 1 in each row."""
        places = {name: place for place, name in enumerate(self.values)}
        others = self.width - 1
        missing = others - 1 if self.missing else others
        chosen = [
            missing if value is None else places.get(category(value), others) for value in values
        ]
        return np.eye(self.width)[chosen]


Column = NumericColumn | CategoricalColumn


def to_normal(x: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Ranks among the training quantiles as normal deviates.

    A value between two quantiles has a rank between theirs, a value that fills several quantiles
    their middle rank. Ranks keep half a quantile away from 0 and 1, so beyond the training part's
    range all values are equal: +-3.3 for 1000 quantiles.

    Args:
        x: (rows,), NaN where missing.
        quantiles: (quantiles,) ascending, evenly spaced in rank from 0 to 1.
    """
    ranks = np.linspace(0, 1, len(quantiles))
    above = np.interp(x, quantiles, ranks)
    below = -np.interp(-x, -quantiles[::-1], -ranks[::-1])
    margin = 0.5 / len(quantiles)
    return scipy.special.ndtri(np.clip((above + below) / 2, margin, 1 - margin))


def fit_column(
    name: str,
    numeric: bool,
    values: list[Value],
    max_categories: int,
    scale: Literal["standard", "quantile"],
) -> Column:
    """What encodes a column, from its training part; see `data.table.Config` for the settings."""
    missing = None in values
    if not numeric:
        counts = Counter(category(value) for value in values if value is not None)
        ranked = sorted(counts, key=lambda text: (-counts[text], text))
        if len(ranked) > max_categories:
            rare = sum(counts[text] for text in ranked[max_categories:])
            console.warn(
                f"column {name!r}: {len(ranked):,} categories; all but the "
                f"{max_categories} most frequent share one column ({rare:,} rows)"
            )
        return CategoricalColumn(name, tuple(ranked[:max_categories]), missing)
    numbers = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(numbers) or numbers.min() == numbers.max():
        return NumericColumn(name, float(numbers[0]) if len(numbers) else 0.0, 0.0, missing)
    column = NumericColumn(name, float(numbers.mean()), float(numbers.std()), missing)
    if scale == "standard":
        return column
    ranks = np.linspace(0, 1, min(MAX_QUANTILES, len(numbers)))
    return replace(column, quantiles=tuple(np.quantile(numbers, ranks).tolist()))


# Rows for models


class Rows(Dataset):
    """Encoded rows in memory.

    >>> Rows(np.zeros((5, 3), dtype=np.float32)).batch(np.array([4, 0]))["row"].shape
    torch.Size([2, 3])
    """

    fields = ("row", "index")
    lengths = None

    def __init__(self, rows: np.ndarray):
        self.rows = torch.from_numpy(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: np.ndarray) -> Batch:
        """`row` (batch, width) float32 and `index`."""
        index = torch.from_numpy(np.asarray(numbers, dtype=np.int64))
        return {"row": self.rows[index], "index": index}
