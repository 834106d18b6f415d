"""Labelled text: files with labels, read strictly, and turned into batches.

The formats are described in label_files.py. Every line of a file is read or none: what does not fit
the task is an error that names file and line.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from selfsup.batch import Batch
from selfsup.data.dataset import LabelledDataset, pad_mask, pad_rows
from selfsup.data.label_files import (
    TABLES,
    Record,
    Sentence,
    find_column,
    has_usual,
    sentences,
    suffix_of,
    table,
)
from selfsup.data.labels import Labelled, check_known, finite_number, label_numbers, names_of
from selfsup.data.tokenizer import Tokenizer
from selfsup.errors import ConfigError, DataError, nearest

TASKS = ("classification", "regression", "tagging")
IGNORED = -100
"""The label of a position that is not scored."""


def read(
    path: str | Path,
    task: str,
    *,
    text: str | int | None = None,
    text_b: str | int | None = None,
    label: str | int | None = None,
    names: tuple[str, ...] | None = None,
) -> Labelled:
    """Reads one labelled file.

    For tagging, a table holds words and tags as lists, or as strings that are split at spaces.

    Args:
        path: a file of one of the formats in label_files.py.
        task: classification, regression or tagging.
        text, text_b, label: columns of a table; found by their usual names where not given, and a
            second text is looked for only when `text` is not given. Numbers, from 1, name the
            columns of a .csv or .tsv without a header row. Files of tagged words take only `label`:
            which tag, as in `label_files.sentences`.
        names: the training data's `names`, when this is validation or test data; a label that is
            not among them is an error. None: this is training data; its labels make the names, and
            there must be at least two.

    Raises:
        DataError: the file cannot be read, or a line is not what the task needs.
        ConfigError: an unknown task, or a column that this file or task does not have.
    """
    path = Path(path)
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}{nearest(task, TASKS)}")
    if task == "tagging" and text_b is not None:
        raise ConfigError("tagging reads one sentence per example; leave text_b out")
    suffix = suffix_of(path)
    if suffix in TABLES:
        rows = _table_rows(path, task, text, text_b, label)
    elif task != "tagging":
        raise DataError(
            f"{path}: a {suffix} file holds words with tags, which only tagging reads; "
            f"for {task} give a {', '.join(TABLES)} file"
        )
    elif text is not None:
        raise ConfigError(f"{path}: the words have one place in a {suffix} file; leave text out")
    else:
        rows = list(sentences(path, label))
    if not rows:
        raise DataError(f"{path}: the file holds no example; give a file with labelled lines")
    items, labels = [], []
    for where, item, value in rows:
        if names is not None:
            _check_known(where, task, item, value, names)
        items.append(item)
        labels.append(value)
    if names is None:
        every = itertools.chain.from_iterable(labels) if task == "tagging" else labels
        names = names_of(every, task, str(path))
    return Labelled(task, items, labels, names, str(path))


def _check_known(where: str, task: str, item: Any, value: Any, names: tuple[str, ...]) -> None:
    given = {"tagging": value, "classification": [value]}.get(task, [])
    for place, name in enumerate(given):
        about = f" (of the word {item[place]!r})" if task == "tagging" else ""
        check_known(name, names, where, about)


def _table_rows(path: Path, task: str, text, text_b, label) -> list[tuple[str, Any, Any]]:
    given = [str(name) for name in (text, text_b, label) if name is not None]
    numbered = suffix_of(path) in (".csv", ".tsv") and bool(given)
    columns, records = table(path, numbered and all(name.isdecimal() for name in given))
    tagging = task == "tagging"
    first = find_column(path, columns, "words" if tagging else "text", text)
    answer = find_column(path, columns, "tags" if tagging else "label", label)
    paired = text_b is not None
    if text is None and not tagging and not paired:
        paired = has_usual(columns, "text_b")
    second = find_column(path, columns, "text_b", text_b) if paired else None
    rows: list[tuple[str, Any, Any]] = []
    for record in records:
        for column in filter(None, (first, second, answer)):
            if column not in record.cells:  # JSON lines may differ in their keys
                raise DataError(
                    f"{record.where}: column {column!r} is missing; "
                    f"this line has {', '.join(record.cells) or 'none'}"
                )
        if tagging:
            rows.append(_tagged(record, first, answer))
            continue
        item: Any = _string(record, first)
        if second is not None:
            item = (item, _string(record, second))
        value = _number(record, answer) if task == "regression" else _string(record, answer)
        rows.append((record.where, item, value))
    return rows


def _string(record: Record, column: str) -> str:
    value = record.cells[column]
    if isinstance(value, bool | int | float):
        value = json.dumps(value)  # true, 1, 0.5: as JSON writes it
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{record.where}: {column!r} is empty; fill it in or remove the line")
    if not isinstance(value, str):
        raise DataError(f"{record.where}: {column!r} must be text or a number, got {value!r}")
    return value.strip()


def _number(record: Record, column: str) -> float:
    return finite_number(_string(record, column), record.where, repr(column))


def _strings(record: Record, column: str) -> list[str]:
    value = record.cells[column]
    parts = value.split() if isinstance(value, str) else value
    if not parts:
        raise DataError(f"{record.where}: {column!r} is empty; fill it in or remove the line")
    if not isinstance(parts, list):
        raise DataError(
            f"{record.where}: {column!r} must be a list, or words between spaces, got {value!r}"
        )
    return [_string(Record(record.where, {column: part}), column) for part in parts]


def _tagged(record: Record, first: str, answer: str) -> Sentence:
    words, tags = _strings(record, first), _strings(record, answer)
    if len(words) != len(tags):
        raise DataError(
            f"{record.where}: {len(words)} words in {first!r}, but {len(tags)} tags in {answer!r}"
        )
    return Sentence(record.where, words, tags)


@final
class LabelledText(LabelledDataset):
    """Labelled text as batches; everything is tokenised once, here.

    Batches hold `tokens`, `mask`, `index`, `segments` for pairs, and `label`: (batch,) int64 class
    numbers, (batch,) float32, or for tagging (batch, time) int64 tag numbers at the first token of
    each word and -100 elsewhere, with `words` beside it.

    Args:
        labelled: the examples; its `names` number the labels.
        tokenizer: turns them into ids.
        max_length: longest row in tokens, special ones included; longer rows lose their end.

    Attributes:
        truncated: how many rows lost tokens.
        word_labels: for tagging (num_words,) int64 tag numbers of every word of every example, also
            of those beyond `max_length`, which a metric must count as wrong; else empty.

    Raises:
        ConfigError: `max_length` leaves no room for text.
    """

    def __init__(self, labelled: Labelled, tokenizer: Tokenizer, max_length: int):
        if max_length < 5:  # three special tokens and one of each text
            raise ConfigError(f"max_length must be at least 5 tokens, got {max_length}")
        self.task, self.pad = labelled.task, tokenizer.vocabulary.pad
        self.tokens: list[np.ndarray] = []
        self.words: list[np.ndarray] = []
        self.segments: list[np.ndarray] = []
        self.truncated = 0
        self.word_labels: list[np.ndarray] = []
        self.labels = np.empty(0)
        if self.task == "tagging":
            numbers = {name: number for number, name in enumerate(labelled.names)}
            self._add_words(labelled, tokenizer, max_length)
            self.word_labels = [np.array([numbers[t] for t in tags]) for tags in labelled.labels]
        else:
            self._add_texts(labelled, tokenizer, max_length)
            self.labels = label_numbers(labelled)
        extra = ("words",) * bool(self.words) + ("segments",) * bool(self.segments)
        self.fields = ("tokens", "mask", *extra, "label")
        self.lengths = np.array([len(row) for row in self.tokens])

    def _add_words(self, labelled: Labelled, tokenizer: Tokenizer, max_length: int) -> None:
        # no word begins at [CLS] or [SEP]
        margin = np.full(1 if tokenizer.style == "bert" else 0, -1, dtype=np.int32)
        for ids, words in tokenizer.encode_words(labelled.items):
            tokens, _ = tokenizer.row(ids, max_length=max_length)
            kept = len(tokens) - 2 * len(margin)
            self.truncated += kept < len(ids)
            self.tokens.append(tokens)
            self.words.append(np.concatenate([margin, words[:kept], margin]))

    def _add_texts(self, labelled: Labelled, tokenizer: Tokenizer, max_length: int) -> None:
        # parse_special=False: "[MASK]" in a labelled text is text.
        pairs = isinstance(labelled.items[0], tuple)
        sides = list(zip(*labelled.items, strict=True)) if pairs else [labelled.items]
        encoded = [tokenizer.encode(list(side), parse_special=False) for side in sides]
        seconds = encoded[1] if pairs else [None] * len(labelled)
        for a, b in zip(encoded[0], seconds, strict=True):
            tokens, segments = tokenizer.row(a, b, max_length)
            self.truncated += len(tokens) < len(tokenizer.row(a, b)[0])
            if not len(tokens):  # style gpt, and a text that the tokenizer makes vanish
                tokens = np.array([tokenizer.vocabulary.sep])
            self.tokens.append(tokens)
            self.segments += [segments] * pairs

    def __len__(self) -> int:
        return len(self.tokens)

    def collect(
        self, values: Sequence[np.ndarray], scores: Sequence[np.ndarray]
    ) -> tuple[list[Any], list[Any]]:
        """As `LabelledDataset.collect`; for tagging all words in one list, -1 where cut off."""
        if self.task != "tagging":
            return super().collect(values, scores)
        guess = [np.full(len(tags), -1.0) for tags in self.word_labels]
        for tags, row in zip(guess, values, strict=True):
            seen = row[: len(tags)]
            tags[: len(seen)] = seen
        return np.concatenate(self.word_labels).tolist(), np.concatenate(guess).tolist()

    def batch(self, numbers: np.ndarray) -> Batch:
        """The examples of those numbers as CPU tensors."""
        rows = [self.tokens[i] for i in numbers]
        batch = {"tokens": pad_rows(rows, self.pad), **pad_mask(rows)}
        batch["index"] = torch.from_numpy(np.asarray(numbers, dtype=np.int64))
        if self.segments:
            batch["segments"] = pad_rows([self.segments[i] for i in numbers], 0)
        if self.task == "tagging":
            words = [self.words[i] for i in numbers]
            batch["words"] = pad_rows(words, -1)
            tags = [
                np.where(row >= 0, self.word_labels[i][row], IGNORED)
                for i, row in zip(numbers, words, strict=True)
            ]
            batch["label"] = pad_rows(tags, IGNORED)
        else:
            label = torch.from_numpy(self.labels[numbers])
            batch["label"] = label.float() if self.task == "regression" else label.long()
        return batch
