"""Searching: vectors of many items on the disk, and the items nearest to a query."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from selfsup import registry
from selfsup.data.sources import Item, Source
from selfsup.errors import CheckpointError, ConfigError, DataError, StorageError
from selfsup.files import remove_folder
from selfsup.model import Model
from selfsup.model_folder import load_model
from selfsup.readable import name_of
from selfsup.vector_files import write_npy, write_parquet
from selfsup.vector_index import Found, Recall, VectorIndex, write_index
from selfsup.vector_parts import VectorForm, make_parts
from selfsup.vector_search import Kind, check_kind
from selfsup.workers import Engine, Workers


class Embedded(NamedTuple):
    """What `embed` wrote: where, how many vectors, of what width and type."""

    path: Path
    rows: int
    dim: int
    dtype: str


class Answer(NamedTuple):
    """What `search` found for one query, the nearest first."""

    query: str
    found: list[Found]


def embed(
    run: str | Path,
    data: Source,
    out: str | Path,
    *,
    text: str | None = None,
    layer: int | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    index: Kind | None = None,
    batch_size: int = 64,
    jobs: int = 1,
    engine: Engine = "local",
) -> Embedded:
    """Writes one vector per item; data may be larger than memory.

    Finished parts stand in OUT.parts until all is done: the same call after a cut goes on there.
    Items that cannot be used are counted and named and left out; more than 2% of them are refused.

    Args:
        run: a run folder.
        data: files of the kind that the run was trained on.
        out: NAME.npy (the items go to NAME.items.jsonl); NAME.parquet; or else the folder of an
            index that `search` reads.
        text: column of csv, jsonl, parquet.
        layer: as for `Model.embed`.
        dtype: how numbers are stored.
        index: of an index: exact (the default), or ivf or hnsw, which need faiss.
        batch_size: items per forward pass.
        jobs: processes side by side on this machine, which take its GPUs in turn.
        engine: "ray": the processors, or the GPUs, of a Ray cluster that shares this machine's
            files. A script that asks for it or for more jobs needs `if __name__ == "__main__":`.

    Raises:
        ConfigError: `out` has another extension, or faiss or Ray is missing.
        StorageError: `out` is a folder of something else.
        DataError: the data cannot be read, or too much of them cannot be used.
        SelfsupError: a worker failed or died twice at the same part; its items are named.
    """
    path = Path(out)
    _check_out(path, index)
    if dtype not in ("float32", "float16"):
        raise ConfigError(f"dtype must be float32 or float16, got {dtype!r}")
    kind = index or "exact"
    check_kind(kind)
    workers = Workers(jobs, engine)
    model = load_model(run, "auto" if workers == Workers() else "cpu")
    form = VectorForm(layer=layer, dtype=dtype, unit=not path.suffix, batch_size=batch_size)
    items = _module(model).read_items(data, text, model.preprocessor)
    source = str(data) if isinstance(data, Item) else ", ".join(map(str, data))
    aside = path.with_name(f"{path.name}.parts")
    parts = make_parts(run, model, items, source, aside, form, workers)
    shown = {"layer": "pooled" if layer is None else layer, "dtype": dtype}
    if path.suffix == ".npy":
        write_npy(path, parts)
    elif path.suffix == ".parquet":
        write_parquet(path, parts, {**shown, "model": _identity(run, model, path.parent)})
    else:
        write_index(path, parts, kind, shown, _identity(run, model, path))
    remove_folder(aside)
    return Embedded(path, parts.rows, parts.dim, dtype)


def search(
    index: str | Path,
    queries: Any = (),
    *,
    data: Source | None = None,
    text: str | None = None,
    k: int = 10,
    effort: int | None = None,
    batch_size: int = 64,
) -> list[Answer]:
    """Finds the items of an index that are nearest to each query.

    Args:
        index: a folder that `embed` wrote; the run that it names embeds the queries.
        queries: one item or a list of items: texts, paths of pictures or sounds, or whatever else
            the run reads.
        data: files of further queries, read as those of `embed`.
        text: column of csv, jsonl, parquet.
        k: how many items; of a smaller index all.
        effort: of an approximate index: how many clusters (ivf) or candidates (hnsw) are looked at.
        batch_size: queries per forward pass.

    Raises:
        CheckpointError: no index is there, or the run has other weights than those that made it.
        ConfigError: there is no query, or `k` or `effort` is out of range.
        DataError: a query cannot be read.
    """
    opened = VectorIndex(index)
    single = isinstance(queries, str | Path | bytes) or not isinstance(queries, Sequence)
    asked = [queries] if single else list(queries)
    if not asked and data is None:
        raise ConfigError("nothing to search for: give a query, or files of queries")
    model = _model_of(opened)
    named = [
        (str(item) if isinstance(item, str | Path) else f"query {number}", item)
        for number, item in enumerate(asked)
    ]
    if data is not None:
        found = _module(model).read_items(data, text, model.preprocessor)
        named += [(name_of(place, item), item) for place, item in found]
        if not named:
            raise DataError(f"{data}: no query is there")
    layer = opened.values["layer"]
    vectors = model.embed(
        [item for _, item in named], batch_size, None if layer == "pooled" else layer
    )
    answers = opened.search(vectors, k, effort)
    return [Answer(name, found) for (name, _), found in zip(named, answers, strict=True)]


def index_recall(
    index: str | Path,
    *,
    k: int = 10,
    queries: int = 1000,
    effort: int | None = None,
    seed: int = 0,
) -> Recall:
    """Measures what share of the exact neighbours of its own vectors an index finds.

    Args:
        index: a folder that `embed` wrote.
        k: how many neighbours.
        queries: how many of its vectors are looked up, each without itself.
        effort: as for `search`.
        seed: another seed, other vectors.
    """
    return VectorIndex(index).recall(k, queries, effort, seed)


def _module(model: Model) -> Any:
    return registry.module_of(registry.DATA, "data", model.values["data"]["name"])


def _check_out(path: Path, index: str | None) -> None:
    if path.suffix not in ("", ".npy", ".parquet"):
        raise ConfigError(
            f"{path}: out must end in .npy or .parquet, or be the folder of an index, whose name "
            "has no extension"
        )
    if path.suffix and index is not None:
        raise ConfigError(f"{path}: index = {index!r} is for a folder; give a name without ending")
    if path.suffix and path.is_dir():
        raise StorageError(f"{path}: is a folder; choose another place")
    if not path.suffix and path.is_file():
        raise StorageError(f"{path}: is a file, and an index is a folder; choose another place")
    if path.is_dir() and any(path.iterdir()) and not (path / "index.toml").is_file():
        raise StorageError(f"{path}: is a folder with other things; choose another place")


def _identity(run: str | Path, model: Model, path: Path) -> dict[str, str]:
    """How an index names its run: from there, absolutely, and by its weights' sha256."""
    return {
        "path": os.path.relpath(run, path),
        "absolute": str(Path(run).resolve()),
        "sha256": model.values["sha256"]["model.safetensors"],
    }


def _model_of(index: VectorIndex) -> Model:
    """The run that embedded the items of an index.

    Raises:
        CheckpointError: it is not there, or has other weights now.
    """
    section = index.values["model"]
    places = [index.path / section["path"], Path(section["absolute"])]
    run = next((place for place in places if place.is_dir()), None)
    if run is None:
        raise CheckpointError(
            f"{index.path}: was made with {section['absolute']}, which is not there; put it back, "
            f"or name its new place as `absolute` under [model] in {index.path / 'index.toml'}"
        )
    model = load_model(run)
    given = model.values["sha256"]["model.safetensors"]
    if given != section["sha256"]:
        raise CheckpointError(
            f"{index.path}: was made with another model than {run} holds now: its weights' sha256 "
            f"was {section['sha256'][:12]}..., this one's is {given[:12]}...; embed the data again"
        )
    return model
