"""A corpus cleaned by rules and rid of what repeats: two passes, hashes in memory, texts on disk.

The first pass applies the rules of `cleaning_rules.py`, drops exact duplicates and hashes what is
left; the second drops near duplicates (`near_duplicates.py`) and then, as C4 (arXiv 1910.10683,
section 2.2), all but the first occurrence of any three-sentence span of the whole corpus. datatrove
has the same rules, but its pipeline leaves a folder a stage and its sentences need a downloaded
model, so it is compared with and not used. Memory: about 100 bytes a document for exact duplicates,
8 a band and document, 8 a sentence.

    OUT/documents/part-00000.jsonl.gz   the documents with all their columns, the text cleaned
        cleaning.json                   what each rule dropped, with examples
        report.html                     the same to look at (`selfsup.reporting.cleaning`)
"""

import gzip
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from selfsup import console
from selfsup.data.cleaning_rules import RULES, Config, Counts, Rules
from selfsup.data.formats import Split
from selfsup.data.near_duplicates import NearDuplicates
from selfsup.data.ngrams import hash64, sentences
from selfsup.data.reading import document_records
from selfsup.data.sources import Source
from selfsup.errors import ConfigError, DataError
from selfsup.files import whole_folder, write_json

PART_CHARS = 200_000_000  # characters of one output file, before it is packed
Record = dict[str, Any]


