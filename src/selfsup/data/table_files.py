"""Tables in files: finding and reading them, what a cell holds, and which rows are held out.

The suffixes are in `table.py`; `series.py` reads its tables with these functions too.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from selfsup.data.label_files import COMPRESSED, table
from selfsup.data.sources import Wanted, find
from selfsup.errors import ConfigError, DataError, nearest

KNOWN = (".csv", ".tsv", ".txt", ".parquet", ".npz", ".npy")
MISSING = ("", "na", "nan", "null", "?")
NUMERIC, MOSTLY_NUMERIC = 0.98, 0.9  # shares of numbers among the filled cells
MAX_COPIES, FEW_COPIES = 0.01, 10  # of one example, as share and number, that may be held out
Value = float | str | None  # a number, a text, or nothing


class Table(NamedTuple):
    """The cells of one or more files, as they are written.

    Attributes:
        columns: their names.
        rows: cells by row: text, numbers or None.
        where: the place of each row, for messages: `file:line`.
        beside: arrays of an .npz file with one value per row.
    """

    columns: list[str]
    rows: list[list[Any]]
    where: list[str]
    beside: dict[str, list[Any]]


def kind_of(path: Path, known: Sequence[str]) -> str:
    """The suffix without a compression suffix, lower-case; "" when it is not in `known`."""
    name = path.name.lower()
    for compression in COMPRESSED:
        name = name.removesuffix(compression)
    return next((suffix for suffix in known if name.endswith(suffix)), "")


def files_of(source: str | Path | Sequence[str | Path], known: Sequence[str]) -> list[Path]:
    """The files that a source names, each once; a warning names what is passed over.

    Args:
        source: files, folders (searched through), globs, or a list of those.
        known: suffixes to read, each also with a compression suffix.

    Raises:
        DataError: one of them gives no file to read.
    """
    wanted = Wanted(
        what="table",
        known=" ".join(known),
        reads=lambda path: bool(kind_of(path, known)),
        refusal=": files of other kinds are not read; known:",
        hub=False,
    )
    return [place for place in find(source, wanted) if isinstance(place, Path)]


def read_table(path: Path, header: bool = True, array: str = "X") -> Table:
    """One file; see the table of suffixes in `table.py`.

    Args:
        path: the file.
        header: the first line of a text file names the columns.
        array: which array of an .npz file.

    Raises:
        DataError: it cannot be read, holds no row, or its rows differ in length.
    """
    kind = kind_of(path, KNOWN)
    if not kind:
        raise DataError(f"{path}: unknown suffix; known: {' '.join(KNOWN)}")
    if kind in (".npz", ".npy"):
        return _arrays(path, array)
    columns, records = table(path, headerless=not header)
    rows = [list(record.cells.values()) for record in records]
    where = [record.where for record in records]
    if kind == ".txt" and len(columns) == 1:
        rows = [row[0].split(",") for row in rows]
        columns = columns[0].split(",") if header else [str(i + 1) for i in range(len(rows[0]))]
        for row, place in zip(rows, where, strict=True):
            if len(row) != len(columns):
                raise DataError(f"{place}: {len(row)} cells, but {len(columns)} columns")
    if not rows:
        raise DataError(f"{path}: the file has a header, but no row")
    return Table([name.strip() for name in columns], rows, where, {})


def _arrays(path: Path, name: str) -> Table:
    try:
        loaded = np.load(path, allow_pickle=False)  # a pickle could run anything
        arrays = {n: loaded[n] for n in loaded.files} if hasattr(loaded, "files") else {"": loaded}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise DataError(f"{path}: not arrays of numbers or text ({error})") from error
    rows = arrays.get(name, arrays.get(""))
    if rows is None:
        raise DataError(f"{path}: no array {name!r} (data.array){nearest(name, arrays)}")
    if rows.ndim != 2 or rows.size == 0 or rows.dtype.names:
        raise DataError(f"{path}: expected an array (row, column), got shape {rows.shape}")
    beside = {n: a.tolist() for n, a in arrays.items() if a.shape == rows.shape[:1]}
    columns = [str(i + 1) for i in range(rows.shape[1])]
    return Table(columns, rows.tolist(), [f"{path}: row {i + 1}" for i in range(len(rows))], beside)


def read_all(paths: list[Path], header: bool, array: str) -> Table:
    """All files as one table; see `read_table`."""
    first = whole = read_table(paths[0], header, array)
    for path in paths[1:]:
        more = read_table(path, header, array)
        check_columns(path, more, paths[0], first)
        beside = {name: cells + more.beside[name] for name, cells in whole.beside.items()}
        whole = Table(first.columns, whole.rows + more.rows, whole.where + more.where, beside)
    return whole


def check_columns(path: Path, content: Table, first_path: Path, first: Table) -> None:
    """Refuses a file whose columns, or arrays beside them, are not those of the first one."""
    if content.columns != first.columns or content.beside.keys() != first.beside.keys():
        raise DataError(
            f"{path}: columns {', '.join([*content.columns, *content.beside])}, but {first_path} "
            f"has {', '.join([*first.columns, *first.beside])}; give tables with equal columns"
        )


def normal_rows(content: Table, normal: str) -> tuple[Table, int]:
    """The rows that fit "column=value" (all where it is empty), and how many are left out."""
    if not normal:
        return content, 0
    name, _, value = normal.partition("=")
    if name in content.columns:
        place = content.columns.index(name)
        cells = [row[place] for row in content.rows]
    elif name in content.beside:
        cells = content.beside[name]
    else:
        hint = nearest(name, [*content.columns, *content.beside])
        raise ConfigError(f"data.normal = {normal!r}: no column {name!r}{hint}")
    kept = [i for i, cell in enumerate(cells) if parsed(cell) == parsed(value)]
    if not kept:
        found = ", ".join(sorted({str(cell) for cell in cells})[:10])
        raise DataError(f"data.normal = {normal!r}: no row has that value; found: {found}")
    rows, where = [content.rows[i] for i in kept], [content.where[i] for i in kept]
    return content._replace(rows=rows, where=where), len(cells) - len(kept)


# Cells


def parsed_column(content: Table, name: str) -> list[Value]:
    """The parsed cells of one column."""
    if name not in content.columns:
        hint = nearest(name, content.columns)
        raise DataError(f"{content.where[0]}: no column {name!r}, which the model reads{hint}")
    place = content.columns.index(name)
    return [parsed(row[place]) for row in content.rows]


def parsed(cell: Any) -> Value:
    """A finite number, a text, or None where the value is missing.

    >>> parsed(" 1.50"), parsed(True), parsed("red"), parsed("inf"), parsed("NA"), parsed(None)
    (1.5, 1.0, 'red', 'inf', None, None)
    """
    text = cell.strip() if isinstance(cell, str) else cell
    if text is None or (isinstance(text, str) and text.lower() in MISSING):
        return None
    try:
        value = float(text)
    except (TypeError, ValueError):
        return str(text)
    if math.isnan(value):
        return None
    usual = math.isfinite(value) and not (isinstance(text, str) and "_" in text)  # 1_000
    return value if usual else str(text)


def category(value: float | str) -> str:
    """The name of a category: whole numbers without a point, so that 1, 1.0 and "1" are one.

    >>> category("red"), category(1.0), category(0.5)
    ('red', '1', '0.5')
    """
    if isinstance(value, str):
        return value
    return str(int(value)) if value.is_integer() else repr(value)


# Telling examples apart


def digest(content: Any) -> int:
    """A 64-bit hash of a value's `repr`."""
    return int.from_bytes(hashlib.blake2b(repr(content).encode(), digest_size=8).digest(), "big")


def held_out(digests: np.ndarray, fraction: float, source: str) -> np.ndarray:
    """Which examples are the validation part, (examples,) bool; equal digests fall on one side.

    An example with copies that are more than 1% of all (and more than ten) stays in the training
    part: no hash should decide that the most usual row of a table is never learned from.

    Raises:
        DataError: fewer than two different examples.
    """
    found, places, counts = np.unique(digests, return_inverse=True, return_counts=True)
    if len(found) < 2:
        raise DataError(f"{source}: needs two different examples to train and to validate")
    usual = counts[places] > max(FEW_COPIES, MAX_COPIES * len(digests))
    chosen = (digests / 2.0**64 < fraction) & ~usual
    if not chosen.any():  # few examples
        chosen = digests == found[counts.argmin()]
    if chosen.all():
        chosen = digests != found[counts.argmax()]
    return chosen


def fingerprint(train: np.ndarray, *settings: Any) -> str:
    """64 hexadecimal digits for what a model is trained on and the settings that made it."""
    return hashlib.sha256(train.tobytes() + repr(settings).encode()).hexdigest()
