"""SimSiam: one view's projection is predicted from another's, by one network without a teacher.

Chen and He, "Exploring Simple Siamese Representation Learning" (2020, arXiv 2011.10566). Encoder
and projector map two views of a picture to projections; a predictor with a narrow middle predicts
each from the other. The projection that is predicted counts as a constant: no gradient flows into
it. This stop-gradient alone, without negatives or a moving average, keeps the network from giving
one vector for all.

Axes: batch: pictures of this rank; dim: width of the projections.

As in the authors' code, each view goes through the network by itself, with batch statistics of its
own.

Deviations from the paper:
- The predictor's learning rate falls with all others; the paper's stays, for 0.4 points (table 1).
- AdamW takes the place of SGD.

For CIFAR (appendix D) the paper's projector has 2 layers, and the views no blur.

Reference result: 10 CPU minutes on 19,000 pictures of CIFAR-10 with a narrow ResNet
(docs/results/simsiam-small.json): frozen features tell 5,000 test pictures with kNN 0.372 and
linear 0.445; untrained 0.257 and 0.301, raw pixels 0.327 and 0.396; one seed.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from selfsup import ranks
from selfsup.batch import Batch, ImageSpec
from selfsup.errors import ConfigError
from selfsup.methods.ops import (
    cosine_similarity,
    projection_head,
    target_deviation,
    view_diagnostics,
)
from selfsup.methods.views import MOCO_V2, ViewConfig, view_pair
from selfsup.models.encoder import Encoder
from selfsup.objective import Objective, Output


@dataclass(frozen=True, kw_only=True)
class Config:
    """Heads and views. Defaults are the paper's for ImageNet."""

    projector_layers: int = 3
    """Linear layers of the projector, batch normalisation after each."""
    projection_dim: int = 2048
    """Width of the projections and of the projector's hidden layers."""
    predictor_dim: int = 512
    """Width of the predictor's hidden layer, narrower than the projections."""
    views: ViewConfig = MOCO_V2
    """How both views are made."""

    def __post_init__(self) -> None:
        for name in ("projector_layers", "projection_dim", "predictor_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def negative_cosine(
    prediction: Float[Tensor, "batch dim"], target: Float[Tensor, "batch dim"]
) -> Float[Tensor, ""]:
    """Mean of minus the cosines (equation 1), in float32; no gradient flows into `target`."""
    return -cosine_similarity(prediction, target.detach()).mean()


@final
class SimSiam(Objective):
    """Predicts the projection of the other view; see the module's docstring."""

    fields = ("image",)
    whole_batch = True

    def __init__(self, config: Config, encoder: Encoder, spec: ImageSpec):
        super().__init__()
        self.config, self.encoder = config, encoder
        dim, layers = config.projection_dim, config.projector_layers
        self.projector = projection_head((encoder.dim, *[dim] * layers), last_norm=True)
        self.predictor = projection_head((dim, config.predictor_dim, dim))

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Each view's prediction of the other's projection; the mean of both losses."""
        size = len(batch["image"])
        if self.training and size * ranks.count() < 2:
            raise ConfigError("simsiam normalises over the batch: training.batch_size >= 2")
        views = view_pair(batch["image"], self.config.views, self.config.views, generator)
        first, second = (self.projector(self.encoder.pooled({"image": view})) for view in views)
        forth = negative_cosine(self.predictor(first), second)
        back = negative_cosine(self.predictor(second), first)
        metrics = {"target_deviation": target_deviation(torch.cat([first, second]))}
        if not self.training:
            metrics |= view_diagnostics(first, second)
        return Output((forth + back) / 2, size, metrics)
