"""What is inside a text file of each format, as a stream of pieces.

| extension | one document is                                                    |
|-----------|--------------------------------------------------------------------|
| .txt      | the file; `split` makes it a line, or what blank lines separate    |
| .jsonl    | a line: an object with the text column, or a string                |
| .json     | an element of the list, or of objects written one after another    |
| .csv .tsv | a row; the first row names the columns; .tsv knows no quotes       |
| .parquet  | a row                                                              |

Each also with .gz, .xz or .zst behind it. Nothing is held whole in memory but one record; errors
name the file, and the line where there is one.

A damaged line, row or element is given as the `DataError` that says what is wrong with it, and
reading goes on behind it. Damage without such bounds is raised.
"""

import csv
import io
import json
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, Literal

from selfsup.data.unpacking import (
    CHUNK,
    COMPRESSIONS,
    File,
    cleared,
    compression_of,
    is_utf8,
    lenient_text,
    not_utf8,
    unpacked,
)
from selfsup.errors import DataError, nearest

FORMATS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
KNOWN = f"{' '.join(FORMATS)}, each also with {' '.join(COMPRESSIONS)}"
LONGEST = 1 << 26  # characters of a field in .csv; a forgotten quote may hold no more in memory
Split = Literal["file", "line", "blank_line"]
Take = Callable[[Any, str, str], Any]  # of (record, column, "file:place"): `text_of`, `record_of`
Piece = tuple[int, str | DataError]


def format_of(path: File) -> tuple[str, str]:
    """(format, compression) by the extensions, "" where there is none."""
    compression = compression_of(path)
    name = path.name.lower().removesuffix(compression)
    return next((f for f in FORMATS if name.endswith(f)), ""), compression


def fragments(path: File, column: str, split: Split) -> Iterator[Piece]:
    """Pieces of the documents of one file: neighbours with the same place are one document.

    Args:
        path: a file with one of the known extensions.
        column: where the text is, in formats that have columns.
        split: what a document is in .txt files.

    Yields:
        (place, text): place is the line, row or element, from 1; 0 where the file is the document.
        (place, error): a line, row or element that cannot be used; of a line of more than 65,536
        characters only a part may be meant.

    Raises:
        DataError: the file is damaged as a whole, UTF-16, or lacks the column.
    """
    if format_of(path)[0] == ".txt":
        return _txt(path, split)
    return _taken(path, column, text_of)


def records(path: File, column: str) -> Iterator[tuple[int, Any]]:
    """The documents of one file of a format with columns, with all of these, each whole in memory.

    Args:
        path: a file with one of the known extensions, but .txt.
        column: where the text is; it is a string in every record.

    Yields:
        (place, record) or (place, error): as in `fragments`.

    Raises:
        DataError: as `fragments`.
    """
    return _taken(path, column, record_of)


def _taken(path: File, column: str, take: Take) -> Iterator[tuple[int, Any]]:
    kind = format_of(path)[0]
    if kind == ".jsonl":
        return _jsonl(path, column, take)
    if kind == ".json":
        return _json(path, column, take)
    if kind == ".parquet":
        return _parquet(path, column, take)
    return _csv(path, column, "\t" if kind == ".tsv" else ",", take)


def _whole_txt(path: File) -> Iterator[Piece]:
    """The file as one document: stretches of many lines where they are sound."""
    with lenient_text(path) as stream:
        chunk, line = stream.read(CHUNK), 1
        if not chunk:
            yield 0, ""  # an empty file is an empty document
        while chunk:
            chunk += stream.readline(CHUNK)  # cuts no line, or one that is longer
            if is_utf8(chunk):
                yield 0, chunk
            else:
                for number, text in enumerate(io.StringIO(chunk), start=line):
                    yield 0, text if is_utf8(text) else not_utf8(text, f"{path}:{number}")
            line += chunk.count("\n")
            chunk = stream.read(CHUNK)


def _txt(path: File, split: Split) -> Iterator[Piece]:
    if split == "file":
        yield from _whole_txt(path)
        return
    with lenient_text(path) as stream:
        line, paragraph = 1, 1
        line_begins = paragraph_begins = True
        while fragment := stream.readline(CHUNK):
            text = fragment.removesuffix("\n")
            if not is_utf8(fragment):
                yield line, not_utf8(fragment, f"{path}:{line}")
            elif split == "line":
                yield line, text
            elif line_begins and len(fragment) < CHUNK and not text.strip():
                paragraph, paragraph_begins = line + 1, True
            else:
                joint = "\n" if line_begins and not paragraph_begins else ""
                yield paragraph, joint + text
                paragraph_begins = False
            line_begins = fragment.endswith("\n")
            line += line_begins


def _jsonl(path: File, column: str, take: Take) -> Iterator[tuple[int, Any]]:
    def record_in(text: str, where: str) -> Any:
        if not is_utf8(text):
            raise not_utf8(text, where)
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); "
                "every line must be one object"
            ) from error
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, deep nesting
            raise DataError(f"{where}: JSON that cannot be read ({error})") from error
        return take(record, column, where)

    with lenient_text(path) as stream:
        for line, text in enumerate(stream, start=1):
            if not text.isspace():
                yield line, or_error(record_in, text, f"{path}:{line}")


