"""BYOL: what a slow teacher says of one view is predicted from another, without negatives.

Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning" (2020, arXiv
2006.07733). The online network (encoder, projector, predictor) sees one view of a picture and
predicts the projection that the teacher gives of another view. The teacher is a moving average of
encoder and projector and gets no gradient; it moves ever more slowly and stands still at the end.
No picture is compared with others: it is the predictor and the moving teacher that keep the
network from giving one vector for all.

Axes: batch: pictures of this rank; dim: width of the projections.

As in the authors' code, each view goes through the networks by itself, with batch statistics of its
own. So it is in the teacher, whose running statistics come from its own passes: the online
network's would not fit its weights.

Deviations from the paper:
- The teacher begins as a copy of the online network; in the authors' code it has random weights of
  its own, which made no difference to them.
- The last layer of projector and predictor has a bias, which theirs lacks.
- AdamW takes the place of LARS.

Reference result: 8 CPU minutes on 19,000 pictures of CIFAR-10 with a narrow ResNet
(docs/results/byol-small.json): frozen features tell 5,000 test pictures with kNN 0.393 and linear
0.442; untrained 0.257 and 0.301, raw pixels 0.327 and 0.396; one seed.
"""

import copy
import math
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
    frozen,
    move_average,
    projection_head,
    target_deviation,
    view_diagnostics,
)
from selfsup.methods.views import BYOL_FIRST, BYOL_SECOND, ViewConfig, view_pair
from selfsup.models.encoder import Encoder
from selfsup.objective import Objective, Output


@dataclass(frozen=True, kw_only=True)
class Config:
    """Teacher, heads and views. Defaults are the paper's for ImageNet."""

    momentum: float = 0.996
    """What the teacher keeps of itself at the first step; it rises to 1 over the run."""
    hidden_dim: int = 4096
    """Width of the hidden layer of projector and predictor."""
    projection_dim: int = 256
    """Width of projections and predictions."""
    views_a: ViewConfig = BYOL_FIRST
    """How the first view is made."""
    views_b: ViewConfig = BYOL_SECOND
    """How the second view is made."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must be from 0 to 1, got {self.momentum}")
        for name in ("hidden_dim", "projection_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def regression_loss(
    prediction: Float[Tensor, "batch dim"], target: Float[Tensor, "batch dim"]
) -> Float[Tensor, ""]:
    """Mean squared distance of unit vectors, 2 - 2 cosines (equation 2), in float32."""
    return 2 - 2 * cosine_similarity(prediction, target).mean()


def momentum_at(step: int, total: int, first: float) -> float:
    """The teacher's momentum after step `step` of `total` (section 3.2), from `first` towards 1.

    >>> [round(momentum_at(step, 4, 0.9), 3) for step in range(5)]
    [0.9, 0.915, 0.95, 0.985, 1.0]
    """
    return 1 - (1 - first) * (math.cos(math.pi * step / total) + 1) / 2


@final
class BYOL(Objective):
    """Predicts what the teacher says of the other view; see the module's docstring."""

    fields = ("image",)
    whole_batch = True

    def __init__(self, config: Config, encoder: Encoder, spec: ImageSpec):
        super().__init__()
        self.config, self.encoder = config, encoder
        hidden, dim = config.hidden_dim, config.projection_dim
        self.projector = projection_head((encoder.dim, hidden, dim))
        self.predictor = projection_head((dim, hidden, dim))
        self.teacher_encoder = frozen(copy.deepcopy(encoder))
        self.teacher_projector = frozen(copy.deepcopy(self.projector))

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Each view predicts the teacher's projection of the other; the sum of both losses."""
        config, size = self.config, len(batch["image"])
        if self.training and size * ranks.count() < 2:
            raise ConfigError("byol normalises over the batch: training.batch_size >= 2")
        views = view_pair(batch["image"], config.views_a, config.views_b, generator)
        online = [self.projector(self.encoder.pooled({"image": view})) for view in views]
        first, second = (self.predictor(projection) for projection in online)
        targets = [self._target(view) for view in views]
        loss = regression_loss(first, targets[1]) + regression_loss(second, targets[0])
        metrics = {"target_deviation": target_deviation(torch.cat(targets))}
        if not self.training:
            metrics |= view_diagnostics(*online)
        return Output(loss, size, metrics)

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Moves the teacher (equation 1)."""
        momentum = momentum_at(step, total, self.config.momentum)
        online = [*self.encoder.parameters(), *self.projector.parameters()]
        teacher = [*self.teacher_encoder.parameters(), *self.teacher_projector.parameters()]
        move_average(teacher, online, momentum)

    @torch.no_grad()
    def _target(self, view: Tensor) -> Tensor:
        return self.teacher_projector(self.teacher_encoder.pooled({"image": view}))
