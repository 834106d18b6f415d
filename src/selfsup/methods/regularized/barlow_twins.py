"""Barlow Twins: each dimension agrees with itself across two views, and with no other dimension.

Zbontar, Jing, Misra, LeCun and Deny, "Barlow Twins: Self-Supervised Learning via Redundancy
Reduction" (2021, arXiv 2103.03230). Each picture is augmented twice; an encoder and a projector map
both views to embeddings, and every dimension is standardised over the batch. The cross-correlation
matrix of the two views is drawn to the identity: a diagonal of 1 makes a dimension say the same of
both views, zeros elsewhere keep two dimensions from saying the same thing. No negatives and no
teacher are needed, since a constant embedding correlates with nothing.

Axes: batch: pictures of this rank; dim: of the embeddings. The matrix is (dim, dim), of all ranks.

Deviations from the paper: lambda is 0.0051, as in the authors' code (paper: 0.005). AdamW takes the
place of LARS. The code multiplies the loss by 0.024 to suit LARS; `scale` offers that. As in that
code the views pass through encoder and projector one after the other, so batch normalisation sees
one view at a time, and the projector's last layer has no bias: standardising takes it away again.

Reference result: 8 CPU minutes on 19,000 pictures of CIFAR-10 with a narrow ResNet
(docs/results/barlow-small.json): frozen features tell 5,000 test pictures with kNN 0.386 and linear
0.442; untrained 0.257 and 0.301, raw pixels 0.327 and 0.396; one seed.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from selfsup import ranks
from selfsup.batch import Batch, ImageSpec
from selfsup.errors import ConfigError
from selfsup.methods.ops import projection_head, target_deviation, view_diagnostics
from selfsup.methods.views import BYOL_FIRST, BYOL_SECOND, ViewConfig, view_pair
from selfsup.models.batch_norm import rank_statistics
from selfsup.models.encoder import Encoder
from selfsup.objective import Objective, Output

EPSILON = 1e-5  # added to the variance, as batch normalisation does


@dataclass(frozen=True, kw_only=True)
class Config:
    """Views, projector and the weight of the off-diagonal. Defaults are the paper's."""

    redundancy_weight: float = 0.0051
    """Weight of the off-diagonal (lambda), beside 1 for the diagonal."""
    scale: float = 1.0
    """Multiplies the whole loss; the authors' code says 0.024, for LARS."""
    hidden_dim: int = 8192
    """Width of the projector's two hidden layers."""
    projection_dim: int = 8192
    """Width of the embeddings: the matrix has as many rows and columns."""
    views_a: ViewConfig = BYOL_FIRST
    """How the first view is made."""
    views_b: ViewConfig = BYOL_SECOND
    """How the second view is made."""

    def __post_init__(self) -> None:
        if not self.redundancy_weight >= 0:
            raise ValueError(f"redundancy_weight must be at least 0, got {self.redundancy_weight}")
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, got {self.scale}")


def cross_correlation(
    first: Float[Tensor, "batch dim"], second: Float[Tensor, "batch dim"]
) -> Float[Tensor, "dim dim"]:
    """Correlation of each dimension of `first` with each of `second`, over all ranks (equation 2).

    Row b of `first` and row b of `second` are the two views of one picture.
    """
    with torch.autocast(first.device.type, enabled=False):  # bfloat16 cannot tell 0.998 from 1
        both = torch.cat([first.float(), second.float()], dim=1)  # (batch, 2 dim)
        mean, variance, count = rank_statistics(both)
        standardised = (both - mean) * torch.rsqrt(variance + EPSILON)
        first, second = standardised.chunk(2, dim=1)
        return ranks.total(first.T @ second) / count


def distance_to_identity(
    matrix: Float[Tensor, "dim dim"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sums of squared differences to the identity, on and off the diagonal (equation 1)."""
    on_diagonal = (1 - matrix.diagonal()).square().sum()
    dim = len(matrix)
    # a row of dim + 1 begins on the diagonal each time; the last element is on it too
    off_diagonal = matrix.flatten()[:-1].view(dim - 1, dim + 1)[:, 1:].square().sum()
    return on_diagonal, off_diagonal


@final
class BarlowTwins(Objective):
    """Reduces redundancy between dimensions; see the module's docstring."""

    fields = ("image",)
    whole_batch = True

    def __init__(self, config: Config, encoder: Encoder, spec: ImageSpec):
        super().__init__()
        self.config, self.encoder = config, encoder
        dims = (encoder.dim, config.hidden_dim, config.hidden_dim, config.projection_dim)
        self.head = projection_head(dims, last_bias=False)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Two views, two forward passes, one matrix for the batch of all ranks."""
        image, config = batch["image"], self.config
        if len(image) * ranks.count() < 2:
            raise ConfigError(
                "barlow_twins correlates over the examples of a batch: training.batch_size >= 2"
            )
        views = view_pair(image, config.views_a, config.views_b, generator)
        first, second = (self.head(self.encoder.pooled({"image": view})) for view in views)
        on_diagonal, off_diagonal = distance_to_identity(cross_correlation(first, second))
        loss = config.scale * (on_diagonal + config.redundancy_weight * off_diagonal)
        metrics = {
            "on_diagonal": on_diagonal.detach(),
            "off_diagonal": off_diagonal.detach(),
            "target_deviation": target_deviation(first),
        }
        if not self.training:
            metrics |= view_diagnostics(first, second)
        return Output(loss, len(image), metrics)
