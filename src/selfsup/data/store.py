"""The tokenized corpus on disk: two memory-mapped streams of token ids, made once and reused.

    CACHE/text-FINGERPRINT/train.bin   every training document, one after another
                           valid.bin   the held-out ones
                           meta.json   counts, and what is needed to notice damage

A corpus of several times `sharded.SHARD_BYTES` lies in shards (`sharded.py`) instead, in the same
order, and shards.json names them. The fingerprint covers the files (names, sizes, times), how they
are read and the tokenizer, so a changed corpus gets a new folder. Which side a document falls on is
decided by a hash of its text (`token_streams.py`): equal texts fall on one side, and adding files
moves none.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from selfsup import console, files
from selfsup.data import sharded
from selfsup.data.reading import PART_CHARS, Document, documents, resolve
from selfsup.data.sharded import JoinedStream
from selfsup.data.sources import Place, Source, size_of, source_fingerprint
from selfsup.data.token_streams import (
    StoreConfig,
    digest_of,
    id_type,
    num_words,
    separator_of,
    unigram_facts,
    write_streams,
)
from selfsup.data.tokenizer import Tokenizer
from selfsup.data.unpacking import COMPRESSIONS
from selfsup.errors import DataError
from selfsup.workers import Workers

VERSION = 1
FEW_DOCUMENTS = 20  # with fewer, the sides are split by parts of documents
MIN_PART_CHARS = 64
SHARDS = "shards.json"

__all__ = [
    "Store",
    "StoreConfig",
    "build_or_open",
    "default_cache",
    "num_words",
    "source_fingerprint",
]


@dataclass(frozen=True)
class Store:
    """An open store.

    Attributes:
        folder: where it lies.
        meta: what meta.json says.
        train, valid: (tokens,) memory-mapped ids, uint16 or uint32.
    """

    folder: Path
    meta: dict[str, Any]
    train: np.ndarray | JoinedStream
    valid: np.ndarray | JoinedStream


def default_cache() -> Path:
    """$SELFSUP_CACHE, or ~/.cache/selfsup."""
    return Path(os.environ.get("SELFSUP_CACHE") or Path.home() / ".cache" / "selfsup")


def build_or_open(
    source: Source,
    tokenizer: Tokenizer,
    config: StoreConfig,
    cache_folder: Path | None = None,
    workers: Workers | None = None,
    check: bool = False,
) -> Store:
    """The store of a corpus: the one in the cache, or a new one.

    Args:
        source: see `sources.py`.
        tokenizer: what makes ids of the texts.
        config: how they are read and split.
        cache_folder: where stores lie; `default_cache` when None.
        workers: who tokenizes shards that are not there; this process when None.
        check: reads shards that are there to see that no byte of them has changed.

    Raises:
        DataError: the corpus cannot be read, more than 2% of its items are bad, or it holds no
            text.
        StorageError: the cache cannot be written; nothing half-written stays behind.
    """
    items = resolve(source)
    cache = cache_folder or default_cache()
    key = {"version": VERSION, "tokenizer": tokenizer.fingerprint, **asdict(config)}
    folder = cache / f"text-{source_fingerprint(items, key)}"
    if folder.exists():
        store = _open(folder, tokenizer, check)
        if store is not None:
            return store
        console.warn(f"{folder}: the tokenized corpus is damaged; it is made again")
    files.sweep(cache)
    with files.whole_folder(folder) as aside:
        meta = _build_shards(items, tokenizer, config, key, aside, workers or Workers(), cache)
        if meta is None:
            meta = _build(items, tokenizer, config, aside)
        files.write_json(aside / "meta.json", meta)
    store = _open(folder, tokenizer)
    assert store is not None
    return store


def _open(folder: Path, tokenizer: Tokenizer, check: bool = False) -> Store | None:
    """The store in `folder`; None when it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype = np.dtype(meta["dtype"])
        if "shards" in meta:
            names = json.loads((folder / SHARDS).read_text(encoding="utf-8"))
            return _open_shards(
                folder, meta, [folder.parent / name for name in names], tokenizer, check
            )
        for side in sharded.STREAMS:
            size = (folder / f"{side}.bin").stat().st_size
            if size != meta[side]["tokens"] * dtype.itemsize:
                return None
    except (OSError, ValueError, KeyError):
        return None
    train, valid = (np.memmap(folder / f"{side}.bin", dtype, "r") for side in sharded.STREAMS)
    return Store(folder, meta, train, valid)


