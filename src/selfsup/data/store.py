"""The tokenized corpus on disk: two memory-mapped streams of token ids, made once and reused.

    CACHE/text-FINGERPRINT/train.bin   every training document, one after another
                           valid.bin   the held-out ones
                           meta.json   counts, and what is needed to notice damage

Between two documents stand [SEP] [CLS] (style bert) or the end token (style gpt); nothing stands
at the two ends of a stream. The fingerprint covers the files (names, sizes, times), how they are
read and the tokenizer, so a changed corpus gets a new folder. Which side a document falls on is
decided by a hash of its text: equal texts fall on one side, and adding files moves none.
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from selfsup import console, files
from selfsup.data.formats import COMPRESSIONS, Split
from selfsup.data.reading import PART_CHARS, Document, documents, resolve
from selfsup.data.sources import HubDataset, Source
from selfsup.data.tokenizer import CJK, Tokenizer
from selfsup.errors import DataError

VERSION = 1
FEW_DOCUMENTS = 20  # with fewer, the sides are split by parts of documents
MIN_PART_CHARS = 64
BATCH_CHARS, BATCH_TEXTS = 1_000_000, 4096  # one call of the tokenizer
CJK_SPAN = re.compile(f"[{CJK}]")
CJK_WORD = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How a corpus is read and split; the keys of `data.text.Config` with the same names."""

    text_column: str = "text"
    split_documents: Split = "file"
    valid_fraction: float = 0.05
    drop_duplicates: bool = False


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
    train: np.ndarray
    valid: np.ndarray


def default_cache() -> Path:
    """$SELFSUP_CACHE, or ~/.cache/selfsup."""
    return Path(os.environ.get("SELFSUP_CACHE") or Path.home() / ".cache" / "selfsup")


def build_or_open(
    source: Source, tokenizer: Tokenizer, config: StoreConfig, cache_folder: Path | None = None
) -> Store:
    """The store of a corpus: the one in the cache, or a new one.

    Raises:
        DataError: the corpus cannot be read, or holds no text.
        StorageError: the cache cannot be written; nothing half-written stays behind.
    """
    items = resolve(source)
    key = {"version": VERSION, "tokenizer": tokenizer.fingerprint, **asdict(config)}
    name = f"text-{source_fingerprint(items, key)}"
    folder = (cache_folder or default_cache()) / name
    if folder.exists():
        store = _open(folder)
        if store is not None:
            return store
        console.warn(f"{folder}: the tokenized corpus is damaged; it is made again")
    with files.whole_folder(folder) as aside:
        files.write_json(aside / "meta.json", _build(items, tokenizer, config, aside))
    store = _open(folder)
    assert store is not None
    return store


def source_fingerprint(items: Iterable[Path | HubDataset], key: dict[str, Any]) -> str:
    """32 hexadecimal digits for these files (names, sizes, times) and settings."""
    described: list[Any] = []
    for item in items:
        if isinstance(item, HubDataset):
            described.append(str(item))
        else:
            state = item.stat()
            described.append([str(item.resolve()), state.st_size, state.st_mtime_ns])
    return hashlib.sha256(json.dumps([described, key]).encode()).hexdigest()[:32]


