"""Nearest vectors: the exact search against a slow one, the approximate kinds against the exact."""

import faiss
import numpy as np
import pytest

from selfsup import vector_search
from selfsup.errors import CheckpointError, ConfigError
from selfsup.vector_search import (
    check_kind,
    exact_search,
    read_approximate,
    search_approximate,
    write_approximate,
)


def unit(count: int, dim: int, seed: int) -> np.ndarray:
    """Random directions, float32."""
    vectors = np.random.Generator(np.random.PCG64(seed)).standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_exact_search_by_hand():
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    scores, rows = exact_search(vectors, np.array([[1, 0], [0, -1]], np.float32), 2)
    assert rows.tolist() == [[0, 2], [0, 2]]
    assert np.allclose(scores, [[1, 0.6], [0, -0.8]])


@pytest.mark.parametrize("k", [1, 5, 9, 30])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_exact_search_in_blocks_is_a_slow_search(monkeypatch, k, dtype):
    monkeypatch.setattr(vector_search, "BLOCK_ROWS", 7)
    monkeypatch.setattr(vector_search, "BLOCK_QUERIES", 3)
    vectors, queries = unit(30, 4, 0).astype(dtype), unit(8, 4, 1)
    scores, rows = exact_search(vectors, queries, k)
    slow = queries.astype(np.float64) @ vectors.astype(np.float64).T
    assert np.array_equal(rows, np.argsort(-slow, axis=1)[:, :k])
    assert np.allclose(scores, -np.sort(-slow, axis=1)[:, :k], atol=1e-6)


def test_exact_search_is_the_flat_index_of_faiss():
    vectors, queries = unit(500, 16, 0), unit(20, 16, 1)
    flat = faiss.IndexFlatIP(16)
    flat.add(vectors)
    expected, places = flat.search(queries, 10)
    scores, rows = exact_search(vectors, queries, 10)
    assert np.array_equal(rows, places)
    assert np.allclose(scores, expected, atol=1e-6)


def test_equal_scores_stand_in_the_order_of_their_rows():
    vectors = np.ones((6, 2), np.float32)
    assert exact_search(vectors, vectors[:1], 6)[1].tolist() == [[0, 1, 2, 3, 4, 5]]


def test_clusters_all_of_which_are_looked_into_give_the_exact_answer(tmp_path):
    vectors, queries = unit(800, 8, 0), unit(30, 8, 1)
    settings = write_approximate(tmp_path / "ivf", vectors, "ivf")
    assert settings == {"clusters": 20, "effort": 16, "version": faiss.__version__}
    index = read_approximate(tmp_path / "ivf", 800)
    expected = exact_search(vectors, queries, 5)
    every = search_approximate(index, "ivf", queries, 5, 20)
    assert np.array_equal(np.stack([rows for _, rows in every]), expected[1])
    assert np.allclose(np.stack([scores for scores, _ in every]), expected[0], atol=1e-6)
    one = search_approximate(index, "ivf", queries, 5, 1)
    found = [len(np.intersect1d(a, b)) for (_, a), b in zip(one, expected[1], strict=True)]
    assert 0.2 < np.mean(found) / 5 < 0.95


def test_fewer_than_k_are_given_where_a_cluster_holds_no_more(tmp_path):
    vectors = unit(800, 8, 0)
    write_approximate(tmp_path / "ivf", vectors, "ivf")
    index = read_approximate(tmp_path / "ivf", 800)
    ((scores, rows),) = search_approximate(index, "ivf", vectors[:1], 800, 1)
    assert 0 < len(rows) == len(scores) < 800
    assert rows.min() >= 0


def test_a_graph_finds_most_neighbours(tmp_path):
    vectors, queries = unit(800, 8, 0), unit(30, 8, 1)
    assert write_approximate(tmp_path / "hnsw", vectors, "hnsw")["effort"] == 64
    index = read_approximate(tmp_path / "hnsw", 800)
    expected = exact_search(vectors, queries, 5)[1]
    near = search_approximate(index, "hnsw", queries, 5, 64)
    found = [len(np.intersect1d(a, b)) for (_, a), b in zip(near, expected, strict=True)]
    assert np.mean(found) / 5 > 0.95


def test_a_damaged_index_is_refused(tmp_path):
    path = tmp_path / "index.faiss"
    write_approximate(path, unit(50, 4, 0), "hnsw")
    with pytest.raises(CheckpointError, match="holds 50 of 51 vectors"):
        read_approximate(path, 51)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"index.faiss: damaged"):
        read_approximate(path, 50)


def test_kinds(monkeypatch):
    with pytest.raises(ConfigError, match="no kind of index 'flat'; known: exact, ivf, hnsw"):
        check_kind("flat")
    check_kind("ivf")
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    check_kind("exact")
    with pytest.raises(ConfigError, match=r"pip install 'selfsup\[search\]'"):
        check_kind("ivf")
