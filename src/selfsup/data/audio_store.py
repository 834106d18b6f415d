"""The stored corpus of sounds: written once, memory-mapped ever after; see `audio.py`."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch

from selfsup import console
from selfsup.batch import Batch
from selfsup.data import sources
from selfsup.data.audio_features import Config, Decoded, Features, collate, decode
from selfsup.data.audio_files import WORKERS, Item, found_items, in_order
from selfsup.data.bad_items import BadItems
from selfsup.data.dataset import Dataset
from selfsup.data.labels import class_order
from selfsup.data.sources import HubDataset, Source
from selfsup.errors import DataError

VERSION = 1
SIDES = ("train", "valid")


@final
class Sounds(Dataset):
    """Examples of a stored corpus.

    Batches hold `frames` (batch, time, mel) or `waveform` (batch, samples), with `mask` where one
    is padded, `index`, and if asked for `mfcc` (batch, time, 39) at the frames' hop.

    Args:
        arrays: by field, all examples one after another; the field that is masked first.
        starts: by field, (examples + 1,) where each example begins and the last one ends.
        labels: (examples,) class numbers, where the paths tell them.
    """

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        starts: dict[str, np.ndarray],
        labels: np.ndarray | None = None,
    ):
        self.arrays, self.starts, self.labels = arrays, starts, labels
        main, *others = arrays
        self.fields = (main, "mask", "index", *others)
        self.lengths: np.ndarray = np.diff(starts[main])

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, numbers: np.ndarray) -> Batch:
        """The examples of those numbers as CPU tensors."""
        rows = [
            {
                name: a[self.starts[name][i] : self.starts[name][i + 1]]
                for name, a in self.arrays.items()
            }
            for i in numbers
        ]
        return {**collate(rows), "index": torch.from_numpy(np.asarray(numbers, dtype=np.int64))}


def open_store(folder: Path, config: Config) -> tuple[Sounds, Sounds, dict[str, Any]] | None:
    """Both sides and the facts; None when something is damaged."""
    try:
        facts = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        train, valid = (_open_side(folder, config, side, facts) for side in SIDES)
    except (OSError, EOFError, ValueError, KeyError):
        return None
    return train, valid, facts


def _open_side(folder: Path, config: Config, side: str, facts: dict[str, Any]) -> Sounds:
    features = Features(config)
    lengths = np.diff(np.load(folder / f"{side}.offsets.npy"))
    arrays: dict[str, np.ndarray] = {}
    starts: dict[str, np.ndarray] = {}
    for name, width in features.widths.items():
        starts[name] = np.concatenate([[0], np.cumsum(features.lengths(lengths, name))])
        dtype = np.int16 if name == "waveform" else np.float32
        shape = (int(starts[name][-1]), width) if width else (int(starts[name][-1]),)
        path = folder / f"{side}.{name}.bin"
        if path.stat().st_size != math.prod(shape) * np.dtype(dtype).itemsize:
            raise ValueError(f"{path} has another size than its offsets say")
        arrays[name] = np.memmap(path, dtype, "r", shape=shape)
    labels = np.load(folder / f"{side}.labels.npy") if facts["label_names"] else None
    counts = {len(lengths), facts[f"{side}_examples"], len(lengths if labels is None else labels)}
    if len(counts) > 1:
        raise ValueError(f"{folder}: {side} has different numbers of examples")
    return Sounds(arrays, starts, labels)


@dataclass
class _Tally:
    """What is counted while the files go by."""

    bad: BadItems
    files: int = 0
    samples: int = 0
    digests: list[int] = field(default_factory=list)
    rates: Counter[int] = field(default_factory=Counter)


class _Example(NamedTuple):
    """A sound for one side; the label is "" where there is none."""

    side: str
    sound: np.ndarray
    label: str = ""


def source_name(source: Source) -> str:
    """The source as messages call it."""
    given = [source] if isinstance(source, sources.Item) else list(source)
    return str(given[0]) + ", ..." * (len(given) > 1)


def build_store(
    config: Config, found: dict[Path | HubDataset, str], folder: Path, name: str
) -> dict[str, Any]:
    """Writes both sides into `folder` and returns the facts."""
    if config.join_seconds and config.join_order == "random":
        found = _shuffled(found)
    tally, writer = _write(config, found, folder, name)
    if not all(writer.lengths.values()):  # few files: none, or all, fell on one side
        digests = sorted(set(tally.digests))
        count = min(max(1, round(config.valid_fraction * len(digests))), len(digests) - 1)
        if count < 1:
            raise DataError(
                f"{name}: {tally.files} files with {len(digests)} different sound "
                "cannot be split into a training and a validation part; give at least two "
                "different files, for instance by cutting a long one"
            )
        tally, writer = _write(config, found, folder, name, set(digests[:count]))
    low = sum(count for rate, count in tally.rates.items() if rate < config.rate)
    if low:
        console.warn(
            f"{name}: {low:,} of {tally.files:,} files have a lower rate than "
            f"data.rate = {config.rate}; above half their own rate they hold nothing"
        )
    return {
        "files": tally.files,
        "seconds": round(tally.samples / config.rate, 3),
        "duplicates": len(tally.digests) - len(set(tally.digests)),
        **tally.bad.facts(),
        "sample_rates": {str(rate): count for rate, count in sorted(tally.rates.items())},
        **{f"{side}_examples": len(writer.lengths[side]) for side in SIDES},
        "label_names": writer.save(),
        "fingerprint": hashlib.sha256(np.array(tally.digests, "<u8").tobytes()).hexdigest(),
        "tokenizer": "",
    }


def _shuffled(found: dict[Path | HubDataset, str]) -> dict[Path | HubDataset, str]:
    """The same files, those of a folder in an order that says nothing of their names."""

    def place(file: Path | HubDataset) -> tuple[str, bytes]:
        if not isinstance(file, Path):
            return "", b""
        return str(file.parent), hashlib.sha256(found[file].encode()).digest()

    return {file: found[file] for file in sorted(found, key=place)}


def _write(
    config: Config,
    found: dict[Path | HubDataset, str],
    folder: Path,
    name: str,
    chosen: set[int] | None = None,
) -> tuple[_Tally, "_Writer"]:
    """One pass over the corpus; `chosen` holds digests of held-out files, None: by threshold."""
    tally = _Tally(BadItems(name))
    total = len(found) if all(isinstance(item, Path) for item in found) else None
    features = Features(config)

    def read(item: Item) -> tuple[Item, Decoded | str]:
        try:
            return item, decode(item.content, config)
        except DataError as error:
            return item, str(error)

    def compute(example: _Example) -> tuple[_Example, dict[str, np.ndarray]]:
        return example, features(example.sound)

    with (
        console.progress("reading sounds", total) as progress,
        ThreadPoolExecutor(WORKERS) as pool,
        _Writer(folder, features) as writer,
    ):
        sounds = in_order(pool, read, found_items(found, config.pattern))
        examples = _examples(config, _counted(config, sounds, tally, chosen))
        for example, fields in in_order(pool, compute, examples):
            writer.add(example, fields)
            hours = tally.samples / config.rate / 3600
            progress.move(tally.files, f"{tally.files} files, {hours:.2f} h")
    tally.bad.check(tally.files)
    return tally, writer


def _counted(
    config: Config,
    sounds: Iterable[tuple[Item, Decoded | str]],
    tally: _Tally,
    chosen: set[int] | None,
) -> Iterator[tuple[Item, _Example]]:
    """The good ones of the sounds, each with its side."""
    for item, decoded in sounds:
        tally.files += 1
        if isinstance(decoded, str):
            tally.bad.add(item.name, decoded)
            continue
        digest = int.from_bytes(decoded.digest, "big")
        held_out = digest < config.valid_fraction * 2**64 if chosen is None else digest in chosen
        tally.digests.append(digest)
        tally.samples += len(decoded.sound)
        tally.rates[decoded.rate] += 1
        yield item, _Example("valid" if held_out else "train", decoded.sound, item.label)


def _examples(config: Config, sounds: Iterable[tuple[Item, _Example]]) -> Iterator[_Example]:
    """Cuts what is too long and joins what is too short; nothing is lost, no two sides are mixed.

    Joined are sounds of one folder, group and side, in their order; a joined example has no label.
    """
    longest, enough = round(config.max_seconds * config.rate), config.join_seconds * config.rate
    held: dict[tuple[str, str], list[np.ndarray]] = {}  # by (side, group)
    folder = ""
    for item, whole in sounds:
        if item.folder != folder:
            yield from _released(held)
            folder = item.folder
        for piece in np.array_split(whole.sound, math.ceil(len(whole.sound) / longest)):
            if not enough:
                yield whole._replace(sound=piece)
                continue
            key = whole.side, item.group
            waiting = sum(map(len, held.get(key, [])))
            if waiting + len(piece) > longest:
                yield _Example(whole.side, np.concatenate(held.pop(key)))
                waiting = 0
            held.setdefault(key, []).append(piece)
            if waiting + len(piece) >= enough:
                yield _Example(whole.side, np.concatenate(held.pop(key)))
    yield from _released(held)


def _released(held: dict[tuple[str, str], list[np.ndarray]]) -> Iterator[_Example]:
    for (side, _), parts in held.items():
        yield _Example(side, np.concatenate(parts))
    held.clear()


class _Writer:
    """Appends examples to the files of their side."""

    def __init__(self, folder: Path, features: Features):
        self.folder = folder
        self.stack = stack = ExitStack()
        self.lengths: dict[str, list[int]] = {side: [] for side in SIDES}
        self.labels: dict[str, list[str]] = {side: [] for side in SIDES}
        self.files = {
            (side, name): stack.enter_context(open(folder / f"{side}.{name}.bin", "wb"))  # noqa: SIM115
            for side in SIDES
            for name in features.widths
        }

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def add(self, example: _Example, fields: dict[str, np.ndarray]) -> None:
        for name, values in fields.items():
            self.files[example.side, name].write(values.tobytes())
        self.lengths[example.side].append(len(next(iter(fields.values()))))
        self.labels[example.side].append(example.label)

    def save(self) -> list[str]:
        """Writes the offsets, and the labels where every example has one; returns their names."""
        names = sorted({label for side in SIDES for label in self.labels[side]}, key=class_order)
        names = [] if "" in names else names
        numbers = {name: number for number, name in enumerate(names)}
        for side in SIDES:
            offsets = np.cumsum([0, *self.lengths[side]], dtype=np.int64)
            np.save(self.folder / f"{side}.offsets.npy", offsets)
            if names:
                labels = np.array([numbers[label] for label in self.labels[side]])
                np.save(self.folder / f"{side}.labels.npy", labels)
        return names
