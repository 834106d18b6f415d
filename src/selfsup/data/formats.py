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
"""

import csv
import gzip
import io
import itertools
import json
import lzma
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, Literal, cast

from selfsup.data.remote import RemoteFile, unreadable
from selfsup.errors import DataError, SelfsupError, nearest

FORMATS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
KNOWN = f"{' '.join(FORMATS)}, each also with {' '.join(COMPRESSIONS)}"
CHUNK = 1 << 16  # characters read at once
File = Path | RemoteFile
Split = Literal["file", "line", "blank_line"]
Take = Callable[[Any, str, str], Any]  # of (record, column, "file:place"): `text_of`, `record_of`


def format_of(path: File) -> tuple[str, str]:
    """(format, compression) by the extensions, "" where there is none."""
    name = path.name.lower()
    compression = next((c for c in COMPRESSIONS if name.endswith(c)), "")
    name = name.removesuffix(compression)
    return next((f for f in FORMATS if name.endswith(f)), ""), compression


def fragments(path: File, column: str, split: Split) -> Iterator[tuple[int, str]]:
    """Pieces of the documents of one file: neighbours with the same place are one document.

    Args:
        path: a file with one of the known extensions.
        column: where the text is, in formats that have columns.
        split: what a document is in .txt files.

    Yields:
        (place, text): place is the line, row or element, from 1; 0 where the file is the document.

    Raises:
        DataError: the file is damaged, not UTF-8, or lacks the column.
    """
    if format_of(path)[0] == ".txt":
        return _txt(path, split)
    return _taken(path, column, text_of)


def records(path: File, column: str, split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
    """The documents of one file with all their columns, each whole in memory.

    Args:
        path: a file with one of the known extensions.
        column: where the text is; it is a string in every record, whatever the format.
        split: what a document is in .txt files.

    Yields:
        (place, record): place as in `fragments`.

    Raises:
        DataError: as `fragments`.
    """
    if format_of(path)[0] == ".txt":
        for place, pieces in itertools.groupby(_txt(path, split), key=itemgetter(0)):
            yield place, {column: "".join(text for _, text in pieces)}
    else:
        yield from _taken(path, column, record_of)


def _taken(path: File, column: str, take: Take) -> Iterator[tuple[int, Any]]:
    kind = format_of(path)[0]
    if kind == ".jsonl":
        return _jsonl(path, column, take)
    if kind == ".json":
        return _json(path, column, take)
    if kind == ".parquet":
        return _parquet(path, column, take)
    return _csv(path, column, "\t" if kind == ".tsv" else ",", take)


def _txt(path: File, split: Split) -> Iterator[tuple[int, str]]:
    with decoded_text(path) as stream:
        if split == "file":
            yield 0, ""  # an empty file is an empty document
            while chunk := stream.read(CHUNK):
                yield 0, chunk
            return
        line, paragraph = 1, 1
        line_begins = paragraph_begins = True
        while fragment := stream.readline(CHUNK):
            text = fragment.removesuffix("\n")
            if split == "line":
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
    with decoded_text(path) as stream:
        for line, text in enumerate(stream, start=1):
            if text.isspace():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{line}: not JSON ({error.msg} at column {error.colno}); "
                    "every line must be one object"
                ) from error
            yield line, take(record, column, f"{path}:{line}")


def _json(path: File, column: str, take: Take) -> Iterator[tuple[int, Any]]:
    """A list, or objects one after another, decoded element by element."""
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    with decoded_text(path) as stream:
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
            number += 1
            yield number, take(record, column, f"{path}: element {number}")
            at = end


def _csv(path: File, column: str, delimiter: str, take: Take) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses 131,073 characters
    with decoded_text(path, newline="") as stream:
        # Strict: otherwise a forgotten quote swallows the rest of the file in silence. In .tsv a
        # quote is a character, as in GLUE and as labelled files are read.
        if delimiter == "\t":
            rows = csv.reader(stream, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
        else:
            rows = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            header = next(rows, None)
            if header is None:
                return
            if column not in header:
                raise DataError(f"{path}:1: no column {column!r}{nearest(column, header)}")
            place, line = header.index(column), rows.line_num + 1
            for row in rows:
                if row:  # blank lines are no rows
                    if len(row) != len(header):
                        raise DataError(
                            f"{path}:{line}: {len(row)} fields, but the first row names "
                            f"{len(header)}; a text that holds {delimiter!r} is quoted in .csv, "
                            "and cannot stand in .tsv"
                        )
                    record = {**dict(zip(header, row, strict=True)), column: row[place]}
                    yield line, take(record, column, f"{path}:{line}")
                line = rows.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}:{rows.line_num}: {error}; a text with quotes is written in quotes, with "
                "each quote inside it doubled"
            ) from error


def _parquet(path: File, column: str, take: Take) -> Iterator[tuple[int, Any]]:
    import pyarrow as arrow
    from pyarrow import parquet

    with _clear(path), tempfile.TemporaryFile() as unpacked, _binary(path) as stream:
        if format_of(path)[1]:  # Parquet is read from its end: it must lie on a disk
            shutil.copyfileobj(stream, unpacked)
            unpacked.seek(0)
            stream = unpacked
        try:
            table = parquet.ParquetFile(stream)
            names = table.schema_arrow.names
            if column not in names:
                raise DataError(f"{path}: no column {column!r}{nearest(column, names)}")
            number = 0
            columns = [column] if take is text_of else None
            for batch in table.iter_batches(batch_size=1000, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield number, take(record, column, f"{path}: row {number}")
        except arrow.ArrowException as error:
            raise DataError(f"{path}: not a readable Parquet file ({error})") from error


def text_of(record: Any, column: str, where: str) -> str:
    """The text of a record, or of a bare string; a null is an empty text."""
    if isinstance(record, dict):
        if column not in record:
            raise DataError(f"{where}: no column {column!r}{nearest(column, record)}")
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


@contextmanager
def _binary(path: File) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file, streamed."""
    compression = format_of(path)[1]
    with ExitStack() as stack:
        if compression == ".zst":
            import pyarrow as arrow  # it notices a truncated stream; zstandard's own does not

            packed = str(path) if isinstance(path, Path) else stack.enter_context(path.open("rb"))
            yield stack.enter_context(arrow.input_stream(packed, compression="zstd"))
            return
        stream = stack.enter_context(path.open("rb"))
        if compression == ".gz":
            stream = cast(IO[bytes], stack.enter_context(gzip.open(stream, "rb")))
        elif compression == ".xz":
            stream = stack.enter_context(lzma.open(stream, "rb"))
        yield stream


