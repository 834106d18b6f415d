"""A large corpus, tokenized in shards that are made apart from each other and read as one stream.

    CACHE/shard-FINGERPRINT/train.bin       the documents of neighbouring files, as in `store.py`,
                            valid.bin       but with a separator also after the last one
                            documents.bin   a hash of every document: uint64, big-endian
                            occurrences.bin how often each id occurs in train.bin: int64
                            .manifest.json  counts, bad items among them, settings, names of the
                                            files that were read, size and SHA-256 of those above

A shard holds about `SHARD_BYTES` of files and depends on nothing else, so it can be made anywhere
and is kept when the work stops. One after another they are the stream that one pass would give.
"""

import bisect
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, final

import numpy as np

from selfsup import console, files
from selfsup.batch import Vocabulary
from selfsup.data.bad_items import BadItems
from selfsup.data.reading import documents
from selfsup.data.sources import Place, size_of
from selfsup.data.token_streams import StoreConfig, id_type, unigram_facts, write_streams
from selfsup.data.tokenizer import Tokenizer
from selfsup.errors import StorageError
from selfsup.workers import Workers

SHARD_BYTES = 1 << 28  # as files lie, packed or not
MANIFEST = ".manifest.json"
MAPPED = 256  # files mapped at the same time: each takes a file handle
BUCKET = 1 << 24  # hashes that are compared in memory at once
STREAMS = ("train", "valid")


def grouped(places: Sequence[Place], size: int | None = None) -> list[list[Place]]:
    """Neighbouring files together, `size` bytes or the first group beyond; what has no size, alone.

    >>> grouped([])
    []
    """
    limit = SHARD_BYTES if size is None else size
    groups: list[list[Place]] = []
    room = 0
    for place in places:
        bytes_here = size_of(place)
        if room <= 0 or bytes_here is None:
            groups.append([])
            room = limit
        groups[-1].append(place)
        room -= limit if bytes_here is None else bytes_here
    return groups


