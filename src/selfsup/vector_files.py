"""Vectors of many items: made part by part, kept on the disk, written as .npy or .parquet.

    OUT.parts/00000/vectors.npy   (items, dim) of the items that can be used
                    items.jsonl   {"id", "item", "place"} of each
                    part.json     the sha256 of its items, model and form; what cannot be used

A part that is there is not made again if its items, the model and the form are what they were: a
cut embedding goes on where it was cut, and gives the bytes that it would have given.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from selfsup import console
from selfsup.data.bad_items import BadItems
from selfsup.errors import DataError
from selfsup.files import whole_file, whole_folder
from selfsup.model_folder import Model

PART_ITEMS = 4096
PART_BYTES = 2**26  # of encoded pictures or long texts, which are in memory at once
NUMBERED = re.compile(r"^item \d+( \(.*?\))?( is| cannot be used)?:? ")  # messages of preprocessors


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


def name_of(place: str, item: Any) -> str:
    """What people call an item: a text itself, anything else by its place."""
    return item if isinstance(item, str) else place


def make_parts(
    model: Model, items: Iterable[tuple[str, Any]], source: str, folder: Path, form: VectorForm
) -> Parts:
    """Embeds all items, part by part, into `folder`; parts that are there already are kept.

    Args:
        model: whose vectors they are.
        items: (place, item) as a kind of data's `read_items` gives them; read once, in order.
        source: what messages call them.
        folder: of the parts.
        form: what the vectors are.

    Raises:
        DataError: there are no items, or more than 2% of them cannot be used.
        ConfigError: the encoder has no such layer.
    """
    device = f"{model.device} {model.dtype}"
    key = json.dumps([model.values["sha256"], asdict(form), device], sort_keys=True)
    bad, folders, total, kept, rows = BadItems(source), [], 0, 0, 0
    with console.progress("embedding") as shown:
        for number, window in enumerate(_windows(items)):
            part = folder / f"{number:05d}"
            digest = _digest(f"{key} {total}", window)
            facts = _facts(part)
            if facts.get("sha256") == digest:
                kept += len(window)
            else:
                facts = _make(model, window, part, form, digest, total)
            folders.append(part)
            bad.found += facts["bad"]
            total, rows = total + len(window), rows + facts["rows"]
            shown.advance(len(window), f"{total:,} items")
    if not total:
        raise DataError(f"{source}: no item to embed is there")
    if kept:
        console.say(f"{folder}: {kept:,} of {total:,} items were embedded before the cut")
    bad.check(total)
    vectors = np.load(folders[0] / "vectors.npy", mmap_mode="r", allow_pickle=False)
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


def _facts(part: Path) -> dict[str, Any]:
    """What part.json says; {} where there is no whole part."""
    try:
        return json.loads((part / "part.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _make(
    model: Model,
    window: list[tuple[str, Any]],
    part: Path,
    form: VectorForm,
    digest: str,
    first: int,
) -> dict[str, Any]:
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
    facts = {"sha256": digest, "rows": len(rows), "bad": bad}
    with whole_folder(part) as aside:
        np.save(aside / "vectors.npy", vectors[finite], allow_pickle=False)
        (aside / "items.jsonl").write_bytes(_bytes("".join(f"{line}\n" for line in lines)))
        (aside / "part.json").write_text(json.dumps(facts), encoding="utf-8")
    return facts


def _embedded(
    model: Model, window: list[tuple[str, Any]], form: VectorForm
) -> tuple[np.ndarray, list[int], list[str]]:
    """Vectors, which items they are of, and what is wrong with the others."""
    items = [item for _, item in window]
    try:
        return model.embed(items, form.batch_size, form.layer), list(range(len(items))), []
    except DataError:
        reasons = _reasons(model, items, form.batch_size)
        if not reasons:  # nothing is wrong with any item alone
            raise
    good = [i for i in range(len(items)) if i not in reasons]
    bad = [f"{window[i][0]}: {reason}" for i, reason in reasons.items()]
    return model.embed([items[i] for i in good], form.batch_size, form.layer), good, bad


def _reasons(model: Model, items: list[Any], size: int) -> dict[int, str]:
    """Why items cannot be read, by number."""
    reasons = {}
    for first in range(0, len(items), size):
        group = items[first : first + size]
        if _refusal(model, group) is None:
            continue
        for number, item in enumerate(group, first):
            reason = _refusal(model, [item])
            if reason is not None:
                reasons[number] = NUMBERED.sub("", reason)
    return reasons


def _refusal(model: Model, items: list[Any]) -> str | None:
    try:
        for _ in model.preprocessor.batches(items, len(items)):
            pass
    except DataError as error:
        return str(error)
    return None


# What becomes of the parts


def write_npy(path: Path, parts: Parts) -> None:
    """Writes `path`, (items, dim), and beside it NAME.items.jsonl with a line for each row."""
    with whole_file(items_path(path)) as aside, open(aside, "wb") as file:
        append_items(file, parts)
    with whole_file(path) as aside, open(aside, "wb") as file:
        append_vectors(file, parts)


def items_path(path: Path) -> Path:
    """The file of items beside a .npy file."""
    return path.with_name(f"{path.stem}.items.jsonl")


def append_items(file: Any, parts: Parts) -> None:
    """Writes the lines of all parts into an open file."""
    for folder in parts.folders:
        with open(folder / "items.jsonl", "rb") as lines:
            shutil.copyfileobj(lines, file)


def append_vectors(file: Any, parts: Parts) -> None:
    """Writes all parts into an open file as one .npy array."""
    header = {
        "descr": np.lib.format.dtype_to_descr(parts.dtype),
        "fortran_order": False,
        "shape": (parts.rows, parts.dim),
    }
    np.lib.format.write_array_header_1_0(file, header)
    for vectors in parts.vectors():
        file.write(vectors.tobytes())


def write_parquet(path: Path, parts: Parts, facts: dict[str, Any]) -> None:
    """Writes `path` with the columns `id`, `item`, `place` and `vector`, a list of fixed size.

    Args:
        path: the file.
        parts: the vectors.
        facts: where they come from; becomes the file's metadata.
    """
    import pyarrow as pa
    from pyarrow import parquet

    vector = pa.list_(pa.from_numpy_dtype(parts.dtype), parts.dim)
    fields = {"id": pa.int64(), "item": pa.string(), "place": pa.string(), "vector": vector}
    schema = pa.schema(fields, metadata={"selfsup": json.dumps(facts)})
    with whole_file(path) as aside, parquet.ParquetWriter(aside, schema) as writer:
        for vectors, items in zip(parts.vectors(), parts.items(), strict=True):
            columns = [
                pa.array([item[name] for item in items], fields[name])
                for name in ("id", "item", "place")
            ]
            flat = pa.array(vectors.reshape(-1))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, parts.dim))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