def _open_shards(
    folder: Path, meta: dict[str, Any], shards: list[Path], tokenizer: Tokenizer, check: bool
) -> Store | None:
    said = [sharded.manifest(shard, check) for shard in shards]
    sound = [one for one in said if one is not None]
    if len(sound) < len(said):
        return None
    separator = len(separator_of(tokenizer))
    train, valid = sharded.joined_streams(shards, sound, np.dtype(meta["dtype"]), separator)
    return Store(folder, meta, train, valid)


def _build_shards(
    items: list[Place],
    tokenizer: Tokenizer,
    config: StoreConfig,
    key: dict[str, Any],
    folder: Path,
    workers: Workers,
    cache: Path,
) -> dict[str, Any] | None:
    """Makes the shards that are missing, and names them in `folder`; None: one pass must do it.

    Documents that occur twice can only be dropped in one pass, and so few documents that their
    parts are held out only be split in one.
    """
    groups = sharded.grouped(items)
    if len(groups) < 2 or config.drop_duplicates or _are_few(items, config):
        return None
    names = [f"shard-{source_fingerprint(group, key)}" for group in groups]
    shards = {
        f"shard {number} of {len(groups)} ({group[0]})": (
            *(cache / name, group, tokenizer.to_json(), config, key),
        )
        for number, (name, group) in enumerate(zip(names, groups, strict=True), start=1)
    }
    said = sharded.make_missing(sharded.write_shard, shards, workers, "tokenizing shards")
    folders = [cache / name for name in names]
    separator = len(separator_of(tokenizer))
    meta = sharded.joined_facts(folders, said, tokenizer.vocabulary, separator)
    if min(meta[side]["tokens"] for side in sharded.STREAMS) == 0:
        return None
    bad = sharded.bad_items(items, said)
    bad.check()
    files.write_json(folder / SHARDS, names)
    return {"version": VERSION, **meta, **bad.facts()}


def _are_few(items: list[Place], config: StoreConfig) -> bool:
    options: dict[str, Any] = {"text_column": config.text_column, "split": config.split_documents}
    stream = documents(items, **options, bad=sharded.bad_items(items))
    return not any(document.number + 1 == FEW_DOCUMENTS for document in stream)


def _build(
    items: list[Place], tokenizer: Tokenizer, config: StoreConfig, folder: Path
) -> dict[str, Any]:
    """Writes both streams into `folder` and returns the meta data."""

    def read(**more: Any) -> Iterator[Document]:
        split, column = config.split_documents, config.text_column
        return documents(items, text_column=column, split=split, **more)

    bad = sharded.bad_items(items)
    if not _are_few(items, config):
        meta = _write(read(bad=bad), items, tokenizer, config, folder, None)
        bad.check()
        if min(meta["train"]["tokens"], meta["valid"]["tokens"]) > 0:
            return {**meta, **bad.facts()}
    bad = sharded.bad_items(items)
    num_chars = sum(len(document.text) for document in read(bad=bad))
    bad.check()
    part_chars = int(num_chars * config.valid_fraction)
    part_chars = min(PART_CHARS, max(MIN_PART_CHARS, part_chars))
    parts = partial(read, bad=sharded.bad_items(items), part_chars=part_chars)
    chosen = _chosen_parts(parts(), config.valid_fraction)
    meta = _write(parts(), items, tokenizer, config, folder, chosen)
    if min(meta["train"]["tokens"], meta["valid"]["tokens"]) == 0:
        raise DataError(
            f"{bad.source}: too little text for a training and a validation part: "
            f"{meta['documents']} documents with {num_chars} characters, and {meta['empty']} "
            "empty ones; give more text"
        )
    return {**meta, **bad.facts()}


def _chosen_parts(stream: Iterator[Document], fraction: float) -> set[int]:
    """Digests of the texts that are held out: the smallest ones, so the choice looks random."""
    digests = sorted({digest_of(d.text) for d in stream if d.text.strip()})
    count = min(max(1, round(fraction * len(digests))), len(digests) - 1)
    return set(digests[: max(0, count)])


def _write(
    stream: Iterator[Document],
    items: list[Place],
    tokenizer: Tokenizer,
    config: StoreConfig,
    folder: Path,
    chosen: set[int] | None,
) -> dict[str, Any]:
    """One pass over the corpus; `chosen` holds the digests of held-out parts, None: by document."""
    sizes = [None if str(item).endswith(COMPRESSIONS) else size_of(item) for item in items]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    written = write_streams(stream, tokenizer, config, folder, chosen=chosen, total=total)
    return {
        "version": VERSION,
        "dtype": id_type(tokenizer.vocabulary).name,
        **written.counts,
        **unigram_facts(written.occurrences, tokenizer.vocabulary),
    }
