"""Sound: from files to log-mel frames or waveforms that a model can learn from.

Files are decoded, mixed to one channel, resampled and turned into features once:

    CACHE/audio-FINGERPRINT/train.frames.bin    float32, all examples one after another; or
                            train.waveform.bin  16-bit samples: waveforms are kept as on a CD
                            train.mfcc.bin      float32, if asked for
                            train.offsets.npy   where each example begins
                            train.labels.npy    class numbers, if `pattern` names a label
                            valid. ...          the same for the held-out files
                            meta.json           counts, and what is needed to notice damage

A hash of a file's samples decides on which side it falls: equal sounds fall on one side. Batches
read the stored arrays where they lie, so memory holds some files at a time, never the corpus.
"""

import itertools
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import tomli_w
from torch import Tensor

from selfsup import console, files
from selfsup.batch import AudioSpec, Batch
from selfsup.data.audio_features import Config, Features, collate, decode, resampled
from selfsup.data.audio_files import WORKERS, find, in_order
from selfsup.data.audio_store import VERSION, build_store, open_store, source_name
from selfsup.data.dataset import Prepared
from selfsup.data.labelled_audio import LabelledSounds
from selfsup.data.labelled_audio import read_labels as read_labels
from selfsup.data.labels import Labelled
from selfsup.data.sources import Source
from selfsup.data.store import default_cache, source_fingerprint
from selfsup.errors import ConfigError, DataError

WINDOW_BATCHES = 8  # so many batches of items are sorted by length together
MODEL_KEYS = ("rate", "features", "mel", "frame_ms", "hop_ms", "cmvn", "mfcc")

Sound = str | Path | np.ndarray | Tensor | tuple[np.ndarray | Tensor, int]


def prepare(config: Config, source: Source, cache: Path | None = None) -> Prepared:
    """Decodes a corpus of sounds, computes its features and stores them; cached for the next time.

    Args:
        config: see `Config`.
        source: files, folders, globs, a dataset name, or a list of those.
        cache: folder of stored corpora; $SELFSUP_CACHE or ~/.cache/selfsup when None.

    Raises:
        DataError: nothing is found, more than 2% of the files cannot be used, a path does not match
            `pattern`, or the files cannot be split into two sides.
        StorageError: the cache cannot be written; nothing half-written stays behind.
    """
    cache = default_cache() if cache is None else Path(cache)
    found = find(source)
    key = {"version": VERSION, "paths": list(found.values()), **asdict(config)}
    folder = cache / f"audio-{source_fingerprint(found, key)}"
    opened = open_store(folder, config) if folder.exists() else None
    if opened is None:
        if folder.exists():
            console.warn(f"{folder}: the stored sounds are damaged; they are made again")
        with files.whole_folder(folder) as aside:
            files.write_json(
                aside / "meta.json", build_store(config, found, aside, source_name(source))
            )
        opened = open_store(folder, config)
        assert opened is not None
    train, valid, facts = opened
    return Prepared(train, valid, config.spec, AudioPreprocessor(config), facts)


