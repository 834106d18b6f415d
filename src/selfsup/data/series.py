"""Time series: from files to windows of numbers that a model can learn from.

A table with a time column is one long series per file. Its rows are split by time, and a window
never crosses from one part or file into another:

    | train ........................ | valid .... | test ...... |
      [window]                         [window]     never read while pre-training
       [window]  every `stride` rows

A `.ts` file (of the aeon and sktime archives) holds many short series, each with class or number:

    @dimensions 2                      channels
    @classLabel true walking running   or @targetLabel true
    @data
    1.0,2.0,3.0:0.5,?,0.7:walking      a channel between colons, ? where missing, the label last

There an example is a whole series, of whatever length, and `window` and `stride` mean nothing.

With `independent`, each channel of a window, or of a short series, is an example of its own.

Channels are standardised with the mean and deviation of the training part. Missing values are NaN,
and so is what pads a shorter series (`mask` tells). Everything is read at once, kept as float32.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, final

import numpy as np

from selfsup import console, files
from selfsup.batch import Batch, SeriesSpec
from selfsup.data.dataset import Prepared
from selfsup.data.labelled_series import LabelledSeries
from selfsup.data.labelled_series import read_labels as read_labels
from selfsup.data.labels import Labelled
from selfsup.data.series_files import (
    KNOWN,
    PARTS,
    Config,
    Parts,
    read_cases,
    read_tables,
    read_ts,
    stretches,
)
from selfsup.data.series_windows import Windows, channels_apart, padded
from selfsup.data.table_files import files_of, fingerprint, kind_of
from selfsup.errors import ConfigError, DataError

WINDOW_BATCHES = 64  # so many batches of items are sorted by length together


def prepare(
    config: Config, source: str | Path | Sequence[str | Path], cache: Path | None = None
) -> Prepared:
    """Reads time series and cuts them into windows for training and validation.

    The rows of the test part are not looked at, but for their time stamps.

    Args:
        config: see `Config`.
        source: files, folders, globs, or a list of those: tables with equal columns, each one
            series, or .ts files with equal channels.
        cache: not used: reading a table again is as fast as reading a cache.

    Raises:
        DataError: nothing is found, a file cannot be read, time does not rise, columns differ
            between files or are missing, more than 2% of the cells are text, or a part is shorter
            than a window.
        ConfigError: `time_column` is not there.
    """
    paths = files_of(source, KNOWN)
    short = any(kind_of(path, KNOWN) == ".ts" for path in paths)
    parts = read_cases(config, paths) if short else read_tables(config, paths, with_test=False)
    longest = max(len(series) for series in (*parts.train, *parts.valid))
    preprocessor = _fitted(config, parts, longest if short else config.window)
    window = 0 if short else config.window
    train, valid = (
        Windows(preprocessor.examples(part), window, config.stride)
        for part in (parts.train, parts.valid)
    )
    for name, part in (("training", train), ("validation", valid)):
        if not len(part):
            raise DataError(
                f"{source}: the {name} part is shorter than one window of {config.window} rows; "
                "lower data.window, change data.splits, or give longer series"
            )
    num_short = 0 if short else sum(len(series) < window for series in parts.train)
    if num_short:
        console.warn(
            f"{num_short} of {len(parts.train)} series have fewer than data.window = {window} rows "
            "to train on; they give no example"
        )
    facts = {
        "files": len(paths),
        **parts.facts,
        "series_too_short": num_short,
        "columns": len(parts.columns),
        "train_windows": len(train),
        "valid_windows": len(valid),
        "fingerprint": fingerprint(np.concatenate(train.series), config, parts.columns),
        "tokenizer": "",
    }
    return Prepared(train, valid, preprocessor.spec, preprocessor, facts)


def splits(config: Config, source: str | Path) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The channels of one series and its standardised parts, for forecasting.

    Args:
        config: see `Config`; mean and deviation come from the training rows.
        source: one table.

    Returns:
        names of the channels; (time, channel) float32 for train, valid and test, in the order of
        time without gaps.

    Raises:
        DataError: see `prepare`; or more than one file, or a .ts file.
    """
    paths = files_of(source, KNOWN)
    if len(paths) > 1 or kind_of(paths[0], KNOWN) == ".ts":
        raise DataError(f"{source}: forecasting reads one table, which is one long series")
    parts = read_tables(config, paths, with_test=True)
    preprocessor = _fitted(config, parts, config.window)
    return parts.columns, {n: preprocessor.standardise(getattr(parts, n)[0]) for n in PARTS}


