"""Pictures: from files to squares of uint8 that a model can learn from.

Every picture is decoded once, resized and cropped to one size, and kept on disk. `image_files.py`
finds the pictures, `image_decoding.py` decodes them, `image_store.py` keeps them, and
`labelled_image.py` reads labelled ones.
"""

import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast, final

import numpy as np
import tomli_w
import torch

from selfsup import files
from selfsup.batch import Batch, ImageSpec
from selfsup.data.dataset import Dataset, Prepared
from selfsup.data.image_decoding import Form, Item, decode_items
from selfsup.data.image_files import find, pictures
from selfsup.data.image_store import StoreConfig, build_or_open
from selfsup.data.labelled_image import LabelledImages, read_labels
from selfsup.data.labels import Labelled
from selfsup.data.sources import Source
from selfsup.data.store import default_cache
from selfsup.errors import ConfigError, DataError

__all__ = [
    "Config",
    "ImagePreprocessor",
    "Images",
    "LabelledImages",
    "load_preprocessor",
    "prepare",
    "read_items",
    "read_labels",
    "with_preprocessor",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How pictures become squares.

    Attributes:
        size: pixels; the short side is resized to it with antialiasing, then the centre is cropped.
        channels: 3 for colour, 1 for grey.
        image_column: where the encoded picture is, in formats with columns.
        label_column: where its class is, if there is one.
        valid_fraction: share of the pictures that is held out.
        drop_duplicates: leaves out pictures whose decoded values were read before.
        max_pixels: a larger picture is not decoded, and counts as one that cannot be used.
    """

    size: int = 32
    channels: Literal[1, 3] = 3
    image_column: str = "image"
    label_column: str = "label"
    valid_fraction: float = 0.05
    drop_duplicates: bool = False
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        for key in ("size", "max_pixels"):
            if getattr(self, key) < 1:
                raise ConfigError(f"data.{key} must be at least 1, got {getattr(self, key)}")
        if self.channels not in (1, 3):
            raise ConfigError(f"data.channels must be 3 (colour) or 1, got {self.channels}")
        if not 0 < self.valid_fraction <= 0.5:
            raise ConfigError(
                f"data.valid_fraction must be above 0 and at most 0.5, got {self.valid_fraction}"
            )

    @property
    def form(self) -> Form:
        """What every picture becomes."""
        return Form(self.size, self.channels, self.max_pixels)


def prepare(config: Config, source: Source, cache: Path | None = None) -> Prepared:
    """Finds and decodes pictures; cached for the next time.

    Args:
        config: see `Config`.
        source: files, folders, globs, a dataset name, or a list of those; see `image_files.py`.
        cache: folder of decoded pictures; $SELFSUP_CACHE or ~/.cache/selfsup when None.

    Raises:
        DataError: nothing is found, more than 2% of the pictures cannot be used, or there are not
            two different ones.
        StorageError: the cache cannot be written; nothing half-written stays behind.
    """
    found = find(source)
    store_config = StoreConfig(
        form=config.form,
        image_column=config.image_column,
        label_column=config.label_column,
        valid_fraction=config.valid_fraction,
        drop_duplicates=config.drop_duplicates,
    )
    store = build_or_open(found, store_config, default_cache() if cache is None else Path(cache))
    facts = dict(store.meta)
    names, mean, std = (tuple(facts.pop(key)) for key in ("label_names", "mean", "std"))
    train, valid = (
        Images(side.pictures, side.labels, names) for side in (store.train, store.valid)
    )
    spec = ImageSpec(size=config.size, channels=config.channels, mean=mean, std=std)
    facts |= {"files": len(found), "classes": len(names), "tokenizer": ""}
    return Prepared(train, valid, spec, ImagePreprocessor(spec, config.max_pixels), facts)


@final
class Images(Dataset):
    """Decoded pictures.

    >>> images = Images(np.zeros((10, 3, 8, 8), dtype=np.uint8))
    >>> images.batch(np.array([3, 1]))["image"].shape
    torch.Size([2, 3, 8, 8])

    Args:
        pictures: (examples, channels, size, size) uint8, in memory or mapped from a file.
        labels: (examples,) int64 class numbers; None where there are none.
        label_names: the classes in the order of their numbers.
    """

    fields = ("image", "index")
    lengths = None

    def __init__(
        self,
        pictures: np.ndarray,
        labels: np.ndarray | None = None,
        label_names: tuple[str, ...] = (),
    ):
        self.pictures, self.labels, self.label_names = pictures, labels, label_names

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, numbers: np.ndarray) -> Batch:
        """Pictures as `image`, (batch, channel, size, size) uint8, and `index`."""
        numbers = np.asarray(numbers, dtype=np.int64)
        chosen = np.asarray(self.pictures[numbers])
        return {"image": torch.from_numpy(chosen), "index": torch.from_numpy(numbers)}


@final
class ImagePreprocessor:
    """A user's pictures as batches for a trained model.

    >>> spec = ImageSpec(size=8, channels=1, mean=(0.5,), std=(0.2,))
    >>> photo = np.zeros((12, 10, 3), dtype=np.uint8)
    >>> [(n, batch["image"].shape) for n, batch in ImagePreprocessor(spec).batches([photo], 16)]
    [([0], torch.Size([1, 1, 8, 8]))]

    Args:
        spec: of the model.
        max_pixels: a larger picture is an error.
    """

    FILE_NAME = "preprocessor.toml"

    def __init__(self, spec: ImageSpec, max_pixels: int = Config.max_pixels):
        self.spec, self.max_pixels = spec, max_pixels
        self.form = Form(spec.size, spec.channels, max_pixels)

    def save(self, folder: Path) -> None:
        """Writes preprocessor.toml.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        values = {**asdict(self.spec), "max_pixels": self.max_pixels}
        files.write_text(Path(folder) / self.FILE_NAME, tomli_w.dumps(values))

    @staticmethod
    def load(folder: str | Path) -> "ImagePreprocessor":
        """Reads what `save` wrote.

        Raises:
            DataError: the file is missing or damaged.
        """
        path = Path(folder) / ImagePreprocessor.FILE_NAME
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
            spec = ImageSpec(
                size=int(values["size"]),
                channels=int(values["channels"]),
                mean=tuple(map(float, values["mean"])),
                std=tuple(map(float, values["std"])),
            )
            return ImagePreprocessor(spec, int(values["max_pixels"]))
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path}: not the preprocessor of a picture model ({error})") from error

    def batches(self, items: Iterable[Item], batch_size: int) -> Iterator[tuple[list[int], Batch]]:
        """Batches of pictures, in the order of the items.

        Args:
            items: paths, encoded bytes, Pillow images, or (height, width[, channel]) uint8 arrays.
            batch_size: most pictures in a batch.

        Yields:
            (numbers of the items, batch): `image`, (batch, channel, size, size) uint8.

        Raises:
            ConfigError: `batch_size` is below 1.
            DataError: an item cannot be used; its number and its path are named.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        stream, first = decode_items(items, self.form), 0
        while rows := list(islice(stream, batch_size)):
            yield list(range(first, first + len(rows))), {"image": torch.from_numpy(np.stack(rows))}
            first += len(rows)

    def labelled(self, labelled: Labelled) -> LabelledImages:
        """Labelled pictures as a data set."""
        return LabelledImages(labelled, self.form)

    def raw(self) -> "ImagePreprocessor":
        """Itself: single items are not normalised."""
        return self

    def limited(self, max_length: int | None) -> "ImagePreprocessor":
        """Itself: pictures have no length."""
        return self


load_preprocessor = ImagePreprocessor.load


def read_items(source: Source, column: str | None, preprocessor: Any) -> Iterator[tuple[str, Any]]:
    """(name, encoded picture) of every picture of a source; `column` is for .parquet."""
    for picture in pictures(find(source), column or "image", "label"):
        yield picture.where, picture.content


def with_preprocessor(config: Config, folder: Path) -> Config:
    """The configuration for reading other data as the model in `folder` reads it."""
    spec = load_preprocessor(folder).spec
    return replace(config, size=spec.size, channels=cast(Literal[1, 3], spec.channels))