@final
class AudioPreprocessor:
    """A user's sounds as batches for a trained model.

    Args:
        config: how the model's own data were read.
        max_samples: longest sound at the config's rate; what is longer loses its end. None:
            `config.max_seconds`.
    """

    FILE_NAME = "preprocessor.toml"

    def __init__(self, config: Config, max_samples: int | None = None):
        self.config, self.features = config, Features(config)
        self.max_samples = max_samples or round(config.max_seconds * config.rate)

    @property
    def spec(self) -> AudioSpec:
        """What a model must know of its input."""
        return self.config.spec

    @property
    def max_length(self) -> int:
        """The longest sound in frames."""
        return self.config.framing.num_frames(self.max_samples)

    def save(self, folder: Path) -> None:
        """Writes preprocessor.toml.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        values = {"max_samples": self.max_samples, "data": asdict(self.config)}
        files.write_text(Path(folder) / self.FILE_NAME, tomli_w.dumps(values))

    @staticmethod
    def load(folder: str | Path) -> "AudioPreprocessor":
        """Reads what `save` wrote.

        Raises:
            DataError: the file is missing or damaged.
        """
        path = Path(folder) / AudioPreprocessor.FILE_NAME
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
            return AudioPreprocessor(Config(**values["data"]), int(values["max_samples"]))
        except (OSError, KeyError, TypeError, ValueError, ConfigError) as error:
            raise DataError(f"{path}: not the preprocessor of a sound model ({error})") from error

    def raw(self) -> "AudioPreprocessor":
        """The same without `cmvn`, which takes out each sound's mean and variance."""
        return AudioPreprocessor(replace(self.config, cmvn="none"), self.max_samples)

    def limited(self, max_length: int | None) -> "AudioPreprocessor":
        """The same for sounds of at most `max_length` frames, also where batches hold waveforms.

        None: itself.

        Raises:
            ConfigError: `max_length` is below 1.
        """
        if max_length is None:
            return self
        if max_length < 1:
            raise ConfigError(f"max_length must be at least 1 frame, got {max_length}")
        return AudioPreprocessor(self.config, self.config.framing.num_samples(max_length))

    def labelled(self, labelled: Labelled) -> "LabelledSounds":
        """Labelled sounds as a data set."""
        return LabelledSounds(labelled, self)

    def batches(self, items: Iterable[Sound], batch_size: int) -> Iterator[tuple[list[int], Batch]]:
        """Batches of items of similar length, so that little is padded.

        Args:
            items: paths, (samples,) floats in [-1, 1] at the model's rate, or (samples, rate).
            batch_size: most rows in a batch.

        Yields:
            (numbers of the items, batch) with the fields of `Sounds`, without `index`.

        Raises:
            ConfigError: `batch_size` is below 1.
            DataError: an item cannot be used; its number and path are named.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        stream, done = iter(items), 0
        while window := list(itertools.islice(stream, batch_size * WINDOW_BATCHES)):
            rows, truncated = self.rows(window, "item", done)
            if truncated:
                console.warn(
                    f"{truncated} of {len(window)} sounds were cut: the model reads at most "
                    f"{self.max_samples / self.config.rate:g} s"
                )
            order = sorted(range(len(rows)), key=lambda i: len(next(iter(rows[i].values()))))
            for at in range(0, len(order), batch_size):
                chosen = order[at : at + batch_size]
                yield [done + i for i in chosen], collate([rows[i] for i in chosen])
            done += len(window)

    def rows(
        self, items: list[Any], what: str, first: int = 0
    ) -> tuple[list[dict[str, np.ndarray]], int]:
        """The fields of each item, read in threads, and how many items were cut.

        Args:
            items: as for `batches`.
            what: what an item is called in messages.
            first: the number of the first one.

        Raises:
            DataError: an item cannot be used.
        """

        def row(numbered: tuple[int, Any]) -> tuple[dict[str, np.ndarray], bool]:
            place, item = numbered
            try:
                sound = self._sound(item)
            except DataError as error:
                path = f" ({item})" if isinstance(item, str | Path) else ""
                raise DataError(f"{what} {place}{path}: {error}") from error
            return self.features(sound[: self.max_samples]), len(sound) > self.max_samples

        with ThreadPoolExecutor(WORKERS) as pool:
            found = list(in_order(pool, row, enumerate(items, first)))
        return [fields for fields, _ in found], sum(cut for _, cut in found)

    def _sound(self, item: Any) -> np.ndarray:
        if isinstance(item, str | Path):
            return decode(Path(item).expanduser(), self.config).sound
        samples, rate = item if isinstance(item, tuple) else (item, self.config.rate)
        array = (
            np.asarray(samples) if isinstance(samples, np.ndarray | Tensor) else np.empty(0, "O")
        )
        if array.ndim != 1 or array.dtype.kind != "f":
            what = (
                f"{array.dtype}, {array.ndim}-D" if array.dtype != "O" else type(samples).__name__
            )
            raise DataError(
                f"is {what}; expected a path, 1-D floats in [-1, 1], or (those, their rate)"
            )
        blocks = [array.astype(np.float32)] if len(array) else []
        return resampled(blocks, int(rate), self.config)


load_preprocessor = AudioPreprocessor.load


def read_items(source: Source, column: str | None, preprocessor: Any) -> Iterator[tuple[str, Path]]:
    """(name, path) of every sound of a source; `column` has no meaning here."""
    for place in find(source):
        if isinstance(place, Path):
            yield str(place), place


def with_preprocessor(config: Config, folder: Path) -> Config:
    """The configuration for reading other data as the model in `folder` reads it."""
    of_model = load_preprocessor(folder).config
    return replace(config, **{key: getattr(of_model, key) for key in MODEL_KEYS})
