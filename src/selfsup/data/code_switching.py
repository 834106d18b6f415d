"""Texts with some words written in another language, by a dictionary.

Words that stand in the same places are given alike vectors, and in such a corpus a word and its
translation stand in the same places (CoSDA-ML, Qin et al. 2020, arXiv 2006.06402, who switch words
while they fine-tune). A word is changed wherever chance says so, whatever its sense there. Marks
may stand in the dictionary too.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path

from selfsup.data.reading import document_records, documents
from selfsup.data.sources import Source
from selfsup.errors import ConfigError, DataError
from selfsup.files import whole_file

PIECE = re.compile(r"\w+|[^\w\s]")
GLOSS = re.compile(r"[;,/]")
BEFORE = re.compile(r"^(to|a|an|the) ")
ENDINGS = ("", "s", "es", "ed", "d", "ing")  # of English, where a dictionary has the bare word
Lexicon = dict[str, list[str]]


def read_lexicon(path: Source, source: str, target: str) -> Lexicon:
    """Translations of each word, in the order of the file.

    Args:
        path: .jsonl, .csv or .tsv with a column for each language.
        source: the column of the words to be changed: one, or several between commas or
            semicolons, as dictionaries explain; explanations of more than one word are left out,
            but for "to", "a" and "the" before them. Case is no matter.
        target: the column of what takes their place.

    Raises:
        DataError: the file cannot be read or has no such column, or holds no pair of words.
    """
    lexicon: Lexicon = {}
    for origin, record in document_records(path, text_column=source):
        meaning, written = record[source], record.get(target)
        if not isinstance(written, str):
            raise DataError(f"{origin}: no text in {target!r}; there are {', '.join(record)}")
        for gloss in GLOSS.split(meaning) if len(meaning) > 1 else [meaning]:
            word = BEFORE.sub("", gloss.strip().lower())
            found = lexicon.setdefault(word, [])
            if written.strip() and PIECE.fullmatch(word) and written not in found:
                found.append(written)
    lexicon = {word: found for word, found in lexicon.items() if found}
    if not lexicon:
        raise DataError(f"{path}: no single word of {source!r} has a translation")
    return lexicon


def frequent(lexicon: Lexicon, counts: Counter[str], least: int, most: int) -> Lexicon:
    """The translations that occur `least` times, the most frequent first, `most` for each word."""
    kept = {
        word: sorted((one for one in found if counts[one] >= least), key=lambda one: -counts[one])
        for word, found in lexicon.items()
    }
    return {word: found[:most] for word, found in kept.items() if found}


def switched(text: str, lexicon: Lexicon, share: float, rng: random.Random) -> tuple[str, int]:
    """A text with words changed, each with the probability `share`, and how many were.

    >>> switched("The dogs ran.", {"dog": ["狗"], "ran": ["跑"]}, 1.0, random.Random(0))
    ('The 狗 跑.', 2)
    """
    changed = 0

    def other(piece: re.Match[str]) -> str:
        nonlocal changed
        if rng.random() >= share:
            return piece[0]
        word = piece[0].lower()
        for ending in ENDINGS:
            if word.endswith(ending) and (found := lexicon.get(word.removesuffix(ending))):
                changed += 1
                return rng.choice(found)
        return piece[0]

    return PIECE.sub(other, text), changed


def write_switched(
    data: Source,
    lexicon: Source,
    out: Path,
    *,
    source: str,
    target: str,
    share: float = 0.5,
    like: Source | None = None,
    text_column: str = "text",
    seed: int = 0,
) -> dict[str, int]:
    """Writes a corpus with words changed as .jsonl, a line for each document.

    Args:
        data: texts in the language of `source`.
        lexicon: see `read_lexicon`.
        out: the file to make.
        source: the lexicon's column of words to be changed.
        target: its column of what takes their place.
        share: probability with which a word that the lexicon has is changed.
        like: texts in the language of `target`: only what they hold 50 times is put in, the two
            most frequent translations of each word.
        text_column: where the text is, in formats that have columns.
        seed: of what is changed.

    Returns:
        how many words of the lexicon are used, documents, words and marks, and how many of them
        were changed.

    Raises:
        ConfigError: the share is no probability, or `out` is there already.
        DataError: a file cannot be read, or the lexicon has nothing that `like` holds.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share must be above 0 and at most 1, got {share}")
    if out.exists():
        raise ConfigError(f"{out} exists; choose another --out")
    words = read_lexicon(lexicon, source, target)
    if like is not None:
        words = frequent(words, _occurrences(words, like, text_column), least=50, most=2)
        if not words:
            raise DataError(f"{like}: holds no translation of {lexicon} 50 times")
    rng, found = random.Random(seed), Counter[str]()
    with whole_file(out) as aside, open(aside, "w", encoding="utf-8") as file:
        for document in documents(data, text_column=text_column):
            text, changed = switched(document.text, words, share, rng)
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            found["documents"] += document.part == 0
            found["words"] += len(PIECE.findall(document.text))
            found["switched"] += changed
    return {"lexicon": len(words), **found}


def _occurrences(lexicon: Lexicon, like: Source, text_column: str) -> Counter[str]:
    """How often each translation occurs: single characters anywhere, longer ones as words."""
    wanted = {one for found in lexicon.values() for one in found}
    counts: Counter[str] = Counter()
    for document in documents(like, text_column=text_column):
        counts.update(document.text)
        counts.update(word for word in PIECE.findall(document.text) if len(word) > 1)
    return Counter({one: counts[one] for one in wanted})