@contextmanager
def whole_shard(folder: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """`files.whole_folder`, with `facts` and the size and SHA-256 of every file as its manifest.

    The block may add to `facts`.
    """
    with files.whole_folder(folder) as aside:
        yield aside
        inside = {
            path.name: {"size": path.stat().st_size, "sha256": files.sha256(path)}
            for path in sorted(aside.iterdir())
        }
        files.write_json(aside / MANIFEST, {**facts, "files": inside})


def manifest(folder: Path, check: bool = False) -> dict[str, Any] | None:
    """What the manifest of a shard says; None when the shard is not there, or damaged.

    Args:
        folder: of the shard.
        check: compares hashes, not sizes alone: every byte is read.
    """
    try:
        said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, known in said["files"].items():
            if (folder / name).stat().st_size != known["size"]:
                return None
            if check and files.sha256(folder / name) != known["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return said


def make_missing(
    work: Callable[..., None], shards: dict[str, tuple], workers: Workers, title: str
) -> list[dict[str, Any]]:
    """Makes the shards that are not there; every byte of those that are is checked.

    Args:
        work: makes a shard, with `whole_shard`.
        shards: its arguments by name for messages; the first one is the folder.
        workers: who works.
        title: for the progress display.

    Returns:
        the manifests of all.

    Raises:
        SelfsupError: as `Workers.run`.
        StorageError: a shard was made by another machine and is not seen here.
    """
    missing = {name: given for name, given in shards.items() if manifest(given[0], True) is None}
    if len(missing) < len(shards):
        console.say(f"{len(shards) - len(missing)} of {len(shards)} shards are there already")
    workers.run(work, missing.items(), title)
    return [made(folder) for folder, *_ in shards.values()]


def made(folder: Path) -> dict[str, Any]:
    """The manifest of a shard that was made just now.

    Raises:
        StorageError: another machine made it, and it is not seen here.
    """
    found = manifest(folder)
    if found is None:
        raise StorageError(
            f"{folder}: was made, but is not seen here; all machines must share this folder "
            "(that of tokenized corpora is SELFSUP_CACHE)"
        )
    return found


def write_shard(
    folder: Path, places: list[Place], tokenizer_json: str, config: StoreConfig, key: dict[str, Any]
) -> None:
    """Tokenizes one shard.

    Args:
        folder: where it is to appear.
        places: the files.
        tokenizer_json: the tokenizer, as it can be sent to another process.
        config: how texts are read and split.
        key: settings for the manifest.

    Raises:
        DataError: a file cannot be read.
        StorageError: the disk is full or not writable.
    """
    tokenizer = Tokenizer(tokenizer_json)
    facts: dict[str, Any] = {"settings": key, "sources": [str(place) for place in places]}
    bad = BadItems(str(places[0]))
    split, column = config.split_documents, config.text_column
    stream = documents(places, text_column=column, split=split, bad=bad)
    with whole_shard(folder, facts) as aside:
        written = write_streams(stream, tokenizer, config, aside, closed=True)
        (aside / "documents.bin").write_bytes(written.digests.astype(">u8").tobytes())
        (aside / "occurrences.bin").write_bytes(written.occurrences.astype("<i8").tobytes())
        facts |= {**written.counts, "items": bad.total, **bad.facts()}


def bad_items(places: Sequence[Place], said: Sequence[dict[str, Any]] = ()) -> BadItems:
    """Those of a corpus, by the manifests of its shards: none yet without them.

    Shards of an older version do not count their items, and have no bad ones.
    """
    bad = BadItems(", ".join(map(str, places[:3])) + (", ..." if len(places) > 3 else ""))
    for one in said:
        bad.total += one.get("items", one["documents"])
        bad.more(one.get("bad_items", 0), one.get("bad_item_examples", []))
    return bad


@final
class JoinedStream:
    """Shards as one stream of ids: `len`, and slices without a step.

    Only the sizes of the shards are held. Files are mapped when they are read, some at a time.

    Args:
        paths: files of ids.
        tokens: how many are in each.
        dtype: their type.
        surplus: so many ids are left out at the end: the last separator.
    """

    def __init__(
        self, paths: Sequence[Path], tokens: Sequence[int], dtype: np.dtype, surplus: int = 0
    ):
        self.paths, self.dtype = list(paths), dtype
        self.ends = list(accumulate(tokens))
        self.starts = [end - size for end, size in zip(self.ends, tokens, strict=True)]
        self.length = max(0, (self.ends or [0])[-1] - surplus)
        self.mapped: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: slice) -> np.ndarray:
        """(stop - start,) ids; a view where they lie in one shard."""
        first, stop, _ = place.indices(self.length)
        pieces = []
        while first < stop:
            number = bisect.bisect_right(self.ends, first)  # passes over empty shards
            start = self.starts[number]
            pieces.append(self._shard(number)[first - start : stop - start])
            first = self.ends[number]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([np.zeros(0, self.dtype), *pieces])

    def _shard(self, number: int) -> np.ndarray:
        here = self.mapped.get(number)
        if here is None:
            if len(self.mapped) >= MAPPED:
                self.mapped.clear()
            here = np.asarray(np.memmap(self.paths[number], self.dtype, "r"))
            self.mapped[number] = here
        return here


def joined_streams(
    folders: Sequence[Path], said: Sequence[dict[str, Any]], dtype: np.dtype, separator: int
) -> tuple[JoinedStream, ...]:
    """The training and the held-out stream of shards with these manifests."""
    return tuple(
        JoinedStream(
            [folder / f"{side}.bin" for folder in folders],
            [one[side]["tokens"] for one in said],
            dtype,
            separator,
        )
        for side in STREAMS
    )


def joined_facts(
    folders: Sequence[Path], said: Sequence[dict[str, Any]], vocabulary: Vocabulary, separator: int
) -> dict[str, Any]:
    """The counts of shards as those of one pass over the corpus, and how many `shards` there are.

    Args:
        folders: the shards, in the order of the corpus.
        said: their manifests.
        vocabulary: of their tokenizer.
        separator: ids in a separator.
    """
    sums: dict[str, Any] = {
        key: sum(one[key] for one in said) for key in ("documents", "parts", "empty")
    }
    for side in STREAMS:
        sums[side] = {
            key: sum(one[side][key] for one in said) for key in ("tokens", "words", "characters")
        }
        sums[side]["tokens"] = max(0, sums[side]["tokens"] - separator)
    occurrences = sum(np.fromfile(folder / "occurrences.bin", "<i8") for folder in folders)
    digests = [folder / "documents.bin" for folder in folders]
    return {
        "dtype": id_type(vocabulary).name,
        "split_by": "document",
        **sums,
        "duplicates": sums["documents"] - _distinct(digests, sums["documents"]),
        "duplicates_dropped": False,
        "fingerprint": _fingerprint(digests),
        **unigram_facts(np.asarray(occurrences), vocabulary),
        "shards": len(folders),
    }


def _fingerprint(paths: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        whole.update(path.read_bytes())
    return whole.hexdigest()


def _distinct(paths: Sequence[Path], total: int) -> int:
    """How many different hashes the files hold; each pass counts some, so memory stays flat."""
    passes, found = 1 + total // BUCKET, 0
    for number in range(passes):
        chosen = [np.zeros(0, np.uint64)]
        for path in paths:
            hashes = np.fromfile(path, ">u8").astype(np.uint64)
            chosen.append(hashes[hashes % np.uint64(passes) == number])
        found += len(np.unique(np.concatenate(chosen)))
    return found
