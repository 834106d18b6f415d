"""Files at an address, read in place: s3://, gs://, hf://, https://, and whatever fsspec reads.

Some protocols need a package of their own (s3fs, gcsfs, ...), and fsspec says which; keys and other
settings are those of that package, mostly variables of the environment.
"""

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from selfsup.errors import DataError

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.*", re.DOTALL)
HERE = "file://"
# What says that a file is another one than before: the first of these that a store tells.
VERSIONS = (
    *("ETag", "etag", "md5Hash", "checksum"),
    *("LastModified", "last_modified", "mtime", "updated", "created"),
)


@dataclass(frozen=True)
class RemoteFile:
    """One file at an address.

    Attributes:
        address: where it is, protocol included.
        size: bytes; None where the store does not say.
        version: changes when the file does; "" where the store does not say.
    """

    address: str
    size: int | None = None
    version: str = ""

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        """Its last part, which tells the format."""
        return self.address.split("::")[0].rstrip("/").rpartition("/")[2]

    def open(self, mode: str = "rb") -> IO[bytes]:
        """The content, streamed; blocks are fetched as they are read."""
        import fsspec

        with _clear(self.address):
            return fsspec.open(self.address, mode).open()


def is_address(item: Any) -> bool:
    """Whether a source is an address and no path."""
    return isinstance(item, str) and ADDRESS.fullmatch(item) is not None


def listing(address: str) -> tuple[list[tuple[RemoteFile, str]], bool]:
    """The files at an address: of a folder or a pattern all, in the order of their names.

    Returns:
        each with its path below the folder, or below what stands before the first wildcard;
        and whether the address is that of one file.

    Raises:
        DataError: there is none, or the store cannot be reached.
    """
    import fsspec

    with _clear(address):
        system, path = fsspec.core.url_to_fs(address)
        chain = address.partition("::")[2]
        pattern = glob.has_magic(path) and not address.startswith(("http://", "https://"))
        if not pattern and not system.isdir(path):
            return [(_remote(system, system.info(path), chain), path.rpartition("/")[2])], True
        if pattern:
            found = system.glob(path, detail=True)
            root = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
        else:
            found, root = system.find(path, detail=True), path
        infos = [found[name] for name in sorted(found) if found[name]["type"] == "file"]
        relatives = [info["name"].removeprefix(root).lstrip("/") for info in infos]
        files = [_remote(system, info, chain) for info in infos]
        return list(zip(files, relatives, strict=True)), False


def _remote(system: Any, info: dict[str, Any], chain: str) -> RemoteFile:
    version = next((str(info[key]) for key in VERSIONS if info.get(key) is not None), "")
    address = system.unstrip_protocol(info["name"]) + (f"::{chain}" if chain else "")
    return RemoteFile(address, info.get("size"), version)


@contextmanager
def _clear(address: str) -> Iterator[None]:
    """Turns what a store raises, and every package raises its own, into a `DataError`."""
    try:
        yield
    except Exception as error:
        raise unreadable(address, error) from error


def unreadable(address: str, error: Exception) -> DataError:
    """What is said of an address that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"no file or folder {address}")
    return DataError(
        f"{address}: cannot be read ({type(error).__name__}: {error}). Check the address, the "
        "network and the rights, or give a path to files on this machine."
    )
