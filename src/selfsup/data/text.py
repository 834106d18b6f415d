"""Text: from files to rows of tokens that a model can learn from.

A corpus becomes one long stream of tokens (`store.py`), and a row is a window of that stream, so
nothing is padded and nothing is lost:

    stream   the cat sat [SEP] [CLS] it rained [SEP] [CLS] then ...
    row 0    [CLS] the cat sat [SEP] [CLS] it [SEP]
    row 1    [CLS] rained [SEP] [CLS] then ... [SEP]

With `rows = "pairs"` a row brings two spans of one document, B directly after A, for next-sentence
and sentence-order prediction; the method swaps them.

Several named corpora, one for each language, share a tokenizer and are mixed: `corpora.py`.
"""

import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import tomli_w

from selfsup import console, files
from selfsup.batch import Batch, Vocabulary
from selfsup.data import corpora, labelled_cloze, labelled_pairs, labelled_text, span_files
from selfsup.data.dataset import Dataset, LabelledDataset, Prepared, pad_mask, pad_rows
from selfsup.data.formats import Split
from selfsup.data.labelled_cloze import LabelledCloze
from selfsup.data.labelled_pairs import LabelledPairs
from selfsup.data.labelled_spans import LabelledSpans
from selfsup.data.labelled_text import LabelledText
from selfsup.data.labels import Labelled
from selfsup.data.reading import documents, resolve
from selfsup.data.rows import MIN_PAIR_TOKENS, PackedRows, PairRows
from selfsup.data.sharded import JoinedStream
from selfsup.data.sources import Place, Source
from selfsup.data.store import (
    Store,
    StoreConfig,
    build_or_open,
    default_cache,
    source_fingerprint,
)
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import ConfigError, DataError
from selfsup.workers import Workers

LABELLED_LENGTH = 128  # tokens in a labelled row, if nothing else is asked for
WINDOW_BATCHES = 64  # so many batches of items are sorted by length together
LEAST_ROWS, PADDING = 8, 0.1  # a batch of so many rows takes none that is so much longer


@dataclass(frozen=True, kw_only=True)
class Config:
    """How text becomes rows.

    Attributes:
        row_length: tokens in a row, special ones included.
        rows: "packed" rows are windows of the stream; "pairs" are two spans of one document.
        text_column: where the text is, in formats with columns.
        split_documents: what a document is in .txt files.
        valid_fraction: share of the documents that is held out.
        drop_duplicates: leaves out documents whose text was read before.
        across_documents: lets attention cross from one document of a packed row into the next.
        sampling_exponent: how far named corpora are drawn by their size: 1.0 in proportion, 0.0 all
            alike.
        tokenizer: which tokenizer is trained, or taken.
    """

    row_length: int = 128
    rows: Literal["packed", "pairs"] = "packed"
    text_column: str = "text"
    split_documents: Split = "file"
    valid_fraction: float = 0.05
    drop_duplicates: bool = False
    across_documents: bool = False
    sampling_exponent: float = 0.7
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        if self.row_length < 8:
            raise ConfigError(f"data.row_length must be at least 8, got {self.row_length}")
        if not 0 < self.valid_fraction <= 0.5:
            raise ConfigError(
                f"data.valid_fraction must be above 0 and at most 0.5, got {self.valid_fraction}"
            )
        if not 0 <= self.sampling_exponent <= 1:
            raise ConfigError(
                f"data.sampling_exponent must be from 0 to 1, got {self.sampling_exponent}"
            )


def prepare(
    config: Config,
    source: Source,
    cache: Path | None = None,
    workers: Workers | None = None,
    check: bool = False,
) -> Prepared:
    """Reads a corpus, trains or loads its tokenizer, and tokenizes it; cached for the next time.

    Args:
        config: see `Config`.
        source: files, folders, globs, addresses, a dataset name, or a list of those; each
            "NAME=PATH,PATH" is a corpus of its own, drawn by its share.
        cache: folder of tokenized corpora; $SELFSUP_CACHE or ~/.cache/selfsup when None.
        workers: who tokenizes a corpus that is large enough for shards; this process when None.
        check: reads the shards that are there to see that no byte of them has changed.

    Raises:
        DataError: nothing is found, a file cannot be read, or a corpus is too small.
        StorageError: the cache cannot be written.
    """
    cache = default_cache() if cache is None else Path(cache)
    items: dict[str, list[Place]] = {}
    for name, given in corpora.named(source).items():
        with corpora.corpus(name):
            items[name] = resolve(given)
    tokenizer = _tokenizer(config, items, cache)
    stores, train, valid = {}, {}, {}
    for name, places in items.items():
        with corpora.corpus(name):
            more = _store_config(config), cache, workers, check
            stores[name] = store = build_or_open(places, tokenizer, *more)
            train[name] = _rows(config, store.train, tokenizer, "train", store.meta)
            valid[name] = _rows(config, store.valid, tokenizer, "valid", store.meta)
    sides: dict[str, Dataset]
    if len(items) == 1:
        (name,) = items
        sides, facts = {"train": train[name], "valid": valid[name]}, dict(stores[name].meta)
    else:
        sides, facts = _mixed(config, tokenizer.vocabulary, stores, train, valid)
    facts |= {"files": sum(map(len, items.values())), "tokenizer": tokenizer.fingerprint}
    for side, parts in (("train", train), ("valid", valid)):
        facts[f"{side}_rows"] = len(sides[side])
        skipped = [rows.num_skipped for rows in parts.values() if isinstance(rows, PairRows)]
        if skipped:
            facts[f"{side}_documents_too_short_for_pairs"] = sum(skipped)
    vocabulary = replace(tokenizer.vocabulary, unigram_entropy=float(facts["unigram_entropy"]))
    preprocessor = TextPreprocessor(tokenizer, config.row_length)
    return Prepared(sides["train"], sides["valid"], vocabulary, preprocessor, facts)


