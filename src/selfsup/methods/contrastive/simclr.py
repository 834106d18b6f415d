"""SimCLR: two views of one picture are found among the views of all others.

Chen, Kornblith, Norouzi and Hinton, "A Simple Framework for Contrastive Learning of Visual
Representations" (2020, arXiv 2002.05709). Each picture is augmented twice; an encoder and a
projection head map both views to unit vectors; each view must pick out its partner among all views
of the batch. The projection head is thrown away: what lies before it serves tasks better.

Axes: batch: pictures of this rank; everyone: views of all ranks, 2 * ranks * batch; dim.

Deviations from the paper: none in the loss. AdamW takes the place of LARS, which pays at batches of
thousands. Small pictures (32 pixels) want no blur, as in the paper's appendix B.9, and a
temperature of 0.2 to 0.5.

Reference result: docs/results/simclr-small.json, with its command.
"""

from dataclasses import dataclass, field
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from selfsup import ranks
from selfsup.batch import Batch, ImageSpec
from selfsup.errors import ConfigError
from selfsup.methods.ops import projection_head, view_diagnostics
from selfsup.methods.views import ViewConfig, view_pair
from selfsup.models.encoder import Encoder
from selfsup.objective import Objective, Output


@dataclass(frozen=True, kw_only=True)
class Config:
    """Views, head and temperature. Defaults are the paper's for ImageNet."""

    temperature: float = 0.1
    """Divides the cosines; smaller looks at the hardest negatives more."""
    hidden_dim: int = 2048
    """Width of the projection head's hidden layer."""
    projection_dim: int = 128
    """Width of the vectors that are compared."""
    views: ViewConfig = field(default_factory=ViewConfig)
    """How both views are made."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")


def nt_xent(
    first: Float[Tensor, "batch dim"], second: Float[Tensor, "batch dim"], temperature: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Normalised temperature-scaled cross entropy (equation 1) and how often the partner is first.

    Row i of `first` and row i of `second` are the two views of one picture; negatives are all other
    views, of all ranks. The mean is over this rank's 2 * batch views.
    """
    first, second = F.normalize(first.float(), dim=1), F.normalize(second.float(), dim=1)
    everyone = torch.cat([ranks.gather(first), ranks.gather(second)])  # (everyone, dim)
    half = len(everyone) // 2
    place = ranks.number() * len(first) + torch.arange(len(first), device=first.device)
    own, partner = torch.cat([place, half + place]), torch.cat([half + place, place])
    with torch.autocast(first.device.type, enabled=False):  # it would round the cosines
        logits = torch.cat([first, second]) @ everyone.T / temperature  # (2 batch, everyone)
    logits = logits.scatter(1, own.unsqueeze(1), -torch.inf)  # a view is not its own negative
    accuracy = (logits.detach().argmax(1) == partner).float().mean()
    return F.cross_entropy(logits, partner), accuracy


@final
class SimCLR(Objective):
    """Finds the other view of the same picture; see the module's docstring."""

    fields = ("image",)
    whole_batch = True

    def __init__(self, config: Config, encoder: Encoder, spec: ImageSpec):
        super().__init__()
        self.config, self.encoder = config, encoder
        self.head = projection_head((encoder.dim, config.hidden_dim, config.projection_dim))

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Two views, one forward pass, NT-Xent over all of them."""
        size = len(batch["image"])
        if size * ranks.count() < 2:
            raise ConfigError("simclr takes its negatives from the batch: training.batch_size >= 2")
        views = view_pair(batch["image"], self.config.views, self.config.views, generator)
        projected = self.head(self.encoder.pooled({"image": torch.cat(views)}))
        first, second = projected.chunk(2)
        loss, accuracy = nt_xent(first, second, self.config.temperature)
        metrics = {"found": accuracy}
        if not self.training:
            metrics |= view_diagnostics(first, second)
        return Output(loss, size, metrics)
