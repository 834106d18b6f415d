"""DeepCluster: k-means on the network's own features gives the labels that it learns next.

Caron, Bojanowski, Joulin and Douze, "Deep Clustering for Unsupervised Learning of Visual Features"
(2018, arXiv 1807.05520). Features of all pictures, whitened and brought to length 1, are clustered;
then the network learns to tell each picture's cluster from an augmented view of it, until the
features are clustered anew. Even a random network's features hold a weak signal, and each turn
makes more of it. Each cluster weighs as much as every other, or one could swallow the rest.

Axes: items: all pictures of the training data; batch; clusters; dim: of the encoder's features;
width: of the whitened ones.

`refresh` passes over the data without augmentation and with the encoder in evaluation mode. With
several ranks each passes over all of them, with the same generator, and finds the same clusters:
nothing is sent. Held-out pictures get the cluster whose centre is nearest to their features, by a
copy of the encoder as the last `refresh` found it: to the encoder of some steps later the centres
mean something else. Before the first `refresh` the centres are random.

Numbers for small data: about 10 clusters per class that one imagines, but at least some dozens of
pictures in a cluster (CIFAR-10: 100 to 500), and `refresh_every` of about an epoch. The new layer
needs some hundred steps before the features learn much from it.

Deviations from the paper:
- The loop decides the order of pictures. Where the authors draw a cluster first and then one of its
  pictures, here a picture's loss weighs inversely to its cluster's size: the same in expectation,
  with more variance. `clip` bounds what a tiny cluster's picture can do.
- There is no Sobel filter before the network, which takes the colours away, or clusters may follow
  them. Views with `jitter` and `grey` make up for some of it.
- The linear layer reads the pooled features, with no fully connected layers before it.
- K-means begins by k-means++, not with random items.
- AdamW takes the place of SGD. The layer that is drawn anew at a `refresh` keeps the optimizer's
  moments of the one before it.

Reference result: 6 CPU minutes on 19,000 pictures of CIFAR-10 with a narrow ResNet
(docs/results/deepcluster-small.json): frozen features tell 5,000 test pictures with kNN 0.369 and
linear 0.446; untrained 0.257 and 0.301, raw pixels 0.327 and 0.396; one seed.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfsup.batch import Batch, ImageSpec
from selfsup.methods.clustering import assign, kmeans
from selfsup.methods.ops import frozen
from selfsup.methods.views import ViewConfig, augment
from selfsup.models.encoder import Encoder
from selfsup.objective import Objective, Output

FLAT = 1e-6  # directions with less than this share of the largest variance hold rounding errors
HEAD_STD = 0.01  # of the new layer's weights, as in the authors' code
CROP_AND_FLIP = ViewConfig(jitter=0.0, grey=0.0, blur=0.0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Clusters, how often they are made, and views. Defaults are the paper's for ImageNet."""

    clusters: int = 10_000
    """Number of clusters: 10 per class of ImageNet."""
    pca_dim: int = 256
    """Directions that features keep for clustering; at most the encoder's width."""
    refresh_every: int = 5_000
    """Steps from one clustering to the next; the paper's is an epoch of batches of 256."""
    iterations: int = 20
    """Of k-means."""
    views: ViewConfig = CROP_AND_FLIP
    """How a picture is augmented when its cluster is to be told."""

    def __post_init__(self) -> None:
        least = {"clusters": 2, "pca_dim": 1, "refresh_every": 1, "iterations": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} must be at least {number}, got {getattr(self, name)}")


def whitening(
    features: Float[Tensor, "items dim"], width: int
) -> tuple[Float[Tensor, " dim"], Float[Tensor, "dim {width}"]]:
    """Mean, and projection on the principal directions that gives each variance 1.

    Directions in which the features hardly differ are left out: their columns are 0.
    """
    mean = features.mean(0)
    centred = features - mean
    covariance = (centred.T @ centred / len(features)).cpu().double()
    variance, axes = (part.flip(-1)[..., :width] for part in torch.linalg.eigh(covariance))
    scale = torch.where(variance > FLAT * variance[0], variance.abs().rsqrt(), 0.0)
    return mean, (axes * scale).to(features)


def cluster_weights(sizes: Int[Tensor, " clusters"]) -> Float[Tensor, " clusters"]:
    """What a picture of each cluster weighs: all clusters that have pictures weigh the same.

    The mean over all pictures is 1.
    """
    used = (sizes > 0).sum()
    return sizes.sum() / (used * sizes.clamp(min=1))


def balanced_cross_entropy(
    logits: Float[Tensor, "batch clusters"],
    cluster: Int[Tensor, " batch"],
    weight: Float[Tensor, " clusters"],
) -> Float[Tensor, ""]:
    """Cross entropy, each picture weighing as its cluster says; mean over batch."""
    each = F.cross_entropy(logits.float(), cluster, reduction="none")
    return (weight[cluster] * each).mean()


