"""Time series in files: what is read of tables and .ts files, and how it is split.

Both kinds are described in `series.py`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from selfsup import console
from selfsup.data.bad_items import BadItems
from selfsup.data.table_files import (
    MOSTLY_NUMERIC,
    NUMERIC,
    Table,
    digest,
    held_out,
    kind_of,
    parsed,
    read_table,
)
from selfsup.data.unpacking import decoded_text
from selfsup.errors import ConfigError, DataError, nearest

TABLES = (".csv", ".tsv", ".txt", ".parquet")
KNOWN = (*TABLES, ".ts")
TIME = ("date", "time", "timestamp", "datetime")
PARTS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class Config:
    """How time series become windows.

    Attributes:
        window: time steps in a window.
        stride: steps from one window to the next.
        time_column: where the time stamps are; "": a column with a usual name (date, time,
            timestamp, datetime), or none, where rows are in order.
        columns: the channels; (): every column of numbers.
        splits: shares of the rows of each file, by time: train, valid, test. Of .ts files, which
            are one part of a data set already, only the second is held out.
        split_rows: the numbers of rows instead; rows behind them are not used.
        standardise: gives each channel mean 0 and deviation 1 over the training rows.
        independent: every channel of a window is an example of its own, of one channel: a model
            then learns what all channels have in common, and reads them one by one.
        fitted: folder of a model whose channels, means and deviations are taken; "": they are
            found and fitted here.
    """

    window: int = 96
    stride: int = 1
    time_column: str = ""
    columns: tuple[str, ...] = ()
    splits: tuple[float, ...] = (0.7, 0.1, 0.2)
    split_rows: tuple[int, ...] = ()
    standardise: bool = True
    independent: bool = False
    fitted: str = ""

    def __post_init__(self) -> None:
        if self.window < 1 or self.stride < 1:
            raise ConfigError(
                f"data.window and data.stride must be at least 1, got {self.window}, {self.stride}"
            )
        if len(self.splits) != 3 or min(self.splits[:2]) <= 0 or self.splits[2] < 0:
            raise ConfigError(f"data.splits must be three shares, got {list(self.splits)}")
        if not math.isclose(sum(self.splits), 1, abs_tol=1e-6):
            raise ConfigError(f"data.splits must add up to 1, got {list(self.splits)}")
        if self.split_rows and (len(self.split_rows) != 3 or min(self.split_rows[:2]) < 1):
            raise ConfigError(
                f"data.split_rows must be three numbers of rows, got {list(self.split_rows)}"
            )


class Parts(NamedTuple):
    """What was read: the channels' names and the series of each part, (time, channel) float64."""

    columns: tuple[str, ...]
    train: list[np.ndarray]
    valid: list[np.ndarray]
    test: list[np.ndarray]
    facts: dict[str, Any]


# Tables


def split_ends(config: Config, num_rows: int, path: Path) -> tuple[int, int, int]:
    """Where the training, validation and test rows of a file end.

    Shares are rounded as the ETT benchmarks do: training and test down, validation has the rest.

    Raises:
        DataError: `split_rows` asks for more rows than there are, or a part to learn from is empty.
    """
    if config.split_rows:
        train, valid, test = np.cumsum(config.split_rows).tolist()
    else:
        train, test = int(num_rows * config.splits[0]), num_rows
        valid = num_rows - int(num_rows * config.splits[2])
    if test > num_rows or not 0 < train < valid:
        raise DataError(
            f"{path}: {num_rows} rows cannot be split by data.split_rows = "
            f"{list(config.split_rows)}, data.splits = {list(config.splits)}"
        )
    return train, valid, test


