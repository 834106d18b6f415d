"""Decoded pictures on disk: two memory maps of uint8 squares, made once and reused.

    CACHE/image-FINGERPRINT/train.bin          (pictures, channels, size, size) uint8
                            valid.bin          the held-out ones
                            train-labels.npy   class numbers, where every picture has a label
                            valid-labels.npy
                            meta.json          counts, and what is needed to notice damage

The fingerprint covers the files (names, sizes, times) and how they are read. Which side a picture
falls on is decided by a hash of its decoded values: equal pictures fall on one side, and adding
files moves none, unless there are so few that a side would stay empty.
"""

import hashlib
import json
import math
import os
from array import array
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from selfsup import console, files
from selfsup.data.bad_items import BadItems
from selfsup.data.image_decoding import Form, decode_all
from selfsup.data.image_files import Found, idx_labels, kind_of, num_pictures, pictures
from selfsup.data.labelled_image import label_text
from selfsup.data.labels import class_order
from selfsup.data.store import source_fingerprint
from selfsup.errors import DataError

VERSION = 1
SIDES = ("train", "valid")
BLOCK_BYTES = 64 << 20  # of a stored side that is held in memory at once
MIN_STD = 1e-3  # a channel that never changes must not be divided by zero


@dataclass(frozen=True)
class StoreConfig:
    """How pictures are read and split; the keys of `data.image.Config` with the same names."""

    form: Form
    image_column: str = "image"
    label_column: str = "label"
    valid_fraction: float = 0.05
    drop_duplicates: bool = False


@dataclass(frozen=True)
class Side:
    """One side of a store.

    Attributes:
        pictures: (pictures, channels, size, size) memory-mapped uint8.
        labels: (pictures,) int64 class numbers; None where there are none.
    """

    pictures: np.ndarray
    labels: np.ndarray | None


@dataclass(frozen=True)
class Store:
    """An open store: what meta.json says, and both sides."""

    meta: dict[str, Any]
    train: Side
    valid: Side


def build_or_open(found: list[Found], config: StoreConfig, cache: Path) -> Store:
    """The store of these pictures: the one in the cache, or a new one.

    Raises:
        DataError: more than 2% of the pictures cannot be used, or there are not two different ones.
        StorageError: the cache cannot be written; nothing half-written stays behind.
    """
    key = {"version": VERSION, "labels": [one.label for one in found], **asdict(config)}
    folder = cache / f"image-{source_fingerprint(_read_from(found), key)}"
    if folder.exists():
        store = _open(folder, config.form)
        if store is not None:
            return store
        console.warn(f"{folder}: the decoded pictures are damaged; they are made again")
    with files.whole_folder(folder) as aside:
        files.write_json(aside / "meta.json", _build(found, config, aside))
    store = _open(folder, config.form)
    assert store is not None
    return store


def _read_from(found: list[Found]) -> list[Any]:
    """Everything that is read: also the labels beside idx files."""
    places = [one.place for one in found]
    idx = [place for place in places if isinstance(place, Path) and kind_of(place) == "idx"]
    return [*places, *filter(Path.exists, map(idx_labels, idx))]


def _open(folder: Path, form: Form) -> Store | None:
    """The store in `folder`; None when something is damaged."""
    shape = (form.channels, form.size, form.size)
    sides = []
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for side in SIDES:
            count, path = meta[f"{side}_pictures"], folder / f"{side}.bin"
            if path.stat().st_size != count * math.prod(shape):
                return None
            labels = np.load(folder / f"{side}-labels.npy") if meta["label_names"] else None
            if labels is not None and labels.shape != (count,):
                return None
            sides.append(Side(np.memmap(path, np.uint8, "r", 0, (count, *shape)), labels))
        if not {"mean", "std", "fingerprint"} <= meta.keys():
            return None
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return Store(meta, *sides)


def _build(found: list[Found], config: StoreConfig, folder: Path) -> dict[str, Any]:
    """Writes both sides into `folder` and returns the meta data."""
    source = ", ".join(str(one.place) for one in found[:3]) + (", ..." if len(found) > 3 else "")
    bad, tally = BadItems(source), _Tally()
    stream = pictures(found, config.image_column, config.label_column)
    with (
        open(folder / "train.bin", "wb", buffering=1 << 20) as train,
        open(folder / "valid.bin", "wb", buffering=1 << 20) as valid,
        console.progress("decoding pictures", num_pictures(found)) as progress,
    ):
        for picture, result in decode_all(stream, config.form):
            progress.advance(1, f"{tally.pictures:,} pictures")
            if isinstance(result, DataError):
                bad.add(picture.where, str(result))
                continue
            content = result.pixels.tobytes()
            side = tally.add(content, picture.label, result.animated, config)
            if side is not None:
                (train, valid)[side].write(content)
    bad.check(tally.pictures + bad.count)
    if tally.num_distinct() < 2:
        raise DataError(
            f"{source}: {tally.pictures} pictures, but training and validation need at least two "
            "different ones; give more pictures"
        )
    held_out = np.array(tally.sides, dtype=bool)
    if held_out.all() or not held_out.any():
        held_out = _split_few(np.array(tally.digests, dtype=np.uint64), config, folder)
    form, num_valid = config.form, int(held_out.sum())
    shape = (len(held_out) - num_valid, form.channels, form.size, form.size)
    mean, std = moments(np.memmap(folder / "train.bin", np.uint8, "r", 0, shape))
    return {
        "version": VERSION,
        **tally.counts(config),
        "train_pictures": len(held_out) - num_valid,
        "valid_pictures": num_valid,
        **bad.facts(),
        "label_names": tally.save_labels(folder, held_out),
        "mean": mean,
        "std": std,
    }