def _open(folder: Path) -> Store | None:
    """The store in `folder`; None when it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype = np.dtype(meta["dtype"])
        for side in ("train", "valid"):
            size = (folder / f"{side}.bin").stat().st_size
            if size != meta[side]["tokens"] * dtype.itemsize:
                return None
    except (OSError, ValueError, KeyError):
        return None
    train, valid = (np.memmap(folder / f"{side}.bin", dtype, "r") for side in ("train", "valid"))
    return Store(folder, meta, train, valid)


def _build(
    items: list[Path | HubDataset], tokenizer: Tokenizer, config: StoreConfig, folder: Path
) -> dict[str, Any]:
    """Writes both streams into `folder` and returns the meta data."""
    options: dict[str, Any] = {"text_column": config.text_column, "split": config.split_documents}
    if any(d.number + 1 == FEW_DOCUMENTS for d in documents(items, **options)):
        meta = _write(documents(items, **options), items, tokenizer, config, folder, None)
        if min(meta["train"]["tokens"], meta["valid"]["tokens"]) > 0:
            return meta
    num_chars = sum(len(d.text) for d in documents(items, **options))
    part_chars = int(num_chars * config.valid_fraction)
    options["part_chars"] = min(PART_CHARS, max(MIN_PART_CHARS, part_chars))
    chosen = _chosen_parts(documents(items, **options), config.valid_fraction)
    meta = _write(documents(items, **options), items, tokenizer, config, folder, chosen)
    if min(meta["train"]["tokens"], meta["valid"]["tokens"]) == 0:
        what = ", ".join(str(item) for item in items[:3]) + (", ..." if len(items) > 3 else "")
        raise DataError(
            f"{what}: too little text for a training and a validation part: "
            f"{meta['documents']} documents with {num_chars} characters, and {meta['empty']} "
            "empty ones; give more text"
        )
    return meta


def _chosen_parts(stream: Iterator[Document], fraction: float) -> set[int]:
    """Digests of the texts that are held out: the smallest ones, so the choice looks random."""
    digests = sorted({_number(_hash(d.text).digest()) for d in stream if d.text.strip()})
    count = min(max(1, round(fraction * len(digests))), len(digests) - 1)
    return set(digests[: max(0, count)])


def _hash(text: str) -> "hashlib.blake2b":
    return hashlib.blake2b(text.encode(), digest_size=8)


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "big")


def _batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    held = 0
    for document in stream:
        batch.append(document)
        held += len(document.text)
        if held >= BATCH_CHARS or len(batch) == BATCH_TEXTS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _write(
    stream: Iterator[Document],
    items: list[Path | HubDataset],
    tokenizer: Tokenizer,
    config: StoreConfig,
    folder: Path,
    chosen: set[int] | None,
) -> dict[str, Any]:
    """One pass over the corpus; `chosen` holds the digests of held-out parts, None: by document."""
    vocabulary = tokenizer.vocabulary
    dtype = np.dtype(np.uint16 if vocabulary.size < 65_536 else np.uint32)
    sep = [vocabulary.sep, vocabulary.cls] if tokenizer.style == "bert" else [vocabulary.sep]
    plain = all(isinstance(i, Path) and not i.name.endswith(COMPRESSIONS) for i in items)
    total = sum(i.stat().st_size for i in items if isinstance(i, Path)) if plain else None
    with (
        open(folder / "train.bin", "wb", buffering=1 << 20) as train,
        open(folder / "valid.bin", "wb", buffering=1 << 20) as valid,
        console.progress("tokenizing", total) as progress,
    ):
        separator = np.array(sep, dtype=dtype)
        writer = _Writer(_Side(train, separator), _Side(valid, separator), config, chosen)
        for batch in _batches(stream):
            encoded = tokenizer.encode([d.text for d in batch], parse_special=False)
            size = 0
            for document, ids in zip(batch, encoded, strict=True):
                size += writer.add(document, ids)
            tokens = writer.train.tokens + writer.valid.tokens
            progress.advance(size, f"{writer.documents} documents, {tokens / 1e6:.1f} M tokens")
        writer.end_document()
    counts = _count_ids(folder / "train.bin", dtype, vocabulary.size, writer.train.tokens)
    words = counts.copy()
    words[[i for i in (vocabulary.cls, vocabulary.sep) if i >= 0]] = 0
    unk_share = counts[vocabulary.unk] / max(1, words.sum()) if vocabulary.unk >= 0 else 0.0
    counts[list(vocabulary.special)] = 0
    share = counts[counts > 0] / max(1, counts.sum())
    return {
        "version": VERSION,
        "dtype": dtype.name,
        **writer.counts(),
        "unk_share": float(unk_share),
        "unigram_entropy": float(-(share * np.log(share)).sum()) + 0.0,
    }


def _count_ids(path: Path, dtype: np.dtype, size: int, num_tokens: int) -> np.ndarray:
    """How often each id occurs, (size,) int64."""
    counts = np.zeros(size, dtype=np.int64)
    for start in range(0, num_tokens, 1 << 22):
        ids = np.fromfile(path, dtype, 1 << 22, offset=start * dtype.itemsize)
        counts += np.bincount(ids, minlength=size)
    return counts


@dataclass
class _Side:
    """One stream that is being written, and its counts."""

    file: IO[bytes]
    separator: np.ndarray
    tokens: int = 0
    words: int = 0
    characters: int = 0
    last: tuple[int, int] = (-1, -1)  # (document, part) at whose end the stream stands

    def append(self, document: Document, ids: np.ndarray) -> None:
        goes_on = self.last == (document.number, document.part - 1)
        if len(ids) == 0:
            self.last = (document.number, document.part) if goes_on else self.last
            return
        if self.tokens and not goes_on:
            self._put(self.separator)
        self._put(ids.astype(self.separator.dtype))
        self.words += num_words(document.text)
        self.characters += len(document.text)
        self.last = (document.number, document.part)

    def _put(self, ids: np.ndarray) -> None:
        self.file.write(ids.tobytes())
        self.tokens += len(ids)

    def mark(self) -> tuple[int, int, int]:
        return self.tokens, self.words, self.characters

    def return_to(self, mark: tuple[int, int, int]) -> None:
        if mark[0] != self.tokens:
            self.file.seek(mark[0] * self.separator.itemsize)
            self.file.truncate()
        self.tokens, self.words, self.characters = mark
        self.last = (-1, -1)


@dataclass
class _Writer:
    """Sends the parts of documents to their side, and counts."""

    train: _Side
    valid: _Side
    config: StoreConfig
    chosen: set[int] | None
    documents: int = 0
    parts: int = 0
    empty: int = 0
    duplicates: int = 0
    digests: array = field(default_factory=lambda: array("Q"))
    kept: set[int] = field(default_factory=set)  # only filled when duplicates are dropped
    content: Any = field(default_factory=hashlib.sha256)
    hash: Any = None  # of the open document
    side: _Side | None = None

    def add(self, document: Document, ids: np.ndarray) -> int:
        """Takes the next part; returns its length in bytes."""
        text = document.text.encode()
        if document.part == 0:
            self.end_document()
            self.hash = hashlib.blake2b(digest_size=8)
            self.marks = self.train.mark(), self.valid.mark()
            self.num_tokens = self.num_parts = 0
        self.hash.update(text)
        if self.chosen is not None:
            digest = _number(_hash(document.text).digest())
            self.side = self.valid if digest in self.chosen else self.train
        elif document.part == 0:
            share = _number(self.hash.digest()) / 2**64
            self.side = self.valid if share < self.config.valid_fraction else self.train
        assert self.side is not None
        self.side.append(document, ids)
        self.num_tokens += len(ids)
        self.num_parts += 1
        return len(text)

    def end_document(self) -> None:
        """Closes the open document: counts it, or takes it back if it is a duplicate to drop."""
        if self.hash is None:
            return
        raw, self.hash = self.hash.digest(), None
        if self.num_tokens == 0:
            self.empty += 1
            return
        digest = _number(raw)
        self.documents += 1
        if self.config.drop_duplicates:
            if digest in self.kept:
                self.duplicates += 1
                self.train.return_to(self.marks[0])
                self.valid.return_to(self.marks[1])
                return
            self.kept.add(digest)
        else:
            self.digests.append(digest)
        self.parts += self.num_parts
        self.content.update(raw)

    def counts(self) -> dict[str, Any]:
        if not self.config.drop_duplicates:
            self.duplicates = len(self.digests) - len(np.unique(np.array(self.digests)))
        return {
            "split_by": "document" if self.chosen is None else "part",
            "documents": self.documents,
            "parts": self.parts,
            "empty": self.empty,
            "duplicates": self.duplicates,
            "duplicates_dropped": self.config.drop_duplicates,
            "fingerprint": self.content.hexdigest(),
            **{
                name: {"tokens": s.tokens, "words": s.words, "characters": s.characters}
                for name, s in (("train", self.train), ("valid", self.valid))
            },
        }


def num_words(text: str) -> int:
    """Words between white space; every Chinese character and kana is a word.

    >>> num_words("two words"), num_words("我喜欢 deep learning。")
    (2, 5)
    """
    if text.isascii():
        return len(text.split())
    return len(CJK_WORD.findall(text)) + len(CJK_SPAN.sub(" ", text).split())
