"""Labelled files as plain rows that remember their line; labels.py checks what they hold.

| suffix                   | what                                                                  |
|--------------------------|-----------------------------------------------------------------------|
| .csv                     | header row, quotes as in spreadsheets                                 |
| .tsv                     | header row, no quoting at all: a quote is a character, as in GLUE     |
| .jsonl                   | one JSON object per line                                              |
| .parquet                 | a table                                                               |
| .conllu                  | CoNLL-U; multiword ranges and empty nodes are left out                |
| .conll .bio .bmes .txt   | one word and its tag(s) per line, a blank line between sentences      |

Each may end in .gz, .xz or .zst, except .parquet. Text is UTF-8, with or without byte-order mark.
"""

import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from selfsup.errors import ConfigError, DataError, nearest

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
SENTENCES = (".conllu", ".conll", ".bio", ".bmes", ".txt")
COMPRESSED = (".gz", ".xz", ".zst")
CONLLU_COLUMNS = {"upos": 3, "xpos": 4, "deprel": 7}
Pick = Callable[[int, list[str]], tuple[str, str]]  # (line number, cells) -> (word, tag)
LARGEST_CELL = 2**30  # characters; the csv module's own limit of 128 Ki is less than a book


# Column names that are looked for, in any case of letters, where none is given.
TEXT = (
    *("text", "sentence", "sentence1", "review", "text_a", "content", "premise", "question"),
    *("seq", "sequence"),
)
LABEL = ("label", "labels", "class", "target", "category", "score")
USUAL = {
    "text": TEXT,
    "text_b": ("text_b", "sentence2", "hypothesis"),
    "label": LABEL,
    "words": (*TEXT, "tokens", "words"),
    "tags": (*LABEL, "tags"),
    "source": ("source", "src", "input", "text", "document", "dialogue", "article", "classical"),
    "target": ("target", "tgt", "output", "summary", "translation", "modern", *LABEL[:2]),
}


class Record(NamedTuple):
    """One row of a table: where it stands, as `file:line`, and its cells by column."""

    where: str
    cells: dict[str, Any]


class Sentence(NamedTuple):
    """One tagged sentence and the `file:line` of its first word."""

    where: str
    words: list[str]
    tags: list[str]


