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

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from selfsup import console
from selfsup.batch import Vocabulary
from selfsup.data import corpora, labelled_cloze, labelled_pairs, labelled_text, span_files
from selfsup.data.bad_items import BadItems
from selfsup.data.dataset import Dataset, Prepared
from selfsup.data.formats import Split
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
from selfsup.data.text_preprocessor import TextPreprocessor
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import ConfigError, DataError
from selfsup.workers import Workers


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
        DataError: nothing is found, a file cannot be read, more than 2% of the items of a corpus
            are bad, or it is too small.
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
    split, bad = config.split_documents, BadItems(", ".join(map(str, places[:3])))
    read = partial(documents, text_column=config.text_column, split=split, bad=bad)
    if len(items) == 1:
        texts = corpora.sample(places, wanted.train_chars, read)
    else:
        texts = corpora.mixed_sample(items, config.sampling_exponent, wanted.train_chars, read)
    tokenizer = Tokenizer.train(wanted, _with_reason(texts, bad))
    tokenizer.save(folder)
    return tokenizer


def _with_reason(texts: Iterator[str], bad: BadItems) -> Iterator[str]:
    """The texts; when there is none, what is wrong with the items says why."""
    empty = True
    for text in texts:
        empty = empty and not text.strip()
        yield text
    if empty:
        bad.check()


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


READERS: dict[str, Callable[..., Labelled]] = {
    "span_qa": span_files.read,
    "generation": labelled_pairs.read,
    "cloze": labelled_cloze.read,
}
"""By task, those whose files are of another form than a text (or two) and a label."""


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