def read_tables(config: Config, paths: list[Path], with_test: bool) -> Parts:
    """One series per file, split by time."""
    columns: tuple[str, ...] = config.columns
    parts: dict[str, list[np.ndarray]] = {name: [] for name in PARTS}
    bad = BadItems(", ".join(map(str, paths[:3])))
    num_rows = num_missing = 0
    for path in paths:
        content = read_table(path)
        time_column = _time_column(config, content)
        _check_time(content, time_column)
        ends = split_ends(config, len(content.rows), path)
        columns = columns or _channels(content, time_column, ends[0])
        used = content._replace(rows=content.rows[: ends[2] if with_test else ends[1]])
        values = np.stack([_numbers(used, name, bad) for name in columns], axis=1)
        for name, begin, end in zip(PARTS, (0, *ends[:2]), ends, strict=True):
            parts[name].append(values[begin:end])
        num_rows += len(content.rows)
        num_missing += int(np.isnan(values).sum())
    bad.check(sum(s.size for part in parts.values() for s in part))
    facts = {
        "series": len(paths),
        "rows": num_rows,
        "train_rows": sum(map(len, parts["train"])),
        "valid_rows": sum(map(len, parts["valid"])),
        "missing_cells": num_missing,
        **bad.facts(),
    }
    return Parts(columns, **parts, facts=facts)


