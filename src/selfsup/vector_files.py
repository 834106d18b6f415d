"""Vectors of many items, written as .npy or .parquet."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from selfsup.files import whole_file
from selfsup.vector_parts import Parts


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
