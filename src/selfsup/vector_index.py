"""An index: a folder of unit vectors in which the nearest ones to a query are found.

    INDEX/index.toml           kind, size, form of the vectors, and the model by its sha256
          vectors.npy          (items, dim) of length one
          items.jsonl          {"id", "item", "place"} of each row
          items.offsets.npy    (items + 1,) where each line begins
          index.faiss          of an approximate index: what faiss wrote

The score is the inner product of unit vectors, the cosine. `vector_search.py` has the kinds of
search; `VectorIndex.recall` says what an approximate one misses.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Float

from selfsup.config import read_toml, write_toml
from selfsup.errors import CheckpointError, ConfigError, DataError
from selfsup.files import whole_folder
from selfsup.vector_files import append_items, append_vectors
from selfsup.vector_parts import Parts
from selfsup.vector_search import (
    Kind,
    exact_search,
    read_approximate,
    search_approximate,
    write_approximate,
)

FORMAT = 1
FILE = "index.faiss"
TIE = 1e-6  # scores nearer than that are one


class Found(NamedTuple):
    """An item near to a query.

    Attributes:
        score: cosine of the two vectors.
        id: the item's number in the data that were embedded.
        item: the text itself, or what anything else is called.
        place: where it stands.
    """

    score: float
    id: int
    item: str
    place: str


class Recall(NamedTuple):
    """What an index finds of what an exact search finds.

    Attributes:
        recall: mean share of the k nearest that were found; equal scores count alike.
        k: how many were looked for.
        queries: how many of the index's own vectors were looked up, each without itself.
        effort: as for `VectorIndex.search`; 0 for an exact index.
        per_second: queries in a second, all of them given at once.
        exact_per_second: likewise of the exact search.
    """

    recall: float
    k: int
    queries: int
    effort: int
    per_second: float
    exact_per_second: float


def write_index(path: Path, parts: Parts, kind: Kind, form: dict[str, Any], model: dict[str, str]):
    """Writes the folder whole; an older index there is replaced.

    Args:
        path: the folder.
        parts: unit vectors.
        kind: how they are searched.
        form: further facts of the vectors: `layer`, `dtype`.
        model: `path` (from the folder), `absolute` and `sha256` of the run.
    """
    values = {
        "format": FORMAT,
        "kind": kind,
        "items": parts.rows,
        "dim": parts.dim,
        "metric": "inner_product",
        "normalisation": "unit",
        **form,
    }
    with whole_folder(path) as aside:
        with open(aside / "vectors.npy", "wb") as file:
            append_vectors(file, parts)
        with open(aside / "items.jsonl", "wb") as file:
            append_items(file, parts)
        with open(aside / "items.jsonl", "rb") as file:
            offsets = np.cumsum([0, *(len(line) for line in file)], dtype=np.int64)
        np.save(aside / "items.offsets.npy", offsets, allow_pickle=False)
        if kind != "exact":
            vectors = np.load(aside / "vectors.npy", mmap_mode="r", allow_pickle=False)
            values["faiss"] = write_approximate(aside / FILE, vectors, kind)
        (aside / "index.toml").write_text(write_toml({**values, "model": model}))


@final
class VectorIndex:
    """An index folder, opened: vectors and items stay on the disk until they are asked for.

    Args:
        path: the folder.

    Attributes:
        path: the folder.
        values: what index.toml says.
        vectors: (items, dim).

    Raises:
        CheckpointError: no index is there, or it is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "index.toml").is_file():
            raise CheckpointError(
                f"{path}: no index is there; make one: selfsup embed RUN --data FILES --out {path}"
            )
        self.values = read_toml(self.path / "index.toml")
        if self.values.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}/index.toml: format {self.values.get('format')}, not {FORMAT}"
            )
        try:
            self.vectors = np.load(self.path / "vectors.npy", mmap_mode="r", allow_pickle=False)
            self._offsets = np.load(self.path / "items.offsets.npy", allow_pickle=False)
            size = os.path.getsize(self.path / "items.jsonl")
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(f"{path}: damaged: {error}; embed the data again") from error
        items, dim = self.values["items"], self.values["dim"]
        if self.vectors.shape != (items, dim) or len(self._offsets) != items + 1:
            raise CheckpointError(f"{path}: damaged: its files do not hold {items} x {dim}")
        if size != self._offsets[-1]:
            raise CheckpointError(
                f"{path}/items.jsonl: damaged: {size} bytes; embed the data again"
            )
        self.kind: Kind = self.values["kind"]
        self._approximate: Any = None

    def __len__(self) -> int:
        return len(self.vectors)

    def search(
        self, queries: Float[np.ndarray, "queries dim"], k: int = 10, effort: int | None = None
    ) -> list[list[Found]]:
        """The items whose vectors have the largest cosines with each query, the largest first.

        Args:
            queries: of any length but zero.
            k: how many; of a smaller index all.
            effort: of an approximate index: clusters that `ivf` looks into, candidates that `hnsw`
                keeps; None: what index.toml says.

        Raises:
            ConfigError: `k` or `effort` is below 1, or an exact index is given an effort.
            DataError: a query is not finite, or has another width.
        """
        if queries.ndim != 2 or queries.shape[1] != self.values["dim"]:
            raise DataError(f"queries of shape {queries.shape}; expected (n, {self.values['dim']})")
        if not np.isfinite(queries).all():
            raise DataError("a query's vector is not finite")
        lengths = np.linalg.norm(queries, axis=1, keepdims=True)
        unit = (queries / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
        nearest = self._nearest(unit, k, effort)
        with open(self.path / "items.jsonl", "rb") as file:
            return [
                [
                    Found(float(s), **self._item(file, row))
                    for s, row in zip(scores, rows, strict=True)
                ]
                for scores, rows in nearest
            ]

    def _item(self, file: Any, row: int) -> dict[str, Any]:
        """`id`, `item` and `place` of a row."""
        file.seek(self._offsets[row])
        return json.loads(file.read(self._offsets[row + 1] - self._offsets[row]))

    def recall(
        self, k: int = 10, queries: int = 1000, effort: int | None = None, seed: int = 0
    ) -> Recall:
        """What the index finds of what an exact search finds, for vectors of its own.

        A found item counts if its exact score reaches that of the k-th nearest, as in Aumueller et
        al. 2018 (arXiv 1807.05614): which of equal ones is found does not matter.

        Args:
            k: how many neighbours to look for; of a smaller index all others.
            queries: how many vectors to draw; of a smaller index all.
            effort: as for `search`.
            seed: another seed, other vectors.

        Raises:
            DataError: the index holds less than two items.
        """
        if queries < 1:
            raise ConfigError(f"queries must be at least 1, got {queries}")
        if len(self) < 2:
            raise DataError(f"{self.path}: recall needs 2 items at least, here is {len(self)}")
        draw = np.random.Generator(np.random.PCG64(seed))
        drawn = np.sort(draw.choice(len(self), min(queries, len(self)), replace=False))
        asked = self.vectors[drawn].astype(np.float32)
        k = min(k, len(self) - 1)
        self._nearest(asked[:1], k + 1, effort)  # reads the index
        started = time.perf_counter()
        found = self._nearest(asked, k + 1, effort)
        middle = time.perf_counter()
        best, rows = exact_search(self.vectors, asked, k + 1)
        ended = time.perf_counter()
        shares = []
        for query, own, (_, near), scores, exact in zip(
            asked, drawn, found, best, rows, strict=True
        ):
            threshold = scores[exact != own][:k][-1]
            others = near[near != own][:k]
            reached = self.vectors[others].astype(np.float32) @ query >= threshold - TIE
            shares.append(reached.sum() / k)
        return Recall(
            float(np.mean(shares)),
            k,
            len(asked),
            self._effort(effort),
            len(asked) / (middle - started),
            len(asked) / (ended - middle),
        )

    def _effort(self, effort: int | None) -> int:
        if self.kind == "exact":
            if effort is not None:
                raise ConfigError("an exact index looks at everything: effort is for ivf and hnsw")
            return 0
        effort = self.values["faiss"]["effort"] if effort is None else effort
        if effort < 1:
            raise ConfigError(f"effort must be at least 1, got {effort}")
        return effort

    def _nearest(
        self, unit: np.ndarray, k: int, effort: int | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(scores, rows) of each query; fewer than k where an approximate index finds no more."""
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        effort, k = self._effort(effort), min(k, len(self))
        if self.kind == "exact":
            return list(zip(*exact_search(self.vectors, unit, k), strict=True))
        if self._approximate is None:
            self._approximate = read_approximate(self.path / FILE, len(self))
        return search_approximate(self._approximate, self.kind, unit, k, effort)
