"""Tokenizing a large text by its words, each of which is tokenized once.

A tokenizer that never looks across a space gives the ids of a text as those of its words, one after
another, and most words of a text have occurred before. For 43 M characters of English it took 0.36
of the time of the library's own pass, with one thread and with two (AVX-512, 2.5 GHz).
"""

import os
from itertools import count
from typing import Any, final

import numpy as np
import tokenizers as library
from jaxtyping import Int

from selfsup.cores import cores

SPACES = "\n\t\r"  # become blanks before a text is split; others may mean something else
MAX_CHARS = 8_000_000  # of all words that are remembered; then it begins anew
LONG = 20  # mean characters of words that seldom come again: Chinese, code, DNA
BLOCK = 1000  # new words that the library is given in one piece
ENOUGH = 8  # threads, from which on the library's pass, all of it parallel, should win


def serves(description: dict[str, Any]) -> bool:
    """Whether this tokenizer.json cuts at every space and leaves its words alone, as BERT's does.

    False also where the library has threads enough to be faster without.
    """
    threads = os.environ.get("RAYON_NUM_THREADS", "")
    if (int(threads) if threads.isdecimal() else cores()) > ENOUGH:
        return False
    cut = description.get("pre_tokenizer") or {}
    normal = description.get("normalizer") or {}
    return (
        description["model"]["type"] in ("WordPiece", "WordLevel")
        and cut.get("type") == "BertPreTokenizer"
        and normal.get("type") == "BertNormalizer"
        and all(entry["special"] for entry in description.get("added_tokens", ()))
    )


def _words(text: str) -> list[str]:
    for space in SPACES:
        text = text.replace(space, " ")
    return text.split(" ")


@final
class WordMemory:
    """The ids of the words that were seen.

    Args:
        wrapped: a tokenizer of the library for which `serves` holds.
    """

    def __init__(self, wrapped: library.Tokenizer):
        self._wrapped = wrapped
        self._forget()

    def _forget(self) -> None:
        self._places: dict[str, int] = {}
        self._chars = 0
        self._ids = np.zeros(0, np.int32)  # of all words, one after another
        self._lengths = np.zeros(0, np.int64)  # (words,)

    def encode(self, texts: list[str]) -> list[Int[np.ndarray, " tokens"]]:
        """The ids of each text, int32, without special tokens."""
        split = [_words(text) for text in texts]
        if sum(map(len, texts)) > LONG * sum(map(len, split)):
            encoded = self._wrapped.encode_batch_fast(texts, add_special_tokens=False)
            return [np.fromiter(one.ids, np.int32, len(one)) for one in encoded]
        if self._chars > MAX_CHARS:
            self._forget()
        self._learn(list(set().union(*split).difference(self._places)))
        starts = np.cumsum(self._lengths) - self._lengths
        return [self._joined(words, starts) for words in split]

    def _learn(self, words: list[str]) -> None:
        """Puts the ids of these words behind those of the others."""
        blocks = [words[first : first + BLOCK] for first in range(0, len(words), BLOCK)]
        encoded = self._wrapped.encode_batch(blocks, is_pretokenized=True, add_special_tokens=False)
        lengths = [
            np.bincount(np.array(one.word_ids, np.int64), minlength=len(block))
            for block, one in zip(blocks, encoded, strict=True)
        ]
        self._places |= zip(words, count(len(self._places)), strict=False)
        self._chars += sum(map(len, words))
        self._ids = np.concatenate([self._ids, *[np.array(e.ids, np.int32) for e in encoded]])
        self._lengths = np.concatenate([self._lengths, *lengths])

    def _joined(
        self, words: list[str], starts: Int[np.ndarray, " words"]
    ) -> Int[np.ndarray, " tokens"]:
        places = np.fromiter(map(self._places.__getitem__, words), np.int64, len(words))
        lengths = self._lengths[places]
        ends = np.cumsum(lengths)
        # token i of a text stands at i, less where its word begins here, plus where it begins there
        shift = np.repeat(starts[places] - ends + lengths, lengths)
        return self._ids[shift + np.arange(len(shift))]
