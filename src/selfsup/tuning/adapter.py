"""Adapters: small bottleneck networks behind the halves of every block, and only these are trained.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (2019, arXiv 1902.00751), section 2:
what a sub-layer gives is projected down, passes an activation, is projected up and added to what
came in; the sum goes on to the residual sum and the norm of the block. Both matrices begin small
and not at zero, so the first step starts near the pre-trained model, not quite from it: as a normal
distribution that is cut off at two standard deviations, of 1e-3 in the authors' code (section 3.6
has 1e-2, and finds that anything below does as well).

`houlsby` puts one behind every attention, a decoder's cross-attention included, and one behind
every feed-forward layer. `pfeiffer` puts one behind the feed-forward layer alone, the place that
Pfeiffer et al. found to be enough (AdapterFusion, 2020, arXiv 2005.00247); theirs reads the
residual sum behind its norm, here it reads the feed-forward layer's output as that of `houlsby`
does. Where blocks share their weights (ALBERT) they share their adapters.

Axes: dim; width: of the bottleneck.

Deviations from Houlsby et al.:
- The norms of the blocks stay as they are; "adapter+bias" moves their biases.
- The blocks' dropout comes behind the adapter, not before it.
"""

from dataclasses import dataclass
from typing import Any, Literal, final

from torch import Tensor, nn

from selfsup.models.block import ACTIVATIONS
from selfsup.objective import Task
from selfsup.tuning.parts import Part, Where, add, blocks, innermost


@dataclass(frozen=True, kw_only=True)
class Config:
    """Where adapters sit, and how wide they are."""

    places: Literal["houlsby", "pfeiffer"] = "houlsby"
    """Behind attention and feed-forward layers, or behind the latter alone."""
    reduction: int = 16
    """The width is the encoder's divided by this, at least 1."""
    width: int = 0
    """The width itself; 0: by `reduction`."""
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    """Between the two projections."""
    layer_norm: bool = False
    """Normalise what the bottleneck reads."""
    init_std: float = 1e-3
    """Standard deviation of the initial weights, before it is cut off at two of them."""

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {self.reduction}")
        if self.width < 0:
            raise ValueError(f"width must not be negative, got {self.width}")
        if self.init_std < 0:
            raise ValueError(f"init_std must not be negative, got {self.init_std}")


@final
class Adapter(Part):
    """y + up(activation(down(y))).

    Args:
        dim: of what comes in and goes out.
        config: width, activation and norm.
        like: gives device and type of the weights.

    >>> import torch
    >>> y = torch.randn(2, 8)
    >>> Adapter(8, Config(width=3), y)(y, y).shape
    torch.Size([2, 8])
    """

    def __init__(self, dim: int, config: Config, like: Tensor):
        super().__init__()
        width = config.width or max(1, dim // config.reduction)
        where: Any = {"device": like.device, "dtype": like.dtype}
        self.norm = nn.LayerNorm(dim, **where) if config.layer_norm else None
        self.down = nn.Linear(dim, width, **where)
        self.up = nn.Linear(width, dim, **where)
        self.activation = ACTIVATIONS[config.activation]
        for layer in (self.down, self.up):
            cut = 2 * config.init_std
            if cut:
                nn.init.trunc_normal_(layer.weight, std=config.init_std, a=-cut, b=cut)
            else:
                nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What the sub-layer gave, and what the bottleneck makes of it."""
        inner = y if self.norm is None else self.norm(y)
        return y + self.up(self.activation(self.down(inner))).to(y.dtype)


def adapter(task: Task, config: Config, where: Where) -> None:
    """Adds bottlenecks to every block.

    Raises:
        ConfigError: the encoder has no transformer blocks, or experts in them.
    """
    encoder = innermost(task.encoder)
    for name, block in blocks(encoder, "adapter").items():
        behind = "attention", "cross", "feedforward"
        for half in behind if config.places == "houlsby" else behind[-1:]:
            if hasattr(block, half):
                part = Adapter(block.shape[0], config, block.attention.out.weight)
                add(encoder, where.name, "adapter", f"{name}.{half}", part)