def stretches(
    path: Path, columns: tuple[str, ...], length: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(file:line, (time, channel) float64) of a table cut every `length` rows; the last is shorter.

    Raises:
        DataError: it cannot be read, lacks a column, or more than 2% of the cells are text.
    """
    content, bad = read_table(path), BadItems(str(path))
    values = np.stack([_numbers(content, name, bad) for name in columns], axis=1)
    bad.check(values.size)
    for begin in range(0, len(values), length):
        yield content.where[begin], values[begin : begin + length]


def _time_column(config: Config, content: Table) -> str:
    """The column of time stamps, "" where there is none."""
    if config.time_column and config.time_column not in content.columns:
        hint = nearest(config.time_column, content.columns)
        raise ConfigError(f"data.time_column: no column {config.time_column!r}{hint}")
    usual = (n for n in content.columns if n.lower() in TIME and n not in config.columns)
    return config.time_column or next(usual, "")


def _check_time(content: Table, name: str) -> None:
    """Time stamps are numbers or dates and rise from row to row."""
    if not name:
        return
    place = content.columns.index(name)
    before, last = -math.inf, ""
    for row, where in zip(content.rows, content.where, strict=True):
        try:
            moment = time_of(row[place])
        except ValueError as error:
            raise DataError(
                f"{where}: {row[place]!r} in {name!r} is no time stamp; write a number or "
                "2024-12-31 23:59:00, or say data.time_column; a column of values is named in "
                "data.columns"
            ) from error
        if moment <= before:
            raise DataError(
                f"{where}: the time stamp {row[place]} does not lie after {last}; sort the rows by "
                f"{name!r} and give one series per file, or say data.time_column"
            )
        before, last = moment, row[place]


def time_of(cell: Any) -> float:
    """A time stamp as a number: itself, or a date in seconds since 1970.

    >>> time_of("17.5"), time_of("1970-01-02"), time_of("1970/01/01 00:01:00")
    (17.5, 86400.0, 60.0)

    Raises:
        ValueError: it is neither.
    """
    value = parsed(cell)
    if isinstance(value, float):
        return value
    moment = datetime.fromisoformat(str(value).replace("/", "-"))
    # without a zone as if it were UTC: clocks that are set back would break the order
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _channels(content: Table, time_column: str, num_train: int) -> tuple[str, ...]:
    """The columns that hold numbers in the training rows."""
    numeric: list[str] = []
    other: list[str] = []
    for place, name in enumerate(content.columns):
        if name == time_column:
            continue
        values = [parsed(row[place]) for row in content.rows[:num_train]]
        num_filled = sum(value is not None for value in values)
        share = sum(isinstance(value, float) for value in values) / max(1, num_filled)
        if MOSTLY_NUMERIC <= share < NUMERIC:
            raise DataError(
                f"{content.where[0]}: column {name!r}: {share:.1%} of the cells are numbers, the "
                "others are text; mend them, or name the channels to read in data.columns"
            )
        (numeric if share >= NUMERIC else other).append(name)
    if not numeric:
        raise DataError(f"{content.where[0]}: no column of numbers: {', '.join(content.columns)}")
    if other:
        console.warn(f"{content.where[0]}: columns that hold no numbers are not read: {other}")
    return tuple(numeric)


def _numbers(content: Table, name: str, bad: BadItems) -> np.ndarray:
    """One channel, (time,) float64: NaN where missing, and where a text stands, which is bad."""
    if name not in content.columns:
        hint = nearest(name, content.columns)
        raise DataError(f"{content.where[0]}: no column {name!r}{hint}")
    place = content.columns.index(name)
    out = np.full(len(content.rows), math.nan)
    for i, row in enumerate(content.rows):
        value = parsed(row[place])
        if isinstance(value, str):
            bad.add(content.where[i], f"{name!r} holds {value!r}, read as missing")
        elif value is not None:
            out[i] = value
    return out


# .ts files


class Cases(NamedTuple):
    """The labelled series of a .ts file.

    Attributes:
        series: (time, channel) float64, NaN where missing.
        labels: what stands after the last colon; None in files without labels.
        where: `file:line` of each.
    """

    series: list[np.ndarray]
    labels: list[str | None]
    where: list[str]


def read_ts(path: Path) -> Cases:
    """A .ts file of the aeon and sktime archives.

    Raises:
        DataError: it cannot be read, or a line is not what the header says.
    """
    header: dict[str, list[str]] = {}
    cases = Cases([], [], [])
    with decoded_text(path) as stream:
        for number, line in enumerate(map(str.strip, stream), start=1):
            if not line or line[0] in "#%":
                continue
            where = f"{path}:{number}"
            if "data" in header:
                series, label = _case(line, header, where)
                if cases.series and series.shape[1] != cases.series[0].shape[1]:
                    raise DataError(
                        f"{where}: {series.shape[1]} channels between colons, but the first series "
                        f"has {cases.series[0].shape[1]}"
                    )
                cases.series.append(series)
                cases.labels.append(label)
                cases.where.append(where)
                continue
            if line[0] != "@":
                raise DataError(f"{where}: expected @data or another @ line, got {line[:40]!r}")
            key, *values = line[1:].split()
            header[key.lower()] = values
            if key.lower() == "timestamps" and "".join(values).lower() != "false":
                raise DataError(f"{where}: series with time stamps inside cannot be read")
    if not cases.series:
        raise DataError(f"{path}: no series after @data")
    return cases


def _case(line: str, header: dict[str, list[str]], where: str) -> tuple[np.ndarray, str | None]:
    """One line: (time, channel) and its label."""
    channels = line.split(":")
    flags = (header.get(key, [""])[0].lower() for key in ("classlabel", "targetlabel"))
    label = channels.pop().strip() if "true" in flags else None
    known = header.get("classlabel", [])[1:]
    if known and label is not None and label not in known:
        raise DataError(
            f"{where}: class {label!r} is not named in @classLabel{nearest(label, known)}"
        )
    try:
        rows = [np.array(c.replace("?", "nan").split(","), dtype=np.float64) for c in channels]
    except ValueError as error:
        raise DataError(f"{where}: not numbers between commas ({error})") from error
    if not rows or len({len(row) for row in rows}) > 1:
        raise DataError(
            f"{where}: channels of {[len(row) for row in rows]} steps; expected one length"
        )
    series = np.stack(rows, axis=1)
    if np.isinf(series).any():
        raise DataError(f"{where}: a value is infinite")
    return series, label


def read_cases(config: Config, paths: list[Path]) -> Parts:
    """The series of .ts files; a hash of its values decides which are held out."""
    other = [str(path) for path in paths if kind_of(path, KNOWN) != ".ts"]
    if other:
        raise DataError(f"{other[0]}: a table among .ts files; give one kind")
    series = [one for path in paths for one in read_ts(path).series]
    widths = {one.shape[1] for one in series}
    if len(widths) > 1:
        raise DataError(
            f"{paths[0]} and others: files with {sorted(widths)} channels; give equal ones"
        )
    digests = np.array([digest((s.shape, s.tobytes())) for s in series], dtype=np.uint64)
    valid = held_out(digests, config.splits[1], str(paths[0]))
    train, held = ([s for s, v in zip(series, valid, strict=True) if v == side] for side in (0, 1))
    facts = {
        "series": len(series),
        "rows": sum(map(len, series)),
        "train_rows": sum(map(len, train)),
        "valid_rows": sum(map(len, held)),
        "duplicates": len(digests) - len(np.unique(digests)),
        "missing_cells": int(sum(np.isnan(s).sum() for s in series)),
        **BadItems(str(paths[0])).facts(),
    }
    columns = tuple(str(i + 1) for i in range(widths.pop()))
    return Parts(columns, train, held, [], facts)
