"""Words and sentences of any script, and 64-bit hashes of n-grams of words.

A word is a run of letters and digits, lower-cased, punctuation ignored; in scripts that are written
without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) every character is a word.
"""

import hashlib
import re
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from jaxtyping import UInt64

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
UNSPACED_CHARACTER = re.compile(f"[{UNSPACED}]")
WORD = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+(?:'[^\\W_{UNSPACED}]+)*")
CLOSING = "\"'”’」』）)\\]"
# After a stop and its quotes: white space and no small letter, or nothing where the script has no
# spaces.
SENTENCE_END = re.compile(f"[.?!؟۔।]+[{CLOSING}]*\\s+(?![a-z\\s])|[。！？｡]+[{CLOSING}]*\\s*")
# Stops that end no sentence: titles, and initials as in "J. S. Bach".
TITLES = r"mr|mrs|ms|dr|prof|rev|st|jr|sr|vs|cf|e\.g|i\.e"
NO_END = re.compile(rf"\b(?:(?i:{TITLES})|[A-HJ-Z])\.\s+$")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


def words(text: str) -> list[str]:
    """The words of a text.

    >>> words("Don't stop: 我们 go!")
    ["don't", 'stop', '我', '们', 'go']
    """
    return WORD.findall(text.lower().replace("’", "'"))


def sentences(text: str) -> list[str]:
    """The sentences of a text with the white space behind them: joined they are the text.

    A rule of stops and a few abbreviations, for any script with stops; C4 used NLTK's Punkt.

    >>> sentences("Mr. Fox ran. Did he?  他走了。“好！”我说。")
    ['Mr. Fox ran. ', 'Did he?  ', '他走了。', '“好！”', '我说。']
    """
    out, start = [], 0
    for stop in SENTENCE_END.finditer(text):
        before = text[max(start, stop.end() - 12) : stop.end()]
        if not (text[stop.start()] == "." and NO_END.search(before)):
            out.append(text[start : stop.end()])
            start = stop.end()
    return [*out, text[start:]] if text[start:] else out


def hash64(text: str) -> int:
    """64 bits of BLAKE2b: the same on every machine, which `hash` is not."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


_hash_of_word = lru_cache(maxsize=1 << 18)(hash64)


def word_hashes(found: Iterable[str]) -> UInt64[np.ndarray, " words"]:
    """A hash for each word."""
    return np.fromiter(map(_hash_of_word, found), np.uint64)


def ngram_hashes(hashes: UInt64[np.ndarray, " words"], n: int) -> UInt64[np.ndarray, " ngrams"]:
    """A hash for each run of `n` words, in order; none where there are fewer words.

    Two runs of different lengths have different hashes.
    """
    if len(hashes) < n:
        return hashes[:0]
    rolled = np.full(len(hashes) - n + 1, n, np.uint64)
    for i in range(n):  # Horner's rule modulo 2^64
        rolled = rolled * MULTIPLIER + hashes[i : len(hashes) - n + 1 + i]
    return _mixed(rolled)


def _mixed(x: UInt64[np.ndarray, " ngrams"]) -> UInt64[np.ndarray, " ngrams"]:
    """The finaliser of SplitMix64 (Steele et al. 2014): every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
