"""Documents as two streams of token ids, train.bin and valid.bin, and what was counted on the way.

Between two documents stand [SEP] [CLS] (style bert) or the end token (style gpt); nothing stands
at the two ends of a stream. Which side a document falls on is decided by a hash of its text.
"""

import hashlib
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from selfsup import console
from selfsup.batch import Vocabulary
from selfsup.data.formats import Split
from selfsup.data.reading import Document
from selfsup.data.tokenizer import CJK, Tokenizer

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


class Written(NamedTuple):
    """What is known of two streams that were written.

    Attributes:
        counts: documents, tokens of each side, and so on, as `meta.json` has them.
        occurrences: (ids,) how often each id occurs in train.bin.
        digests: (documents,) 64-bit hashes of the texts, in order; empty with `drop_duplicates`.
    """

    counts: dict[str, Any]
    occurrences: Int[np.ndarray, " ids"]
    digests: np.ndarray


def id_type(vocabulary: Vocabulary) -> np.dtype:
    """How ids lie on disk: uint16 where they fit, else uint32."""
    return np.dtype(np.uint16 if vocabulary.size < 65_536 else np.uint32)


def separator_of(tokenizer: Tokenizer) -> list[int]:
    """The ids between two documents."""
    vocabulary = tokenizer.vocabulary
    return [vocabulary.sep, vocabulary.cls] if tokenizer.style == "bert" else [vocabulary.sep]


def write_streams(
    stream: Iterator[Document],
    tokenizer: Tokenizer,
    config: StoreConfig,
    folder: Path,
    *,
    chosen: set[int] | None = None,
    total: int | None = None,
    closed: bool = False,
) -> Written:
    """One pass over a corpus.

    Args:
        stream: its documents.
        tokenizer: what makes ids of them.
        config: see `StoreConfig`.
        folder: where train.bin and valid.bin are written.
        chosen: digests of the parts of documents that are held out; None: whole documents are.
        total: bytes to read, where that is known: for the progress display.
        closed: a separator also stands at the end of a stream that is not empty, so that another
            can follow; it is counted.
    """
    dtype = id_type(tokenizer.vocabulary)
    with (
        open(folder / "train.bin", "wb", buffering=1 << 20) as train,
        open(folder / "valid.bin", "wb", buffering=1 << 20) as valid,
        console.progress("tokenizing", total) as progress,
    ):
        separator = np.array(separator_of(tokenizer), dtype=dtype)
        writer = _Writer(_Side(train, separator), _Side(valid, separator), config, chosen)
        for batch in _batches(stream):
            encoded = tokenizer.encode([d.text for d in batch], parse_special=False)
            size = 0
            for document, ids in zip(batch, encoded, strict=True):
                size += writer.add(document, ids)
            tokens = writer.train.tokens + writer.valid.tokens
            progress.advance(size, f"{writer.documents} documents, {tokens / 1e6:.1f} M tokens")
        writer.end_document()
        if closed:
            writer.train.close()
            writer.valid.close()
    size, tokens = tokenizer.vocabulary.size, writer.train.tokens
    occurrences = _count_ids(folder / "train.bin", dtype, size, tokens)
    return Written(writer.counts(), occurrences, np.array(writer.digests, dtype=np.uint64))


def unigram_facts(occurrences: Int[np.ndarray, " ids"], vocabulary: Vocabulary) -> dict[str, float]:
    """`unk_share`, and `unigram_entropy` in nats per token, of a stream with these counts."""
    words, counts = occurrences.copy(), occurrences.copy()
    words[[i for i in (vocabulary.cls, vocabulary.sep) if i >= 0]] = 0
    unk_share = counts[vocabulary.unk] / max(1, words.sum()) if vocabulary.unk >= 0 else 0.0
    counts[list(vocabulary.special)] = 0
    share = counts[counts > 0] / max(1, counts.sum())
    return {
        "unk_share": float(unk_share),
        "unigram_entropy": float(-(share * np.log(share)).sum()) + 0.0,
    }


def digest_of(text: str) -> int:
    """A 64-bit hash of a text."""
    return _number(hashlib.blake2b(text.encode(), digest_size=8).digest())


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

    def close(self) -> None:
        if self.tokens:
            self._put(self.separator)

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
            self.side = self.valid if digest_of(document.text) in self.chosen else self.train
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