def _json(path: File, column: str, take: Take) -> Iterator[tuple[int, Any]]:
    """A list, or objects one after another, decoded element by element."""
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")

    def element(record: Any, text: str, where: str) -> Any:
        if not is_utf8(text):
            raise not_utf8(text, where)
        return take(record, column, where)

    with lenient_text(path) as stream:
        held, at, line, number = stream.read(CHUNK), 0, 1, 0
        is_list = held.lstrip().startswith("[")
        if is_list:
            at = held.index("[") + 1
        while True:
            start = gap.match(held, at).end()  # type: ignore[union-attr]  # matches nothing too
            if is_list and held.startswith("]", start):
                return
            try:
                record, end = decoder.raw_decode(held, start)
            except json.JSONDecodeError as error:
                more = stream.read(max(CHUNK, len(held)))  # doubling: the work stays linear
                if more:
                    line += held.count("\n", 0, at)
                    held, at = held[at:] + more, 0
                    continue
                if start == len(held) and not is_list:
                    return
                line += held.count("\n", 0, error.pos)
                raise DataError(f"{path}:{line}: not JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                line += held.count("\n", 0, start)
                raise DataError(f"{path}:{line}: JSON that cannot be read ({error})") from error
            number += 1
            where = f"{path}: element {number}"
            yield number, or_error(element, record, held[start:end], where)
            at = end


def _csv(path: File, column: str, delimiter: str, take: Take) -> Iterator[tuple[int, Any]]:
    with lenient_text(path, newline="") as stream:
        rows = _csv_rows(path, stream, delimiter)
        _, header = next(rows, (1, None))
        if header is None:
            return
        if isinstance(header, DataError):
            raise header
        if column not in header:
            raise _no_column(f"{path}:1", column, header)
        place = header.index(column)

        def record_in(row: list[str] | DataError, where: str) -> Any:
            if isinstance(row, DataError):
                return row
            if len(row) != len(header):
                raise DataError(
                    f"{where}: {len(row)} fields, but the first row names {len(header)}; a text "
                    f"that holds {delimiter!r} is quoted in .csv, and cannot stand in .tsv"
                )
            record = {**dict(zip(header, row, strict=True)), column: row[place]}
            return take(record, column, where)

        for line, row in rows:
            if row:  # blank lines are no rows
                yield line, or_error(record_in, row, f"{path}:{line}")


def _csv_rows(
    path: File, stream: IO[str], delimiter: str
) -> Iterator[tuple[int, list[str] | DataError]]:
    """(line where it begins, row); where quotes do not fit, one line is given up and the next read.

    So a forgotten quote costs its own line: it does not swallow the rest of the file. In .tsv a
    quote is a character, as in GLUE and as labelled files are read.
    """
    csv.field_size_limit(LONGEST)  # the default refuses 131,073 characters
    again = deque[str]()  # lines that are to be read once more
    held: list[str] = []  # the lines of one row
    line, ended = 1, False

    def read() -> str:
        held.append(again.popleft() if again else stream.readline())
        return held[-1]

    while not ended:
        if delimiter == "\t":
            rows = csv.reader(iter(read, ""), delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
        else:
            rows = csv.reader(iter(read, ""), delimiter=delimiter, strict=True)
        try:
            for row in rows:
                bad = next((text for text in held if not is_utf8(text)), None)
                yield line, row if bad is None else not_utf8(bad, f"{path}:{line}")
                line += len(held)
                held.clear()
            ended = True
        except csv.Error as error:
            again.extendleft(reversed(held[1:]))
            held.clear()
            yield (
                line,
                DataError(
                    f"{path}:{line}: {error}; a text with quotes is written in quotes, with each "
                    "quote inside it doubled"
                ),
            )
            line += 1


def _parquet(path: File, column: str, take: Take) -> Iterator[tuple[int, Any]]:
    import pyarrow as arrow
    from pyarrow import parquet

    with cleared(path), tempfile.TemporaryFile() as file, unpacked(path) as stream:
        if compression_of(path):  # Parquet is read from its end: it must lie on a disk
            shutil.copyfileobj(stream, file)
            file.seek(0)
            stream = file
        try:
            table = parquet.ParquetFile(stream)
            names = table.schema_arrow.names
            if column not in names:
                raise _no_column(str(path), column, names)
            number = 0
            columns = [column] if take is text_of else None
            for batch in table.iter_batches(batch_size=1000, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield number, or_error(take, record, column, f"{path}: row {number}")
        except arrow.ArrowException as error:
            raise DataError(f"{path}: not a readable Parquet file ({error})") from error


def or_error(function: Callable[..., Any], *given: Any) -> Any:
    """What a function gives, or the `DataError` that it raises."""
    try:
        return function(*given)
    except DataError as error:
        return error


def _no_column(where: str, column: str, known: Iterable[str]) -> DataError:
    return DataError(
        f"{where}: no column {column!r}{nearest(column, known)}; say which column is the text: "
        "pretrain with --set data.text_column=NAME, other verbs with --text NAME"
    )


def text_of(record: Any, column: str, where: str) -> str:
    """The text of a record, or of a bare string; a null is an empty text."""
    if isinstance(record, dict):
        if column not in record:
            raise _no_column(where, column, record)
        record = record[column]
    if record is None:
        return ""
    if not isinstance(record, str):
        raise DataError(f"{where}: the text is {type(record).__name__}, expected a string")
    try:
        record.encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair, which is no character
        return record.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return record


def record_of(record: Any, column: str, where: str) -> dict[str, Any]:
    """A record whose `column` is a string; a bare string becomes one."""
    fields = record if isinstance(record, dict) else {}
    return {**fields, column: text_of(record, column, where)}
