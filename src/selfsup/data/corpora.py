"""Several corpora as one, each sampled by its own share: how a multilingual model is trained.

    selfsup pretrain bert-mini-multilingual --data en=novels/,news.jsonl zh=histories/ --out RUN

In proportion to its size a small language would hardly be seen, neither by the tokenizer, which
would cut it to pieces, nor by the model. So corpus i, of n_i rows, is drawn with probability

    p_i ~ n_i ** exponent

after Conneau and Lample 2019 (XLM, arXiv 1901.07291, section 3.1). The exponent is 0.7 in
multilingual BERT (Devlin's notes on that model), 0.5 to 0.7 in XLM, 0.3 in XLM-R (Conneau et al.
2020, arXiv 1911.02116); 1.0 is in proportion, 0.0 gives all corpora the same share.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from selfsup.batch import Batch, Vocabulary
from selfsup.data.bad_items import BadItems
from selfsup.data.dataset import Dataset
from selfsup.data.reading import Document
from selfsup.data.sharded import JoinedStream
from selfsup.data.sources import Item, Place, Source, size_of
from selfsup.data.store import Store, num_words
from selfsup.errors import DataError

NAMED = re.compile(r"([A-Za-z][\w-]*)=(.*)", re.DOTALL)
Read = Callable[[Place], Iterator[Document]]


def named(source: Source) -> dict[str, Source]:
    """The corpora that a source names, by name; {"": source} where it names none.

    `en=a.txt,b/` is the corpus `en` of two sources. A path that exists is no name, nor is one that
    begins with "./".

    >>> named(["zh=histories/", "en=novels/,news.jsonl"])
    {'en': ['novels/', 'news.jsonl'], 'zh': ['histories/']}

    Raises:
        DataError: only some have a name, a name comes twice, or one has no path.
    """
    items: list[Item] = [source] if isinstance(source, Item) else list(source)
    found: dict[str, Source] = {}
    plain = []
    for item in items:
        match = NAMED.fullmatch(item) if isinstance(item, str) and not _exists(item) else None
        if match is None:
            plain.append(str(item))
            continue
        name, paths = match[1], [path for path in match[2].split(",") if path]
        if not paths:
            raise DataError(f"corpus {name!r} has no path: write {name}=PATH, not {item!r}")
        if name in found:
            raise DataError(f"two corpora are called {name!r}: write {name}=PATH,PATH for both")
        found[name] = paths
    if found and plain:
        raise DataError(f"{plain[0]} has no name, but {next(iter(found))!r} has: name all or none")
    return dict(sorted(found.items())) or {"": source}


def _exists(text: str) -> bool:
    return Path(text).expanduser().exists()


@contextmanager
def corpus(name: str) -> Iterator[None]:
    """Puts the name of a corpus before the errors of its data."""
    try:
        yield
    except DataError as error:
        if not name:
            raise
        raise DataError(f"corpus {name!r}: {error}") from error


def shares(sizes: Sequence[float], exponent: float) -> Float[np.ndarray, " corpora"]:
    """How often each corpus is drawn: its size to the power of `exponent`; they add up to 1.

    >>> shares([900, 100], 0.5).round(2).tolist()
    [0.75, 0.25]
    """
    weight = (np.asarray(sizes, dtype=np.float64) / sum(sizes)) ** exponent
    return weight / weight.sum()


# Text to train a tokenizer with


def sample(items: Sequence[Place], num_chars: int, read: Read) -> Iterator[str]:
    """Texts of about `num_chars` characters: from every file, in proportion to its size.

    Reading only the first files would leave out a language that comes later in the alphabet.
    """
    known = [size_of(item) or 0 for item in items]
    sizes = known if all(known) else [1] * len(items)
    for item, size in zip(items, sizes, strict=True):
        left = max(1, round(num_chars * size / sum(sizes)))
        for document in read(item):
            yield document.text[:left]
            left -= len(document.text)
            if left <= 0:
                break


def mixed_sample(
    corpora: dict[str, list[Place]], exponent: float, num_chars: int, read: Read
) -> Iterator[str]:
    """Texts of at most about `num_chars` characters, in which every corpus has its share.

    Shares are of words here, a Chinese character being one: there are no tokens yet. A small corpus
    is read several times, as its rows will be.

    Raises:
        DataError: a corpus has no word.
    """
    words, chars = np.zeros(len(corpora)), np.zeros(len(corpora))
    for place, (name, items) in enumerate(corpora.items()):
        for document in (document for item in items for document in read(item)):
            words[place] += num_words(document.text)
            chars[place] += len(document.text)
        if words[place] == 0:
            given = ", ".join(map(str, items[:3])) + (", ..." if len(items) > 3 else "")
            raise DataError(f"corpus {name!r}: no text in {given}; leave it out or add documents")
    wanted = shares(words.tolist(), exponent) * words.sum() * chars / words
    wanted *= min(1.0, num_chars / wanted.sum())
    for items, number in zip(corpora.values(), wanted, strict=True):
        left = round(number)
        while left > 0:
            for text in sample(items, left, read):
                yield text[:left]
                left -= min(left, len(text))


# Rows


@final
class MixedRows(Dataset):
    """The rows of several corpora, each corpus with its share.

    One pass is as long as it takes to read every corpus whole: the one that is drawn least often
    for its size gives each row once, the others some or all of their rows several times, evenly
    spread. So number k stands for the same row in every pass, and with shares in proportion to the
    rows a pass is the corpora one after another.

    >>> class Rows(Dataset):
    ...     fields = ("tokens",)
    ...     def __len__(self): return 4
    >>> MixedRows({"en": Rows(), "zh": Rows()}, np.array([2 / 3, 1 / 3]), 0).locate(np.arange(12))
    (array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]), array([0, 0, 1, 1, 2, 2, 3, 3, 0, 1, 2, 3]))

    Args:
        parts: rows by name of the corpus, all with the same fields.
        share: how often each is drawn.
        pad: the id that fills up tokens.

    Attributes:
        counts: (corpora,) rows that one pass takes of each.
    """

    def __init__(self, parts: dict[str, Dataset], share: Float[np.ndarray, " corpora"], pad: int):
        self.parts, self.pad = parts, pad
        self.rows = np.array([len(part) for part in parts.values()])
        taken = np.rint(share * (self.rows / share).max()).astype(np.int64)
        self.counts = np.maximum(self.rows, taken)
        self.ends = self.counts.cumsum()
        self.fields = next(iter(parts.values())).fields
        sizes = [part.lengths for part in parts.values() if part.lengths is not None]
        if len(sizes) == len(parts):
            corpus, row = self.locate(np.arange(len(self)))
            first = self.rows.cumsum() - self.rows
            self.lengths = np.concatenate(sizes)[first[corpus] + row]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(
        self, numbers: Int[np.ndarray, " rows"]
    ) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
        """(number of the corpus, row of that corpus) of each row."""
        corpus = np.searchsorted(self.ends, numbers, side="right")
        place = numbers - (self.ends - self.counts)[corpus]
        return corpus, place * self.rows[corpus] // self.counts[corpus]

    def batch(self, numbers: np.ndarray) -> Batch:
        """The rows as their corpora give them, padded to one length; `index` holds the numbers."""
        numbers = np.asarray(numbers, dtype=np.int64)
        corpus, row = self.locate(numbers)
        found, places = [], []
        for number, part in enumerate(self.parts.values()):
            here = np.flatnonzero(corpus == number)
            if len(here):
                found.append(part.batch(row[here]))
                places.append(here)
        out = joined(found, self.pad)
        order = torch.from_numpy(np.argsort(np.concatenate(places)))
        out = {name: field[order] for name, field in out.items()}
        return {**out, "index": torch.from_numpy(numbers)}


def joined(batches: list[Batch], pad: int) -> Batch:
    """Batches of token rows one below the other.

    What a batch leaves out is as it is understood there: no `mask` means that all is real, no
    `documents` that a row is one document. Fields of (batch, time) are filled up to the longest.
    """
    longest = max(batch["tokens"].shape[1] for batch in batches)
    fill = {"tokens": pad}
    parts: dict[str, list[torch.Tensor]] = {}
    names = dict.fromkeys(["mask", *(name for batch in batches for name in batch)])
    for batch in batches:
        tokens = batch["tokens"]
        left_out = {"mask": torch.ones_like(tokens, dtype=torch.bool)}
        for name in names:
            field = batch.get(name, left_out.get(name, torch.zeros_like(tokens)))
            if field.ndim == 2:
                field = F.pad(field, (0, longest - field.shape[1]), value=fill.get(name, 0))
            parts.setdefault(name, []).append(field)
    out = {name: torch.cat(fields) for name, fields in parts.items()}
    if out["mask"].all():
        del out["mask"]
    return out


# Counts


def joined_facts(
    stores: dict[str, Store], rows: MixedRows, share: np.ndarray, vocabulary: Vocabulary
) -> dict[str, Any]:
    """The counts of several stores as those of one, and under `corpora` each with its share."""
    metas = {name: store.meta for name, store in stores.items()}
    prints = json.dumps({name: meta["fingerprint"] for name, meta in metas.items()})
    streams = [store.train for store in stores.values()]
    reads = rows.counts / rows.rows
    counts = ("documents", "parts", "empty", "duplicates")
    sizes = ("tokens", "words", "characters")
    bad = BadItems("")
    for meta in metas.values():
        bad.more(meta.get("bad_items", 0), meta.get("bad_item_examples", []))
    return {
        **{key: sum(meta[key] for meta in metas.values()) for key in counts},
        **bad.facts(),
        "fingerprint": hashlib.sha256(prints.encode()).hexdigest(),
        **{
            side: {key: sum(meta[side][key] for meta in metas.values()) for key in sizes}
            for side in ("train", "valid")
        },
        "unk_share": float(share @ [meta["unk_share"] for meta in metas.values()]),
        "unigram_entropy": mixed_entropy(streams, share, vocabulary),
        "corpora": {
            name: {"share": float(share[i]), "reads_per_pass": float(reads[i]), **meta}
            for i, (name, meta) in enumerate(metas.items())
        },
    }


def mixed_entropy(
    streams: Sequence[np.ndarray | JoinedStream], share: np.ndarray, vocabulary: Vocabulary
) -> float:
    """Nats per token of the mixture for a model that knows only how often each token occurs."""
    mixed = np.zeros(vocabulary.size)
    step = 1 << 22
    for stream, weight in zip(streams, share, strict=True):
        counts = np.zeros(vocabulary.size)
        for at in range(0, len(stream), step):
            counts += np.bincount(stream[at : at + step], minlength=vocabulary.size)
        counts[list(vocabulary.special)] = 0
        mixed += weight * counts / max(1.0, counts.sum())
    mixed = mixed[mixed > 0]
    return float(-(mixed * np.log(mixed)).sum())
