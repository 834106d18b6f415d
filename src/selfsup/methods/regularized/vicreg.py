"""VICReg: two views of a picture agree, while dimensions keep their spread and stay uncorrelated.

Bardes, Ponce and LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised
Learning" (2021, arXiv 2105.04906). Each picture is augmented twice, and the embeddings of both
views, given by an encoder and an expander, are drawn together (invariance). Within each view, a
hinge keeps the standard deviation of every dimension over the batch above 1 (variance), so that
nothing collapses. Covariances of different dimensions are drawn to 0 (covariance), so that they do
not all say the same thing.

Axes: batch: pictures of this rank; everyone: those of all ranks; dim: of the embeddings.

Deviations from the paper, all as in the authors' code: the invariance term is a mean over
dimensions too (equation 5: a sum), the variance term is the mean of the two views' hinges (equation
6: their sum), and the views are BYOL's unequal pair (appendix C.1: the same for both, with blur 0.5
and solarise 0.1). As there, the views pass through encoder and expander one after the other, so
batch normalisation sees one view at a time, and the expander's last layer has no bias, which would
change no term. AdamW takes the place of LARS.

Reference result: 7 CPU minutes on 19,000 pictures of CIFAR-10 with a narrow ResNet
(docs/results/vicreg-small.json): frozen features tell 5,000 test pictures with kNN 0.413 and linear
0.462; untrained 0.257 and 0.301, raw pixels 0.327 and 0.396; one seed.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from selfsup import ranks
from selfsup.batch import Batch, ImageSpec
from selfsup.errors import ConfigError
from selfsup.methods.ops import projection_head, target_deviation, view_diagnostics
from selfsup.methods.views import BYOL_FIRST, BYOL_SECOND, ViewConfig, view_pair
from selfsup.models.encoder import Encoder
from selfsup.objective import Objective, Output

LEAST_DEVIATION = 1.0  # gamma
EPSILON = 1e-4  # added to the variance: the root's slope is infinite at 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Views, expander and the weights of the three terms. Defaults are the paper's."""

    invariance_weight: float = 25.0
    """Weight of the squared distance between the views (lambda)."""
    variance_weight: float = 25.0
    """Weight of the hinge on standard deviations (mu)."""
    covariance_weight: float = 1.0
    """Weight of the squared covariances (nu)."""
    hidden_dim: int = 8192
    """Width of the expander's two hidden layers."""
    projection_dim: int = 8192
    """Width of the embeddings."""
    views_a: ViewConfig = BYOL_FIRST
    """How the first view is made."""
    views_b: ViewConfig = BYOL_SECOND
    """How the second view is made."""

    def __post_init__(self) -> None:
        for name in ("invariance_weight", "variance_weight", "covariance_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


def variance_hinge(embedding: Float[Tensor, "everyone dim"]) -> Float[Tensor, ""]:
    """How far standard deviations fall short of 1, mean over dimensions (equations 1 and 2)."""
    deviation = (embedding.var(0) + EPSILON).sqrt()
    return F.relu(LEAST_DEVIATION - deviation).mean()


def squared_covariances(embedding: Float[Tensor, "everyone dim"]) -> Float[Tensor, ""]:
    """Squared covariances of different dimensions, sum / dim (equations 3 and 4)."""
    size, dim = embedding.shape
    centred = embedding - embedding.mean(0)
    matrix = centred.T @ centred / (size - 1)  # (dim, dim)
    # a row of dim + 1 begins on the diagonal each time; the last element is on it too
    return matrix.flatten()[:-1].view(dim - 1, dim + 1)[:, 1:].square().sum() / dim


def vicreg_terms(
    first: Float[Tensor, "batch dim"], second: Float[Tensor, "batch dim"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Invariance over this rank's pictures; variance and covariance over those of all ranks.

    Row i of `first` and row i of `second` are the two views of one picture.
    """
    with torch.autocast(first.device.type, enabled=False):
        first, second = first.float(), second.float()
        invariance = F.mse_loss(first, second)
        first, second = ranks.gather(first), ranks.gather(second)  # (everyone, dim)
        variance = (variance_hinge(first) + variance_hinge(second)) / 2
        return invariance, variance, squared_covariances(first) + squared_covariances(second)


@final
class VICReg(Objective):
    """Regularises variance, invariance and covariance; see the module's docstring."""

    fields = ("image",)
    whole_batch = True

    def __init__(self, config: Config, encoder: Encoder, spec: ImageSpec):
        super().__init__()
        self.config, self.encoder = config, encoder
        dims = (encoder.dim, config.hidden_dim, config.hidden_dim, config.projection_dim)
        self.head = projection_head(dims, last_bias=False)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Two views, two forward passes, the three weighted terms."""
        image, config = batch["image"], self.config
        if len(image) * ranks.count() < 2:
            raise ConfigError(
                "vicreg measures variances over the examples of a batch: training.batch_size >= 2"
            )
        views = view_pair(image, config.views_a, config.views_b, generator)
        first, second = (self.head(self.encoder.pooled({"image": view})) for view in views)
        invariance, variance, covariance = vicreg_terms(first, second)
        loss = (
            config.invariance_weight * invariance
            + config.variance_weight * variance
            + config.covariance_weight * covariance
        )
        metrics = {
            "invariance": invariance.detach(),
            "variance": variance.detach(),
            "covariance": covariance.detach(),
            "target_deviation": target_deviation(first),
        }
        if not self.training:
            metrics |= view_diagnostics(first, second)
        return Output(loss, len(image), metrics)
