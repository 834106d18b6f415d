"""Pruning single weights, by magnitude or by movement: the file compresses, the speed stays.

Magnitude (Han et al., 2015, arXiv 1506.02626; for BERT Gordon et al., 2020, arXiv 2002.08307): the
smallest weights of the network go, at once or more of them while it trains on. Movement (Sanh, Wolf
and Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, arXiv 2005.07683): each weight
has a score that grows while training moves the weight away from zero, and in each matrix those of
the lowest scores are read as zero. Both cut more and more by the cubic schedule of Zhu and Gupta
(2017, arXiv 1710.01878).

What is pruned is a zero in a matrix that stays as large and as slow as before: there is no
speed-up, unlike from `pruning.py`. Pruned are the matrices of the blocks; tables, norms, biases and
heads are not.

Deviation from magnitude pruning: the weights of all matrices are compared with each other; Han et
al. take a threshold for each layer.

Deviations from movement pruning:
- Scores are trained at the learning rate of the weights. Their order alone counts, and from 0 on it
  does not depend on the rate.
- No distillation.
- The embeddings move where they did before; there they are frozen.
- By default pruning rests in the last three tenths of the training; in the authors' command for
  SQuAD in the last fifth, after about a tenth of warm-up, as here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from selfsup.batch import Batch
from selfsup.errors import ConfigError
from selfsup.models.encoder import Encoder
from selfsup.models.experts import Experts
from selfsup.objective import Objective, Output
from selfsup.tuning.pruning import prunable


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much is pruned while training, and when."""

    share: float = 0.85  # of the weights, at the end
    by: Literal["movement", "magnitude"] = "movement"
    warmup: float = 0.1  # share of the budget before anything is pruned
    cooldown: float = 0.3  # share of the budget at the end in which no more is pruned

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"the share to prune must lie in [0, 1), got {self.share}")
        if min(self.warmup, self.cooldown) < 0 or self.warmup + self.cooldown >= 1:
            raise ValueError(
                f"warmup and cooldown must leave a part of the budget between them, got "
                f"{self.warmup} and {self.cooldown}"
            )


def matrices(encoder: Encoder) -> list[nn.Linear]:
    """The linear layers of the blocks, whose weights are pruned."""
    return [
        layer
        for block in prunable(encoder).layers
        for part in block.modules()
        if not isinstance(part, Experts)
        for layer in part.children()
        if isinstance(layer, nn.Linear) and layer.weight.numel()
    ]


def prune_magnitude(encoder: Encoder, share: float) -> None:
    """Sets the smallest weights of all blocks to zero, in place.

    Raises:
        ConfigError: the encoder cannot be pruned, or the share is not between 0 and 1.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"the share to prune must lie in [0, 1), got {share}")
    weights = [layer.weight.detach() for layer in matrices(encoder)]
    for weight, mask in zip(weights, _masks([w.abs() for w in weights], share), strict=True):
        weight *= mask


def zero_share(encoder: Encoder) -> float:
    """The share of zeros in the matrices of the blocks."""
    weights = [layer.weight for layer in matrices(encoder)]
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))


def pruned_share(progress: float, config: Config) -> float:
    """The share that is pruned at `progress` (0 to 1) of the budget.

    >>> config = Config(share=0.8, warmup=0.2, cooldown=0.2)
    >>> [round(pruned_share(p, config), 3) for p in (0.1, 0.2, 0.5, 0.8, 1.0)]
    [0.0, 0.0, 0.7, 0.8, 0.8]
    """
    through = (progress - config.warmup) / (1 - config.warmup - config.cooldown)
    return config.share * (1 - (1 - min(1.0, max(0.0, through))) ** 3)


def lowest_pruned(scores: Tensor, count: int) -> Tensor:
    """A mask of 0 at the `count` lowest scores and 1 at the others; of equal ones the first go.

    >>> lowest_pruned(torch.tensor([3.0, 1.0, 1.0, 2.0]), 1)
    tensor([1., 0., 1., 1.])
    """
    mask = torch.ones_like(scores)
    if count == 0:
        return mask
    flat = scores.flatten()
    limit = flat.kthvalue(count).values
    below = flat < limit
    ties = (flat == limit).nonzero().flatten()[: count - int(below.sum())]
    mask.view(-1)[below] = 0
    mask.view(-1)[ties] = 0
    return mask


def _masks(scores: Sequence[Tensor], share: float) -> Iterable[Tensor]:
    """Masks of all matrices, the lowest scores of them together pruned."""
    together = torch.cat([score.flatten() for score in scores])
    parts = lowest_pruned(together, round(share * len(together))).split([s.numel() for s in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


class Masked(nn.Module):
    """Stands before a weight matrix, whose pruned entries are read as 0.

    With scores the gradient goes straight through the mask: that of a score is the weight times the
    gradient at the masked weight, for pruned weights too (section 4 of Sanh et al.).

    Attributes:
        mask: 1 where the weight is left.
        scores: of the weights' shape; None: the weights themselves decide.
    """

    mask: Tensor

    def __init__(self, weight: Tensor, scored: bool):
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight))
        self.scores = nn.Parameter(torch.zeros_like(weight)) if scored else None

    def forward(self, weight: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "outputs inputs"]:
        """The weight as the layer reads it."""
        if self.scores is None:
            return weight * self.mask
        return weight * (self.mask + (self.scores - self.scores.detach()))


@final
class Sparsifying(Objective):
    """A task or a method whose encoder loses weights while it trains; `finish` makes them zeros.

    Args:
        config: how much, and when.
        objective: changed in place; what is trained is this object.
    """

    def __init__(self, config: Config, objective: Objective):
        super().__init__()
        self.config, self.objective = config, objective
        self.fields, self.kept = objective.fields, objective.kept
        self.refresh_every, self.chance_loss = objective.refresh_every, objective.chance_loss
        self.layers = matrices(objective.encoder)  # a list: the objective holds them
        self.parts = [Masked(layer.weight, config.by == "movement") for layer in self.layers]
        for layer, part in zip(self.layers, self.parts, strict=True):
            parametrize.register_parametrization(layer, "weight", part)

    @property
    def encoder(self) -> Encoder:  # type: ignore[override]
        """That of the objective."""
        return self.objective.encoder

    def train(self, mode: bool = True) -> Self:
        """As the objective does."""
        self.training = mode
        self.objective.train(mode)
        return self

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """The objective's loss with the weights that are left."""
        return self.objective.loss(batch, generator)

    def after_step(self, step: int, total: int) -> None:
        """Prunes as much as the schedule says after this step."""
        self.objective.after_step(step, total)
        self.prune(pruned_share((step + 1) / total, self.config))

    def refresh(self, batches: Iterable[Batch], generator: torch.Generator) -> None:
        """The objective's own."""
        self.objective.refresh(batches, generator)

    @torch.no_grad()
    def prune(self, share: float) -> None:
        """Sets the masks: by movement in each matrix, by magnitude over all of them."""
        if self.config.by == "movement":
            scores = [part.scores for part in self.parts if part.scores is not None]
            masks = [lowest_pruned(score, round(share * score.numel())) for score in scores]
        else:
            weights = [cast(Any, layer).parametrizations.weight.original for layer in self.layers]
            masks = list(_masks([weight.abs() for weight in weights], share))
        for part, mask in zip(self.parts, masks, strict=True):
            part.mask.copy_(mask)

    def finish(self) -> None:
        """Writes the zeros into the weights; the objective is then as it was built."""
        for layer in self.layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
