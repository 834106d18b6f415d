"""Vectors of many items, made part by part and kept on the disk.

    OUT.parts/00000/vectors.npy    (items, dim) of the items that can be used
                    items.jsonl    {"id", "item", "place"} of each
                    .manifest.json the sha256 of its items, model and form; what cannot be used;
                                   size and SHA-256 of the files above

A part is what one worker makes at a time. One that is there is not made again if its items, the
model and the form are what they were: a cut embedding goes on where it was cut. Batches end with
their part, so it is the same to the vectors who made it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from selfsup import console
from selfsup.data.bad_items import BadItems
from selfsup.data.sharded import made, manifest, whole_shard
from selfsup.errors import CheckpointError, DataError
from selfsup.model import Model
from selfsup.model_folder import load_model
from selfsup.readable import name_of, refusals
from selfsup.training.device import pick_device, pick_dtype
from selfsup.workers import NUMBER, Shard, Workers

PART_ITEMS = 4096
PART_BYTES = 2**26  # of encoded pictures or long texts, which are in memory at once


@dataclass(frozen=True, kw_only=True)
class VectorForm:
    """What vectors of items are.

    Attributes:
        layer: 0 is the embedding, -1 the last layer; None: the encoder's own pooled vector.
        dtype: how numbers are stored.
        unit: divide every vector by its length; a vector of zeros stays one.
        batch_size: items per forward pass.
    """

    layer: int | None = None
    dtype: Literal["float32", "float16"] = "float32"
    unit: bool = False
    batch_size: int = 64


@dataclass(frozen=True)
class Parts:
    """A finished embedding, part by part on the disk.

    Attributes:
        folders: of the parts, in order.
        rows: vectors in all of them.
        dim: numbers in a vector.
        dtype: of the numbers.
    """

    folders: tuple[Path, ...]
    rows: int
    dim: int
    dtype: np.dtype

    def vectors(self) -> Iterator[np.ndarray]:
        """(items, dim) of each part."""
        for folder in self.folders:
            yield np.load(folder / "vectors.npy", allow_pickle=False)

    def items(self) -> Iterator[list[dict[str, Any]]]:
        """What the rows of each part are: `id`, `item`, `place`."""
        for folder in self.folders:
            lines = (folder / "items.jsonl").read_bytes().splitlines()
            yield [json.loads(line) for line in lines]


class Origin(NamedTuple):
    """Where another process finds the model: the run, absolutely, and its weights' sha256."""

    run: str
    weights: str


def make_parts(
    run: str | Path,
    model: Model,
    items: Iterable[tuple[str, Any]],
    source: str,
    folder: Path,
    form: VectorForm,
    workers: Workers,
) -> Parts:
    """Embeds all items, part by part, into `folder`; parts that are there already are kept.

    Args:
        run: where other processes load the model from.
        model: whose vectors they are.
        items: (place, item) as a kind of data's `read_items` gives them; read once, in order.
        source: what messages call them.
        folder: of the parts.
        form: what the vectors are.
        workers: who works. Items are read here, and each part's are sent to its worker.

    Raises:
        DataError: there are no items, or more than 2% of them cannot be used.
        ConfigError: the encoder has no such layer.
        SelfsupError: as `Workers.run`.
    """
    weights = model.values["sha256"]["model.safetensors"]
    given = model if workers == Workers() else Origin(str(Path(run).resolve()), weights)
    device = pick_device("auto")
    where = "ray" if workers.engine == "ray" else f"{device} {pick_dtype('auto', device)}"
    key = json.dumps([weights, asdict(form), where], sort_keys=True)
    folders: list[Path] = []
    total = kept = 0

    def missing() -> Iterator[Shard]:
        nonlocal total, kept
        for number, window in enumerate(_windows(items)):
            part, first = folder / f"{number:05d}", total
            digest = _digest(f"{key} {first}", window)
            folders.append(part)
            total += len(window)
            said = manifest(part, check=True)
            if said is not None and said["sha256"] == digest:
                kept += len(window)
                continue
            name = f"items {first + 1:,} to {total:,} ({window[0][0]} to {window[-1][0]})"
            yield name, (part, window, first, form, digest, given)

    workers.run(make_part, missing(), "embedding", gpu=True)
    if not total:
        raise DataError(f"{source}: no item to embed is there")
    if kept:
        console.say(f"{folder}: {kept:,} of {total:,} items were embedded before the cut")
    facts = [made(part) for part in folders]
    bad = BadItems(source)
    for one in facts:
        bad.more(len(one["bad"]), one["bad"])
    bad.check(total)
    vectors = np.load(folders[0] / "vectors.npy", mmap_mode="r", allow_pickle=False)
    rows = sum(one["rows"] for one in facts)
    return Parts(tuple(folders), rows, vectors.shape[1], vectors.dtype)


