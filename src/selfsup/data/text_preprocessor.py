"""A user's texts, pairs of texts or lists of words as batches for a trained model."""

import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, final

import numpy as np
import tomli_w

from selfsup import console, files
from selfsup.batch import Batch, Vocabulary
from selfsup.data.dataset import LabelledDataset, pad_mask, pad_rows
from selfsup.data.labelled_cloze import LabelledCloze
from selfsup.data.labelled_pairs import LabelledPairs
from selfsup.data.labelled_spans import LabelledSpans
from selfsup.data.labelled_text import LabelledText
from selfsup.data.labels import Labelled
from selfsup.data.tokenizer import Tokenizer
from selfsup.errors import ConfigError, DataError

LABELLED_LENGTH = 128  # tokens in a labelled row, if nothing else is asked for
WINDOW_BATCHES = 64  # so many batches of items are sorted by length together
LEAST_ROWS, PADDING = 8, 0.1  # a batch of so many rows takes none that is so much longer
DATASETS: dict[str, Callable[..., LabelledDataset]] = {
    "span_qa": LabelledSpans,
    "generation": LabelledPairs,
    "cloze": LabelledCloze,
}
"""By task, those whose rows are of another form than a text (or two) and a label."""

Item = str | tuple[str, str] | list[str]


def alike(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Groups rows by length: at most so many, and from `LEAST_ROWS` on none much longer.

    A batch of a few rows is nearly as quick for each row as one of many, and padding costs as much
    as text.

    >>> list(alike([5, 40, 5, 6, 5, 41, 5, 5, 5, 5], 64))
    [[0, 2, 4, 6, 7, 8, 9, 3], [1, 5]]
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    group: list[int] = []
    for number in order:
        longest = (1 + PADDING) * lengths[group[0]] if group else 0.0
        if len(group) == most or (len(group) >= LEAST_ROWS and lengths[number] > longest):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


@final
class TextPreprocessor:
    """A user's texts, pairs of texts or lists of words as batches for a trained model.

    Args:
        tokenizer: the tokenizer of the model.
        max_length: longest row, special tokens included; what is longer is cut, with a warning.
    """

    FILE_NAME = "preprocessor.toml"

    def __init__(self, tokenizer: Tokenizer, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length

    @property
    def spec(self) -> Vocabulary:
        """What a model must know of its input."""
        return self.tokenizer.vocabulary

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and preprocessor.toml.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        self.tokenizer.save(folder)
        files.write_text(
            Path(folder) / self.FILE_NAME, tomli_w.dumps({"max_length": self.max_length})
        )

    @staticmethod
    def load(folder: str | Path) -> "TextPreprocessor":
        """Reads what `save` wrote.

        Raises:
            DataError: a file is missing or damaged.
        """
        path = Path(folder) / TextPreprocessor.FILE_NAME
        try:
            max_length = int(tomllib.loads(path.read_text(encoding="utf-8"))["max_length"])
        except (OSError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: not the preprocessor of a text model ({error})") from error
        return TextPreprocessor(Tokenizer.load(folder), max_length)

    def labelled(self, labelled: Labelled, **options: Any) -> LabelledDataset:
        """Labelled texts as the task's data set, in rows of at most `max_length` tokens.

        `options` are those of the data set itself.
        """
        dataset = DATASETS.get(labelled.task, LabelledText)
        return dataset(labelled, self.tokenizer, self.max_length, **options)

    def raw(self) -> "TextPreprocessor":
        """Itself: single items are not normalised."""
        return self

    def limited(self, max_length: int | None) -> "TextPreprocessor":
        """The same tokenizer for rows of at most `max_length` tokens, 128 when None."""
        return TextPreprocessor(self.tokenizer, max_length or LABELLED_LENGTH)

    def batches(self, items: Iterable[Item], batch_size: int) -> Iterator[tuple[list[int], Batch]]:
        """Batches of items of similar length, so that little is padded.

        Args:
            items: all of one kind: strings, pairs of strings (tuples), or lists of words.
            batch_size: most rows in a batch.

        Yields:
            (numbers of the items, batch): `tokens`; `mask` where a row is padded; `segments` for
            pairs; `words` for lists of words. All (batch, longest) int64, the mask bool.

        Raises:
            ConfigError: `batch_size` is below 1.
            DataError: an item is empty, or of another kind than the first one.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        stream, done = iter(items), 0
        kind: type | None = None
        while window := list(islice(stream, batch_size * WINDOW_BATCHES)):
            kind = kind or type(window[0])
            for number, item in enumerate(window, start=done):
                _check_item(item, number, kind)
            rows = self._encode(window, kind, done)
            lengths = [len(row["tokens"]) for row in rows]
            for chosen in alike(lengths, batch_size):
                yield [done + i for i in chosen], self._batch([rows[i] for i in chosen])
            done += len(window)

    def _encode(self, items: list[Any], kind: type, first: int) -> list[dict[str, np.ndarray]]:
        """The fields of each row, not padded."""
        if kind is list:
            encoded = self.tokenizer.encode_words(items)
            rows = [self._word_row(ids, words) for ids, words in encoded]
            lengths = [len(ids) for ids, _ in encoded]
        elif kind is str:
            texts = self._some(self.tokenizer.encode(items), first, 1)
            rows = [{"tokens": self.tokenizer.row(a, max_length=self.max_length)[0]} for a in texts]
            lengths = [len(a) for a in texts]
        else:
            texts = self._some(self.tokenizer.encode([t for pair in items for t in pair]), first, 2)
            pairs = list(zip(texts[::2], texts[1::2], strict=True))
            joined = [self.tokenizer.row(a, b, max_length=self.max_length) for a, b in pairs]
            rows = [{"tokens": tokens, "segments": segments} for tokens, segments in joined]
            lengths = [len(a) + len(b) for a, b in pairs]
        num_special = (3 if kind is tuple else 2) if self.tokenizer.style == "bert" else 0
        num_special += kind is tuple and self.tokenizer.style == "gpt"
        num_cut = sum(length + num_special > self.max_length for length in lengths)
        if num_cut:
            console.warn(
                f"{num_cut} of {len(items)} items were cut: the model reads at most "
                f"{self.max_length} tokens"
            )
        return rows

    @staticmethod
    def _some(encoded: list[np.ndarray], first: int, texts_per_item: int) -> list[np.ndarray]:
        for place, ids in enumerate(encoded):
            if len(ids) == 0:
                raise DataError(f"item {first + place // texts_per_item} is empty: it has no token")
        return encoded

    def _word_row(self, ids: np.ndarray, words: np.ndarray) -> dict[str, np.ndarray]:
        """A row and the word numbers at its tokens; special tokens belong to no word."""
        tokens, _ = self.tokenizer.row(ids, max_length=self.max_length)
        before = 1 if self.tokenizer.style == "bert" else 0
        numbers = np.full(len(tokens), -1, dtype=np.int32)
        room = len(tokens) - 2 * before
        numbers[before : before + room] = words[:room]
        return {"tokens": tokens, "words": numbers}

    def _batch(self, rows: list[dict[str, np.ndarray]]) -> Batch:
        fill = {"tokens": self.tokenizer.vocabulary.pad, "segments": 0, "words": -1}
        out = {name: pad_rows([row[name] for row in rows], fill[name]) for name in rows[0]}
        return {**out, **pad_mask([row["tokens"] for row in rows])}


def _check_item(item: Any, number: int, kind: type) -> None:
    if kind not in (str, tuple, list) or type(item) is not kind:
        raise DataError(
            f"item {number} is {type(item).__name__}; expected strings, (string, string) tuples or "
            "lists of words, all of one kind"
        )
    if kind is tuple and len(item) != 2:
        raise DataError(f"item {number} has {len(item)} texts, expected a pair")
    if kind is list and not item:
        raise DataError(f"item {number} is empty: it has no word")
