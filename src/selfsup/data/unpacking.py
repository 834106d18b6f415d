"""Files as streams of bytes or of characters: unpacked, UTF-8, what is wrong with them named."""

import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, cast

from selfsup.data.remote import RemoteFile, unreadable
from selfsup.errors import DataError, SelfsupError

COMPRESSIONS = (".gz", ".xz", ".zst")
CHUNK = 1 << 16  # characters read at once
File = Path | RemoteFile


def compression_of(path: File) -> str:
    """The extension that says how a file is packed; "" where it is not."""
    name = path.name.lower()
    return next((c for c in COMPRESSIONS if name.endswith(c)), "")


@contextmanager
def unpacked(path: File) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file, streamed."""
    compression = compression_of(path)
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
def decoded_text(
    path: File, newline: str | None = None, errors: str = "strict"
) -> Iterator[IO[str]]:
    """The file as UTF-8 text, a byte order mark left out."""
    with (
        cleared(path),
        unpacked(path) as raw,
        io.TextIOWrapper(raw, "utf-8-sig", errors, newline) as stream,
    ):
        yield stream


@contextmanager
def lenient_text(path: File, newline: str | None = None) -> Iterator[IO[str]]:
    """`decoded_text` in which a byte that is not UTF-8 is half a surrogate pair, for `is_utf8`.

    UTF-16 is refused: without its line breaks no line is a line.
    """
    with cleared(path):
        errors = "strict" if _likely_encoding(path) == "utf-16" else "surrogateescape"
    with decoded_text(path, newline, errors) as stream:
        yield stream


def is_utf8(text: str) -> bool:
    """Whether a stretch of lenient text was UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def not_utf8(text: str, where: str) -> DataError:
    """What is wrong with a stretch of lenient text for which `is_utf8` says no."""
    place = re.search("[\udc80-\udcff]", text).start()  # type: ignore[union-attr]
    byte = ord(text[place]) - 0xDC00
    return DataError(f"{where}: not UTF-8 (byte 0x{byte:02x} at character {place + 1}, see iconv)")


@contextmanager
def cleared(path: File) -> Iterator[None]:
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
        hint = "; the file is damaged or cut off, get it again" if compression_of(path) else ""
        raise DataError(f"{path}: cannot be read ({reason}){hint}") from error
    except Exception as error:  # the packages that read addresses raise their own
        if isinstance(error, SelfsupError) or not isinstance(path, RemoteFile):
            raise
        raise unreadable(path.address, error) from error


def _first_bad_byte(path: File) -> tuple[int, int]:
    """(offset, value) of the byte at which the unpacked file stops being UTF-8."""
    done, held, more = 0, b"", b"more"
    with unpacked(path) as stream:
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
    with unpacked(path) as stream:
        return "utf-16" if stream.read(2) in (b"\xff\xfe", b"\xfe\xff") else "latin1"
