"""K-means against loops, scikit-learn and groups that can be told by hand."""

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from selfsup.errors import ConfigError
from selfsup.methods import clustering
from selfsup.methods.clustering import (
    assign,
    kmeans,
    move_centroids,
    seed_centroids,
    split_big_clusters,
)
from selfsup.randomness import torch_generator


def groups(num_items: int = 600, num_groups: int = 8, dim: int = 5, spread: float = 1.0) -> Tensor:
    """Normal clouds about random centres, with standard deviation `spread`."""
    draw = torch_generator(0, "groups")
    centres = 4 * torch.randn(num_groups, dim, generator=draw)
    member = torch.arange(num_items) % num_groups
    return centres[member] + spread * torch.randn(num_items, dim, generator=draw)


def slow_assign(features: np.ndarray, centroids: np.ndarray) -> list[int]:
    distances = [[sum((x - c) ** 2) for c in centroids] for x in features]
    return [min(range(len(row)), key=row.__getitem__) for row in distances]


def slow_lloyd(features: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """One iteration, one item after another."""
    assignment = slow_assign(features, centroids)
    moved = centroids.copy()
    for number in range(len(centroids)):
        own = [x for x, cluster in zip(features, assignment, strict=True) if cluster == number]
        if own:
            moved[number] = sum(own) / len(own)
    return moved, [assignment.count(number) for number in range(len(centroids))]


def inertia(features: Tensor, centroids: Tensor) -> float:
    features, centroids = features.double(), centroids.double()
    return torch.cdist(features, centroids).amin(1).square().sum().item()


@pytest.mark.parametrize("slice_size", [clustering.SLICE, 7, 1])
def test_one_iteration_equals_loops(slice_size, monkeypatch):
    monkeypatch.setattr(clustering, "SLICE", slice_size)
    features = groups(60)
    centroids = torch.cat([features[:5], torch.full((1, 5), 99.0)])  # nothing is near the last
    expected, expected_sizes = slow_lloyd(features.double().numpy(), centroids.double().numpy())
    assignment = assign(features, centroids)
    assert assignment.dtype == torch.long
    assert assignment.tolist() == slow_assign(features.double().numpy(), centroids.double().numpy())
    moved, sizes = move_centroids(features, assignment, centroids)
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)
    assert sizes.tolist() == expected_sizes
    assert sizes[-1] == 0


def test_items_far_from_the_origin_are_told_apart():
    features = groups(100, spread=0.5)
    centroids = features[:8]
    assert torch.equal(assign(features + 3000, centroids + 3000), assign(features, centroids))


def test_assignment_is_float32_under_autocast():
    features = groups()
    expected = assign(features, features[:8])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(assign(features, features[:8]), expected)


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_inertia_is_that_of_scikit_learn(spread):
    features = groups(spread=spread)
    ours = [inertia(features, kmeans(features, 8, torch_generator(s, "kmeans"))) for s in range(5)]
    found = [KMeans(8, n_init=1, random_state=seed).fit(features.numpy()) for seed in range(5)]
    theirs = [model.inertia_ for model in found]
    assert min(ours) == pytest.approx(min(theirs), rel=0.02)
    if spread == 3.0:  # clouds that overlap have no bad local optimum
        assert max(ours) < 1.04 * min(theirs)


def test_iterations_lower_the_inertia():
    features = groups(spread=3.0)
    found = [
        inertia(features, kmeans(features, 8, torch_generator(0, "kmeans"), iterations))
        for iterations in (0, 1, 3, 20)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 1.2 * found[-1]


def test_the_generator_decides_all():
    features = groups(spread=3.0)
    first, same, other = (kmeans(features, 8, torch_generator(s, "kmeans")) for s in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_first_centres_are_drawn_by_squared_distance():
    features, draw = torch.tensor([[0.0], [1.0], [4.0]]), torch_generator(0, "seeding")
    num_draws = 3000
    pairs = [tuple(seed_centroids(features, 2, draw).flatten().tolist()) for _ in range(num_draws)]
    counts = Counter(pairs)
    places = [0.0, 1.0, 4.0]
    for first in places:
        total = sum((first - other) ** 2 for other in places)
        for second in places:
            expected = (first - second) ** 2 / total / 3
            error = 4 * (expected * (1 - expected) / num_draws) ** 0.5
            assert counts[first, second] / num_draws == pytest.approx(expected, abs=error)


def test_empty_clusters_share_the_items_of_big_ones():
    draw = torch_generator(0, "split")
    centroids = torch.tensor([[0.0, 0.0], [50.0, 50.0], [9.0, 9.0], [60.0, 60.0]])
    sizes = torch.tensor([10, 0, 7, 0])
    got = split_big_clusters(centroids, sizes, torch.tensor(0.01), draw)
    assert torch.equal(got[[0, 2]], centroids[[0, 2]])
    assert 0 < (got[1] - centroids[0]).norm() < 0.1  # 10 becomes 5 and 5,
    assert 0 < (got[3] - centroids[2]).norm() < 0.1  # and then 7 is the biggest
    items = torch.randn(40, 2, generator=draw)
    _, shared = move_centroids(items, assign(items, got), got)
    assert shared[:2].min() > 5
    assert centroids[1, 0] == 50, "the input changed"
    assert sizes[1] == 0, "the input changed"


def test_no_cluster_stays_empty_where_items_differ():
    features = groups(64, num_groups=4, spread=0.1)
    sizes = assign(features, kmeans(features, 16, torch_generator(0, "kmeans"))).bincount()
    assert len(sizes) == 16
    assert sizes.min() > 0


def test_equal_items_give_finite_centres():
    features = torch.tensor([[1.0, 2.0], [5.0, 6.0]]).repeat(6, 1)
    centroids = kmeans(features, 5, torch_generator(0, "kmeans"))
    assert centroids.isfinite().all()
    assert inertia(features, centroids) == pytest.approx(0, abs=1e-8)
    assert kmeans(features[::2], 3, torch_generator(0, "kmeans")).isfinite().all()


def test_more_clusters_than_items_are_refused():
    with pytest.raises(ConfigError, match=r"5 clusters of 4 items.*method\.clusters"):
        kmeans(groups(4), 5, torch_generator(0, "kmeans"))
