"""How much of a test set a corpus holds: n-grams of words that both have.

Brown et al., "Language Models are Few-Shot Learners", 2020, arXiv 2005.14165, appendix C: a test
item is contaminated if any of its 13-grams of words, lower-cased and without punctuation, occurs in
the training data. In scripts without spaces a character is a word. The test set is indexed, the
corpus streamed: memory holds 8 bytes an n-gram of the test set.

Deviations: an item of fewer words than n counts as one n-gram of its own length, and short items
are also counted apart, as common phrases are found everywhere (the paper shortens n for the whole
test set, down to 8); n-grams that many documents have are not left out, as the paper does.
"""

import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from selfsup import console
from selfsup.data.cleaning_rules import EXAMPLE_CHARS
from selfsup.data.ngrams import ngram_hashes, word_hashes, words
from selfsup.data.reading import document_records, documents
from selfsup.data.sources import Source
from selfsup.errors import ConfigError, DataError
from selfsup.files import write_text

NUM_WORST = 5


@dataclass(frozen=True)
class TestSet:
    """The n-grams of the items of a test set.

    Attributes:
        num_words: the words of each item.
        grams: a hash for every n-gram of every item, item after item.
        item: the item of each n-gram.
        length: its words.
    """

    __test__ = False  # no test, though pytest would take it for one

    num_words: Int[np.ndarray, " items"]
    grams: UInt64[np.ndarray, " ngrams"]
    item: Int[np.ndarray, " ngrams"]
    length: Int[np.ndarray, " ngrams"]

    def shares(self, hits: Bool[np.ndarray, " ngrams"]) -> Float[np.ndarray, " items"]:
        """The share of each item's n-grams that were found; 0 without words."""
        total = np.bincount(self.item, minlength=len(self.num_words))
        return np.bincount(self.item, hits, len(self.num_words)) / np.maximum(total, 1)


def contamination(
    corpus: Source,
    test: Source,
    *,
    n: int = 13,
    text_column: str = "text",
    test_column: str | None = None,
    clean_out: Path | None = None,
) -> dict[str, Any]:
    """Measures which items of a test set a corpus holds.

    Args:
        corpus: as for `documents`.
        test: a file of items; of .txt each line is one.
        n: words of an n-gram.
        text_column: where the text is, in formats that have columns.
        test_column: the same for the test set, where it is another.
        clean_out: a .jsonl file for the items that are not contaminated, with all their columns.

    Returns:
        counts, and the share of found n-grams of each contaminated item, by its number from 0.

    Raises:
        ConfigError: n is less than 1, or `clean_out` exists.
        DataError: a file cannot be read, or the test set is empty.
    """
    if n < 1:
        raise ConfigError(f"n must be at least 1, got {n}")
    if clean_out is not None and clean_out.exists():
        raise ConfigError(f"{clean_out} exists; choose another file for the clean items")
    column = test_column or text_column
    items = read_test_set((record[column] for _, record in _items(test, column)), n)
    if not len(items.num_words):
        raise DataError(f"{test}: no test item in it")
    hits, size = _search(corpus, text_column, items)
    shares = items.shares(hits)
    if clean_out is not None:
        left = (r for i, (_, r) in enumerate(_items(test, column)) if not shares[i])
        lines = (json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in left)
        write_text(clean_out, "".join(lines))
    short = items.num_words < n
    return {
        "n": n,
        "items": len(shares),
        "contaminated": int((shares > 0).sum()),
        "share": float((shares > 0).mean()),
        "wholly_found": int((shares == 1).sum()),
        "short_items": int(short.sum()),
        "contaminated_short": int((shares[short] > 0).sum()),
        "corpus_documents": size[0],
        "corpus_words": size[1],
        "worst": _worst(test, column, items, shares),
        "shares": {str(i): round(float(shares[i]), 4) for i in np.flatnonzero(shares)},
    }


def read_test_set(texts: Iterator[str], n: int) -> TestSet:
    """Hashes the n-grams of the items; items without words have none."""
    counts, grams = [], [np.zeros(0, np.uint64)]
    for text in texts:
        hashes = word_hashes(words(text))
        counts.append(len(hashes))
        grams.append(ngram_hashes(hashes, min(n, max(1, len(hashes)))))
    num_words = np.array(counts, np.int64)
    item = np.repeat(np.arange(len(counts)), [len(found) for found in grams[1:]])
    return TestSet(num_words, np.concatenate(grams), item, np.minimum(num_words, n)[item])


def _items(test: Source, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    return document_records(test, text_column=column, split="line")


def _search(
    corpus: Source, column: str, items: TestSet
) -> tuple[Bool[np.ndarray, " ngrams"], tuple[int, int]]:
    """Whether the corpus holds each n-gram; the corpus's documents and words."""
    lengths = np.unique(items.length).tolist()
    index = {length: np.unique(items.grams[items.length == length]) for length in lengths}
    found = {length: np.zeros(len(grams), bool) for length, grams in index.items()}
    count = total = 0
    longest = max(lengths, default=1)
    stream = documents(corpus, text_column=column)
    with console.progress("searching the corpus") as progress:
        for _, parts in groupby(stream, key=lambda document: document.number):
            before = np.zeros(0, np.uint64)
            for part in parts:
                hashes = word_hashes(words(part.text))
                total += len(hashes)
                # n-grams may cross from one part of a long document to the next
                hashes = np.concatenate([before, hashes])
                for length, known in index.items():
                    grams = ngram_hashes(hashes, length)
                    places = np.minimum(np.searchsorted(known, grams), len(known) - 1)
                    found[length][places[known[places] == grams]] = True
                before = hashes[max(0, len(hashes) - longest + 1) :]
            count += 1
            progress.advance(1, f"{count:,} documents")
    hits = np.zeros(len(items.grams), bool)
    for length, known in index.items():
        here = items.length == length
        hits[here] = found[length][np.searchsorted(known, items.grams[here])]
    return hits, (count, total)


def _worst(
    test: Source, column: str, items: TestSet, shares: Float[np.ndarray, " items"]
) -> list[dict[str, Any]]:
    """The items of which most was found, the longer first among equals."""
    order = [(-shares[i], -items.num_words[i], i) for i in np.flatnonzero(shares)]
    places = [int(i) for _, _, i in heapq.nsmallest(NUM_WORST, order)]
    texts = {i: (o, r[column]) for i, (o, r) in enumerate(_items(test, column)) if i in places}
    return [
        {
            "origin": texts[i][0],
            "share": round(float(shares[i]), 4),
            "words": int(items.num_words[i]),
            "text": " ".join(texts[i][1].split())[:EXAMPLE_CHARS],
        }
        for i in places
    ]