def clean(
    source: Source,
    out: Path,
    config: Config,
    *,
    text_column: str = "text",
    split: Split = "file",
    part_chars: int = PART_CHARS,
) -> dict[str, Any]:
    """Writes the clean documents of a source; the same source gives the same bytes.

    Args:
        source: as for `documents`.
        out: a folder that is made; it is empty or does not exist. It appears when all is done.
        config: the rules.
        text_column: where the text is, in formats that have columns.
        split: what a document is in .txt files.
        part_chars: an output file ends when it holds so many characters.

    Returns:
        the content of cleaning.json: read and kept documents, lines and characters; what each
        rule dropped. Documents and characters that were read are those kept and those dropped.

    Raises:
        ConfigError: `out` is not empty, or a rule lacks what it needs.
        DataError: nothing is found, a file cannot be read, or there is no document in it.
        StorageError: `out` cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; choose another --out")
    rules = Rules(config)
    counts = Counts()
    with whole_folder(out) as folder:
        spool = folder / "spool.jsonl"  # what the first pass left, in order
        with open(spool, "w", encoding="utf-8", errors="replace") as stream:
            found = _Corpus(config)
            records = document_records(source, text_column=text_column, split=split)
            _first_pass(records, text_column, rules, found, counts, stream)
        if not found.read["documents"]:
            raise DataError(f"{source}: no document in it")
        (folder / "documents").mkdir()
        with open(spool, encoding="utf-8") as stream, _parts(folder, part_chars) as write:
            kept = _second_pass(map(json.loads, stream), text_column, found, counts, write)
        spool.unlink()
        summary = {
            "read": found.read,
            "kept": kept,
            "dropped": {rule: asdict(counts[rule]) for rule in RULES},
            "config": asdict(config),
        }
        write_json(folder / "cleaning.json", summary)
    if not kept["documents"]:
        console.warn(f"{out}: no document is left; see which rule dropped them")
    return summary


@dataclass
class _Corpus:
    """What is known of the corpus as a whole: hashes alone."""

    config: Config
    read: dict[str, int] = field(default_factory=lambda: _size([]))
    left: int = 0  # documents after the first pass
    digests: set[int] = field(default_factory=set)
    spans: array = field(default_factory=lambda: array("Q"))

    def __post_init__(self) -> None:
        c = self.config
        self.near = NearDuplicates(c.bands, c.rows, c.shingle_words) if c.near_duplicates else None


def _size(texts: Sequence[str]) -> dict[str, int]:
    """Documents, lines that are not blank, characters."""
    lines = sum(bool(line.strip()) for text in texts for line in text.splitlines())
    return {"documents": len(texts), "lines": lines, "characters": sum(map(len, texts))}


def _add(total: dict[str, int], text: str) -> None:
    for key, value in _size([text]).items():
        total[key] += value


def _first_pass(
    records: Iterator[tuple[str, Record]],
    column: str,
    rules: Rules,
    found: _Corpus,
    counts: Counts,
    spool: IO[str],
) -> None:
    with console.progress("cleaning") as progress:
        for _, record in records:
            text = record[column]
            _add(found.read, text)
            progress.advance(1, f"{found.read['documents']:,} documents")
            left = rules.cleaned(text, counts)
            if not left:
                continue
            if rules.config.exact_duplicates:
                if hash64(left) in found.digests:
                    counts.drop("exact_duplicates", len(left), left, documents=1)
                    continue
                found.digests.add(hash64(left))
            found.left += 1
            if found.near is not None:
                found.near.add(left)
            found.spans.extend(span_hashes(_split(left)[0], rules.config.span_sentences))
            spool.write(_line(record, column, left))


def _second_pass(
    records: Iterator[Record], column: str, found: _Corpus, counts: Counts, write: Any
) -> dict[str, int]:
    """Writes what is kept; returns its size."""
    config, kept = found.config, _size([])
    first = None if found.near is None else found.near.first_of_cluster()
    values, times = np.unique(np.frombuffer(found.spans, np.uint64), return_counts=True)
    spans = RepeatedSpans(set(values[times > 1].tolist()), config.span_sentences)
    with console.progress("removing duplicates", found.left) as progress:
        for number, record in enumerate(records):
            text = record[column]
            progress.advance(1, f"{kept['documents']:,} kept")
            if first is not None and first[number] != number:
                counts.drop("near_duplicates", len(text), text, documents=1)
                continue
            left, example = spans.removed(text)
            if left != text and (not left or len(_split(left)[0]) < config.min_sentences):
                counts.drop("repeated_spans", len(text), example, documents=1)
                continue
            if left != text:
                lines = text.count("\n") - left.count("\n")
                counts.drop("repeated_spans", len(text) - len(left), example, lines=lines)
            write(_line(record, column, left))
            _add(kept, left)
    return kept


def _line(record: Record, column: str, text: str) -> str:
    return json.dumps({**record, column: text}, ensure_ascii=False, default=str) + "\n"


@contextmanager
def _parts(folder: Path, part_chars: int) -> Iterator[Any]:
    """Gives a function that appends a line to numbered, packed files of bounded size."""
    opened: list[gzip.GzipFile] = []
    room = 0

    def write(line: str) -> None:
        nonlocal room
        if room <= 0:
            if opened:
                opened[-1].close()
            path = folder / "documents" / f"part-{len(opened):05d}.jsonl.gz"
            # No time stamp: the same documents give the same bytes.
            opened.append(gzip.GzipFile(path, "wb", compresslevel=6, mtime=0))
            room = part_chars
        opened[-1].write(line.encode(errors="replace"))
        room -= len(line)

    try:
        yield write
    finally:
        for file in opened[-1:]:
            file.close()


# Spans of sentences


def _split(text: str) -> tuple[list[str], list[int]]:
    """The sentences of all lines, and the number of the line of each."""
    found = [(piece, i) for i, line in enumerate(text.split("\n")) for piece in sentences(line)]
    return [piece for piece, _ in found], [i for _, i in found]


def span_hashes(found: Sequence[str], n: int) -> list[int]:
    """A hash for each run of `n` sentences, in order; case and outer space are ignored."""
    plain = [piece.strip().lower() for piece in found]
    return [hash64("\n".join(plain[i : i + n])) for i in range(len(plain) - n + 1)] if n else []


class RepeatedSpans:
    """Removes every run of `n` sentences of which the kept texts have an equal one already.

    A text may repeat itself, but not with overlap: of "Ha. Ha. Ha. Ha." nothing is removed.

    Args:
        repeated: hashes of the runs that occur more than once in the corpus.
        n: sentences of a run.

    >>> text = "One is here. Two is here. Three is here. Four is new."
    >>> hashes = span_hashes(sentences(text), 3)
    >>> spans = RepeatedSpans(set(hashes), 3)
    >>> spans.removed(text)[0] == text, spans.removed(f"Zero is new. {text}")[0]
    (True, 'Zero is new.')
    """

    def __init__(self, repeated: set[int], n: int):
        self.repeated, self.n = repeated, n
        self.seen: set[int] = set()

    def removed(self, text: str) -> tuple[str, str]:
        """The text without such runs, and the first of them, or ""."""
        found, lines = _split(text)
        places = {
            i: key for i, key in enumerate(span_hashes(found, self.n)) if key in self.repeated
        }
        gone: set[int] = set()
        first_here: dict[int, int] = {}
        example = ""
        for i, key in places.items():
            first = first_here.setdefault(key, i)
            if not gone.isdisjoint(range(first, first + self.n)):
                first_here[key] = first = i  # the first one was removed: this one stands for it
            if key in self.seen or i - first >= self.n:
                gone.update(range(i, i + self.n))
                example = example or "".join(found[i : i + self.n])
        for i, key in places.items():
            if gone.isdisjoint(range(i, i + self.n)):
                self.seen.add(key)
        if not gone:
            return text, ""
        left = [""] * (lines[-1] + 1)
        for i, (piece, number) in enumerate(zip(found, lines, strict=True)):
            if i not in gone:
                left[number] += piece
        return "\n".join(line.strip() for line in left if line.strip()), example
