"""Documents that are nearly equal: MinHash signatures, banded so that only likely pairs meet (LSH).

Broder, "On the resemblance and containment of documents", 1997; Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", chapter 3. A document is its set of n-grams of words (shingles). Under
a random hash function two sets have the same smallest element with the probability of their Jaccard
similarity s. Of `bands` x `rows` such hashes, documents meet if all rows of one band agree, which
happens with probability 1 - (1 - s^rows)^bands. The defaults, 14 bands of 8 rows over 5-grams, are
those of FineWeb (Penedo et al. 2024, arXiv 2406.17557) and datatrove: half of the pairs meet at
s = 0.70, 92% at 0.8.

Deviation: hash functions are h(x) = (a x + b mod 2^64) >> 32 with a odd (Dietzfelbinger et al.
1997); datatrove takes a product modulo a Mersenne prime that overflows. Memory: 8 bytes a band and
document.
"""

from array import array

import numpy as np
from jaxtyping import Float, Int, UInt64
from scipy import sparse

from selfsup.data.ngrams import ngram_hashes, word_hashes, words

SEED = 1  # of the hash functions: the same documents meet in every run
BLOCK = 1024  # shingles hashed at once: (1024, 112) 64-bit numbers are 0.9 MB


def meeting_probability(
    similarity: Float[np.ndarray, " pairs"], bands: int, rows: int
) -> Float[np.ndarray, " pairs"]:
    """The probability that two documents of that Jaccard similarity meet in a band.

    >>> float(meeting_probability(np.array([0.8]), 14, 8)[0].round(3))
    0.924
    """
    return 1 - (1 - similarity**rows) ** bands


def shingles(text: str, n: int) -> UInt64[np.ndarray, " shingles"]:
    """The hashed n-grams of words of a text; a shorter text is one shingle; no word, none."""
    hashes = word_hashes(words(text))
    return np.unique(ngram_hashes(hashes, min(n, max(1, len(hashes)))))


class NearDuplicates:
    """Collects documents; then says which is nearly equal to which.

    Args:
        bands: bands of the signature.
        rows: hashes of a band.
        shingle_words: words of a shingle.

    >>> found = NearDuplicates(bands=14, rows=8, shingle_words=2)
    >>> for text in ("a b c d e f g h", "quite another text", "A, b, c: d e f g h!"):
    ...     found.add(text)
    >>> found.first_of_cluster()
    array([0, 1, 0])
    """

    def __init__(self, bands: int = 14, rows: int = 8, shingle_words: int = 5):
        self.bands, self.rows, self.shingle_words = bands, rows, shingle_words
        draw = np.random.Generator(np.random.PCG64(SEED))
        size = bands * rows
        self.a = draw.integers(0, 2**64, size, np.uint64) | np.uint64(1)
        self.b = draw.integers(0, 2**64, size, np.uint64)
        self.keys = array("Q")  # `bands` for each document with words
        self.numbers = array("Q")  # their numbers
        self.count = 0

    def signature(self, shingles: UInt64[np.ndarray, " shingles"]) -> UInt64[np.ndarray, " hashes"]:
        """The smallest value of each hash function over one shingle or more."""
        least = np.full(len(self.a), 2**64 - 1, np.uint64)
        for start in range(0, len(shingles), BLOCK):
            block = shingles[start : start + BLOCK, None] * self.a + self.b  # (block, hashes)
            np.minimum(least, block.min(axis=0), out=least)
        return least >> np.uint64(32)

    def add(self, text: str) -> None:
        """The next document; one without words is near to none."""
        found = shingles(text, self.shingle_words)
        if len(found):
            bands = self.signature(found).reshape(self.bands, self.rows)
            keys = ngram_hashes(bands.ravel(), self.rows)[:: self.rows]  # a hash for each band
            self.keys.frombytes(keys.tobytes())
            self.numbers.append(self.count)
        self.count += 1

    def first_of_cluster(self) -> Int[np.ndarray, " documents"]:
        """For every document the first that it is connected to by pairs that met; often itself."""
        first = np.arange(self.count)
        if not self.numbers:
            return first
        numbers = np.frombuffer(self.numbers, np.uint64).astype(np.int64)
        keys = np.frombuffer(self.keys, np.uint64).reshape(-1, self.bands)
        pairs = []
        for band in keys.T:
            order = np.argsort(band, kind="stable")
            same = band[order[1:]] == band[order[:-1]]
            pairs.append(numbers[np.stack([order[:-1][same], order[1:][same]])])  # (2, pairs)
        left, right = np.concatenate(pairs, axis=1)
        graph = sparse.coo_array(
            (np.ones(len(left), bool), (left, right)), (self.count, self.count)
        )
        clusters = sparse.csgraph.connected_components(graph, directed=False)[1]
        firsts = np.full(self.count, self.count)
        np.minimum.at(firsts, clusters, first)
        return firsts[clusters]