def _windows(items: Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    window: list[tuple[str, Any]] = []
    size = 0
    for place, item in items:
        window.append((place, item))
        size += len(item) if isinstance(item, str | bytes) else getattr(item, "nbytes", 0)
        if len(window) == PART_ITEMS or size >= PART_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window


def _digest(key: str, window: list[tuple[str, Any]]) -> str:
    """The sha256 of all that decides a part's bytes; a file counts by its size and time."""
    digest = hashlib.sha256(key.encode())
    for place, item in window:
        for piece in (_bytes(place), *_content(item)):
            digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()


def _content(item: Any) -> tuple[bytes, ...]:
    if isinstance(item, str):
        return (_bytes(item),)
    if isinstance(item, bytes):
        return (item,)
    if isinstance(item, Path) and item.is_file():
        state = item.stat()
        return (_bytes(str(item)), f"{state.st_size} {state.st_mtime_ns}".encode())
    if isinstance(item, np.ndarray):
        return (f"{item.dtype} {item.shape}".encode(), item.tobytes())
    return (repr(item).encode(),)


def _bytes(text: str) -> bytes:
    """UTF-8, also of a file name that is none."""
    return text.encode("utf-8", "surrogatepass")


def make_part(
    part: Path,
    window: list[tuple[str, Any]],
    first: int,
    form: VectorForm,
    digest: str,
    given: Model | Origin,
) -> None:
    """Embeds the items of one part.

    Args:
        part: the folder that is to appear.
        window: (place, item) of each.
        first: the number of the first one.
        form: what the vectors are.
        digest: for the manifest.
        given: whose vectors they are.
    """
    model = given if isinstance(given, Model) else _loaded(given)
    vectors, good, bad = _embedded(model, window, form)
    if form.unit:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    with np.errstate(over="ignore"):  # a number beyond float16 becomes infinite
        vectors = vectors.astype(form.dtype)
    finite = np.isfinite(vectors).all(axis=1)
    bad += [
        f"{window[i][0]}: its vector is not finite in {form.dtype}"
        for i, fine in zip(good, finite, strict=True)
        if not fine
    ]
    rows = [(i, *window[i]) for i, fine in zip(good, finite, strict=True) if fine]
    lines = [
        json.dumps(
            {"id": first + i, "item": name_of(place, item), "place": place}, ensure_ascii=False
        )
        for i, place, item in rows
    ]
    with whole_shard(part, {"sha256": digest, "rows": len(rows), "bad": bad}) as aside:
        np.save(aside / "vectors.npy", vectors[finite], allow_pickle=False)
        (aside / "items.jsonl").write_bytes(_bytes("".join(f"{line}\n" for line in lines)))


@lru_cache(maxsize=1)
def _loaded(origin: Origin) -> Model:
    """The model, for all parts that this process makes; workers take the machine's GPUs in turn.

    Raises:
        CheckpointError: the run is not there, or another one is.
    """
    device = "auto"
    if NUMBER in os.environ and torch.cuda.is_available():
        device = f"cuda:{int(os.environ[NUMBER]) % torch.cuda.device_count()}"
    model = load_model(origin.run, device)
    found = model.values["sha256"]["model.safetensors"]
    if found != origin.weights:
        raise CheckpointError(
            f"{origin.run}: its weights' sha256 is {found[:12]}... for this worker, and was "
            f"{origin.weights[:12]}... where the work was begun; all machines must see one run"
        )
    return model


def _embedded(
    model: Model, window: list[tuple[str, Any]], form: VectorForm
) -> tuple[np.ndarray, list[int], list[str]]:
    """Vectors, which items they are of, and what is wrong with the others."""
    items = [item for _, item in window]
    try:
        return model.embed(items, form.batch_size, form.layer), list(range(len(items))), []
    except DataError:
        reasons = refusals(model, items, form.batch_size)
        if not reasons:  # nothing is wrong with any item alone
            raise
    good = [i for i in range(len(items)) if i not in reasons]
    bad = [f"{window[i][0]}: {reason}" for i, reason in reasons.items()]
    return model.embed([items[i] for i in good], form.batch_size, form.layer), good, bad