@dataclass
class _Tally:
    """Counts pictures while they are written, and says where they go."""

    pictures: int = 0
    animated: int = 0
    dropped: int = 0
    digests: array = field(default_factory=lambda: array("Q"))
    sides: array = field(default_factory=lambda: array("b"))
    labels: array = field(default_factory=lambda: array("q"))
    numbers: dict[str, int] = field(default_factory=dict)  # of classes, in the order of appearance
    seen: set[int] = field(default_factory=set)  # only filled when duplicates are dropped

    def add(self, content: bytes, label: Any, animated: bool, config: StoreConfig) -> int | None:
        """The number of its side in `SIDES`; None for a duplicate to drop."""
        self.pictures += 1
        self.animated += animated
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
        if config.drop_duplicates:
            if digest in self.seen:
                self.dropped += 1
                return None
            self.seen.add(digest)
        side = int(digest / 2**64 < config.valid_fraction)
        self.digests.append(digest)
        self.sides.append(side)
        # a real number is a target of regression, not a class
        name = "" if isinstance(label, float) else label_text(label)
        self.labels.append(self.numbers.setdefault(name, len(self.numbers)) if name else -1)
        return side

    def num_distinct(self) -> int:
        """Different pictures among those that are kept."""
        return len(np.unique(np.array(self.digests, dtype=np.uint64)))

    def counts(self, config: StoreConfig) -> dict[str, Any]:
        """For meta.json."""
        content = hashlib.sha256(self.digests.tobytes() + self.labels.tobytes())
        return {
            "pictures": self.pictures,
            "duplicates": self.dropped + len(self.digests) - self.num_distinct(),
            "duplicates_dropped": config.drop_duplicates,
            "animated": self.animated,
            "fingerprint": content.hexdigest(),
        }

    def save_labels(self, folder: Path, held_out: np.ndarray) -> list[str]:
        """Writes the class numbers of both sides; the classes, none if a picture has none."""
        labels = np.array(self.labels, dtype=np.int64)
        missing = int((labels < 0).sum())
        if missing:
            if self.numbers:
                console.warn(f"{missing:,} pictures have no label, so no label is kept")
            return []
        names = sorted(self.numbers, key=class_order)
        place = np.empty(len(names), dtype=np.int64)
        place[[self.numbers[name] for name in names]] = np.arange(len(names))
        for side, chosen in zip(SIDES, (~held_out, held_out), strict=True):
            np.save(folder / f"{side}-labels.npy", place[labels[chosen]])
        return names


def _split_few(digests: np.ndarray, config: StoreConfig, folder: Path) -> np.ndarray:
    """Splits again where one side stayed empty: holds out the smallest digests, at least one.

    Returns:
        (pictures,) bool, True where held out.
    """
    distinct = np.unique(digests)
    count = min(max(1, round(config.valid_fraction * len(distinct))), len(distinct) - 1)
    held_out = np.isin(digests, distinct[:count])
    full = max((folder / f"{side}.bin" for side in SIDES), key=lambda path: path.stat().st_size)
    os.replace(full, folder / "all.bin")
    shape = (len(digests), config.form.channels * config.form.size**2)
    rows = np.memmap(folder / "all.bin", np.uint8, "r", 0, shape)
    for side, chosen in zip(SIDES, (~held_out, held_out), strict=True):
        with open(folder / f"{side}.bin", "wb") as file:
            for number in np.flatnonzero(chosen):
                file.write(rows[number].tobytes())
    (folder / "all.bin").unlink()
    return held_out


def moments(pictures: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, on the scale 0 to 1.

    They are those of the channel's histogram: exact, with flat memory.

    Args:
        pictures: (examples, channels, size, size) uint8.
    """
    counts = np.zeros((pictures.shape[1], 256), dtype=np.int64)
    step = max(1, BLOCK_BYTES // math.prod(pictures.shape[1:]))
    for start in range(0, len(pictures), step):
        for channel, count in enumerate(counts):
            values = pictures[start : start + step, channel].reshape(-1)
            count += np.bincount(values, minlength=256)
    levels = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)  # (channels, 256)
    mean = share @ levels
    variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    return mean.tolist(), np.sqrt(variance).clip(min=MIN_STD).tolist()