def suffix_of(path: Path) -> str:
    """The suffix that names the format, lower-case, without a compression suffix.

    Raises:
        DataError: a folder, or a format that is not known.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; give one file")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in TABLES + SENTENCES:
        raise DataError(
            f"{path}: the suffix does not name a known format; known: "
            f"{' '.join(TABLES + SENTENCES)}, each also with {' '.join(COMPRESSED)}"
        )
    return suffix


def table(path: Path, headerless: bool = False) -> tuple[list[str], list[Record]]:
    """The columns and the rows of a .csv, .tsv, .jsonl or .parquet file.

    Args:
        path: the file.
        headerless: the first line is data already; columns are called "1", "2", ...

    Raises:
        DataError: unreadable, empty, or a row whose cells do not fit the header.
    """
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return _parquet(path)
    text = whole_text(path)
    if suffix == ".jsonl":
        return _jsonl(path, text)
    lines = _csv(path, text) if suffix == ".csv" else _tsv(text)
    filled = [(number, cells) for number, cells in lines if cells]
    if not filled:
        raise DataError(f"{path}: the file is empty; expected a header row and labelled rows")
    columns = [str(i + 1) for i in range(len(filled[0][1]))]
    if not headerless:
        columns = [name.strip() for name in filled.pop(0)[1]]
        if len(set(columns)) < len(columns):
            raise DataError(f"{path}:1: two columns share a name; columns: {', '.join(columns)}")
        if len(columns) == 1 and {";", "\t"} & set(columns[0]):
            raise DataError(
                f"{path}:1: one column, {columns[0]!r}: is it separated by something else? "
                ".csv has commas between cells, .tsv has tabs"
            )
    for number, cells in filled:
        if len(cells) != len(columns):
            raise DataError(
                f"{path}:{number}: {len(cells)} cells, but {len(columns)} columns: "
                f"{', '.join(columns)}; check the separator{' and quotes' * (suffix == '.csv')}"
            )
    return columns, [
        Record(f"{path}:{number}", dict(zip(columns, cells, strict=True)))
        for number, cells in filled
    ]


def has_usual(columns: list[str], what: str) -> bool:
    """Whether a column has a usual name for `what`, a key of `USUAL`."""
    return any(column.lower() in USUAL[what] for column in columns)


def find_column(path: Path, columns: list[str], what: str, given: str | int | None) -> str:
    """The column that is `given`, or the one that has a usual name for `what`, a key of `USUAL`.

    Raises:
        DataError: no such column, none of a usual name, or several of them.
    """
    options = {"words": "text", "tags": "label", "source": "text", "target": "label"}
    option = options.get(what, what)
    shown = f"columns: {', '.join(map(repr, columns))}"
    if given is not None:
        if str(given) not in columns:
            hint = nearest(str(given), columns)
            raise DataError(f"{path}:1: no column {str(given)!r} for {option}{hint}; {shown}")
        return str(given)
    found = [column for column in columns if column.lower() in USUAL[what]]
    if len(found) > 1:
        raise DataError(
            f"{path}:1: {' and '.join(map(repr, found))} could each be the {what} column; say "
            f"which with {option}=NAME (a pair of texts: text=NAME text_b=NAME); {shown}"
        )
    if not found:
        raise DataError(
            f"{path}:1: no {what} column was found ({', '.join(USUAL[what])}); say which with "
            f"{option}=NAME, or give text and label as column numbers if there is no header row; "
            f"{shown}"
        )
    return found[0]


def sentences(path: Path, label: str | int | None = None) -> Iterator[Sentence]:
    """The sentences of a .conllu, .conll, .bio, .bmes or .txt file.

    Columns are separated by tabs where a line has one, else by spaces. A sentence that is only
    -DOCSTART- marks a new document in CoNLL-2003 and is left out.

    Args:
        path: the file.
        label: which tag. CoNLL-U: upos (the default), xpos, deprel or feats:NAME, where a word
            without that feature has the tag "_". Else: the number of the column, from 1 (default:
            the last).

    Raises:
        DataError: unreadable, or a line that lacks the word or the tag.
        ConfigError: `label` names no tag.
    """
    conllu = suffix_of(path) == ".conllu"
    pick = _conllu_tag(path, label) if conllu else _column_tag(path, label)
    words: list[str] = []
    tags: list[str] = []
    start = 0
    for number, line in enumerate([*_lines(whole_text(path)), ""], start=1):
        if not line.strip():
            if words and words != ["-DOCSTART-"]:
                yield Sentence(f"{path}:{start}", words, tags)
            words, tags = [], []
            continue
        if conllu and line.startswith("#"):
            continue
        cells = line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))
        if conllu and re.fullmatch(r"\d+[-.]\d+", cells[0]):
            continue
        start = start if words else number
        word, tag = pick(number, cells)
        words.append(word)
        tags.append(tag)


def _conllu_tag(path: Path, label: str | int | None) -> Pick:
    name, _, feature = str(label or "upos").partition(":")
    if name not in CONLLU_COLUMNS and not (name == "feats" and feature):
        known = [*CONLLU_COLUMNS, "feats:NAME"]
        raise ConfigError(f"{path}: unknown CoNLL-U tag {label!r}{nearest(str(label), known)}")

    def pick(number: int, cells: list[str]) -> tuple[str, str]:
        if len(cells) != 10 or not cells[1]:
            raise DataError(
                f"{path}:{number}: a CoNLL-U word line has 10 cells separated by tabs, "
                f"the word in the second; got {len(cells)}"
            )
        if not feature:
            tag = cells[CONLLU_COLUMNS[name]]
        else:
            found = dict(f.split("=", 1) for f in cells[5].split("|") if "=" in f)
            tag = found.get(feature, "_")
        if not tag.strip():
            raise DataError(f"{path}:{number}: the word {cells[1]!r} has an empty {label or name}")
        return cells[1], tag

    return pick


def _column_tag(path: Path, label: str | int | None) -> Pick:
    if label is not None and (not str(label).isdecimal() or int(label) < 2):
        raise ConfigError(
            f"{path}: label = {label!r}; in this file the tag is named by the number of its "
            "column, 2 or more, as column 1 holds the word"
        )

    def pick(number: int, cells: list[str]) -> tuple[str, str]:
        place = len(cells) - 1 if label is None else int(label) - 1
        if place < 1 or place >= len(cells):
            raise DataError(
                f"{path}:{number}: a word without its tag: {len(cells)} column(s), none in place "
                f"{max(place, 1) + 1}; sentences are separated by an empty line"
            )
        if not cells[0] or not cells[place].strip():
            raise DataError(f"{path}:{number}: the word or its tag is empty: {cells}")
        return cells[0], cells[place].strip()

    return pick


def _csv(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(LARGEST_CELL)
    # Strict: a quote that is never closed would otherwise swallow the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    try:
        for cells in reader:
            yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{start}: not CSV ({error}); commas separate cells, a quote inside quotes "
            "is written twice, and a file without quoting is called .tsv"
        ) from error


def _tsv(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(_lines(text), start=1):
        yield number, line.split("\t") if line else []


def _jsonl(path: Path, text: str) -> tuple[list[str], list[Record]]:
    records = []
    columns: dict[str, None] = {}
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(cells, dict):
            raise DataError(f"{path}:{number}: expected a JSON object {{...}}, got {line[:40]!r}")
        records.append(Record(f"{path}:{number}", cells))
        columns.update(dict.fromkeys(cells))
    if not records:
        raise DataError(f"{path}: the file is empty; expected one JSON object per line")
    return list(columns), records


def _parquet(path: Path) -> tuple[list[str], list[Record]]:
    import pyarrow
    from pyarrow import parquet

    try:
        content = parquet.read_table(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file ({error})") from error
    rows = enumerate(content.to_pylist(), start=1)
    return content.column_names, [Record(f"{path}: row {number}", cells) for number, cells in rows]


def _lines(text: str) -> list[str]:
    """Lines as editors count them; unlike splitlines, a form feed or U+2028 stays in its line."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def whole_text(path: Path) -> str:
    """The text of a file, unpacked.

    Raises:
        DataError: it cannot be read, is a damaged archive, or is not UTF-8.
    """
    content = _content(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); "
            "save the file as UTF-8, for example with iconv"
        ) from error


def _content(path: Path) -> bytes:
    broken = (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError)
    try:
        content = path.read_bytes()
        match path.suffix.lower():
            case ".gz":
                return gzip.decompress(content)
            case ".xz":
                return lzma.decompress(content)
            case ".zst":
                return _unpacked_zst(content)
        return content
    except broken as error:  # before OSError, which BadGzipFile is one of
        raise DataError(
            f"{path}: not a whole {path.suffix} file ({error}); fetch or pack it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _unpacked_zst(content: bytes) -> bytes:
    frames = []
    while content:
        frame = zstandard.ZstdDecompressor().decompressobj()
        frames.append(frame.decompress(content))
        if not frame.eof:  # the library gives what there is of a cut file, without an error
            raise EOFError("it ends early")
        content = frame.unused_data
    return b"".join(frames)