@contextmanager
def decoded_text(path: File, newline: str | None = None) -> Iterator[IO[str]]:
    """The file as UTF-8 text, a byte order mark left out."""
    with (
        _clear(path),
        _binary(path) as raw,
        io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline) as stream,
    ):
        yield stream


@contextmanager
def _clear(path: File) -> Iterator[None]:
    """Turns what can go wrong inside a file into a `DataError` that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        offset, byte = _first_bad_byte(path)
        raise DataError(
            f"{path}: not UTF-8: byte {offset} is 0x{byte:02x}. Convert the file, for instance "
            f"with: iconv -f {_likely_encoding(path)} -t utf-8 {path.name} > converted.txt"
        ) from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = "; the file is damaged or cut off, get it again" if format_of(path)[1] else ""
        raise DataError(f"{path}: cannot be read ({reason}){hint}") from error
    except Exception as error:  # the packages that read addresses raise their own
        if isinstance(error, SelfsupError) or not isinstance(path, RemoteFile):
            raise
        raise unreadable(path.address, error) from error


def _first_bad_byte(path: File) -> tuple[int, int]:
    """(offset, value) of the byte at which the unpacked file stops being UTF-8."""
    done, held, more = 0, b"", b"more"
    with _binary(path) as stream:
        while more:
            more = stream.read(CHUNK)
            held += more
            try:
                held.decode()
            except UnicodeDecodeError as error:
                # A character that the chunk cuts in two is no error yet.
                if not more or error.end < len(held) or len(held) - error.start > 3:
                    return done + error.start, held[error.start]
                done, held = done + error.start, held[error.start :]
            else:
                done, held = done + len(held), b""
    raise DataError(f"{path}: was changed while it was read; run it again")


def _likely_encoding(path: File) -> str:
    with _binary(path) as stream:
        return "utf-16" if stream.read(2) in (b"\xff\xfe", b"\xfe\xff") else "latin1"
