"""Nearest vectors by inner product: exact, in blocks of numpy, or approximate, with faiss.

`exact` looks at every vector, straight from the disk. The approximate kinds (Johnson et al. 2017,
arXiv 1702.08734) hold all vectors in memory: `ivf` looks into the nearest of many clusters, `hnsw`
walks along a graph of neighbours (Malkov and Yashunin 2016, arXiv 1603.09320).
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from selfsup import console
from selfsup.errors import CheckpointError, ConfigError

BLOCK_ROWS, BLOCK_QUERIES = 2**14, 256  # of one matrix product
EFFORT = {"ivf": 16, "hnsw": 64}
HNSW_NEIGHBOURS, HNSW_CONSTRUCTION = 32, 100
CLUSTER_ROWS = 39  # faiss asks for as many training vectors for each cluster

Kind = Literal["exact", "ivf", "hnsw"]
KINDS = ("exact", "ivf", "hnsw")


def check_kind(kind: str) -> None:
    """Refuses a kind that is not known, or whose library is not installed.

    Raises:
        ConfigError: it cannot be used.
    """
    if kind not in KINDS:
        raise ConfigError(f"no kind of index {kind!r}; known: {', '.join(KINDS)}")
    if kind != "exact":
        _faiss()


def exact_search(
    vectors: Float[np.ndarray, "items dim"], queries: Float[np.ndarray, "queries dim"], k: int
) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
    """Scores and rows of the k vectors with the largest inner products, the largest first.

    Args:
        vectors: may lie on the disk (a memory map): they are read in blocks.
        queries: float32.
        k: at most the number of vectors.
    """
    scores = np.empty((len(queries), k), np.float32)
    rows = np.empty((len(queries), k), np.int64)
    for first in range(0, len(queries), BLOCK_QUERIES):
        some = queries[first : first + BLOCK_QUERIES]
        best = np.empty((len(some), 0), np.float32)
        places = np.empty((len(some), 0), np.int64)
        for begin in range(0, len(vectors), BLOCK_ROWS):
            block = np.asarray(vectors[begin : begin + BLOCK_ROWS], dtype=np.float32)
            here, at = _largest(some @ block.T, k)
            best = np.concatenate([best, here], axis=1)
            places = np.concatenate([places, at + begin], axis=1)
            best, at = _largest(best, k)
            places = np.take_along_axis(places, at, axis=1)
        order = np.lexsort((places, -best), axis=1)
        scores[first : first + len(some)] = np.take_along_axis(best, order, axis=1)
        rows[first : first + len(some)] = np.take_along_axis(places, order, axis=1)
    return scores, rows


def _largest(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each row, in no order, and where they stand."""
    if scores.shape[1] <= k:
        return scores, np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    at = np.argpartition(scores, -k, axis=1)[:, -k:]
    return np.take_along_axis(scores, at, axis=1), at


def write_approximate(
    path: Path, vectors: Float[np.ndarray, "items dim"], kind: Kind
) -> dict[str, Any]:
    """Builds an index of `vectors` with faiss and writes it to `path`; gives its settings."""
    faiss = _faiss()
    rows, dim = vectors.shape
    if kind == "ivf":
        clusters = max(1, min(int(4 * rows**0.5), rows // CLUSTER_ROWS))
        index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(dim), dim, clusters, faiss.METRIC_INNER_PRODUCT
        )
        index.cp.spherical = True
        draw = np.random.Generator(np.random.PCG64(0))
        num_drawn = min(rows, 4 * CLUSTER_ROWS * clusters)
        drawn = np.sort(draw.choice(rows, num_drawn, replace=False))
        console.say(f"index: {clusters:,} clusters of {num_drawn:,} vectors")
        index.train(vectors[drawn].astype(np.float32))
        settings = {"clusters": clusters, "effort": min(EFFORT[kind], clusters)}
    else:
        index = faiss.IndexHNSWFlat(dim, HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = HNSW_CONSTRUCTION
        settings = {"neighbours": HNSW_NEIGHBOURS, "effort": EFFORT[kind]}
    with console.progress("index", rows) as shown:
        for first in range(0, rows, BLOCK_ROWS):
            block = vectors[first : first + BLOCK_ROWS].astype(np.float32)
            index.add(block)
            shown.advance(len(block), f"{first + len(block):,} of {rows:,} vectors")
    faiss.write_index(index, str(path))
    return {**settings, "version": faiss.__version__}


def read_approximate(path: Path, rows: int) -> Any:
    """What `write_approximate` wrote.

    Raises:
        CheckpointError: it is damaged, or holds another number of vectors.
    """
    faiss = _faiss()
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: damaged ({error}); embed the data again") from error
    if index.ntotal != rows:
        raise CheckpointError(f"{path}: damaged: holds {index.ntotal} of {rows} vectors")
    return index


def search_approximate(
    index: Any, kind: Kind, queries: Float[np.ndarray, "queries dim"], k: int, effort: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(scores, rows) of each query, the largest first; fewer than k where no more are found.

    Args:
        index: what `read_approximate` gives.
        kind: what was written.
        queries: float32.
        k: how many vectors.
        effort: clusters that `ivf` looks into, candidates that `hnsw` keeps.
    """
    faiss = _faiss()
    settings = (
        faiss.SearchParametersIVF(nprobe=effort)
        if kind == "ivf"
        else faiss.SearchParametersHNSW(efSearch=max(effort, k))
    )
    scores, rows = index.search(queries, k, params=settings)
    return [(s[r >= 0], r[r >= 0]) for s, r in zip(scores, rows, strict=True)]


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            "an approximate index needs the package `faiss`: pip install 'selfsup[search]'; "
            "an exact one needs nothing"
        ) from error
    return faiss
