"""LoRA: the change of a weight matrix is a product of two thin ones, and only these are trained.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021, arXiv 2106.09685), section
4.1: W x + (alpha / rank) * B A x. B begins at zero, so the first step starts from the pre-trained
model; A begins as `nn.Linear` does (the authors' code; the paper says Gaussian).

Axes: rank; in: of the linear layer; share: the parts of a fused projection that are tuned, each
with an A and a B of its own, as if it were a layer by itself; width: of a share.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.models.dropout import Dropout
from selfsup.objective import Task
from selfsup.tuning.parts import Part, Where, add, innermost, linear_places


@dataclass(frozen=True, kw_only=True)
class Config:
    """How large the change is, and of which layers."""

    rank: int = 8
    """Inner width of the change."""
    alpha: float = 16.0
    """The change is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("query", "value")
    """Linear layers, as in `parts.linear_places`: query, key, value, out, up, down, all, ..."""
    dropout: float = 0.0
    """On what A reads."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")
        if not self.targets:
            raise ValueError("targets must name at least one kind of linear layer")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


@final
class LoRA(Part):
    """The change of one linear layer, or of some equal shares of a fused one.

    Args:
        layer: whose output is changed.
        shares: numbers of the shares, () for the whole layer.
        config: rank, alpha and dropout.

    >>> layer = nn.Linear(4, 6)
    >>> x = torch.randn(2, 4)
    >>> torch.equal(LoRA(layer, (0, 2), Config(rank=1))(x, layer(x)), layer(x))
    True
    """

    def __init__(self, layer: nn.Linear, shares: tuple[int, ...], config: Config):
        super().__init__()
        self.fused, self.shares = bool(shares), shares or (0,)
        self.width = layer.out_features // (3 if shares else 1)  # query, key, value
        self.scale = config.alpha / config.rank
        self.dropout = Dropout(config.dropout)
        like = layer.weight
        self.a = nn.Parameter(like.new_empty(len(self.shares), config.rank, layer.in_features))
        self.b = nn.Parameter(like.new_zeros(len(self.shares), self.width, config.rank))
        for matrix in self.a:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds the change to `y`, in place: a linear layer's output is nobody else's."""
        thin = F.linear(self.dropout(x), self.a.flatten(0, 1)).unflatten(-1, self.a.shape[:2])
        for i, share in enumerate(self.shares):
            change = F.linear(thin[..., i, :], self.b[i])
            y.narrow(-1, share * self.width, self.width).add_(change, alpha=self.scale)
        return y

    @torch.no_grad()
    def change(self) -> Float[Tensor, "share width in"]:
        """What is added to the rows of the weight matrix that belong to each share."""
        return self.scale * self.b @ self.a

    @torch.no_grad()
    def merge(self, module: nn.Module, sign: int = 1) -> None:
        """Adds the change to the layer's weights."""
        assert isinstance(module, nn.Linear)
        for share, change in zip(self.shares, self.change(), strict=True):
            module.weight.narrow(0, share * self.width, self.width).add_(change, alpha=sign)


def lora(task: Task, config: Config, where: Where) -> None:
    """Adds a low-rank change to the chosen linear layers."""
    encoder = innermost(task.encoder)
    for place, shares in linear_places(encoder, config.targets).items():
        layer = encoder.get_submodule(place)
        assert isinstance(layer, nn.Linear)
        add(encoder, where.name, "lora", place, LoRA(layer, shares, config))
