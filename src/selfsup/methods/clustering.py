"""K-means for the methods that learn from cluster numbers: DeepCluster, HuBERT.

Centres begin by k-means++ (Arthur and Vassilvitskii, "k-means++: The Advantages of Careful
Seeding", 2007) and move by Lloyd's iterations. A cluster that lost all its items goes to a place
beside the centre of a big one, and the two share its items from then on (Caron et al., 2018, arXiv
1807.05520, section 3.3).

Everything is a function of the features and the generator: on one kind of device the same input
gives the same bits. Distances are computed in slices, so memory beside the features stays small.

Axes: items; clusters; dim.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfsup.errors import ConfigError

SLICE = 2**22  # distances that are held at a time
NUDGE = 1e-3  # how far a second centre begins from the first, in standard deviations of the items


def kmeans(
    features: Float[Tensor, "items dim"],
    num_clusters: int,
    generator: torch.Generator,
    iterations: int = 20,
) -> Float[Tensor, "clusters dim"]:
    """Centres of clusters, by k-means++ and Lloyd's iterations, in float32.

    Where there are fewer different items than clusters, some centres have no item.

    Args:
        features: what to cluster.
        num_clusters: number of centres, at most the number of items.
        generator: source of randomness, on the device of `features`.
        iterations: how often the centres move to the means of their items.

    Raises:
        ConfigError: fewer items than clusters.

    >>> features = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    >>> centroids = kmeans(features, 2, torch.Generator().manual_seed(0))
    >>> sorted(centroids.flatten().tolist())
    [0.5, 10.5]
    """
    if num_clusters > len(features):
        raise ConfigError(
            f"{num_clusters} clusters of {len(features)} items: k-means needs at least one item "
            "for each; set fewer clusters (method.clusters) or bring more data"
        )
    features = features.float()
    centroids = seed_centroids(features, num_clusters, generator)
    nudge = NUDGE * features.var(0, unbiased=False).mean().sqrt()
    for _ in range(iterations):
        centroids, sizes = move_centroids(features, assign(features, centroids), centroids)
        centroids = split_big_clusters(centroids, sizes, nudge, generator)
    return centroids


def assign(
    features: Float[Tensor, "items dim"], centroids: Float[Tensor, "clusters dim"]
) -> Int[Tensor, " items"]:
    """The number of the nearest centre for every item, int64; the first of equally near ones."""
    centre = centroids.mean(0)  # far from the origin, float32 would not tell distances apart
    centred = centroids - centre
    half_squares = centred.square().sum(1) / 2  # |x - c|^2 / 2 without the term of x alone
    nearest = []
    with torch.autocast(features.device.type, enabled=False):
        for part in features.split(max(1, SLICE // len(centroids))):
            score = torch.addmm(half_squares, part.float() - centre, centred.T, alpha=-1)
            nearest.append(score.argmin(1))
    return torch.cat(nearest)


def seed_centroids(
    features: Float[Tensor, "items dim"], num_clusters: int, generator: torch.Generator
) -> Float[Tensor, "clusters dim"]:
    """Items to begin with: each drawn by its squared distance to the nearest one before it."""
    distance = features.new_ones(len(features))  # the first: each with the same probability
    chosen: list[Tensor] = []
    for _ in range(num_clusters):
        # item i wins with probability distance_i / sum; torch.multinomial ends at 2^24 items
        clock = torch.empty_like(distance).exponential_(generator=generator)
        chosen.append(features[(distance / clock).argmax()])
        squared = (features - chosen[-1]).square().sum(1)
        distance = squared if len(chosen) == 1 else torch.minimum(distance, squared)
    return torch.stack(chosen)


def move_centroids(
    features: Float[Tensor, "items dim"],
    assignment: Int[Tensor, " items"],
    centroids: Float[Tensor, "clusters dim"],
) -> tuple[Float[Tensor, "clusters dim"], Int[Tensor, " clusters"]]:
    """Every centre at the mean of its items, or where it was if it has none; and their numbers."""
    sizes = assignment.bincount(minlength=len(centroids))
    # Item by item in their order: index_add_ on a GPU adds in any order, with other roundings.
    grouped = features[assignment.argsort(stable=True)]
    sums = torch.segment_reduce(grouped, "sum", lengths=sizes)  # (clusters, dim)
    means = sums / sizes.clamp(min=1).unsqueeze(1)
    return torch.where((sizes > 0).unsqueeze(1), means, centroids), sizes


def split_big_clusters(
    centroids: Float[Tensor, "clusters dim"],
    sizes: Int[Tensor, " clusters"],
    nudge: Float[Tensor, ""],
    generator: torch.Generator,
) -> Float[Tensor, "clusters dim"]:
    """Puts the centre of every empty cluster beside that of the biggest, and halves its size."""
    centroids, sizes = centroids.clone(), sizes.clone()
    for empty in (sizes == 0).nonzero().flatten().tolist():
        big = int(sizes.argmax())
        noise = torch.randn(centroids.shape[1], generator=generator, device=centroids.device)
        centroids[empty] = centroids[big] + nudge * noise
        sizes[empty] = sizes[big] // 2
        sizes[big] -= sizes[empty]
    return centroids