def _store_config(config: Config) -> StoreConfig:
    return StoreConfig(
        text_column=config.text_column,
        split_documents=config.split_documents,
        valid_fraction=config.valid_fraction,
        drop_duplicates=config.drop_duplicates,
    )


def _mixed(
    config: Config,
    vocabulary: Vocabulary,
    stores: dict[str, Store],
    train: dict[str, PackedRows | PairRows],
    valid: dict[str, PackedRows | PairRows],
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """Both sides of several corpora, held out with the shares of training; and their counts."""
    share = corpora.shares([len(rows) for rows in train.values()], config.sampling_exponent)
    sides = [corpora.MixedRows(dict(parts), share, vocabulary.pad) for parts in (train, valid)]
    facts = corpora.joined_facts(stores, sides[0], share, vocabulary)
    return {"train": sides[0], "valid": sides[1]}, facts


def _tokenizer(config: Config, items: dict[str, list[Place]], cache: Path) -> Tokenizer:
    """The given tokenizer, the one trained for these corpora before, or a new one."""
    wanted = config.tokenizer
    if wanted.file is not None:
        return Tokenizer.load(wanted.file)
    key: dict[str, Any] = {
        "column": config.text_column,
        "split": config.split_documents,
        "kind": repr(wanted),
    }
    if len(items) > 1:
        names = {name: len(places) for name, places in items.items()}
        key |= {"corpora": names, "exponent": config.sampling_exponent}
    places = list(chain.from_iterable(items.values()))
    folder = cache / f"tokenizer-{source_fingerprint(places, key)}"
    if folder.exists():
        try:
            return Tokenizer.load(folder)
        except DataError as error:
            console.warn(f"{error}; it is trained again")
    console.say(f"training a {wanted.kind} tokenizer")
    read = partial(documents, text_column=config.text_column, split=config.split_documents)
    if len(items) == 1:
        texts = corpora.sample(places, wanted.train_chars, read)
    else:
        texts = corpora.mixed_sample(items, config.sampling_exponent, wanted.train_chars, read)
    tokenizer = Tokenizer.train(wanted, texts)
    tokenizer.save(folder)
    return tokenizer


def _rows(
    config: Config,
    stream: np.ndarray | JoinedStream,
    tokenizer: Tokenizer,
    side: str,
    meta: dict[str, Any],
) -> PackedRows | PairRows:
    vocabulary, style = tokenizer.vocabulary, tokenizer.style
    counts = f"{meta['documents']} documents gave {len(stream)} {side} tokens"
    more = "" if side == "train" else ", raise data.valid_fraction"
    if config.rows == "pairs":
        if style != "bert":
            raise ConfigError('data.rows = "pairs" needs data.tokenizer.style = "bert"')
        pairs = PairRows(stream, vocabulary, config.row_length)
        if len(pairs) == 0:
            raise DataError(
                f"{counts}, but no document has {MIN_PAIR_TOKENS} tokens for a pair; join short "
                f'documents (data.split_documents){more}, or use data.rows = "packed"'
            )
        return pairs
    num_special = 2 if style == "bert" else 0
    if len(stream) < config.row_length - num_special:
        raise DataError(
            f"{counts}, fewer than one row of {config.row_length}: lower data.row_length to at "
            f"most {len(stream) + num_special}{more}, or give more text"
        )
    return PackedRows(
        stream, vocabulary, config.row_length, style == "bert", config.across_documents
    )


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


# Tasks whose files and rows are of another form than a text (or two) and a label.
READERS: dict[str, Callable[..., Labelled]] = {
    "span_qa": span_files.read,
    "generation": labelled_pairs.read,
    "cloze": labelled_cloze.read,
}
DATASETS: dict[str, Callable[..., LabelledDataset]] = {
    "span_qa": LabelledSpans,
    "generation": LabelledPairs,
    "cloze": LabelledCloze,
}


def read_labels(path: str | Path, task: str, **columns: Any) -> Labelled:
    """Reads one labelled file of a task: see `labelled_text.read` and the modules of `READERS`."""
    return READERS.get(task, labelled_text.read)(path, task, **columns)


load_preprocessor = TextPreprocessor.load


def read_items(source: Source, column: str | None, preprocessor: Any) -> Iterator[tuple[str, str]]:
    """("file:line", text) of every line of .txt files, and of every row of other formats."""
    for document in documents(source, text_column=column or "text", split="line"):
        yield document.origin, document.text


def with_preprocessor(config: Config, folder: Path) -> Config:
    """The configuration for reading other data as the model in `folder` reads it."""
    return replace(config, tokenizer=replace(config.tokenizer, file=str(folder)))
