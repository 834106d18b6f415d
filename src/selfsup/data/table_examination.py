"""What tables and series hold, for `selfsup doctor`; one file is in memory at a time."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np

from selfsup.data.examination import NAMED, Tally, line
from selfsup.data.series_files import KNOWN as SERIES
from selfsup.data.series_files import TIME, read_ts, time_of
from selfsup.data.table_files import (
    KNOWN,
    MOSTLY_NUMERIC,
    NUMERIC,
    Table,
    check_columns,
    files_of,
    kind_of,
    parsed,
    read_table,
)
from selfsup.errors import DataError

SHOWN_COLUMNS = 40  # with something to say about them
LONG_STEP = 1.5  # times the usual step: months differ in their days
MAX_CATEGORIES = 1000


@dataclass
class _Column:
    """What stands in the cells of one column."""

    numbers: int = 0
    missing: int = 0
    texts: int = 0
    first_texts: list[str] = field(default_factory=list)
    categories: set[object] = field(default_factory=set)

    def add(self, where: str, cell: object) -> None:
        """One cell more."""
        value = parsed(cell)
        if value is None:
            self.missing += 1
            return
        if len(self.categories) <= MAX_CATEGORIES:
            self.categories.add(value)
        if isinstance(value, float):
            self.numbers += 1
            return
        self.texts += 1
        if len(self.first_texts) < NAMED:
            self.first_texts.append(f"{where}: {value!r}")

    @property
    def share(self) -> float:
        """Of the filled cells, how many are numbers."""
        return 1 - self.texts / max(1, self.numbers + self.texts)

    def words(self) -> str:
        """What a person should know of it."""
        many = len(self.categories)
        kind = "numeric" if self.share >= NUMERIC else "categorical"
        said = [kind if kind == "numeric" else f"{kind}, {_at_most(many)} different values"]
        if self.missing:
            said.append(f"{self.missing:,} missing")
        if self.texts and self.share >= MOSTLY_NUMERIC:
            said.append(f"{self.texts:,} hold text ({'; '.join(self.first_texts)})")
        if MOSTLY_NUMERIC <= self.share < NUMERIC:
            said[0] = f"UNCLEAR: {self.share:.1%} are numbers; mend it, or say what it holds"
        return ", ".join(said)


def _at_most(count: int) -> str:
    return f"more than {MAX_CATEGORIES:,}" if count > MAX_CATEGORIES else f"{count:,}"


@dataclass
class _Columns:
    """The columns of tables with equal columns."""

    source: str
    names: list[str] = field(default_factory=list)
    columns: list[_Column] = field(default_factory=list)
    rows: int = 0

    def add(self, content: Table) -> None:
        """One file more."""
        self.names = self.names or content.columns
        self.columns = self.columns or [_Column() for _ in self.names]
        self.rows += len(content.rows)
        for row, where in zip(content.rows, content.where, strict=True):
            for column, cell in zip(self.columns, row, strict=True):
                column.add(where, cell)

    def lines(self, without: str = "") -> Iterator[str]:
        """One line for each column that is not all numbers, and a sum; `without` the time."""
        shown = [(n, c) for n, c in zip(self.names, self.columns, strict=True) if n != without]
        numeric = sum(column.share >= NUMERIC for _, column in shown)
        yield line("columns", f"{numeric:,} numeric, {len(shown) - numeric:,} other")
        missing = sum(column.missing for _, column in shown)
        yield line("missing", f"{missing:,} of {self.rows * len(shown):,} cells")
        notable = [(n, c) for n, c in shown if c.missing or c.texts or c.share < NUMERIC]
        for name, column in notable[:SHOWN_COLUMNS]:
            yield line(f"  {name}", column.words())
        if len(notable) > SHOWN_COLUMNS:
            yield line("  ...", f"{len(notable) - SHOWN_COLUMNS:,} columns more")

    def check(self) -> None:
        """Refuses columns that are neither numbers nor categories."""
        unclear = [
            name
            for name, column in zip(self.names, self.columns, strict=True)
            if MOSTLY_NUMERIC <= column.share < NUMERIC
        ]
        if unclear:
            raise DataError(
                f"{self.source}: not clear whether numbers or text: {', '.join(unclear)}; mend "
                "them, or name them in data.categorical, data.leave_out or data.columns"
            )


def _tables(paths: list[Path]) -> Iterator[Table]:
    """The files one after another, with equal columns."""
    first: Table | None = None
    for path in paths:
        content = read_table(path)
        first = first or content._replace(rows=[], where=[])
        check_columns(path, content, paths[0], first)
        yield content


def examine_tables(source: str) -> Iterator[str]:
    """Counts of rows, and what each column holds.

    Raises:
        DataError: a file cannot be read, columns differ between files, or a column is unclear.
    """
    tally, columns = Tally(source), _Columns(source)
    for content in _tables(files_of(source, KNOWN)):
        columns.add(content)
        for row in content.rows:
            tally.keep(repr([parsed(cell) for cell in row]).encode())
    yield from tally.lines("rows")
    yield from columns.lines()
    columns.check()


def examine_series(source: str) -> Iterator[str]:
    """Counts of rows or series, what each channel holds, and the steps of time.

    Raises:
        DataError: a file cannot be read, kinds of files are mixed, columns differ between files or
            are unclear, or time does not rise.
    """
    paths = files_of(source, SERIES)
    short = [kind_of(path, SERIES) == ".ts" for path in paths]
    if any(short) and not all(short):
        raise DataError(f"{paths[short.index(False)]}: a table among .ts files; give one kind")
    if all(short):
        yield from _examine_cases(source, paths)
    else:
        yield from _examine_long(source, paths)


def _examine_cases(source: str, paths: list[Path]) -> Iterator[str]:
    tally = Tally(source)
    lengths: list[int] = []
    widths: set[int] = set()
    missing = values = 0
    for path in paths:
        cases = read_ts(path)
        for series, label in zip(cases.series, cases.labels, strict=True):
            tally.keep(repr(series.shape).encode() + series.tobytes(), label or "")
            lengths.append(len(series))
            widths.add(series.shape[1])
            missing, values = missing + int(np.isnan(series).sum()), values + series.size
    yield from tally.lines("series")
    yield line("channels", ", ".join(map(str, sorted(widths))))
    yield line("length", f"{min(lengths):,} to {max(lengths):,} steps")
    yield line("missing", f"{missing:,} of {values:,} values")


@dataclass
class _Clock:
    """The steps of time from row to row, in seconds where the time stamps are dates."""

    dates: bool = False
    usual: Counter[float] = field(default_factory=Counter)  # the median steps of files
    gaps: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def add(self, content: Table, name: str) -> None:
        """The time stamps of one file."""
        place = content.columns.index(name)
        moments: list[float] = []
        where: list[str] = []
        for row, at in zip(content.rows, content.where, strict=True):
            try:
                moments.append(time_of(row[place]))
                where.append(f"{at}: {row[place]}")
            except ValueError:
                self.bad.append(f"{at}: {row[place]!r} is no time stamp")
        if len(moments) < 2:
            return
        self.dates = not isinstance(parsed(content.rows[0][place]), float)
        steps = np.diff(moments)
        usual = float(np.median(steps))
        self.usual[usual] += 1
        for i in np.flatnonzero(steps <= 0):
            self.bad.append(f"{where[i + 1]} does not lie after the row before")
        for i in np.flatnonzero(steps > LONG_STEP * usual):
            self.gaps.append(f"{self._length(steps[i])} before {where[i + 1]}")

    def lines(self) -> Iterator[str]:
        """The usual step, the gaps, and what cannot be used."""
        steps = (f"{self._length(step)}" for step, _ in self.usual.most_common(NAMED))
        yield line("step", " or ".join(steps) or "none")
        yield line("gaps", _named(self.gaps))
        if self.bad:
            yield line("bad time", _named(self.bad))

    def _length(self, step: float) -> str:
        return str(timedelta(seconds=float(step))) if self.dates else f"{step:g}"


def _named(found: list[str]) -> str:
    named = "; ".join(found[:NAMED]) + "; ..." * (len(found) > NAMED)
    return f"{len(found):,}" + f" ({named})" * bool(found)


def _examine_long(source: str, paths: list[Path]) -> Iterator[str]:
    columns, clock, name = _Columns(source), _Clock(), ""
    for content in _tables(paths):
        name = next((column for column in content.columns if column.lower() in TIME), "")
        columns.add(content)
        if name:
            clock.add(content, name)
    yield line("readable", "yes, all of it")
    yield line("series", f"{len(paths):,}")
    yield line("rows", f"{columns.rows:,}")
    yield from columns.lines(without=name)
    yield line("time", name or f"no column of a usual name ({', '.join(TIME)}): rows are in order")
    if name:
        yield from clock.lines()
    if clock.bad:
        raise DataError(
            f"{source}: {len(clock.bad):,} time stamps cannot be used ({clock.bad[0]}); time must "
            "rise from row to row"
        )
    columns.check()