def normalised_mutual_information(
    first: Int[Tensor, " items"], second: Int[Tensor, " items"]
) -> Float[Tensor, ""]:
    """How much two assignments say of each other: 0 nothing, 1 all."""
    pairs = first * (second.max() + 1) + second
    of_first, of_second, of_both = (
        -(share * share.log()).sum()
        for share in (x.unique(return_counts=True)[1] / len(x) for x in (first, second, pairs))
    )
    shared = of_first + of_second - of_both
    return shared.clamp(min=0) / (of_first * of_second).sqrt().clamp(min=1e-12)


@final
class DeepCluster(Objective):
    """Tells the cluster of a picture; see the module's docstring.

    Attributes:
        labels: (items,) cluster of each training picture by its `index`; empty before the first
            `refresh`. A checkpoint brings its own size.
        past_encoder: the encoder as the last `refresh` found it.
        centroids: (clusters, width); `mean` and `projection` lead from features to their space.
        sizes: (clusters,) number of training pictures in each.
        nmi: normalised mutual information of the last two assignments; 0 before there are two.
    """

    fields = ("image", "index")
    labels: Tensor
    mean: Tensor
    projection: Tensor
    centroids: Tensor
    sizes: Tensor
    nmi: Tensor

    def __init__(self, config: Config, encoder: Encoder, spec: ImageSpec):
        super().__init__()
        self.config, self.encoder = config, encoder
        self.past_encoder = frozen(copy.deepcopy(encoder))
        self.refresh_every = config.refresh_every
        self.head = nn.Linear(encoder.dim, config.clusters)
        nn.init.normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        width = min(config.pca_dim, encoder.dim)
        random = F.normalize(torch.randn(config.clusters, width), dim=1)
        self.register_buffer("labels", torch.empty(0, dtype=torch.long))
        self.register_buffer("mean", torch.zeros(encoder.dim))
        self.register_buffer("projection", torch.eye(encoder.dim, width))
        self.register_buffer("centroids", random)
        self.register_buffer("sizes", torch.ones(config.clusters, dtype=torch.long))
        self.register_buffer("nmi", torch.zeros(()))

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """One view, one forward pass, cross entropy of the picture's cluster."""
        cluster = self._clusters(batch)
        view = augment(batch["image"], self.config.views, generator)
        logits = self.head(self.encoder.pooled({"image": view}))
        loss = balanced_cross_entropy(logits, cluster, cluster_weights(self.sizes))
        metrics = {
            "accuracy": (logits.detach().argmax(1) == cluster).float().mean(),
            "used_clusters": (self.sizes > 0).sum().float(),
            "nmi": self.nmi,
        }
        return Output(loss, len(view), metrics)

    @torch.no_grad()
    def refresh(self, batches: Iterable[Batch], generator: torch.Generator) -> None:
        """Clusters all pictures by their present features, and draws the last layer anew.

        Raises:
            ConfigError: there are fewer pictures than clusters.
        """
        self.past_encoder.load_state_dict(self.encoder.state_dict())
        pairs = [(self._features(batch), batch["index"]) for batch in batches]
        features, index = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        mean, projection = whitening(features, self.projection.shape[1])
        self.mean.copy_(mean)
        self.projection.copy_(projection)
        features = self._whitened(features)
        centroids = kmeans(features, self.config.clusters, generator, self.config.iterations)
        self.centroids.copy_(centroids)
        labels = torch.empty_like(index)
        labels[index] = assign(features, centroids)
        if len(self.labels) == len(labels):
            self.nmi.copy_(normalised_mutual_information(self.labels, labels))
        self.labels = labels
        self.sizes.copy_(labels.bincount(minlength=self.config.clusters))
        self.head.weight.normal_(0, HEAD_STD, generator=generator)
        self.head.bias.zero_()

    def _features(self, batch: Batch) -> Tensor:
        """(batch, dim) features of unchanged pictures, as at the last `refresh`."""
        with torch.autocast(batch["image"].device.type, enabled=False):  # or labels would differ
            return self.past_encoder.eval().pooled(batch).float()

    def _whitened(self, features: Tensor) -> Tensor:
        """Features (items, dim) where clusters are: (items, width) unit vectors."""
        return F.normalize((features - self.mean) @ self.projection, dim=1)

    @torch.no_grad()
    def _clusters(self, batch: Batch) -> Tensor:
        """(batch,) cluster of each picture: as `refresh` found it, or by features if held out."""
        if self.training:
            return self.labels[batch["index"]]
        return assign(self._whitened(self._features(batch)), self.centroids)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *others: Any) -> None:
        # as many labels as the run had pictures; copying alone would want the same number here
        if f"{prefix}labels" in state:
            self.labels = self.labels.new_empty(state[f"{prefix}labels"].shape)
        super()._load_from_state_dict(state, prefix, *others)