@final
class SeriesPreprocessor:
    """A user's series as batches for a trained model.

    Args:
        columns: names of the channels.
        mean, std: per channel; std is 1 for a channel that was constant.
        length: time steps of the windows that the model was trained on; others may be given.
        independent: the model reads the channels one by one.

    >>> preprocessor = SeriesPreprocessor(("OT",), (10.0,), (2.0,), length=3)
    >>> _, batch = next(preprocessor.batches([[[10.0], [14.0], [8.0]]], batch_size=1))
    >>> batch["series"].tolist()
    [[[0.0], [2.0], [-1.0]]]
    """

    FILE_NAME = "preprocessor.json"

    def __init__(
        self,
        columns: tuple[str, ...],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        length: int,
        independent: bool = False,
    ):
        self.columns, self.mean, self.std, self.length = columns, mean, std, length
        self.independent = independent

    @property
    def spec(self) -> SeriesSpec:
        """What a model must know of its input."""
        channels = 1 if self.independent else len(self.columns)
        return SeriesSpec(channels=channels, length=self.length)

    def save(self, folder: Path) -> None:
        """Writes preprocessor.json; numbers come back to the last bit.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        names = ("columns", "mean", "std", "length", "independent")
        values = {name: getattr(self, name) for name in names}
        files.write_json(Path(folder) / self.FILE_NAME, values)

    @staticmethod
    def load(folder: str | Path) -> "SeriesPreprocessor":
        """Reads what `save` wrote.

        Raises:
            DataError: the file is missing or damaged.
        """
        path = Path(folder) / SeriesPreprocessor.FILE_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            columns, mean, std = (tuple(values[name]) for name in ("columns", "mean", "std"))
            return SeriesPreprocessor(
                columns, mean, std, int(values["length"]), bool(values["independent"])
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not the preprocessor of a series model ({error})") from error

    def standardise(self, series: np.ndarray) -> np.ndarray:
        """(time, channel) float32 from values as they were measured; NaN stays."""
        return ((series - np.array(self.mean)) / np.array(self.std)).astype(np.float32)

    def examples(self, part: list[np.ndarray]) -> list[np.ndarray]:
        """Series as the model reads them: standardised, and where it does so channel by channel."""
        series = [self.standardise(one) for one in part]
        return channels_apart(series) if self.independent else series

    def batches(self, items: Iterable[Any], batch_size: int) -> Iterator[tuple[list[int], Batch]]:
        """Batches of items of similar length, so that little is padded.

        Args:
            items: (time, channel) arrays or nested lists, NaN where missing, of any length.
            batch_size: most series in a batch.

        Yields:
            (numbers of the items, batch): `series`, and `mask` where one is padded.

        Raises:
            ConfigError: `batch_size` is below 1, or the model reads single channels of several.
            DataError: an item is empty, not numbers, infinite, or has other channels.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        stream, done = iter(items), 0
        while some := list(islice(stream, batch_size * WINDOW_BATCHES)):
            rows = [self._one(item, number) for number, item in enumerate(some, start=done)]
            order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
            for at in range(0, len(order), batch_size):
                chosen = order[at : at + batch_size]
                yield [done + i for i in chosen], padded([rows[i] for i in chosen])
            done += len(some)

    def _one(self, item: Any, number: int) -> np.ndarray:
        if self.independent and len(self.columns) > 1:
            raise ConfigError(
                f"this model reads single channels (data.independent) of {len(self.columns)}, so "
                "an item has no one vector or label; pre-train with data.independent = false, or "
                "with one channel in data.columns"
            )
        try:
            series = np.asarray(item, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"item {number}: not a (time, channel) array ({error})") from error
        if series.ndim != 2 or series.shape[1] != len(self.columns) or not len(series):
            raise DataError(
                f"item {number}: shape {series.shape}, expected (time, {len(self.columns)}) for "
                f"the channels {', '.join(self.columns)}"
            )
        if np.isinf(series).any():
            raise DataError(f"item {number}: a value is infinite; missing values are NaN")
        return self.standardise(series)

    def labelled(self, labelled: Labelled, max_length: int | None = None) -> LabelledSeries:
        """Labelled series as a data set, each whole: `max_length` counts tokens, not time.

        Raises:
            DataError: see `batches`; names the file.
        """
        try:
            rows = [self._one(item, number) for number, item in enumerate(labelled.items)]
        except DataError as error:
            raise DataError(f"{labelled.source}: {error}") from error
        return LabelledSeries(rows, labelled)

    def raw(self) -> "SeriesPreprocessor":
        """Itself: single items are not normalised."""
        return self

    def limited(self, max_length: int | None) -> "SeriesPreprocessor":
        """Itself: series are never cut."""
        return self


load_preprocessor = SeriesPreprocessor.load


def read_items(
    source: str | Path | Sequence[str | Path], column: str | None, preprocessor: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """(file:line, series) of .ts files, and of tables cut into windows that do not overlap.

    `column` has no meaning here.
    """
    for path in files_of(source, KNOWN):
        if kind_of(path, KNOWN) == ".ts":
            cases = read_ts(path)
            yield from zip(cases.where, cases.series, strict=True)
        else:
            yield from stretches(path, preprocessor.columns, preprocessor.length)


def with_preprocessor(config: Config, folder: Path) -> Config:
    """The configuration for reading other data as the model in `folder` reads it."""
    return replace(config, columns=load_preprocessor(folder).columns, fitted=str(folder))


def _fitted(config: Config, parts: Parts, length: int) -> SeriesPreprocessor:
    """With mean and deviation of the training rows, or of the model in `config.fitted`."""
    if config.fitted:
        preprocessor = load_preprocessor(config.fitted)
        if preprocessor.columns != parts.columns:
            raise DataError(
                f"the data have the channels {', '.join(parts.columns)}, but the model in "
                f"{config.fitted} reads {', '.join(preprocessor.columns)}"
            )
        return preprocessor
    rows = np.concatenate(parts.train)
    mean, std = np.zeros(rows.shape[1]), np.ones(rows.shape[1])
    for channel, column in enumerate(rows.T if config.standardise else ()):
        values = column[~np.isnan(column)]
        if len(values) and values.min() < values.max():
            mean[channel], std[channel] = values.mean(), values.std()
        elif len(values):
            mean[channel] = values[0]  # not the mean, which rounding may move
    return SeriesPreprocessor(
        parts.columns, tuple(mean.tolist()), tuple(std.tolist()), length, config.independent
    )
